"""What the records say about a run that nobody made: which size, how many members, which student, what a doubling brings.

Pure functions of the records (no torch, no recipe): the best tuned single of every size and budget, the law of every
ensemble in K, and what students kept of their teachers' gain. Nothing is assumed silently: an answer lists what it
rests on, every estimate carries its 90% interval or says why there is none, and what lies outside the measured sizes is
marked as extrapolated. With too few records there is one sentence instead of an answer.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from epochal.records import Record, Records
from epochal.run import AdamW, Ensemble, Run
from epochal.scale import Scale, member_point
from epochal.scaling import (
    CHINCHILLA,
    MembersLaw,
    PowerLaw,
    SurfaceLaw,
    fit_members,
    fit_power_law,
    fit_surface,
    seed_reach,
)
from epochal.tuner import Point

FEWEST_SURFACE = 7
"""Points below which a law of five constants in N and D leaves fewer than two degrees of freedom."""

SAME = 0.02
"""Budgets nearer than this share are one budget: scales round them to whole batches."""

FURTHEST = 4
"""Members are not counted beyond this many times the largest K that was measured."""


@dataclass(frozen=True)
class Estimate:
    """A loss or a change of loss in nats per token, half the width of its 90% interval (None: unknown), and its basis."""

    value: float
    reach: float | None
    basis: str

    def __str__(self) -> str:
        """Show the value with its interval or its basis alone."""
        within = (
            "no interval" if self.reach is None else f"{self.value - self.reach:.3f} to {self.value + self.reach:.3f}"
        )
        return f"{self.value:.3f} ({within}; {self.basis})"


@dataclass(frozen=True)
class Tuned:
    """The best tuned single of one size and budget: `losses` of its seeds at `point`."""

    model: str
    parameters: float
    tokens: int
    point: Point
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean loss over seeds."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Evidence:
    """What the records hold: `tuned` by (model, D), `members` laws by (model, D), shares of the gain students kept.

    `surface` is the law in N and D through all tuned singles, None with too few sizes or budgets.
    """

    tuned: Mapping[tuple[str, int], Tuned]
    members: Mapping[tuple[str, int], MembersLaw]
    kept: tuple[float, ...]
    surface: SurfaceLaw | None

    @property
    def budgets(self) -> tuple[int, ...]:
        """Every budget with tuned singles, ascending."""
        return tuple(sorted({tokens for _, tokens in self.tuned}))


@dataclass(frozen=True)
class Option:
    """One way to spend the budget: K members of one size at one point; `hours` counts all of them."""

    model: str
    parameters: float
    members: int
    point: Point
    hours: float
    loss: Estimate


@dataclass(frozen=True)
class Student:
    """One model that learns from a teacher; `hours` counts the teacher's members and the student."""

    model: str
    parameters: float
    hours: float
    loss: Estimate
    teacher: Option


@dataclass(frozen=True)
class Answer:
    """The best option, the best single model beside it, students by size, what doublings bring, and the assumptions."""

    tokens: int
    hours: float
    best: Option
    single: Option
    students: tuple[Student, ...]
    student: Student | None
    doublings: tuple[tuple[str, Estimate | None], ...]
    assumptions: tuple[str, ...]


# --- what the records hold ----------------------------------------------------------------------------------------------


def evidence(records: Records) -> Evidence:
    """Collect tuned singles, laws of ensembles and shares that students kept."""
    runs = [record for record in records if isinstance(record.job, Run) and math.isfinite(record.loss)]
    tuned = _tuned(record for record in runs if _plain(record.job))
    members = _members(records)
    return Evidence(tuned, members, _kept(runs, tuned, records), _surface(list(tuned.values())))


def _plain(run: object) -> bool:
    """Whether a run is AdamW on the real text alone: no teacher, no earlier weights, nothing that other recipes add."""
    return (
        isinstance(run, Run)
        and isinstance(run.optimizer, AdamW)
        and run.distill is None
        and run.teach is None
        and run.start is None
        and run.weights == "last"
        and run.dropout == run.mask_inputs == 0.0
        and run.wd_schedule == "constant"
    )


def _tuned(records: Iterable[Record]) -> dict[tuple[str, int], Tuned]:
    """The point with the lowest mean over its seeds, for every size and budget at which the decay was searched at all."""
    groups: dict[tuple[str, int, Point], list[Record]] = defaultdict(list)
    for record in records:
        run = record.job
        assert isinstance(run, Run)
        point = Point(lr=run.optimizer.lr, epochs=run.epochs, wd=run.optimizer.wd)
        groups[run.model, run.unique_tokens, point].append(record)
    best: dict[tuple[str, int], Tuned] = {}
    for (model, tokens, point), found in groups.items():
        parameters = float(found[0].results["parameters"])
        entry = Tuned(model, parameters, tokens, point, tuple(record.loss for record in found))
        if len({other.wd for m, d, other in groups if (m, d) == (model, tokens)}) < 2:
            continue  # only the standard recipe ran there
        if (model, tokens) not in best or entry.loss < best[model, tokens].loss:
            best[model, tokens] = entry
    return best


def _members(records: Records) -> dict[tuple[str, int], MembersLaw]:
    """The law in K of the ensemble with the lowest loss, for every size and budget; members all of one kind."""
    best: dict[tuple[str, int], Record] = {}
    for record in records:
        if not isinstance(record.job, Ensemble) or record.job.weights is not None:
            continue
        found = [records.named(name) for name in record.job.runs]
        kinds = {(r.job.model, r.job.unique_tokens) if r and _plain(r.job) else None for r in found}  # type: ignore[union-attr]
        if len(kinds) != 1 or None in kinds or len(record.results.get("curve", {})) < 2:
            continue
        (kind,) = kinds
        assert kind is not None
        if kind not in best or record.loss < best[kind].loss:
            best[kind] = record
    return {kind: fit_members(*_curves(record)) for kind, record in best.items()}


def _curves(record: Record) -> tuple[dict[int, list[float]], dict[int, list[float]] | None]:
    curve, without = record.results["curve"], record.results.get("without")
    return {int(k): v for k, v in curve.items()}, {int(k): v for k, v in without.items()} if without else None


def _kept(runs: list[Record], tuned: Mapping[tuple[str, int], Tuned], records: Records) -> tuple[float, ...]:
    """Shares of an ensemble's gain over the tuned single of the student's size that students of it kept."""
    shares = []
    for record in runs:
        run = record.job
        assert isinstance(run, Run)
        samples = None if run.distill is None else records.named(run.distill.samples)
        source = None if samples is None else records.named(getattr(samples.job, "source", ""))
        single = tuned.get((run.model, run.unique_tokens))
        if source is None or single is None or not isinstance(source.job, Ensemble) or source.loss >= single.loss:
            continue
        shares.append((single.loss - record.loss) / (single.loss - source.loss))
    return tuple(shares)


# --- estimates ----------------------------------------------------------------------------------------------------------


def single_loss(found: Evidence, model: str, tokens: int) -> Estimate | None:
    """The loss of the best tuned single of one size at D distinct tokens: measured, or by a law; None where unknown."""
    near = _same_budget(found, model, tokens)
    if near is not None:
        return Estimate(near.loss, _seed_reach(near.losses), "measured")
    sizes = {entry.model: entry.parameters for entry in found.tuned.values()}
    outside = "" if found.budgets[0] <= tokens <= found.budgets[-1] else ", extrapolated"
    if found.surface is not None:
        low, high = found.surface.predict_interval(N=sizes[model], D=tokens)
        half = float(high[0] - low[0]) / 2
        value = float(found.surface.predict(N=sizes[model], D=tokens)[0])
        return Estimate(value, half if math.isfinite(half) else None, f"law in N and D{outside}")
    law = _data_law(found, model)
    if law is None:
        return None
    low, high = law.predict_interval([float(tokens)])
    half = float(high[0] - low[0]) / 2
    return Estimate(float(law.predict(tokens)), half if math.isfinite(half) else None, f"law in D{outside}")


def ensemble_loss(found: Evidence, model: str, tokens: int, count: int) -> Estimate | None:
    """The loss of `count` members of one size at D tokens; None where no ensemble of that size was measured.

    At another budget than the measured one the gain over the tuned single of the same size is carried over.
    """
    near = min(
        ((m, d) for m, d in found.members if m == model), key=lambda key: abs(math.log(key[1] / tokens)), default=None
    )
    single = single_loss(found, model, tokens)
    if near is None or single is None:
        return None
    law = found.members[near]
    reach = float(law.predict_interval([float(count)])[1][0] - law.predict(count)) if law.interval else None
    outside = "" if count <= float(law.x.max()) else ", extrapolated in K"
    value = float(law.predict(count))
    if abs(near[1] / tokens - 1) <= SAME:
        return Estimate(value, reach, f"law in K{outside}")
    at_near = single_loss(found, model, near[1])
    if at_near is None:
        return None
    together = _root([(1, reach), (1, single.reach)])
    basis = f"gain of the ensemble at D = {near[1]:,}, {single.basis}{outside}"
    return Estimate(single.value - (at_near.value - value), together, basis)


def _same_budget(found: Evidence, model: str, tokens: int) -> Tuned | None:
    for (name, budget), entry in found.tuned.items():
        if name == model and abs(budget / tokens - 1) <= SAME:
            return entry
    return None


def _seed_reach(losses: tuple[float, ...]) -> float | None:
    """Student's interval of a mean over seeds; None for one seed."""
    return seed_reach(losses) if len(losses) > 1 else None


def _surface(entries: list[Tuned]) -> SurfaceLaw | None:
    """E + A / N**alpha + B / D**beta."""
    sizes, budgets = ({getattr(entry, name) for entry in entries} for name in ("model", "tokens"))
    if len(entries) < FEWEST_SURFACE or min(len(sizes), len(budgets)) < 3:
        return None
    N, D = [entry.parameters for entry in entries], [float(entry.tokens) for entry in entries]
    return fit_surface(CHINCHILLA, [entry.loss for entry in entries], N=N, D=D)


def _data_law(found: Evidence, model: str) -> PowerLaw | None:
    entries = [entry for (name, _), entry in found.tuned.items() if name == model]
    if len(entries) < 3:
        return None
    points = [(float(entry.tokens), loss) for entry in entries for loss in entry.losses]
    return fit_power_law([d for d, _ in points], [loss for _, loss in points], bootstrap=0)


# --- the answer ---------------------------------------------------------------------------------------------------------


def what_if(records: Records, scale: Scale, *, tokens: int, hours: float) -> Answer:
    """Answer for D distinct tokens and a number of device-hours at the scale's measured speed.

    Raises ValueError in one sentence where the records are too few for an answer or the hours for any tuned run.
    """
    if tokens < 1 or not (math.isfinite(hours) and hours > 0):
        raise ValueError(f"tokens {tokens} and hours {hours} are no budget; give both above 0.")
    found = evidence(records)
    _refuse(found, scale, tokens)
    plans = _options(found, scale, tokens, hours)
    if not plans:
        cheapest = min(_singles(found, scale, tokens), key=lambda option: option.hours)
        raise ValueError(
            f"{hours:g} hours of {scale.hardware.device} do not pay for any tuned run at D = {tokens:,}; the cheapest is "
            f"{cheapest.model} for {cheapest.point.epochs} epochs, {cheapest.hours:,.2g} hours."
        )
    best = min(plans, key=lambda option: option.loss.value)
    single = min((option for option in plans if option.members == 1), key=lambda option: option.loss.value)
    students = _students(found, scale, tokens, hours)
    paying = [option for option in students if option.loss.value < single.loss.value]
    student = min(paying, key=lambda option: option.parameters, default=None)
    return Answer(
        tokens=tokens,
        hours=hours,
        best=best,
        single=single,
        students=students,
        student=student,
        doublings=_doublings(found, scale, tokens, hours, best),
        assumptions=_assumptions(found, scale, best, students),
    )


def _refuse(found: Evidence, scale: Scale, tokens: int) -> None:
    if not found.tuned:
        raise ValueError(
            f"scale {scale.name} has no records of tuned single models; run epochal run heavy_weight_decay."
        )
    sizes = {model for model, _ in found.tuned}
    if all(single_loss(found, model, tokens) is None for model in sizes):
        budgets = ", ".join(f"{budget:,}" for budget in found.budgets)
        raise ValueError(
            f"The records hold tuned models at D = {budgets} only, which say nothing about D = {tokens:,}: ask for one of "
            "those, or run three budgets."
        )


def _setting(found: Evidence, scale: Scale, model: str, tokens: int) -> Point:
    """Epochs and lr of the tuned point at the nearest budget; wd keeps its averaging window 1 / (lr wd steps)."""
    entries = [entry for (name, _), entry in found.tuned.items() if name == model]
    near = min(entries, key=lambda entry: abs(math.log(entry.tokens / tokens)))
    return Point(lr=near.point.lr, epochs=near.point.epochs, wd=near.point.wd * near.tokens / tokens)


def _hours(scale: Scale, parameters: float, tokens: float, epochs: float) -> float:
    """Device-hours of training: 6 N FLOPs a token at the speed that the scale states."""
    return 6.0 * parameters * tokens * epochs / scale.hardware.flops / 3600


def _singles(found: Evidence, scale: Scale, tokens: int) -> list[Option]:
    options = []
    for model, parameters in {entry.model: entry.parameters for entry in found.tuned.values()}.items():
        loss = single_loss(found, model, tokens)
        if loss is not None:
            point = _setting(found, scale, model, tokens)
            options.append(Option(model, parameters, 1, point, _hours(scale, parameters, tokens, point.epochs), loss))
    return options


def _options(found: Evidence, scale: Scale, tokens: int, hours: float) -> list[Option]:
    """Every single and every ensemble that the hours pay for."""
    options = []
    for single in _singles(found, scale, tokens):
        if single.hours <= hours:
            options.append(single)
        point = member_point(single.point)
        each = _hours(scale, single.parameters, tokens, point.epochs)
        for count in range(2, min(_most_members(found, single.model), int(hours / each)) + 1):
            loss = ensemble_loss(found, single.model, tokens, count)
            if loss is not None:
                options.append(Option(single.model, single.parameters, count, point, count * each, loss))
    return options


def _most_members(found: Evidence, model: str) -> int:
    return FURTHEST * max((int(law.x.max()) for (name, _), law in found.members.items() if name == model), default=0)


def _students(found: Evidence, scale: Scale, tokens: int, hours: float) -> tuple[Student, ...]:
    """A student of every size, each of the best ensemble that the hours left by its own training pay for."""
    if not found.kept:
        return ()
    share, settings, students = sum(found.kept) / len(found.kept), scale.students, []
    for single in _singles(found, scale, tokens):
        cost = _hours(scale, single.parameters, tokens, settings.epochs / (1 - settings.fraction))
        teachers = [o for o in _options(found, scale, tokens, hours - cost) if o.members > 1]
        teacher = min(teachers, key=lambda option: option.loss.value, default=None)
        if teacher is None or single.parameters > teacher.parameters or teacher.loss.value >= single.loss.value:
            continue
        gain = single.loss.value - teacher.loss.value
        reach = _root([
            (1 - share, single.loss.reach), (share, teacher.loss.reach), (gain, _seed_reach(found.kept)),
        ])  # fmt: skip
        loss = Estimate(single.loss.value - share * gain, reach, f"{100 * share:.0f}% of the ensemble's gain kept")
        students.append(Student(single.model, single.parameters, teacher.hours + cost, loss, teacher))
    return tuple(sorted(students, key=lambda student: student.parameters))


def _root(parts: list[tuple[float, float | None]]) -> float | None:
    """Half the width for a weighted sum of independent estimates; None where one has none."""
    squares = [(factor * reach) ** 2 for factor, reach in parts if reach is not None]
    return math.sqrt(sum(squares)) if len(squares) == len(parts) else None


def _doublings(
    found: Evidence, scale: Scale, tokens: int, hours: float, best: Option
) -> tuple[tuple[str, Estimate | None], ...]:
    """The change of the best loss from twice the tokens, twice the hours, twice the members, and the next size up."""

    def change(option: Option | Estimate | None) -> Estimate | None:
        loss = option.loss if isinstance(option, Option) else option
        if loss is None:
            return None
        return Estimate(loss.value - best.loss.value, _root([(1, loss.reach), (1, best.loss.reach)]), loss.basis)

    def best_of(d: int, h: float) -> Option | None:
        return min(_options(found, scale, d, h), key=lambda option: option.loss.value, default=None)

    bigger = sorted(
        (option for option in _singles(found, scale, tokens) if option.parameters > best.parameters),
        key=lambda option: option.parameters,
    )
    next_size = None
    if bigger:
        one = best.members == 1
        next_size = bigger[0].loss if one else ensemble_loss(found, bigger[0].model, tokens, best.members)
    up = f"the next size up ({bigger[0].model}) at K = {best.members}" if bigger else "a larger size than any measured"
    more = ensemble_loss(found, best.model, tokens, 2 * best.members)
    return (
        ("twice the tokens, the same hours", change(best_of(2 * tokens, hours))),
        ("twice the hours, the same tokens", change(best_of(tokens, 2 * hours))),
        (f"twice the members (K = {2 * best.members} of {best.model})", change(more)),
        (up, change(next_size)),
    )


def _assumptions(found: Evidence, scale: Scale, best: Option, students: tuple[Student, ...]) -> tuple[str, ...]:
    said = [
        f"Hours are 6 N FLOPs a token at {scale.hardware.flops:.2g} FLOP/s, the speed that {scale.name} states for "
        f"{scale.hardware.device}; searches are not counted.",
        "lr and epochs are those of the nearest tuned budget, wd keeps its averaging window there.",
    ]
    if best.members > 1:
        said.append(
            "Members: the same lr, twice the epochs, half the decay, trained independently; excess falls as 1 / K, which is "
            f"followed up to {FURTHEST} times the largest K measured."
        )
    elif not found.members:
        said.append("No ensemble was measured, so only single models are compared.")
    if students:
        said.append("Students of every size keep the same share of the gain as those that were measured.")
    elif best.members > 1:
        said.append("No student is proposed: none was measured, or the hours do not pay for one beside its teacher.")
    return tuple(said)


def answer_lines(
    records: Records, scale: Scale, *, tokens: int | None, hours: float | None, asked: bool = True
) -> list[str]:
    """Return what `epochal plan --what-if` prints; raises ValueError where the question is not complete."""
    if not asked or hours is None:
        raise ValueError("--tokens and --gpu-hours belong to --what-if, which needs --gpu-hours; give both.")
    return describe(what_if(records, scale, tokens=scale.unique_tokens[0] if tokens is None else tokens, hours=hours))


def describe(answer: Answer) -> list[str]:
    """Return the answer as lines for a terminal."""
    lines = [f"With D = {answer.tokens:,} distinct tokens and {answer.hours:,.6g} hours:"]
    lines.append(f"  train   {_said(answer.best)}")
    if answer.best.members > 1:
        lines.append(f"  beside  {_said(answer.single)}")
    if answer.student is not None:
        lines.append(
            f"  distil  to {answer.student.model}: loss {answer.student.loss}, {answer.student.hours:,.3g} hours in all"
        )
    elif answer.students:
        lines.append("  distil  no student is expected to beat the best single model.")
    lines.append("  the next doubling:")
    for what, estimate in answer.doublings:
        lines.append(
            f"    {what}: " + ("not known from these records" if estimate is None else f"{_signed(estimate)} nats")
        )
    return [*lines, *(f"  assumed: {said}" for said in answer.assumptions)]


def _said(option: Option) -> str:
    what = "1 model" if option.members == 1 else f"{option.members} members"
    return (
        f"{what} of {option.model} ({option.parameters:,.0f} parameters), {option.point.epochs} epochs, lr "
        f"{option.point.lr:g}, wd {option.point.wd:.3g}: loss {option.loss}, {option.hours:,.3g} hours"
    )


def _signed(estimate: Estimate) -> str:
    within = (
        "no interval"
        if estimate.reach is None
        else f"{estimate.value - estimate.reach:+.3f} to {estimate.value + estimate.reach:+.3f}"
    )
    return f"{estimate.value:+.3f} ({within}; {estimate.basis})"
