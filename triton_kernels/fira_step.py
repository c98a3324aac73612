"""Fira's step between two refreshes, in three passes that never store the residual.

    project   R = P^T G,  energy_j = ||G_j||^2
    adam      M <- M + w_1 (R - M),  V <- V + w_2 (R R - V),  N = M / (sqrt(V) + eps),
              inside_j = ||R_j||^2,  size_j = ||N_j||^2
    update    W <- keep W - P (whole N - share_j R_j) - factor_j G_j

What lies between, a few numbers for each column or matrix, is epochal.optim.fira's and stays on the device: nothing
waits, and a CUDA graph can hold a step.

Shapes: B matrices, rank r. W, G (B, a, b), any strides (pass transposed views where the other side is projected);
P (B, a, r); R, M, V, N (B, r, b), M and V with the same strides; energy, inside, size, share, factor (B, b) per column
j; w (B, 2), whole and keep (B,). M, V float32; W, G, P any float.

Traffic: G twice, W read and written, and about 9 r b; the published code moves about 27 a b.
"""

# The arguments of kernels are Triton's own pointers and numbers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import PRECISION, jit, tl, triton, use_kernel

BLOCK_B, BLOCK_R, BLOCK_A = 64, 64, 32


def fira_project_reference(gradient: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return R and energy, in float32 at least: the definition."""
    wide = torch.promote_types(basis.dtype, torch.float32)
    g = gradient.to(wide)
    return basis.to(wide).mT @ g, (g * g).sum(1)


def fira_adam_reference(
    low: Tensor, mean: Tensor, square: Tensor, weights: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return N, inside, size, M and V: the definition."""
    mean = mean + weights[:, 0, None, None] * (low - mean)
    square = square + weights[:, 1, None, None] * (low * low - square)
    direction = mean / (square.sqrt() + eps)
    return direction, (low * low).sum(1), (direction * direction).sum(1), mean, square


def fira_update_reference(
    weight: Tensor, gradient: Tensor, basis: Tensor, direction: Tensor, low: Tensor,
    whole: Tensor, share: Tensor, factor: Tensor, keep: Tensor,
) -> Tensor:  # fmt: skip
    """Return the new W, in the dtype of N: the definition."""
    wide = direction.dtype
    inner = whole[:, None, None] * direction - share[:, None] * low
    step = basis.to(wide) @ inner + factor[:, None] * gradient.to(wide)
    return keep[:, None, None] * weight.to(wide) - step


@jit
def _fira_project_kernel(
    p_bar, g_bab, low_brb, energy_bb, A, N, R, p_sb, p_sa, p_sr, g_sb, g_sa, g_sn, r_sb, r_sr, r_sn,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ranks = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    low = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    energy = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, A, BLOCK_A):
        a = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        g_mask = (a[:, None] < A) & (columns[None, :] < N)
        g = tl.load(g_bab + batch * g_sb + a[:, None] * g_sa + columns[None, :] * g_sn, mask=g_mask, other=0.0)
        p_mask = (ranks[:, None] < R) & (a[None, :] < A)
        p = tl.load(p_bar + batch * p_sb + a[None, :] * p_sa + ranks[:, None] * p_sr, mask=p_mask, other=0.0)
        g = g.to(tl.float32)  # a basis rounded to 16 bits would not be orthonormal, and the norms below rely on it
        energy += tl.sum(g * g, 0)
        low = tl.dot(p.to(tl.float32), g, low, input_precision=PRECISION)
    inside = (ranks[:, None] < R) & (columns[None, :] < N)
    tl.store(low_brb + batch * r_sb + ranks[:, None] * r_sr + columns[None, :] * r_sn, low, mask=inside)
    if tl.program_id(1) == 0:  # every block of ranks reads the same G; one of them reports its norms
        tl.store(energy_bb + batch * N + columns, energy, mask=columns < N)


@jit
def _fira_adam_kernel(
    low_brb, mean_brb, square_brb, n_brb, inside_bb, size_bb, w_b2, eps_1, N, R, r_sb, r_sr, r_sn,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mean_weight, square_weight = tl.load(w_b2 + batch * 2), tl.load(w_b2 + batch * 2 + 1)
    eps = tl.load(eps_1)
    inside = tl.zeros([BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (ranks[:, None] < R) & (columns[None, :] < N)
        at = batch * r_sb + ranks[:, None] * r_sr + columns[None, :] * r_sn
        low = tl.load(low_brb + at, mask=mask, other=0.0)
        mean = tl.load(mean_brb + at, mask=mask, other=0.0)
        square = tl.load(square_brb + at, mask=mask, other=0.0)
        mean += mean_weight * (low - mean)
        square += square_weight * (low * low - square)
        direction = mean / tl.where(mask, tl.sqrt(square) + eps, 1.0)  # outside the matrix 0 / eps, and eps may be 0
        tl.store(mean_brb + at, mean, mask=mask)
        tl.store(square_brb + at, square, mask=mask)
        tl.store(n_brb + at, direction, mask=mask)
        inside += tl.sum(low * low, 0)
        size += tl.sum(direction * direction, 0)
    tl.store(inside_bb + batch * N + columns, inside, mask=columns < N)
    tl.store(size_bb + batch * N + columns, size, mask=columns < N)


@jit
def _fira_update_kernel(
    w_bab, g_bab, p_bar, n_brb, low_brb, share_bb, factor_bb, scalars_b2, A, N, R,
    w_sb, w_sa, w_sn, g_sb, g_sa, g_sn, p_sb, p_sa, p_sr, r_sb, r_sr, r_sn,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    whole, keep = tl.load(scalars_b2 + batch * 2), tl.load(scalars_b2 + batch * 2 + 1)
    share = tl.load(share_bb + batch * N + columns, mask=columns < N, other=0.0)
    factor = tl.load(factor_bb + batch * N + columns, mask=columns < N, other=0.0)
    total = tl.zeros([BLOCK_A, BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (ranks[:, None] < R) & (columns[None, :] < N)
        at = batch * r_sb + ranks[:, None] * r_sr + columns[None, :] * r_sn
        x = whole * tl.load(n_brb + at, mask=mask, other=0.0)
        x -= share[None, :] * tl.load(low_brb + at, mask=mask, other=0.0)
        p_mask = (rows[:, None] < A) & (ranks[None, :] < R)
        p = tl.load(p_bar + batch * p_sb + rows[:, None] * p_sa + ranks[None, :] * p_sr, mask=p_mask, other=0.0)
        total = tl.dot(p.to(tl.float32), x, total, input_precision=PRECISION)
    mask = (rows[:, None] < A) & (columns[None, :] < N)
    g_at = g_bab + batch * g_sb + rows[:, None] * g_sa + columns[None, :] * g_sn
    w_at = w_bab + batch * w_sb + rows[:, None] * w_sa + columns[None, :] * w_sn
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.where(factor[None, :] == 0.0, 0.0, g)  # a gradient that is not finite is skipped by a factor of 0
    w = keep * w - (total + factor[None, :] * g)
    tl.store(w_at, w.to(w_bab.dtype.element_ty), mask=mask)


@torch.library.custom_op("epochal_kernels::fira_project", mutates_args=())
def fira_project(gradient: Tensor, basis: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return R (B, r, b), with the strides of ``like`` (a moment), and energy (B, b).

    Raises ValueError for shapes that do not fit.
    """
    _check(gradient, basis, like)
    if not _kernels(like):
        low, energy = fira_project_reference(gradient, basis)
        return torch.empty_like(like).copy_(low), energy
    batch, a, n = gradient.shape
    r = basis.shape[2]
    low, energy = torch.empty_like(like), like.new_empty(batch, n)
    if energy.numel():
        _fira_project_kernel[(triton.cdiv(n, BLOCK_B), triton.cdiv(max(r, 1), BLOCK_R), batch)](
            basis, gradient, low, energy, a, n, r, *basis.stride(), *gradient.stride(), *low.stride(),
            PRECISION=PRECISION, BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return low, energy


@fira_project.register_fake
def _(gradient, basis, like):
    return torch.empty_like(like), like.new_empty(gradient.shape[0], gradient.shape[2])


@torch.library.custom_op("epochal_kernels::fira_adam", mutates_args=("mean", "square"))
def fira_adam(low: Tensor, mean: Tensor, square: Tensor, weights: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Update M and V (B, r, b) in place; return N, inside (B, b) and size (B, b). weights (B, 2), eps 0-d.

    Raises ValueError for moments of other shapes, strides or dtypes than R.
    """
    if mean.stride() != square.stride() or any(t.shape != low.shape or t.dtype != low.dtype for t in (mean, square)):
        raise ValueError(
            f"fira_adam: moments {tuple(mean.shape)} {mean.dtype} and {tuple(square.shape)} {square.dtype} are not as R "
            f"{tuple(low.shape)} {low.dtype}; pass tensors of one shape and dtype, the moments in one layout."
        )
    if not _kernels(mean):
        direction, inside, size, *new = fira_adam_reference(low, mean, square, weights, eps)
        mean.copy_(new[0])
        square.copy_(new[1])
        return torch.empty_like(mean).copy_(direction), inside, size
    batch, r, n = low.shape
    low, direction = _laid_out(low, mean), torch.empty_like(mean)
    inside, size = (low.new_zeros(batch, n) for _ in range(2))
    if low.numel():
        _fira_adam_kernel[(triton.cdiv(n, BLOCK_B), batch)](
            low, mean, square, direction, inside, size, weights.contiguous(), eps, n, r, *low.stride(),
            BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return direction, inside, size


@fira_adam.register_fake
def _(low, mean, square, weights, eps):
    return torch.empty_like(mean), *(low.new_empty(low.shape[0], low.shape[2]) for _ in range(2))


@torch.library.custom_op("epochal_kernels::fira_update", mutates_args=("weight",))
def fira_update(
    weight: Tensor, gradient: Tensor, basis: Tensor, direction: Tensor, low: Tensor,
    whole: Tensor, share: Tensor, factor: Tensor, keep: Tensor,
) -> None:  # fmt: skip
    """Move W (B, a, b) in place; shapes as in the file's docstring. Where a factor is 0, G may be anything.

    Raises ValueError for shapes that do not fit.
    """
    _check(gradient, basis, low)
    batch, a, n = weight.shape
    vectors = all(t.shape == (batch, n) for t in (share, factor)) and whole.shape == keep.shape == (batch,)
    if gradient.shape != weight.shape or direction.shape != low.shape or not vectors:
        raise ValueError(
            f"fira_update: G {tuple(gradient.shape)}, share {tuple(share.shape)}, factor {tuple(factor.shape)}, whole "
            f"{tuple(whole.shape)} and keep {tuple(keep.shape)} do not fit W {tuple(weight.shape)}; pass (B, a, b), "
            "(B, b) twice, (B,) twice."
        )
    if not _kernels(direction):
        g = torch.where(factor[:, None] == 0, 0.0, gradient)
        weight.copy_(fira_update_reference(weight, g, basis, direction, low, whole, share, factor, keep))
    elif weight.numel():
        low = _laid_out(low, direction)
        _fira_update_kernel[(triton.cdiv(a, BLOCK_A), triton.cdiv(n, BLOCK_B), batch)](
            weight, gradient, basis, direction, low, share.contiguous(), factor.contiguous(),
            torch.stack([whole, keep], 1), a, n, basis.shape[2],
            *weight.stride(), *gradient.stride(), *basis.stride(), *low.stride(),
            PRECISION=PRECISION, BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_B, BLOCK_R=BLOCK_R,
            num_stages=2,  # three would need more shared memory than a small GPU has
        )  # fmt: skip


@fira_update.register_fake
def _(*_arguments):
    return None


def _kernels(state: Tensor) -> bool:
    return use_kernel(state.device) and state.dtype == torch.float32


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of another; they differ where an axis has length 1."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _check(gradient: Tensor, basis: Tensor, low: Tensor) -> None:
    fits = gradient.ndim == basis.ndim == low.ndim == 3 and gradient.shape[:2] == basis.shape[:2]
    if not fits or low.shape != (gradient.shape[0], basis.shape[2], gradient.shape[2]):
        raise ValueError(
            f"fira_step: G {tuple(gradient.shape)}, P {tuple(basis.shape)} and R {tuple(low.shape)} do not fit; pass "
            "(B, a, b), (B, a, r) and (B, r, b)."
        )
