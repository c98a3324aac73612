"""How likely more seeds or sizes settle a comparison, by simulation.

A comparison is settled when its 90% interval no longer contains zero. Every draw takes a truth from the posterior, adds
measurements from it to those that exist, and judges all of them as a report would.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from epochal.scaling.checks import compare_limits
from epochal.scaling.power import Interval, PowerLaw, fit_power_law
from epochal.scaling.seeds import gain_interval, seed_interval
from epochal.scaling.solve import Array

SEED_DRAWS, LAW_DRAWS = 400, 40


def settled(interval: Interval | None) -> bool:
    """Return True if an interval is known and does not contain zero."""
    return interval is not None and not interval[0] <= 0 <= interval[1]


def compare_seeds(losses: Mapping[Any, float], baseline: Mapping[Any, float]) -> Interval | None:
    """Give the 90% interval of the gain over a baseline: paired over shared seeds, Welch's without enough of them."""
    shared = sorted(set(losses) & set(baseline))
    if len(shared) > 2:
        return seed_interval([baseline[seed] - losses[seed] for seed in shared])
    return gain_interval(list(losses.values()), list(baseline.values()))


def seeds_to_settle(losses: Mapping[Any, float], baseline: Mapping[Any, float], more: int) -> float:
    """Give the probability that `more` seeds of both settle which mean is lower.

    Losses in nats by seed. Raises ValueError unless both have at least two seeds, shared or not.
    """
    if min(len(losses), len(baseline)) < 2:
        raise ValueError("one seed does not show how much seeds scatter: run a second seed of both first.")
    shared = sorted(set(losses) & set(baseline))
    rng = np.random.default_rng([7, more])
    if len(shared) > 1:
        gains = np.array([baseline[seed] - losses[seed] for seed in shared])
        samples = _more_seeds(gains, more, rng)
        return float(np.mean([settled(seed_interval(sample.tolist())) for sample in samples]))
    sides = [_more_seeds(np.array(list(side.values())), more, rng) for side in (losses, baseline)]
    return float(np.mean([settled(gain_interval(a.tolist(), b.tolist())) for a, b in zip(*sides, strict=True)]))


def _more_seeds(values: Array, more: int, rng: np.random.Generator) -> Array:
    """Add simulated values to those measured, (draws, seeds); flat prior of the mean, 1 / sigma of the scatter."""
    n = len(values)
    sigma = math.sqrt(float(np.sum((values - np.mean(values)) ** 2))) / np.sqrt(rng.chisquare(n - 1, SEED_DRAWS))
    mean = np.mean(values) + sigma * rng.standard_normal(SEED_DRAWS) / math.sqrt(n)
    new = mean[:, None] + sigma[:, None] * rng.standard_normal((SEED_DRAWS, more))
    return np.concatenate([np.tile(values, (SEED_DRAWS, 1)), new], axis=1)


def laws_to_settle(a: PowerLaw, b: PowerLaw, *, more_seeds: int = 0, sizes: Sequence[float] = ()) -> float:
    """Give the probability that more measurements settle which of two limits is lower.

    `more_seeds` of every size of both laws, and as many seeds as a size has now at new `sizes`. Raises ValueError for a
    law without a posterior.
    """
    for law in (a, b):
        if law.posterior is None:
            raise ValueError(f"a law has no interval to start from: {law.note}")
    rng = np.random.default_rng([8, more_seeds, len(sizes)])
    count = 0
    for _ in range(LAW_DRAWS):
        first, second = (_extended(law, more_seeds, sizes, rng) for law in (a, b))
        count += settled(compare_limits(first, second).interval)
    return count / LAW_DRAWS


def _extended(law: PowerLaw, more_seeds: int, sizes: Sequence[float], rng: np.random.Generator) -> PowerLaw:
    """Refit a law with simulated measurements from one draw of its posterior."""
    assert law.posterior is not None
    draw = int(rng.integers(len(law.posterior.E)))
    sigma, tau = law.posterior.sigma[draw], law.posterior.tau[draw]
    x, y = [law.x], [law.y]
    known, counts = np.unique(law.x, return_counts=True)
    for size, n in zip(known.tolist(), counts.tolist(), strict=True):
        # What a size deviates from the law by is in its measured mean already.
        mean = np.mean(law.y[law.x == size]) + sigma * rng.standard_normal() / math.sqrt(n)
        x.append(np.full(more_seeds, size))
        y.append(mean + sigma * rng.standard_normal(more_seeds))
    seeds = max(round(float(np.mean(counts))) + more_seeds, 1)
    for size in sizes:
        mean = law.posterior.at(np.array([size]))[0, draw] + tau * rng.standard_normal()
        x.append(np.full(seeds, size))
        y.append(mean + sigma * rng.standard_normal(seeds))
    return fit_power_law(np.concatenate(x), np.concatenate(y), exponent=law.fixed_alpha)
