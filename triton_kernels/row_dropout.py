"""Dropout whose mask depends on one seed per row and on nothing else.

    y_i = x_i m_i / (1 - p),  m_ij = 1 with probability 1 - p, drawn from (seed_i, j)

The gradient is the same operation on the gradient, so no mask is kept for the backward pass, and a recomputed forward pass
draws the same mask.

Shapes: x (b, ...) any float; seeds (b,) int64 below 2^32. On a CPU row i is drawn by a torch.Generator with its seed; the
kernel's counter-based numbers (Philox) differ from it.

Bytes moved: x is read once, y written once. The torch path launches three operations for each row.
"""

# Kernel arguments are Triton pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import backend, jit, tl, triton


def row_dropout_reference(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Definition, with one torch.Generator per row."""
    draws = []
    for seed in seeds.tolist():
        generator = torch.Generator(x.device).manual_seed(seed)
        draws.append(torch.rand(x.shape[1:], generator=generator, device=x.device))
    kept = (torch.stack(draws) >= p).to(x.dtype)
    return x * kept.div_(1.0 - p)


@jit
def _row_dropout_kernel(
    y, x, seeds, size, p, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    drawn = tl.rand(tl.load(seeds + row), columns)
    tl.store(y + row * size + columns, tl.where(drawn >= p, value * scale, 0.0), mask=inside)


def row_dropout_kernel(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Launch the kernel; see `row_dropout`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, size, block = x.shape[0], x[:1].numel(), 1024
    if x.numel():
        _row_dropout_kernel[(rows, triton.cdiv(size, block))](y, x, seeds, size, p, 1.0 / (1.0 - p), BLOCK=block)
    return y


@torch.library.custom_op("epochal_kernels::row_dropout", mutates_args=())
def row_dropout(x: Tensor, seeds: Tensor, share: Tensor) -> Tensor:
    """Drop a share p of each row; divide the others by 1 - p.

    x (b, ...), seeds (b,): row i draws its mask from seeds[i]. `share` is p, 0-d on the CPU: a compiled graph takes a tensor as
    an input, where another float would be another graph.
    Raises ValueError for another number of seeds than rows, or a p outside of [0, 1).
    """
    p = float(share)
    if seeds.shape != x.shape[:1] or not 0 <= p < 1:
        raise ValueError(
            f"row_dropout: seeds {tuple(seeds.shape)} and p {p} for x {tuple(x.shape)}; pass one seed a row, 0 <= p < 1."
        )
    # Under the interpreter too the CPU keeps the generators: the masks of a run must not depend on how tests run.
    if backend(x.device) == "triton":
        return row_dropout_kernel(x, seeds, p)
    return row_dropout_reference(x, seeds, p)


@row_dropout.register_fake
def _(x, seeds, share):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, gradient):
    return row_dropout(gradient, *ctx.saved_tensors), None, None


row_dropout.register_autograd(_backward, setup_context=_save)
