"""What the three methods share: a bound on the spectral norm, and polynomials of low degree in a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_bound(gram: Tensor) -> Tensor:
    """Upper bound on ||S||_2 of symmetric S (B, m, m): float64 (B,).

    The smaller of the largest absolute row sum and the Frobenius norm, as in the published code.
    """
    return torch.minimum(_largest_row_sum(gram), frobenius(gram)).clamp(min=1e-30)


def _largest_row_sum(matrix: Tensor) -> Tensor:
    wide = torch.promote_types(matrix.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(matrix, ord=1, dim=-1, dtype=wide)
    return sums.amax(-1).double()


def frobenius(matrix: Tensor) -> Tensor:
    """Frobenius norm of each matrix (B, m, m): float64 (B,)."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=wide)
    return norm.double()


def identity_plus(diagonal: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Polynomial diagonal I + sum of weight * matrix over `terms`; diagonal and weights (B,), matrices (B, m, m)."""
    weight, matrix = terms[0]
    wide = torch.promote_types(matrix.dtype, torch.float32)
    out = matrix.to(wide) * weight.to(wide)[:, None, None]
    for weight, matrix in terms[1:]:
        out = torch.addcmul(out, matrix.to(wide), weight.to(wide)[:, None, None])
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal.to(wide)[:, None])
    return out
