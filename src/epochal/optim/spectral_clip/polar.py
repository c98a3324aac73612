"""Soft spectral clipping by matrix products alone: the polar factor of [X, c I].

With A = [X, c I], m x (n + m), the polar factor (A A^T)^(-1/2) A = (X X^T + c^2 I)^(-1/2) [X, c I] holds the clip:
c times its first n columns. The singular values of A are sqrt(s^2 + c^2), so the condition number of A is only the root
of a = 1 + s_max^2 / c^2, and float16 suffices up to a = CONDITION. Scaled to singular values in [CONDITION^(-1/2), 1]:

    RECTANGULAR steps    A <- T A,  T = alpha I + beta G + gamma G^2,  G = A A^T
    the other steps      Y <- Y T,  Z <- T Z,  T = alpha I + beta Q + gamma Q^2,  Q = Z Y    Y: G -> G^(1/2),  Z: I -> G^(-1/2)
    clip(X)              c Z A[:, :n]

A rectangular step corrects the rounding errors of the steps before it; a coupled one is cheaper. One composition of
quintic polynomials serves every matrix, and its coefficients are constants of the host: nothing is read back from the
device and no shape depends on a value, so a CUDA graph can hold it.

Error in float16, relative to the clip in the Frobenius norm: 0.6% up to a = 3,000 and 1.3% at 30,000, where rounding X
itself to float16 dominates; a singular value exceeds the threshold by at most 1%. Above CONDITION the iteration runs
with a raised threshold: small singular values shrink, none grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from epochal.optim.base import fused, largest_magnitude, per_item

# Largest a that the coefficients are made for. The bound on ||X||^2 exceeds it up to threefold, hence the margin.
CONDITION = 8e4
STEPS = 5
RECTANGULAR = 2


def clip(x: Tensor, c: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Clip X (B, m, n), m <= n, softly at c (B,) float64; the result is at least float32.

    `dtype` is that of the products, by default float16 on a GPU (float64 for float64 input) and x's elsewhere.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if dtype is None:
        dtype = torch.float16 if x.device.type != "cpu" and wide == torch.float32 else wide
    (alpha, beta, gamma), *steps = COEFFICIENTS
    narrow, scale = _scaled(x, dtype)
    gram = torch.bmm(narrow, narrow.mT)
    square = torch.linalg.vector_norm(
        torch.bmm(gram, gram), dim=(-2, -1), dtype=torch.promote_types(dtype, torch.float32)
    )
    # The first step: G needs no second product, and the identity block of A none at all.
    gram, root, identity, factor = _normalised(gram, square, c, scale)
    t = torch.baddbmm(gram, gram, gram, beta=beta, alpha=gamma)
    a = _augmented(torch.baddbmm(narrow, t, narrow, beta=alpha), t, root, identity, alpha)
    for alpha, beta, gamma in steps[: RECTANGULAR - 1]:
        gram = torch.bmm(a, a.mT)
        a = torch.baddbmm(a, torch.baddbmm(gram, gram, gram, beta=beta, alpha=gamma), a, beta=alpha)
    z = _inverse_root(torch.bmm(a, a.mT), steps[RECTANGULAR - 1 :])
    return float32_product(z, a[..., : x.shape[2]]) * per_item(factor, x)


def _inverse_root(gram: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return Z, close to gram^(-1/2), by coupled steps; 4 K - 3 products of square matrices for K steps."""
    (alpha, beta, gamma), *others = steps
    z = torch.baddbmm(gram, gram, gram, beta=beta, alpha=gamma)
    z.diagonal(dim1=-2, dim2=-1).add_(alpha)
    y = torch.bmm(gram, z)
    for step, (alpha, beta, gamma) in enumerate(others):
        q = torch.bmm(z, y)
        t = torch.baddbmm(q, q, q, beta=beta, alpha=gamma)
        # The last Y is not used.
        y = torch.baddbmm(y, y, t, beta=alpha) if step + 1 < len(others) else y
        z = torch.baddbmm(z, t, z, beta=alpha)
    return z


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B (B, m, n) in at least float32, whatever the operands."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cpu":  # which has no such product
        return a.float() @ b.float()
    out: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
    return out


# --- between the products, each one kernel on a GPU ----------------------------------------------------------------


@fused
def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return X scale in `dtype`, and the scale (B,) in float64.

    At this scale no product of X overflows float16.
    """
    # No row of X scale is longer than 1, so the entries of its Gram matrix are at most 1, and those of the square m.
    size = largest_magnitude(x, (-2, -1)).double() * math.sqrt(x.shape[2])
    scale = 1 / torch.where(size == 0, 1.0, size)
    # In float64, because 1e-39 has no inverse in float32; rounded once.
    return (x.double() * per_item(scale, x)).to(dtype).contiguous(), scale


@fused
def _normalised(gram: Tensor, square: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (G, rho, rho c, factor): G = rho^2 (X X^T + c^2 I), rho (B,) float64, of the scaled X.

    square (B,): the Frobenius norm of (X X^T)^2, whose root bounds ||X||^2.
    """
    eps = torch.finfo(gram.dtype).eps
    # Products and norms are rounded, so a little more than computed is needed for a bound.
    bound = square.double().sqrt().clamp(min=1e-30) * (1 + 8 * eps)
    given = (c * scale).clamp(1e-100, 1e100)
    # Far above ||X|| the clip is X up to a rounding, while rho X would leave the range of float16.
    squared = torch.maximum(torch.minimum(given * given, bound / eps), bound / (CONDITION - 1))
    rho = torch.rsqrt(squared + bound)
    wide = torch.promote_types(gram.dtype, torch.float32)
    out = gram.to(wide) * per_item(rho * rho, gram).to(wide)
    out.diagonal(dim1=-2, dim2=-1).add_((rho * rho * squared).to(wide)[:, None])
    factor = torch.minimum(c, squared.sqrt() / scale).to(wide)
    return out.to(gram.dtype), rho, rho * squared.sqrt(), factor


@fused
def _augmented(x: Tensor, t: Tensor, rho: Tensor, identity: Tensor, alpha: float) -> Tensor:
    """Return [rho T X, rho c T], T = alpha I + t; `x` is T X already."""
    wide = torch.promote_types(t.dtype, torch.float32)
    block = t.to(wide)
    block.diagonal(dim1=-2, dim2=-1).add_(alpha)
    left, right = x.to(wide) * per_item(rho, x).to(wide), block * per_item(identity, t).to(wide)
    return torch.cat([left.to(x.dtype), right.to(x.dtype)], -1)


# --- the coefficients -------------------------------------------------------------------------------------------------


def best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """(alpha, beta, gamma, e): alpha x + beta x^3 + gamma x^5 is within e of 1 on [low, high], e as small as possible.

    Remez exchange: the error of the best quintic alternates between +e and -e at both ends and two inner extrema.
    """
    inner = (low + (high - low) / 3, low + 2 * (high - low) / 3)
    for _ in range(100):
        points = (low, *inner, high)
        system = [[p, p**3, p**5, sign] for p, sign in zip(points, (1, -1, 1, -1), strict=True)]
        right = torch.ones(4, dtype=torch.float64)
        alpha, beta, gamma, error = torch.linalg.solve(torch.tensor(system, dtype=torch.float64), right).tolist()
        # The extrema are the roots of the derivative alpha + 3 beta x^2 + 5 gamma x^4.
        root = math.sqrt(9 * beta * beta - 20 * alpha * gamma)
        extrema = (math.sqrt((-3 * beta - root) / (10 * gamma)), math.sqrt((-3 * beta + root) / (10 * gamma)))
        if abs(extrema[0] - inner[0]) + abs(extrema[1] - inner[1]) < 1e-12 * high:
            break
        inner = extrema
    return alpha, beta, gamma, abs(error)


def composition() -> tuple[tuple[float, float, float], ...]:
    """Return (alpha, beta, gamma) of each step; together they bring singular values of A within 0.3% of 1."""
    # Each step is optimal for the interval that the one before left.
    low, high, steps = CONDITION**-0.5, 1.0, []
    for _ in range(STEPS):
        alpha, beta, gamma, error = best_quintic(low, high)
        steps.append((alpha, beta, gamma))
        low, high = 1 - error, 1 + error
    return tuple(steps)


COEFFICIENTS = composition()
