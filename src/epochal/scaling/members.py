"""The limit of adding members, from the losses of subsets.

The law is `E + A / K + B / K**2`.

Losses of 1, 2, ..., K members are not independent points: all come from one set of K models. The interval here is a
jackknife over members, and contains the spread over three forms of the law.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epochal.scaling.checks import HeldOut
from epochal.scaling.power import TAILS, Interval, fit_constants
from epochal.scaling.solve import Array

MIN_MEMBERS = 4
LINE, QUADRATIC, FREE = "E + A/K", "E + A/K + B/K^2", "E + A/K^alpha"
Curve = Mapping[int, Sequence[float]]
Law = Callable[[npt.ArrayLike], Array]  # members to losses


@dataclass(frozen=True, eq=False)
class MembersLaw:
    """The law `E + A / K + B / K**2` of some members."""

    E: float  # the limit in nats per token
    A: float
    B: float  # 0 for curves of two K
    interval: dict[str, Interval] | None  # E to its 90% interval: jackknife and spread over forms; or None
    note: str  # why there is no interval
    dof: int  # K - 1
    laws: dict[str, Law] = field(repr=False)  # the fitted forms by name; QUADRATIC is this law
    error: float = math.nan  # standard error of E in nats; nan where unknown
    replicates: Array = field(default_factory=lambda: np.empty((0, 2)), repr=False)  # (K, 2): E and A of LINE refitted

    @property
    def forms(self) -> dict[str, float]:
        """The limit under each form."""
        return {name: float(law(math.inf)) for name, law in self.laws.items()}

    @property
    def spread(self) -> float:
        """The largest limit over forms minus the smallest, in nats."""
        return max(self.forms.values()) - min(self.forms.values())

    def predict(self, k: npt.ArrayLike) -> Array:
        """Evaluate the law at k members (`math.inf` gives E)."""
        u = 1.0 / np.asarray(k, dtype=np.float64)
        return np.asarray(self.E + self.A * u + self.B * u**2)

    def quantiles(self, probability: npt.ArrayLike, k: npt.ArrayLike) -> Array:
        """Give quantiles of the confidence distribution at k, nan without an interval; the arguments broadcast."""
        from scipy.special import stdtrit

        if self.interval is None:
            return np.full(np.broadcast_shapes(np.shape(probability), np.shape(k)), np.nan)
        return np.asarray(self.predict(k) + stdtrit(self.dof, probability) * self._error(k))

    def predict_interval(self, k: npt.ArrayLike) -> tuple[Array, Array]:
        """Give both ends of the pointwise 90% band at k members, nan without an interval."""
        return self.quantiles(TAILS[0], k), self.quantiles(TAILS[1], k)

    def _error(self, k: npt.ArrayLike) -> Array:
        """Give the standard error at k: the jackknife of LINE, and half the spread over forms as half an interval."""
        from scipy.special import stdtrit

        # The jackknife of the quadratic itself covered 0.98 to 0.99 with four members: without one of them its three
        # constants have three points. The line varies as members vary, and the spread shows what its form misses.
        E, A = self.replicates.T
        jackknife = jackknife_error(E + A / np.asarray(k, np.float64)[..., None])
        values = np.stack([law(k) for law in self.laws.values()])
        return np.asarray(np.hypot(jackknife, np.ptp(values, axis=0) / 2 / float(stdtrit(self.dof, TAILS[1]))))


def fit_members(losses: Curve, without: Curve | None = None) -> MembersLaw:
    """Fit the law in K to the mean loss at each k; `E + A / k` with two k.

    `losses` maps k to the losses of subsets of k members, in nats per token.
    `without[k][i]` is the mean loss of k members drawn without member i, as records of ensembles store it. If None, it is
    derived from `losses`, which must then be those of the k consecutive members from each start on a circle. Raises
    ValueError for values that cannot be used and fewer than two k.

    Averaged logits fall like 1 / K to within 0.001 nats; averaged probabilities fell with an exponent of 0.65 to 0.95 in
    34 of 34 measured curves, which one more term describes (`benchmarks/coverage.csv` has the coverage of the interval).
    """
    count = max(losses, default=0)
    means = {k: float(np.mean(subsets)) for k, subsets in sorted(losses.items())}
    laws = _fit_forms(means)
    E, A, B = _quadratic(means)
    curves = _leave_one_out(count, _from_circle(count, losses) if without is None else without)
    if count < MIN_MEMBERS:
        note = f"Too few members for an interval: {count}, and at least {MIN_MEMBERS} are needed."
    elif not curves:
        note = "No interval: all K share members, and the losses without each member are not known."
    else:
        # The scatter about the law does not show how much another draw of members would differ: intervals from it
        # missed the limit of most simulated ensembles (`naive` in benchmarks/coverage.csv). Leaving members out does.
        replicates = np.array([_line(curve) for curve in curves])
        law = MembersLaw(E, A, B, {}, "", count - 1, laws, math.nan, replicates)
        low, high = (float(end) for end in law.predict_interval(math.inf))
        return MembersLaw(E, A, B, {"E": (low, high)}, "", count - 1, laws, float(law._error(math.inf)), replicates)
    return MembersLaw(E, A, B, None, note, max(count - 1, 0), laws)


def predict_members(losses: Curve, *, upto: int | None = None) -> HeldOut:
    """Predict the mean loss of the largest K from smaller ones.

    With `upto` only from those up to it.

    Raises ValueError with fewer than two smaller K.
    """
    largest = max(losses, default=0)
    means = {
        k: float(np.mean(subsets)) for k, subsets in sorted(losses.items()) if k < largest and (not upto or k <= upto)
    }
    if len(means) < 2:
        raise ValueError(f"Predicting K = {largest} needs two smaller K, got {len(means)}: add ensembles.")
    E, A, B = _quadratic(means)
    return HeldOut(largest, E + A / largest + B / largest**2, float(np.mean(losses[largest])), E)


def _fit_forms(means: Mapping[int, float]) -> dict[str, Law]:
    """Fit the three forms, or only those that the number of K determines."""
    fits = {LINE: (*_line(means), 0.0, 1.0)}
    if len(means) > 2:
        free = fit_constants(list(means), list(means.values()))
        fits[QUADRATIC] = (*_quadratic(means), 1.0)
        fits[FREE] = (free.E, free.A, 0.0, free.alpha)

    def law(E: float, A: float, B: float, alpha: float) -> Law:
        return lambda k: E + A * np.asarray(k, np.float64) ** -alpha + B * np.asarray(k, np.float64) ** -2.0

    return {name: law(*constants) for name, constants in fits.items()}


def _line(means: Mapping[int, float]) -> tuple[float, float]:
    law = fit_constants(list(means), list(means.values()), exponent=1.0)
    return law.E, law.A


def _quadratic(means: Mapping[int, float]) -> tuple[float, float, float]:
    """Fit E, A and B by least squares; B = 0 with two K."""
    if len(means) < 3:
        return (*_line(means), 0.0)
    u = 1.0 / np.array(list(means))
    E, A, B = np.linalg.lstsq(np.stack([np.ones(len(u)), u, u**2], axis=1), np.array(list(means.values())))[0].tolist()
    return E, A, B


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


def jackknife_error(replicates: npt.ArrayLike) -> Array:
    """Give the standard error from leave-one-out values (..., K).

    It is sqrt((K - 1) / K * sum of squared deviations).
    """
    values = np.asarray(replicates, np.float64)
    return np.asarray(np.sqrt((values.shape[-1] - 1) * np.var(values, axis=-1)))
