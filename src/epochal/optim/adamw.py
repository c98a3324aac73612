"""AdamW (Loshchilov and Hutter 2019, Algorithm 2): torch's class, and its direction as a rule.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   U = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

`Spectra(base="adamw")` and the vectors of `Muon` and `Mars` use the rule; a Run with AdamW uses torch's class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epochal.optim.base import Rule, State, new_state, per_item

AdamW = torch.optim.AdamW


def adamw_init(parameter: Tensor) -> State:
    """Return zero moments for one parameter."""
    return new_state(parameter, "exp_avg", "exp_avg_sq")


def adamw_update(gradient: Tensor, state: State, *, betas: tuple[float, float], eps: float) -> tuple[Tensor, State]:
    """Return (U, new state) of a batch.

    Args:
        gradient: (B, ...).
        state: `exp_avg` and `exp_avg_sq` of the same shape, `step` (B,).
        betas: decay rates b1, b2 of the moments.
        eps: added to the corrected root.
    """
    beta1, beta2 = betas
    step = state["step"] + 1
    mean = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
    square = torch.addcmul(state["exp_avg_sq"] * beta2, gradient, gradient, value=1 - beta2)
    update = bias_corrected(mean, square, step, betas=betas, eps=eps)
    return update, {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def bias_corrected(mean: Tensor, square: Tensor, step: Tensor, *, betas: tuple[float, float], eps: float) -> Tensor:
    """Return (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps); step (B,) counts from 1."""
    beta1, beta2 = betas
    # expm1 keeps 1 - b^t accurate for b close to 1.
    first = per_item(-torch.expm1(step.double() * _log(beta1)), mean).to(mean.dtype)
    second = per_item(-torch.expm1(step.double() * _log(beta2)), mean).to(mean.dtype)
    return (mean / first) / ((square / second).sqrt() + eps)


def _log(beta: float) -> float:
    # beta = 0 (no memory) is legal: then b^t = 0 for every t >= 1.
    return float("-inf") if beta == 0 else math.log(beta)


ADAMW = Rule(adamw_init, adamw_update, {"betas": (0.9, 0.95), "eps": 1e-8})
