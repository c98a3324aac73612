"""MARS, approximate form (Yuan et al. 2024): variance reduction by the previous gradient, before AdamW or Lion.

    c = g + gamma b1 / (1 - b1) (g - g_previous), divided by its Frobenius norm if that exceeds 1 (per matrix)
    mars-adamw: m, v from c, U as in AdamW;   mars-lion: m from c, U = sign(m);   W <- (1 - lr wd) W - lr U

Vectors take AdamW with `vector_betas`, at `vector_lr_scale` times the learning rate.
Differs from the published code: vectors decay with the group's weight decay at the group's learning rate (there: 0.1 at
the vectors' learning rate, whatever the group says), and mars-shampoo is not implemented.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from epochal.optim.adamw import adamw_init, adamw_update, bias_corrected
from epochal.optim.base import Rule, RuleOptimizer, State, new_state, per_item

MARS_TYPES = ("mars-adamw", "mars-lion")


def mars_init(parameter: Tensor) -> State:
    """Return zero moments and, for matrices, a zero previous gradient."""
    if parameter.ndim < 2:
        return adamw_init(parameter)
    return new_state(parameter, "exp_avg", "exp_avg_sq", "previous")


def mars_update(
    gradient: Tensor,
    state: State,
    *,
    betas: tuple[float, float],
    vector_betas: tuple[float, float],
    gamma: float,
    vector_lr_scale: float,
    mars_type: str,
    eps: float,
) -> tuple[Tensor, State]:
    """Return (U, new state) of a batch.

    Args:
        gradient: (B, n) for vectors, (B, m, n) or more axes for matrices.
        state: `exp_avg` (m), `exp_avg_sq` (v) and, for matrices, `previous` of the same shape; `step` (B,).
        betas, vector_betas: decay rates of the moments of matrices and of vectors.
        gamma: strength of the variance reduction.
        vector_lr_scale: factor on the update of vectors.
        mars_type: "mars-adamw" or "mars-lion".
        eps: added to the corrected root.
    """
    # A batch of vectors has two axes.
    if gradient.ndim < 3:
        update, state = adamw_update(gradient, state, betas=vector_betas, eps=eps)
        return vector_lr_scale * update, state
    beta1, beta2 = betas
    step = state["step"] + 1
    corrected = gradient + gamma * beta1 / (1 - beta1) * (gradient - state["previous"])
    # Every item of the batch is clipped by its own norm.
    norm = torch.linalg.vector_norm(corrected.flatten(1), dim=1)
    corrected = corrected / per_item(norm.clamp(min=1.0), corrected)
    mean = torch.lerp(state["exp_avg"], corrected, 1 - beta1)
    square = torch.addcmul(state["exp_avg_sq"] * beta2, corrected, corrected, value=1 - beta2)
    # The plain gradient is remembered, not the corrected one.
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square, "previous": gradient}
    if mars_type == "mars-lion":
        return mean.sign(), new
    return bias_corrected(mean, square, step, betas=betas, eps=eps), new


MARS = Rule(
    mars_init,
    mars_update,
    {
        "betas": (0.95, 0.99),
        "vector_betas": (0.8, 0.999),
        "gamma": 0.025,
        "vector_lr_scale": 1 / 3,
        "mars_type": "mars-adamw",
        "eps": 1e-8,
    },
    elementwise=False,
)


class Mars(RuleOptimizer):
    """MARS with decoupled weight decay.

    State per parameter: `step` (0-d), two moments and, for matrices, the previous gradient, each of the parameter's
    shape, float32 for half-precision weights.

    Args:
        params: parameters or groups.
        lr, weight_decay: as in AdamW.
        betas, vector_betas, gamma, vector_lr_scale, mars_type, eps: as in `mars_update`.

    Raises:
        ValueError: for an unknown `mars_type`.
    """

    rule: ClassVar[Rule] = MARS

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        vector_betas: tuple[float, float] = (0.8, 0.999),
        gamma: float = 0.025,
        vector_lr_scale: float = 1 / 3,
        mars_type: str = "mars-adamw",
    ) -> None:
        check_mars_type(mars_type)
        vectors = {"vector_betas": vector_betas, "vector_lr_scale": vector_lr_scale}
        matrices = {"betas": betas, "gamma": gamma, "mars_type": mars_type}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps, **matrices, **vectors})


def check_mars_type(mars_type: str) -> None:
    """Raise ValueError for an unknown `mars_type`."""
    if mars_type not in MARS_TYPES:
        raise ValueError(f"mars_type must be one of {', '.join(MARS_TYPES)}, got {mars_type!r}.")
