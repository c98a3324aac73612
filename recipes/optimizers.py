"""Which optimizer is best when all are tuned alike: on fresh text, and on the same text over and over?

Claim: SPECTRA lowers the loss of its base optimizers and Fira that of GaLore (docs/spectra.md section 3, docs/fira.md
section 2); with many epochs and heavy decay nobody has published it.
Command: epochal run optimizers --scale micro
Found: recipes/results/<scale>/report.md

Equal terms: every optimizer gets the same number of runs over learning rate and decay, the same seeds at its optimum,
the same data in the same order. A learning rate that differs by nature (every entry of a sign's step is as large as the
largest of Adam's) is multiplied by a fixed factor, and the decay divided by it, so that lr * wd is the same for all.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_bars
from epochal.report.sections import Figure, Section, Table
from epochal.run import AdamW, AdEMAMix, Fira, Job, Mars, Muon, Optimizer, Run, Signum, Spectra
from epochal.scale import Comparison, Point, Scale, Setting
from epochal.scaling import seed_interval
from recipes._differences import difference_claim

Make = Callable[[float, float, float], Optimizer]
"""(lr, wd, SPECTRA's threshold) -> optimizer."""


@dataclass(frozen=True)
class Entry:
    """One optimizer of the comparison; its learning rates are `factor` times those of the grid, its decays 1/factor."""

    name: str
    factor: float
    make: Make


ENTRIES = (
    Entry("AdamW", 1.0, lambda lr, wd, c: AdamW(lr=lr, wd=wd)),
    Entry("Signum", 0.25, lambda lr, wd, c: Signum(lr=lr, wd=wd)),
    Entry("AdEMAMix", 1.0, lambda lr, wd, c: AdEMAMix(lr=lr, wd=wd)),
    Entry("MARS", 1.0, lambda lr, wd, c: Mars(lr=lr, wd=wd)),
    Entry("Muon", 1.0, lambda lr, wd, c: Muon(lr=lr, wd=wd)),
    Entry("SPECTRA-AdamW", 1.0, lambda lr, wd, c: Spectra(base=AdamW(lr=lr, wd=wd), clip=c)),
    Entry("SPECTRA-Signum", 1.0, lambda lr, wd, c: Spectra(base=Signum(lr=lr, wd=wd), clip=c)),
    Entry("SPECTRA-AdEMAMix", 1.0, lambda lr, wd, c: Spectra(base=AdEMAMix(lr=lr, wd=wd), clip=c)),
    Entry("SPECTRA-MARS", 1.0, lambda lr, wd, c: Spectra(base=Mars(lr=lr, wd=wd), clip=c)),
    Entry("Fira", 1.0, lambda lr, wd, c: Fira(lr=lr, wd=wd)),
    Entry("GaLore", 1.0, lambda lr, wd, c: Fira(lr=lr, wd=wd, variant="galore")),
)
PAIRS = (
    ("SPECTRA-AdamW", "AdamW", "0.026 nats at 780M (2.608 to 2.582), spectra section 3"),
    ("SPECTRA-Signum", "Signum", "0.027 nats at 780M (2.600 to 2.573), spectra section 3"),
    ("SPECTRA-AdEMAMix", "AdEMAMix", "0.017 nats at 780M (2.591 to 2.574), spectra section 3"),
    ("SPECTRA-MARS", "MARS", "0.025 nats at 820M (2.614 to 2.589), spectra section 3"),
    ("Fira", "GaLore", "0.116 nats at 60M (perplexity 34.88 to 31.06), fira section 2"),
    ("Fira", "AdamW", "0.092 nats at 60M (perplexity 34.06 to 31.06), fira section 2"),
)
"""(better, worse, what the papers report): the papers' claims are about one pass over fresh text."""


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the whole grid of each optimizer, then its seeds at the best point."""
    return [
        job for setting in settings(scale) for entry in ENTRIES for job in entry_jobs(records, scale, setting, entry)
    ]


def entry_jobs(records: Records, scale: Scale, setting: Setting, entry: Entry) -> list[Job]:
    """Return the grid of one optimizer in one setting, and its seeds at the best point once the grid is complete."""
    found: list[Job] = [run_at(scale, setting, entry, point) for point in grid(scale, setting, entry)]
    best = tuned(records, scale, setting, entry)
    if best is not None:
        found += [run_at(scale, setting, entry, best, seed) for seed in range(1, comparison(scale).seeds)]
    return found


def comparison(scale: Scale) -> Comparison:
    """Return the scale's comparison; one without settings where it has none."""
    return scale.optimizers or Comparison(model="", settings=())


def settings(scale: Scale) -> tuple[Setting, ...]:
    """Return the settings to compare in."""
    return comparison(scale).settings


def grid(scale: Scale, setting: Setting, entry: Entry) -> list[Point]:
    """Return every point that an optimizer is tried at: as many for each."""
    return [
        Point(lr=_short(lr * entry.factor), epochs=setting.epochs, wd=_short(wd / entry.factor))
        for lr in setting.lr
        for wd in setting.wd
    ]


def _short(value: float) -> float:
    """Drop the rounding of a product, which would stand in names."""
    return float(f"{value:.6g}")


def run_at(scale: Scale, setting: Setting, entry: Entry, point: Point, seed: int = 0) -> Run:
    """Return the Run of one optimizer at one point; AdamW's is the one that the other recipes know."""
    plain = scale.run(comparison(scale).model, setting.tokens, point, seed=seed)
    if entry.name == "AdamW":
        return plain
    optimizer = entry.make(point.lr, point.wd, comparison(scale).clip)
    return replace(plain, name=f"{plain.name}-{entry.name.lower()}", optimizer=optimizer)


def tuned(records: Records, scale: Scale, setting: Setting, entry: Entry) -> Point | None:
    """Return the best point of a grid that has run in full; None before, or if every run diverged."""
    losses = {}
    for point in grid(scale, setting, entry):
        record = records.get(run_at(scale, setting, entry, point))
        if record is None:
            return None
        losses[point] = record.loss
    best = min(losses, key=lambda point: (losses[point], point))
    return best if math.isfinite(losses[best]) else None


def best_records(records: Records, scale: Scale, setting: Setting, entry: Entry) -> dict[int, Record]:
    """Return the finite records at an optimizer's best point by seed; empty before its grid is complete."""
    best = tuned(records, scale, setting, entry)
    if best is None:
        return {}
    found = {seed: records.get(run_at(scale, setting, entry, best, seed)) for seed in range(comparison(scale).seeds)}
    return {seed: r for seed, r in found.items() if r is not None and math.isfinite(r.loss)}


def report(records: Records, scale: Scale) -> Section:
    """Compare the optimizers in each setting, each at its own optimum."""
    claims: list[Claim] = []
    for setting in settings(scale):
        claims += _pair_claims(records, scale, setting)
        claims += _ranking_claim(records, scale, setting)
        claims += _cost_claims(records, scale, setting) if setting.epochs == 1 else []
    notes = (
        "Every optimizer: the same grid of lr and wd (times and over its factor), then further seeds at its best point. "
        "Seed 0 chose the point, so its loss is low by a selection that is the same for all.",
        "Differences are paired by seed: both runs start from the same weights and see the same batches.",
        "State: optimizer state in bytes over the bytes of the weights in float32. Share: the optimizer's part of a "
        "training step's time on the machine that ran it. Norm: the largest singular value of any matrix of the blocks.",
    )
    return Section(
        title="Optimizers",
        question="Which optimizer is best when all are tuned alike, on fresh text and on repeated text?",
        claims=tuple(claims),
        tables=tuple(_table(records, scale, setting) for setting in settings(scale)),
        figures=tuple(figure for setting in settings(scale) for figure in _figures(records, scale, setting)),
        notes=notes if settings(scale) else ("This scale has no table [optimizers], so nothing is compared.",),
    )


def entry_of(name: str) -> Entry:
    """Return an optimizer of the comparison by its name."""
    return next(entry for entry in ENTRIES if entry.name == name)


def _pair_claims(records: Records, scale: Scale, setting: Setting) -> list[Claim]:
    claims = []
    for better, worse, paper in PAIRS:
        one, other = (best_records(records, scale, setting, entry_of(name)) for name in (better, worse))
        gains = [other[seed].loss - one[seed].loss for seed in one if seed in other]
        if gains:
            claims.append(
                difference_claim(
                    f"{words(setting)}: {better} has a lower loss than {worse}",
                    gains,
                    paper=paper if setting.epochs == 1 else "",
                    reasons=missing(records, scale, setting, (better, worse)),
                )
            )
    return claims


def _ranking_claim(records: Records, scale: Scale, setting: Setting) -> list[Claim]:
    """Say which optimizer comes first, and by how much before AdamW."""
    means = _means(records, scale, setting)
    if len(means) < len(ENTRIES):
        return []
    first = min(means, key=lambda name: means[name])
    return [
        Claim(
            text=f"{words(setting)}: another optimizer than AdamW comes first ({first})",
            value=f"{means['AdamW'] - means[first]:.4f} nats below AdamW",
            seeds=min(len(best_records(records, scale, setting, entry)) for entry in ENTRIES),
            holds=first != "AdamW",
            provisional=missing(records, scale, setting, (first, "AdamW")),
        )
    ]


def _cost_claims(records: Records, scale: Scale, setting: Setting) -> list[Claim]:
    """What the papers say of memory, weights and time, each at the optimizers' own optimum."""
    names = ("AdamW", "SPECTRA-AdamW", "Fira")
    found = {name: list(best_records(records, scale, setting, entry_of(name)).values()) for name in names}
    if not all(found.values()):
        return []
    plain, clipped, projected = (found[name] for name in names)
    claims = []
    states = _state(projected[0]), _state(plain[0])
    if states[0] is not None and states[1] is not None:
        claims.append(
            Claim(
                text=f"Fira's optimizer state is smaller than AdamW's ({comparison(scale).model}, rank a quarter of its width)",
                value=f"{states[0]:.2f} against {states[1]:.2f} times the weights",
                seeds=len(projected),
                holds=states[0] < states[1],
                paper="0.36 against 0.48 GB at 60M with weights and gradients, fira section 2",
            )
        )
    norms = _norm(clipped), _norm(plain)
    if norms[0] is not None and norms[1] is not None:
        claims.append(
            Claim(
                text=f"{words(setting)}: SPECTRA-AdamW ends with smaller weights than AdamW (largest singular value)",
                value=f"{norms[0]:.2f} against {norms[1]:.2f}",
                seeds=min(len(clipped), len(plain)),
                holds=norms[0] < norms[1],
                paper="smaller weight norms (no number), spectra section 3",
            )
        )
    slower = _overhead(clipped, plain)
    if slower is not None:
        claims.append(
            Claim(
                text="SPECTRA adds little to AdamW's step",
                value=f"{slower:+.1%} of a step of {comparison(scale).model}",
                seeds=min(len(clipped), len(plain)),
                paper="+18.7% at 160M, +1.6% at 780M on four H100, spectra section 3",
                untestable="a small model on a CPU; the clip alone is in benchmarks/optimizers.csv",
            )
        )
    return claims


def _overhead(ours: list[Record], theirs: list[Record]) -> float | None:
    """Return how much longer a step is with one optimizer than with another whose model passes take the same time."""
    steps = []
    for found in (ours, theirs):
        shares = [float(s) for record in found if (s := record.provenance.get("optimizer_share")) is not None]
        if not shares:
            return None
        steps.append(1 / (1 - min(shares)))
    return steps[0] / steps[1] - 1


def words(setting: Setting) -> str:
    """Say how a setting feeds the optimizers, as claims do."""
    passes = "one pass" if setting.epochs == 1 else f"{setting.epochs} epochs"
    return f"{passes} over {setting.tokens:,} tokens"


def _means(records: Records, scale: Scale, setting: Setting) -> dict[str, float]:
    found = {entry.name: best_records(records, scale, setting, entry) for entry in ENTRIES}
    return {name: statistics.fmean(r.loss for r in seeds.values()) for name, seeds in found.items() if seeds}


def missing(records: Records, scale: Scale, setting: Setting, names: tuple[str, ...]) -> tuple[str, ...]:
    """Name what stands between two optimizers' losses and a final word."""
    found = []
    for name in names:
        seeds = len(best_records(records, scale, setting, entry_of(name)))
        if seeds < comparison(scale).seeds:
            found.append(f"seeds of {name}")
        if edges := _edges(records, scale, setting, entry_of(name)):
            found.append(f"{name} is best at the end of its grid ({edges})")
    if comparison(scale).seeds < 2:
        found.append("one seed")
    return tuple(found)


def _edges(records: Records, scale: Scale, setting: Setting, entry: Entry) -> str:
    best = tuned(records, scale, setting, entry)
    if best is None:
        return ""
    points = grid(scale, setting, entry)
    ends = []
    for field in ("lr", "wd"):
        values = sorted({getattr(point, field) for point in points})
        if len(values) > 1 and getattr(best, field) in (values[0], values[-1]):
            ends.append(field)
    return " and ".join(ends)


def _table(records: Records, scale: Scale, setting: Setting) -> Table:
    rows: list[tuple[Any, ...]] = []
    for entry in ENTRIES:
        point = tuned(records, scale, setting, entry)
        found = list(best_records(records, scale, setting, entry).values())
        if point is None or not found:
            rows.append((entry.name, *(None,) * 10, "no result yet"))
            continue
        losses = [record.loss for record in found]
        low, high = seed_interval(losses) or (None, None)
        edge = _edges(records, scale, setting, entry)
        measured = (_state(found[0]), _share(found), _norm(found))
        state = f"grid complete{f'; best {edge} at its end' if edge else ''}"
        tried = len(grid(scale, setting, entry))
        row = (entry.name, point.lr, point.wd, statistics.fmean(losses), low, high, len(found), *measured, tried, state)
        rows.append(row)
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
    return Table(title=words(setting).capitalize(), columns=columns, rows=tuple(rows))


def _state(record: Record) -> float | None:
    """Bytes of optimizer state over bytes of float32 weights; None in a record from before it was measured."""
    measured = record.provenance.get("state_bytes")
    return None if measured is None else round(measured / (4 * record.results["parameters"]), 2)


def _share(records: list[Record]) -> str | None:
    shares = [share for record in records if (share := record.provenance.get("optimizer_share")) is not None]
    return f"{100 * min(shares):.0f}%" if shares else None


def _norm(records: list[Record]) -> float | None:
    """The largest singular value of any matrix of the blocks, the mean over seeds."""
    norms = [
        max(value for kind, value in found.items() if kind not in ("embed_tokens", "lm_head"))
        for record in records
        if (found := record.results.get("spectral_norms"))
    ]
    return round(statistics.fmean(norms), 2) if norms else None


def _figures(records: Records, scale: Scale, setting: Setting) -> list[Figure]:
    means = _means(records, scale, setting)
    if not means:
        return []
    names = sorted(means, key=lambda name: means[name])
    ends = {
        name: seed_interval([r.loss for r in best_records(records, scale, setting, entry_of(name)).values()])
        for name in names
    }

    def draw(axes: Any) -> None:
        low, high = ([None if (e := ends[name]) is None else e[i] for name in names] for i in (0, 1))
        draw_bars(axes, names, [means[name] for name in names], low=low, high=high)
        spread = max(means.values()) - min(means.values())
        axes.set_ylim(bottom=min(means.values()) - max(spread, 0.01) / 2)
        axes.tick_params(axis="x", rotation=35)
        axes.set_ylabel("validation loss (nats per token)")

    caption = f"{words(setting).capitalize()}: each optimizer at its own optimum, mean over seeds with a 90% interval."
    return [Figure(name=f"optimizers-{setting.name}", caption=caption, draw=draw)]
