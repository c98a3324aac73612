"""Signum, and SGD with momentum: the sign of a Nesterov momentum, or the momentum itself (Bernstein et al. 2018).

    b <- mu b + g;   d = g + mu b (Nesterov) or b;   U = sign(d), or d for sgdm

Differs from the code SPECTRA was published with: there the buffer starts as a copy of the weights, here as zeros
(`Spectra(compat="upstream")` restores that).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from epochal.optim.base import Rule, RuleOptimizer, State, new_state


def momentum_init(parameter: Tensor) -> State:
    """Return a zero momentum buffer for one parameter."""
    return new_state(parameter, "momentum_buffer")


def sgdm_update(gradient: Tensor, state: State, *, momentum: float, nesterov: bool) -> tuple[Tensor, State]:
    """Return (momentum direction, new state) for gradients (B, ...); no dampening."""
    buffer = state["momentum_buffer"] * momentum + gradient
    direction = gradient + momentum * buffer if nesterov else buffer
    return direction, {"step": state["step"] + 1, "momentum_buffer": buffer}


def signum_update(gradient: Tensor, state: State, *, momentum: float, nesterov: bool) -> tuple[Tensor, State]:
    """Return (sign of the momentum direction, new state) for gradients (B, ...)."""
    direction, state = sgdm_update(gradient, state, momentum=momentum, nesterov=nesterov)
    return torch.sign(direction), state


SIGNUM = Rule(momentum_init, signum_update, {"momentum": 0.95, "nesterov": True})
SGDM = Rule(momentum_init, sgdm_update, {"momentum": 0.95, "nesterov": True})


class Signum(RuleOptimizer):
    """W <- (1 - lr wd) W - lr sign(d); state: `step` and one buffer of the parameter's shape."""

    rule: ClassVar[Rule] = SIGNUM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})
