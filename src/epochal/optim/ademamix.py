"""AdEMAMix (Pagliardini et al. 2024, Algorithm 1): Adam with a second, slow average of the gradients.

    m1 <- b1 m1 + (1 - b1) g;   m2 <- b3(t) m2 + (1 - b3(t)) g;   v <- b2 v + (1 - b2) g^2
    U = (m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v / (1 - b2^t)) + eps);   W <- (1 - lr wd) W - lr U

alpha(t) rises linearly to alpha over `alpha_warmup` steps. b3(t) moves from b1 to b3 over `beta3_warmup` steps, so that
the half-life f(b) = ln 0.5 / ln b - 1 grows linearly. t counts from 1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from epochal.optim.adamw import bias_corrected
from epochal.optim.base import Rule, RuleOptimizer, State, new_state, per_item


def ademamix_init(parameter: Tensor) -> State:
    """Return zero moments for one parameter."""
    return new_state(parameter, "exp_avg", "exp_avg_slow", "exp_avg_sq")


def slow_decay(step: Tensor, beta1: float, beta3: float, warmup: int | None) -> Tensor:
    """Return b3(t) in float64 for steps (B,) counted from 1; b3 throughout if there is no warm-up."""

    def half_life(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1  # the published code adds 1e-8, too

    done = torch.clamp(step.double() / warmup, max=1.0) if warmup else torch.ones_like(step, dtype=torch.float64)
    now = (1 - done) * half_life(beta1) + done * half_life(beta3)
    # Exactly b3 after the warm-up, whatever the rounding of exp and log.
    return torch.where(done < 1, torch.exp(math.log(0.5) / (now + 1)), beta3)


def ademamix_update(
    gradient: Tensor,
    state: State,
    *,
    betas: tuple[float, float, float],
    alpha: float,
    alpha_warmup: int | None,
    beta3_warmup: int | None,
    eps: float,
) -> tuple[Tensor, State]:
    """Return (U, new state) of a batch.

    Args:
        gradient: (B, ...).
        state: `exp_avg` (m1), `exp_avg_slow` (m2) and `exp_avg_sq` (v) of the same shape, `step` (B,).
        betas: b1, b2, b3.
        alpha: final weight of the slow average.
        alpha_warmup, beta3_warmup: steps until alpha(t) and b3(t) have their final values, None for no warm-up.
        eps: added to the corrected root.
    """
    beta1, beta2, beta3 = betas
    step = state["step"] + 1
    fast = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
    slow_weight = per_item(1 - slow_decay(step, beta1, beta3, beta3_warmup), gradient).to(gradient.dtype)
    slow = torch.lerp(state["exp_avg_slow"], gradient, slow_weight)
    square = torch.addcmul(state["exp_avg_sq"] * beta2, gradient, gradient, value=1 - beta2)
    ramp = torch.clamp(step.double() / alpha_warmup, max=1.0) if alpha_warmup else torch.ones_like(step)
    # bias_corrected divides the sum by 1 - b1^t, but the slow average has no bias correction: multiply it beforehand.
    correction = -torch.expm1(step.double() * math.log(beta1)) if beta1 else torch.ones_like(step, dtype=torch.float64)
    mixed = fast + per_item(alpha * ramp * correction, gradient).to(gradient.dtype) * slow
    update = bias_corrected(mixed, square, step, betas=(beta1, beta2), eps=eps)
    return update, {"step": step, "exp_avg": fast, "exp_avg_slow": slow, "exp_avg_sq": square}


ADEMAMIX = Rule(
    ademamix_init,
    ademamix_update,
    {"betas": (0.9, 0.999, 0.999), "alpha": 8.0, "alpha_warmup": None, "beta3_warmup": None, "eps": 1e-8},
)


class AdEMAMix(RuleOptimizer):
    """AdEMAMix with decoupled weight decay.

    State per parameter: `step` (0-d) and three buffers of the parameter's shape, float32 for half-precision weights.

    Args:
        params: parameters or groups.
        lr, weight_decay: as in AdamW.
        betas, alpha, alpha_warmup, beta3_warmup, eps: as in `ademamix_update`.
    """

    rule: ClassVar[Rule] = ADEMAMIX

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        alpha: float = 8.0,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
    ) -> None:
        warmups = {"alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup}
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "alpha": alpha, "eps": eps, **warmups}
        super().__init__(params, defaults)
