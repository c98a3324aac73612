"""Points of loss from anywhere, and what laws say about them: other people's tables, or the best of a campaign's records.

A CSV has one row a measurement: `recipe` (a name) and `loss` (nats per token) are needed; `N_params`, `D_tokens` and `K`
(parameters, distinct training tokens, members) place it; they may be 150M or 2.7B, empty, `inf` for a limit,
or `best` for the best over sizes. Rows equal in all of these are seeds of one setting. Other columns are ignored.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epochal.config import nearest
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Ensemble, Run, inputs
from epochal.scaling import PowerLaw, compare_limits, data_efficiency, fit_power_law

FEWEST = 3
"""A three-constant law needs at least three sizes."""

NESTED = (
    "Ensembles of K and of K + 1 models share members, so their losses are no independent points and their scatter gives "
    "no interval; the report of a campaign has one, by leaving out members."
)
"""Intervals from such points covered 0 to 24 in 100 (benchmarks/laws.csv, naive_E)."""

SURE = 0.9
"""A comparison of limits is a verdict from this probability on."""


@dataclass(frozen=True)
class Measured:
    """One loss of one recipe in nats per token; N, D and K are None where unknown, inf for a limit."""

    recipe: str
    loss: float
    N: float | None = None
    D: float | None = None
    K: float | None = None


KINDS = ("single", "ensembles")
"""What the points of a campaign are of: `NAME, single` and `NAME, ensembles`."""

UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
COLUMNS = {"N_params": "N", "D_tokens": "D", "K": "K"}


def read_points(path: Path) -> tuple[list[Measured], tuple[str, ...]]:
    """Read a CSV of points; rows without a usable loss are left out and named. Raises ValueError for another kind of file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            missing = [name for name in ("recipe", "loss") if name not in (table.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} has no column {' and no '.join(missing)}; the first line names recipe, loss and any of "
                    f"{', '.join(COLUMNS)}."
                )
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}); give a table with commas in UTF-8.") from None
    points, problems = [], []
    for number, row in enumerate(rows, start=2):
        try:
            points.append(_measured(row))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not points:
        raise ValueError(f"{path} has no row with a loss; give at least one.")
    return points, tuple(problems)


def _measured(row: Mapping[str, Any]) -> Measured:
    if None in row or any(value is None for value in row.values()):
        raise ValueError("has another number of cells than the first line")
    loss = _number(row, "loss")
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"loss is {row['loss']!r}, no finite number")
    if not row["recipe"].strip():
        raise ValueError("recipe is empty")
    places = {field: _number(row, name) for name, field in COLUMNS.items() if name in row}
    return Measured(row["recipe"].strip(), loss, **places)


def _number(row: Mapping[str, str], name: str) -> float | None:
    text = row[name].strip()
    if text in ("", "best"):
        return None
    unit = UNITS.get(text[-1], 1.0) if name in COLUMNS else 1.0
    try:
        value = float(text if unit == 1.0 else text[:-1]) * unit
    except ValueError:
        raise ValueError(f"{name} is {text!r}, no number") from None
    if not value > 0:
        raise ValueError(f"{name} is {text!r}; give a number above 0")
    return value


def points_of(records: Records, name: str) -> list[Measured]:
    """Return the best points of a campaign: for each size and budget the best single setting (all seeds) and ensembles.

    Single runs that read another job (students, continued training) are left out: they had more than their text.
    """
    singles: dict[tuple[float, int], list[float]] = {}
    for setting in records.settings:
        run, size = setting[0].job, setting[0].results.get("parameters")
        losses = [record.loss for record in setting]
        if isinstance(run, Run) and not inputs(run) and size and all(map(math.isfinite, losses)):
            place = (float(size), run.unique_tokens)
            singles[place] = min(singles.get(place, [math.inf]), losses, key=_mean)
    found = [Measured(f"{name}, single", loss, N, D, 1) for (N, D), losses in singles.items() for loss in losses]
    ensembles: dict[tuple[float, int], Record] = {}
    for record in records:
        if isinstance(record.job, Ensemble) and (place_ := _place(records, record)) is not None:
            known = ensembles.get(place_)
            ensembles[place_] = record if known is None or record.loss < known.loss else known
    for (N, D), record in ensembles.items():
        curve = record.results["curve"]
        found += [Measured(f"{name}, ensembles", _mean(losses), N, D, int(k)) for k, losses in curve.items()]
    return found


def _place(records: Records, ensemble: Record) -> tuple[float, int] | None:
    """Return size and budget of the members of an ensemble that has a curve; None for others."""
    job = ensemble.job
    member = records.named(job.runs[0]) if isinstance(job, Ensemble) else None
    if member is None or not isinstance(member.job, Run) or not ensemble.results.get("curve"):
        return None
    size = member.results.get("parameters")
    return (float(size), member.job.unique_tokens) if size else None


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


# --- laws ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """The law of one recipe along one axis, all else at `place` (words), and the points behind it."""

    recipe: str
    place: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    law: PowerLaw


@dataclass(frozen=True)
class Axis:
    """One quantity that grows: its field, what it is called, and what its limit is called."""

    field: str
    title: str
    question: str
    label: str
    others: tuple[str, ...]


SIZE = Axis("N", "Size", "Where does each recipe end as models grow?", "parameters N", ("D", "K"))
MEMBERS = Axis("K", "Members", "Where does each ensemble end as members are added?", "members K", ("D", "N"))
DATA = Axis("D", "Data", "How does each recipe's best loss fall with data?", "distinct tokens D", ())


def fit_axis(points: Sequence[Measured], axis: Axis) -> list[Fitted]:
    """Fit E + A / x**alpha to every group of points that differ along one axis only, from three places on.

    Along D the best over sizes and members at each budget counts (spec section 8), seeds averaged.
    """
    usable = [point for point in points if _finite(getattr(point, axis.field))]
    if axis is DATA:
        usable = _best_at_each_budget(usable)
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for point in usable:
        groups.setdefault((point.recipe, *(getattr(point, other) for other in axis.others)), []).append(point)
    found = []
    for (recipe, *places), group in groups.items():
        xs, ys = [float(getattr(point, axis.field)) for point in group], [point.loss for point in group]
        if len(set(xs)) >= FEWEST:
            words = [f"{field} = {_count(at)}" for field, at in zip(axis.others, places, strict=True) if at is not None]
            law = fit_power_law(xs, ys)
            if axis is MEMBERS:
                law = replace(law, interval=None, note=NESTED)
            found.append(Fitted(recipe, ", ".join(words), tuple(xs), tuple(ys), law))
    return found


def _best_at_each_budget(points: Sequence[Measured]) -> list[Measured]:
    settings: dict[tuple[Any, ...], list[float]] = {}
    for point in points:
        settings.setdefault((point.recipe, point.D, point.N, point.K), []).append(point.loss)
    best: dict[tuple[str, float], float] = {}
    for (recipe, budget, *_), losses in settings.items():
        best[recipe, budget] = min(best.get((recipe, budget), math.inf), _mean(losses))
    return [Measured(recipe, loss, D=budget) for (recipe, budget), loss in best.items()]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _count(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:,.0f}"


# --- sections -----------------------------------------------------------------------------------------------------------


def point_sections(points: Sequence[Measured], *, reference: str | None = None) -> list[Section]:
    """Turn points into the sections of a report: laws along N, K and D with figures, comparisons, data efficiency.

    Recipes are compared with `reference`, the first recipe where it is None. Raises ValueError for an unknown one.
    """
    recipes = list(dict.fromkeys(point.recipe for point in points))
    base = recipes[0] if reference is None else reference
    if base not in recipes:
        raise ValueError(f"no point is of the recipe {base!r}{nearest(base, recipes)}; known: {', '.join(recipes)}.")
    return compared_sections(points, {recipe: base for recipe in recipes if recipe != base})


def compared_sections(points: Sequence[Measured], references: Mapping[str, str]) -> list[Section]:
    """Like `point_sections`, each recipe compared with a reference of its own; those without one are only shown."""
    fits = {axis.field: fit_axis(points, axis) for axis in (SIZE, MEMBERS, DATA)}
    sections = [_law_section(axis, fits[axis.field], references) for axis in (SIZE, MEMBERS, DATA) if fits[axis.field]]
    bases = list(dict.fromkeys(references.values()))
    law = next((fit for fit in fits["D"] if fit.recipe in bases), None)
    if law is not None:
        sections.append(_efficiency_section(points, law))
    return [*sections, _points_section(points, bool(sections))]


def _law_section(axis: Axis, fits: Sequence[Fitted], references: Mapping[str, str]) -> Section:
    rows, notes = [], dict[str, list[str]]()
    for fit in fits:
        interval = "–" if fit.law.interval is None else "{:.4f} to {:.4f}".format(*fit.law.interval["E"])
        rows.append((fit.recipe, fit.place, len(fit.xs), fit.law.E, interval, f"{fit.law.A:.3g}", fit.law.alpha))
        if fit.law.note:
            notes.setdefault(fit.law.note, []).append(f"{fit.recipe} ({fit.place})" if fit.place else fit.recipe)
    columns = ("recipe", "at", "points", "limit E", "90% interval", "A", "alpha")
    return Section(
        title=axis.title,
        question=axis.question,
        claims=tuple(_comparisons(axis, fits, references)),
        tables=(Table(title=f"Laws E + A / {axis.field}^alpha", columns=columns, rows=tuple(rows)),),
        figures=tuple(_law_figures(axis, fits)),
        notes=tuple(f"{note} So for {'; '.join(whose)}." for note, whose in notes.items()),
    )


def _comparisons(axis: Axis, fits: Sequence[Fitted], references: Mapping[str, str]) -> Iterator[Claim]:
    """Compare the limit of every recipe with its reference's at the same place."""
    known = {(fit.recipe, fit.place): fit for fit in fits}
    for fit in fits:
        base = known.get((references.get(fit.recipe, ""), fit.place))
        if base is None:
            continue
        found = compare_limits(base.law, fit.law, names=(base.recipe, fit.recipe))
        chance = found.probability
        sure = chance is not None and max(chance, 1 - chance) >= SURE
        where = f" ({fit.place})" if fit.place else ""
        yield Claim(
            text=f"{fit.recipe} ends below {base.recipe} as {axis.field} grows{where}",
            value=f"{found.difference:+.4f} nats"
            + (", no interval" if chance is None else f" (probability {chance:.2f})"),
            holds=chance > 0.5 if chance is not None and sure else None,
            provisional=() if chance is not None else ("the points carry no interval",),
        )


def _law_figures(axis: Axis, fits: Sequence[Fitted]) -> Iterator[Figure]:
    """One figure a place, with the points and laws of all recipes there; along D one figure for all."""
    by_place: dict[str, list[Fitted]] = {}
    for fit in fits:
        by_place.setdefault(fit.place, []).append(fit)
    for number, (place, group) in enumerate(by_place.items(), start=1):
        where = f" at {place}" if place else ""
        yield Figure(
            name=f"loss-against-{axis.field}-{number}",
            caption=f"Loss against {axis.label}{where}: points, fitted laws with 90% bands, limits dashed.",
            draw=_drawer(axis, group),
        )


def _drawer(axis: Axis, group: Sequence[Fitted]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for fit in group:
            line = draw_series(axes, fit.xs, fit.ys, label=fit.recipe, join=False)
            # A limit at its bound 0 is none, and its line would press all points together.
            draw_law(axes, fit.law, min(fit.xs), 4 * max(fit.xs), color=line.get_color(), limit=fit.law.E > 0)
        axes.set_xscale("log", base=2 if axis is MEMBERS else 10)
        axes.set_xlabel(axis.label)
        axes.set_ylabel("loss (nats per token)")
        axes.legend()

    return draw


def _efficiency_section(points: Sequence[Measured], base: Fitted) -> Section:
    rows = []
    for point in _best_at_each_budget([point for point in points if _finite(point.D) and point.recipe != base.recipe]):
        assert point.D is not None
        found = data_efficiency(point.loss, point.D, base.law)
        low, high = found.interval or (None, None)
        rows.append((point.recipe, int(point.D), point.loss, found.multiple, low, high, found.note or "in range"))
    columns = ("recipe", "D", "loss", "multiple", "90% low", "90% high", "range")
    return Section(
        title="Data efficiency",
        question=f"How many times more data would {base.recipe} need for the same loss?",
        tables=(Table(title=f"Against the law of {base.recipe} in D", columns=columns, rows=tuple(sorted(rows))),),
    )


def _points_section(points: Sequence[Measured], fitted: bool) -> Section:
    rows = tuple((point.recipe, _cell(point.N), _cell(point.D), _cell(point.K), point.loss) for point in points)
    note = f"No law: each needs {FEWEST} places or more along N, K or D with all else equal."
    return Section(
        title="Points",
        question="What was measured?",
        tables=(Table(title=f"{len(points)} points", columns=("recipe", "N", "D", "K", "loss"), rows=rows),),
        notes=() if fitted else (note,),
    )


def _cell(value: float | None) -> int | float | None:
    return int(value) if value is not None and math.isfinite(value) else value
