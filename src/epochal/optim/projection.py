"""The subspace a gradient is projected on: leading singular vectors by three methods, and moments carried along.

    side "left":  basis P (m, r), orthonormal columns, R = P^T G (r, n), back(X) = P X
    side "right": basis Q (r, n), orthonormal rows,    R = G Q^T (m, r), back(X) = X Q

    svd       thin singular value decomposition of the tall orientation: what the published code computes
    gram      eigenvectors of the Gram matrix of the smaller side: one product and a small symmetric problem
    subspace  one power iteration from the previous basis, then Rayleigh-Ritz; the first basis comes from `gram`

All three return the vectors ordered by singular value, the largest first. Two refreshes may differ in sign by nothing
but the library's whim, so each vector points the way the previous one of its rank did, or has a positive largest entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epochal.optim.base import per_item, state_dtype
from epochal.optim.products import gram, matmul, upper_gram

METHODS = ("svd", "gram", "subspace")
PROJ_TYPES = ("std", "reverse_std", "left", "right")
FLOAT64_ROWS = 128


def projected_side(shape: torch.Size, proj_type: str) -> str:
    """Return "left" or "right" for a matrix of shape (rows, columns); a square one is "right" under "std"."""
    if proj_type in ("left", "right"):
        return proj_type
    rows, columns = shape
    return "right" if (rows >= columns) == (proj_type == "std") else "left"


def project(gradient: Tensor, basis: Tensor, side: str) -> Tensor:
    """Return R of gradients (..., m, n): (..., r, n) for "left", (..., m, r) for "right"."""
    return matmul(basis.mT, gradient) if side == "left" else matmul(gradient, basis.mT)


@torch.no_grad()
def compute_basis(grad: Tensor, rank: int, side: str, *, method: str, previous: Tensor | None = None) -> Tensor:
    """Return the basis of one finite gradient (m, n): (m, r) for side "left", (r, n) for "right", r <= min(m, n).

    Computed in float32, or float64 for a float64 gradient. `previous`, of the result's shape, starts "subspace" and
    fixes signs; a zero gradient returns it. Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"refresh={method!r} is not a way to find a basis; use one of {', '.join(METHODS)}.")
    matrix = grad.to(state_dtype(grad.dtype))
    matrix = matrix if side == "left" else matrix.mT
    # Squares of tiny or huge entries leave the range of a float; directions do not depend on the scale.
    low, high = torch.aminmax(grad)
    largest = torch.maximum(-low, high).to(matrix.dtype)
    scale = largest.clamp(min=torch.finfo(matrix.dtype).tiny)
    old = None if previous is None else previous.to(matrix.dtype)
    if method == "svd":
        new = _svd_vectors(matrix / scale, rank)
    elif method == "gram" or old is None:
        new = _gram_vectors(matrix / scale, rank)
    else:
        new = _iterate(matrix, scale, old if side == "left" else old.mT)
    # From here on as the caller has it: both operands in one layout are many times faster to combine.
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
    # Squaring halves the digits of small singular values; where float64 costs little it gives them back.
    small = min(matrix.shape) <= FLOAT64_ROWS
    wide = matrix.double() if small else matrix
    if matrix.shape[0] <= matrix.shape[1]:
        return _leading(wide, rank).to(matrix.dtype)
    # The smaller Gram matrix has the right vectors. G V is orthogonal up to rounding; QR makes it so where it is small.
    return _orthonormal(matmul(wide, _leading(wide.mT, rank))).to(matrix.dtype)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of matrix matrix^T, as columns, the largest eigenvalue first."""
    # "U" takes a seventh off LAPACK's time, and spares the lower half of the product; eigenvalues come ascending.
    vectors: Tensor = torch.linalg.eigh(upper_gram(matrix), UPLO="U").eigenvectors
    return vectors[:, -rank:].flip(1)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _iterate(matrix: Tensor, scale: Tensor, old: Tensor) -> Tensor:
    """Return one warm-started power iteration (m, r) with a Rayleigh-Ritz rotation, so that vectors come in order.

    Z = G^T P with columns of length 1, Y = G Z = Q R. The Ritz vectors are those of G restricted to the span of Z, and
    G Z (Z^T Z)^-1 Z^T G^T = Q (R (Z^T Z)^-1 R^T) Q^T needs no third product with G. Z is close to orthogonal, so the
    small solve is harmless; a multiple of the identity carries it over a Z of lower rank.
    """
    # The factors with r columns are scaled, the matrix is not copied for it.
    right = matmul(matrix.mT, old) / scale
    right = right / torch.linalg.vector_norm(right, dim=0).clamp(min=torch.finfo(right.dtype).tiny)
    basis, upper = torch.linalg.qr(matmul(matrix, right) / scale)
    inner = gram(right.mT)
    inner.diagonal().add_(16 * old.shape[1] * torch.finfo(inner.dtype).eps)
    lower, _ = torch.linalg.cholesky_ex(inner)
    half = torch.linalg.solve_triangular(lower, upper.mT, upper=False)
    return matmul(basis, _leading(half.mT, old.shape[1]))


def _signs(new: Tensor, old: Tensor | None, *, axis: int) -> Tensor:
    """Return +-1 for each vector of new, which lie along `axis`; the axis is kept as 1."""
    reference = (
        new.gather(axis, new.abs().argmax(axis, keepdim=True)) if old is None else (new * old).sum(axis, keepdim=True)
    )
    return torch.where(reference < 0, -1.0, 1.0).to(new.dtype)


def rotate_moments(
    mean: Tensor, square: Tensor, old: Tensor, new: Tensor, side: str, step: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the moments in the coordinates of the new basis (LDAdam, section on projection-aware updates).

    mean, square: as `project` returns them; old, new: bases; step: completed steps (0-d or (B,)), at least 1.
    With C = P_new^T P_old, the mean becomes C M and the variance, taken as independent between coordinates, (C*C) var.
    """
    if side == "right":
        left = (mean.mT, square.mT, old.mT, new.mT)
        turned_mean, turned_square = rotate_moments(*left, "left", step, betas)
        return turned_mean.mT, turned_square.mT
    count = per_item(step.double(), mean) if step.ndim else step.double()
    first = (1 - betas[0] ** count).to(mean.dtype)
    second = (1 - betas[1] ** count).to(mean.dtype)
    turn = new.mT @ old
    centre = mean / first
    variance = square / second - centre.square()
    turned = turn @ mean
    return turned, ((turn * turn) @ variance + (turned / first).square()).abs() * second
