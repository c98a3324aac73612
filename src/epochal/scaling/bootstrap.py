"""Bootstrap intervals of a power law, to compare with the profile intervals (`benchmarks/laws.csv` has both)."""

import numpy as np

from epochal.scaling.power import TAILS, Interval, PowerLaw
from epochal.scaling.solve import Array, solve


def bootstrap_interval(law: PowerLaw, *, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Give 90% percentile intervals of E, A and alpha from refits of resampled data.

    Every data set is the law plus resampled residuals with random signs. Raises ValueError if the law has no interval.
    """
    if law.interval is None:
        raise ValueError(f"The law has too few points to resample: {law.note}")
    rng = np.random.default_rng(seed)
    x, y, weights = _independent_points(law)
    center = float(np.mean(np.log(law.x)))
    log_x = np.log(x) - center
    fitted = law.E + law.A * np.exp(-law.alpha * center) * np.exp(-law.alpha * log_x)
    standard = (y - fitted) * np.sqrt(weights)
    # Residuals of a fit are too small by dof / n.
    size = np.sqrt(np.mean(standard**2))
    standard = standard * (np.sqrt(law.variance) / size if size > 0 else 0.0)
    picks = rng.integers(len(standard), size=(draws, len(standard)))
    signs = rng.choice([-1.0, 1.0], size=picks.shape)
    # Their variance is itself an estimate: sqrt(dof / chi-squared) turns normal tails into Student's.
    scale = np.sqrt(law.dof / rng.chisquare(law.dof, size=(draws, 1)))
    data = fitted + scale * signs * standard[picks] / np.sqrt(weights)
    E, A, alpha, _ = solve(log_x, data, weights, alpha=law.fixed_alpha)
    constants = {"E": E, "A": A * np.exp(alpha * center), "alpha": alpha}
    ends = {name: np.quantile(values, TAILS) for name, values in constants.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _independent_points(law: PowerLaw) -> tuple[Array, Array, Array]:
    """Return the points, or the mean of each size if seeds are not independent."""
    # The latter where the noise estimate rests on sizes alone; see `noise_variance`.
    if law.dof >= len(law.x) - law.parameters:
        return law.x, law.y, law.weights
    sizes = np.unique(law.x)
    weights = np.array([np.sum(law.weights[law.x == size]) for size in sizes])
    sums = np.array([np.sum((law.weights * law.y)[law.x == size]) for size in sizes])
    return sizes, sums / weights, weights
