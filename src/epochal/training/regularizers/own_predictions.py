"""PS-KD: the model's predictions of the epoch before are its soft targets (arXiv 2006.12000, published code).

The target of a position in epoch t of T, counted from 0, is (1 - a_t) y + a_t p_{t-1} with a_t = weight (t + 1) / T. There is no
prediction before epoch 0, so a_0 = 0. n positions, V vocabulary.
"""

import torch
from torch import Tensor


def weight_at(epoch: int, epochs: int, weight: float) -> float:
    """Return a_t."""
    return weight * (epoch + 1) / epochs if epoch else 0.0


def soft_target_loss(log_probs: Tensor, targets: Tensor, previous: Tensor, weight: float) -> Tensor:
    """Return the cross-entropy (n,) to (1 - weight) y + weight `previous`.

    log_probs (n, V) are those of the model, `previous` (n, V) a distribution, targets (n,) int64.
    """
    labels = log_probs.gather(1, targets[:, None])[:, 0]
    return -(1.0 - weight) * labels - weight * torch.sum(previous * log_probs, dim=1)
