"""Muon (Jordan et al. 2024) for matrices and AdamW for all else, in one optimizer.

    b <- mu b + (1 - mu) g;   d = (1 - mu) g + mu b (Nesterov) or b
    U = scale * NS5(d / ||d||_F);   W <- (1 - lr wd) W - lr U

NS5 is five quintic Newton-Schulz steps in bfloat16. torch.optim.Muon has the same update (the tests compare them), but it
refuses parameters that are not matrices and loops over matrices. This class updates equal shapes in one batch. It gives
vectors, and groups with `"orthogonalize": False` (embeddings, head), to AdamW at the same learning rate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from epochal.optim.adamw import ADAMW, adamw_init
from epochal.optim.base import Group, MatrixOptimizer, State, Update
from epochal.optim.signum import momentum_init

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published quintic, chosen for the steepest slope at zero
LR_ADJUSTMENTS = (None, "original", "match_rms_adamw")  # torch's names


def orthogonalize(x: Tensor, *, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Push the singular values of x (..., m, n) towards 1 by Newton-Schulz steps."""
    # The published coefficients trade accuracy for speed: singular values end near 1, not at 1.
    a, b, c = COEFFICIENTS
    y = x.to(dtype).reshape(-1, *x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    y = y.mT if tall else y  # the Gram matrix of the smaller side
    # The iteration needs singular values of at most 1; the Frobenius norm is an upper bound of the largest.
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(y, y.mT)
        # As torch.optim.Muon: the sums belong to the products, which saves rounding and passes over memory.
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def normalized_rows(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Divide each row of x (..., m, n) by its L2 norm: MuonEq-R."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norms.clamp(min=eps)


def muon_scale(rows: int, columns: int, adjust_lr_fn: str | None) -> float:
    """Return the factor on the update: sqrt(max(1, rows/columns)), or 0.2 sqrt(max(rows, columns))."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def muon_direction(gradient: Tensor, state: State, *, momentum: float, nesterov: bool) -> tuple[Tensor, State]:
    """Return (d, new state) of a batch, before it is orthogonalized.

    Args:
        gradient: (B, m, n).
        state: `momentum_buffer` (b) of the same shape, `step` (B,).
        momentum: mu.
        nesterov: whether d looks one step ahead.
    """
    buffer = torch.lerp(state["momentum_buffer"], gradient, 1 - momentum)
    direction = torch.lerp(gradient, buffer, momentum) if nesterov else buffer
    return direction, {"step": state["step"] + 1, "momentum_buffer": buffer}


class Muon(MatrixOptimizer):
    """Muon and AdamW with decoupled weight decay.

    State per matrix: `step` (0-d) and `momentum_buffer`; per other parameter: `step` and Adam's two moments. Buffers
    have the parameter's shape and are float32 for half-precision weights.

    Args:
        params: parameters or groups; a group with `"orthogonalize": False` takes AdamW.
        lr, weight_decay: as in AdamW.
        momentum, nesterov: as in `muon_direction`.
        ns_steps: number of Newton-Schulz steps.
        adjust_lr_fn: torch's; None or "original" scales by sqrt(max(1, rows/columns)), "match_rms_adamw" by
            0.2 sqrt(max(rows, columns)), so that one learning rate suits matrices and vectors.
        normalize_rows: whether `normalized_rows` comes before the Newton-Schulz steps.
        betas, eps: of AdamW.

    Raises:
        ValueError: for an unknown `adjust_lr_fn`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        normalize_rows: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if adjust_lr_fn not in LR_ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn must be one of {LR_ADJUSTMENTS}, got {adjust_lr_fn!r}.")
        matrices = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        others = {"betas": betas, "eps": eps, "orthogonalize": True, "normalize_rows": normalize_rows}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **matrices, **others})

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Return whether the parameter is a matrix that is orthogonalized."""
        return parameter.ndim == 2 and bool(group["orthogonalize"])

    def rounding(self, device: torch.device) -> float:
        """Return bfloat16's."""
        return torch.finfo(torch.bfloat16).eps

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return a momentum buffer for a matrix, two moments for any other parameter."""
        return momentum_init(parameter) if self.needs_whole(parameter, group) else adamw_init(parameter)

    def direction(self, parameter: Tensor, group: Group) -> tuple[Update, Group]:
        """Return Muon's momentum for a matrix, AdamW's rule for any other parameter."""
        if self.needs_whole(parameter, group):
            return muon_direction, {name: group[name] for name in ("momentum", "nesterov")}
        return ADAMW.of(group)

    def transform(self, update: Tensor, weights: Tensor, step: Tensor, group: Group) -> Tensor:
        """Return the orthogonalized momentum."""
        rows = normalized_rows(update) if group["normalize_rows"] else update
        return orthogonalize(rows, steps=group["ns_steps"])

    def step_scale(self, parameter: Tensor, group: Group) -> float:
        """Return `muon_scale`."""
        rows, columns = parameter.shape
        return muon_scale(rows, columns, group["adjust_lr_fn"])
