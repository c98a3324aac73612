"""Stochastic depth: the output of a residual block is left out for a whole sequence (arXiv 1603.09382).

y = x + f(x) m / (1 - p) with m = 0 with probability p. p rises linearly with the layer (section 3 of the paper). The factor
1 / (1 - p) makes the expectation that of the whole model, so evaluation changes nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def skip_share(layer: int, layers: int, share: float) -> float:
    """Return the probability that the blocks of a layer are skipped; layers count from 1."""
    return share * layer / layers


def keep_factors(seeds: Sequence[int], share: float) -> Tensor:
    """Return 0 or 1 / (1 - share) for each row, float32, by its seed."""
    draws = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (torch.stack(draws) >= share).float() / (1.0 - share)
