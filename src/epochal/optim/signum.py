"""Signum (Bernstein et al. 2018) and SGD with momentum: the sign of a Nesterov momentum, or the momentum itself.

    b <- mu b + g;   d = g + mu b (Nesterov) or b;   U = sign(d), or d for sgdm;   W <- (1 - lr wd) W - lr U

Differs from the code published with SPECTRA, where the buffer starts as a copy of the weights, not at zero
(`Spectra(compat="upstream")` follows that code).
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
    """Return (d, new state) of a batch; there is no dampening.

    Args:
        gradient: (B, ...).
        state: `momentum_buffer` (b) of the same shape, `step` (B,).
        momentum: mu.
        nesterov: whether d looks one step ahead.
    """
    buffer = state["momentum_buffer"] * momentum + gradient
    direction = gradient + momentum * buffer if nesterov else buffer
    return direction, {"step": state["step"] + 1, "momentum_buffer": buffer}


def signum_update(gradient: Tensor, state: State, *, momentum: float, nesterov: bool) -> tuple[Tensor, State]:
    """Return (sign(d), new state) of a batch; arguments as in `sgdm_update`."""
    direction, state = sgdm_update(gradient, state, momentum=momentum, nesterov=nesterov)
    return torch.sign(direction), state


SIGNUM = Rule(momentum_init, signum_update, {"momentum": 0.95, "nesterov": True})
SGDM = Rule(momentum_init, sgdm_update, {"momentum": 0.95, "nesterov": True})


class Signum(RuleOptimizer):
    """Signum with decoupled weight decay.

    State per parameter: `step` (0-d) and `momentum_buffer` of the parameter's shape, float32 for half-precision weights.

    Args:
        params: parameters or groups.
        lr: every element moves by this much per step.
        momentum: mu in the formula at the top of this file.
        nesterov: whether the sign is that of the momentum one step ahead.
        weight_decay: decoupled, multiplied by lr.
    """

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
