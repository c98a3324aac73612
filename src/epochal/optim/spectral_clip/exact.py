"""Spectral clipping by a decomposition: exact up to rounding, and it reads values back to the host.

With the eigendecomposition S = X X^T = V diag(s^2) V^T of the smaller side,

    clip(X) = V diag(factor) V^T X,    factor = c / sqrt(c^2 + s^2) (soft)  or  min(1, c / s) (hard)

Squaring X halves the digits of small singular values, so the condition number a = 1 + ||S|| / c^2 selects the
arithmetic: float32, then float64, and from a = 1e8 an SVD of X itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epochal.optim.spectral_clip._common import gram_bound

# Largest condition number at which a float32 decomposition keeps the error below 2e-5 and below 1%, respectively.
CONDITION_ROUNDING = 300.0
CONDITION_ONE_PERCENT = 1e5
# Largest condition number at which squaring X in float64 keeps enough digits of the small singular values.
CONDITION_FLOAT64 = 1e8


def clip(
    x: Tensor,
    c: Tensor,
    *,
    hard: bool = False,
    float32_up_to: float = CONDITION_ROUNDING,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Clip X (B, m, n), m <= n, float32 or float64, at c (B,) float64; `dtype` fixes the arithmetic."""
    if dtype is not None or torch.compiler.is_compiling():  # a compiled graph cannot choose by value
        wide = x.to(dtype or torch.float64)
        return _by_eigh(wide, wide @ wide.mT, c, hard).to(x.dtype)

    gram = x @ x.mT
    # An upper bound, so a matrix may get more precision than it needs, never less.
    condition = 1 + gram_bound(gram) / (c * c)
    svd = condition > CONDITION_FLOAT64
    # `~(a > b)` instead of `a <= b`: a NaN takes the cheapest path.
    narrow = ~(condition > float32_up_to) & (x.dtype == torch.float32)
    wide = ~narrow & ~svd

    # Each matrix is decomposed in the arithmetic that it needs, whatever the rest of the batch needs.
    out = torch.empty_like(x)
    if narrow.any():
        out[narrow] = _by_eigh(x[narrow], gram[narrow], c[narrow], hard)
    if wide.any():
        part = x[wide].double()
        out[wide] = _by_eigh(part, part @ part.mT, c[wide], hard).to(x.dtype)
    if svd.any():
        out[svd] = _by_svd(x[svd].double(), c[svd], hard).to(x.dtype)
    return out


def _factor(squared: Tensor, c: Tensor, hard: bool) -> Tensor:
    """Return the factor on singular values from their squares (B, m) and c (B, 1)."""
    return c / torch.sqrt(torch.maximum(c * c, squared) if hard else c * c + squared)


def _by_eigh(x: Tensor, gram: Tensor, c: Tensor, hard: bool) -> Tensor:
    squared, vectors = torch.linalg.eigh(gram, UPLO="U")
    factor = _factor(squared.double().clamp(min=0), c[:, None], hard).to(x.dtype)
    # V diag(f) V^T as a product with its own transpose, which is symmetric up to the last bit.
    half = vectors * factor.sqrt()[:, None, :]
    out: Tensor = (half @ half.mT) @ x
    return out


def _by_svd(x: Tensor, c: Tensor, hard: bool) -> Tensor:
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    out: Tensor = (left * (s * _factor(s * s, c[:, None], hard))[:, None, :]) @ right
    return out
