"""Laws in more than one size: additive (N, D) or (N, K) forms, repetition, and any penalty added to them.

Every form here is linear in most of its constants, so it is written as `offset + basis @ coefficients` at given shape
constants; the coefficients (>= 0) come from non-negative least squares and only the shapes are searched, from a grid of
starts. Written for tens to hundreds of points.

Sources: Chinchilla `E + A/N**alpha + B/D**beta` (Hoffmann et al. 2022). Repetition (Muennighoff et al. 2023): repeated
tokens and excess parameters decay in value with the half-life-like scales R_D and R_N. Over-fitting (Lovelace et al.
2026, arXiv 2605.01640): repetition adds a penalty that grows with passes and with parameters per unique token; the
formula is that of L. Weng's survey "Scaling Laws, Carefully" (June 2026). Coupled (Kaplan et al. 2020, arXiv 2001.08361,
equation 1.5): N and D under one power instead of a sum, so that more of one is worth less where the other is short.

SoftQ (arXiv 2606.06888) couples N and D too, by five constants of its own. Its formula could not be read when this was
written: there is no SoftQ here, and `COUPLED` is the older law and must not be cited as it.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import FEWEST_FREE, LEVEL, Interval, checked
from epochal.scaling.solve import Array

Data = Mapping[str, Array]
STARTS = 7  # per shape constant
POLISHED = 3  # starts that are polished


@dataclass(frozen=True)
class Form:
    """A family of laws: named sizes, named coefficients (linear, >= 0) and named shapes with their search ranges."""

    name: str
    sizes: tuple[str, ...]
    coefficients: tuple[str, ...]
    shapes: Mapping[str, Interval]
    model: Callable[[Array, Data], tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class SurfaceLaw:
    """A fitted Form: `constants` by name, residuals in nats, the 90% profile interval of E where there can be one.

    `covariance` is that of the coefficients and the logs of the shapes, in the order of `constants` (delta method; a
    coefficient on its bound 0 does not vary), with `dof` degrees of freedom; nan below two of them.
    """

    form: Form
    constants: dict[str, float]
    residuals: Array = field(repr=False)
    interval: dict[str, Interval] | None
    note: str
    dof: int
    covariance: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False)

    @property
    def E(self) -> float:  # noqa: N802 - the field's own letter
        """Give the limit; nan for a form without a fitted E."""
        return self.constants.get("E", math.nan)

    def predict(self, **sizes: npt.ArrayLike) -> Array:
        """Evaluate the law at the named sizes (units of the fit; `math.inf` gives a limit)."""
        return _values(self.form, self._theta, self._data(sizes))

    def gradient(self, **sizes: npt.ArrayLike) -> Array:
        """Derivatives of `predict` by what `covariance` speaks of: (points, constants)."""
        return _jacobian(self.form, self._theta, self._data(sizes))

    def reach(self, gradient: Array) -> Array:
        """Half the width of the 90% interval of a combination of predictions, from its gradient (points, constants)."""
        from scipy.special import stdtrit

        variance = np.einsum("ij,jk,ik->i", gradient, self.covariance, gradient)
        return np.asarray(float(stdtrit(max(self.dof, 1), (1 + LEVEL) / 2)) * np.sqrt(np.maximum(variance, 0.0)))

    def predict_interval(self, **sizes: npt.ArrayLike) -> tuple[Array, Array]:
        """Give the two ends of the pointwise 90% band (delta method), nan where the points are too few."""
        centre, half = self.predict(**sizes), self.reach(self.gradient(**sizes))
        return centre - half, centre + half

    @property
    def _theta(self) -> Array:
        shapes = [math.log(self.constants[name]) for name in self.form.shapes]
        return np.array([*(self.constants[name] for name in self.form.coefficients), *shapes])

    def _data(self, sizes: Mapping[str, npt.ArrayLike]) -> Data:
        return {name: np.atleast_1d(np.asarray(sizes[name], dtype=np.float64)) for name in self.form.sizes}


def _values(form: Form, theta: Array, data: Data) -> Array:
    count = len(form.coefficients)
    offset, basis = form.model(np.exp(theta[count:]), data)
    return np.asarray(offset + basis @ theta[:count])


def _jacobian(form: Form, theta: Array, data: Data) -> Array:
    """Central differences; the law is smooth, and linear in all but the shapes."""
    steps = 1e-5 * np.maximum(np.abs(theta), 1e-3)
    columns = [
        (_values(form, theta + step, data) - _values(form, theta - step, data)) / (2 * size)
        for size, step in zip(steps, np.diag(steps), strict=True)
    ]
    return np.stack(columns, axis=1)


def _covariance(form: Form, theta: Array, data: Data, root: Array, residuals: Array, dof: int) -> Array:
    count = len(theta)
    if dof < FEWEST_FREE:
        return np.full((count, count), np.nan)
    free = np.ones(count, dtype=bool)
    free[: len(form.coefficients)] = theta[: len(form.coefficients)] > 0
    weighted = _jacobian(form, theta, data)[:, free] * root[:, None]
    # Columns of unlike size (E beside a coefficient of 1e3) must not decide what counts as no information.
    scale = np.linalg.norm(weighted, axis=0)
    scale[scale == 0] = 1.0
    inverse = np.linalg.pinv((weighted / scale).T @ (weighted / scale), hermitian=True) / np.outer(scale, scale)
    found = np.zeros((count, count))
    found[np.ix_(free, free)] = inverse * float(np.sum((root * residuals) ** 2)) / dof
    return found


def power_sum(first: str, second: str) -> Form:
    """Give the form `E + A / first**alpha + B / second**beta`."""

    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        a, b = (np.exp(-shape * np.log(data[name])) for shape, name in zip(shapes, (first, second), strict=True))
        return np.zeros(len(a)), np.stack([np.ones(len(a)), a, b], axis=1)

    shapes = {"alpha": (0.02, 4.0), "beta": (0.02, 4.0)}
    return Form(f"E + A/{first}^alpha + B/{second}^beta", (first, second), ("E", "A", "B"), shapes, model)


CHINCHILLA = power_sum("N", "D")
JOINT = power_sum("N", "K")


def _coupled() -> Form:
    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        alpha, beta, ratio = shapes
        inner = np.exp(-alpha / beta * np.log(data["N"])) + ratio / data["D"]
        return np.zeros(len(inner)), np.stack([np.ones(len(inner)), inner**beta], axis=1)

    shapes = {"alpha": (0.02, 4.0), "beta": (0.02, 4.0), "ratio": (1e-4, 1e4)}
    return Form("E + A*(N^(-alpha/beta) + ratio/D)^beta", ("N", "D"), ("E", "A"), shapes, model)


COUPLED = _coupled()
"""Kaplan's form with a limit: `E + A (N**(-alpha/beta) + ratio / D)**beta`, five constants as Chinchilla's.

With D endless it is `E + A / N**alpha`, with N endless `E + A ratio**beta / D**beta`. `ratio` is searched from 1e-4 to 1e4:
give N and D in units in which they are of like size.
"""


def with_penalty(
    base: Form,
    penalty: Callable[[Array, Data], Array],
    *,
    sizes: tuple[str, ...] = (),
    shapes: Mapping[str, Interval] | None = None,
) -> Form:
    """Add `P * penalty(shapes, data)`, P >= 0, to a form; `sizes` and `shapes` are what the penalty needs beyond it."""
    own = shapes or {}
    count = len(base.shapes)

    def model(values: Array, data: Data) -> tuple[Array, Array]:
        offset, basis = base.model(values[:count], data)
        return offset, np.column_stack([basis, penalty(values[count:], data)])

    names = (*base.sizes, *(size for size in sizes if size not in base.sizes))
    return Form(f"{base.name} + P*penalty", names, (*base.coefficients, "P"), {**base.shapes, **own}, model)


def overfitting(base: Form = CHINCHILLA, *, delta: float | None = None, kappa: float | None = None) -> Form:
    """Give the additive over-fitting form: `base + P R**delta (N / U)**kappa` with R = D / U - 1 repetitions.

    D tokens seen, U unique tokens, N parameters. delta and kappa are fitted unless they are given; with both given one
    coefficient, P, says how much a recipe over-fits, so that recipes can be compared by it.
    """
    held = {name: value for name, value in (("delta", delta), ("kappa", kappa)) if value is not None}
    free = {name: (0.1, 4.0) for name in ("delta", "kappa") if name not in held}

    def penalty(shapes: Array, data: Data) -> Array:
        power = held | dict(zip(free, shapes, strict=True))
        repeated = np.maximum(data["D"] / data["U"] - 1.0, 0.0)
        return np.asarray(repeated ** power["delta"] * (data["N"] / data["U"]) ** power["kappa"])

    form = with_penalty(base, penalty, sizes=("U",), shapes=free)
    return replace(form, name=f"{base.name} + P*R^delta*(N/U)^kappa")


def repetition(E: float, A: float, B: float, alpha: float, beta: float) -> Form:
    """Give Muennighoff's form over N parameters, D tokens seen and U unique tokens, on a given Chinchilla law.

    D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), and the same for N with U_N, the parameters that are compute-optimal for
    U tokens under the law (or N where that is smaller). R_D and R_N are fitted; the publication has 15.39 and 5.31.
    """

    def effective(unique: Array, total: Array, scale: float) -> Array:
        excess = np.maximum(total / unique - 1.0, 0.0)
        return np.asarray(unique * (1.0 + scale * -np.expm1(-excess / scale)))

    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        unique = np.minimum(data["U"], data["D"])
        optimal = (alpha * A * unique**beta / (beta * B)) ** (1.0 / alpha)
        tokens = effective(unique, data["D"], float(shapes[0]))
        parameters = effective(np.minimum(optimal, data["N"]), data["N"], float(shapes[1]))
        loss = E + A * parameters**-alpha + B * tokens**-beta
        return loss, np.empty((len(loss), 0))

    return Form("repetition", ("N", "D", "U"), (), {"R_D": (0.1, 1000.0), "R_N": (0.1, 1000.0)}, model)


def _linear(offset: Array, basis: Array, y: Array, root: Array) -> tuple[Array, Array]:
    """Coefficients >= 0 by non-negative least squares, and the weighted residuals."""
    from scipy.optimize import nnls

    rest, weighted = (y - offset) * root, basis * root[:, None]
    if basis.shape[1] == 0:
        return np.empty(0), rest
    scale = np.linalg.norm(weighted, axis=0)
    scale[scale == 0] = 1.0
    coefficients = nnls(weighted / scale, rest)[0] / scale
    return coefficients, rest - weighted @ coefficients


def _bounds(form: Form) -> tuple[Array, Array]:
    """Give the logs of the ends of every shape's range."""
    ends = np.log(np.array(list(form.shapes.values()), dtype=np.float64).reshape(-1, 2))
    return ends[:, 0], ends[:, 1]


def _grid(form: Form) -> list[Array]:
    """Give the starts of a search: STARTS interior points of each range, evenly in the log, in all combinations."""
    axes = [np.linspace(a, b, STARTS + 2)[1:-1] for a, b in zip(*_bounds(form), strict=True)]
    return [np.array(point) for point in itertools.product(*axes)]


def _search(form: Form, data: Data, y: Array, root: Array, starts: list[Array] | None, fixed_E: float | None) -> Array:
    """Find the shapes of the least weighted sum of squares, with E held where `fixed_E` is given."""
    from scipy.optimize import least_squares

    low, high = _bounds(form)

    def residual(log_shapes: Array) -> Array:
        offset, basis = form.model(np.exp(log_shapes), data)
        if fixed_E is not None:
            offset, basis = offset + fixed_E, basis[:, 1:]
        return _linear(offset, basis, y, root)[1]

    if starts is None:
        starts = sorted(_grid(form), key=lambda point: float(np.sum(residual(point) ** 2)))[:POLISHED]
    fits = [
        least_squares(residual, np.clip(s, low + 1e-9, high - 1e-9), bounds=(low, high), xtol=1e-12, ftol=1e-12)
        for s in starts
    ]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def _huber(form: Form, data: Data, y: Array, root: Array, log_shapes: Array, delta: float) -> tuple[Array, Array]:
    """Polish all constants under Huber's loss of log residuals, from least squares and from the best of the grid.

    Huber's loss is flat far away and has more basins than least squares: one start finds one of them.
    """
    from scipy.optimize import least_squares

    count = len(log_shapes)
    low, high = _bounds(form)

    def residual(theta: Array) -> Array:
        level, columns = form.model(np.exp(theta[:count]), data)
        return np.asarray(root * np.log(y / np.maximum(level + columns @ np.exp(theta[count:]), 1e-300)))

    def start(shapes: Array) -> Array:
        offset, basis = form.model(np.exp(shapes), data)
        return np.append(shapes, np.log(np.maximum(_linear(offset, basis, y, root)[0], 1e-12)))

    def cost(theta: Array) -> float:
        off = np.abs(residual(theta))
        return float(np.sum(np.where(off <= delta, off**2 / 2, delta * (off - delta / 2))))

    free = np.full(len(form.coefficients), np.inf)
    ends = np.append(low, -free), np.append(high, free)
    starts = [
        start(np.clip(log_shapes, low + 1e-9, high - 1e-9)),
        *sorted(map(start, _grid(form)), key=cost)[:POLISHED],
    ]
    polished = [
        least_squares(residual, s, bounds=ends, loss="huber", f_scale=delta, x_scale="jac", xtol=1e-12, ftol=1e-12).x
        for s in starts
    ]
    found = min(polished, key=cost)
    return found[:count], np.exp(found[count:])


def fit_surface(
    form: Form,
    loss: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    objective: str = "squares",
    delta: float = 1e-3,
    **sizes: npt.ArrayLike,
) -> SurfaceLaw:
    """Fit a form to losses (nats per token) at the named sizes, for example `fit_surface(CHINCHILLA, y, N=n, D=d)`.

    `objective="huber"` minimises Huber's loss (threshold `delta`) of log residuals, and then gives no interval. The 90%
    interval of E is by profile likelihood with Student quantiles. Raises ValueError on values that cannot be used.
    """
    y = checked("loss", loss)
    if set(sizes) != set(form.sizes):
        raise ValueError(f"sizes {sorted(sizes)} do not match the form {form.name}: give {sorted(form.sizes)}.")
    if objective not in ("squares", "huber"):
        raise ValueError(f"objective = {objective!r} is not one of this fit: use 'squares' or 'huber'.")
    data = {name: _size(name, sizes[name], len(y)) for name in form.sizes}
    root = np.ones(len(y)) if weights is None else np.sqrt(checked("weights", weights))
    if len(root) != len(y):
        raise ValueError(f"weights has {len(root)} values but loss has {len(y)}: give one per point.")
    parameters = len(form.coefficients) + len(form.shapes)
    try:
        log_shapes = _search(form, data, y, root, None, None)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        ends = ", ".join(f"{name} from {np.min(values):g} to {np.max(values):g}" for name, values in data.items())
        raise ValueError(
            f"{form.name} could not be fitted ({error}); its values overflow at {ends}: give sizes in a larger unit."
        ) from None
    offset, basis = form.model(np.exp(log_shapes), data)
    coefficients = _linear(offset, basis, y, root)[0]
    if objective == "huber":
        log_shapes, coefficients = _huber(form, data, y, root, log_shapes, delta)
        offset, basis = form.model(np.exp(log_shapes), data)
    residuals = y - offset - basis @ coefficients
    constants = dict(zip(form.coefficients, coefficients.tolist(), strict=True))
    constants |= dict(zip(form.shapes, np.exp(log_shapes).tolist(), strict=True))
    dof, interval, note = len(y) - parameters, None, ""
    if dof < FEWEST_FREE:
        note = f"Too few points for an interval: {len(y)} points for {parameters} constants."
    elif objective == "squares" and "E" in constants:
        interval = {"E": _profile_limit(form, data, y, root, log_shapes, constants["E"], dof)}
    theta = np.append(coefficients, log_shapes)
    covariance = _covariance(form, theta, data, root, residuals, dof)
    return SurfaceLaw(form, constants, residuals, interval, note, max(dof, 0), covariance)


def _size(name: str, values: npt.ArrayLike, count: int) -> Array:
    """Sizes may be infinite (a limit), unlike losses."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"{name} has shape {array.shape} but there are {count} losses: give one size per loss.")
    if not np.all(array > 0):
        raise ValueError(f"{name} holds {array[~(array > 0)][0]}, which is not positive: leave that run out.")
    return array


def _profile_limit(form: Form, data: Data, y: Array, root: Array, log_shapes: Array, E: float, dof: int) -> Interval:
    """Hold E, refit the rest, and find where the sum of squares leaves the F threshold on both sides."""
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    offset, basis = form.model(np.exp(log_shapes), data)
    least = float(np.sum(_linear(offset, basis, y, root)[1] ** 2))
    threshold = least * (1.0 + float(stdtrit(dof, (1 + LEVEL) / 2)) ** 2 / dof)

    def excess(value: float) -> float:
        found = _search(form, data, y, root, [log_shapes, log_shapes - 0.5, log_shapes + 0.5], value)
        level, columns = form.model(np.exp(found), data)
        return float(np.sum(_linear(level + value, columns[:, 1:], y, root)[1] ** 2)) - threshold

    if threshold <= 1e-24 * float(np.sum((root * y) ** 2)):
        return E, E
    ends = []
    for sign in (-1.0, 1.0):
        inner, step = E, 4.0 * math.sqrt(threshold / float(np.sum(root**2)))
        outer = max(E + sign * step, 0.0)
        while excess(outer) < 0 and outer > 0 and step < 1e3:
            inner, step = outer, 2 * step
            outer = max(E + sign * step, 0.0)
        cut = outer == 0.0 and excess(0.0) < 0
        ends.append(0.0 if cut else float(brentq(excess, inner, outer, xtol=1e-6) if inner != E or outer != E else E))
    return ends[0], ends[1]
