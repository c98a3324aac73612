"""Laws through losses along size N, members K and data D, for a report."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from epochal.config import nearest
from epochal.report.claims import Claim
from epochal.report.figures import draw_law, draw_series
from epochal.report.point_comparisons import decided, joint_section, paired_section
from epochal.report.points import LossPoint
from epochal.report.sections import Figure, Section, Table
from epochal.scaling import (
    PowerLaw,
    check_law,
    compare_limits,
    data_efficiency,
    fit_power_law,
    interval_text,
    seed_interval,
)

MIN_PLACES = 3  # a law has three constants
BEYOND = 4  # the law is predicted at this multiple of the largest place

# Intervals from such points missed the true limit in most simulated ensembles (benchmarks/coverage.csv, `naive`).
NESTED_NOTE = (
    "Ensembles of K and of K + 1 models share members, so their losses are not independent and their scatter gives no "
    "interval; the report of a campaign has one, from leaving out members."
)


BEST_NOTE = "Each budget counts with its best setting over sizes and members."


@dataclass(frozen=True)
class Axis:
    """One quantity that grows: a field of LossPoint, with the fields that stay fixed along it."""

    field: str  # of LossPoint
    title: str  # of the section
    question: str
    label: str  # of the axis in figures
    fixed: tuple[str, ...]  # fields that stay fixed along the axis


SIZE = Axis("N", "Size", "Where does each recipe end as models grow?", "parameters N", ("D", "K"))
MEMBERS = Axis("K", "Members", "Where does each ensemble end as members are added?", "members K", ("D", "N"))
DATA = Axis("D", "Data", "How does each recipe's loss fall with data?", "distinct tokens D", ())


@dataclass(frozen=True)
class AxisLaw:
    """The law of one recipe along one axis, with its points; `place` shows the fixed fields."""

    recipe: str
    place: str  # the fixed fields: "D = 1000, K = 1"
    fixed: tuple[float | None, ...]  # their values
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    law: PowerLaw


def fit_axis(points: Sequence[LossPoint], axis: Axis) -> list[AxisLaw]:
    """Fit E + A / x**alpha to points that differ along one axis only.

    Groups with fewer than three places on the axis are left out. Along D each budget counts with all seeds of its best
    setting over sizes and members (spec section 8).
    """
    usable = [point for point in points if _is_finite(getattr(point, axis.field))]
    if axis is DATA:
        usable = _best_at_each_budget(usable)
    groups: dict[tuple[Any, ...], list[LossPoint]] = {}
    for point in usable:
        groups.setdefault((point.recipe, *(getattr(point, name) for name in axis.fixed)), []).append(point)
    laws = []
    for (recipe, *places), group in groups.items():
        xs, ys = [float(getattr(point, axis.field)) for point in group], [point.loss for point in group]
        if len(set(xs)) < MIN_PLACES:
            continue
        law = fit_power_law(xs, ys)
        if axis is MEMBERS:
            law = replace(law, interval=None, posterior=None, note=NESTED_NOTE)
        place = [f"{name} = {_count(at)}" for name, at in zip(axis.fixed, places, strict=True) if at is not None]
        laws.append(AxisLaw(recipe, ", ".join(place), tuple(places), tuple(xs), tuple(ys), law))
    return laws


def _best_at_each_budget(points: Sequence[LossPoint]) -> list[LossPoint]:
    settings: dict[tuple[Any, ...], list[float]] = {}
    for point in points:
        settings.setdefault((point.recipe, point.D, point.N, point.K), []).append(point.loss)
    best: dict[tuple[str, float], list[float]] = {}
    for (recipe, budget, *_), losses in settings.items():
        # By the mean over seeds: the lowest seed would favor settings with many seeds.
        best[recipe, budget] = min(best.get((recipe, budget), [math.inf]), losses, key=statistics.fmean)
    return [LossPoint(recipe, loss, D=budget) for (recipe, budget), losses in best.items() for loss in losses]


def _has_choice(points: Sequence[LossPoint]) -> bool:
    """Return True if some budget of a recipe has two sizes or member counts."""
    settings = {(point.recipe, point.D, point.N, point.K) for point in points if _is_finite(point.D)}
    return len(settings) > len({place[:2] for place in settings})


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _count(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"


# --- sections -----------------------------------------------------------------------------------------------------------


def point_sections(
    points: Sequence[LossPoint], *, reference: str | None = None, form: str = "chinchilla"
) -> list[Section]:
    """Return sections of comparisons, laws and data efficiency.

    Pairs are compared at shared places; laws are in N, in K, in D, and in N and D together.

    Each recipe is compared with `reference`. The reference is the first recipe by default. `form` is the law in N and D,
    one of `FORM_NAMES`. Raises ValueError for a reference that has no points and for an unknown form.
    """
    recipes = list(dict.fromkeys(point.recipe for point in points))
    base = recipes[0] if reference is None else reference
    if base not in recipes:
        raise ValueError(f"the recipe {base!r} has no points{nearest(base, recipes)}; known: {', '.join(recipes)}.")
    return referenced_sections(points, {recipe: base for recipe in recipes if recipe != base}, form=form)


def referenced_sections(
    points: Sequence[LossPoint], references: Mapping[str, str], *, form: str | None = None
) -> list[Section]:
    """Like `point_sections`, with a reference for each recipe; a recipe without one is shown but not compared.

    Without `form` there is no law in N and D.
    """
    laws = {axis.field: fit_axis(points, axis) for axis in (SIZE, MEMBERS, DATA)}
    sections = [_law_section(axis, laws[axis.field], references) for axis in (SIZE, MEMBERS, DATA) if laws[axis.field]]
    if _has_choice(points):
        sections = [_with_note(section, BEST_NOTE) if section.title == DATA.title else section for section in sections]
    both = (paired_section(points, references), joint_section(points, references, form) if form else None)
    sections = [section for section in (both[0], *sections, both[1]) if section is not None]
    # The reference of the most recipes, where that has a law in D.
    bases = list(references.values()) or [law.recipe for law in laws["D"]]
    base = next((law for law in laws["D"] if law.recipe in bases), None)
    if base is not None:
        sections.append(_efficiency_section(points, base))
    return [*sections, _points_section(points, fitted=bool(sections))]


def _with_note(section: Section, note: str) -> Section:
    return replace(section, notes=(*section.notes, note))


def _law_section(axis: Axis, laws: Sequence[AxisLaw], references: Mapping[str, str]) -> Section:
    rows, notes = [], dict[str, list[str]]()
    for fit in laws:
        law, target = fit.law, BEYOND * max(fit.xs)
        ends = [float(end) for end in law.predict_interval(target)] if law.interval else None
        limit = interval_text(law.interval["E"] if law.interval else None)
        ahead = interval_text((ends[0], ends[1]) if ends else None)
        row = (
            fit.recipe,
            fit.place,
            len(fit.xs),
            law.E,
            limit,
            f"{law.A:.3g}",
            law.alpha,
            float(law.predict(target)),
            ahead,
        )
        rows.append(row)
        for note in (law.note, check_law(law).sentence if axis is not MEMBERS else ""):
            if note:
                notes.setdefault(note, []).append(f"{fit.recipe} ({fit.place})" if fit.place else fit.recipe)
    ahead_of = f"at {BEYOND}x the largest {axis.field}"
    columns = ("recipe", "at", "points", "limit E", "90% interval", "A", "alpha", ahead_of, "its 90% interval")
    return Section(
        title=axis.title,
        question=axis.question,
        claims=tuple(_limit_claims(axis, laws, references)),
        tables=(Table(title=f"Laws E + A / {axis.field}^alpha", columns=columns, rows=tuple(rows)),),
        figures=tuple(_law_figures(axis, laws)),
        notes=tuple(f"{note} Applies to {'; '.join(recipes)}." for note, recipes in notes.items()),
    )


def _limit_claims(axis: Axis, laws: Sequence[AxisLaw], references: Mapping[str, str]) -> Iterator[Claim]:
    """Compare the limit of every recipe with its reference's at the same place."""
    by_place = {(fit.recipe, fit.fixed): fit for fit in laws}
    for fit in laws:
        base = by_place.get((references.get(fit.recipe, ""), fit.fixed))
        if base is None:
            continue
        comparison = compare_limits(base.law, fit.law, names=(base.recipe, fit.recipe))
        probability = comparison.probability
        value = f"{comparison.difference:+.4f} nats"
        where = f" ({fit.place})" if fit.place else ""
        text = f"{fit.recipe} ends below {base.recipe} as {axis.field} grows{where}"
        if probability is None:
            yield Claim(text=text, value=f"{value}, no interval", provisional=("the points have no interval",))
            continue
        yield Claim(
            text=text,
            value=f"{value} (probability {probability:.2f})",
            interval=comparison.interval,
            # While the interval contains zero the limits may be equal, so the claim stays open.
            holds=decided(comparison.interval),
        )


def _law_figures(axis: Axis, laws: Sequence[AxisLaw]) -> Iterator[Figure]:
    """Yield one figure for each place, with the points and laws of all recipes there."""
    by_place: dict[str, list[AxisLaw]] = {}
    for fit in laws:
        by_place.setdefault(fit.place, []).append(fit)
    for number, (place, group) in enumerate(by_place.items(), start=1):
        where = f" at {place}" if place else ""
        yield Figure(
            name=f"loss-against-{axis.field}-{number}",
            caption=f"Loss against {axis.label}{where}: points, fitted laws with 90% bands, limits at the right.",
            draw=_draw_laws(axis, group),
        )


def _draw_laws(axis: Axis, laws: Sequence[AxisLaw]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for fit in laws:
            line = draw_series(axes, fit.xs, fit.ys, label=fit.recipe, join=False)
            # A limit of 0 is only the bound of the fit, and its line would squeeze all points together.
            draw_law(
                axes,
                fit.law,
                min(fit.xs),
                4 * max(fit.xs),
                color=line.get_color(),
                limit=fit.law.E > 0,
                label=fit.recipe,
                in_legend=False,
            )
        axes.set_xscale("log", base=2 if axis is MEMBERS else 10)
        axes.set_xlabel(axis.label)
        axes.set_ylabel("loss (nats per token)")

    return draw


def _efficiency_section(points: Sequence[LossPoint], base: AxisLaw) -> Section:
    rows = []
    others = [point for point in points if _is_finite(point.D) and point.recipe != base.recipe]
    reached: dict[tuple[str, float], list[float]] = {}
    for point in _best_at_each_budget(others):
        assert point.D is not None
        reached.setdefault((point.recipe, point.D), []).append(point.loss)
    for (recipe, budget), losses in reached.items():
        loss = statistics.fmean(losses)
        efficiency = data_efficiency(loss, budget, base.law, loss_interval=seed_interval(losses))
        low, high = efficiency.interval or (None, None)
        note = efficiency.note or "in range"
        rows.append((recipe, f"{budget:g}", loss, efficiency.multiple, low, high, note))
    columns = ("recipe", "D", "loss", "multiple", "90% low", "90% high", "range")
    return Section(
        title="Data efficiency",
        question=f"How many times more data would {base.recipe} need for the same loss?",
        tables=(Table(title=f"Against the law of {base.recipe} in D", columns=columns, rows=tuple(rows)),),
    )


def _points_section(points: Sequence[LossPoint], *, fitted: bool) -> Section:
    rows = tuple((point.recipe, _cell(point.N), _cell(point.D), _cell(point.K), point.loss) for point in points)
    note = f"No law is fitted: one needs at least {MIN_PLACES} places along N, K or D with the rest equal."
    return Section(
        title="Points",
        question="What was measured?",
        tables=(Table(title=f"{len(points)} points", columns=("recipe", "N", "D", "K", "loss"), rows=rows),),
        notes=() if fitted else (note,),
    )


def _cell(value: float | None) -> str | None:
    return None if value is None else _count(value)
