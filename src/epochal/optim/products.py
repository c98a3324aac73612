"""Matrix products on a CPU: through the faster of torch's two libraries, and only one half of what is symmetric.

torch multiplies float32 matrices with MKL, which on CPUs of other makers keeps to half of their vector width. oneDNN, the
other library in it, does not: 2.1 times faster on a Zen 4 from 128 rows on, no difference on Intel. No product changes
its meaning or precision by it; on a GPU, under torch.compile and for other dtypes everything here is `a @ b`.

A Gram matrix X X^T of m rows cut into k blocks of rows is made of the blocks X_i X_j^T with i <= j, (k + 1) / 2k of the
arithmetic; and so is the square of a symmetric matrix.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SMALL = 128
"""Products with a side below this are not worth a detour, and blocks of fewer rows do not run at full speed."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return A B of matrices, or of batches (B, m, k) and (B, k, n)."""
    if not _worth_it(a, b):
        return a @ b
    if a.ndim > 2:
        found = [matmul(x, y) for x, y in zip(a, b, strict=True)]
        return found[0][None] if len(found) == 1 else torch.stack(found)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).mT, None, "none", [], "")
    return product


def _worth_it(a: Tensor, b: Tensor) -> bool:
    small = min(*a.shape[-2:], b.shape[-1]) < SMALL
    # The last: a build of torch without oneDNN.
    return _on_cpu(a) and a.dtype == torch.float32 and not small and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _dense(x: Tensor) -> Tensor:
    # Columns cut out of a bigger matrix have no fast kernel in oneDNN: a reference loop, hundreds of times slower.
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def upper_gram(x: Tensor) -> Tensor:
    """Return X X^T of x (..., m, n), (..., m, m), of which only the upper triangle is meant to be read."""
    return _upper(x)


def gram(x: Tensor) -> Tensor:
    """Return X X^T of x (..., m, n), whole."""
    return _mirrored(_upper(x))


def _upper(x: Tensor) -> Tensor:
    """Return X X^T whole, or its blocks on and above the diagonal, with zeros below."""
    blocks = _blocks(x)
    if len(blocks) == 1:
        return matmul(x, x.mT)
    # Zeros, for what is not computed must not be a NaN that a later product spreads.
    out = x.new_zeros(*x.shape[:-1], x.shape[-2])
    for rows in blocks:
        out[..., rows, rows.start :] = matmul(x[..., rows, :], x[..., rows.start :, :].mT)
    return out


def _mirrored(upper: Tensor) -> Tensor:
    """Write what is above the diagonal blocks below them too, in place."""
    for rows in _blocks(upper):
        upper[..., rows.stop :, rows] = upper[..., rows, rows.stop :].mT
    return upper


def _blocks(x: Tensor) -> list[slice]:
    rows = x.shape[-2]
    count = max(1, min(4, rows // SMALL)) if _on_cpu(x) else 1
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
