"""Coordinate descent on a grid, as a pure function of the results so far.

A round asks for the centre and all its one-step neighbours; only when every one of them is known does the centre move to
the best. So the points that get asked for do not depend on which finished first, on interruptions or on the number of
workers. The search ends with a certificate: every neighbour was run and none is better (spec section 5).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FIELDS = ("lr", "epochs", "wd")


@dataclass(frozen=True, order=True)
class Point:
    """One setting of what is tuned."""

    lr: float
    epochs: int
    wd: float


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


def descend(loss_of: Callable[[Point], float | None], start: Point, grid: Mapping[str, tuple[float, ...]]) -> Descent:
    """Follow the descent as far as results are known.

    `loss_of` returns the loss of a point (inf for a diverged one) or None. `grid` names the values of each field that
    is tuned, in order; other fields stay at `start`. Raises ValueError when `start` is not on the grid.
    """
    for field, values in grid.items():
        if getattr(start, field) not in values:
            raise ValueError(
                f"start {field} {getattr(start, field)} is not on its grid {list(values)}; use a grid value."
            )
    centre, visited = start, dict.fromkeys((start,))
    while True:
        star = (centre, *neighbours(centre, grid))
        visited.update(dict.fromkeys(star))
        losses = {point: loss_of(point) for point in star}
        wanted = tuple(point for point, loss in losses.items() if loss is None)
        known = {point: loss for point in visited if (loss := loss_of(point)) is not None}
        best = min(known, key=lambda point: (known[point], point)) if known else None
        if wanted:
            return Descent(best, wanted, tuple(visited), ())
        leader = min(star, key=lambda point: (losses[point], point != centre, point))
        if leader == centre or not math.isfinite(known[leader]):
            return Descent(centre, (), tuple(visited), _edges(centre, grid))
        centre = leader


def neighbours(point: Point, grid: Mapping[str, tuple[float, ...]]) -> list[Point]:
    """Return the one-step neighbours of a point: one grid step up and down in each tuned field."""
    found = []
    for field, values in grid.items():
        index = values.index(getattr(point, field))
        for other in (index - 1, index + 1):
            if 0 <= other < len(values):
                changes = {name: getattr(point, name) for name in FIELDS} | {field: values[other]}
                found.append(Point(lr=changes["lr"], epochs=int(changes["epochs"]), wd=changes["wd"]))
    return found


def _edges(point: Point, grid: Mapping[str, tuple[float, ...]]) -> tuple[str, ...]:
    """Fields at an end of a grid of several values: the optimum may lie beyond."""
    return tuple(
        field for field, values in grid.items() if len(values) > 1 and getattr(point, field) in (values[0], values[-1])
    )


def decay_for_window(tau: float, *, lr: float, steps_per_epoch: int, grid: tuple[float, ...]) -> float:
    """Return the grid's weight decay whose averaging window 1 / (lr wd steps_per_epoch) is nearest to tau epochs."""
    ideal = 1.0 / (tau * lr * steps_per_epoch)
    return min(grid, key=lambda wd: abs(math.log(wd / ideal)) if wd > 0 else math.inf)
