"""Which parts of SPECTRA and Fira matter, one change at a time?

Claim: SPECTRA's loss hardly depends on its threshold or on the accuracy of its clip (docs/spectra.md section 3); Fira
needs its limiter, one factor per column and enough rank (docs/fira.md section 2).
Command: epochal run ablations --scale micro
Results: recipes/results/<scale>/report.md

Every change is made at the unchanged optimizer's best point of the recipe `optimizers` and is not tuned again; differences
are paired by seed with the unchanged optimizer.
"""

import statistics
from dataclasses import dataclass
from itertools import pairwise

from epochal.report.claims import Claim
from epochal.report.comparison import ArmLosses, comparison_table, difference_claim, gains_by_seed
from epochal.report.sections import Section
from epochal.run import AdamW, Fira, Job, Run, Spectra
from epochal.scaling import seed_caveats, seed_interval
from epochal.study import Arm, Study, Sweep, judged
from recipes import optimizers

THRESHOLDS = tuple(Arm(f"threshold {c:g}", optimizer=Spectra(base=AdamW(), clip=c)) for c in (0.2, 1.0, 4.0, 10.0))
STEPS = tuple(
    Arm(f"{count} published steps in bfloat16", optimizer=Spectra(base=AdamW(), clip=2.0, iterations=count))
    for count in (5, 10)
)
NO_LIMITER = Arm("no limiter", optimizer=Fira(gamma=None))
ONE_FACTOR = Arm("one factor per matrix", optimizer=Fira(scaling="matrix"))
RANKS = tuple(Arm(f"rank {rank}", optimizer=Fira(rank=rank)) for rank in (1, 2, 4, 16))
# The changes to each optimizer of the comparison; rank 8 is a quarter of the width 32, the unchanged Fira.
CHANGES = {"SPECTRA-AdamW": (*THRESHOLDS, *STEPS), "Fira": (NO_LIMITER, ONE_FACTOR, *RANKS)}

# Nats between 5, 10 and 15 steps in the paper's own one-seed table; smaller differences count as none.
NOISE = 0.003


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`setting` names the one of [optimizers] at whose optimum the changes are made; the papers' is one pass."""

    setting: str


def sweep(study: Study) -> Sweep | None:
    """Return the sweep whose optimum is changed; None where the scale has no such table."""
    settings = study.settings(Settings)
    return None if settings is None else optimizers.sweep(study, settings.setting)


def plan(study: Study) -> list[Job]:
    """Return both optimizers' grids and seeds, then each change with the same seeds."""
    grid, jobs = sweep(study), list[Job]()
    if grid is None:
        return jobs
    for label, changes in CHANGES.items():
        jobs += study.sweep_jobs(optimizers.arm(label), grid)
        jobs += [run for change in changes for run in changed_runs(study, label, change, grid)]
    return jobs


def changed_runs(study: Study, label: str, change: Arm, grid: Sweep) -> tuple[Run, ...]:
    """Return the seeds of one change; none before the optimizer's best point is known."""
    point = study.swept(optimizers.arm(label), grid).point
    # At the optimum of the unchanged optimizer: searching each change again would cost a grid each.
    return () if point is None else study.seeds(change, grid.model, grid.tokens, point, grid.seeds)


Losses = dict[Arm, dict[int, float]]


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Report what every change does to the loss."""
    title, question, grid = "Ablations", "Which parts of SPECTRA and Fira matter?", sweep(study)
    if grid is None:
        return Section(title=title, question=question, notes=("This scale has no table [ablations].",))
    plain = {label: study.swept(optimizers.arm(label), grid).losses for label in CHANGES}
    changed = {change: _losses(study, label, change, grid) for label, changes in CHANGES.items() for change in changes}
    claims = (
        _threshold_claim(changed, plain["SPECTRA-AdamW"], grid),
        _steps_claim(changed, plain["SPECTRA-AdamW"], grid),
        *(_fira_claim(change, changed[change], plain["Fira"], grid) for change in (NO_LIMITER, ONE_FACTOR)),
        _rank_claim(changed, grid),
    )
    tables = [
        comparison_table(
            f"{label}, {grid.title}",
            [
                ArmLosses(label="as it is", losses=plain[label]),
                *(ArmLosses(label=c.label, losses=changed[c]) for c in changes),
            ],
            baseline="as it is",
            heading="change",
        )
        for label, changes in CHANGES.items()
    ]
    return Section(
        title=title,
        question=question,
        claims=tuple(claim for claim in claims if claim is not None),
        tables=tuple(tables),
        notes=("One change at a time at the optimizer's own best learning rate, which is not searched again.",),
    )


def _losses(study: Study, label: str, change: Arm, grid: Sweep) -> dict[int, float]:
    records = study.finite(dict(enumerate(changed_runs(study, label, change, grid))))
    return {seed: record.test_loss for seed, record in judged(records).items()}


def _few(seeds: int, grid: Sweep) -> tuple[str, ...]:
    return (f"{seeds} of {grid.seeds} seeds",) if seeds < grid.seeds else ()


def _threshold_claim(changed: Losses, plain: dict[int, float], grid: Sweep) -> Claim | None:
    """Compare losses at half to five times the threshold with that at a tenth."""
    middle = optimizers.arm("SPECTRA-AdamW").optimizer
    assert isinstance(middle, Spectra)
    by_clip = {arm.optimizer.clip: changed[arm] for arm in THRESHOLDS if isinstance(arm.optimizer, Spectra)}
    by_clip[middle.clip] = plain
    means = {clip: statistics.fmean(losses.values()) for clip, losses in sorted(by_clip.items()) if losses}
    flat = {clip: loss for clip, loss in means.items() if clip >= middle.clip / 2}
    low = min(means, default=middle.clip)
    if len(means) < len(by_clip) or len(flat) < 2 or low >= middle.clip / 2:
        return None
    spread, worse = max(flat.values()) - min(flat.values()), means[low] - min(flat.values())
    seeds = min(len(losses) for losses in by_clip.values())
    return Claim(
        id="ablations.threshold",
        text=f"SPECTRA-AdamW: thresholds from {min(flat):g} to {max(flat):g} differ by less than half of what {low:g} loses",
        value=f"{spread:.4f} against {worse:+.4f} nats",
        seeds=seeds,
        holds=spread < worse / 2,
        paper="2.936 to 2.940 for c = 5 to 50, 2.975 for c = 1 at 160M, spectra section 3",
        provisional=_few(seeds, grid),
    )


def _steps_claim(changed: Losses, plain: dict[int, float], grid: Sweep) -> Claim | None:
    """Compare the published steps in bfloat16 with a clip that is accurate to 1%."""
    rises = {arm: [-gain for gain in gains_by_seed(changed[arm], plain).values()] for arm in STEPS}
    if not all(rises.values()):
        return None
    means = {arm: statistics.fmean(values) for arm, values in rises.items()}
    worst = max(rises, key=lambda arm: abs(means[arm]))
    return Claim(
        id="ablations.steps",
        text=f"SPECTRA-AdamW: fewer, less accurate clip steps change the loss by no more than {NOISE} nats or seed noise",
        value=", ".join(f"{arm.label.split()[0]} steps {mean:+.4f}" for arm, mean in means.items()) + " nats",
        interval=seed_interval(rises[worst]),
        seeds=len(rises[worst]),
        holds=all(abs(means[arm]) <= NOISE or bool(seed_caveats(values)) for arm, values in rises.items()),
        paper="2.939, 2.936, 2.937 for 5, 10 and 15 steps at 160M, spectra section 3",
        provisional=_few(min(map(len, rises.values())), grid),
    )


FIRA_CLAIMS = {
    NO_LIMITER: ("ablations.fira-limiter", 0.037, "0.037 nats at 60M (perplexity 31.06 to 32.22), fira section 2"),
    ONE_FACTOR: ("ablations.fira-columns", 0.015, "0.015 nats at 60M (perplexity 31.06 to 31.52), fira section 2"),
}


def _fira_claim(change: Arm, losses: dict[int, float], plain: dict[int, float], grid: Sweep) -> Claim | None:
    rises = [-gain for gain in gains_by_seed(losses, plain).values()]
    if not rises:
        return None
    id, size, paper = FIRA_CLAIMS[change]
    text = f"Fira: {change.label} raises the loss"
    return difference_claim(text, rises, id=id, paper=paper, size=size, caveats=_few(len(rises), grid))


def _rank_claim(changed: Losses, grid: Sweep) -> Claim | None:
    by_rank = [list(changed[arm].values()) for arm in RANKS]
    if not all(by_rank):
        return None
    means = [statistics.fmean(losses) for losses in by_rank]
    falls = all(later < earlier for earlier, later in pairwise(means))
    seeds = min(len(losses) for losses in by_rank)
    ranks = ", ".join(arm.label.removeprefix("rank ") for arm in RANKS)
    return Claim(
        id="ablations.fira-rank",
        text=f"Fira: a higher rank lowers the loss (ranks {ranks})",
        value=(" > " if falls else ", ").join(f"{loss:.4f}" for loss in means),
        seeds=seeds,
        provisional=_few(seeds, grid),
        holds=falls,
        paper="perplexity about 35, 32, 31, 31 for ranks 4, 16, 64, 128 at 60M, read off a plot, fira section 2",
    )
