"""Soft spectral clipping by products alone: a coupled quintic iteration with minimax coefficients.

With S = X X^T and any bound b >= ||S||_2, the matrix P = (c^2 I + S) / (c^2 + b) has its eigenvalues in [1/a, 1],
a = 1 + b / c^2. The lower end is known exactly, so the coefficients can be optimal without estimating anything:

    Y <- Y T,  Z <- T Z,  T = alpha I + beta Q + gamma Q^2,  Q = Z Y        Y: P -> P^(1/2),  Z: I -> P^(-1/2)
    clip(X) = c / sqrt(c^2 + b) Z X

Error: a singular value shrinks by at most `TOLERANCE` and never grows.

- CPU: each matrix takes as few float32 or float64 steps as its condition number a needs; an ill-conditioned one is
  decomposed instead.
- Elsewhere and under torch.compile nothing is read back and no shape depends on a value, so a CUDA graph can hold it.
  With Triton all matrices run in float16 and those with a > 256 again in float32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from epochal.optim.spectral_clip import exact
from epochal.optim.spectral_clip._common import frobenius, gram_bound, identity_plus
from triton_kernels.backend import backend
from triton_kernels.clip_update import clip_update, clip_update_where_
from triton_kernels.sym_mm import sym_mm

# Largest relative shortfall of a singular value that the coefficients are designed for.
TOLERANCE = 5e-3
# Coefficients are tabulated for condition numbers up to 2, 4, ..., 2^LEVELS.
LEVELS = 20
# Highest level at which each arithmetic converges; beyond it small singular values shrink too much.
SAFE_LEVELS = {torch.float16: 12, torch.bfloat16: 8, torch.float32: 20, torch.float64: 20}
# Highest level at which float16 stays within 1%, and at which float32 does on a CPU.
FLOAT16_LEVELS = 8
FLOAT32_LEVELS = 15


class WeightUpdate(NamedTuple):
    """Makes the result decay_factor W + scale H_c(X): W (B, m, n) of any strides, decay_factor and scale (B,) float64."""

    weight: Tensor
    decay_factor: Tensor
    scale: Tensor


def uses_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`; a compiler gets torch operations, which it can fuse."""
    return backend(device) == "triton" and not torch.compiler.is_compiling()


def clip(
    x: Tensor,
    c: Tensor,
    *,
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
    update: WeightUpdate | None = None,
) -> Tensor:
    """Clip X (B, m, n) softly at c (B,), or update weights by the result.

    m <= n; X is float32 or float64, c float64. `iterations` overrides the number of steps, `dtype` the arithmetic.
    """
    kernels = uses_kernels(x.device)
    chosen = iterations is not None or dtype is not None
    if x.device.type == "cpu" and not (kernels or chosen or update or torch.compiler.is_compiling()):
        # On a CPU reading a value costs nothing, so each matrix takes only the steps it needs.
        return torch.cat([_clip_one(x[i : i + 1], c[i : i + 1]) for i in range(len(x))])
    if kernels and x.dtype == torch.float32 and not chosen:
        return _clip_mixed(x, c, update)
    y = x.to(dtype or x.dtype)
    z, factor, _ = _minimax_graphable(y, c, iterations, SAFE_LEVELS[y.dtype])
    return _last_product(z, y, factor, update).to(x.dtype)


def _clip_one(x: Tensor, c: Tensor) -> Tensor:
    """Clip one matrix (1, m, n) on a CPU."""
    gram, square, bound = _bounded(x)
    level = max(1, math.ceil(math.log2(1 + float(bound / (c * c)))))
    # Too ill-conditioned for the iteration in this dtype.
    if level > (FLOAT32_LEVELS if x.dtype == torch.float32 else LEVELS):
        return exact.clip(x, c, float32_up_to=exact.CONDITION_ONE_PERCENT)
    steps = torch.tensor([schedule(level, None)], dtype=torch.float64)
    z = _iterate(gram, square, c, bound, steps)
    return _last_product(z, x, c / (c * c + bound).sqrt(), None)


def _clip_mixed(x: Tensor, c: Tensor, update: WeightUpdate | None) -> Tensor:
    """Clip in float16, and again in float32 where the condition number is too high."""
    # float16, because its error is a tenth of bfloat16's; the scaling to order 1 keeps it in range.
    half = x.half()
    z, factor, bound = _minimax_graphable(half, c, None, FLOAT16_LEVELS)
    out = _last_product(z, half, factor, update).to(x.dtype)
    # The second pass is launched for the whole batch, but its kernels skip inactive matrices: nothing is read
    # back. A NaN bound is active.
    active = (~(1 + bound / (c * c) <= 2.0**FLOAT16_LEVELS)).int()
    z, factor, _ = _minimax_graphable(x, c, None, LEVELS, active)
    # Without weights, the same kernel with a decay factor of zero writes the clip alone.
    weight, decay_factor, scale = update or (x, torch.zeros_like(factor), torch.ones_like(factor))
    clip_update_where_(out, weight, z, x, torch.stack([decay_factor, scale * factor], 1), active)
    return out


def _last_product(z: Tensor, x: Tensor, factor: Tensor, update: WeightUpdate | None) -> Tensor:
    if update is not None:
        out: Tensor = clip_update(update.weight, z, x, torch.stack([update.decay_factor, update.scale * factor], 1))
        return out
    product = z @ x
    wide = product.to(torch.promote_types(product.dtype, torch.float32))  # `factor` may be too small for float16
    return wide * factor.to(wide.dtype)[:, None, None]


# --- the iteration ----------------------------------------------------------------------------------------------------


def _minimax_graphable(
    y: Tensor, c: Tensor, iterations: int | None, levels: int, active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Z, factor, bound) with factor Z X the clip, without reading a value back.

    The number of steps is fixed. Above a condition number of 2^levels the iteration runs for a raised threshold: small
    singular values shrink, none grows. Where `active` (B,) int32 is 0 the result is undefined.
    """
    gram, square, bound = _bounded(y, active)
    # The threshold at which the condition number 1 + bound / c^2 is 2^levels.
    trusted = torch.maximum(c, (bound / (2.0**levels - 1)).sqrt())
    level = torch.log2(1 + bound / (trusted * trusted)).ceil()
    # Matrices that are not active may hold NaN, which has no integer.
    row = level.nan_to_num(nan=1.0).clamp(1, levels).long() - 1
    steps = _coefficients(iterations, levels, y.device)[row]
    return _iterate(gram, square, trusted, bound, steps, active), c / (trusted * trusted + bound).sqrt(), bound


def _bounded(y: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """S = Y Y^T, S^2 and a bound on ||S||_2."""
    gram = y @ y.mT if active is None else sym_mm(y, y, active=active)
    square = gram @ gram if active is None else sym_mm(gram, gram, active=active)
    # Row sums differ between X X^T and X^T X; without them the clip of a square X commutes with transposition.
    if y.shape[-2] == y.shape[-1]:
        bound = frobenius(square).sqrt().clamp(min=1e-30)
    else:
        bound = torch.minimum(gram_bound(gram), gram_bound(square).sqrt())
    # Products and norms are rounded, so a little more than computed is needed for a bound.
    return gram, square, bound * (1 + 8 * torch.finfo(y.dtype).eps)


def _iterate(
    gram: Tensor, square: Tensor, c: Tensor, bound: Tensor, steps: Tensor, active: Tensor | None = None
) -> Tensor:
    """Z (B, m, m), close to P^(-1/2), by steps (B, K, 3); 4 K - 3 products besides S and S^2."""
    p = 1 / (c * c + bound)
    q = c * c * p
    alpha, beta, gamma = steps[:, 0].unbind(-1)
    # The first step needs no product: P = q I + p S, and P^2 is a polynomial in S and S^2.
    first = (beta * p + 2 * gamma * q * p, gram), (gamma * p * p, square)
    z = identity_plus(alpha + beta * q + gamma * q * q, *first).to(gram.dtype)
    if steps.shape[1] == 1:
        return z
    y = _product(identity_plus(q, (p, gram)).to(gram.dtype), z, active)
    for k in range(1, steps.shape[1]):
        t = _polynomial(_product(z, y, active), steps[:, k], active)
        # The last Y is not used.
        y = _product(y, t, active) if k + 1 < steps.shape[1] else y
        z = _product(t, z, active)
    return z


def _product(a: Tensor, b: Tensor, active: Tensor | None) -> Tensor:
    """A B. Not as a symmetric product, though it is one in exact arithmetic.

    Rounded factors do not commute, and mirroring a triangle would keep the commutator as an error (float16 at a
    condition number of 100: 1.4% instead of 0.13%).
    """
    if active is None:
        return a @ b
    out: Tensor = sym_mm(a, b.mT, active=active, whole=True)
    return out


def _polynomial(q: Tensor, step: Tensor, active: Tensor | None) -> Tensor:
    """Polynomial alpha I + beta Q + gamma Q^2 with the coefficients `step` (B, 3)."""
    alpha, beta, gamma = step.unbind(-1)
    if not uses_kernels(q.device):
        return identity_plus(alpha, (beta, q), (gamma, q @ q)).to(q.dtype)
    # Q Q, not Q Q^T: Q is symmetric only up to rounding (float16 at a condition of 100: 0.23% instead of 0.07%).
    out: Tensor = sym_mm(q, q.mT, q, torch.stack([gamma, beta, alpha], 1).float(), active)
    return out


# --- the coefficients -------------------------------------------------------------------------------------------------


def best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """(alpha, beta, gamma, e): alpha x + beta x^3 + gamma x^5 is within e of 1 on [low, high], e as small as possible.

    Remez exchange: the error of the best quintic alternates between +e and -e at both ends and two inner extrema.
    """
    if high - low < 1e-3 * high:
        # The system below would be singular. This is its limit, whose error is cubic in the width.
        return 1.875, -1.25, 0.375, 2.5 * (high - low) ** 3
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


@functools.lru_cache(maxsize=512)
def schedule(level: int, iterations: int | None) -> tuple[tuple[float, float, float], ...]:
    """Return the coefficients of each step for condition numbers up to 2^level.

    Each step is optimal for the interval that the last one left. Without `iterations`, the fewest steps that bring
    sqrt(P) within TOLERANCE / 2 of 1. The last step is divided by its largest value, so a singular value ends in [1 -
    TOLERANCE, 1] times the exact one and never above the threshold.
    """
    # The steps act on sqrt(P), whose eigenvalues are in [2^(-level / 2), 1].
    low, high = 2.0 ** (-level / 2), 1.0
    steps: list[tuple[float, float, float]] = []
    while True:
        alpha, beta, gamma, error = best_quintic(low, high)
        done = len(steps) + 1 == iterations if iterations else error <= TOLERANCE / 2
        top = 1 + error if done else 1.0
        steps.append((alpha / top, beta / top, gamma / top))
        if done:
            return tuple(steps)
        low, high = 1 - error, 1 + error


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _coefficients(iterations: int | None, levels: int, device: torch.device) -> Tensor:
    """Return the schedules of the first levels, (levels, K, 3), all equally long."""
    return _coefficients_on(iterations, levels, device)


@functools.lru_cache(maxsize=64)
def _coefficients_on(iterations: int | None, levels: int, device: torch.device) -> Tensor:
    # Cached because a copy to a GPU is a host sync, which a CUDA graph refuses.
    # All with the number of steps of the hardest level, so that the shape depends on no value.
    count = iterations or len(schedule(levels, None))
    return torch.tensor([schedule(level, count) for level in range(1, levels + 1)], dtype=torch.float64, device=device)
