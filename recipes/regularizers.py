"""Which regularizers still pay once weight decay is tuned, and only when text repeats?

Claim: a regularizer lowers the loss of one model and of an ensemble's limit next to tuned decay. Every published gain is
measured against a weak baseline instead: random tokens and masked inputs at a decay of 0.033, and so on.
Here each arm has its knob, the decay and the epochs tuned together around the best plain run of one size, because a
regularizer may replace decay; arms of two passes train for half of the epochs. Then seeds, paired with the plain arm's and
judged on the test split; those seeds as members, in the limit; and the same arm in one pass over fresh text.
Command: epochal run regularizers --scale regularizers
Results: recipes/results/<scale>/report.md

Add an arm as one row of ROWS; it is tuned like the others. docs/regularizers.md has formulas and sources.
"""

import functools
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from epochal.campaign.plan import flops_of
from epochal.names import named_ensemble
from epochal.ranges import Ranged, Repeats, Tokens
from epochal.records import Record, curves
from epochal.report.claims import Case, Claim
from epochal.report.comparison import difference_claim, gains_by_seed, long_enough, measured_case, settled
from epochal.report.sections import Section, Table
from epochal.run import (
    EarlyLearning,
    Ensemble,
    GradientNorm,
    Job,
    LookAhead,
    Muon,
    OrthogonalStep,
    OwnPredictions,
    RandomTokens,
    Run,
    SecondToken,
    SelfTunedDecay,
    SelfTunedDropout,
    StableMax,
    StochasticDepth,
)
from epochal.scale import Point, Scale, Value
from epochal.scaling import MembersLaw, fit_members, seed_interval
from epochal.search.searches import Search
from epochal.study import Arm, Study, judged, judged_of
from recipes.heavy_weight_decay import TUNED

PLAIN, MUON = "plain", "Muon"


@dataclass(frozen=True)
class Row:
    """An arm, the arm that it is compared with, and where it comes from."""

    arm: Arm
    source: str
    baseline: str = PLAIN
    members: bool = True  # whether its runs can be read as members: not with other probabilities than a softmax


def _row(label: str, source: str, knob: str = "", values: tuple[Value, ...] = (), **changes: Any) -> Row:
    own = {name: changes.pop(name) for name in ("optimizer", "baseline", "members") if name in changes}
    arm = Arm(label, optimizer=own.pop("optimizer", None), run=changes, grids={knob: values} if knob else {})
    return Row(arm, source, **own)


ROWS = (
    _row(PLAIN, "tuned decay alone"),
    _row("dropout", "Transformer, section 5.4", "dropout", (0.05, 0.1, 0.2), dropout=0.1),
    _row("masked inputs", "arXiv 2606.06888", "input_mask_prob", (0.25, 0.5), input_mask_prob=0.5),
    _row("random tokens", "arXiv 2606.16246", "regularizer.share", (0.02, 0.05, 0.15, 0.3), regularizer=RandomTokens()),
    _row("stochastic depth", "arXiv 1603.09382", "regularizer.share", (0.05, 0.1, 0.2), regularizer=StochasticDepth()),
    _row(
        "own predictions",
        "PS-KD, arXiv 2006.12000",
        "regularizer.weight",
        (0.3, 0.5, 0.8),
        regularizer=OwnPredictions(),
    ),
    _row(
        "early learning",
        "ELR, arXiv 2007.00151",
        "regularizer.strength",
        (0.3, 1.0, 3.0, 7.0),
        regularizer=EarlyLearning(),
    ),
    _row("orthogonal gradient", "perpGrad, arXiv 2501.04697", regularizer=OrthogonalStep(of="gradient")),
    _row("orthogonal update", "perpGrad after the optimizer", regularizer=OrthogonalStep(of="update")),
    _row("look-ahead", "NanoGPT Slowrun, #98", "regularizer.radius", (0.1, 0.3, 0.5, 1.0), regularizer=LookAhead()),
    _row(
        "gradient norm", "arXiv 2210.02720, SAM", "regularizer.strength", (0.01, 0.05, 0.2), regularizer=GradientNorm()
    ),
    _row(
        "self-tuned decay",
        "hypergradient, arXiv 1703.04782",
        "regularizer.rate",
        (0.03, 0.1, 0.3),
        regularizer=SelfTunedDecay(),
        holdout_tokens=2048,  # bought like the others: the arm trains on the rest of D
    ),
    _row(
        "self-tuned dropout",
        "hypergradient, as for decay",
        "regularizer.rate",
        (0.03, 0.1, 0.3),
        regularizer=SelfTunedDropout(),
        dropout=0.1,  # at the start
        holdout_tokens=2048,
    ),
    _row(
        "second token",
        "arXiv 2404.19737, a linear map",
        "regularizer.weight",
        (0.1, 0.3, 0.5, 1.0),
        regularizer=SecondToken(),
    ),
    _row("StableMax", "arXiv 2501.04697", regularizer=StableMax(), members=False),
    _row(MUON, "baseline of MuonEq-R", optimizer=Muon()),
    _row("MuonEq-R", "NanoGPT Slowrun", optimizer=Muon(normalize_rows=True), baseline=MUON),
)
# What has been proposed but is not in the table, and why.
NOT_AVAILABLE = {
    "weight compander": "arXiv 2306.16993: its section III, with the formula, is in no text that could be read",
    "discretization drift (DAL)": "arXiv 2302.01952: a step size for gradient descent, not defined for Adam",
}


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """One size on the first budget, seeds, and the text of one pass."""

    model: str
    once_tokens: Tokens
    seeds: Repeats = 5

    def check(self, scale: Scale) -> None:
        """Refuse models, text and orders that do not fit the scale."""
        scale.check_models("model", self.model)
        scale.check_budget(self.once_tokens)
        if scale.data_order == "documents":
            raise ValueError(
                'data_order is "documents", in which predictions of the epoch before have no place; set "sequences" or "fixed".'
            )


def row_of(label: str) -> Row:
    """Return a row by its label."""
    return next(row for row in ROWS if row.arm.label == label)


# --- the jobs ---------------------------------------------------------------------------------------------------------


def plan(study: Study) -> list[Job]:
    """Return the searches, then every arm's seeds, members and runs of one pass."""
    here = study.settings(Settings)
    if here is None:
        return []
    jobs: list[Job] = list(study.search(TUNED, here.model, study.scale.unique_tokens[0]).jobs)
    for row in ROWS:
        found = search(study, here, row)
        runs, fresh = repeated(study, here, row, _best(found)), once(study, here, row, _best(found))
        jobs += [*found.jobs, *runs, *fresh]
        together = ensemble(row, runs)
        jobs += [together] if together is not None else []
    return jobs


def searches(study: Study) -> list[Search]:
    """Return the plain search over the scale's grid, and one for every arm."""
    here = study.settings(Settings)
    if here is None:
        return []
    return [study.search(TUNED, here.model, study.scale.unique_tokens[0]), *(search(study, here, row) for row in ROWS)]


def search(study: Study, here: Settings, row: Row) -> Search:
    """Return the descent of an arm over knob, decay and epochs; it waits for the plain optimum."""
    arm, tokens = row.arm, study.scale.unique_tokens[0]
    tuned = study.tuned(TUNED, here.model, tokens)
    base = tuned.best if tuned.certified else None
    grid: dict[str, tuple[Value, ...]] = dict(arm.grids)
    start = None
    if base is not None:
        middle = tuple((name, values[len(values) // 2]) for name, values in arm.grids.items())
        start = replace(base, more=middle)
        # At equal cost: an arm of two passes has half of the epochs.
        passes = study.run(arm, here.model, tokens, start).passes
        start = start.at("epochs", max(1, round(base.epochs / passes)))
        decays = {study.scale.standard_wd, base.wd / 4, base.wd / 2, base.wd}
        grid = {**grid, "wd": tuple(sorted(decays)), "epochs": (int(start.epochs), 2 * int(start.epochs))}

    def loss_of(point: Point) -> float | None:
        return study.loss(study.run(arm, here.model, tokens, point))

    def jobs_of(point: Point) -> tuple[Job, ...]:
        return (study.run(arm, here.model, tokens, point),)

    known = study.known_points(arm, here.model, tokens) if start is not None else ()
    title = f"{here.model} {arm.label}, D = {tokens:,}"
    return study.descend(title, here.model, tokens, start, grid, loss_of, jobs_of, known)


def _best(search: Search) -> Point | None:
    return search.descent.best if search.descent.certified else None


def repeated(study: Study, here: Settings, row: Row, point: Point | None) -> tuple[Run, ...]:
    """Return the seeds of an arm at its best point; none before it is known."""
    return () if point is None else study.seeds(row.arm, here.model, study.scale.unique_tokens[0], point, here.seeds)


def once(study: Study, here: Settings, row: Row, point: Point | None) -> tuple[Run, ...]:
    """Return the seeds of an arm in one pass over fresh text.

    They have the standard decay and the arm's best knob.
    """
    if point is None:
        return ()
    point = replace(point, epochs=1, wd=study.scale.standard_wd)
    return study.seeds(row.arm, here.model, here.once_tokens, point, here.seeds)


def ensemble(row: Row, runs: tuple[Run, ...]) -> Ensemble | None:
    """Return the seeds of an arm as members, averaged in logits; None where they cannot be."""
    names = tuple(run.name for run in runs)
    return named_ensemble(names, "logits", sharpness=True) if row.members and len(runs) > 1 else None


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one arm reached."""

    row: Row
    point: Point | None
    records: dict[int, Record]  # by seed, on repeated text
    once: dict[int, Record]  # by seed, in one pass
    law: MembersLaw | None  # of its seeds as members
    sharpness: float | None  # the largest eigenvalue of the Hessian at the end, mean over seeds
    flops: float  # of one of its seeds
    edges: tuple[str, ...]  # tuned fields whose grid ends at the point

    @property
    def label(self) -> str:
        """The arm's."""
        return self.row.arm.label


def outcome(study: Study, here: Settings, row: Row) -> Outcome:
    """Collect the records of an arm."""
    found = search(study, here, row)
    point, certificate = _best(found), found.certificate()
    runs = repeated(study, here, row, point)
    repeats = dict(judged(study.finite(dict(enumerate(runs)))))
    together = ensemble(row, runs)
    record = None if together is None else study.records.get(together)
    fresh = study.finite(dict(enumerate(once(study, here, row, point))))
    vocabulary = next((record.results["text"]["vocab_size"] for record in repeats.values()), None)
    flops = max((flops_of(record.job, vocabulary) for record in repeats.values()), default=0.0)
    sharp = None if record is None else record.results.get("sharpness")
    sharp = statistics.fmean(sharp) if sharp else None
    # The epochs have two values, so one of them is always at an end.
    ends = [name for name in certificate.edges if name != "epochs"] if certificate is not None else []
    edges = tuple(name.rpartition(".")[2] for name in ends)
    return Outcome(row, point, repeats, fresh, _law(record), sharp, flops, edges)


def _law(record: Record | None) -> MembersLaw | None:
    if record is None or len(record.results.get("curve", {})) < 2:
        return None
    subsets, without = curves(record)
    return fit_members(subsets, without or None)


def report(study: Study) -> Section | None:
    """Show whether each arm pays: alone, as members and in one pass."""
    here = study.settings(Settings)
    if here is None:
        return None
    found = {row.arm.label: outcome(study, here, row) for row in ROWS}
    compared = [one for one in found.values() if one.label not in (PLAIN, MUON)]
    repeats = {one.label: _gains(one, found[one.row.baseline], "records") for one in compared}
    fresh = {one.label: _gains(one, found[one.row.baseline], "once") for one in compared}
    claims = [
        claim
        for one in compared
        for claim in (
            _claim(one, repeats[one.label], "on top of tuned decay", here),
            _claim(one, fresh[one.label], "in one pass over fresh text", here),
        )
        if claim is not None
    ]
    cases = [_case(label, gains) for label, gains in repeats.items() if gains]
    notes = [
        "Gains are paired by seed with the arm's baseline, on the test split; knob, decay and epochs were tuned on the "
        "validation split by the first seed, which is not among them. The limit is that of the arm's seeds as members, "
        "averaged in logits, on the test split. Cost: FLOPs of training over those of the baseline; the time of a step is in "
        "benchmarks/regularizers.csv. Sharpness: the largest eigenvalue of the "
        "Hessian of the training loss at the end, mean over seeds.",
        "In one pass every arm has the plain learning rate, the standard decay and its best knob; arms of two passes cost "
        "twice as much there.",
        *(f"Not available: {name} ({reason})." for name, reason in NOT_AVAILABLE.items()),
    ]
    if cases:
        notes.append(
            f"By Holm at 5%, {settled(cases, 1)} of {len(cases)} arms pay on top of tuned decay and {settled(cases, -1)} cost."
        )
    table = functools.partial(_cells, found=found, repeats=repeats, fresh=fresh)
    return Section(
        title="Regularizers",
        question="Which regularizers still pay once weight decay is tuned, and only when text repeats?",
        claims=tuple(claims),
        tables=(
            Table(
                title=f"{here.model}, D = {study.scale.unique_tokens[0]:,}; one pass over {here.once_tokens:,} tokens",
                columns=COLUMNS,
                rows=tuple(table(one) for one in found.values()),
            ),
        ),
        notes=tuple(notes),
    )


COLUMNS = (
    "arm",
    "source",
    "knob",
    "wd",
    "epochs",
    "cost",
    "test loss",
    "gain",
    "90% low",
    "90% high",
    "seeds",
    "limit in K",
    "gain in the limit",
    "sharpness",
    "gain in one pass",
    "once low",
    "once high",
)


def _cells(
    one: Outcome, found: dict[str, Outcome], repeats: dict[str, list[float]], fresh: dict[str, list[float]]
) -> tuple[Any, ...]:
    if one.point is None or not one.records:
        return (one.label, one.row.source, *(None,) * (len(COLUMNS) - 2))
    base, gains, alone = found[one.row.baseline], repeats.get(one.label, []), fresh.get(one.label, [])
    cost = one.flops / base.flops if base.flops else None
    limits = (one.law, base.law) if one is not base else (None, None)
    knob = ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in one.point.more)
    return (
        one.label,
        one.row.source,
        knob or None,
        one.point.wd,
        one.point.epochs,
        cost,
        statistics.fmean(record.test_loss for record in one.records.values()),
        statistics.fmean(gains) if gains else None,
        *(seed_interval(gains) or (None, None)),
        len(one.records),
        None if one.law is None else one.law.E,
        limits[1].E - limits[0].E if limits[0] is not None and limits[1] is not None else None,
        one.sharpness,
        statistics.fmean(alone) if alone else None,
        *(seed_interval(alone) or (None, None)),
    )


def _gains(one: Outcome, base: Outcome, which: str) -> list[float]:
    ours, theirs = ({seed: record.test_loss for seed, record in getattr(side, which).items()} for side in (one, base))
    return list(gains_by_seed(ours, theirs).values())


def _claim(one: Outcome, gains: list[float], where: str, here: Settings) -> Claim | None:
    if not gains:
        return None
    repeated_text = where.startswith("on top")
    records = one.records if repeated_text else one.once
    planned = judged_of(here.seeds) if repeated_text else here.seeds
    few = (f"{len(gains)} of {planned} seeds",) if len(gains) < planned else ()
    claim = difference_claim(
        f"{here.model}: {one.label} lowers the loss of {one.row.baseline} {where}",
        gains,
        id=f"regularizers.{'repeated' if repeated_text else 'once'}.{one.label}".lower().replace(" ", "-"),
        caveats=(*few, *((f"at the end of its grid: {', '.join(one.edges)}",) if one.edges else ())),
    )
    return long_enough(claim, [record.job for record in records.values() if isinstance(record.job, Run)])


def _case(label: str, gains: list[float]) -> Case:
    interval = seed_interval(gains)
    finite = interval if interval is not None and all(map(math.isfinite, interval)) else None
    return measured_case(label, statistics.fmean(gains), finite, dof=max(1, len(gains) - 1))
