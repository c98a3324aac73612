"""An optimizer for a model, from its description in a Run."""

from typing import Any, Protocol

import torch


class Spec(Protocol):
    """What a Run says of its optimizer; the fields of `epochal.run.AdamW`."""

    lr: float
    wd: float
    beta1: float
    beta2: float
    eps: float


def parameter_groups(model: torch.nn.Module, wd: float) -> list[dict[str, Any]]:
    """Divide parameters by the decay mask of the paper (spec section 3, point 4).

    Token embedding, norm weights and biases are not decayed; all linear maps and the output head are.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embed_tokens" not in name
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": wd}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(spec: Spec, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a Run for this model, with the decay mask in its groups."""
    groups = parameter_groups(model, spec.wd)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True)
