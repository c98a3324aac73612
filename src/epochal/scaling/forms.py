"""Fit laws in more than one size, such as Chinchilla's `E + A/N**alpha + B/D**beta`.

Chinchilla: Hoffmann et al. 2022; `named_form` lists the others. A `Form` is linear in its coefficients at given shape constants,
`offset + basis @ coefficients`. Written for tens to hundreds of points.

Shapes: n points, c coefficients, s shape constants; `offset` (n,), `basis` (n, c).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import MIN_DOF, TAILS, Interval, checked
from epochal.scaling.solve import Array

Data = Mapping[str, Array]
STARTS = 7  # grid points per shape constant
MOST_STARTS = 2500  # of a grid; forms with more shapes start from a Sobol sequence instead
REFINED = 3  # grid points that start a local search
NORMAL = 1.6448536269514722  # 95% quantile of the normal distribution
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
    # 90%: E by profile, or every constant by bootstrap; an E that the points do not bound above 0 has the lower end -inf
    interval: dict[str, Interval] | None
    note: str
    dof: int  # degrees of freedom
    replicates: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False)  # (draws, constants) by bootstrap

    @property
    def E(self) -> float:  # noqa: N802 - named like the constant
        """The limit; nan for a form without a fitted E."""
        return self.constants.get("E", math.nan)

    def predict(self, **sizes: npt.ArrayLike) -> Array:
        """Evaluate the law at the named sizes (units of the fit; `math.inf` gives a limit)."""
        return self._evaluate(np.array(list(self.constants.values())), sizes)

    def predict_draws(self, **sizes: npt.ArrayLike) -> Array:
        """Evaluate every bootstrap refit at the named sizes (n,), (draws, n)."""
        return np.array([self._evaluate(constants, sizes) for constants in self.replicates])

    def predict_interval(self, **sizes: npt.ArrayLike) -> tuple[Array, Array]:
        """Give both ends of the pointwise 90% bootstrap band at the named sizes; nan without a bootstrap."""
        if not self.replicates.size:
            nothing = np.full(len(self.predict(**sizes)), np.nan)
            return nothing, nothing
        low, high = np.quantile(self.predict_draws(**sizes), TAILS, axis=0)
        return np.asarray(low), np.asarray(high)

    def _evaluate(self, constants: Array, sizes: Mapping[str, npt.ArrayLike]) -> Array:
        data = {name: np.atleast_1d(np.asarray(sizes[name], dtype=np.float64)) for name in self.form.sizes}
        count = len(self.form.coefficients)
        offset, basis = self.form.model(constants[count:], data)
        return np.asarray(offset + basis @ constants[:count])


def power_sum(first: str, second: str) -> Form:
    """Give the form `E + A / first**alpha + B / second**beta`."""

    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        a, b = (np.exp(-shape * np.log(data[name])) for shape, name in zip(shapes, (first, second), strict=True))
        return np.zeros(len(a)), np.stack([np.ones(len(a)), a, b], axis=1)

    shapes = {"alpha": (0.02, 4.0), "beta": (0.02, 4.0)}
    return Form(f"E + A/{first}^alpha + B/{second}^beta", (first, second), ("E", "A", "B"), shapes, model)


CHINCHILLA = power_sum("N", "D")
JOINT = power_sum("N", "K")


def bryant_liu(uninformed: float, at: Mapping[str, float]) -> Form:
    """Return the form of Bryant and Liu.

    `E + (L0 - E) h / (1 + h)` with `h = a/N**alpha + b/T**beta + c N**gamma/D**delta`.

    Source: arXiv 2605.09189. N parameters, T tokens seen, D distinct tokens; L0 is the loss `uninformed` of a model that
    has seen nothing, such as the log of the vocabulary. The terms of h are those at the sizes `at`, so that a, b and c do
    not depend on units: a is a / N**alpha at `at["N"]`.
    """

    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        a, b, c, alpha, beta, gamma, delta = shapes
        N, T, D = (np.log(data[name]) - math.log(at[name]) for name in ("N", "T", "D"))
        h = a * np.exp(-alpha * N) + b * np.exp(-beta * T) + c * np.exp(gamma * N - delta * D)
        informed = 1 / (1 + h)
        return uninformed * (1 - informed), informed[:, None]

    terms, exponents = (
        dict.fromkeys("abc", (1e-4, 3.0)),
        dict.fromkeys(("alpha", "beta", "gamma", "delta"), (0.05, 2.0)),
    )
    return Form(
        "E + (L0 - E) h/(1 + h), h = a/N^alpha + b/T^beta + c N^gamma/D^delta",
        ("N", "T", "D"),
        ("E",),
        terms | exponents,
        model,
    )


def soft_minimum(at: Mapping[str, float]) -> Form:
    """Return the soft minimum of the laws of Chinchilla and Kaplan.

    `E + C (N**-x + r D**-y)**z`; Chinchilla's is z = 1, Kaplan's y = 1 and E = 0.

    Kaplan et al. 2020, equation 1.5. N and D are in units of the sizes `at`, so that C and r do not depend on units.
    """

    def model(shapes: Array, data: Data) -> tuple[Array, Array]:
        x, y, z, r = shapes
        N, D = (np.log(data[name]) - math.log(at[name]) for name in ("N", "D"))
        term = (np.exp(-x * N) + r * np.exp(-y * D)) ** z
        return np.zeros(len(term)), np.stack([np.ones(len(term)), term], axis=1)

    shapes = {"x": (0.05, 4.0), "y": (0.05, 4.0), "z": (0.05, 4.0), "r": (1e-3, 1e3)}
    return Form("E + C (N^-x + r D^-y)^z", ("N", "D"), ("E", "C"), shapes, model)


FORM_NAMES = ("chinchilla", "soft-minimum", "bryant-liu")


def named_form(name: str, at: Mapping[str, float], *, uninformed: float) -> Form:
    """Give a form by its name, one of FORM_NAMES; `at` and `uninformed` are those of `bryant_liu`.

    Raises ValueError for another name, and for SoftQ (arXiv 2606.06888), whose formula is not in the public text.
    """
    match name:
        case "chinchilla":
            return CHINCHILLA
        case "soft-minimum":
            return soft_minimum(at)
        case "bryant-liu":
            return bryant_liu(uninformed, at)
        case "softq":
            raise ValueError("the form of SoftQ (arXiv 2606.06888) is not published as a formula; use soft-minimum.")
    raise ValueError(f"there is no form {name!r}; choose from {', '.join(FORM_NAMES)}.")


def fit_surface(
    form: Form,
    loss: npt.ArrayLike,
    *,
    objective: str = "squares",
    draws: int = 0,
    seed: int = 0,
    **sizes: npt.ArrayLike,
) -> SurfaceLaw:
    """Fit a form to losses (n,) in nats per token.

    For example `fit_surface(CHINCHILLA, loss, N=N, D=D)`. Each size is (n,) and may be inf. `objective="squares"` gives
    a 90% interval of E by profile likelihood with Student quantiles; "huber" minimizes Huber's loss of log residuals
    (Chinchilla's third approach) and gives none. With `draws` there are 90% intervals of all constants from so many
    refits of resampled places (all points of equal sizes together), whatever the objective. Raises ValueError for values
    that cannot be used.
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
    law = SurfaceLaw(form, constants, residuals, interval, note, max(dof, 0))
    if dof < MIN_DOF:
        return replace(law, note=f"Too few points for an interval: {len(y)} points for {len(constants)} constants.")
    if draws:
        replicates = _bootstrap(law, data, y, objective, draws, np.random.default_rng(seed))
        if not replicates.size:
            return replace(law, note=f"Too few places to resample for {len(constants)} constants.")
        return replace(law, replicates=replicates, interval=_percentiles(law, replicates))
    if objective == "squares" and "E" in constants:
        low, high = _profile_limit(form, data, y, log_shapes, constants["E"], dof)
        interval = {"E": (low if low > 0 else -math.inf, high)}
    return replace(law, interval=interval)


def _bootstrap(law: SurfaceLaw, data: Data, y: Array, objective: str, draws: int, rng: np.random.Generator) -> Array:
    """Refit resampled places, (draws, constants); none with too few places."""
    from scipy.special import stdtrit

    # Places, not points: seeds of a place share what the form misses there.
    places, place = np.unique(np.stack(list(data.values())), axis=1, return_inverse=True)
    members = [np.flatnonzero(place == index) for index in range(places.shape[1])]
    # Refits of as many places as there are would vary too little by the constants, and by Student's quantile over the
    # normal one: the number drawn is smaller instead.
    free = len(members) - len(law.constants)
    if free < MIN_DOF:
        return np.empty((0, len(law.constants)))
    count = max(round(free * (NORMAL / float(stdtrit(free, TAILS[1]))) ** 2), len(law.constants) + 1)
    names = law.form.shapes
    start = np.log([law.constants[name] for name in names])
    low, high = _bounds(law.form)
    start = np.clip(start, low + 1e-9, high - 1e-9)
    rows: list[list[float]] = []
    while len(rows) < draws:
        picked = np.concatenate([members[i] for i in rng.integers(len(members), size=count)])
        part = {name: values[picked] for name, values in data.items()}
        if objective == "huber":
            log_shapes, coefficients = _huber(law.form, part, y[picked], start, restart=False)
        else:
            log_shapes = _search(law.form, part, y[picked], [start], tolerance=1e-8)
            coefficients = _linear(*law.form.model(np.exp(log_shapes), part), y[picked])[0]
        rows.append([*coefficients.tolist(), *np.exp(log_shapes).tolist()])
    return np.array(rows)


def _percentiles(law: SurfaceLaw, replicates: Array) -> dict[str, Interval]:
    intervals = {}
    for (name, value), column in zip(law.constants.items(), replicates.T, strict=True):
        low, high = np.quantile(column, TAILS).tolist()
        intervals[name] = min(low, value), max(high, value)
    if "E" in intervals:
        low, high = intervals["E"]
        # Coefficients are at least 0, and Huber's search reaches it only in the limit.
        intervals["E"] = (low if low > 1e-6 else -math.inf, high)
    return intervals


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
    low, high = _bounds(form)
    if STARTS ** len(low) > MOST_STARTS:
        from scipy.stats import qmc

        unit = qmc.Sobol(len(low), rng=np.random.default_rng(0)).random(2 ** int(math.log2(MOST_STARTS)))
        return list(low + (high - low) * unit)
    axes = [np.linspace(a, b, STARTS + 2)[1:-1] for a, b in zip(low, high, strict=True)]
    return [np.array(point) for point in itertools.product(*axes)]


def _search(
    form: Form,
    data: Data,
    y: Array,
    starts: list[Array] | None = None,
    fixed_E: float | None = None,
    tolerance: float = 1e-12,
) -> Array:
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
        least_squares(residual, np.clip(s, low + 1e-9, high - 1e-9), bounds=(low, high), xtol=tolerance, ftol=tolerance)
        for s in starts
    ]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def _huber(form: Form, data: Data, y: Array, log_shapes: Array, *, restart: bool = True) -> tuple[Array, Array]:
    """Minimize Huber's loss of log residuals over the log shapes and coefficients; `restart` from a grid as well."""
    from scipy.optimize import least_squares

    count = len(log_shapes)
    low, high = _bounds(form)

    def residual(theta: Array) -> Array:
        level, columns = form.model(np.exp(theta[:count]), data)
        with np.errstate(over="ignore", divide="ignore"):  # a step too far, which the search takes back
            ratio = y / np.clip(level + columns @ np.exp(theta[count:]), 1e-100, 1e100)
        return np.asarray(np.log(ratio))

    def start(shapes: Array) -> Array:
        coefficients = _linear(*form.model(np.exp(shapes), data), y)[0]
        return np.append(shapes, np.log(np.maximum(coefficients, 1e-12)))

    def cost(theta: Array) -> float:
        size = np.abs(residual(theta))
        quadratic, tail = size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)
        return float(np.sum(np.where(size <= HUBER_DELTA, quadratic, tail)))

    # Huber's loss is flat far from the optimum and has more basins than least squares, so one start is not enough.
    starts = [start(np.clip(log_shapes, low + 1e-9, high - 1e-9))]
    if restart:
        starts += sorted(map(start, _grid(form)), key=cost)[:REFINED]
    tolerance = 1e-12 if restart else 1e-8
    # Coefficients are searched by their logarithms, which keeps them positive.
    unbounded = np.full(len(form.coefficients), np.inf)
    ends = np.append(low, -unbounded), np.append(high, unbounded)
    fits = [
        least_squares(
            residual, s, bounds=ends, loss="huber", f_scale=HUBER_DELTA, x_scale="jac", xtol=tolerance, ftol=tolerance
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
