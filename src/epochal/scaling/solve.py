"""Least squares and profile intervals for `E + A / x**alpha`, vectorized over problems.

At a fixed exponent the law is linear in E and A, so only alpha is searched (variable projection): a wide grid makes every
fit a multi-start fit, and finer grids refine it. Nothing loops over data sets.

Profile intervals use the same structure. At a fixed exponent the laws with a sum of squares below a ceiling form an
ellipse in (E, A). The extremes of any linear quantity on it (the limit, the coefficient, a prediction) have a closed
form, and the interval is their hull over all exponents that reach the ceiling.

Shapes: B problems, n points, G exponents; `log_x` (n,), `y` (B, n) or (n,), `weights` (B, n) or (n,). `u` is `x**-alpha`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ALPHA_BOUNDS = (0.01, 10.0)
GRID = 72
POINTS = 17
ZOOMS = 10  # (2 / 16)**10 = 1e-9 of two cells: below the rounding of a sum of squares
HALVINGS = 40


def _sum(weights: Array, a: Array) -> Array:
    total: Array = np.sum(weights * a, axis=-1)
    return total


def _ratio(a: Array, b: Array) -> Array:
    """Quotient, zero where b is zero."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)


class Moments:
    """Weighted moments of u and y at one exponent per problem.

    A is the optimum without bounds and rss its sum of squares.
    """

    def __init__(self, u: Array, y: Array, weights: Array) -> None:
        self.total = np.sum(weights, axis=-1)
        self.u, self.y = _sum(weights, u) / self.total, _sum(weights, y) / self.total
        self.square_u, self.square_y = _sum(weights, u * u), _sum(weights, y * y)
        self.cross = _sum(weights, u * y)
        # Differences before squares, so that nothing cancels.
        du, dy = u - self.u[..., None], y - self.y[..., None]
        self.spread = _sum(weights, du * du)
        self.A = _ratio(_sum(weights, du * dy), self.spread)
        rest = dy - self.A[..., None] * du
        self.rss = _sum(weights, rest * rest)


def linear(alphas: Array, log_x: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Give the best E, A >= 0 and their sum of squares at each exponent."""
    # Closed form: weighted linear regression of y on u, with the bounds applied afterwards.
    u = np.exp(-alphas[..., None] * log_x)
    free = Moments(u, y, weights)
    A = np.maximum(free.A, 0.0)
    E = free.y - A * free.u
    # Losses and u are positive, so only one bound can be active at a time.
    A, E = np.where(E < 0, _ratio(free.cross, free.square_u), A), np.maximum(E, 0.0)
    residual = y - E[..., None] - A[..., None] * u
    return E, A, _sum(weights, residual * residual)


def search(objective: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Minimize `objective(alphas (G, B)) -> (G, B)` over alpha in [low, high], (B,) each."""
    column = np.arange(len(low))
    # Even in the logarithm: exponents span three decades.
    grid = low * (high / low) ** np.linspace(0.0, 1.0, GRID)[:, None]
    for _ in range(ZOOMS):
        best = np.argmin(objective(grid), axis=0)
        # The ends of each grid are candidates, so a minimum on a bound is found exactly.
        low, high = grid[np.maximum(best - 1, 0), column], grid[np.minimum(best + 1, len(grid) - 1), column]
        grid = low + (high - low) * np.linspace(0.0, 1.0, POINTS)[:, None]
    minimum: Array = grid[np.argmin(objective(grid), axis=0), column]
    return minimum


def solve(log_x: Array, y: Array, weights: Array, *, alpha: float | None) -> tuple[Array, Array, Array, Array]:
    """Give E, A, alpha and sum of squares per row of `y` (B, n)."""
    if alpha is not None:
        alphas = np.full(len(y), alpha)
    else:
        low, high = (np.full(len(y), bound) for bound in ALPHA_BOUNDS)
        alphas = search(lambda a: linear(a, log_x, y, weights)[2], low, high)
    E, A, rss = linear(alphas, log_x, y, weights)
    return E, A, alphas, rss


def alpha_range(log_x: Array, y: Array, weights: Array, best: float, ceiling: Array) -> tuple[Array, Array]:
    """Give the lowest and highest exponents with a sum of squares below each ceiling (L,)."""
    # The grid spans ALPHA_BOUNDS: an interval that reaches a bound ends there.
    grid = np.unique(np.append(np.geomspace(*ALPHA_BOUNDS, 4 * GRID), best))
    inside = linear(grid, log_x, y, weights)[2] <= ceiling[:, None]
    inside[:, np.searchsorted(grid, best)] = True  # rounding must not exclude the optimum itself
    first, last = np.argmax(inside, axis=1), len(grid) - 1 - np.argmax(inside[:, ::-1], axis=1)
    # Bisect both ends together: the arrays are small, so the number of calls is the cost.
    good = np.concatenate([grid[first], grid[last]])
    bad = np.concatenate([grid[np.maximum(first - 1, 0)], grid[np.minimum(last + 1, len(grid) - 1)]])
    ceilings = np.concatenate([ceiling, ceiling])
    for _ in range(HALVINGS):
        middle = (good + bad) / 2
        below = linear(middle, log_x, y, weights)[2] <= ceilings
        good, bad = np.where(below, middle, good), np.where(below, bad, middle)
    return good[: len(ceiling)], good[len(ceiling) :]


def _extreme(free: Moments, ceiling: Array, of_level: Array, of_A: Array, sign: Array) -> Array:
    """Give the extreme of `of_level * E + of_A * A` below a ceiling.

    It is taken over E, A >= 0 with a sum of squares <= ceiling. The maximum for sign 1, the minimum for sign -1. Gives
    -inf times sign where no law is below the ceiling.
    """
    room = ceiling - free.rss
    room = np.where(room > -1e-9 * ceiling, np.maximum(room, 0.0), room)  # rounding must not exclude the optimum

    # First candidate: the tangent point, if it is inside the quadrant. In (mean level, A) the ellipse has no tilt.
    slope = of_A - of_level * free.u
    with np.errstate(over="ignore"):  # at extreme exponents the square is inf and the tangent point is the center
        variance = of_level**2 / free.total + _ratio(slope**2, free.spread)
    radius = sign * np.sqrt(np.maximum(room, 0.0)) * _ratio(np.ones_like(room), np.sqrt(variance))
    A = free.A + radius * _ratio(slope, free.spread)
    E = free.y + radius * of_level / free.total - A * free.u
    inside = (room >= 0) & (E >= 0) & (A >= 0)
    values = [np.where(inside, of_level * E + of_A * A, -np.inf * sign)]

    # Other candidates: the two points where the ellipse cuts each edge, A = 0 and then E = 0.
    edges = (
        (free.y, free.total, free.square_y - free.total * free.y**2, of_level),
        (_ratio(free.cross, free.square_u), free.square_u, free.square_y - free.cross**2 / free.square_u, of_A),
    )
    for center, curvature, lowest, factor in edges:
        half = np.sqrt(np.maximum(ceiling - lowest, 0.0) / curvature)
        for end in (center - half, center + half):
            values.append(np.where((ceiling >= lowest) & (end >= 0), factor * end, -np.inf * sign))
    # The multiplication by the sign turns the minimum into a maximum, and back.
    extreme: Array = np.max(np.stack(values) * sign, axis=0) * sign
    return extreme


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
    coefficient: bool,
) -> Array:
    """Give ends of profile intervals of a prediction, of the limit E, or of A.

    The prediction is at `exp(log_target)`; at inf it is E.

    One problem per entry of `ceiling`, `log_target` and `sign`, all (L,); `y` and `weights` are (n,). `best` is the
    fitted exponent. With `coefficient`, `log_target` is where A is the whole excess: log_x of x = 1.
    """

    def end(a: Array) -> Array:
        free = Moments(np.exp(-a[..., None] * log_x), y, weights)
        u = np.exp(-a * log_target)
        level = np.zeros_like(u) if coefficient else np.ones_like(u)
        return _extreme(free, ceiling, level, u, sign)

    if alpha is not None:
        return end(np.full(len(ceiling), alpha))
    # Targets mostly share a ceiling, and the range of exponents depends on nothing else.
    ceilings, which = np.unique(ceiling, return_inverse=True)
    low, high = (side[which] for side in alpha_range(log_x, y, weights, best, ceilings))
    ends: Array = end(search(lambda a: -sign * end(a), low, high))
    return ends
