"""Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2): the sign of an interpolated momentum.

U = sign(b1 m + (1 - b1) g);   m <- b2 m + (1 - b2) g;   W <- (1 - lr wd) W - lr U
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
    """Return (U, new state) of a batch.

    Args:
        gradient: (B, ...).
        state: `exp_avg` (m) of the same shape, `step` (B,).
        betas: b1, the weight of the momentum in the update, and b2, its decay rate.
    """
    beta1, beta2 = betas
    # The sign uses the old momentum; the momentum itself then moves more slowly, by b2.
    update = torch.lerp(state["exp_avg"], gradient, 1 - beta1).sign()
    momentum = torch.lerp(state["exp_avg"], gradient, 1 - beta2)
    return update, {"step": state["step"] + 1, "exp_avg": momentum}


LION = Rule(lion_init, lion_update, {"betas": (0.9, 0.99)})


class Lion(RuleOptimizer):
    """Lion with decoupled weight decay.

    State per parameter: `step` (0-d) and `exp_avg` of the parameter's shape, float32 for half-precision weights.

    Args:
        params: parameters or groups.
        lr: every element moves by this much per step, so about a tenth of Adam's.
        betas: b1, b2 in the formula at the top of this file.
        weight_decay: decoupled, multiplied by lr.
    """

    rule: ClassVar[Rule] = LION

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
