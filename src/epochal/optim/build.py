"""An optimizer for a model, with the paper's decay mask."""

from typing import Any

import torch


def parameter_groups(model: torch.nn.Module, wd: float) -> list[dict[str, Any]]:
    """Divide parameters by the decay mask of the paper (spec section 3, point 4).

    Token embedding, norm weights and biases are not decayed; all linear maps and the output head are.
    """
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embed_tokens" not in name
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": wd}, {"params": kept, "weight_decay": 0.0}]


def build_adamw(
    model: torch.nn.Module, *, lr: float, wd: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW for a model, with the decay mask in its groups."""
    return torch.optim.AdamW(parameter_groups(model, wd), lr=lr, betas=betas, eps=eps, fused=True)
