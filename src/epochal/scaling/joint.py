"""The double limit of members and size: K -> inf, then N -> inf.

Source: section 7 of the companion notes to "Pre-training under infinite compute": fit a law in K at every N, take the limits, and
fit a law in N through them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import TAILS, Interval, PowerLaw, checked, fit_power_law
from epochal.scaling.solve import Array

# Below it, simulated double limits had intervals of 4 nats, or missed the truth (four sizes over a factor of 15).
MIN_SIZES, MIN_FACTOR = 6, 60.0
SMALLEST_SIGMA = 1e-9  # nats; noiseless curves would otherwise get infinite weight


@dataclass(frozen=True, eq=False)
class JointLaw:
    """The double limit E with its 90% interval, or None and a note."""

    E: float
    interval: dict[str, Interval] | None
    note: str
    inner: Mapping[float, PowerLaw] = field(repr=False)  # laws in K, by N
    outer: PowerLaw | None = field(repr=False)  # law in N through their limits; None if there are too few


def fit_joint(
    N: npt.ArrayLike,
    K: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    sigma: npt.ArrayLike | None = None,
    sigma_dof: int = 0,
    alpha_K: float | None = None,
) -> JointLaw:
    """Fit the double limit, K -> inf and then N -> inf, of ensemble losses.

    N: parameters per member in any unit; K: members; loss in nats per token; all (n,). K = `math.inf` marks a loss that
    already is a limit in K; `sigma` are standard errors of such limits in nats, with `sigma_dof` degrees of freedom in
    all (`fit_members` gives both). Losses of subsets of one set of members are not independent: pass their limits
    instead. `alpha_K` fixes the exponent of the laws in K (1.0: independent members). Each N needs at least three K
    (two with `alpha_K`), or K = inf.

    Raises ValueError for values that cannot be used and fewer than two N with a limit.
    """
    Ns, losses = checked("N", N), checked("loss", loss)
    Ks = np.asarray(K, dtype=np.float64)
    if not len(Ns) == len(losses) == Ks.size or Ks.ndim != 1:
        raise ValueError(
            f"N, K and loss have {len(Ns)}, {Ks.size} and {len(losses)} values: give one of each per point."
        )
    if not np.all(Ks >= 1):
        raise ValueError(f"K must be at least 1 (math.inf for a limit), got K = {Ks[~(Ks >= 1)][0]}.")
    if sigma is not None and not (np.all(np.isinf(Ks)) and np.shape(sigma) == losses.shape):
        raise ValueError("sigma must have one value per loss, and all losses must be limits (K = inf).")

    limits, inner = _inner_limits(Ns, Ks, losses, alpha_K)
    lowest = min(limits.values(), default=0.0)
    if len(limits) < 2:
        raise ValueError("Fewer than two N have a limit in K: give three K (or K = inf) for two or more N.")
    if len(limits) < 3:
        # A law in N has three constants.
        note = f"Only {len(limits)} sizes have a limit, too few for a law in N; E is the lowest limit in K."
        return JointLaw(lowest, None, note, inner, None)
    if lowest <= 0:
        note = "A limit in K is at its bound 0, so no law in N can be fitted: add points or fix alpha_K."
        return JointLaw(lowest, None, note, inner, None)

    # The limits in K are points with known errors. `fit_power_law` pools these with the scatter about the law in N,
    # unless the limits scatter more than their errors explain (`benchmarks/coverage.csv` has the coverage of laws in N).
    if sigma is not None:
        first = [int(np.flatnonzero(Ns == size)[0]) for size in limits]
        sigma = checked("sigma", sigma)[first]
    elif set(inner) == set(limits) and all(law.profile for law in inner.values()):
        sigma, sigma_dof = _inner_sigma(list(inner.values()))
    outer = fit_power_law(list(limits), list(limits.values()), sigma=sigma, sigma_dof=sigma_dof)
    factor = max(limits) / min(limits)
    # A hair below, because sizes are rounded.
    if len(limits) < MIN_SIZES or factor < 0.99 * MIN_FACTOR:
        note = (
            f"open: needs at least {MIN_SIZES} sizes over a factor of {MIN_FACTOR:g}, got {len(limits)} over a factor of "
            f"{factor:.3g}."
        )
        return JointLaw(outer.E, None, note, inner, outer)
    unsure = [f"{size:g}" for size, law in inner.items() if law.interval is None]
    note = outer.note
    if outer.interval is not None and unsure:
        note = f"{note} The laws in K at N = {', '.join(unsure)} have too few points for an interval.".strip()
    return JointLaw(outer.E, outer.interval, note, inner, outer)


def _inner_limits(
    Ns: Array, Ks: Array, losses: Array, alpha_K: float | None
) -> tuple[dict[float, float], dict[float, PowerLaw]]:
    limits: dict[float, float] = {}
    laws: dict[float, PowerLaw] = {}
    for size in np.unique(Ns).tolist():
        given, rows = (Ns == size) & np.isinf(Ks), (Ns == size) & np.isfinite(Ks)
        if given.any():
            # Given limits are preferred: `fit_members` knows that subsets share members, a fit of raw losses does
            # not.
            limits[size] = float(np.mean(losses[given]))
        elif len(np.unique(Ks[rows])) >= (2 if alpha_K is not None else 3):
            laws[size] = fit_power_law(Ks[rows], losses[rows], exponent=alpha_K)
            limits[size] = laws[size].E
    return limits, laws


def _inner_sigma(laws: list[PowerLaw]) -> tuple[Array, int]:
    """Give standard errors of the limits of laws, and their degrees of freedom in all."""
    from scipy.special import stdtrit

    # One curve alone estimates its noise badly (two or three degrees of freedom), so all curves share one variance.
    dof = sum(law.dof for law in laws)
    pooled = sum(law.variance * law.dof for law in laws) / dof
    sigma = []
    for law in laws:
        assert law.profile is not None
        low, high = law.profile["E"]
        # Half of the interval divided by its quantile, then rescaled to the shared variance.
        error = (high - low) / (2 * float(stdtrit(law.dof, TAILS[1])))
        sigma.append(error * np.sqrt(pooled / law.variance) if law.variance > 0 else 0.0)
    return np.maximum(sigma, SMALLEST_SIGMA), dof
