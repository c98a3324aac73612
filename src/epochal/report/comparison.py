"""Arms of one experiment compared by seed: a table of all arms, and a claim for each pair of interest.

All intervals are Student's 90% intervals of the mean of paired differences.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from epochal.config import nearest
from epochal.records import Record, curves
from epochal.report.claims import Case, Claim
from epochal.report.sections import Cell, Table
from epochal.run import Run
from epochal.scaling import gain_interval, jackknife_error, seed_caveats, seed_interval, welch_dof

# With fewer optimizer steps the warm-up and the decay of the learning rate are most of a run.
FEWEST_STEPS = 100
# Two repetitions have no interval: one difference says nothing about the spread.
FEWEST_REPETITIONS = 3
# Standard errors of a difference without any scatter; claims.json has no infinity.
CERTAIN = 1e9


@dataclass(frozen=True, kw_only=True)
class ArmLosses:
    """The results of one arm."""

    label: str
    losses: Mapping[int, float]  # finite ones, nats per token, by seed; empty before the first result
    cells: tuple[Cell, ...] = ()  # the arm's values in further columns of the table
    caveats: tuple[str, ...] = ()  # why claims about this arm are provisional, such as "seeds of Fira"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The claim that one arm has a lower loss than another, both named by label.

    With a `tolerance` the claim is instead that the two losses differ by less than that, so `text` must be given.
    """

    better: str  # label of an arm
    worse: str  # label of an arm
    id: str = ""  # of the claim
    text: str = ""  # replaces "BETTER has a lower loss than WORSE"
    paper: str = ""  # of the claim
    size: float | None = None  # of the paper's effect in nats
    tolerance: float | None = None  # in nats

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.text:
            raise ValueError(f"{self.better!r} and {self.worse!r} are compared within a tolerance; give the text too.")


def gains_by_seed(losses: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """How far losses are below a baseline's, for each seed that both have; positive is better."""
    return {seed: baseline[seed] - losses[seed] for seed in sorted(losses) if seed in baseline}


def difference_claim(
    text: str,
    differences: Sequence[float],
    *,
    id: str = "",
    paper: str = "",
    size: float | None = None,
    caveats: Sequence[str] = (),
    tolerance: float | None = None,
) -> Claim:
    """Claim that the mean of differences is above zero, or within `tolerance` of it.

    `differences` are in nats, one for each seed, `size` is the paper's. The claim is provisional with any of `caveats` and with
    fewer than three seeds, and open while its interval contains zero; the latter does not count against a claim of equality.
    """
    mean = statistics.fmean(differences)
    # An interval that contains zero supports equality, not against it.
    noise = [caveat for caveat in seed_caveats(differences) if tolerance is None or caveat != "within noise"]
    return Claim(
        id=id,
        text=text,
        value=f"{mean:+.4f} nats",
        interval=seed_interval(differences),
        seeds=len(differences),
        holds=beyond_noise(mean > 0 if tolerance is None else abs(mean) < tolerance, noise),
        paper=paper,
        sizes=None if size is None else (mean, size),
        provisional=tuple(dict.fromkeys((*caveats, *noise))),
    )


def welch_claim(
    text: str,
    losses: Sequence[float],
    baseline: Sequence[float],
    *,
    id: str,
    paper: str = "",
    size: float | None = None,
    caveats: Sequence[str] = (),
    search: float = 0.0,
) -> Claim:
    """Claim that unpaired losses are below those of a baseline.

    The baseline has its own variance (Welch).

    `search` is the standard deviation in nats of the choice between tied settings, `size` the paper's effect. A baseline of
    one run has no interval.
    """
    after, before = statistics.fmean(losses), statistics.fmean(baseline)
    interval = _welch(losses, baseline, search)
    few = {1: ("one seed",), 2: ("two seeds",)}.get(min(len(losses), len(baseline)), ()) if interval is None else ()
    noise = within_noise(interval)
    return Claim(
        id=id,
        text=text,
        value=f"{before - after:+.4f} nats ({before:.4f} to {after:.4f})",
        interval=interval,
        seeds=min(len(losses), len(baseline)),
        holds=beyond_noise(after < before, noise),
        paper=paper,
        sizes=None if size is None else (before - after, size),
        provisional=tuple(dict.fromkeys((*caveats, *few, *noise))),
    )


def within_noise(interval: tuple[float, float] | None, of: float = 0.0) -> tuple[str, ...]:
    """Return the caveat of an interval that contains the value `of`; nothing without one."""
    return ("within noise",) if interval is not None and interval[0] <= of <= interval[1] else ()


def beyond_noise(holds: bool, caveats: Sequence[str]) -> bool | None:
    """Return a verdict, or None where the sign that it rests on is within noise."""
    return None if "within noise" in caveats else holds


# --- one sentence about several sizes, budgets or optimizers ------------------------------------------------------------


def _welch(losses: Sequence[float], baseline: Sequence[float], search: float) -> tuple[float, float] | None:
    enough = min(len(losses), len(baseline)) >= FEWEST_REPETITIONS
    return gain_interval(losses, baseline, search=search) if enough else None


def gain_case(name: str, losses: Sequence[float], baseline: Sequence[float], *, search: float = 0.0) -> Case:
    """Return how far losses are below an unpaired baseline, with Welch's interval."""
    gain = statistics.fmean(baseline) - statistics.fmean(losses)
    return measured_case(name, gain, _welch(losses, baseline, search), dof=welch_dof(losses, baseline))


def measured_case(
    name: str, gain: float, interval: tuple[float, float] | None, *, dof: float = 2.0, value: float | None = None
) -> Case:
    """Return a case whose sentence is that `gain` is above zero; `interval` is that of the gain.

    Another measured number may be shown as its `value`, whose interval has the same width.
    """
    shown = gain if value is None else value
    if interval is None or not all(map(math.isfinite, interval)):
        return Case(name, shown)
    from scipy.special import stdtrit

    half = (interval[1] - interval[0]) / 2
    # The half-width is the 95% quantile of Student's distribution times the standard error.
    t = gain * float(stdtrit(dof, 0.95)) / half if half > 0 else math.copysign(CERTAIN, gain)
    return Case(name, shown, (shown - half, shown + half), t, dof)


def settled(cases: Sequence[Case], sign: int) -> int:
    """Count the cases settled for (+1) or against (-1) the sentence, by Holm at 5%."""
    from scipy.special import stdtr

    chances = sorted(float(stdtr(case.dof, -sign * case.t)) for case in cases if case.t is not None)
    count = 0
    for rank, chance in enumerate(chances):
        if chance > 0.05 / (len(chances) - rank):
            break
        count += 1
    return count


def incomplete(count: int, planned: int | None, what: str = "cases") -> tuple[str, ...]:
    """Return the caveat that some cases of a sentence have not run; nothing where all have or none is planned."""
    return (f"{count} of {planned} {what} have run",) if planned is not None and count < planned else ()


def family_claim(
    text: str,
    cases: Sequence[Case],
    signs: Sequence[bool],
    *,
    id: str,
    unit: str = "nats",
    differences: bool = True,
    planned: int | None = None,
    **fields: Any,
) -> Claim:
    """Make one claim of a sentence about several cases; `signs` say in which of them it is true as measured.

    Values of cases are `differences`, shown with their sign, or losses. `planned` is how many cases the campaign will have,
    where some may be missing.

    It fails where a case is settled against it, holds where all planned cases are true as measured and one is settled, and
    is open otherwise. Where no case has an interval, signs decide.
    """
    for_it, against = settled(cases, 1), settled(cases, -1)
    known = any(case.t is not None for case in cases)
    missing = incomplete(len(cases), planned)
    holds = None
    if against or not (any(signs) or known):
        holds = False
    elif all(signs) and (for_it or not known) and not missing:
        holds = True
    low, high = min(case.value for case in cases), max(case.value for case in cases)
    sign = "+" if differences else ""
    spread = f"{low:{sign}.4f} to {high:{sign}.4f} {unit}" if len(cases) > 1 else f"{low:{sign}.4f} {unit}"
    open_cases = len(cases) - for_it - against
    caveats = fields.pop("provisional", ())
    if open_cases and not against:
        caveats = (*caveats, f"{open_cases} of {len(cases)} within noise or without an interval")
    caveats = (*caveats, *missing)
    counted = (
        f"in {sum(signs)} of {len(cases)} ({for_it} settled for, {against} against, Holm): " if len(cases) > 1 else ""
    )
    return Claim(
        id=id,
        text=text,
        value=counted + spread,
        interval=cases[0].interval if len(cases) == 1 else None,
        holds=holds,
        cases=tuple(cases),
        provisional=tuple(caveats),
        **fields,
    )


def family_table(claim: Claim, title: str, value: str = "value") -> Table:
    """Return one row for each case of a claim."""
    rows = [(case.name, case.value, *(case.interval or (None, None))) for case in claim.cases]
    return Table(title=title, columns=("case", value, "90% low", "90% high"), rows=tuple(rows))


def pair_claims(
    arms: Sequence[ArmLosses],
    pairs: Sequence[Pair],
    *,
    condition: str = "",
    caveats: Sequence[str] = (),
    selecting: int | None = None,
) -> list[Claim]:
    """Return one claim for each pair whose arms have a seed in common.

    `selecting` is the seed that chose each arm's setting, whose losses are low by that; claims show the mean without it too.
    `condition` starts every text ("one pass over 393,216 tokens"). A claim carries the caveats of both of its arms and
    those given for all. Raises ValueError for a pair that names no arm.
    """
    claims = []
    for pair in pairs:
        better, worse = _arm(arms, pair.better), _arm(arms, pair.worse)
        # Paired: runs of one seed start from the same weights and read the same batches, so their difference has
        # less noise than either loss.
        by_seed = gains_by_seed(better.losses, worse.losses)
        gains, fresh = list(by_seed.values()), [gain for seed, gain in by_seed.items() if seed != selecting]
        if not gains:
            continue
        text = pair.text or f"{pair.better} has a lower loss than {pair.worse}"
        claim = difference_claim(
            f"{condition}: {text}" if condition else text,
            gains,
            id=pair.id,
            paper=pair.paper,
            size=pair.size,
            caveats=(*better.caveats, *worse.caveats, *caveats),
            tolerance=pair.tolerance,
        )
        if selecting in by_seed and fresh:
            value = f"{claim.value} ({statistics.fmean(fresh):+.4f} without the first seed, which chose the settings)"
            claim = replace(claim, value=value)
        claims.append(claim)
    return claims


def comparison_table(
    title: str, arms: Sequence[ArmLosses], *, baseline: str, heading: str = "arm", columns: Sequence[str] = ()
) -> Table:
    """Return one row for each arm: label, further columns, mean loss, gain over the baseline, its interval, seeds.

    The gain is the mean over the seeds that the arm shares with the baseline, the interval its 90% interval. Arms without
    results keep their row. Raises ValueError when `baseline` is not the label of an arm.
    """
    reference = _arm(arms, baseline)
    rows = []
    for arm in arms:
        gains = [] if arm is reference else list(gains_by_seed(arm.losses, reference.losses).values())
        low, high = seed_interval(gains) or (None, None)
        row = (arm.label, *arm.cells, _mean(arm.losses.values()), _mean(gains), low, high, len(arm.losses))
        rows.append(row)
    measured = ("loss", f"gain over {baseline} (nats)", "90% low", "90% high", "seeds")
    return Table(title=title, columns=(heading, *columns, *measured), rows=tuple(rows))


def members_gain(text: str, record: Record, *, id: str, paper: str, **fields: Any) -> Claim:
    """Claim that the K members of an ensemble record are together below one of them.

    The interval is a jackknife: the gain of K - 1 members without each of the K.
    """
    curve, without = curves(record)
    count = max(curve)
    gain, interval = statistics.fmean(curve[1]) - record.test_loss, None
    left = [one - rest for one, rest in zip(without.get(1, ()), without.get(count - 1, ()), strict=False)]
    if len(left) == count >= FEWEST_REPETITIONS:
        from scipy.special import stdtrit

        half = float(stdtrit(count - 1, 0.95)) * float(jackknife_error(left))
        interval = gain - half, gain + half
    return Claim(
        id=id,
        text=text,
        value=f"{gain:+.4f} nats",
        interval=interval,
        seeds=count,
        holds=gain > 0,
        paper=paper,
        **fields,
    )


def long_enough(claim: Claim, runs: Sequence[Run]) -> Claim:
    """Return a claim, without a verdict where a run has fewer than FEWEST_STEPS steps."""
    fewest = min((run.steps for run in runs), default=FEWEST_STEPS)
    if fewest >= FEWEST_STEPS:
        return claim
    why = f"a run has {fewest} optimizer steps, at least {FEWEST_STEPS} are needed"
    return replace(claim, holds=None, untestable=why, provisional=())


def _arm(arms: Sequence[ArmLosses], label: str) -> ArmLosses:
    labels = [arm.label for arm in arms]
    if label not in labels:
        raise ValueError(f"no arm is called {label!r}{nearest(label, labels)}; the arms are {', '.join(labels)}.")
    return arms[labels.index(label)]


def _mean(values: Collection[float]) -> float | None:
    return statistics.fmean(values) if values else None
