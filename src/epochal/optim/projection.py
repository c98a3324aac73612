"""The subspace that a gradient is projected on, and how moments change with it.

    side "left":  basis P (m, r), orthonormal columns, R = P^T G (r, n), back(X) = P X
    side "right": basis Q (r, n), orthonormal rows,    R = G Q^T (m, r), back(X) = X Q

Three methods compute the leading r singular vectors, the largest singular value first:

    svd       thin singular value decomposition, as in the published code
    gram      eigenvectors of the Gram matrix of the smaller side: one product and a small symmetric problem
    subspace  one power iteration from the previous basis, then Rayleigh-Ritz; the first basis comes from `gram`
"""

from __future__ import annotations

import torch
from torch import Tensor

from epochal.optim.base import largest_magnitude, per_item, state_dtype

METHODS = ("svd", "gram", "subspace")
PROJ_TYPES = ("std", "reverse_std", "left", "right")
# Gram matrices up to this size are computed in float64, which costs little there.
FLOAT64_ROWS = 128


def projected_side(shape: torch.Size, proj_type: str) -> str:
    """Return "left" or "right" for a matrix of shape (rows, columns); a square one is "right" under "std"."""
    if proj_type in ("left", "right"):
        return proj_type
    rows, columns = shape
    return "right" if (rows >= columns) == (proj_type == "std") else "left"


def project(gradient: Tensor, basis: Tensor, side: str) -> Tensor:
    """Return R of gradients (..., m, n): (..., r, n) for "left", (..., m, r) for "right"."""
    return basis.mT @ gradient if side == "left" else gradient @ basis.mT


@torch.no_grad()
def compute_basis(grad: Tensor, rank: int, side: str, *, method: str, previous: Tensor | None = None) -> Tensor:
    """Return the basis of one finite gradient: its leading `rank` singular vectors, at most min(m, n).

    Args:
        grad: (m, n), any float dtype.
        rank: r, cut to min(m, n).
        side: "left" for a basis (m, r), "right" for (r, n).
        method: "svd", "gram" or "subspace".
        previous: the basis so far, of the result's shape; fixes the signs and starts "subspace".

    Returns:
        The basis in float32, or in float64 for a float64 gradient. A zero gradient returns `previous` if given.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"refresh={method!r} is unknown; use one of {', '.join(METHODS)}.")
    matrix = grad.to(state_dtype(grad.dtype))
    matrix = matrix if side == "left" else matrix.mT
    # Squares of tiny or huge entries leave the range of a float; the directions do not depend on the scale.
    largest = largest_magnitude(grad, (0, 1)).to(matrix.dtype)
    scale = largest.clamp(min=torch.finfo(matrix.dtype).tiny)
    old = None if previous is None else previous.to(matrix.dtype)
    if method == "svd":
        new = _svd_vectors(matrix / scale, rank)
    elif method == "gram" or old is None:
        new = _gram_vectors(matrix / scale, rank)
    else:
        new = _iterate(matrix, scale, old if side == "left" else old.mT)
    # Contiguous in the caller's orientation: combining it with `old` in another layout is many times slower.
    new = (new if side == "left" else new.mT).contiguous()
    new = new * _signs(new, old, axis=0 if side == "left" else 1)
    return new if old is None else torch.where(largest > 0, new, old)


def _svd_vectors(matrix: Tensor, rank: int) -> Tensor:
    # LAPACK is about twice as fast on the tall orientation.
    if matrix.shape[0] < matrix.shape[1]:
        rows: Tensor = torch.linalg.svd(matrix.mT, full_matrices=False).Vh
        return rows[:rank].mT
    columns: Tensor = torch.linalg.svd(matrix, full_matrices=False).U
    return columns[:, :rank]


def _gram_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors (m, r) of a (m, n) matrix."""
    # Squaring halves the number of correct digits of small singular values; float64 makes up for it.
    wide = matrix.double() if min(matrix.shape) <= FLOAT64_ROWS else matrix
    if matrix.shape[0] <= matrix.shape[1]:
        return _leading_eigenvectors(wide, rank).to(matrix.dtype)
    # The smaller Gram matrix has the right vectors V. G V is orthogonal up to rounding, except where it is small: QR.
    return _orthonormal(wide @ _leading_eigenvectors(wide.mT, rank)).to(matrix.dtype)


def _leading_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of matrix matrix^T as columns, the largest eigenvalue first."""
    # LAPACK takes a seventh less time with "U" than with "L".
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT, UPLO="U").eigenvectors
    return vectors[:, -rank:].flip(1)  # eigenvalues come ascending


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _iterate(matrix: Tensor, scale: Tensor, old: Tensor) -> Tensor:
    """Return one warm-started power iteration (m, r), with a Rayleigh-Ritz rotation that orders the vectors.

    With Z = G^T P (columns normalized) and G Z = Q R, the Ritz vectors are the eigenvectors of
    G Z (Z^T Z)^-1 Z^T G^T = Q (R (Z^T Z)^-1 R^T) Q^T, which needs no third product with G.
    """
    # Dividing the two factors with r columns by the scale avoids a scaled copy of the matrix.
    z = matrix.mT @ old / scale
    z = z / torch.linalg.vector_norm(z, dim=0).clamp(min=torch.finfo(z.dtype).tiny)
    basis, upper = torch.linalg.qr(matrix @ z / scale)
    # Z is close to orthogonal, so its Gram matrix is well conditioned, unless Z has a lower rank than r: then the small
    # multiple of the identity keeps the Cholesky factor finite.
    inner = z.mT @ z
    inner.diagonal().add_(16 * old.shape[1] * torch.finfo(inner.dtype).eps)
    lower, _ = torch.linalg.cholesky_ex(inner)
    half = torch.linalg.solve_triangular(lower, upper.mT, upper=False)
    vectors: Tensor = basis @ _leading_eigenvectors(half.mT, old.shape[1])
    return vectors


def _signs(new: Tensor, old: Tensor | None, *, axis: int) -> Tensor:
    """Return +-1 for each vector of `new`; vectors run along `axis`, which is kept as 1."""
    # The sign of a singular vector is arbitrary, and the moments depend on it. A vector points the same way as
    # the previous vector of its rank, or, without one, its largest entry is positive.
    reference = (
        new.gather(axis, new.abs().argmax(axis, keepdim=True)) if old is None else (new * old).sum(axis, keepdim=True)
    )
    return torch.where(reference < 0, -1.0, 1.0).to(new.dtype)


def rotate_moments(
    mean: Tensor, square: Tensor, old: Tensor, new: Tensor, side: str, step: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the moments in the coordinates of a new basis (LDAdam, projection-aware update).

    With C = P_new^T P_old the mean becomes C M. The variance, taken as independent between coordinates, becomes
    (C * C) Var, and the second moment is put together again from both.

    Args:
        mean, square: exp_avg and exp_avg_sq, of the shape that `project` returns.
        old, new: the bases.
        side: "left" or "right".
        step: completed steps, at least 1, 0-d or (B,).
        betas: decay rates of the two moments.
    """
    if side == "right":
        transposed = (mean.mT, square.mT, old.mT, new.mT)
        turned_mean, turned_square = rotate_moments(*transposed, "left", step, betas)
        return turned_mean.mT, turned_square.mT
    count = per_item(step.double(), mean) if step.ndim else step.double()
    first = (1 - betas[0] ** count).to(mean.dtype)
    second = (1 - betas[1] ** count).to(mean.dtype)
    # The cosines between new and old basis vectors, (r, r).
    turn = new.mT @ old
    # Bias-corrected, because only then is the second moment minus the squared mean a variance.
    variance = square / second - (mean / first).square()
    turned = turn @ mean
    # Rounding can make the sum slightly negative, and Adam takes its root.
    return turned, ((turn * turn) @ variance + (turned / first).square()).abs() * second
