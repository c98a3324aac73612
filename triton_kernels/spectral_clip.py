"""SPECTRA's soft spectral clip and weight update on stacked matrices, without a host synchronisation.

    H_c(X) = (I + X X^T / c^2)^(-1/2) X,      W <- (1 - decay) W - rate H_c(X)

With S = X X^T, a bound b >= ||S||_2 and P = (c^2 I + S) / (c^2 + b), whose eigenvalues lie in [c^2 / (c^2 + b), 1]:
Z ~ P^(-1/2) by steps T = alpha I + beta Q + gamma Q^2 in Q = Y Z, with Y <- Y T, Z <- Z T from Y = P, Z = I. The
coefficients are the caller's: row l of `table` serves conditions (c^2 + b) / c^2 up to 2^(l+1). S, S^2 and Q^2 are
`sym_mm`; Q, Y T and Z T are not, though symmetric in exact arithmetic: rounded factors do not commute, and mirroring one
triangle keeps the commutator as an error (float16, condition 100: 1.4% instead of 0.13%). The last product carries the
weight update.

Shapes: B matrices, m <= n. W, X (B, m, n), any strides; c (B,); table (L, K, 3), padded with steps (1, 0, 0).
Products for K steps: S, S^2 and K - 1 squares at half price, 3 K - 3 whole ones (first and last step trimmed) and one of
m x m x n, where the published code runs 30 whole square ones.
The update reads X, W and writes W; unfused, H_c(X) is written and read once more.
"""

# The arguments of kernels are Triton's own pointers and numbers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import INTERPRETED, jit, tl, triton, use_kernel
from triton_kernels.sym_mm import sym_mm


def spectral_clip_reference(x: Tensor, c: Tensor) -> Tensor:
    """Return H_c(X) from a singular value decomposition: the definition."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    c = c.to(s.dtype)[:, None]
    clipped: Tensor = (u * (s * c / torch.hypot(c, s))[:, None, :]) @ vh
    return clipped


def update_reference(weight: Tensor, z: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Return factors[:, 0] W + factors[:, 1] Z X in the dtype of W, summed in float32: the last product."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    keep, add = factors.to(wide)[:, :, None, None].unbind(1)
    return (keep * weight.to(wide) + add * torch.bmm(z, x).to(wide)).to(weight.dtype)


@jit
def _update_kernel(
    w_bmn, z_bmm, x_bmn, f_b2, M, N, w_sb, w_sm, w_sn, z_sb, z_sm, z_sn, x_sb, x_sm, x_sn,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    z_tile = z_bmm + batch * z_sb + rows[:, None].to(tl.int64) * z_sm
    x_tile = x_bmn + batch * x_sb + columns[None, :].to(tl.int64) * x_sn
    for start in range(0, M, BLOCK_K):
        k = start + inner
        z = tl.load(z_tile + k[None, :] * z_sn, mask=(rows[:, None] < M) & (k[None, :] < M), other=0.0)
        x_mask = (k[:, None] < M) & (columns[None, :] < N)
        x = tl.load(x_tile + k[:, None].to(tl.int64) * x_sm, mask=x_mask, other=0.0)
        if UPCAST:
            z = z.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(z, x, total, input_precision="ieee")
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    w_tile = w_bmn + batch * w_sb + rows[:, None].to(tl.int64) * w_sm + columns[None, :].to(tl.int64) * w_sn
    keep = tl.load(f_b2 + batch * 2)
    add = tl.load(f_b2 + batch * 2 + 1)
    w = keep * tl.load(w_tile, mask=inside, other=0.0).to(tl.float32) + add * total
    tl.store(w_tile, w.to(w_bmn.dtype.element_ty), mask=inside)


@torch.library.custom_op("epochal_kernels::clip_update", mutates_args=("weight",))
def clip_update(weight: Tensor, z: Tensor, x: Tensor, factors: Tensor) -> None:
    """Set W (B, m, n) to factors[:, 0] W + factors[:, 1] Z X, with Z (B, m, m), X (B, m, n), factors (B, 2).

    Raises ValueError for shapes that do not fit or Z and X of different dtypes.
    """
    batch, m, n = weight.shape
    if z.shape != (batch, m, m) or x.shape != weight.shape or factors.shape != (batch, 2) or z.dtype != x.dtype:
        raise ValueError(
            f"clip_update: Z {tuple(z.shape)} {z.dtype}, X {tuple(x.shape)} {x.dtype} and factors "
            f"{tuple(factors.shape)} do not fit W {tuple(weight.shape)}; pass (B, m, m), (B, m, n), (B, 2)."
        )
    if not use_kernel(weight.device) or torch.float64 in (weight.dtype, x.dtype):
        weight.copy_(update_reference(weight, z, x, factors))
    elif weight.numel():
        block, inner = (128, 32) if x.dtype != torch.float32 else (64, 32)
        _update_kernel[(triton.cdiv(m, block), triton.cdiv(n, block), batch)](
            weight, z, x, factors.float().contiguous(), m, n, *weight.stride(), *z.stride(), *x.stride(),
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16, BLOCK_M=block, BLOCK_N=block, BLOCK_K=inner, num_warps=8,
        )  # fmt: skip


@clip_update.register_fake
def _(weight, z, x, factors):
    return None


def spectral_clip_step_(
    weight: Tensor, x: Tensor, c: Tensor, table: Tensor, *, rate: float | Tensor = 1.0, decay: float | Tensor = 0.0
) -> None:
    """Set W to (1 - decay) W - rate H_c(X), in place: one SPECTRA step of a stack of equal shapes.

    weight and x (B, m, n) with m <= n (pass transposed views of tall matrices), c (B,), table (L, K, 3) as in the
    file's docstring, rate and decay numbers or (B,) tensors. Products run in the dtype of ``x``, whose entries should
    be below 1 / sqrt(n) in float16 (scale X and c by one factor, and divide it out of ``rate``). No value is read back,
    so the step can be captured in a CUDA graph. Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 3 or x.shape != weight.shape or x.shape[1] > x.shape[2] or c.shape != x.shape[:1]:
        raise ValueError(
            f"spectral_clip_step_: X {tuple(x.shape)}, W {tuple(weight.shape)} and c {tuple(c.shape)} do not fit; "
            "pass (B, m, n) twice with m <= n, and (B,)."
        )
    if x.numel() == 0:
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    c = c.to(wide)
    gram = sym_mm(x, x)
    square = sym_mm(gram, gram)
    # Neither the root of ||S^2||_F nor a row sum can be below the spectral norm; rounding gets a margin.
    frobenius = torch.linalg.vector_norm(square, dim=(1, 2), dtype=wide).sqrt()
    row_sums = torch.linalg.vector_norm(gram, ord=1, dim=2, dtype=wide).amax(1)
    bound = torch.minimum(frobenius, row_sums) * (1 + 8 * torch.finfo(x.dtype).eps)
    level = torch.log2(1 + bound / (c * c)).ceil().long().clamp(1, len(table)) - 1
    steps = table.to(device=x.device, dtype=wide)[level]
    p = 1 / (c * c + bound)
    q = c * c * p
    z = _inverse_root(gram, square, p, q, steps)
    rate, decay = (torch.as_tensor(v, device=x.device, dtype=wide).expand(len(x)) for v in (rate, decay))
    clip_update(weight, z, x, torch.stack([1 - decay, -rate * q.sqrt()], 1))


def _inverse_root(gram: Tensor, square: Tensor, p: Tensor, q: Tensor, steps: Tensor) -> Tensor:
    """Return Z ~ (q I + p S)^(-1/2), from S and S^2 (B, m, m); p, q (B,), steps (B, K, 3)."""
    wide = p.dtype

    def combine(*terms: tuple[Tensor, Tensor], diagonal: Tensor) -> Tensor:
        total = sum(weight[:, None, None] * matrix.to(wide) for weight, matrix in terms)
        assert isinstance(total, Tensor)
        total.diagonal(dim1=1, dim2=2).add_(diagonal[:, None])
        return total.to(gram.dtype)

    y = combine((p, gram), diagonal=q)
    alpha, beta, gamma = steps[:, 0].unbind(1)
    # The first Q is P itself, and P^2 is made of the S^2 that the bound needed: no product.
    linear, quadratic, constant = beta * p + 2 * gamma * q * p, gamma * p * p, alpha + beta * q + gamma * q * q
    z = combine((linear, gram), (quadratic, square), diagonal=constant)
    y = torch.bmm(y, z)
    for k in range(1, steps.shape[1]):
        product = torch.bmm(z, y)
        t = sym_mm(product, product, product, steps[:, k].flip(1).contiguous())  # gamma Q Q^T + beta Q + alpha I
        y = torch.bmm(y, t) if k + 1 < steps.shape[1] else y
        z = torch.bmm(t, z)
    return z
