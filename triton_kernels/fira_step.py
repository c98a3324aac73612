"""Fira's step between two refreshes, in three passes that never store the residual.

    project   R = P^T G,  gradient_squares_j = ||G_j||^2
    adam      M <- M + w_1 (R - M),  V <- V + w_2 (R R - V),  N = M / (sqrt(V) + eps),
              low_squares_j = ||R_j||^2,  direction_squares_j = ||N_j||^2
    update    W <- decay W - P (lowrank_scale N - projection_coef_j R_j) - residual_scale_j G_j

The few numbers per column or matrix between the passes are computed by epochal.optim.fira and stay on the device.

Shapes: B matrices, rank r. W, G (B, a, b), any strides (pass transposed views to project the other side); P (B, a, r);
R, M, V, N (B, r, b), M and V with the same strides; squares, projection_coef and residual_scale (B, b), one number per
column j; w (B, 2), lowrank_scale and decay (B,). M, V float32; W, G, P any float.

Memory traffic: G twice, W read and written, and about 9 r b elements; the published code moves about 27 a b.
"""

# Triton kernels take pointers and numbers that have no useful annotation.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import PRECISION, jit, tl, triton, use_kernel

BLOCK_B, BLOCK_R, BLOCK_A = 64, 64, 32


def fira_project_reference(gradient: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return R and the squared norms of G's columns, in float32 at least."""
    wide = torch.promote_types(basis.dtype, torch.float32)
    g = gradient.to(wide)
    return basis.to(wide).mT @ g, (g * g).sum(1)


def fira_adam_reference(
    low: Tensor, mean: Tensor, square: Tensor, weights: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return N, low_squares, direction_squares, M and V."""
    mean = mean + weights[:, 0, None, None] * (low - mean)
    square = square + weights[:, 1, None, None] * (low * low - square)
    direction = mean / (square.sqrt() + eps)
    return direction, (low * low).sum(1), (direction * direction).sum(1), mean, square


def fira_update_reference(
    weight: Tensor, gradient: Tensor, basis: Tensor, direction: Tensor, low: Tensor,
    lowrank_scale: Tensor, projection_coef: Tensor, residual_scale: Tensor, decay: Tensor,
) -> Tensor:  # fmt: skip
    """Return the new W, in the dtype of N."""
    wide = direction.dtype
    inner = lowrank_scale[:, None, None] * direction - projection_coef[:, None] * low
    step = basis.to(wide) @ inner + residual_scale[:, None] * gradient.to(wide)
    return decay[:, None, None] * weight.to(wide) - step


@jit
def _fira_project_kernel(
    p_bar, g_bab, low_brb, squares_bb, A, N, R, p_sb, p_sa, p_sr, g_sb, g_sa, g_sn, r_sb, r_sr, r_sn,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    low = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, A, BLOCK_A):
        a = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        # One read of G serves both results.
        g_mask = (a[:, None] < A) & (columns[None, :] < N)
        g = tl.load(g_bab + batch * g_sb + a[:, None] * g_sa + columns[None, :] * g_sn, mask=g_mask, other=0.0)
        p_mask = (ranks[:, None] < R) & (a[None, :] < A)
        p = tl.load(p_bar + batch * p_sb + a[None, :] * p_sa + ranks[:, None] * p_sr, mask=p_mask, other=0.0)
        g = g.to(tl.float32)  # not P to 16 bits: it would not be orthonormal, as the norm of the residual assumes
        squares += tl.sum(g * g, 0)
        low = tl.dot(p.to(tl.float32), g, low, input_precision=PRECISION)
    mask = (ranks[:, None] < R) & (columns[None, :] < N)
    tl.store(low_brb + batch * r_sb + ranks[:, None] * r_sr + columns[None, :] * r_sn, low, mask=mask)
    if tl.program_id(1) == 0:  # every block of ranks reads the same G; the first one stores its squared norms
        tl.store(squares_bb + batch * N + columns, squares, mask=columns < N)


@jit
def _fira_adam_kernel(
    low_brb, mean_brb, square_brb, n_brb, low_squares_bb, direction_squares_bb, w_b2, eps_1, N, R, r_sb, r_sr, r_sn,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    # Loaded, not passed as numbers: a schedule would recompile the kernel, and a CUDA graph would freeze them.
    mean_weight, square_weight = tl.load(w_b2 + batch * 2), tl.load(w_b2 + batch * 2 + 1)
    eps = tl.load(eps_1)
    low_squares = tl.zeros([BLOCK_N], tl.float32)
    direction_squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (ranks[:, None] < R) & (columns[None, :] < N)
        at = batch * r_sb + ranks[:, None] * r_sr + columns[None, :] * r_sn
        low = tl.load(low_brb + at, mask=mask, other=0.0)
        mean = tl.load(mean_brb + at, mask=mask, other=0.0)
        square = tl.load(square_brb + at, mask=mask, other=0.0)
        mean += mean_weight * (low - mean)
        square += square_weight * (low * low - square)
        direction = mean / tl.where(
            mask, tl.sqrt(square) + eps, 1.0
        )  # eps may be 0, and 0 / 0 outside the matrix is NaN
        tl.store(mean_brb + at, mean, mask=mask)
        tl.store(square_brb + at, square, mask=mask)
        tl.store(n_brb + at, direction, mask=mask)
        low_squares += tl.sum(low * low, 0)
        direction_squares += tl.sum(direction * direction, 0)
    tl.store(low_squares_bb + batch * N + columns, low_squares, mask=columns < N)
    tl.store(direction_squares_bb + batch * N + columns, direction_squares, mask=columns < N)


@jit
def _fira_update_kernel(
    w_bab, g_bab, p_bar, n_brb, low_brb, coef_bb, residual_bb, scalars_b2, A, N, R,
    w_sb, w_sa, w_sn, g_sb, g_sa, g_sn, p_sb, p_sa, p_sr, r_sb, r_sr, r_sn,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    lowrank_scale, decay = tl.load(scalars_b2 + batch * 2), tl.load(scalars_b2 + batch * 2 + 1)
    projection_coef = tl.load(coef_bb + batch * N + columns, mask=columns < N, other=0.0)
    residual_scale = tl.load(residual_bb + batch * N + columns, mask=columns < N, other=0.0)
    total = tl.zeros([BLOCK_A, BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (ranks[:, None] < R) & (columns[None, :] < N)
        at = batch * r_sb + ranks[:, None] * r_sr + columns[None, :] * r_sn
        # Both low-rank terms share the product with P, and the residual is never stored.
        x = lowrank_scale * tl.load(n_brb + at, mask=mask, other=0.0)
        x -= projection_coef[None, :] * tl.load(low_brb + at, mask=mask, other=0.0)
        p_mask = (rows[:, None] < A) & (ranks[None, :] < R)
        p = tl.load(p_bar + batch * p_sb + rows[:, None] * p_sa + ranks[None, :] * p_sr, mask=p_mask, other=0.0)
        total = tl.dot(p.to(tl.float32), x, total, input_precision=PRECISION)
    mask = (rows[:, None] < A) & (columns[None, :] < N)
    g_at = g_bab + batch * g_sb + rows[:, None] * g_sa + columns[None, :] * g_sn
    w_at = w_bab + batch * w_sb + rows[:, None] * w_sa + columns[None, :] * w_sn
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.where(residual_scale[None, :] == 0.0, 0.0, g)  # skips a non-finite gradient
    w = decay * w - (total + residual_scale[None, :] * g)
    tl.store(w_at, w.to(w_bab.dtype.element_ty), mask=mask)


@torch.library.custom_op("epochal_kernels::fira_project", mutates_args=())
def fira_project(gradient: Tensor, basis: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return R (B, r, b) and the squared norms of G's columns (B, b).

    R has the strides of `like` (a moment).

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check(gradient, basis, like)
    if not _kernels(like):
        low, squares = fira_project_reference(gradient, basis)
        return torch.empty_like(like).copy_(low), squares
    batch, a, n = gradient.shape
    r = basis.shape[2]
    low, squares = torch.empty_like(like), like.new_empty(batch, n)
    if squares.numel():
        _fira_project_kernel[(triton.cdiv(n, BLOCK_B), triton.cdiv(max(r, 1), BLOCK_R), batch)](
            basis, gradient, low, squares, a, n, r, *basis.stride(), *gradient.stride(), *low.stride(),
            PRECISION=PRECISION, BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return low, squares


@fira_project.register_fake
def _(gradient, basis, like):
    return torch.empty_like(like), like.new_empty(gradient.shape[0], gradient.shape[2])


@torch.library.custom_op("epochal_kernels::fira_adam", mutates_args=("mean", "square"))
def fira_adam(low: Tensor, mean: Tensor, square: Tensor, weights: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Update M and V (B, r, b) in place; return N, low_squares (B, b) and direction_squares (B, b).

    Args:
        low, mean, square: R, M, V, of one shape and dtype; M and V with the same strides.
        weights: (B, 2), 1 - beta1 and 1 - beta2 of each matrix, or zeros to leave its moments as they are.
        eps: 0-d.

    Raises:
        ValueError: for moments of other shapes or dtypes than R, or of different strides.
    """
    if mean.stride() != square.stride() or any(t.shape != low.shape or t.dtype != low.dtype for t in (mean, square)):
        raise ValueError(
            f"fira_adam: moments {tuple(mean.shape)} {mean.dtype} and {tuple(square.shape)} {square.dtype} do not match R "
            f"{tuple(low.shape)} {low.dtype}; pass tensors of one shape and dtype, and moments of one layout."
        )
    if not _kernels(mean):
        direction, low_squares, direction_squares, *new = fira_adam_reference(low, mean, square, weights, eps)
        mean.copy_(new[0])
        square.copy_(new[1])
        return torch.empty_like(mean).copy_(direction), low_squares, direction_squares
    batch, r, n = low.shape
    low, direction = _laid_out(low, mean), torch.empty_like(mean)
    low_squares, direction_squares = (low.new_zeros(batch, n) for _ in range(2))
    if low.numel():
        _fira_adam_kernel[(triton.cdiv(n, BLOCK_B), batch)](
            low, mean, square, direction, low_squares, direction_squares, weights.contiguous(), eps, n, r, *low.stride(),
            BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return direction, low_squares, direction_squares


@fira_adam.register_fake
def _(low, mean, square, weights, eps):
    return torch.empty_like(mean), *(low.new_empty(low.shape[0], low.shape[2]) for _ in range(2))


@torch.library.custom_op("epochal_kernels::fira_update", mutates_args=("weight",))
def fira_update(
    weight: Tensor, gradient: Tensor, basis: Tensor, direction: Tensor, low: Tensor,
    lowrank_scale: Tensor, projection_coef: Tensor, residual_scale: Tensor, decay: Tensor,
) -> None:  # fmt: skip
    """Update W (B, a, b) in place; shapes as at the top of this file. Where residual_scale is 0, G may be non-finite.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check(gradient, basis, low)
    batch, a, n = weight.shape
    per_column, per_matrix = (projection_coef, residual_scale), (lowrank_scale, decay)
    vectors = all(t.shape == (batch, n) for t in per_column) and all(t.shape == (batch,) for t in per_matrix)
    if gradient.shape != weight.shape or direction.shape != low.shape or not vectors:
        raise ValueError(
            f"fira_update: G {tuple(gradient.shape)}, projection_coef {tuple(projection_coef.shape)}, residual_scale "
            f"{tuple(residual_scale.shape)}, lowrank_scale {tuple(lowrank_scale.shape)} and decay {tuple(decay.shape)} "
            f"do not fit W {tuple(weight.shape)}; pass (B, a, b), (B, b) twice, (B,) twice."
        )
    if not _kernels(direction):
        g = torch.where(residual_scale[:, None] == 0, 0.0, gradient)
        numbers = (lowrank_scale, projection_coef, residual_scale, decay)
        weight.copy_(fira_update_reference(weight, g, basis, direction, low, *numbers))
    elif weight.numel():
        low = _laid_out(low, direction)
        _fira_update_kernel[(triton.cdiv(a, BLOCK_A), triton.cdiv(n, BLOCK_B), batch)](
            weight, gradient, basis, direction, low, projection_coef.contiguous(), residual_scale.contiguous(),
            torch.stack([lowrank_scale, decay], 1), a, n, basis.shape[2],
            *weight.stride(), *gradient.stride(), *basis.stride(), *low.stride(),
            PRECISION=PRECISION, BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
            num_stages=2,  # three stages need more shared memory than small GPUs have
        )  # fmt: skip


@fira_update.register_fake
def _(*_arguments):
    return None


def _kernels(state: Tensor) -> bool:
    return use_kernel(state.device) and state.dtype == torch.float32


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of another; only axes of length 1 can differ."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _check(gradient: Tensor, basis: Tensor, low: Tensor) -> None:
    fits = gradient.ndim == basis.ndim == low.ndim == 3 and gradient.shape[:2] == basis.shape[:2]
    if not fits or low.shape != (gradient.shape[0], basis.shape[2], gradient.shape[2]):
        raise ValueError(
            f"fira_step: G {tuple(gradient.shape)}, P {tuple(basis.shape)} and R {tuple(low.shape)} do not fit; pass "
            "(B, a, b), (B, a, r) and (B, r, b)."
        )
