"""Fira's step between two refreshes, in three passes that never store the residual.

    R = P^T G;  M = b1 M + (1 - b1) R;  V = b2 V + (1 - b2) R R;  N = M / (sqrt(V) + eps);  t <- t + 1
    kappa = sqrt(1 - b2^t) / (1 - b1^t);  phi_i = ||N_i|| / (||R_i|| + 1e-8)
    ||S||^2 = sum_i phi_i^2 max(||G_i||^2 - alpha (2 - alpha) ||R_i||^2, 0)
    L = max(||S|| / (s + 1e-8), gamma) / gamma, or 1 while s = 0;  s <- ||S|| / L;  f = phi / L
    W <- (1 - lr wd) (W - lr kappa (f * G + alpha P (N - f * R)))

Shapes: B matrices, a <= b, rank r. W, G (B, a, b), any strides (pass transposed views of tall matrices), P (B, a, r)
with orthonormal columns; R, M, V, N (B, r, b); norms and phi (B, b) per column; s and t (B,). M, V, s, t float32.

K1 projects and sums the squares of G's columns; K2 does Adam and the factors on r x b numbers; K3 multiplies and
updates W. Traffic: G twice, W read and written, and about 9 r b; the published code moves about 27 a b. Step, limiter and
learning rate stay on the device: nothing waits, and a CUDA graph can hold it.

Source: the published code's variant (Fira 1.0.2) with the limiter that a zero norm does not lock; section 1.6 of our
notes for the form without a residual.
"""

# The arguments of kernels are Triton's own pointers and numbers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import INTERPRETED, jit, tl, triton, use_kernel

FLOOR = 1e-8  # of phi and of the limiter, a literal in the published code
BLOCK_B, BLOCK_R, BLOCK_A = 64, 64, 32


def fira_step_reference(
    weight: Tensor, gradient: Tensor, basis: Tensor, mean: Tensor, square: Tensor, last: Tensor, step: Tensor,
    *, lr: Tensor, betas: tuple[float, float], eps: float, alpha: float, gamma: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the new (W, M, V, s, t), with the residual formed as the paper writes it: the definition."""
    low = basis.mT @ gradient
    mean = betas[0] * mean + (1 - betas[0]) * low
    square = betas[1] * square + (1 - betas[1]) * low * low
    direction = mean / (square.sqrt() + eps)
    step = step + 1
    rate = lr * (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    phi = direction.norm(dim=1) / (low.norm(dim=1) + FLOOR)
    rest = phi[:, None] * (gradient - alpha * basis @ low)
    norm = rest.norm(dim=(1, 2))
    limit = torch.where(last == 0, 1.0, (norm / (last + FLOOR)).clamp(min=gamma) / gamma)
    update = alpha * basis @ direction + rest / limit[:, None, None]
    weight = (1 - lr * weight_decay) * (weight - rate[:, None, None] * update)
    return weight, mean, square, norm / limit, step


@jit
def _project_kernel(
    p_bar, g_bab, low_brb, energy_bb, A, N, R, p_sb, p_sa, p_sr, g_sb, g_sa, g_sn,
    UPCAST: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    low = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    energy = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, A, BLOCK_A):
        a = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        g_mask = (a[:, None] < A) & (columns[None, :] < N)
        g = tl.load(g_bab + batch * g_sb + a[:, None] * g_sa + columns[None, :] * g_sn, mask=g_mask, other=0.0)
        p_mask = (ranks[:, None] < R) & (a[None, :] < A)
        p = tl.load(p_bar + batch * p_sb + a[None, :] * p_sa + ranks[:, None] * p_sr, mask=p_mask, other=0.0)
        wide = g.to(tl.float32)
        energy += tl.sum(wide * wide, 0)
        if UPCAST:
            low = tl.dot(p.to(tl.float32), wide, low, input_precision="ieee")
        else:
            low = tl.dot(p.to(g.dtype), g, low, input_precision="ieee")
    inside = (ranks[:, None] < R) & (columns[None, :] < N)
    tl.store(low_brb + (batch * R + ranks[:, None]) * N + columns[None, :], low, mask=inside)
    if tl.program_id(1) == 0:  # every block of ranks reads the same G; one of them reports its norms
        tl.store(energy_bb + batch * N + columns, energy, mask=columns < N)


@jit
def _adam_kernel(
    low_brb, mean_brb, square_brb, n_brb, energy_bb, phi_bb, part_bt, N, R, b1, b2, c1, c2, eps, k, floor,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_sum = tl.zeros([BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        mask = (ranks[:, None] < R) & (columns[None, :] < N)
        at = (batch * R + ranks[:, None]) * N + columns[None, :]
        low = tl.load(low_brb + at, mask=mask, other=0.0)
        mean = b1 * tl.load(mean_brb + at, mask=mask, other=0.0) + c1 * low
        square = b2 * tl.load(square_brb + at, mask=mask, other=0.0) + c2 * low * low
        # a column that never had a gradient has no direction, for eps = 0 too
        direction = mean / tl.maximum(tl.sqrt(square) + eps, 1e-30)
        tl.store(mean_brb + at, mean, mask=mask)
        tl.store(square_brb + at, square, mask=mask)
        tl.store(n_brb + at, direction, mask=mask)
        inside_sum += tl.sum(low * low, 0)
        size += tl.sum(direction * direction, 0)
    phi = tl.sqrt(size) / (tl.sqrt(inside_sum) + floor)
    energy = tl.load(energy_bb + batch * N + columns, mask=columns < N, other=0.0)
    rest = energy - k * inside_sum
    rest = tl.where(rest < 0.0, 0.0, rest)  # not maximum(): that may drop a NaN
    tl.store(phi_bb + batch * N + columns, phi, mask=columns < N)
    tl.store(part_bt + batch * tl.num_programs(0) + tl.program_id(0), tl.sum(phi * phi * rest, 0))


@jit
def _update_kernel(
    w_bab, g_bab, p_bar, n_brb, low_brb, phi_bb, scalars_b3, A, N, R, alpha,
    w_sb, w_sa, w_sn, g_sb, g_sa, g_sn, p_sb, p_sa, p_sr,
    BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rate = tl.load(scalars_b3 + batch * 3)
    inverse_limit = tl.load(scalars_b3 + batch * 3 + 1)
    keep = tl.load(scalars_b3 + batch * 3 + 2)
    f = tl.load(phi_bb + batch * N + columns, mask=columns < N, other=0.0) * inverse_limit
    total = tl.zeros([BLOCK_A, BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        mask = (ranks[:, None] < R) & (columns[None, :] < N)
        at = (batch * R + ranks[:, None]) * N + columns[None, :]
        x = tl.load(n_brb + at, mask=mask, other=0.0) - f[None, :] * tl.load(low_brb + at, mask=mask, other=0.0)
        p_mask = (rows[:, None] < A) & (ranks[None, :] < R)
        p = tl.load(p_bar + batch * p_sb + rows[:, None] * p_sa + ranks[None, :] * p_sr, mask=p_mask, other=0.0)
        total = tl.dot(p.to(tl.float32), x, total, input_precision="tf32x3")
    mask = (rows[:, None] < A) & (columns[None, :] < N)
    g_at = g_bab + batch * g_sb + rows[:, None] * g_sa + columns[None, :] * g_sn
    w_at = w_bab + batch * w_sb + rows[:, None] * w_sa + columns[None, :] * w_sn
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
    w = keep * (w - rate * (f[None, :] * g + alpha * total))
    tl.store(w_at, w.to(w_bab.dtype.element_ty), mask=mask)


@torch.library.custom_op(
    "epochal_kernels::fira_step", mutates_args=("weight", "exp_avg", "exp_avg_sq", "limiter", "step")
)
def fira_step(
    weight: Tensor, gradient: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, limiter: Tensor, step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, alpha: float, gamma: float, weight_decay: float,
) -> None:  # fmt: skip
    """Take one step, in place on everything but gradient and basis. lr is a 0-d tensor on the device.

    Shapes as in the file's docstring; weight, gradient and basis in any floating dtype, the state in float32. On the
    torch path the arithmetic is float32, or float64 for float64 state. Raises ValueError for what does not fit.
    """
    _check(weight, gradient, basis, exp_avg, exp_avg_sq, limiter, step)
    batch, a, n = weight.shape
    if not use_kernel(weight.device) or exp_avg.dtype == torch.float64:
        wide = exp_avg.dtype
        new = fira_step_reference(
            weight.to(wide), gradient.to(wide), basis.to(wide), exp_avg, exp_avg_sq, limiter, step, lr=lr,
            betas=(beta1, beta2), eps=eps, alpha=alpha, gamma=gamma, weight_decay=weight_decay,
        )  # fmt: skip
        for old, value in zip((weight, exp_avg, exp_avg_sq, limiter, step), new, strict=True):
            old.copy_(value)
        return
    r = basis.shape[2]
    if weight.numel() == 0 or r == 0:
        return
    tiles = triton.cdiv(n, BLOCK_B)
    low, direction = torch.empty_like(exp_avg), torch.empty_like(exp_avg)
    energy, phi = (exp_avg.new_empty(batch, n) for _ in range(2))
    part = exp_avg.new_empty(batch, tiles)
    upcast = INTERPRETED and gradient.dtype == torch.bfloat16
    _project_kernel[(tiles, triton.cdiv(r, BLOCK_R), batch)](
        basis, gradient, low, energy, a, n, r, *basis.stride(), *gradient.stride(),
        UPCAST=upcast, BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    _adam_kernel[(tiles, batch)](
        low, exp_avg, exp_avg_sq, direction, energy, phi, part, n, r, beta1, beta2, 1 - beta1, 1 - beta2, eps,
        alpha * (2 - alpha), FLOOR, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    # B numbers only; as torch operations they are captured with the rest.
    norm = part.sum(1).sqrt()
    limit = torch.where(limiter == 0, 1.0, (norm / (limiter + FLOOR)).clamp(min=gamma) / gamma)
    limiter.copy_(norm / limit)
    step.add_(1)
    count = step.double()
    rate = lr * (1 - beta2**count).sqrt() / (1 - beta1**count)
    keep = (1 - lr * weight_decay).expand(batch)
    scalars = torch.stack([rate.float(), 1 / limit, keep.float()], 1).contiguous()
    _update_kernel[(triton.cdiv(a, BLOCK_A), tiles, batch)](
        weight, gradient, basis, direction, low, phi, scalars, a, n, r, alpha,
        *weight.stride(), *gradient.stride(), *basis.stride(), BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
    )  # fmt: skip


@fira_step.register_fake
def _(*_arguments):
    return None


def _check(weight: Tensor, gradient: Tensor, basis: Tensor, mean: Tensor, square: Tensor, *scalars: Tensor) -> None:
    if weight.ndim != 3 or gradient.shape != weight.shape or basis.ndim != 3 or basis.shape[:2] != weight.shape[:2]:
        raise ValueError(
            f"fira_step: W {tuple(weight.shape)}, G {tuple(gradient.shape)} and P {tuple(basis.shape)} do not fit; "
            "pass (B, a, b) twice and (B, a, r)."
        )
    state = (weight.shape[0], basis.shape[2], weight.shape[2])
    if any(t.shape != state or not t.is_contiguous() or t.dtype != mean.dtype for t in (mean, square)):
        raise ValueError(
            f"fira_step: moments {tuple(mean.shape)} and {tuple(square.shape)} do not fit W {tuple(weight.shape)} and "
            f"P {tuple(basis.shape)}; pass two contiguous tensors of shape {state} and one dtype."
        )
    if mean.dtype not in (torch.float32, torch.float64) or any(t.shape != weight.shape[:1] for t in scalars):
        raise ValueError(
            f"fira_step: state of dtype {mean.dtype} with limiter and step of shapes "
            f"{[tuple(t.shape) for t in scalars]}; pass float32 moments and two ({weight.shape[0]},) tensors."
        )
