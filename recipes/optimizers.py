"""Which optimizer is best when all are tuned alike: on fresh text, and on the same text over and over?

Claim: SPECTRA lowers the loss of its base optimizers and Fira that of GaLore (docs/spectra.md section 3, docs/fira.md
section 2); with many epochs and heavy decay nothing has been published.
Command: epochal run optimizers --scale micro
Results: recipes/results/<scale>/report.md

Equal terms: every arm gets the same number of runs over learning rate and decay, the same seeds at its optimum, and the
same data in the same order. Add an arm as one line below; it is tuned like the others and appears in every table.
"""

import statistics
from dataclasses import dataclass
from typing import Annotated, Any

from epochal.config import nearest
from epochal.ranges import Decay, Epochs, Items, Ranged, Rate, Repeats, Tokens, shown
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.comparison import (
    ArmLosses,
    Pair,
    beyond_noise,
    gains_by_seed,
    long_enough,
    pair_claims,
    within_noise,
)
from epochal.report.figures import LOSS_AXIS, draw_ranking
from epochal.report.sections import Figure, Section, Table
from epochal.run import AdamW, AdEMAMix, Fira, Job, Mars, Muon, Signum, Spectra
from epochal.scale import Scale
from epochal.scaling import seed_caveats, seed_interval
from epochal.study import Arm, Result, Study, Sweep, judged_of

# The threshold of 2 is for the width 32 of these comparisons. The paper's 10 is for widths from 768: the largest singular
# value of a random update grows with the square root of the width.
ARMS = (
    Arm("AdamW", optimizer=AdamW()),
    # Fira, GaLore and AdEMAMix have this beta2 by default and MARS 0.99, so this is the baseline on their terms.
    Arm("AdamW-0.999", optimizer=AdamW(beta2=0.999)),
    # Every entry of a sign update is as large as the largest of Adam's, so its learning rates are lower.
    Arm("Signum", optimizer=Signum(), lr_factor=0.25),
    Arm("AdEMAMix", optimizer=AdEMAMix()),
    Arm("MARS", optimizer=Mars()),
    Arm("Muon", optimizer=Muon()),
    Arm("SPECTRA-AdamW", optimizer=Spectra(base=AdamW(), clip=2.0)),
    Arm("SPECTRA-Signum", optimizer=Spectra(base=Signum(), clip=2.0)),
    Arm("SPECTRA-AdEMAMix", optimizer=Spectra(base=AdEMAMix(), clip=2.0)),
    Arm("SPECTRA-MARS", optimizer=Spectra(base=Mars(), clip=2.0)),
    Arm("Fira", optimizer=Fira()),
    Arm("GaLore", optimizer=Fira(variant="galore")),
)
BASE, LIKE_FIRA = "AdamW", "AdamW-0.999"

# What the papers report is about one pass over fresh text; `size` is their effect in nats.
PAIRS = (
    Pair(
        better="SPECTRA-AdamW", worse=BASE, size=0.026, paper="0.026 nats at 780M (2.608 to 2.582), spectra section 3"
    ),
    Pair(
        better="SPECTRA-Signum",
        worse="Signum",
        size=0.027,
        paper="0.027 nats at 780M (2.600 to 2.573), spectra section 3",
    ),
    Pair(
        better="SPECTRA-AdEMAMix",
        worse="AdEMAMix",
        size=0.017,
        paper="0.017 nats at 780M (2.591 to 2.574), spectra section 3",
    ),
    Pair(
        better="SPECTRA-MARS", worse="MARS", size=0.025, paper="0.025 nats at 820M (2.614 to 2.589), spectra section 3"
    ),
    Pair(
        better="Fira", worse="GaLore", size=0.116, paper="0.116 nats at 60M (perplexity 34.88 to 31.06), fira section 2"
    ),
    Pair(better="Fira", worse=BASE, size=0.092, paper="0.092 nats at 60M (perplexity 34.06 to 31.06), fira section 2"),
    Pair(
        better="Fira",
        worse=LIKE_FIRA,
        size=0.092,
        paper="0.092 nats at 60M (perplexity 34.06 to 31.06), fira section 2",
    ),
    *(
        Pair(
            better=label,
            worse="GaLore",
            text=f"GaLore is not better than {label}",
            size=0.024,
            paper="0.024 nats at 60M (perplexity 34.06 to 34.88), fira section 2",
        )
        for label in (BASE, LIKE_FIRA)
    ),
)


@dataclass(frozen=True, kw_only=True)
class Feed(Ranged):
    """One way to feed the optimizers: how much text, how many epochs, and a grid."""

    name: str
    tokens: Tokens  # D
    epochs: Epochs
    # This and the next: as AdamW is tried; other arms have a factor.
    lr: Annotated[tuple[Rate, ...], Items(ascending=True)]
    wd: Annotated[tuple[Decay, ...], Items(ascending=True)]


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """The size, the ways to feed it, and the seeds at each optimum."""

    model: str
    settings: Annotated[tuple[Feed, ...], Items()]
    seeds: Repeats = 3

    def check(self, scale: Scale) -> None:
        """Refuse two settings of one name, and budgets that the batch does not divide."""
        names = [feed.name for feed in self.settings]
        if len(set(names)) < len(names):
            raise ValueError(f"settings have the names {', '.join(names)}; give each another.")
        for feed in self.settings:
            scale.check_budget(feed.tokens)


def sweeps(study: Study) -> dict[str, Sweep]:
    """Return the full grid of every setting by its name."""
    settings = study.settings(Settings)
    if settings is None:
        return {}
    return {
        feed.name: Sweep(
            model=settings.model, tokens=feed.tokens, epochs=feed.epochs, lr=feed.lr, wd=feed.wd, seeds=settings.seeds
        )
        for feed in settings.settings
    }


def sweep(study: Study, setting: str) -> Sweep:
    """Return the full grid of one setting; raises ValueError when [optimizers] lacks it."""
    known = sweeps(study)
    if setting not in known:
        where = f"scale {study.scale.name!r}, [optimizers]"
        raise ValueError(f"{where}: there is no setting {shown(setting)}{nearest(setting, known)}; add it there.")
    return known[setting]


def arm(label: str) -> Arm:
    """Return an arm by its label; raises ValueError for an unknown one."""
    known = {arm.label: arm for arm in ARMS}
    if label not in known:
        raise ValueError(f"there is no optimizer {shown(label)}{nearest(label, known)}; known: {', '.join(known)}.")
    return known[label]


def plan(study: Study) -> list[Job]:
    """Return the whole grid of every arm, then its seeds at the best point."""
    return [job for sweep in sweeps(study).values() for arm in ARMS for job in study.sweep_jobs(arm, sweep)]


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Compare the optimizers in each setting, each at its own optimum."""
    claims: list[Claim] = []
    for name, sweep in sweeps(study).items():
        claims += comparisons(study, name, sweep)
        claims += _ranking_claim(study, name, sweep)
        claims += _cost_claims(study, name, sweep) if sweep.epochs == 1 else []
    notes = (
        "Every optimizer: the same grid of lr and wd (times and over its factor), then further seeds at its best point. "
        "The first seed chose the point on the validation split; losses are those of the test split.",
        "Differences are paired by seed: both runs start from the same weights and see the same batches.",
        "State: optimizer state in bytes over the bytes of the weights in float32. Share: the optimizer's part of a "
        "training step's time on the machine that ran it. Norm: the largest singular value of any matrix of the blocks.",
    )
    return Section(
        title="Optimizers",
        question="Which optimizer is best when all are tuned alike, on fresh text and on repeated text?",
        claims=tuple(claims),
        tables=tuple(_table(study, sweep) for sweep in sweeps(study).values()),
        figures=tuple(f for name, sweep in sweeps(study).items() for f in _figures(study, name, sweep)),
        notes=notes if claims else ("This scale has no table [optimizers] or no results, so nothing is compared.",),
    )


def losses(study: Study, arm: Arm, sweep: Sweep) -> ArmLosses:
    """Return the losses of an arm at its best point by seed, with their caveats."""
    result = study.swept(arm, sweep)
    return ArmLosses(label=arm.label, losses=result.losses, caveats=caveats(result, arm.label, sweep))


def caveats(result: Result, label: str, sweep: Sweep) -> tuple[str, ...]:
    """Name what the result of one arm lacks for a final verdict."""
    few = (f"seeds of {label}",) if len(result.records) < judged_of(sweep.seeds) else ()
    edge = (f"{label} is best at the end of its grid ({' and '.join(result.edges)})",) if result.edges else ()
    return (*few, *edge, *(("one seed",) if sweep.seeds < 2 else ()))


def comparisons(study: Study, name: str, sweep: Sweep) -> list[Claim]:
    """Return the claims of `PAIRS` in one setting."""
    pairs = [
        Pair(
            better=pair.better,
            worse=pair.worse,
            id=f"optimizers.{name}.{pair.better}-{pair.worse}".lower(),
            text=pair.text,
            size=pair.size if sweep.epochs == 1 else None,
            # The papers report one pass over fresh text only.
            paper=pair.paper if sweep.epochs == 1 else "",
        )
        for pair in PAIRS
    ]
    # Arms of one sweep have enough steps or none has.
    runs = [run for arm in ARMS for run in study.swept(arm, sweep).runs]
    claims = pair_claims([losses(study, arm, sweep) for arm in ARMS], pairs, condition=sweep.title, selecting=0)
    return [long_enough(claim, runs) for claim in claims]


def _ranking_claim(study: Study, name: str, sweep: Sweep) -> list[Claim]:
    """Report which optimizer comes first, and by how much it beats AdamW."""
    results = {arm.label: result for arm in ARMS if (result := study.swept(arm, sweep))}
    if len(results) < 2 or BASE not in results:
        return []
    first = min(results, key=lambda label: results[label].validation)
    reasons = [c for label in (first, BASE) for c in caveats(results[label], label, sweep)]
    waiting = [arm.label for arm in ARMS if arm.label not in results]
    gains = list(gains_by_seed(results[first].losses, results[BASE].losses).values())
    noise = within_noise(seed_interval(gains)) if first != BASE else ()
    return [
        Claim(
            id=f"optimizers.{name}.ranking",
            text=f"{sweep.title}: another optimizer than {BASE} comes first",
            value=f"{BASE} comes first"
            if first == BASE
            else f"{first}, {statistics.fmean(gains):+.4f} nats below {BASE}",
            interval=seed_interval(gains) if first != BASE else None,
            seeds=min(len(result.records) for result in results.values()),
            holds=first != BASE and beyond_noise(statistics.fmean(gains) > 0, noise),
            provisional=(*dict.fromkeys(reasons), *noise, *((f"{', '.join(waiting)} not run",) if waiting else ())),
        )
    ]


def _cost_claims(study: Study, name: str, sweep: Sweep) -> list[Claim]:
    """What the papers report on memory, weights and time, each at the optimizers' own optimum."""
    labels = (BASE, "SPECTRA-AdamW", "Fira")
    plain, clipped, projected = (list(study.swept(arm(label), sweep).records.values()) for label in labels)
    if not (plain and clipped and projected):
        return []
    claims, pair = [], min(len(clipped), len(plain))
    states = _state(projected[0]), _state(plain[0])
    if states[0] is not None and states[1] is not None:
        claims.append(
            Claim(
                id=f"optimizers.{name}.fira-state",
                text=f"Fira's optimizer state is smaller than AdamW's ({sweep.model}, rank a quarter of its width)",
                value=f"{states[0]:.2f} against {states[1]:.2f} times the weights",
                seeds=len(projected),
                holds=states[0] < states[1],
                paper="0.36 against 0.48 GB at 60M with weights and gradients, fira section 2",
            )
        )
    norms = _norm(clipped), _norm(plain)
    if norms[0] is not None and norms[1] is not None:
        by_seed = [(_norm([ours]), _norm([base])) for ours, base in zip(clipped, plain, strict=False)]
        smaller = [base - ours for ours, base in by_seed if ours is not None and base is not None]
        claims.append(
            Claim(
                id=f"optimizers.{name}.spectra-norm",
                text=f"{sweep.title}: SPECTRA-AdamW ends with smaller weights than AdamW (largest singular value)",
                value=f"{norms[1] - norms[0]:+.2f} ({norms[0]:.2f} against {norms[1]:.2f})",
                interval=seed_interval(smaller),
                seeds=pair,
                holds=beyond_noise(norms[0] < norms[1], seed_caveats(smaller)),
                paper="smaller weight norms (no number), spectra section 3",
                provisional=seed_caveats(smaller),
            )
        )
    slower = _overhead(clipped, plain)
    if slower is not None:
        claims.append(
            Claim(
                id=f"optimizers.{name}.spectra-time",
                text="SPECTRA adds little to AdamW's step",
                value=f"{slower:+.1%} of a step of {sweep.model}",
                seeds=pair,
                paper="+18.7% at 160M, +1.6% at 780M on four H100, spectra section 3",
                untestable="a small model on a CPU; the clip alone is in benchmarks/optimizers.csv",
            )
        )
    return claims


def _overhead(*pair: list[Record]) -> float | None:
    """Return how much longer a step is with the first optimizer than with the second."""
    # Both steps relative to the model passes, which take the same time: a step is 1 / (1 - the optimizer's share) of them.
    steps = []
    for records in pair:
        shares = [float(s) for record in records if (s := record.provenance.get("optimizer_share")) is not None]
        if not shares:
            return None
        steps.append(1 / (1 - min(shares)))
    return steps[0] / steps[1] - 1


def _table(study: Study, sweep: Sweep) -> Table:
    rows: list[tuple[Any, ...]] = []
    for arm in ARMS:
        result = study.swept(arm, sweep)
        records = list(result.records.values())
        if result.point is None or not records:
            rows.append((arm.label, *(None,) * 10, "no result yet"))
            continue
        low, high = seed_interval(list(result.losses.values())) or (None, None)
        measured = (_state(records[0]), _share(records), _norm(records))
        state = f"grid complete; best {' and '.join(result.edges)} at its end" if result.edges else "grid complete"
        seeds = (result.mean, low, high, len(records))
        rows.append((arm.label, result.point.lr, result.point.wd, *seeds, *measured, result.tried, state))
    columns = (
        "optimizer",
        "lr",
        "wd",
        "loss",
        "low",
        "high",
        "seeds",
        "state",
        "share",
        "norm",
        "runs tried",
        "search",
    )
    return Table(title=sweep.title.capitalize(), columns=columns, rows=tuple(rows))


def _state(record: Record) -> float | None:
    """Bytes of optimizer state over bytes of float32 weights; None in a record from before it was measured."""
    measured = record.provenance.get("state_bytes")
    return None if measured is None else round(measured / (4 * record.results["parameters"]), 2)


def _share(records: list[Record]) -> str | None:
    shares = [share for record in records if (share := record.provenance.get("optimizer_share")) is not None]
    return f"{100 * min(shares):.0f}%" if shares else None


def _norm(records: list[Record]) -> float | None:
    """Largest singular value of any matrix of the blocks, mean over seeds."""
    norms = [
        max(value for kind, value in by_kind.items() if kind not in ("embed_tokens", "lm_head"))
        for record in records
        if (by_kind := record.results.get("spectral_norms"))
    ]
    return round(statistics.fmean(norms), 2) if norms else None


def _figures(study: Study, name: str, sweep: Sweep) -> list[Figure]:
    results = {arm.label: result for arm in ARMS if (result := study.swept(arm, sweep))}
    if not results:
        return []
    labels = sorted(results, key=lambda label: results[label].mean)
    means = [results[label].mean for label in labels]
    ends = [seed_interval(list(results[label].losses.values())) or (None, None) for label in labels]

    def draw(axes: Any) -> None:
        draw_ranking(axes, labels, means, low=[end[0] for end in ends], high=[end[1] for end in ends])
        axes.set_xlabel(LOSS_AXIS)

    caption = f"{sweep.title.capitalize()}: each optimizer at its own optimum, mean over seeds with a 90% interval."
    return [Figure(name=f"optimizers-{name}", caption=caption, draw=draw)]
