"""Add the weighted softmax of one teacher's logits to a running mixture.

    total_iv <- (total_iv or 0) + w softmax(z_i / T)_v

K teachers share one (N, V) buffer, so memory does not depend on K.

Shapes: N rows (tokens), V vocabulary. z (N, V) any float; total (N, V) float32 (float64 in torch only).
``logits`` may be ``total`` if nothing is accumulated: the softmax is then in-place.

Bytes moved: z is read twice (the second time from cache for the usual vocabularies), total read and written once. torch
also writes and reads a temporary (N, V).
"""

# Kernel arguments are Triton pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import jit, tl, triton, use_kernel
from triton_kernels.online import online, online_end


def softmax_add_reference(total: Tensor, logits: Tensor, *, weight: float, temperature: float) -> Tensor:
    """Definition: total + weight softmax(logits / temperature), all (N, V)."""
    return total + weight * (logits.to(total.dtype) / temperature).softmax(1)


@jit
def _softmax_add_kernel(
    total_nv, z_nv, total_stride, z_stride, V, weight, inverse_temperature,
    ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_nv + row * z_stride
    total_row = total_nv + row * total_stride
    columns = tl.arange(0, BLOCK)
    # First pass: maximum and sum of exponentials. Second pass: normalize and add.
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(z_row + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        m, s = online(m, s, z * inverse_temperature)
    top, total = online_end(m, s)
    scale = weight / total
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        z = tl.load(z_row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        value = scale * tl.exp(z * inverse_temperature - top)
        if ACCUMULATE:
            value += tl.load(total_row + start + columns, mask=inside, other=0.0)
        tl.store(total_row + start + columns, value, mask=inside)


# A custom op must not have arguments that share memory.
def softmax_add_(total: Tensor, logits: Tensor, weight: float, temperature: float, accumulate: bool) -> None:
    """`softmax_add` without operator registration, so that ``logits`` may be ``total``."""
    if total.shape != logits.shape or total.ndim != 2:
        raise ValueError(
            f"softmax_add: logits {tuple(logits.shape)} do not match total {tuple(total.shape)}; pass two (N, V) tensors."
        )
    if total.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"softmax_add: total must be float32, got {total.dtype}, which drops small terms of a mixture of many teachers."
        )
    rows, vocabulary = total.shape
    row_major = vocabulary < 2 or (total.stride(1) == 1 and logits.stride(1) == 1)
    if not row_major:
        raise ValueError(f"softmax_add: rows must be contiguous, got strides {total.stride()} and {logits.stride()}.")
    if not use_kernel(total.device) or total.dtype == torch.float64:
        softmax = (logits.to(total.dtype) / temperature).softmax(1)
        if accumulate:
            total.add_(softmax, alpha=weight)
        else:
            torch.mul(softmax, weight, out=total)
    elif rows and vocabulary:
        _softmax_add_kernel[(rows,)](
            total, logits, total.stride(0), logits.stride(0), vocabulary, float(weight), 1.0 / temperature,
            ACCUMULATE=accumulate, BLOCK=min(triton.next_power_of_2(vocabulary), 4096), num_warps=8,
        )  # fmt: skip


@torch.library.custom_op("epochal_kernels::softmax_add", mutates_args=("total",))
def softmax_add(total: Tensor, logits: Tensor, weight: float, temperature: float, accumulate: bool) -> None:
    """Set ``total`` (N, V) to weight softmax(logits / temperature), or add it if ``accumulate``.

    Raises ValueError for mismatched shapes, strides, or a ``total`` in half precision.
    """
    softmax_add_(total, logits, weight, temperature, accumulate)


@softmax_add.register_fake
def _(total, logits, weight, temperature, accumulate):
    return None
