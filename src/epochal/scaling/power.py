"""Fit the power law with a limit, `loss = E + A / x**alpha`.

The form is that of "Pre-training under infinite compute" (sections 3 to 5): x is parameters N, members K or tokens D, and E is
the asymptote by which recipes are compared. The paper fits three constants to four points and gives no interval. The
intervals here are from a posterior with a scatter between sizes (`posterior.py`). Next to it stand the intervals by profile
likelihood with Student quantiles, which use no priors; `benchmarks/coverage.csv` has the measured coverage of both.
"""

import functools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from epochal.scaling.noise import POOLING, POOLING_SHRINKING, noise_variance, seeds_prefer, shrinking_weights
from epochal.scaling.posterior import Posterior, sample_posterior
from epochal.scaling.solve import ALPHA_BOUNDS, Array, alpha_range, profile, solve

LEVEL = 0.90
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
MIN_SIZES = 4  # distinct x needed for an interval
MIN_DOF = 2  # degrees of freedom needed for an interval: AICc is undefined below two, and one tests nothing
Interval = tuple[float, float]  # both ends; an end of -inf or inf is unbounded


def interval_text(interval: Interval | None, decimals: int = 4) -> str:
    """Show an interval as text: "4.0123 to 4.1234", "unbounded below, to 4.4445", or a dash for None."""
    if interval is None:
        return "–"
    low, high = (f"{end:.{decimals}f}" if math.isfinite(end) else "" for end in interval)
    match bool(low), bool(high):
        case True, True:
            return f"{low} to {high}"
        case False, True:
            return f"unbounded below, to {high}"
        case True, False:
            return f"from {low}, unbounded above"
    return "unbounded"


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A fitted law `E + A / x**alpha`: losses in nats per token, x in the unit of the fit.

    All arrays are (n,).
    """

    E: float
    A: float
    alpha: float
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    weights: Array = field(repr=False)  # inverse variances, up to a factor
    residuals: Array = field(repr=False)
    # E, A and alpha to their 90% intervals from the posterior; None with too few points. An E that the points and priors
    # do not bound above 0 has the lower end -inf.
    interval: dict[str, Interval] | None
    note: str  # why there is no interval, or what to know about it
    variance: float  # of a point of weight 1
    dof: int  # degrees of freedom of `variance`
    fixed_alpha: float | None = None
    posterior: Posterior | None = field(default=None, repr=False)  # None without an interval

    @functools.cached_property
    def profile(self) -> dict[str, Interval] | None:
        """E, A and alpha to their 90% profile intervals; None under two degrees of freedom."""
        if self.posterior is None or self.dof < MIN_DOF:
            return None
        return _profile_interval(self)

    @property
    def parameters(self) -> int:
        """The number of fitted constants: 3, or 2 with a fixed exponent."""
        return 3 if self.fixed_alpha is None else 2

    def predict(self, x: npt.ArrayLike) -> Array:
        """Evaluate the law at x (unit of the fit; `math.inf` gives E). Raises ValueError unless all x > 0."""
        sizes = np.asarray(x, dtype=np.float64)
        if not np.all(sizes > 0):
            raise ValueError(f"x must be positive, got {sizes[~(sizes > 0)][0]}.")
        return np.asarray(self.E + self.A * np.exp(-self.alpha * np.log(sizes)))

    def quantiles(self, probability: npt.ArrayLike, x: npt.ArrayLike) -> Array:
        """Give quantiles of the posterior of the law at x, nan without one; the arguments broadcast.

        At `x = math.inf` this is the distribution of the limit.
        """
        levels, sizes = np.broadcast_arrays(np.asarray(probability, np.float64), np.asarray(x, np.float64))
        if self.posterior is None:
            return np.full(levels.shape, np.nan)
        # Each x once, however many levels it has.
        places, which = np.unique(sizes.ravel(), return_inverse=True)
        draws = np.sort(self.posterior.at(places), axis=-1)
        ranks = levels.ravel() * (draws.shape[-1] - 1)
        lower = np.floor(ranks).astype(int)
        upper = np.minimum(lower + 1, draws.shape[-1] - 1)
        share = ranks - lower
        values = (1 - share) * draws[which, lower] + share * draws[which, upper]
        return np.asarray(values.reshape(levels.shape))

    def predict_interval(self, x: npt.ArrayLike, *, seeds: int | None = None) -> tuple[Array, Array]:
        """Give both ends of the pointwise 90% band at x, nan without an interval.

        With `seeds` it is the interval of a prediction: of the mean that so many new seeds of a new size x will measure.
        """
        if seeds is None or self.posterior is None:
            return self.quantiles(TAILS[0], x), self.quantiles(TAILS[1], x)
        low, high = np.quantile(self.posterior.measured_at(np.asarray(x, np.float64), seeds), TAILS, axis=-1)
        return np.asarray(low), np.asarray(high)


def fit_power_law(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    exponent: float | None = None,
    sigma: npt.ArrayLike | None = None,
    sigma_dof: int = 0,
    between: float | None = None,
) -> PowerLaw:
    """Fit `y = E + A / x**alpha` by least squares, with 90% intervals.

    E and A are at least 0. x: sizes in any unit; y: losses in nats per token; both (n,). Seeds of one size are points
    with the same x. Points must be independent: losses of nested ensembles are not (see `fit_members`).
    `exponent` fixes alpha (1.0 for an ensemble of independent members, section 4 of the paper).
    `sigma` are standard errors of y in nats known from elsewhere (say, limits of other fits), estimated with `sigma_dof`
    degrees of freedom in all; they weight the points and contribute to the noise estimate as repeated seeds would.
    `between` is the standard deviation in nats between sizes as known from elsewhere (`search_noise`): the scale of its
    half-normal prior.

    Raises ValueError for values that are not finite and positive, unequal lengths, and fewer than two distinct x.
    """
    weights = None
    if sigma is not None:
        if sigma_dof < 1:
            raise ValueError(f"sigma_dof must be at least 1 where sigma is given, got {sigma_dof}.")
        # Weights are inverse variances.
        weights = checked("sigma", sigma) ** -2.0
    constant = fit_constants(x, y, weights=weights, exponent=exponent, sigma_dof=sigma_dof)
    shortage = _shortage(constant, sigma_dof)
    if shortage:
        return replace(constant, note=shortage)
    law, seen = constant, ""
    if sigma is None and len(np.unique(constant.x)) < len(constant.x):
        # Few points cannot show whether noise is constant or shrinks with the excess over the limit; seeds can.
        by_excess = shrinking_weights(_centered_logs(constant.x)[0], constant.y, exponent)
        if seeds_prefer(constant.x, constant.y, by_excess):
            law = fit_constants(x, y, weights=by_excess, exponent=exponent, pooling=POOLING_SHRINKING)
            seen = "Seeds scatter less near the limit, so points there have more weight."
    posterior = sample_posterior(law.x, law.y, law.weights, alpha=exponent, sigma_dof=sigma_dof, between=between)
    note = f"{seen} {_notes(law)}".strip()
    if not posterior.E.size:
        return replace(law, note=note)
    law = replace(law, posterior=posterior, note=note)
    return replace(law, interval=_posterior_interval(law, posterior))


def _posterior_interval(law: PowerLaw, posterior: Posterior) -> dict[str, Interval]:
    intervals = {}
    for name in ("E", "A", "alpha"):
        low, high = np.quantile(getattr(posterior, name), TAILS).tolist()
        # The priors may pull an interval off the best fit, which must be in it.
        intervals[name] = min(low, getattr(law, name)), max(high, getattr(law, name))
    low, high = intervals["E"]
    intervals["E"] = (low if low > 0 else -math.inf, high)
    return intervals


def fit_constants(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    weights: Array | None = None,
    exponent: float | None = None,
    sigma_dof: int = 0,
    pooling: float = POOLING,
) -> PowerLaw:
    """Fit the constants and the noise as `fit_power_law` does, but no intervals.

    `weights` (n,) are inverse variances up to a factor; `pooling` is the p-value of `noise_variance`. Raises ValueError
    like `fit_power_law`.
    """
    xs, ys = checked("x", x), checked("y", y)
    ws = np.ones_like(xs) if weights is None else weights
    for name, array in (("y", ys), ("sigma", ws)):
        if len(array) != len(xs):
            raise ValueError(f"{name} has {len(array)} values but x has {len(xs)}: give one per point.")
    if len(np.unique(xs)) < 2:
        raise ValueError(f"A law needs two distinct x, got {len(np.unique(xs))}: add runs at other sizes.")
    if exponent is not None and not (math.isfinite(exponent) and exponent > 0):
        raise ValueError(f"exponent must be a positive number, got {exponent}.")

    # Squares rather than Huber's loss of log residuals: its intervals covered E in 0.86 of laws with constant noise.
    log_x, center = _centered_logs(xs)
    E, A, alpha, _ = (float(v[0]) for v in solve(log_x, ys[None], ws, alpha=exponent))
    residuals = ys - (E + A * np.exp(-alpha * log_x))
    variance, dof, note = noise_variance(xs, residuals, ws, 3 if exponent is None else 2, sigma_dof, pooling)
    return PowerLaw(
        E=E,
        A=A * math.exp(alpha * center),
        alpha=alpha,
        x=xs,
        y=ys,
        weights=ws,
        residuals=residuals,
        interval=None,
        note=note,
        variance=variance,
        dof=dof,
        fixed_alpha=exponent,
    )


def checked(name: str, values: npt.ArrayLike, *, positive: bool = True) -> Array:
    """Give values (n,) as float64. Raises ValueError that names the first value that cannot be used."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers ({error}).") from None
    if array.ndim != 1:
        raise ValueError(f"{name} must be a flat list with one value per point, got shape {array.shape}.")
    bad = ~np.isfinite(array) | (array <= 0 if positive else False)
    if np.any(bad):
        index = int(np.argmax(bad))
        what = "finite and positive" if positive else "finite"
        raise ValueError(f"{name}[{index}] must be {what}, got {array[index]}: leave that run out of the fit.")
    return array


def _centered_logs(x: Array) -> tuple[Array, float]:
    # Centered, because x of 1e9 to a power leaves E and A almost collinear.
    center = float(np.mean(np.log(x)))
    return np.log(x) - center, center


def _shortage(law: PowerLaw, sigma_dof: int) -> str:
    """Why the points cannot carry an interval, empty if they can."""
    # Repeated seeds add degrees of freedom, but only distinct sizes determine the curve.
    sizes, dof = len(np.unique(law.x)), len(law.x) + sigma_dof - law.parameters
    what = f"{law.parameters} constants"
    if law.fixed_alpha is not None:
        what += f" (alpha fixed at {law.fixed_alpha:g})"
    if sizes < MIN_SIZES:
        return f"Too few points for an interval: {sizes} distinct sizes for {what}; at least {MIN_SIZES} are needed."
    if dof < MIN_DOF:
        return (
            f"Too few points for an interval: {len(law.x)} points for {what} leave {dof} degree of freedom, and at least "
            f"{MIN_DOF} are needed; add a size or a second seed."
        )
    return ""


def _notes(law: PowerLaw) -> str:
    notes = [law.note] if law.note else []
    if law.A == 0.0:
        notes.append("The losses do not fall with size, so there is no limit to extrapolate to: E is their mean.")
    elif law.fixed_alpha is None and not ALPHA_BOUNDS[0] * 1.001 < law.alpha < ALPHA_BOUNDS[1] * 0.999:
        notes.append(f"The exponent is at its bound {law.alpha:g}: the points do not show a limit.")
    if law.E == 0.0:
        notes.append("The limit is at its bound 0: the points do not show a limit.")
    return " ".join(notes)


def _profile_interval(law: PowerLaw) -> dict[str, Interval]:
    tails = np.array(TAILS)
    ends = {
        "E": _profile_quantiles(law, tails, np.full(2, np.inf)),
        "A": _profile_quantiles(law, tails, np.ones(2), coefficient=True),
        "alpha": np.full(2, law.alpha) if law.fixed_alpha is not None else _alpha_ends(law),
    }
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _profile_quantiles(law: PowerLaw, probability: Array, x: Array, *, coefficient: bool = False) -> Array:
    """Give the quantiles of the law at x, or of A with `coefficient`."""
    # An end is where the profile's sum of squares reaches Student's quantile.
    log_x, center = _centered_logs(law.x)
    ends = profile(
        log_x,
        law.y,
        law.weights,
        law.alpha,
        ceiling=_ceiling(law, probability),
        log_target=np.log(x) - center,
        sign=np.where(probability < 0.5, -1.0, 1.0),
        alpha=law.fixed_alpha,
        coefficient=coefficient,
    )
    # For points exactly on the law the region is rounding noise and may be empty: return a zero-width interval.
    exact = np.full(x.shape, law.A) if coefficient else law.predict(x)
    return np.where(np.isfinite(ends), ends, exact)


def _alpha_ends(law: PowerLaw) -> Array:
    log_x, _ = _centered_logs(law.x)
    low, high = alpha_range(log_x, law.y, law.weights, law.alpha, _ceiling(law, np.array(TAILS[1:])))
    return np.array([low[0], high[0]])


def _ceiling(law: PowerLaw, probability: Array) -> Array:
    """The weighted sum of squares at the ends of an interval."""
    from scipy.special import stdtrit

    least = float(np.sum(law.weights * law.residuals**2))
    return np.asarray(least + stdtrit(law.dof, probability) ** 2 * law.variance)
