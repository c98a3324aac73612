"""The inverse square root of a symmetric matrix by its best rational approximation (Zolotarev 1877).

For eigenvalues in [1, a] and k poles the function of the form w + sum_j r_j / (x + p_j) that is relatively closest to
x^(-1/2):

    |sqrt(x) R(x) - 1| <= e    on [1, a],    e(k, a) the least possible: 6e-3 at k = 3, a = 2,500 and k = 4, a = 60,000

A pole costs one inverse of a positive definite matrix, half the arithmetic of one product, and the poles do not depend on
each other: no error is carried from one to the next. The price is a decomposition of small blocks, which a GPU is slow at.

The poles are values of Jacobi's elliptic functions: Nakatsukasa and Freund, SIAM Review 58 (2016), section 4, with sn and
cn by the arithmetic-geometric mean (Abramowitz and Stegun, 16.4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from epochal.optim.products import gram, matmul

LEAF = 128
"""Rows up to which LAPACK inverts; above, products do."""
HALVES = 500.0
"""Condition number up to which the faster of the two ways to an inverse is accurate enough: a bound from two moments is
that of one singular value above all others, where the error is least."""


class Rational(NamedTuple):
    """R(x) = weight (1 + sum_j residues[j] / (x + poles[j])); sqrt(x) R(x) is within `error` of 1 for x in [1, a]."""

    weight: float
    residues: tuple[float, ...]
    poles: tuple[float, ...]
    error: float


def inverse_root(a: float, poles: int) -> Rational:
    """Return the best R for x^(-1/2) on [1, a] with so many poles."""
    period = _quarter_period(1 / a)
    points = [_squared_tangent(i * period / (2 * poles + 1), 1 / a) for i in range(1, 2 * poles + 1)]
    below, above = points[0::2], points[1::2]
    # sqrt(x) R(x) takes its greatest and least values in turn from x = 1, where it is least, to x = a.
    least = math.prod((1 + q) / (1 + p) for p, q in zip(below, above, strict=True))
    most = math.prod((a + q) / (a + p) for p, q in zip(below, above, strict=True)) * math.sqrt(a)
    residues = (math.prod(q - p for q in above) / math.prod(other - p for other in below if other != p) for p in below)
    return Rational(2 / (least + most), tuple(residues), tuple(below), (most - least) / (most + least))


def fewest_poles(a: float, tolerance: float) -> Rational:
    """Return the best R for x^(-1/2) on [1, a] with as few poles as keep its error within `tolerance`."""
    poles = 1
    while (found := inverse_root(a, poles)).error > tolerance:
        poles += 1
    return found


def _means(complement: float) -> list[tuple[float, float]]:
    """List (a_n, c_n) of the arithmetic-geometric mean for the parameter m = 1 - complement."""
    a, b, c = 1.0, math.sqrt(complement), math.sqrt(1 - complement)
    found = [(a, c)]
    while c > 1e-15 * a and len(found) < 64:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        found.append((a, c))
    return found


def _quarter_period(complement: float) -> float:
    return math.pi / 2 / _means(complement)[-1][0]


def _squared_tangent(u: float, complement: float) -> float:
    """Return (sn(u) / cn(u))^2 for the parameter 1 - complement."""
    means = _means(complement)
    phi = 2.0 ** (len(means) - 1) * means[-1][0] * u
    for a, c in reversed(means[1:]):
        phi = (phi + math.asin(c / a * math.sin(phi))) / 2
    return math.tan(phi) ** 2


def inverse(a: Tensor) -> Tensor:
    """Return the inverse of a symmetric positive definite matrix (m, m), by halves and mostly in products.

    Its error grows with the square of the condition number: in float32 at 1,000 up to 2e-3 for one singular value above
    all others, 2e-2 for 64 of them.
    Raises torch.linalg.LinAlgError when a block is not positive definite.
    """
    m = len(a)
    if m <= LEAF:
        return torch.cholesky_inverse(torch.linalg.cholesky(a))
    h = m // 2
    corner = a[h:, :h].contiguous()
    first = inverse(a[:h, :h])
    solved = matmul(corner, first)
    second = inverse(a[h:, h:] - matmul(solved, corner.mT))  # of the Schur complement
    off = matmul(second, solved)
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    torch.add(first, matmul(solved.mT, off), out=out[:h, :h])
    torch.neg(off, out=out[h:, :h])
    out[:h, h:] = out[h:, :h].mT
    out[h:, h:] = second
    return out


def inverse_factor(a: Tensor) -> Tensor:
    """Return K (m, m), lower triangular, with K^T K the inverse of a symmetric positive definite matrix, by halves.

    K is the inverse of the Cholesky factor, whose condition number is only the root of the matrix's: the error of
    K^T K grows with the first power, 2e-3 at 4,000 in float32. Raises as `inverse`.
    """
    m = len(a)
    if m <= LEAF:
        eye = torch.eye(m, dtype=a.dtype)
        solved: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(a), eye, upper=False)
        return solved
    h = m // 2
    first, low, second = _halves_of_factor(a[:h, :h], a[h:, :h].contiguous(), a[h:, h:])
    out = torch.zeros_like(a, memory_format=torch.contiguous_format)
    out[:h, :h], out[h:, :h], out[h:, h:] = first, low, second
    return out


def _halves_of_factor(a: Tensor, corner: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first = inverse_factor(a)
    across = matmul(corner, first.mT)
    second = inverse_factor(rest - matmul(across, across.mT))
    return first, -matmul(second, matmul(across, first)), second


def weighted_inverses(a: Tensor, shifts: list[float], weights: list[float], largest: float) -> Tensor:
    """Return sum_j weights[j] (A + shifts[j] I)^(-1) for a positive semi-definite A (m, m) and positive numbers.

    `largest` >= ||A||_2 says which shifts are large enough for `inverse`. The last products are made for all shifts at
    once, and only one half of what is symmetric.
    """
    h = len(a) // 2
    corner = a[h:, :h].contiguous()
    out = torch.zeros_like(a)
    left, right, tops, bottoms = [], [], [], []
    for shift, weight in zip(shifts, weights, strict=True):
        first, rest = a[:h, :h].clone(), a[h:, h:].clone()
        first.diagonal().add_(shift)
        rest.diagonal().add_(shift)
        if largest > HALVES * shift:
            first, low, rest = _halves_of_factor(first, corner, rest)
            tops.append(math.sqrt(weight) * first)
            bottoms.append(math.sqrt(weight) * torch.cat([low, rest], 1))
            continue
        first = inverse(first)
        solved = matmul(corner, first)
        second = inverse(rest.sub_(matmul(solved, corner.mT)))
        off = matmul(second, solved)
        out[:h, :h].add_(first, alpha=weight)
        out[h:, :h].sub_(off, alpha=weight)
        out[h:, h:].add_(second, alpha=weight)
        left.append(solved)
        right.append(off.mul_(weight))
    if left:
        q = h // 2
        stacked, other = torch.cat(left), torch.cat(right)
        out[:q, :h].add_(matmul(stacked[:, :q].mT, other))
        out[q:h, q:h].add_(matmul(stacked[:, q:].mT, other[:, q:]))
        out[q:h, :q] = out[:q, q:h].mT
        out[:h, h:] = out[h:, :h].mT
    if tops:
        out.add_(gram(torch.cat(bottoms).mT.contiguous()))
        out[:h, :h].add_(gram(torch.cat(tops).mT.contiguous()))
    return out


def largest_eigenvalue_bound(matrix: Tensor) -> float:
    """Bound ||S||_2 from above for a symmetric S (m, m).

    From the mean and the variance of the eigenvalues (Wolkowicz and Styan 1980): no other bound made of trace and
    Frobenius norm is tighter, and it is the same for Q S Q^T.
    """
    m = len(matrix)
    mean = float(matrix.diagonal().double().mean())
    square = float(torch.linalg.vector_norm(matrix)) ** 2 / m
    return mean + math.sqrt((m - 1) * max(0.0, square - mean * mean))


def soft_clip(x: Tensor, square: Tensor, c: float, a: float, tolerance: float) -> Tensor:
    """Return c (c^2 I + S)^(-1/2) X for X (m, n), S = X X^T `square` (m, m) and a >= 1 + ||S||_2 / c^2.

    No singular value is off by more than `tolerance` of itself, but for rounding.
    """
    best = fewest_poles(a, tolerance)
    shifts = [c * c * (1 + pole) for pole in best.poles]
    weights = [best.weight * c * c * residue for residue in best.residues]
    factor = weighted_inverses(square, shifts, weights, c * c * (a - 1))
    factor.diagonal().add_(best.weight)
    return matmul(factor, x)
