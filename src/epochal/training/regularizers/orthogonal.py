"""perpGrad: steps that are orthogonal to the weights and so do not change their norm to first order (arXiv 2501.04697).

g' = (g - <w, g> / <w, w> w) |g| / |g - <w, g> / <w, w> w| for each matrix w (published code). "update" applies it to what an
optimizer adds to a matrix, its decay apart: under Adam an orthogonal gradient does not give an orthogonal update.
"""

import torch
from torch import Tensor

from epochal.training.regularizers.moved import TINY


def orthogonal(g: Tensor, w: Tensor) -> Tensor:
    """Return g' of the same shape, orthogonal to w, with the norm of g."""
    rest = g - w * ((w * g).sum() / ((w * w).sum() + TINY))
    factor: Tensor = torch.linalg.vector_norm(g) / (torch.linalg.vector_norm(rest) + TINY)
    return rest * factor


def orthogonal_step(after: Tensor, before: Tensor, decay: float) -> Tensor:
    """Return the weights after a step whose update is made orthogonal.

    The step came from `before`, which it also multiplied by `decay`.
    """
    kept = before * decay
    return kept + orthogonal(after - kept, before)
