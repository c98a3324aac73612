"""Lion: the sign of an interpolated momentum (Chen et al. 2023, Algorithm 2).

U = sign(b1 m + (1 - b1) g);   m <- b2 m + (1 - b2) g
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from epochal.optim.base import Rule, RuleOptimizer, State, new_state


def lion_init(parameter: Tensor) -> State:
    """Return a zero momentum for one parameter."""
    return new_state(parameter, "exp_avg")


def lion_update(gradient: Tensor, state: State, *, betas: tuple[float, float]) -> tuple[Tensor, State]:
    """Return (U, new state) for gradients (B, ...)."""
    beta1, beta2 = betas
    direction = torch.lerp(state["exp_avg"], gradient, 1 - beta1).sign()
    return direction, {"step": state["step"] + 1, "exp_avg": torch.lerp(state["exp_avg"], gradient, 1 - beta2)}


LION = Rule(lion_init, lion_update, {"betas": (0.9, 0.99)})


class Lion(RuleOptimizer):
    """W <- (1 - lr wd) W - lr U; state: `step` and one buffer of the parameter's shape."""

    rule: ClassVar[Rule] = LION

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
