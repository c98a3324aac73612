"""The power law with a limit, `loss = E + A / x**alpha`, and how sure its constants are.

The form is that of "Pre-training under infinite compute" (sections 3 to 5: x = parameters N, members K or tokens D;
E is the asymptote by which recipes are compared). The paper fits three constants to four points and gives no interval;
here the interval that is reported is the profile-likelihood interval with Student quantiles, because it is the one
whose coverage was measured to be honest (`benchmarks/laws.csv`); the bootstrap interval stands beside it. Where the
points leave fewer than two degrees of freedom there is no interval but a sentence: AICc is not defined there either, and
one degree of freedom tests nothing.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from epochal.scaling.solve import Array, profile, solve

LEVEL = 0.90
ALPHA_BOUNDS = (0.01, 10.0)
FEWEST = 4  # distinct x below which no interval is given, whatever the number of constants
FEWEST_FREE = 2  # points beyond the constants below which no interval is given: four points, three constants, one seed
HUBER_ROUNDS = 60
POOLING = 0.5  # seeds and sizes share one variance where the F test is less sure than this; see _noise
POOLING_EXCESS = 0.05  # the same where the seeds showed how their noise falls: their scatter then says more
FALLS = 1.0  # log-likelihood by which the seeds must prefer noise that falls with the excess
EXCESS_ROUNDS = 4
EXCESS_FLOOR = 0.05
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A fitted law `E + A / x**alpha`: losses in nats per token, x in the unit it was given in.

    `interval` maps E, A, alpha to 90% intervals (profile likelihood, Student quantiles), or is None where the points
    cannot carry one; `note` then says why. Those of A and alpha are hulls over constant noise and noise in proportion to
    the excess, which a few points cannot tell apart and which move them, but hardly E. `bootstrap_interval` is the
    percentile interval of `draws` ((B, 3): E, A, alpha of refitted bootstrap data). `variance` is that of a point of
    weight 1 and `dof` its degrees of freedom.
    The points are taken as independent: losses of nested ensembles are not (`members.py`).
    """

    E: float
    A: float
    alpha: float
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    weights: Array = field(repr=False)
    residuals: Array = field(repr=False)
    interval: dict[str, Interval] | None
    note: str
    variance: float
    dof: int
    bootstrap_interval: dict[str, Interval] | None = field(default=None, repr=False)
    draws: Array = field(default_factory=lambda: np.empty((0, 3)), repr=False)
    fixed_alpha: float | None = None
    alpha_bounds: Interval = ALPHA_BOUNDS
    working_y: Array = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def parameters(self) -> int:
        """The number of fitted constants: 3, or 2 with a fixed exponent."""
        return 3 if self.fixed_alpha is None else 2

    def predict(self, x: npt.ArrayLike) -> Array:
        """Evaluate the law at x (same unit as in the fit; `math.inf` gives the limit E)."""
        values = np.asarray(x, dtype=np.float64)
        if np.any(~(values > 0)):
            raise ValueError(f"x = {_worst(values, values > 0)} is not positive: a power law needs x > 0, so drop it.")
        return np.asarray(self.E + self.A * np.exp(-self.alpha * np.log(values)))

    def predict_interval(self, x: npt.ArrayLike, *, level: float = LEVEL) -> tuple[Array, Array]:
        """Give the two ends of the pointwise band of the law at x, both nan where the fit has no interval."""
        centre = self.predict(x)
        if self.interval is None:
            return np.full_like(centre, np.nan), np.full_like(centre, np.nan)
        low, high = self.quantiles((1 - level) / 2, x), self.quantiles((1 + level) / 2, x)
        return low.reshape(centre.shape), high.reshape(centre.shape)

    def quantiles(self, probability: float, x: npt.ArrayLike) -> Array:
        """Give one quantile of the confidence distribution of the law at x (flat); nan where the fit has no interval."""
        target = np.asarray(x, dtype=np.float64).ravel()
        if self.interval is None:
            return np.full_like(target, np.nan)
        return self._quantiles(np.full(target.size, probability), target)

    def limit_quantiles(self, probability: npt.ArrayLike) -> Array:
        """Quantiles of the confidence distribution of E; nan where the fit has no interval.

        The distribution whose central 90% is `interval["E"]`: what comparisons and nested fits draw from.
        """
        levels = np.asarray(probability, dtype=np.float64)
        if self.interval is None:
            return np.full_like(levels, np.nan)
        return self._quantiles(levels.ravel(), np.full(levels.size, np.inf)).reshape(levels.shape)

    def _quantiles(self, probability: Array, x: Array) -> Array:
        """Where the signed root of the profile's sum of squares meets Student's quantile, for the law at x."""
        return _profile_ends(self, probability, np.log(x) - np.mean(np.log(self.x)), coefficient=False)


def _profile_ends(law: PowerLaw, probability: Array, log_target: Array, *, coefficient: bool) -> Array:
    from scipy.special import stdtrit

    log_x = np.log(law.x) - np.mean(np.log(law.x))
    u = np.exp(-law.alpha * log_x)
    level = law.E + law.A * np.exp(-law.alpha * np.mean(np.log(law.x))) * u
    least = float(np.sum(law.weights * (law.working_y - level) ** 2))
    ceiling = least + stdtrit(law.dof, probability) ** 2 * law.variance
    ends = profile(
        log_x,
        law.working_y,
        law.weights,
        law.alpha,
        ceiling=ceiling,
        log_target=log_target,
        sign=np.where(probability < 0.5, -1.0, 1.0),
        alpha=law.fixed_alpha,
        bounds=law.alpha_bounds,
        coefficient=coefficient,
    )
    # Points exactly on a law leave an ellipse of rounding errors, which may hold no law at all: the law is its interval.
    exact = (
        np.full(log_target.shape, law.A) if coefficient else law.predict(np.exp(log_target + np.mean(np.log(law.x))))
    )
    return np.where(np.isfinite(ends), ends, exact)


def _worst(values: Array, good: npt.NDArray[np.bool_]) -> float:
    return float(np.ravel(values)[np.argmin(np.ravel(good))])


def checked(name: str, values: npt.ArrayLike, *, positive: bool = True) -> Array:
    """Give a one-dimensional float array, or a ValueError that names the first value that cannot be used."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds a value that is not a number ({error}): give plain numbers.") from None
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, but a law needs one value per point: pass a flat list.")
    if not np.all(np.isfinite(array)):
        bad = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"{name}[{bad}] = {array[bad]} is not finite: leave that run out of the fit.")
    if positive and np.any(array <= 0):
        bad = int(np.argmax(array <= 0))
        raise ValueError(f"{name}[{bad}] = {array[bad]} is not positive, which a power law cannot use: leave it out.")
    return array


def checked_points(x: npt.ArrayLike, y: npt.ArrayLike, weights: npt.ArrayLike | None) -> tuple[Array, Array, Array]:
    """x, y and weights of one length; weights default to 1."""
    xs, ys = checked("x", x), checked("y", y)
    ws = np.ones_like(xs) if weights is None else checked("weights", weights)
    for name, array in (("y", ys), ("weights", ws)):
        if len(array) != len(xs):
            raise ValueError(f"{name} has {len(array)} values but x has {len(xs)}: give one per point.")
    if len(np.unique(xs)) < 2:
        raise ValueError(f"x has {len(np.unique(xs))} distinct value(s), which is no curve: add runs at other sizes.")
    return xs, ys, ws


def fit_power_law(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    errors: npt.ArrayLike | None = None,
    error_dof: int = 0,
    bootstrap: int = 1000,
    seed: int = 0,
    alpha: float | None = None,
    noise: str = "constant",
    loss: str = "squares",
    delta: float = 1e-3,
    alpha_bounds: Interval = ALPHA_BOUNDS,
) -> PowerLaw:
    """Fit `y = E + A / x**alpha` with E, A >= 0 by multi-start bounded least squares.

    x: sizes (any unit; the constants come out in it), y: losses in nats per token. Several seeds of one size are given
    as several points with the same x. `weights` are inverse variances up to a factor (`seed_weights` makes them).
    `errors` are standard errors of y in nats that are known from elsewhere, with `error_dof` degrees of freedom in all
    (limits of other fits, say); they weigh the points and speak for the noise as repeated seeds would.
    `alpha` fixes the exponent (1.0 for an ensemble of independent members, section 4 of the paper). `loss="huber"`
    takes Huber's loss of log residuals with threshold `delta`, as Chinchilla's third approach does; points far off the
    law then count less. `noise="excess"` weighs for noise that shrinks with the excess over the limit (members of
    ensembles, relative errors); where several seeds of a size plainly scatter less near the limit, the default takes it
    too and says so. `bootstrap` draws (0: none) are reproducible by `seed`.

    Raises ValueError on values that are not finite and positive, on unequal lengths, on fewer than two distinct x.
    """
    if errors is not None:
        if weights is not None or error_dof < 1 or noise == "excess":
            raise ValueError(
                "errors need error_dof of at least 1, no weights and constant noise: they weigh the points."
            )
        weights = checked("errors", errors) ** -2.0
    xs, ys, ws = checked_points(x, y, weights)
    _check_options(alpha, noise, loss, delta, alpha_bounds)
    law = _fit(xs, ys, ws, error_dof, alpha=alpha, noise=noise, loss=loss, delta=delta, alpha_bounds=alpha_bounds)
    too_few = _too_few(xs, law.parameters, alpha, error_dof)
    if too_few:
        return replace(law, note=too_few)
    other = None
    if noise == "constant" and loss == "squares" and errors is None:
        other = _fit(xs, ys, ws, 0, alpha=alpha, noise="excess", loss=loss, delta=delta, alpha_bounds=alpha_bounds)
        if weights is None and _falls_with_excess(xs, ys, other.weights):
            law, other = _pooled(other), law
    interval = _profile_intervals(law)
    if other is not None:
        interval |= {
            name: _hull(interval[name], ends) for name, ends in _profile_intervals(other).items() if name != "E"
        }
    draws = _bootstrap(law, bootstrap, seed)
    return replace(
        law,
        interval=interval,
        note=_notes(law),
        draws=draws,
        bootstrap_interval=_percentiles(draws) if bootstrap else None,
    )


def _fit(
    xs: Array,
    ys: Array,
    ws: Array,
    error_dof: int,
    *,
    alpha: float | None,
    noise: str,
    loss: str,
    delta: float,
    alpha_bounds: Interval,
) -> PowerLaw:
    """Fit the constants and the noise; no intervals yet."""
    centre = float(np.mean(np.log(xs)))
    log_x = np.log(xs) - centre
    if noise == "excess":
        ws = _excess_weights(log_x, ys, ws, alpha, alpha_bounds)
    working_y, working_w = ys, ws
    if loss == "huber":
        working_y, working_w = _huber_points(log_x, ys, ws, alpha, alpha_bounds, delta)
    E, scaled_A, exponent, _ = (
        float(v[0]) for v in solve(log_x, working_y[None], working_w, alpha=alpha, bounds=alpha_bounds)
    )
    fitted = E + scaled_A * np.exp(-exponent * log_x)
    variance, dof, note = _noise(xs, working_y - fitted, working_w, 3 if alpha is None else 2, error_dof)
    return PowerLaw(
        E=E,
        A=scaled_A * math.exp(exponent * centre),
        alpha=exponent,
        x=xs,
        y=ys,
        weights=working_w,
        residuals=ys - fitted,
        interval=None,
        note=note,
        variance=variance,
        dof=dof,
        fixed_alpha=alpha,
        alpha_bounds=alpha_bounds,
        working_y=working_y,
    )


def _check_options(alpha: float | None, noise: str, loss: str, delta: float, alpha_bounds: Interval) -> None:
    if loss not in ("squares", "huber"):
        raise ValueError(f"loss = {loss!r} is not a loss of this fit: use 'squares' or 'huber'.")
    if noise not in ("constant", "excess"):
        raise ValueError(f"noise = {noise!r} is no noise of this fit: use 'constant' or 'excess'.")
    if not delta > 0:
        raise ValueError(f"delta = {delta} is no Huber threshold: use a positive number such as 1e-3.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha = {alpha} is no exponent of a decreasing law: use a positive number such as 1.0.")
    if not 0 < alpha_bounds[0] < alpha_bounds[1]:
        raise ValueError(f"alpha_bounds = {alpha_bounds} is no range: give two positive numbers, the smaller first.")


def _too_few(x: Array, parameters: int, alpha: float | None, error_dof: int) -> str:
    distinct, free = len(np.unique(x)), len(x) + error_dof - parameters
    what = f"{parameters} constants" + ("" if alpha is None else f" (alpha fixed at {alpha:g})")
    if distinct < FEWEST or distinct <= parameters:
        return f"Too few points for an interval: {distinct} distinct sizes for {what}; at least {FEWEST} are needed."
    if free < FEWEST_FREE:
        return (
            f"Too few points for an interval: {len(x)} points for {what} leave {free} degree of freedom, and at least "
            f"{FEWEST_FREE} are needed; add a size or a second seed."
        )
    return ""


def _noise(
    x: Array, residual: Array, weights: Array, parameters: int, error_dof: int, pooling: float = POOLING
) -> tuple[float, int, str]:
    """Variance of a point of weight 1 and its degrees of freedom.

    Seeds of one size tell the seed noise (and known errors the same); the scatter of sizes about the law also holds what
    seeds cannot show (tuning, model shape). Where the second is larger, the seeds are pseudo-replicates and only the
    sizes count. The F test decides at 0.5, not at 0.05, because few sizes hardly ever show a difference that is there:
    wrong pooling makes intervals too short (coverage 0.72 instead of 0.92 with four sizes and three seeds), wrong
    separation only wider.
    """
    from scipy.special import fdtrc

    groups = [x == value for value in np.unique(x)]
    # Weights from known errors are inverse variances, so each of their degrees of freedom adds a square of 1.
    total, within = float(np.sum(weights * residual**2)) + error_dof, float(error_dof)
    for group in groups:
        w, r = weights[group], residual[group]
        within += float(np.sum(w * (r - np.sum(w * r) / np.sum(w)) ** 2))
    dof_between, dof_within = len(groups) - parameters, len(x) - len(groups) + error_dof
    if dof_between <= 0 or dof_within == 0:
        dof = max(len(x) + error_dof - parameters, 0)
        return total / max(dof, 1), dof, ""
    between, pure = max(total - within, 0.0) / dof_between, within / dof_within
    if pure == 0.0 or fdtrc(dof_between, dof_within, between / pure) < pooling:
        note = "Sizes scatter about the law more than their own noise, so the interval rests on the sizes alone."
        return between, dof_between, note
    return total / (dof_between + dof_within), dof_between + dof_within, ""


def _falls_with_excess(x: Array, y: Array, weights: Array) -> bool:
    """Whether seeds of one size scatter as `weights` say rather than evenly, by the likelihood of their deviations alone."""
    even = fall = logs = freedom = 0.0
    for value in np.unique(x):
        here = x == value
        count = float(np.sum(here)) - 1
        squares = float(np.sum((y[here] - np.mean(y[here])) ** 2))
        weight = float(np.mean(weights[here]))
        freedom, logs = freedom + count, logs + count * math.log(weight)
        even, fall = even + squares, fall + weight * squares
    return even > 0 and (freedom * math.log(even / fall) + logs) / 2 > FALLS


def _pooled(law: PowerLaw) -> PowerLaw:
    """Return a law fitted with falling noise that its seeds showed: their scatter counts unless sizes plainly differ."""
    variance, dof, note = _noise(law.x, law.residuals, law.weights, law.parameters, 0, pooling=POOLING_EXCESS)
    seen = "Seeds scatter less near the limit, so the points there weigh more."
    return replace(law, variance=variance, dof=dof, note=f"{seen} {note}".strip())


def _profile_intervals(law: PowerLaw) -> dict[str, Interval]:
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    centre = float(np.mean(np.log(law.x)))
    found = {
        "E": _profile_ends(law, tails, np.full(2, np.inf), coefficient=False),
        "A": _profile_ends(law, tails, np.full(2, -centre), coefficient=True),
        "alpha": _alpha_ends(law),
    }
    return {name: (float(ends[0]), float(ends[1])) for name, ends in found.items()}


def _hull(first: Interval, second: Interval) -> Interval:
    return min(first[0], second[0]), max(first[1], second[1])


def _notes(law: PowerLaw) -> str:
    notes = [law.note] if law.note else []
    if law.A == 0.0:
        notes.append("The losses do not fall with size, so there is no limit to extrapolate to: E is their mean.")
    elif law.fixed_alpha is None and not law.alpha_bounds[0] * 1.001 < law.alpha < law.alpha_bounds[1] * 0.999:
        notes.append(f"The exponent stopped at its bound {law.alpha:g}: the points do not show a limit.")
    if law.E == 0.0:
        notes.append("The limit stopped at its bound 0: the points do not show a limit.")
    return " ".join(notes)


def _alpha_ends(law: PowerLaw) -> Array:
    from scipy.special import stdtrit

    from epochal.scaling.solve import alpha_range

    if law.fixed_alpha is not None:
        return np.full(2, law.fixed_alpha)
    log_x = np.log(law.x) - np.mean(np.log(law.x))
    least = float(solve(log_x, law.working_y[None], law.weights, alpha=law.alpha, bounds=law.alpha_bounds)[3][0])
    ceiling = np.array([least + float(stdtrit(law.dof, (1 + LEVEL) / 2)) ** 2 * law.variance])
    low, high = alpha_range(log_x, law.working_y, law.weights, law.alpha, ceiling, law.alpha_bounds)
    return np.array([low[0], high[0]])


def _percentiles(draws: Array) -> dict[str, Interval]:
    ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(("E", "A", "alpha"))}


def _bootstrap(law: PowerLaw, count: int, seed: int) -> Array:
    """Refit `count` data sets made of the law plus resampled residuals with random signs.

    Single seeds are resampled where they are independent points, whole sizes where the sizes scatter more than their
    seeds do (`_noise`). Residuals of a fit are too small by dof / n, and their own variance is unsure: each draw is
    scaled by sqrt(dof / chi-squared), which turns normal tails into Student's.
    """
    if count == 0:
        return np.empty((0, 3))
    rng = np.random.default_rng(seed)
    centre = float(np.mean(np.log(law.x)))
    x, y, weights = _units(law)
    log_x = np.log(x) - centre
    fitted = law.E + law.A * math.exp(-law.alpha * centre) * np.exp(-law.alpha * log_x)
    standard = (y - fitted) * np.sqrt(weights)
    size = math.sqrt(float(np.mean(standard**2)))
    standard = standard * (math.sqrt(law.variance) / size if size > 0 else 0.0)
    picks = rng.integers(len(standard), size=(count, len(standard)))
    signs = rng.choice([-1.0, 1.0], size=picks.shape)
    scale = np.sqrt(law.dof / rng.chisquare(law.dof, size=(count, 1)))
    draws = fitted + scale * signs * standard[picks] / np.sqrt(weights)
    E, A, alpha, _ = solve(log_x, draws, weights, alpha=law.fixed_alpha, bounds=law.alpha_bounds)
    return np.stack([E, A * np.exp(alpha * centre), alpha], axis=1)


def _units(law: PowerLaw) -> tuple[Array, Array, Array]:
    """What varies independently: the points, or the mean of each size where only the sizes count."""
    if law.dof >= len(law.x) - law.parameters:
        return law.x, law.working_y, law.weights
    sizes = np.unique(law.x)
    weights = np.array([np.sum(law.weights[law.x == size]) for size in sizes])
    sums = np.array([np.sum((law.weights * law.working_y)[law.x == size]) for size in sizes])
    return sizes, sums / weights, weights


def _huber_points(
    log_x: Array, y: Array, weights: Array, alpha: float | None, bounds: Interval, delta: float
) -> tuple[Array, Array]:
    """Points whose least squares are stationary for Huber's loss of log residuals: working values and weights.

    Gauss-Newton in the log: log f moves by df / f, so the working value is f + f log(y / f) and its weight psi / f**2.
    """
    working_y, working_w = y, weights / y**2
    previous = np.full(3, np.nan)
    for _ in range(HUBER_ROUNDS):
        E, A, exponent, _ = solve(log_x, working_y[None], working_w, alpha=alpha, bounds=bounds)
        fitted = E[0] + A[0] * np.exp(-exponent[0] * log_x)
        error = np.log(y / fitted)
        shrink = np.minimum(1.0, delta / np.maximum(np.abs(error), 1e-300))
        working_y, working_w = fitted + fitted * error, weights * shrink / fitted**2
        current = np.array([E[0], A[0], exponent[0]])
        if np.allclose(current, previous, rtol=1e-10, atol=1e-12):
            break
        previous = current
    return working_y, working_w


def _excess_weights(log_x: Array, y: Array, weights: Array, alpha: float | None, bounds: Interval) -> Array:
    """Weights for noise that is a share of the excess over the limit, with a floor of a twentieth of the largest.

    Without the floor the points nearest the limit would own the fit: their excess is known worst.
    """
    current = weights
    for _ in range(EXCESS_ROUNDS):
        _, A, exponent, _ = solve(log_x, y[None], current, alpha=alpha, bounds=bounds)
        excess = A[0] * np.exp(-exponent[0] * log_x)
        largest = float(np.max(excess))
        if largest == 0.0:
            return weights
        current = weights * largest**2 / (excess**2 + (EXCESS_FLOOR * largest) ** 2)
    return current
