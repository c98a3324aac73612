"""Coordinate descent on a grid (spec section 5).

It is a pure function of the results so far. `CoordinateDescent` asks for points in rounds and moves its center to the
best known point after each. It ends when every neighbor of the center was run and none is better. Its mode decides the
size of a round:

`sequential` evaluates one neighbor at a time and submits the remaining neighbors together once only verification is
left (fewest runs). `parallel` always submits all neighbors (fewest rounds, for more workers than searches).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from epochal.scale import Point, Value

# The ascending values of each tuned field, in the order in which fields are searched.
Grid = Mapping[str, tuple[Value, ...]]

# The loss of a point: infinite if it diverged, None if it has not run.
LossOf = Callable[[Point], float | None]

# A field and a step along its grid, +1 or -1.
Direction = tuple[str, int]


class CoordinateDescent:
    """One search: run the points of `ask`, pass each result to `tell`, until `ask` returns nothing.

    `center` is the best point of the finished rounds, `open_fields` are the fields not yet optimized at any center, and
    `direction` is the last move. A new round depends on results only, not on their order, so interruptions and the
    number of workers do not change a search. Raises ValueError when `start` is not on the grid.
    """

    def __init__(self, start: Point, grid: Grid, mode: str) -> None:
        for field, values in grid.items():
            if start.get(field) not in values:
                raise ValueError(
                    f"start {field} {start.get(field)} is not on its grid {list(values)}; use a grid value."
                )
        self.grid, self.mode = grid, mode
        self.center = start
        self.open_fields = set(grid)
        self.direction: Direction | None = None
        self.losses: dict[Point, float] = {}
        # The first round includes a neighbor, which is needed whatever the loss of the start.
        untried = list(self._untried_neighbors().items())
        self._round: dict[Point, Direction] = {start: ("", 0), **dict(untried if mode == "parallel" else untried[:1])}
        self.asked: list[Point] = list(self._round)

    def ask(self) -> list[Point]:
        """Points of the current round that have no result; empty once the center is certified."""
        return [point for point in self._round if point not in self.losses]

    def tell(self, point: Point, loss: float) -> None:
        """Record the loss of a point of `ask`, infinite for a diverged run; the last one of a round starts the next."""
        self.losses[point] = loss
        if not self.ask():
            self._finish_round()

    @property
    def best(self) -> Point | None:
        """The best known point, also in an unfinished round; None before the first result. Ties keep the center."""
        return min(self.losses, key=self._rank, default=None)

    def _rank(self, point: Point) -> tuple[float, bool, Point]:
        # Ties keep the center, or the search could move back and forth; then the order of fields decides.
        return self.losses[point], point != self.center, point

    def _finish_round(self) -> None:
        leader = min(self._round, key=self._rank)
        # Noise does not matter for a move: points are compared at equal seeds, and `Certificate` reports the spread
        # between seeds afterwards. A threshold would make the runs of a campaign depend on how many seeds have finished.
        if self.losses[leader] < self.losses[self.center]:
            self.center, self.direction = leader, self._round[leader]
            # A move settles its field for now: the others are searched at the new center first.
            self.open_fields.discard(self.direction[0])
        untried = self._untried_neighbors()
        # A field without untried neighbors is settled too.
        self.open_fields &= {field for field, _ in untried.values()}
        self._round = self._next_round(untried)
        self.asked += self._round

    def _untried_neighbors(self) -> dict[Point, Direction]:
        return {
            point: (field, step)
            for field in self.grid
            for step in (1, -1)
            if (point := neighbor(self.center, field, step, self.grid)) is not None and point not in self.losses
        }

    def _next_round(self, untried: dict[Point, Direction]) -> dict[Point, Direction]:
        if self.mode == "parallel":
            return untried
        candidates = [point for point, (field, _) in untried.items() if field in self.open_fields]
        if candidates:
            # First a field whose other neighbor has run: its last neighbor settles the field.
            untried_sides = Counter(field for field, _ in untried.values())
            point = min(candidates, key=lambda point: untried_sides[untried[point][0]])
            return {point: untried[point]}
        # Then one more step in the direction of the last move. The remaining neighbors seldom move the center, and the
        # certificate needs all of them, so running them together costs no extra run.
        return {point: way for point, way in untried.items() if way == self.direction} or untried


@dataclass(frozen=True)
class Descent:
    """State of a search: the best known point, and the points asked for.

    `best` is None before the first result. `wanted` are the points without a result, `visited` all points so far.
    """

    best: Point | None
    wanted: tuple[Point, ...]
    visited: tuple[Point, ...]

    @property
    def certified(self) -> bool:
        """Whether every neighbor of `best` was run and is not better."""
        return self.best is not None and not self.wanted

    @property
    def tried(self) -> int:
        """Number of points with results: the cost of the search in runs of the first seed."""
        return len(self.visited) - len(self.wanted)


# A search that waits for the optimum of the next smaller size.
NOT_STARTED = Descent(None, (), ())


def descend(
    loss_of: LossOf, start: Point, grid: Grid, mode: str = "sequential", known: Iterable[Point] = ()
) -> Descent:
    """Replay a search as far as results are known.

    Fields that are not in `grid` stay at `start`. `known` are points that have a result from any recipe: where one
    on the grid is better than the certified point, the descent continues from there. Raises ValueError when `start` is not
    on the grid.
    """
    descent = _replay(loss_of, start, grid, mode)
    losses = {point: loss for point in known if on_grid(point, start, grid) and (loss := loss_of(point)) is not None}
    leader = min(losses, key=lambda point: (losses[point], point), default=start)
    # Coordinate descent sees one step in one field; a run made for another purpose may differ in two and be better.
    if descent.certified and descent.best is not None and losses.get(leader, math.inf) < _known(loss_of, descent.best):
        later = _replay(loss_of, leader, grid, mode)
        visited = tuple(dict.fromkeys((*descent.visited, *later.visited)))
        descent = Descent(later.best, later.wanted, visited)
    return descent


def _replay(loss_of: LossOf, start: Point, grid: Grid, mode: str) -> Descent:
    search = CoordinateDescent(start, grid, mode)
    while known := {point: loss for point in search.ask() if (loss := loss_of(point)) is not None}:
        for point, loss in known.items():
            search.tell(point, loss)
    return Descent(search.best, tuple(search.ask()), tuple(search.asked))


def _known(loss_of: LossOf, point: Point) -> float:
    loss = loss_of(point)
    return math.inf if loss is None else loss


def on_grid(point: Point, start: Point, grid: Grid) -> bool:
    """Whether a search from `start` can visit a point: on the grid, and equal to the start in every other field."""
    moved = point
    for field, values in grid.items():
        if point.get(field) not in values:
            return False
        moved = moved.at(field, start.get(field))
    return moved == start


def neighbor(point: Point, field: str, step: int, grid: Grid) -> Point | None:
    """The point one grid step up (+1) or down (-1) in one field; None past the end of the grid."""
    index = grid[field].index(point.get(field)) + step
    return point.at(field, grid[field][index]) if 0 <= index < len(grid[field]) else None


def neighbors(point: Point, grid: Grid) -> list[Point]:
    """The points one grid step down or up in one tuned field."""
    return [other for field in grid for step in (-1, 1) if (other := neighbor(point, field, step, grid)) is not None]


# --- certificate, and what further runs can gain ------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the loss between seeds, and its degrees of freedom."""

    sd: float
    freedom: int


def pooled_noise(groups: Iterable[Iterable[float]]) -> Noise | None:
    """Pool the variance within groups of runs that differ in seeds only; None if no group has two finite losses."""
    squares, freedom = 0.0, 0
    for group in groups:
        losses = [loss for loss in group if math.isfinite(loss)]
        mean = sum(losses) / len(losses) if losses else 0.0
        # Each group has its own mean, so settings of different losses can be pooled.
        squares += sum((loss - mean) ** 2 for loss in losses)
        freedom += max(0, len(losses) - 1)
    return Noise(math.sqrt(squares / freedom), freedom) if freedom else None


@dataclass(frozen=True)
class Certificate:
    """The evidence that `best` is a minimum of the grid."""

    best: Point
    missing: tuple[Point, ...]  # neighbors without a result
    margins: dict[Point, float]  # how much worse each other neighbor is (nats, equal seeds)
    noise: Noise | None  # spread between seeds; None before any point has two
    edges: tuple[str, ...]  # fields whose grid ends at `best`

    @property
    def ties(self) -> tuple[Point, ...]:
        """Neighbors within two standard deviations of the best point."""
        # The difference of two losses has the standard deviation sqrt(2) sd.
        limit = 2 * math.sqrt(2) * self.noise.sd if self.noise else 0.0
        return tuple(point for point, margin in self.margins.items() if margin < limit)

    def __str__(self) -> str:
        """One phrase for a table."""
        edge = f"; {', '.join(self.edges)} at the end of the grid" if self.edges else ""
        if self.missing:
            return f"not run yet: {', '.join(_difference(point, self.best) for point in self.missing)}"
        if self.noise is None:
            return f"all neighbors run, none better (noise unknown: one seed){edge}"
        within = f"{len(self.ties)} of {len(self.margins)} within noise" if self.ties else "none within noise"
        return f"all neighbors run, none better ({within}){edge}"


def certify(loss_of: LossOf, descent: Descent, grid: Grid, noise: Noise | None = None) -> Certificate | None:
    """Compare the best point with its neighbors; None before the first result."""
    best = descent.best
    loss = loss_of(best) if best is not None else None
    if best is None or loss is None:
        return None
    losses = {point: loss_of(point) for point in neighbors(best, grid)}
    missing = tuple(point for point, other in losses.items() if other is None)
    # `other > loss` avoids inf - inf where every point diverged.
    margins = {p: other - loss if other > loss else 0.0 for p, other in losses.items() if other is not None}
    edges = [
        field
        for field, values in grid.items()
        # A fixed field, with one value, has no edge.
        if len(values) > 1 and None in (neighbor(best, field, -1, grid), neighbor(best, field, 1, grid))
    ]
    return Certificate(best, missing, margins, noise, tuple(edges))


def _difference(point: Point, center: Point) -> str:
    """Name the fields in which a neighbor differs: "wd 3.2"."""
    fields = ("lr", "epochs", "wd", *dict(center.more))
    return ", ".join(f"{field} {point.get(field):g}" for field in fields if point.get(field) != center.get(field))


def possible_gain(loss_of: LossOf, descent: Descent, grid: Grid) -> float | None:
    """Bound what moving to a missing neighbor can gain (nats); None if there is no bound.

    The bound holds for a loss that is convex and separable in grid steps, which are equal in the logarithm: it falls on
    one side of the best point at most as fast as it rises on the other. A field without any known neighbor has no bound.
    """
    best = descent.best
    loss = loss_of(best) if best is not None else None
    if best is None or loss is None or not math.isfinite(loss):
        return None
    total = 0.0
    for field in grid:
        sides = [loss_of(point) for point in neighbors(best, {field: grid[field]})]
        known = [other for other in sides if other is not None]
        # A field with both neighbors known has nothing to gain: neither is better.
        if len(known) < len(sides):
            if not known or not math.isfinite(known[0]):
                return None
            total += max(0.0, known[0] - loss)
    return total


def between_points(loss_of: LossOf, descent: Descent, grid: Grid) -> float | None:
    """Return how much a finer grid could gain, by a quadratic fit (nats).

    The quadratic goes through the best point and its neighbors.

    Fields at an end of the grid or with a diverged neighbor count as 0; None without a finite best loss.
    """
    best = descent.best
    loss = loss_of(best) if best is not None else None
    if best is None or loss is None or not math.isfinite(loss):
        return None
    total = 0.0
    for field in grid:
        sides = [loss_of(point) for point in neighbors(best, {field: grid[field]})]
        low, high = (math.inf if side is None else side for side in sides) if len(sides) == 2 else (math.inf, math.inf)
        slope, curvature = (high - low) / 2, high + low - 2 * loss
        if math.isfinite(curvature) and curvature > 0:
            # The depth of the vertex below the center, for unit steps. Fields are taken as separable.
            total += slope**2 / (2 * curvature)
    return total


# --- objective of an ensemble -------------------------------------------------------------------------------------------


def members_limit(curve: Mapping[int, float]) -> float:
    """Return E of the law E + A / K through losses by K.

    A least-squares fit; K is the number of members (spec section 6). Raises ValueError for fewer than two K.
    """
    if len(curve) < 2:
        raise ValueError(f"The limit needs losses for two or more numbers of members, got {len(curve)}.")
    # E + A / K is a line in 1 / K, so a linear regression suffices; K -> inf is its value at 0.
    inverse = [1 / k for k in curve]
    x, y = sum(inverse) / len(inverse), sum(curve.values()) / len(curve)
    spread = sum((value - x) ** 2 for value in inverse)
    slope = sum((value - x) * (loss - y) for value, loss in zip(inverse, curve.values(), strict=True)) / spread
    return y - slope * x
