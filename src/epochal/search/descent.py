"""Coordinate descent on a grid, as a pure function of the results so far.

A search goes in rounds. When every point of a round is known, the centre moves to the best known point, and the next
round asks for neighbours of the centre that have not run. In turn (the default): one neighbour while a field is still
open, and all that is left of the star at once when it is only a matter of the certificate: few runs. Together: always
the whole star: fewest rounds, for more workers than searches. Either way the points that get asked for do not depend on
which finished first, on interruptions or on the number of workers, and the search ends with a certificate: every
neighbour was run and none is better (spec section 5).

Noise moves nothing here: which point is best is decided at equal seeds, and the spread over seeds says afterwards how
sure that is (`Certificate`). A threshold would make the jobs of a campaign depend on how many seeds have run so far.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from epochal.scale import Point, Value

Grid = Mapping[str, tuple[Value, ...]]


LossOf = Callable[[Point], float | None]


@dataclass(frozen=True)
class Descent:
    """Where a search stands.

    `best` is the best known point (None before the first result), `wanted` the points whose results are missing,
    `visited` all points asked for so far, `edges` the fields whose grid ends at `best`, so that it has no neighbour there.
    """

    best: Point | None
    wanted: tuple[Point, ...]
    visited: tuple[Point, ...]
    edges: tuple[str, ...]

    @property
    def certified(self) -> bool:
        """Whether every neighbour of `best` was run and is not better."""
        return self.best is not None and not self.wanted

    @property
    def tried(self) -> int:
        """How many points have results: what the search has cost in runs of the first seed."""
        return len(self.visited) - len(self.wanted)


NOT_STARTED = Descent(None, (), (), ())
"""A search that waits for the optimum of the next smaller size."""


def descend(loss_of: LossOf, start: Point, grid: Grid, way: str = "in turn") -> Descent:
    """Follow the descent as far as results are known.

    `loss_of` returns the loss of a point (inf for a diverged one) or None. `grid` names the values of each field that
    is tuned, in order; other fields stay at `start`. Raises ValueError when `start` is not on the grid.
    """
    for field, values in grid.items():
        if start.get(field) not in values:
            raise ValueError(f"start {field} {start.get(field)} is not on its grid {list(values)}; use a grid value.")
    centre, wanted, visited = _walk(loss_of, start, grid, together=way == "parallel")
    known = {point: loss for point in visited if (loss := loss_of(point)) is not None}
    best = min(known, key=lambda point: (known[point], point), default=None)
    if wanted and best is not None:
        loss, star = _downhill(loss_of, start, grid)
        # Others asked for what the walk did not: a search left to itself knows no such points, and its order stands.
        if math.isfinite(loss) and loss <= known[best] and not set(star) <= set(visited):
            return Descent(star[0], (), tuple(dict.fromkeys((*visited, *star))), _edges(star[0], grid))
    if wanted:
        return Descent(best, wanted, visited, ())
    return Descent(centre, (), visited, _edges(centre, grid))


Walk = tuple[Point, tuple[Point, ...], tuple[Point, ...]]  # where it stands, what it lacks, all it asked for


def _walk(loss_of: LossOf, centre: Point, grid: Grid, *, together: bool) -> Walk:
    """Replay the rounds. A field is settled once the centre moved along it, or was the better of both its sides."""
    asked: dict[Point, float] = {}
    settled, ahead = set[str](), ("", 0)
    around = _questions(centre, grid, asked)
    batch = [centre, *(point for _, _, point in (around if together else around[:1]))]  # the first is asked in any case
    while True:
        losses = {point: loss_of(point) for point in batch}
        missing = tuple(point for point, loss in losses.items() if loss is None)
        if missing:
            return centre, missing, (*asked, *batch)
        asked |= {point: loss for point, loss in losses.items() if loss is not None}
        leader = min(batch, key=lambda point: (asked[point], point != centre, point))
        if asked[leader] < asked[centre]:
            ahead = next((field, side) for field, side, point in around if point == leader)
            settled.add(ahead[0])
            centre = leader
        around = _questions(centre, grid, asked)
        if not around:
            return centre, (), tuple(asked)
        settled |= set(grid) - {field for field, _, _ in around}
        batch = [point for _, _, point in (around if together else _next(around, settled, ahead))]


def _downhill(loss_of: LossOf, point: Point, grid: Grid) -> tuple[float, tuple[Point, ...]]:
    """Go down over points that ran already; return loss and star of the end where it is a certificate, else inf.

    So a campaign that was searched in another way keeps the certificates that it has.
    """
    while True:
        star = (point, *neighbours(point, grid))
        losses = {other: loss for other in star if (loss := loss_of(other)) is not None}
        lowest = min(star, key=lambda other: (losses.get(other, math.inf), other != point, other))
        if lowest == point:
            return (losses[point] if len(losses) == len(star) else math.inf), star
        point = lowest


Question = tuple[str, int, Point]  # a field, a side of it, and the neighbour there


def _questions(centre: Point, grid: Grid, asked: Mapping[Point, float]) -> list[Question]:
    """Return the neighbours of a point that were not asked for, up before down."""
    sides = [
        (field, side, point)
        for field, values in grid.items()
        for side, point in zip((1, -1), reversed(_pair(centre, field, values)), strict=True)
    ]
    return [(field, side, point) for field, side, point in sides if point is not None and point not in asked]


def _next(
    around: Sequence[Question],
    settled: Set[str],
    ahead: tuple[str, int],
) -> Sequence[Question]:
    """Choose what to ask next: an open field first, then on in the direction of the last move, then all that is left.

    What is left are fields that were settled at an earlier centre: those seldom change, and their questions belong to the
    certificate in any case, so nothing is lost by asking them at once.
    """

    def completes(question: Question) -> bool:
        """Whether no other side of the field is left to ask for."""
        return not any(field == question[0] and side != question[1] for field, side, _ in around)

    still_open = [question for question in around if question[0] not in settled]
    if still_open:
        return [min(still_open, key=lambda question: not completes(question))]
    return [question for question in around if question[:2] == ahead] or around


def neighbours(point: Point, grid: Grid) -> list[Point]:
    """Return the one-step neighbours of a point: one grid step up and down in each tuned field."""
    return [other for field in grid for other in _pair(point, field, grid[field]) if other is not None]


def _pair(point: Point, field: str, values: tuple[Value, ...]) -> tuple[Point | None, Point | None]:
    """Return the neighbours one step down and up in one field; None past an end of the grid."""
    index = values.index(point.get(field))
    down = point.at(field, values[index - 1]) if index else None
    return down, point.at(field, values[index + 1]) if index + 1 < len(values) else None


def _edges(point: Point, grid: Grid) -> tuple[str, ...]:
    """Fields at an end of a grid of several values: the optimum may lie beyond."""
    return tuple(field for field, values in grid.items() if len(values) > 1 and None in _pair(point, field, values))


# --- how sure, and what the next round can gain -------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the loss between seeds, pooled over settings with several seeds, and its degrees of freedom."""

    sd: float
    freedom: int


def pooled_noise(groups: Iterable[Iterable[float]]) -> Noise | None:
    """Pool the variance within groups of equal runs with different seeds; None where no group has two finite losses."""
    squares, freedom = 0.0, 0
    for group in groups:
        losses = [loss for loss in group if math.isfinite(loss)]
        mean = sum(losses) / len(losses) if losses else 0.0
        squares += sum((loss - mean) ** 2 for loss in losses)
        freedom += max(0, len(losses) - 1)
    return Noise(math.sqrt(squares / freedom), freedom) if freedom else None


@dataclass(frozen=True)
class Certificate:
    """What a search can say for its best point.

    `missing` are neighbours without a result; `margins` how much worse each known one is (nats, equal seeds); `noise`
    the spread between seeds, None before any point has two; `edges` fields whose grid ends here.
    """

    best: Point
    missing: tuple[Point, ...]
    margins: dict[Point, float]
    noise: Noise | None
    edges: tuple[str, ...]

    @property
    def ties(self) -> tuple[Point, ...]:
        """Neighbours that the noise does not tell from the best point: a difference has sqrt(2) of its spread, twice."""
        limit = 2 * math.sqrt(2) * self.noise.sd if self.noise else 0.0
        return tuple(point for point, margin in self.margins.items() if margin < limit)

    def __str__(self) -> str:
        """One phrase for a table."""
        edge = f"; {', '.join(self.edges)} at the end of the grid" if self.edges else ""
        if self.missing:
            return f"not run yet: {', '.join(_difference(point, self.best) for point in self.missing)}"
        if self.noise is None:
            return f"all neighbours run, none better (noise unknown: one seed){edge}"
        within = f"{len(self.ties)} of {len(self.margins)} within noise" if self.ties else "none within noise"
        return f"all neighbours run, none better ({within}){edge}"


def certify(loss_of: LossOf, descent: Descent, grid: Grid, noise: Noise | None = None) -> Certificate | None:
    """Return what is known about the neighbours of the best point; None before the first result."""
    best = descent.best
    loss = loss_of(best) if best is not None else None
    if best is None or loss is None:
        return None
    found = {point: loss_of(point) for point in neighbours(best, grid)}
    missing = tuple(point for point, other in found.items() if other is None)
    # inf - inf: a search in which everything diverged
    margins = {p: other - loss if other > loss else 0.0 for p, other in found.items() if other is not None}
    return Certificate(best, missing, margins, noise, _edges(best, grid))


def _difference(point: Point, centre: Point) -> str:
    """Name what a neighbour changes: wd 3.2."""
    fields = ("lr", "epochs", "wd", *dict(centre.more))
    return ", ".join(f"{field} {point.get(field):g}" for field in fields if point.get(field) != centre.get(field))


def possible_gain(loss_of: LossOf, descent: Descent, grid: Grid) -> float | None:
    """Bound what moving to a missing neighbour can gain (nats); None where nothing bounds it.

    In steps of the grid, which are equal in the logarithm, a convex loss falls on one side at most as fast as it rises
    on the other. A field of which neither neighbour has run has no bound. The fields add up for a separable loss.
    """
    best = descent.best
    loss = loss_of(best) if best is not None else None
    if best is None or loss is None or not math.isfinite(loss):
        return None
    total = 0.0
    for field, values in grid.items():
        down, up = _pair(best, field, values)
        sides = [loss_of(point) for point in (down, up) if point is not None]
        known = [other for other in sides if other is not None]
        if len(known) < len(sides):
            if not known or not math.isfinite(known[0]):
                return None
            total += max(0.0, known[0] - loss)
    return total


def between_points(loss_of: LossOf, descent: Descent, grid: Grid) -> float | None:
    """Return how far the quadratic through a whole star falls below its centre: what a finer grid could gain (nats).

    Fields at an end of the grid or with a diverged neighbour are left out; None without a finite centre.
    """
    best = descent.best
    loss = loss_of(best) if best is not None else None
    if best is None or loss is None or not math.isfinite(loss):
        return None
    total = 0.0
    for field, values in grid.items():
        sides = [loss_of(point) if point is not None else None for point in _pair(best, field, values)]
        low, high = (math.inf if side is None else side for side in sides)
        slope, curvature = (high - low) / 2, high + low - 2 * loss
        if math.isfinite(curvature) and curvature > 0:
            total += slope**2 / (2 * curvature)
    return total


# --- what is minimised ---------------------------------------------------------------------------------------------------


def members_limit(curve: Mapping[int, float]) -> float:
    """Return E of the least-squares law E + A / K through losses by number of members (spec section 6, exponent 1).

    Raises ValueError for fewer than two K.
    """
    if len(curve) < 2:
        raise ValueError(f"the limit of {len(curve)} numbers of members is undefined; give losses for two or more.")
    inverse = [1 / k for k in curve]
    x, y = sum(inverse) / len(inverse), sum(curve.values()) / len(curve)
    spread = sum((value - x) ** 2 for value in inverse)
    slope = sum((value - x) * (loss - y) for value, loss in zip(inverse, curve.values(), strict=True)) / spread
    return y - slope * x
