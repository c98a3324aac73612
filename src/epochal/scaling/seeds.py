"""Intervals over seeds: of a mean, of a gain over an unpaired baseline, and what the choice of a setting adds."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import TAILS, Interval, checked

MIN_SEEDS = 3  # two repetitions have one degree of freedom: their interval is 6.3 times an accident
NORMAL = 1.6448536269514722  # 95% quantile of the normal distribution


def search_noise(tied: Sequence[float]) -> float:
    """Give the standard deviation over settings that tie with the optimum, in nats; 0 for fewer than two.

    `tied` are the mean losses of the optimum and of those neighbors that are not worse by more than noise. Another seed
    would have picked another of them, which seeds of the picked one cannot show.
    """
    return float(np.std(tied, ddof=1)) if len(tied) > 1 else 0.0


def seed_interval(losses: Sequence[float], *, search: float = 0.0) -> Interval | None:
    """Give Student's 90% interval of the mean over seeds; None for fewer than three.

    `search` is a standard deviation in nats that seeds do not show (`search_noise`); it is added in quadrature.
    """
    from scipy.special import stdtrit

    values = checked("losses", losses, positive=False)
    if len(values) < MIN_SEEDS:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half_width = math.hypot(float(stdtrit(len(values) - 1, TAILS[1])) * error, NORMAL * search)
    mean = float(np.mean(values))
    return mean - half_width, mean + half_width


def gain_interval(losses: Sequence[float], baseline: Sequence[float], *, search: float = 0.0) -> Interval | None:
    """Give Welch's 90% interval of mean(baseline) - mean(losses); positive means that the losses are better.

    For seeds that are not paired. None where a side has one seed, or Welch's degrees of freedom are below two. `search` is
    that of `seed_interval`, of both sides together.
    """
    from scipy.special import stdtrit

    sides = [checked(name, values, positive=False) for name, values in (("losses", losses), ("baseline", baseline))]
    if min(map(len, sides)) < 2:
        return None
    dof = welch_dof(losses, baseline)
    if dof < 2:
        return None
    half_width = math.hypot(float(stdtrit(dof, TAILS[1])) * math.sqrt(sum(map(_mean_variance, sides))), NORMAL * search)
    gain = float(np.mean(sides[1]) - np.mean(sides[0]))
    return gain - half_width, gain + half_width


def welch_dof(losses: Sequence[float], baseline: Sequence[float]) -> float:
    """Give Welch's degrees of freedom of a difference of means; 0 where a side has one value."""
    sides = losses, baseline
    if min(map(len, sides)) < 2:
        return 0.0
    variances = [_mean_variance(side) for side in sides]
    parts = sum(v**2 / (len(side) - 1) for v, side in zip(variances, sides, strict=True))
    return sum(variances) ** 2 / parts if parts > 0 else float(sum(map(len, sides)) - 2)


def _mean_variance(values: npt.ArrayLike) -> float:
    """Give the variance of the mean over seeds."""
    array = np.asarray(values, np.float64)
    return float(np.var(array, ddof=1)) / array.size


def seed_caveats(differences: Sequence[float], *, search: float = 0.0) -> tuple[str, ...]:
    """Why the sign of a mean difference over seeds is uncertain: "one seed", "two seeds", "within noise", or nothing."""
    interval = seed_interval(differences, search=search)
    if interval is None:
        return ("one seed" if len(differences) == 1 else "two seeds",)
    return ("within noise",) if interval[0] <= 0 <= interval[1] else ()
