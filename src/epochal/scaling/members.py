"""The limit of adding members, `E + A / K`, from losses of subsets.

Losses of 1, 2, ..., K members are not independent points: all come from one set of K models. The interval here is a
jackknife over members.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import TAILS, Interval, PowerLaw, fit_constants
from epochal.scaling.solve import Array

MIN_MEMBERS = 4
EXPONENT = 1.0  # of independently trained members; section 6 of "Pre-training under infinite compute" fits 1.0 to 1.1
Curve = Mapping[int, Sequence[float]]


@dataclass(frozen=True, eq=False)
class MembersLaw:
    """The law in K of one set of members."""

    law: PowerLaw  # the fit to the means at each K, without an interval
    interval: dict[str, Interval] | None  # E, A and alpha to their 90% jackknife intervals, or None
    note: str  # why there is no interval
    dof: int  # K - 1
    error: float = math.nan  # standard error of E in nats; nan where unknown
    # (K, 2): E and A refitted without each member
    replicates: Array = field(default_factory=lambda: np.empty((0, 2)), repr=False)

    @property
    def E(self) -> float:  # noqa: N802 - named like the constant
        """The limit in nats per token."""
        return self.law.E

    def predict(self, k: npt.ArrayLike) -> Array:
        """Evaluate the law at k members (`math.inf` gives E)."""
        return self.law.predict(k)

    def quantiles(self, probability: npt.ArrayLike, k: npt.ArrayLike) -> Array:
        """Give quantiles of the confidence distribution at k, nan without an interval; the arguments broadcast."""
        from scipy.special import stdtrit

        if self.interval is None:
            return np.full(np.broadcast_shapes(np.shape(probability), np.shape(k)), np.nan)
        E, A = self.replicates.T
        error = _jackknife_error(E + A * np.exp(-EXPONENT * np.log(np.asarray(k, np.float64)))[..., None])
        return np.asarray(self.predict(k) + stdtrit(self.dof, probability) * error)

    def predict_interval(self, k: npt.ArrayLike) -> tuple[Array, Array]:
        """Give both ends of the pointwise 90% band at k members, nan without an interval."""
        return self.quantiles(TAILS[0], k), self.quantiles(TAILS[1], k)


def fit_members(losses: Curve, without: Curve | None = None) -> MembersLaw:
    """Fit `E + A / k` to the mean loss at each k.

    `losses` maps k to the losses of subsets of k members, in nats per token.
    `without[k][i]` is the mean loss of k members drawn without member i, as records of ensembles store it. If None, it is
    derived from `losses`, which must then be those of the k consecutive members from each start on a circle. Raises
    ValueError for values that cannot be used and fewer than two k.
    """
    from scipy.special import stdtrit

    count = max(losses, default=0)
    law = _fit({k: float(np.mean(subsets)) for k, subsets in losses.items()})
    curves = _leave_one_out(count, _from_circle(count, losses) if without is None else without)
    if count < MIN_MEMBERS:
        note = f"Too few members for an interval: {count}, and at least {MIN_MEMBERS} are needed."
    elif not curves:
        note = "No interval: all K share members, and the losses without each member are not known."
    else:
        # The scatter about the law does not show how much another draw of members would differ: intervals from it
        # covered the limit in 0% to 24% of simulated ensembles (`naive_E` in benchmarks/laws.csv). Leaving members
        # out does.
        fits = [_fit(curve) for curve in curves]
        replicates = np.array([[fit.E, fit.A] for fit in fits])
        errors = _jackknife_error(replicates.T)
        half_E, half_A = (float(stdtrit(count - 1, TAILS[1])) * errors).tolist()
        interval = {
            "E": (law.E - half_E, law.E + half_E),
            "A": (law.A - half_A, law.A + half_A),
            # Fixed, not estimated.
            "alpha": (EXPONENT,) * 2,
        }
        return MembersLaw(law, interval, "", count - 1, float(errors[0]), replicates)
    return MembersLaw(law, None, note, max(count - 1, 0))


def _fit(curve: Mapping[int, float]) -> PowerLaw:
    return fit_constants(list(curve), list(curve.values()), exponent=EXPONENT)


def _leave_one_out(count: int, without: Curve) -> list[dict[int, float]]:
    """The curve without each member; empty if unknown."""
    usable = {k: losses for k, losses in without.items() if len(losses) == count}
    if len(usable) < 2:
        return []
    return [{k: losses[member] for k, losses in usable.items()} for member in range(count)]


def _from_circle(count: int, losses: Curve) -> dict[int, list[float]]:
    """Mean losses without each member; subset `start` of k members is start, ..., start + k - 1."""
    without = {}
    for k, subsets in losses.items():
        if k < count and len(subsets) == count:
            starts = [[start for start in range(count) if (member - start) % count >= k] for member in range(count)]
            without[k] = [float(np.mean([subsets[start] for start in kept])) for kept in starts]
    return without


def _jackknife_error(replicates: Array) -> Array:
    """Standard error from leave-one-out values along the last axis: sqrt((K - 1) / K * sum of squared deviations)."""
    return np.asarray(np.sqrt((replicates.shape[-1] - 1) * np.var(replicates, axis=-1)))
