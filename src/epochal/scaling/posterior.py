"""The posterior of a power law on a grid, with scatter between sizes.

The model of seed j at size i: `loss = E + A / x_i**alpha + tau * a_i + sigma * b_ij`, a and b standard normal. Priors: flat
in the loss at the largest size and in the drop from the smallest size to the largest; lognormal in alpha; 1 / sigma; and
for tau / sigma either zero (in 3 of 8) or half-normal. At a given alpha and tau / sigma the rest is linear regression in
closed form, so only these two are on a grid. Draws from it answer every question: the limit, a prediction, a comparison.
The scales below were chosen by coverage over exponents of 0.2 to 1 (`benchmarks/coverage.csv`).
"""

from dataclasses import dataclass

import numpy as np

from epochal.scaling.solve import Array

ALPHA_MEDIAN, ALPHA_SPREAD = 0.5, 1.0  # of the lognormal prior; its central 90% is 0.10 to 2.6
BETWEEN = 12.0  # scale of tau / sigma: sizes of committed campaigns scattered by 5 to 10 times their seeds
ALPHAS, RATIOS, ZOOMS, DRAWS = 64, 16, 8, 4000
ZEROS = 6  # of the RATIOS: tau = 0, where nothing but seeds scatters
NEGLIGIBLE = 1e-6  # of the highest weight


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws of the constants of a law, all (draws,); only those with A > 0."""

    E: Array
    A: Array
    alpha: Array
    sigma: Array  # of one seed of weight 1, in nats
    tau: Array  # between sizes, in nats

    def at(self, x: Array) -> Array:
        """Give the law at x (...,) in every draw, (..., draws); `math.inf` gives E."""
        return np.asarray(self.E + np.exp(np.log(self.A) - self.alpha * np.log(x)[..., None]))

    def measured_at(self, x: Array, seeds: int) -> Array:
        """Return the mean of new seeds at a new size x, (..., draws)."""
        values = self.at(x)
        spread = np.sqrt(self.tau**2 + self.sigma**2 / seeds)
        return np.asarray(values + spread * np.random.default_rng(1).standard_normal(values.shape))


def sample_posterior(
    x: Array, y: Array, weights: Array, *, alpha: float | None = None, sigma_dof: int = 0, between: float | None = None
) -> Posterior:
    """Draw from the posterior of points x, y, weights (n,); the same points give the same draws.

    `alpha` fixes the exponent. `sigma_dof` are the degrees of freedom of known errors, whose inverse squares the weights
    then are. `between` is the scale of tau in nats; it needs seeds (or `sigma_dof`), without which tau and sigma are one.
    """
    from scipy.special import ndtri

    rng = np.random.default_rng(0)
    sizes, group = np.unique(x, return_inverse=True)
    log_x = np.log(sizes) - np.mean(np.log(sizes))  # centered, because units must not matter
    S = np.bincount(group, weights)
    means = np.bincount(group, weights * y) / S
    within = float(np.sum(weights * (y - means[group]) ** 2)) + sigma_dof
    free = len(x) + sigma_dof - 2  # E and A are integrated in closed form
    unit = 1.0 / float(np.mean(weights))  # variance at sigma = 1 of the seeds that weigh most
    within_dof = len(x) - len(sizes) + sigma_dof
    # Points of equal probability of the half-normal; ZEROS of them are zero under the default.
    zeros = ZEROS if between is None or within == 0 or within_dof == 0 else 0
    scale = BETWEEN if between is None or zeros else between / np.sqrt(unit * within / within_dof)
    count = RATIOS - zeros
    ratios = np.append(np.zeros(zeros), scale * ndtri(0.5 + (np.arange(count) + 0.5) / (2 * count)))
    W = S / (1 + unit * ratios[:, None] ** 2 * S)  # (ratios, sizes): weight of a size's mean
    # Points exactly on a law have no noise, and their variance is rounding.
    floor = 1e-20 * float(np.sum(S * means**2))

    def regression(u: Array, W: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
        """Regress the means on u (..., sizes): total weight, mean of u, its spread, level, slope, sum of squares."""
        total = np.sum(W, axis=-1)
        center, level = np.sum(W * u, axis=-1) / total, np.sum(W * means, axis=-1) / total
        du, dy = u - center[..., None], means - level[..., None]
        spread = np.sum(W * du**2, axis=-1)
        slope = np.sum(W * du * dy, axis=-1) / spread
        rest = np.sum(W * (dy - slope[..., None] * du) ** 2, axis=-1)
        return total, center, spread, level, slope, np.maximum(within + rest, floor)

    def log_weight(log_alpha: Array) -> Array:
        """Give the log of posterior times grid density, (alphas, ratios)."""
        u = np.exp(-np.exp(log_alpha)[:, None] * log_x)
        total, _, spread, _, _, rest = regression(u[:, None, :], W)
        log_u_range = np.log(u[:, 0] - u[:, -1])  # from flat in E and A to flat in the loss and its drop
        prior = log_u_range - 0.5 * ((log_alpha - np.log(ALPHA_MEDIAN)) / ALPHA_SPREAD) ** 2
        scale_of_means = 0.5 * np.sum(np.log(W), axis=-1) - 0.5 * np.log(total * spread)
        return np.asarray(prior[:, None] + scale_of_means - free / 2 * np.log(rest))

    log_alpha, half_cell = np.array([np.log(alpha or 1.0)]), 0.0
    if alpha is None:
        low, high = (np.log(ALPHA_MEDIAN) + side * 3.5 * ALPHA_SPREAD for side in (-1, 1))
        for _ in range(ZOOMS):
            log_alpha = np.linspace(low, high, ALPHAS)
            best = np.max(log_weight(log_alpha), axis=1)
            inside = np.flatnonzero(best > np.max(best) + np.log(NEGLIGIBLE))
            if len(inside) > ALPHAS / 3:
                break
            low, high = log_alpha[max(inside[0] - 1, 0)], log_alpha[min(inside[-1] + 1, ALPHAS - 1)]
        half_cell = float(log_alpha[1] - log_alpha[0]) / 2
    log_weights = log_weight(log_alpha)
    cumulative = np.cumsum(np.exp(log_weights - np.max(log_weights)))
    picks = np.searchsorted(cumulative, cumulative[-1] * (np.arange(DRAWS) + rng.random(DRAWS)) / DRAWS)
    cell, ratio = np.divmod(np.minimum(picks, log_weights.size - 1), RATIOS)
    alphas = np.exp(log_alpha[cell] + half_cell * rng.uniform(-1, 1, DRAWS))
    total, center, spread, level, slope, rest = regression(np.exp(-alphas[:, None] * log_x), W[ratio])
    sigma = np.sqrt(rest / rng.chisquare(free, DRAWS))
    A = slope + sigma * rng.standard_normal(DRAWS) / np.sqrt(spread)
    E = level + sigma * rng.standard_normal(DRAWS) / np.sqrt(total) - A * center
    kept = A > 0
    A_at_one = A[kept] * np.exp(alphas[kept] * float(np.mean(np.log(sizes))))
    tau = (sigma * ratios[ratio] * np.sqrt(unit))[kept]
    return Posterior(E[kept], A_at_one, alphas[kept], sigma[kept], tau)
