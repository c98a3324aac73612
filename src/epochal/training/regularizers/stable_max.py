"""StableMax: probabilities s(z) / sum s(z) (arXiv 2501.04697, published code).

s(z) = z + 1 for z >= 0 and 1 / (1 - z) below. It is the softmax of log s(z) = sign(z) log(1 + |z|).
"""

import torch
from torch import Tensor


def stable_logits(logits: Tensor) -> Tensor:
    """Return log s(z), whose softmax is StableMax."""
    return torch.sign(logits) * torch.log1p(logits.abs())
