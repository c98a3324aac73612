"""What regularizers do to the gradients of a step and to the update."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epochal.regularizer_config import GradientNorm, LookAhead, OrthogonalStep
from epochal.run import Run
from epochal.training.regularizers.gradient_norm import gradient_norm
from epochal.training.regularizers.look_ahead import Accumulate, look_ahead
from epochal.training.regularizers.orthogonal import orthogonal, orthogonal_step

# Those of the optimizer.
Groups = Sequence[dict[str, Any]]


def add_gradients(
    run: Run,
    accumulate: Accumulate,
    groups: Groups,
    tokens: Tensor,
    first_row: int,
    factor: float,
) -> Tensor:
    """Add the gradient of a step to the parameters and return its loss, 0-d.

    tokens (b, T) are rows `first_row`, ... of the run; `groups` are those of the optimizer; `factor` is the step's learning
    rate over the peak.
    """
    match run.regularizer:
        case LookAhead() as choice if not choice.off:
            return look_ahead(accumulate, all_parameters(groups), tokens, first_row, choice.radius * factor)
        case GradientNorm() as choice if not choice.off:
            return gradient_norm(accumulate, all_parameters(groups), tokens, first_row, choice.strength, choice.radius)
    loss = accumulate(tokens, first_row)
    if isinstance(run.regularizer, OrthogonalStep) and run.regularizer.of == "gradient":
        for parameter in decayed_matrices(groups):
            if parameter.grad is not None:
                parameter.grad.copy_(orthogonal(parameter.grad, parameter.detach()))
    return loss


def all_parameters(groups: Groups) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [parameter for group in groups for parameter in group["params"]]


def decayed_matrices(groups: Groups) -> list[Tensor]:
    """Return the parameters that decay: linear maps and the head, without embedding and norms."""
    return [parameter for group in groups if group["decay_scale"] for parameter in group["params"]]


class OrthogonalUpdate:
    """A context around an optimizer step, which makes its update orthogonal for such a run."""

    def __init__(self, run: Run, groups: Groups) -> None:
        self.on = isinstance(run.regularizer, OrthogonalStep) and run.regularizer.of == "update"
        self.groups = groups

    def __enter__(self) -> None:
        self._before = [p.detach().clone() for p in decayed_matrices(self.groups)] if self.on else []

    @torch.no_grad()
    def __exit__(self, *_: Any) -> None:
        if self.on:
            decays = [1.0 - g["lr"] * g["weight_decay"] for g in self.groups if g["decay_scale"] for _ in g["params"]]
            for parameter, before, decay in zip(decayed_matrices(self.groups), self._before, decays, strict=True):
                parameter.copy_(orthogonal_step(parameter, before, decay))
