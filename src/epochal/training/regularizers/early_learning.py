"""ELR: predictions are kept near their own running average over epochs (arXiv 2007.00151, published code).

    q <- b q + (1 - b) p / sum p,   loss + strength mean log(1 - <p, q>)

p is clamped to [1e-4, 1 - 1e-4], and q has no gradient. q starts at 0. n positions, V vocabulary.
"""

import torch
from torch import Tensor

CLAMP = 1e-4


def running_average(average: Tensor, probs: Tensor, momentum: float) -> Tensor:
    """Return the new q (n, V)."""
    probs = probs.detach()
    return momentum * average + (1.0 - momentum) * probs / probs.sum(dim=1, keepdim=True)


def early_learning_loss(probs: Tensor, average: Tensor) -> Tensor:
    """Return log(1 - <p, q>) for each position, (n,)."""
    # q is normalized but p, after the clamp, is not: their product may pass 1.
    return torch.log((1.0 - torch.sum(probs * average, dim=1)).clamp(min=CLAMP))
