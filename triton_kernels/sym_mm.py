"""Symmetric products: one triangle computed, the other mirrored.

    out = alpha A B^T + beta C + delta I

for A B^T symmetric: B = A (a Gram matrix X X^T), or A and B symmetric and commuting (polynomials in one matrix). In
16 bits rounded factors commute only approximately; `spectral_clip/minimax.py` gives the resulting errors.

Shapes: b batch, m rows, k inner. A, B (b, m, k), any strides; C and out (b, m, m); coefficients (b, 3) float32 are
(alpha, beta, delta) of each matrix; `active` (b,) int32 selects the matrices to compute, programs of the others return
immediately. Both are kept on the device to avoid a host sync.

Bytes moved: A and B are read for half of the tiles, C is read and out is written once. With cuBLAS, C and the diagonal
take separate passes over (b, m, m).

Dispatch on a GPU: a plain product A B^T goes to cuBLAS, which is faster despite twice the multiplications. On an H100
(benchmarks/kernels_gpu.csv) the kernel takes 3.5x as long for a few small matrices and 1.04x for eight of 4,096 rows.
The kernel runs for products with C and a diagonal, and with `active`, where cuBLAS would compute every matrix.
"""

# Kernel arguments are Triton pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import INTERPRETED, backend, jit, tl, triton

# (rows, inner) of a tile: fits the registers of an 8-warp program; not tuned per GPU.
TILES = {torch.float16: (128, 64), torch.bfloat16: (128, 64), torch.float32: (64, 32)}


def sym_mm_reference(a: Tensor, b: Tensor, c: Tensor | None = None, coefficients: Tensor | None = None) -> Tensor:
    """Definition: alpha A B^T + beta C + delta I in the dtype of ``a``, summed in float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    out = torch.bmm(a, b.mT).to(wide)
    if coefficients is not None:
        alpha, beta, delta = coefficients.to(wide)[:, :, None, None].unbind(1)
        out = out * alpha
        if c is not None:
            out = out + beta * c.to(wide)
        out = out + delta * torch.eye(a.shape[1], dtype=wide, device=a.device)
    return out.to(a.dtype)


@jit
def _sym_mm_kernel(
    a_bmk, b_bmk, c_bmm, w_b3, on_b, out_bmm, M, K,
    a_sb, a_sm, a_sk, b_sb, b_sm, b_sk, c_sb, c_sm, c_sn, o_sb, o_sm, HAS_C: tl.constexpr, HAS_W: tl.constexpr,
    HAS_ON: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    # Tiles above the diagonal return immediately: an idle program costs less than a square root in the index.
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    wanted = tile_n <= tile_m
    if WHOLE:
        wanted = tile_n >= 0
    if HAS_ON:
        wanted = wanted & (tl.load(on_b + batch) != 0)
    if wanted:
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
        inner = tl.arange(0, BLOCK_K)
        a_tile = a_bmk + batch * a_sb + rows[:, None].to(tl.int64) * a_sm + inner[None, :] * a_sk
        b_tile = b_bmk + batch * b_sb + columns[None, :].to(tl.int64) * b_sm + inner[:, None] * b_sk
        total = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
        for start in range(0, K, BLOCK_K):
            # The last block of columns may be incomplete.
            left = K - start
            a = tl.load(a_tile, mask=(rows[:, None] < M) & (inner[None, :] < left), other=0.0)
            b = tl.load(b_tile, mask=(columns[None, :] < M) & (inner[:, None] < left), other=0.0)
            if UPCAST:  # the interpreter silently multiplies bfloat16 wrongly
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
            a_tile += BLOCK_K * a_sk
            b_tile += BLOCK_K * b_sk
        inside = (rows[:, None] < M) & (columns[None, :] < M)
        if HAS_W:
            total = total * tl.load(w_b3 + batch * 3)
            if HAS_C:
                # The epilogue: C and the identity are added before the tile is rounded and stored.
                c_tile = c_bmm + batch * c_sb + rows[:, None].to(tl.int64) * c_sm + columns[None, :] * c_sn
                total += tl.load(w_b3 + batch * 3 + 1) * tl.load(c_tile, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(rows[:, None] == columns[None, :], tl.load(w_b3 + batch * 3 + 2), 0.0)
        out = out_bmm + batch * o_sb
        value = total.to(out_bmm.dtype.element_ty)
        if WHOLE:
            tl.store(out + rows[:, None].to(tl.int64) * o_sm + columns[None, :], value, mask=inside)
        else:
            # Mirrored entries are the same number, also in the tiles on the diagonal.
            lower = inside & (rows[:, None] >= columns[None, :])
            upper = inside & (rows[:, None] > columns[None, :])
            tl.store(out + rows[:, None].to(tl.int64) * o_sm + columns[None, :], value, mask=lower)
            tl.store(out + columns[None, :].to(tl.int64) * o_sm + rows[:, None], value, mask=upper)


def sym_mm_path(dtype: torch.dtype, device: torch.device | str, *, plain: bool) -> str:
    """Backend of `sym_mm`: ``"triton"``, ``"triton-interpreter"`` or ``"torch"`` (cuBLAS on a GPU).

    `plain`: without coefficients and without `active`.
    """
    path = backend(device)
    return "torch" if dtype not in TILES or (plain and path == "triton") else path


@torch.library.custom_op("epochal_kernels::sym_mm", mutates_args=())
def sym_mm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    coefficients: Tensor | None = None,
    active: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """Return alpha A B^T + beta C + delta I, (b, m, m).

    The result has the dtype of ``a``; without coefficients it is A B^T. A B^T and C must be symmetric, because the
    kernel computes one triangle and mirrors it bit by bit; with `whole` it computes both. With `active` (b,) int32 only
    matrices whose entry is not 0 are computed, the others are undefined. Raises ValueError if shapes or dtypes do not
    match, or for a C without coefficients.
    """
    _check(a, b, c, coefficients)
    batch, m, k = a.shape
    if sym_mm_path(a.dtype, a.device, plain=coefficients is None and active is None) == "torch":
        return sym_mm_reference(a, b, c, coefficients)
    out = a.new_empty(batch, m, m)
    if batch == 0 or m == 0:
        return out
    block, inner = TILES[a.dtype]
    tiles = triton.cdiv(m, block)
    c_like, w_like = out if c is None else c, out if coefficients is None else coefficients.float().contiguous()
    on_like = out if active is None else active.contiguous()
    _sym_mm_kernel[(tiles, tiles, batch)](
        a, b, c_like, w_like, on_like, out, m, k, *a.stride(), *b.stride(), *c_like.stride(), *out.stride()[:2],
        HAS_C=c is not None, HAS_W=coefficients is not None, HAS_ON=active is not None, WHOLE=whole,
        UPCAST=INTERPRETED and a.dtype == torch.bfloat16, BLOCK_M=block, BLOCK_K=inner, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@sym_mm.register_fake
def _(a, b, c=None, coefficients=None, active=None, whole=False):
    return a.new_empty(a.shape[0], a.shape[1], a.shape[1])


def _check(a: Tensor, b: Tensor, c: Tensor | None, coefficients: Tensor | None) -> None:
    if a.ndim != 3 or a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"sym_mm: A {tuple(a.shape)} {a.dtype} and B {tuple(b.shape)} {b.dtype} must have the same shape and dtype; "
            "pass two (batch, m, k) tensors."
        )
    if c is not None and (coefficients is None or c.shape != (a.shape[0], a.shape[1], a.shape[1])):
        raise ValueError(
            f"sym_mm: C {tuple(c.shape)} cannot be added to {a.shape[0]} matrices of {a.shape[1]} rows"
            f"{' without coefficients' if coefficients is None else ''}; pass (batch, m, m) and coefficients (batch, 3)."
        )
    if coefficients is not None and coefficients.shape != (a.shape[0], 3):
        raise ValueError(
            f"sym_mm: coefficients {tuple(coefficients.shape)} do not match {a.shape[0]} matrices; pass (batch, 3)."
        )
