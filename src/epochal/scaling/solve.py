"""Least squares and profile intervals for `E + A / x**alpha`, many problems at once.

For a fixed exponent the law is linear in E and A, so only alpha is searched (variable projection): a grid finds the
basin, which makes every fit a multi-start fit, and ever finer grids polish it. Nothing here loops over data sets, so a
thousand bootstrap draws cost little more than one fit.

The same structure gives exact profile intervals. At a fixed exponent the laws with a sum of squares below a ceiling are
an ellipse in (E, A); the largest value of any linear quantity on it (the limit, the coefficient, a prediction) is known
in closed form, and the profile interval is the hull of these over the exponents that reach the ceiling at all.

Shapes: B problems, n points, G exponents tried; `log_x` (n,), `y` (B, n) or (n,), `weights` (B, n) or (n,). `u` is
`x ** -alpha`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

GRID = 72
POINTS = 17
ZOOMS = 10  # (2 / 16) ** 10 = 1e-9 of two cells: finer than the rounding of a sum of squares can show
HALVINGS = 40


@dataclass(frozen=True)
class Moments:
    """Weighted moments of u and y at one exponent per problem; A and E are the free optimum, bounds ignored."""

    total: Array
    u: Array
    y: Array
    spread: Array
    A: Array
    square_u: Array
    cross: Array
    square_y: Array
    rss: Array


def _sum(weights: Array, a: Array) -> Array:
    total: Array = np.sum(weights * a, axis=-1)
    return total


def _ratio(a: Array, b: Array) -> Array:
    """Divide, giving zero where b is zero."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)


def moments(u: Array, y: Array, weights: Array) -> Moments:
    """Everything that a linear fit of y on u needs; differences are taken before squares, so nothing cancels."""
    total = np.sum(weights, axis=-1)
    mean_u, mean_y = _sum(weights, u) / total, _sum(weights, y) / total
    du, dy = u - mean_u[..., None], y - mean_y[..., None]
    spread = _sum(weights, du * du)
    A = _ratio(_sum(weights, du * dy), spread)
    rest = dy - A[..., None] * du
    return Moments(
        total=total,
        u=mean_u,
        y=mean_y,
        spread=spread,
        A=A,
        square_u=_sum(weights, u * u),
        cross=_sum(weights, u * y),
        square_y=_sum(weights, y * y),
        rss=_sum(weights, rest * rest),
    )


def linear(u: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Best E >= 0 and A >= 0 of `E + A u`, and the weighted sum of squares, in closed form."""
    free = moments(u, y, weights)
    A = np.maximum(free.A, 0.0)
    E = free.y - A * free.u
    # Losses and u are positive, so only one bound can be active at a time.
    A, E = np.where(E < 0, _ratio(free.cross, free.square_u), A), np.maximum(E, 0.0)
    residual = y - E[..., None] - A[..., None] * u
    return E, A, _sum(weights, residual * residual)


def search(objective: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Find the alpha in [low, high] that minimises `objective(alphas (G, B)) -> (G, B)`, for B problems at once.

    A wide geometric grid finds the basin, then ever finer grids between the neighbours of the best point polish it. The
    ends of every grid are candidates, so a minimum on a bound is met exactly.
    """
    column = np.arange(len(low))
    grid = low * (high / low) ** np.linspace(0.0, 1.0, GRID)[:, None]
    for _ in range(ZOOMS):
        best = np.argmin(objective(grid), axis=0)
        low, high = grid[np.maximum(best - 1, 0), column], grid[np.minimum(best + 1, len(grid) - 1), column]
        grid = low + (high - low) * np.linspace(0.0, 1.0, POINTS)[:, None]
    found: Array = grid[np.argmin(objective(grid), axis=0), column]
    return found


def solve(
    log_x: Array, y: Array, weights: Array, *, alpha: float | None, bounds: tuple[float, float]
) -> tuple[Array, Array, Array, Array]:
    """E, A, alpha and the sum of squares of the best law for every row of `y` (B, n)."""

    def objective(a: Array) -> Array:
        return linear(np.exp(-a[..., None] * log_x), y, weights)[2]

    count = len(y)
    exponents = np.full(count, alpha) if alpha is not None else search(objective, *_full(bounds, count))
    E, A, rss = linear(np.exp(-exponents[:, None] * log_x), y, weights)
    return E, A, exponents, rss


def _full(bounds: tuple[float, float], count: int) -> tuple[Array, Array]:
    return np.full(count, bounds[0]), np.full(count, bounds[1])


def alpha_range(
    log_x: Array, y: Array, weights: Array, best: float, ceiling: Array, bounds: tuple[float, float]
) -> tuple[Array, Array]:
    """Find the outermost exponents whose best law stays below each ceiling (L,), cut at the bounds."""

    def rss(a: Array) -> Array:
        return linear(np.exp(-a[..., None] * log_x), y, weights)[2]

    grid = np.unique(np.append(np.geomspace(*bounds, 4 * GRID), best))
    inside = rss(grid) <= ceiling[:, None]
    inside[:, np.searchsorted(grid, best)] = True  # rounding must not exclude the optimum itself
    # Both ends are halved in one go: the arrays are small, so that the number of calls is the cost.
    first, last = np.argmax(inside, axis=1), len(grid) - 1 - np.argmax(inside[:, ::-1], axis=1)
    good = np.concatenate([grid[first], grid[last]])
    bad = np.concatenate([grid[np.maximum(first - 1, 0)], grid[np.minimum(last + 1, len(grid) - 1)]])
    ceilings = np.concatenate([ceiling, ceiling])
    for _ in range(HALVINGS):
        middle = (good + bad) / 2
        below = rss(middle) <= ceilings
        good, bad = np.where(below, middle, good), np.where(below, bad, middle)
    return good[: len(ceiling)], good[len(ceiling) :]


def _extreme(free: Moments, ceiling: Array, of_level: Array, of_A: Array, sign: Array) -> Array:
    """Push `of_level * E + of_A * A` up (sign 1) or down (-1) over E, A >= 0 with a sum of squares <= ceiling.

    -inf times sign where no law is below the ceiling. Candidates: the tangent point of the ellipse if it is inside the
    quadrant, and the two points where the ellipse cuts each edge of it.
    """
    room = ceiling - free.rss
    room = np.where(room > -1e-9 * ceiling, np.maximum(room, 0.0), room)  # the optimum must not fail by rounding
    # In (mean level, A) the ellipse has no tilt: a change of A leaves the level at the mean of u where it is.
    slope = of_A - of_level * free.u
    with np.errstate(over="ignore"):  # at exponents so extreme that the square is inf, the tangent point is the centre
        variance = of_level**2 / free.total + _ratio(slope**2, free.spread)
    radius = sign * np.sqrt(np.maximum(room, 0.0)) * _ratio(np.ones_like(room), np.sqrt(variance))
    A = free.A + radius * _ratio(slope, free.spread)
    E = free.y + radius * of_level / free.total - A * free.u
    inside = (room >= 0) & (E >= 0) & (A >= 0)
    values = [np.where(inside, of_level * E + of_A * A, -np.inf * sign)]
    edges = (
        (free.y, free.total, free.square_y - free.total * free.y**2, of_level),
        (_ratio(free.cross, free.square_u), free.square_u, free.square_y - free.cross**2 / free.square_u, of_A),
    )
    for centre, curvature, lowest, factor in edges:
        half = np.sqrt(np.maximum(ceiling - lowest, 0.0) / curvature)
        for end in (centre - half, centre + half):
            values.append(np.where((ceiling >= lowest) & (end >= 0), factor * end, -np.inf * sign))
    stacked: Array = np.max(np.stack(values) * sign, axis=0) * sign
    return stacked


def profile(
    log_x: Array,
    y: Array,
    weights: Array,
    best: float,
    *,
    ceiling: Array,
    log_target: Array,
    sign: Array,
    alpha: float | None,
    bounds: tuple[float, float],
    coefficient: bool = False,
) -> Array:
    """Find ends of profile intervals: of the prediction at `exp(log_target)` (inf: the limit E), or of A.

    One problem per entry of `ceiling`, `log_target` and `sign` (all (L,)); `y` (n,), `weights` (n,). With
    `coefficient`, `log_target` is minus the log of the scale of x, so that A comes out in the caller's units.
    """

    def end(a: Array) -> Array:
        free = moments(np.exp(-a[..., None] * log_x), y, weights)
        u = np.exp(-a * log_target)
        level = np.zeros_like(u) if coefficient else np.ones_like(u)
        return _extreme(free, ceiling, level, u, sign)

    if alpha is not None:
        return end(np.full(len(ceiling), alpha))
    # Targets mostly share a ceiling, and the range of exponents depends on nothing else.
    ceilings, which = np.unique(ceiling, return_inverse=True)
    low, high = (side[which] for side in alpha_range(log_x, y, weights, best, ceilings, bounds))
    ends: Array = end(search(lambda a: -sign * end(a), low, high))
    return ends
