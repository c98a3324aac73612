"""Noise of the points of a law: variance, degrees of freedom, and whether it shrinks toward the limit.

Shapes: n points; `x`, `y`, `weights`, `residuals` and `log_x` (centered) are all (n,).
"""

import math

import numpy as np

from epochal.scaling.solve import Array, solve

# Seeds and sizes share one variance unless an F test says otherwise with at least this p-value. Not 0.05: with few sizes
# the test rarely detects a difference that exists. Pooling wrongly makes intervals too short (coverage 0.72 instead of
# 0.92 with four sizes and three seeds); separating wrongly only makes them wider.
POOLING = 0.5
# The same where seed noise visibly shrinks toward the limit: the seeds are then well modeled.
POOLING_SHRINKING = 0.05
# Log-likelihood ratio above which the seeds are taken to prefer noise that shrinks toward the limit.
SHRINKING_EVIDENCE = 2.0
EXCESS_ROUNDS = 4
EXCESS_FLOOR = 0.05


def noise_variance(
    x: Array, residuals: Array, weights: Array, parameters: int, sigma_dof: int, pooling: float
) -> tuple[float, int, str]:
    """Give the variance at weight 1, its degrees of freedom, and a note.

    Repeated seeds (or known errors, with `sigma_dof` degrees of freedom) measure seed noise. The deviation of sizes from
    the law also contains what seeds cannot show: tuning on a grid, model shape. Where it is significantly larger, seeds
    of one size are pseudo-replicates and only the sizes count.
    """
    from scipy.special import fdtrc

    groups = [x == size for size in np.unique(x)]
    # Weights from known errors are inverse variances, so each of their degrees of freedom adds a square of 1.
    total, within = float(np.sum(weights * residuals**2)) + sigma_dof, float(sigma_dof)
    for group in groups:
        w, r = weights[group], residuals[group]
        within += float(np.sum(w * (r - np.sum(w * r) / np.sum(w)) ** 2))
    # One-way analysis of variance: between sizes (about the law) and within sizes (about their means).
    dof_between, dof_within = len(groups) - parameters, len(x) - len(groups) + sigma_dof
    # Nothing to compare: either no repeated seeds, or as many constants as sizes.
    if dof_between <= 0 or dof_within == 0:
        dof = max(len(x) + sigma_dof - parameters, 0)
        return total / max(dof, 1), dof, ""
    between, pure = max(total - within, 0.0) / dof_between, within / dof_within
    if pure == 0.0 or fdtrc(dof_between, dof_within, between / pure) < pooling:
        note = "Sizes deviate from the law by more than their seeds do."
        return between, dof_between, note
    return total / (dof_between + dof_within), dof_between + dof_within, ""


def shrinking_weights(log_x: Array, y: Array, exponent: float | None) -> Array:
    """Give weights for noise proportional to the excess over the limit."""
    # Iterated reweighting: the excess depends on the fit, and the fit on the weights.
    weights = np.ones_like(y)
    for _ in range(EXCESS_ROUNDS):
        _, A, alpha, _ = solve(log_x, y[None], weights, alpha=exponent)
        excess = A[0] * np.exp(-alpha[0] * log_x)
        largest = float(np.max(excess))
        if largest == 0.0:
            return np.ones_like(y)
        # Without the floor the points nearest the limit would dominate the fit, though their excess is least certain.
        weights = largest**2 / (excess**2 + (EXCESS_FLOOR * largest) ** 2)
    return weights


def seeds_prefer(x: Array, y: Array, weights: Array) -> bool:
    """True if the scatter of seeds is more likely under `weights` than under equal weights."""
    even = weighted = log_weights = dof = 0.0
    for size in np.unique(x):
        group = x == size
        free = float(np.sum(group)) - 1
        squares = float(np.sum((y[group] - np.mean(y[group])) ** 2))
        weight = float(np.mean(weights[group]))
        dof, log_weights = dof + free, log_weights + free * math.log(weight)
        even, weighted = even + squares, weighted + weight * squares
    # Normal log-likelihoods with the variance at its optimum, which leaves the logarithm of the sums.
    return even > 0 and (dof * math.log(even / weighted) + log_weights) / 2 > SHRINKING_EVIDENCE
