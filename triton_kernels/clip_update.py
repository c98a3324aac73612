"""The last product of SPECTRA's clip, with the weight update in its epilogue.

    out = f_0 W + f_1 Z X          W <- (1 - lr wd) W - lr alpha H_c(X)   with H_c(X) = f Z X

Shapes: B matrices, m <= n. W, X, out (B, m, n), any strides for W and X (pass transposed views of tall matrices);
Z (B, m, m); factors f (B, 2), kept on the device to avoid a host sync. Sums are float32.

Bytes moved: X and W are read and out is written once. Unfused, Z X is also written, scaled, converted and read again.
"""

# Kernel arguments are Triton pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import INTERPRETED, jit, tl, triton, use_kernel


def clip_update_reference(weight: Tensor, z: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Definition: factors[:, 0] W + factors[:, 1] Z X in the dtype of W, summed in float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    keep, add = factors.to(wide)[:, :, None, None].unbind(1)
    return (keep * weight.to(wide) + add * torch.bmm(z, x).to(wide)).to(weight.dtype)


@jit
def _clip_update_kernel(
    out_bmn, w_bmn, z_bmm, x_bmn, f_b2, on_b, M, N, o_sb, o_sm, o_sn, w_sb, w_sm, w_sn, z_sb, z_sm, z_sn, x_sb, x_sm, x_sn,
    HAS_ON: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    wanted = tl.program_id(0) >= 0
    # Inactive matrices exit here, without a value being read by the host.
    if HAS_ON:
        wanted = tl.load(on_b + batch) != 0
    if wanted:
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
            # The interpreter silently multiplies bfloat16 wrongly.
            if UPCAST:
                z = z.to(tl.float32)
                x = x.to(tl.float32)
            total = tl.dot(z, x, total, input_precision="ieee")
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        w_tile = w_bmn + batch * w_sb + rows[:, None].to(tl.int64) * w_sm + columns[None, :].to(tl.int64) * w_sn
        # The epilogue: weight decay and step size are applied to the product in float32.
        keep = tl.load(f_b2 + batch * 2)
        add = tl.load(f_b2 + batch * 2 + 1)
        w = keep * tl.load(w_tile, mask=inside, other=0.0).to(tl.float32) + add * total
        out_tile = out_bmn + batch * o_sb + rows[:, None].to(tl.int64) * o_sm + columns[None, :].to(tl.int64) * o_sn
        tl.store(out_tile, w.to(out_bmn.dtype.element_ty), mask=inside)


@torch.library.custom_op("epochal_kernels::clip_update", mutates_args=())
def clip_update(weight: Tensor, z: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Return factors[:, 0] W + factors[:, 1] Z X in the dtype of W.

    W (B, m, n), Z (B, m, m), X (B, m, n), factors (B, 2). Raises ValueError if the shapes do not match or Z and X have
    different dtypes.
    """
    _check(weight, z, x, factors)
    out = torch.empty_like(weight)
    _launch(out, weight, z, x, factors, None)
    return out


@torch.library.custom_op("epochal_kernels::clip_update_where_", mutates_args=("out",))
def clip_update_where_(out: Tensor, weight: Tensor, z: Tensor, x: Tensor, factors: Tensor, active: Tensor) -> None:
    """Write the result of `clip_update` into `out` where `active` (B,) int32 is nonzero."""
    _check(weight, z, x, factors)
    _launch(out, weight, z, x, factors, active)


@clip_update_where_.register_fake
def _(out, weight, z, x, factors, active):
    return None


def _check(weight: Tensor, z: Tensor, x: Tensor, factors: Tensor) -> None:
    batch, m, _ = weight.shape
    if z.shape != (batch, m, m) or x.shape != weight.shape or factors.shape != (batch, 2) or z.dtype != x.dtype:
        raise ValueError(
            f"clip_update: Z {tuple(z.shape)} {z.dtype}, X {tuple(x.shape)} {x.dtype} and factors "
            f"{tuple(factors.shape)} do not match W {tuple(weight.shape)}; pass (B, m, m), (B, m, n), (B, 2)."
        )


def _launch(out: Tensor, weight: Tensor, z: Tensor, x: Tensor, factors: Tensor, active: Tensor | None) -> None:
    if not use_kernel(weight.device) or torch.float64 in (weight.dtype, x.dtype):
        updated = clip_update_reference(weight, z, x, factors)
        out.copy_(updated if active is None else torch.where(active[:, None, None] != 0, updated, out))
    elif weight.numel():
        batch, m, n = weight.shape
        # float32 tiles take twice the shared memory.
        block, inner = (128, 32) if x.dtype != torch.float32 else (64, 32)
        _clip_update_kernel[(triton.cdiv(m, block), triton.cdiv(n, block), batch)](
            out, weight, z, x, factors.float().contiguous(), out if active is None else active.contiguous(), m, n,
            *out.stride(), *weight.stride(), *z.stride(), *x.stride(), HAS_ON=active is not None,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16, BLOCK_M=block, BLOCK_N=block, BLOCK_K=inner, num_warps=8,
        )  # fmt: skip


@clip_update.register_fake
def _(weight, z, x, factors):
    return torch.empty_like(weight)
