"""Fit laws in more than one size, such as Chinchilla's `E + A/N**alpha + B/D**beta`.

Chinchilla: Hoffmann et al. 2022. A `Form` is linear in its coefficients at given shape constants,
`offset + basis @ coefficients`. Written for tens to hundreds of points.

Shapes: n points, c coefficients, s shape constants; `offset` (n,), `basis` (n, c).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import MIN_DOF, TAILS, Interval, checked
from epochal.scaling.solve import Array

Data = Mapping[str, Array]
STARTS = 7  # grid points per shape constant
REFINED = 3  # grid points that start a local search
HUBER_DELTA = 1e-3  # of log residuals, as in Chinchilla's third approach


@dataclass(frozen=True)
class Form:
    """A family of laws: names of its sizes, coefficients (>= 0) and shapes, and its `model`.

    A form with a limit has E as its first coefficient.
    """

    name: str
    sizes: tuple[str, ...]  # names, such as N and D
    coefficients: tuple[str, ...]  # names; all are at least 0
    shapes: Mapping[str, Interval]  # names to search ranges
    model: Callable[[Array, Data], tuple[Array, Array]]  # (shapes, data) -> (offset, basis)


@dataclass(frozen=True, eq=False)
class SurfaceLaw:
    """A fitted Form."""

    form: Form
    constants: dict[str, float]  # coefficients and shapes, by name
    residuals: Array = field(repr=False)  # (n,) in nats
    interval: dict[str, Interval] | None  # 90% profile interval of E, or None
    note: str
    dof: int  # degrees of freedom

    @property
    def E(self) -> float:  # noqa: N802 - named like the constant
        """The limit; nan for a form without a fitted E."""
        return self.constants.get("E", math.nan)

    def predict(self, **sizes: npt.ArrayLike) -> Array:
        """Evaluate the law at the named sizes (units of the fit; `math.inf` gives a limit)."""
        data = {name: np.atleast_1d(np.asarray(sizes[name], dtype=np.float64)) for name in self.form.sizes}
        coefficients, shapes = (
            np.array([self.constants[name] for name in names]) for names in (self.form.coefficients, self.form.shapes)
        )
        offset, basis = self.form.model(shapes, data)
        return np.asarray(offset + basis @ coefficients)


def power_sum(first: str, second: str) -> Form:
    """Give the form `E + A / first**alpha + B / second**beta`."""

    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        a, b = (np.exp(-shape * np.log(data[name])) for shape, name in zip(shapes, (first, second), strict=True))
        return np.zeros(len(a)), np.stack([np.ones(len(a)), a, b], axis=1)

    shapes = {"alpha": (0.02, 4.0), "beta": (0.02, 4.0)}
    return Form(f"E + A/{first}^alpha + B/{second}^beta", (first, second), ("E", "A", "B"), shapes, model)


CHINCHILLA = power_sum("N", "D")
JOINT = power_sum("N", "K")


def fit_surface(form: Form, loss: npt.ArrayLike, *, objective: str = "squares", **sizes: npt.ArrayLike) -> SurfaceLaw:
    """Fit a form to losses (n,) in nats per token.

    For example `fit_surface(CHINCHILLA, loss, N=N, D=D)`. Each size is (n,) and may be inf. `objective="squares"` gives
    a 90% interval of E by profile likelihood with Student quantiles; "huber" minimizes Huber's loss of log residuals
    (Chinchilla's third approach) and gives none. Raises ValueError for values that cannot be used.
    """
    y = checked("loss", loss)
    if set(sizes) != set(form.sizes):
        raise ValueError(f"sizes {sorted(sizes)} do not match the form {form.name}: give {sorted(form.sizes)}.")
    if objective not in ("squares", "huber"):
        raise ValueError(f"objective must be 'squares' or 'huber', got {objective!r}.")
    data = {name: _size(name, sizes[name], len(y)) for name in form.sizes}
    try:
        # Shapes are searched by their logarithm, since their ranges span decades.
        log_shapes = _search(form, data, y)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        ends = ", ".join(f"{name} from {np.min(values):g} to {np.max(values):g}" for name, values in data.items())
        raise ValueError(
            f"{form.name} could not be fitted ({error}); its values overflow at {ends}: give sizes in a larger unit."
        ) from None
    # The optimum of least squares is the first start.
    if objective == "huber":
        log_shapes, coefficients = _huber(form, data, y, log_shapes)
    else:
        coefficients = _linear(*form.model(np.exp(log_shapes), data), y)[0]
    offset, basis = form.model(np.exp(log_shapes), data)
    residuals = y - offset - basis @ coefficients
    values = [*coefficients.tolist(), *np.exp(log_shapes).tolist()]
    constants = dict(zip((*form.coefficients, *form.shapes), values, strict=True))
    dof, interval, note = len(y) - len(constants), None, ""
    if dof < MIN_DOF:
        note = f"Too few points for an interval: {len(y)} points for {len(constants)} constants."
    elif objective == "squares" and "E" in constants:
        interval = {"E": _profile_limit(form, data, y, log_shapes, constants["E"], dof)}
    return SurfaceLaw(form, constants, residuals, interval, note, max(dof, 0))


def _size(name: str, values: npt.ArrayLike, count: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"{name} has shape {array.shape} but there are {count} losses: give one size per loss.")
    if not np.all(array > 0):  # inf is allowed: a limit
        raise ValueError(f"{name} must be positive, got {array[~(array > 0)][0]}: leave that run out.")
    return array


def _linear(offset: Array, basis: Array, y: Array) -> tuple[Array, Array]:
    """Coefficients >= 0 by non-negative least squares, and the residuals."""
    from scipy.optimize import nnls

    rest = y - offset
    if basis.shape[1] == 0:
        return np.empty(0), rest
    # Columns differ by many orders of magnitude, and nnls stops at an absolute tolerance.
    scale = np.linalg.norm(basis, axis=0)
    scale[scale == 0] = 1.0
    coefficients = nnls(basis / scale, rest)[0] / scale
    return coefficients, rest - basis @ coefficients


def _bounds(form: Form) -> tuple[Array, Array]:
    """The logs of the ends of every shape's range."""
    ends = np.log(np.array(list(form.shapes.values()), dtype=np.float64).reshape(-1, 2))
    return ends[:, 0], ends[:, 1]


def _grid(form: Form) -> list[Array]:
    """Starts of a search: STARTS interior points of each range, evenly in the log, in all combinations."""
    axes = [np.linspace(a, b, STARTS + 2)[1:-1] for a, b in zip(*_bounds(form), strict=True)]
    return [np.array(point) for point in itertools.product(*axes)]


def _search(form: Form, data: Data, y: Array, starts: list[Array] | None = None, fixed_E: float | None = None) -> Array:
    """Minimize the sum of squares over the log shapes, with E fixed at `fixed_E`."""
    from scipy.optimize import least_squares

    low, high = _bounds(form)

    def residual(log_shapes: Array) -> Array:
        offset, basis = form.model(np.exp(log_shapes), data)
        if fixed_E is not None:
            # E is the first coefficient of a form with a limit.
            offset, basis = offset + fixed_E, basis[:, 1:]
        return _linear(offset, basis, y)[1]

    if starts is None:
        # Variable projection: coefficients come from non-negative least squares, so only the shapes need starts.
        starts = sorted(_grid(form), key=lambda point: float(np.sum(residual(point) ** 2)))[:REFINED]
    fits = [
        least_squares(residual, np.clip(s, low + 1e-9, high - 1e-9), bounds=(low, high), xtol=1e-12, ftol=1e-12)
        for s in starts
    ]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def _huber(form: Form, data: Data, y: Array, log_shapes: Array) -> tuple[Array, Array]:
    """Minimize Huber's loss of log residuals over the log shapes and coefficients."""
    from scipy.optimize import least_squares

    count = len(log_shapes)
    low, high = _bounds(form)

    def residual(theta: Array) -> Array:
        level, columns = form.model(np.exp(theta[:count]), data)
        return np.asarray(np.log(y / np.maximum(level + columns @ np.exp(theta[count:]), 1e-300)))

    def start(shapes: Array) -> Array:
        coefficients = _linear(*form.model(np.exp(shapes), data), y)[0]
        return np.append(shapes, np.log(np.maximum(coefficients, 1e-12)))

    def cost(theta: Array) -> float:
        size = np.abs(residual(theta))
        quadratic, tail = size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)
        return float(np.sum(np.where(size <= HUBER_DELTA, quadratic, tail)))

    # Huber's loss is flat far from the optimum and has more basins than least squares, so one start is not enough.
    starts = [start(np.clip(log_shapes, low + 1e-9, high - 1e-9)), *sorted(map(start, _grid(form)), key=cost)[:REFINED]]
    # Coefficients are searched by their logarithms, which keeps them positive.
    unbounded = np.full(len(form.coefficients), np.inf)
    ends = np.append(low, -unbounded), np.append(high, unbounded)
    fits = [
        least_squares(
            residual, s, bounds=ends, loss="huber", f_scale=HUBER_DELTA, x_scale="jac", xtol=1e-12, ftol=1e-12
        )
        for s in starts
    ]
    best = min((fit.x for fit in fits), key=cost)
    return best[:count], np.exp(best[count:])


def _profile_limit(form: Form, data: Data, y: Array, log_shapes: Array, E: float, dof: int) -> Interval:
    """Give the 90% profile interval of E."""
    # Fix E, refit the rest, and solve for where the sum of squares crosses the threshold on both sides.
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    least = float(np.sum(_linear(*form.model(np.exp(log_shapes), data), y)[1] ** 2))
    threshold = least * (1.0 + float(stdtrit(dof, TAILS[1])) ** 2 / dof)
    # Points exactly on the law: the region is rounding noise.
    if threshold <= 1e-24 * float(np.sum(y**2)):
        return E, E

    def excess(value: float) -> float:
        # Started at the optimum and next to it: a full grid of starts for each E would be slow.
        shapes = _search(form, data, y, [log_shapes, log_shapes - 0.5, log_shapes + 0.5], value)
        level, columns = form.model(np.exp(shapes), data)
        return float(np.sum(_linear(level + value, columns[:, 1:], y)[1] ** 2)) - threshold

    ends = []
    for sign in (-1.0, 1.0):
        # Bracket the crossing by doubling, then bisect.
        inner, step = E, 4.0 * math.sqrt(threshold / len(y))
        outer = max(E + sign * step, 0.0)
        while excess(outer) < 0 and outer > 0 and step < 1e3:
            inner, step = outer, 2 * step
            outer = max(E + sign * step, 0.0)
        if outer == 0.0 and excess(0.0) < 0:
            ends.append(0.0)
        else:
            ends.append(float(brentq(excess, inner, outer, xtol=1e-6)))
    return ends[0], ends[1]
