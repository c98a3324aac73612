"""Penalty on the norm of the gradient by a finite difference; SAM (arXiv 2210.02720, 2010.01412).

The gradient of L + strength |grad L| is g + strength H g / |g|. With n = g / |g| and a small radius r, H n is
(grad L(w + r n) - g) / r. With strength = r this is SAM's grad L(w + r n). IGNITE (arXiv 2503.04242) penalizes the norm of the
gradient of a mean prediction instead, which a language model does not have. Two passes.
"""

from collections.abc import Sequence

from torch import Tensor

from epochal.training.regularizers.look_ahead import Accumulate
from epochal.training.regularizers.moved import copied_gradients, moved


def gradient_norm(
    accumulate: Accumulate, parameters: Sequence[Tensor], tokens: Tensor, first_row: int, strength: float, radius: float
) -> Tensor:
    """Add the penalized gradient to `parameters` and return the loss without the penalty, 0-d."""
    loss = accumulate(tokens, first_row)
    gradients = copied_gradients(parameters)
    for parameter in parameters:
        parameter.grad = None
    with moved(parameters, gradients, radius):
        accumulate(tokens, first_row)
    share = strength / radius
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not None:
            parameter.grad.mul_(share).add_(gradient, alpha=1.0 - share)
    return loss
