"""Spectral clipping: singular values bounded by a threshold c, singular vectors kept (SPECTRA, arXiv 2603.14315).

    soft   H_c(X) = (I + X X^T / c^2)^(-1/2) X      s -> s / sqrt(1 + s^2 / c^2)
    hard   clip_c(X)                                s -> min(s, c)

All work happens on the Gram matrix of the smaller side. With S = X X^T and any bound b >= ||S||_2, the matrix
P = (c^2 I + S) / (c^2 + b) has its eigenvalues in [1/a, 1], a = 1 + b / c^2: the lower end is known exactly, so a
polynomial iteration for P^(-1/2) can be optimal with nothing guessed.

| method        | how                                                          | error                          |
|---------------|--------------------------------------------------------------|--------------------------------|
| exact         | eigh of S in float32, float64 or (a > 1e8) an SVD            | rounding                       |
| minimax       | coupled quintic minimax steps on [1/a, 1], count chosen by a | 0 to -0.5% on a singular value |
| newton_schulz | the published 10 cubic steps in bfloat16                     | grows with a; 47% at a = 1e4   |
| auto          | CPU: exact below 256 rows, in float32 up to a = 1e5; then    | below 1%; up to 0.9% on a      |
|               | best rational approximations; elsewhere: minimax             | singular value from 256 rows   |

Shapes: x (..., m, n), flattened to X (B, m, n) with m <= n; S, P, Y, Z, T (B, m, m); c, a, b one number per matrix.
A matrix with a NaN or an infinity comes back as NaN, its neighbours in the batch as if it were not there.

The minimax iteration is written once, over a table of products (`Operations`): torch's, or on a GPU with Triton kernels
that compute one triangle of a symmetric product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from epochal.optim.base import largest_magnitude, stack
from epochal.optim.products import gram as full_gram
from epochal.optim.products import matmul, upper_gram
from epochal.optim.rational import largest_eigenvalue_bound, soft_clip
from triton_kernels.backend import backend
from triton_kernels.clip_update import clip_update, clip_update_where_
from triton_kernels.sym_mm import sym_mm

# Largest relative shortfall of a singular value that the minimax steps are designed for; they never overshoot.
TOLERANCE = 5e-3
# Largest relative error of a singular value, either way, that rational approximations are made for; rounding adds to it.
TOLERANCE_RATIONAL = 9e-3
# Highest condition a = 1 + b / c^2 up to which each arithmetic is trusted.
CONDITION_FLOAT16 = 2.0**8
CONDITION_FLOAT32_EXACT = 300.0
CONDITION_FLOAT32 = 1e5
CONDITION_FLOAT64 = 1e8
CONDITION_RATIONAL = 2.0**15
# Squares of singular values that are far from overflow and underflow of float32 in every product made of them.
MODERATE = (2.0**-60, 2.0**60)
# Rows from which a few inverses cost less than one decomposition.
RATIONAL_FROM = 256
LEVELS = 20
# Highest level 2^l of the condition that the steps survive in each arithmetic; beyond, small singular values shrink.
SAFE_LEVELS = {torch.float16: 12, torch.bfloat16: 8}

METHODS = ("auto", "exact", "minimax", "newton_schulz")


def soft_spectral_clip(
    x: Tensor,
    c: float | Tensor,
    *,
    method: str = "auto",
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Map every singular value s of x (..., m, n) to s / sqrt(1 + s^2 / c^2); the result has x's dtype.

    `c` > 0 is in units of x, one number or one for each matrix. `iterations` (minimax, newton_schulz) overrides the
    count; `dtype` overrides the arithmetic (newton_schulz: bfloat16; else chosen by the condition number).
    minimax looks at values on a CPU only. Elsewhere, and under torch.compile, nothing is read back and no shape depends
    on a value, so that a CUDA graph can hold the call (after one before it, which makes the table of coefficients). With
    Triton every matrix is done in float16, and those with a condition above 256 again in float32; without, or with
    `dtype` or `iterations`, all in one arithmetic, and above a condition of 1,048,576 (float16: 4,096, bfloat16: 256)
    it shrinks what it cannot resolve. exact reads back; compiled, it works in float64.
    Raises ValueError for a tensor without two axes, c <= 0, an unknown method, or an option the method has no use for.
    Source: section 1.2 of the SPECTRA paper; newton_schulz follows the published code (section 1.6 of our notes on it).
    """
    _check(x, c, method, METHODS)
    if iterations is not None and (method == "exact" or iterations < 1):
        raise ValueError(
            f"iterations={iterations} has no meaning for method={method!r}; use a positive count with 'minimax' or "
            "'newton_schulz', or leave it out."
        )
    if method == "auto":
        iterate = iterations is not None or dtype is not None or x.device.type != "cpu" or torch.compiler.is_compiling()
        method = "minimax" if iterate else "auto"
    if method == "minimax":
        return _over_matrices(x, c, functools.partial(_minimax, iterations=iterations, dtype=dtype, finish=SCALED))
    if method == "newton_schulz":
        steps, work = iterations or 10, dtype or torch.bfloat16
        return _over_matrices(x, c, functools.partial(_newton_schulz, iterations=steps, dtype=work))
    if method == "auto":
        small = min(x.shape[-2:]) < RATIONAL_FROM or x.dtype == torch.float64
        return _over_matrices(x, c, _trusting_exact) if small else _rational(x, c)
    solve = functools.partial(_exact, factor=_soft_factor, trusted=CONDITION_FLOAT32_EXACT, dtype=dtype)
    return _over_matrices(x, c, solve)


def hard_spectral_clip(x: Tensor, c: float | Tensor, *, method: str = "auto") -> Tensor:
    """Map every singular value s of x (..., m, n) to min(s, c); the result has x's dtype.

    `c` > 0 is in units of x, one number or one for each matrix; auto is exact, the only method so far.
    Raises ValueError as `soft_spectral_clip` does. Source: section 1.2 of the SPECTRA paper (its theory uses this one).
    """
    _check(x, c, method, ("auto", "exact"))
    solve = functools.partial(_exact, factor=_hard_factor, trusted=CONDITION_FLOAT32_EXACT, dtype=None)
    return _over_matrices(x, c, solve)


def _check(x: Tensor, c: float | Tensor, method: str, methods: tuple[str, ...]) -> None:
    if x.ndim < 2:
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} has no singular values; give a matrix or a batch of them."
        )
    if not x.is_floating_point():
        raise ValueError(f"a tensor of dtype {x.dtype} cannot be clipped; give a real floating-point one.")
    if not isinstance(c, Tensor) and not c > 0:
        raise ValueError(f"c={c} bounds no singular value; give a threshold above 0.")
    if method not in methods:
        raise ValueError(f"method={method!r} is not offered here; use one of {', '.join(methods)}.")


# --- from any tensor to scaled, wide, finite matrices and back -------------------------------------------------------

# What a method is: (X (B, m, n) with m <= n and entries scaled, c (B,) float64) -> (B, m, n).
Solve = Callable[[Tensor, Tensor], Tensor]


def _over_matrices(x: Tensor, c: float | Tensor, solve: Solve) -> Tensor:
    """Run `solve` on x as a batch of wide matrices, scaled by powers of two so that no product can overflow."""
    if x.numel() == 0:
        return x.clone()
    scaled, threshold, unit = _prepare(x, c)
    out = solve(scaled, threshold)
    out = out * unit.to(out.dtype)[:, None, None]
    return (out.mT if x.shape[-2] > x.shape[-1] else out).to(x.dtype).reshape(x.shape)


def _prepare(x: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return wide scaled matrices (B, m, n), their c (B,), and the unit (B,) of both: NaN for what is not finite."""
    rows, columns = x.shape[-2:]
    batch = x.reshape(-1, rows, columns)
    wide = batch.mT if rows > columns else batch
    # Not as_tensor: on a GPU that is a copy, which a CUDA graph refuses.
    given = c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.float64, device=x.device)
    threshold = given.to(device=x.device, dtype=torch.float64).expand(x.shape[:-2]).reshape(-1)

    largest = largest_magnitude(wide, (-2, -1)).double()
    finite = torch.isfinite(largest)
    if torch.compiler.is_compiling() or finite.device.type != "cpu" or not bool(finite.all()):
        wide = torch.where(finite[:, None, None], wide, 0)
    # Entries below 1 / sqrt(n) keep those of the Gram matrix below 1, in float16 too. Powers of two round nothing.
    size = torch.where(finite & (largest > 0), largest, 1.0) * math.sqrt(max(rows, columns))
    exponent = torch.frexp(size).exponent.clamp(-120, 120)
    unit = torch.ldexp(torch.ones_like(size), exponent)

    work = torch.promote_types(x.dtype, torch.float32)
    scaled = (wide.to(work) * (1 / unit).to(work)[:, None, None]).contiguous()
    return scaled, (threshold / unit).clamp(1e-100, 1e100), torch.where(finite, unit, torch.nan)


def _by_kind(kinds: Tensor, solve: Callable[[int, Tensor | None], Tensor]) -> Tensor:
    """Solve the matrices of each kind (B,) as a batch of its own, so that no matrix depends on its neighbours."""
    present = sorted(set(kinds.tolist()))
    if len(present) == 1:
        return solve(present[0], None)
    picks = [torch.nonzero(kinds == kind).flatten() for kind in present]
    parts = [solve(kind, pick) for kind, pick in zip(present, picks, strict=True)]
    out = torch.empty((len(kinds), *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
    for pick, part in zip(picks, parts, strict=True):
        out[pick] = part.to(out.dtype)
    return out


def _pick(tensor: Tensor, pick: Tensor | None) -> Tensor:
    return tensor if pick is None else tensor[pick]


def gram_bound(gram: Tensor, square: Tensor | None = None) -> Tensor:
    """Bound ||S||_2 from above for symmetric S (B, m, m), in float64; S^2 makes the bound tighter.

    Row sums and the Frobenius norm of S, and the roots of those of S^2: none of them can be below the spectral norm.
    """
    bounds = [_row_sums(gram), _frobenius(gram)]
    if square is not None:
        bounds += [_row_sums(square).sqrt(), _frobenius(square).sqrt()]
    return torch.stack(bounds).amin(0).clamp(min=1e-30)


def _row_sums(matrix: Tensor) -> Tensor:
    wide = torch.promote_types(matrix.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(matrix, ord=1, dim=-1, dtype=wide)
    return sums.amax(-1).double()


def _frobenius(matrix: Tensor) -> Tensor:
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=wide)
    return norm.double()


def _identity_plus(diagonal: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return diagonal I + sum of weight * matrix; diagonal and weights are (B,), matrices (B, m, m)."""
    weight, matrix = terms[0]
    wide = torch.promote_types(matrix.dtype, torch.float32)
    out = matrix.to(wide) * weight.to(wide)[:, None, None]
    for weight, matrix in terms[1:]:
        out = torch.addcmul(out, matrix.to(wide), weight.to(wide)[:, None, None])
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal.to(wide)[:, None])
    return out


# --- exact -----------------------------------------------------------------------------------------------------------


def _soft_factor(eigenvalue: Tensor, c: Tensor) -> Tensor:
    return c / torch.sqrt(c * c + eigenvalue)


def _hard_factor(eigenvalue: Tensor, c: Tensor) -> Tensor:
    return c / torch.sqrt(torch.maximum(c * c, eigenvalue))


def _exact(
    x: Tensor, c: Tensor, *, factor: Callable[[Tensor, Tensor], Tensor], trusted: float, dtype: torch.dtype | None
) -> Tensor:
    """Apply factor(s^2, c) to the singular values, in the cheapest decomposition that the condition number allows."""
    if torch.compiler.is_compiling() or dtype is not None:
        work = dtype or torch.float64
        return _exact_eigh(x.to(work), c, factor).to(x.dtype)
    gram = full_gram(x)
    condition = 1 + gram_bound(gram) / (c * c)
    lowest = 1 if x.dtype == torch.float64 else 0
    kinds = torch.clamp((condition > trusted).int() + (condition > CONDITION_FLOAT64).int(), min=lowest)

    def solve(kind: int, pick: Tensor | None) -> Tensor:
        part, threshold = _pick(x, pick), _pick(c, pick)
        if kind == 0:
            return _exact_eigh(part, threshold, factor, _pick(gram, pick))
        exact = _exact_eigh if kind == 1 else _exact_svd
        return exact(part.double(), threshold, factor).to(x.dtype)

    return _by_kind(kinds, solve)


def _exact_eigh(x: Tensor, c: Tensor, factor: Callable[[Tensor, Tensor], Tensor], gram: Tensor | None = None) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(upper_gram(x) if gram is None else gram, UPLO="U")
    scale = factor(eigenvalues.double().clamp(min=0), c[:, None]).to(x.dtype)
    return matmul(full_gram(vectors * scale.sqrt()[:, None, :]), x)


def _exact_svd(x: Tensor, c: Tensor, factor: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    # Beyond a = 1e8 squaring x loses the small singular values even in float64.
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    out: Tensor = (left * (values * factor(values * values, c[:, None]))[:, None, :]) @ right
    return out


# --- auto on a CPU ---------------------------------------------------------------------------------------------------


def _trusting_exact(x: Tensor, c: Tensor) -> Tensor:
    return _exact(x, c, factor=_soft_factor, trusted=CONDITION_FLOAT32, dtype=None)


def _rational(x: Tensor, c: float | Tensor) -> Tensor:
    """Take each matrix of x (..., m, n) by the best rational approximation that its bound asks for.

    Most need no scaling, which would be two passes over x.
    """
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    thresholds = torch.as_tensor(c, dtype=torch.float64).expand(x.shape[:-2]).flatten().tolist()
    out = []
    for matrix, threshold in zip(wide.reshape(-1, *wide.shape[-2:]), thresholds, strict=True):
        matrix = matrix.float().contiguous()
        gram = full_gram(matrix)
        bound = largest_eigenvalue_bound(gram)
        if MODERATE[0] < bound < MODERATE[1]:  # not true of a NaN
            out.append(_rational_one(matrix, gram, bound, threshold))
        else:
            out.append(_over_matrices(matrix, threshold, _rational_scaled))
    stacked = stack(out)
    return (stacked.mT if x.shape[-2] > x.shape[-1] else stacked).to(x.dtype).reshape(x.shape)


def _rational_scaled(x: Tensor, c: Tensor) -> Tensor:
    gram = full_gram(x[0])
    return _rational_one(x[0], gram, largest_eigenvalue_bound(gram), float(c))[None]


def _rational_one(matrix: Tensor, gram: Tensor, bound: float, c: float) -> Tensor:
    # The bound was computed with rounding; a little more is still a bound.
    excess = (1 + 1e-5) * bound / c**2
    if excess < 1e-7:
        return matrix.clone()  # no singular value moves by half a float32's rounding
    if excess < CONDITION_RATIONAL:
        return soft_clip(matrix, gram, c, 1 + excess, TOLERANCE_RATIONAL)
    return _trusting_exact(matrix[None], torch.tensor([c], dtype=torch.float64))[0]


# --- minimax ---------------------------------------------------------------------------------------------------------


def best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """Return (alpha, beta, gamma, e): alpha x + beta x^3 + gamma x^5 is within e of 1 on [low, high], e the least.

    Remez exchange: the error of the best one takes +-e in turn at both ends and at the two extrema between them.
    """
    if high - low < 1e-3 * high:
        # The system below would be singular; this is its limit, whose error is cubic in the width.
        return 1.875, -1.25, 0.375, 2.5 * (high - low) ** 3
    inner = (low + (high - low) / 3, low + 2 * (high - low) / 3)
    for _ in range(100):
        points = (low, *inner, high)
        system = [[p, p**3, p**5, sign] for p, sign in zip(points, (1, -1, 1, -1), strict=True)]
        right = torch.ones(4, dtype=torch.float64)
        alpha, beta, gamma, error = torch.linalg.solve(torch.tensor(system, dtype=torch.float64), right).tolist()
        # The extrema are where the derivative alpha + 3 beta x^2 + 5 gamma x^4 vanishes.
        root = math.sqrt(9 * beta * beta - 20 * alpha * gamma)
        moved = (math.sqrt((-3 * beta - root) / (10 * gamma)), math.sqrt((-3 * beta + root) / (10 * gamma)))
        if abs(moved[0] - inner[0]) + abs(moved[1] - inner[1]) < 1e-12 * high:
            break
        inner = moved
    return alpha, beta, gamma, abs(error)


@functools.lru_cache(maxsize=512)
def schedule(level: int, iterations: int | None) -> tuple[tuple[float, float, float], ...]:
    """Return the coefficients of each step for conditions up to 2^level, each the best one for what the last left.

    Without `iterations`, as few as bring sqrt(P) within TOLERANCE / 2 of 1. The last step is divided by its largest
    value: a singular value then lies in [1 - TOLERANCE, 1] times the exact one, and the threshold is never exceeded.
    """
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
def _schedules(iterations: int | None, levels: int) -> Tensor:
    """Stack the schedules of the first levels (levels, K, 3), all with the count of the last one."""
    count = iterations or len(schedule(levels, None))
    return torch.tensor([schedule(level, count) for level in range(1, levels + 1)], dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def _kept_schedules(iterations: int | None, levels: int, device: torch.device) -> Tensor:
    table: Tensor = _schedules(iterations, levels)
    return table.to(device)


def _schedules_on(iterations: int | None, levels: int, device: torch.device) -> Tensor:
    # A copy to a GPU makes the host wait, and a CUDA graph refuses it; a compiler makes a constant of it.
    if torch.compiler.is_compiling():
        table: Tensor = _schedules(iterations, levels)
        return table.to(device)
    return _kept_schedules(iterations, levels, device)


def _minimax_bound(x: Tensor, gram: Tensor, square: Tensor) -> Tensor:
    """Bound ||X X^T||_2; for a square X without row sums, which are others for X^T X and would tell X from its transpose."""
    if x.shape[-2] == x.shape[-1]:
        return _frobenius(square).sqrt().clamp(min=1e-30)
    return gram_bound(gram, square)


class Operations(NamedTuple):
    """The products of the iteration, on stacks of one shape and dtype.

    gram: X (B, m, n) -> X X^T. square: symmetric S (B, m, m) -> S^2. product: A, B (B, m, m) -> A B. polynomial:
    Q (B, m, m), alpha, beta, gamma (B,) -> alpha I + beta Q + gamma Q^2. `active` (B,) int32 or None: the matrices whose
    result is wanted; kernels spend nothing on the others, torch does not look at it.
    """

    gram: Callable[[Tensor, Tensor | None], Tensor]
    square: Callable[[Tensor, Tensor | None], Tensor]
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    polynomial: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _torch_gram(x: Tensor, active: Tensor | None) -> Tensor:
    return full_gram(x)


def _torch_product(a: Tensor, b: Tensor, active: Tensor | None) -> Tensor:
    return matmul(a, b)


def _torch_polynomial(q: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, active: Tensor | None) -> Tensor:
    return _identity_plus(alpha, (beta, q), (gamma, matmul(q, q))).to(q.dtype)


def _kernel_gram(x: Tensor, active: Tensor | None) -> Tensor:
    out: Tensor = sym_mm(x, x, active=active)
    return out


def _kernel_product(a: Tensor, b: Tensor, active: Tensor | None) -> Tensor:
    if active is None:
        return matmul(a, b)  # cuBLAS's, which no kernel of ours has been shown to beat
    out: Tensor = sym_mm(a, b.mT, active=active, whole=True)
    return out


def _kernel_polynomial(q: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, active: Tensor | None) -> Tensor:
    # Q Q, not Q Q^T: Q is symmetric only up to rounding (float16, condition 100: 0.23% instead of 0.07%).
    out: Tensor = sym_mm(q, q.mT, q, torch.stack([gamma, beta, alpha], 1).float(), active)
    return out


TORCH = Operations(_torch_gram, _torch_gram, _torch_product, _torch_polynomial)
KERNELS = Operations(_kernel_gram, _kernel_gram, _kernel_product, _kernel_polynomial)


def operations(device: torch.device) -> Operations:
    """Return the table for matrices on a device; a compiler gets torch's, which it can fuse."""
    return KERNELS if backend(device) == "triton" and not torch.compiler.is_compiling() else TORCH


class Finish(NamedTuple):
    """What ends the iteration, with Z (b, m, m), X (b, m, n), factor (b,).

    all: (Z, X, factor, which of the matrices, None for every one) -> (b, m, n). some_: (out, Z, X, factor, active (b,)
    int32) -> None, writes the active ones of what `all` would return into out.
    """

    all: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    some_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _minimax(x: Tensor, c: Tensor, *, iterations: int | None, dtype: torch.dtype | None, finish: Finish) -> Tensor:
    """Choose arithmetic and step count of each matrix from its bound, then iterate."""
    products = operations(x.device)
    if products is TORCH and x.device.type == "cpu" and iterations is None and not torch.compiler.is_compiling():
        return _minimax_by_value(x, c, dtype=dtype, finish=finish)
    # Elsewhere looking at a value would empty the queue: a fixed sequence of products, with coefficients out of a table
    # by the bound on the device.
    if products is TORCH or dtype is not None or iterations is not None or x.dtype != torch.float32:
        y = x.to(dtype or x.dtype)
        z, factor, _ = _minimax_unseen(y, c, iterations, SAFE_LEVELS.get(y.dtype, LEVELS), products)
        return finish.all(z, y, factor, None).to(x.dtype)
    # Tensor cores take float16, and its error is a tenth of bfloat16's. What its condition is too high for is done again
    # in float32; the programs of the others return at once.
    half = x.half()
    z, factor, bound = _minimax_unseen(half, c, None, int(math.log2(CONDITION_FLOAT16)), products)
    out = finish.all(z, half, factor, None).to(x.dtype)
    hard = (~(1 + bound / (c * c) <= CONDITION_FLOAT16)).int()
    z, factor, _ = _minimax_unseen(x, c, None, LEVELS, products, hard)
    finish.some_(out, z, x, factor, hard)
    return out


def _minimax_by_value(x: Tensor, c: Tensor, *, dtype: torch.dtype | None, finish: Finish) -> Tensor:
    y = x.to(dtype or x.dtype)
    gram, square, bound = _bounded(y, TORCH, None)

    def solve(kind: int, pick: Tensor | None) -> Tensor:
        part, s, s2, threshold, b = (_pick(tensor, pick) for tensor in (y, gram, square, c, bound))
        steps = torch.tensor(schedule(kind, None), dtype=torch.float64, device=x.device)
        z, factor = _iterate(s, s2, threshold, b, steps.expand(len(part), -1, -1), TORCH, None)
        return finish.all(z, part, factor, pick)

    return _by_kind(_level(bound, c), solve).to(x.dtype)


def _minimax_unseen(
    y: Tensor, c: Tensor, iterations: int | None, levels: int, products: Operations, active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Z, factor, bound) by as many steps as conditions up to 2^levels ask for, or by `iterations`.

    Above that condition the threshold is raised to one that the arithmetic can carry, and made good in the factor:
    no singular value grows, small ones shrink.
    """
    gram, square, bound = _bounded(y, products, active)
    trusted = torch.maximum(c, (bound / (2.0**levels - 1)).sqrt())
    steps = _schedules_on(iterations, levels, y.device)[(_level(bound, trusted) - 1).clamp(max=levels - 1)]
    z, factor = _iterate(gram, square, trusted, bound, steps, products, active)
    return z, factor * c / trusted, bound


def _bounded(y: Tensor, products: Operations, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return S = Y Y^T, S^2 and a bound on ||S||_2."""
    gram = products.gram(y, active)
    square = products.square(gram, active)
    # The bound was computed with rounding, in products that were rounded; a little more is still a bound.
    return gram, square, _minimax_bound(y, gram, square) * (1 + 8 * torch.finfo(y.dtype).eps)


def _level(bound: Tensor, c: Tensor) -> Tensor:
    return torch.ceil(torch.log2(1 + bound / (c * c))).clamp(1, LEVELS).long()


def _iterate(
    gram: Tensor,
    square: Tensor,
    c: Tensor,
    bound: Tensor,
    steps: Tensor,
    products: Operations,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return Z, f with f Z = c (c^2 I + S)^(-1/2), by coupled steps Y <- Y T, Z <- T Z; T = alpha I + beta Q + gamma Q^2, Q = Z Y.

    Y starts as P, Z as I, so Y ends near P^(1/2) and Z near P^(-1/2). The first T costs no product, since P^2 is made
    of S^2, which the bound needed anyway; the last Y is never used: 4 K - 3 products for K steps. steps (B, K, 3).
    Q, Y T and T Z are whole products though symmetric in exact arithmetic: rounded factors do not commute, and mirroring
    a triangle keeps the commutator as an error (float16, condition 100: 1.4% instead of 0.13%).
    """
    p = 1 / (c * c + bound)
    q = c * c * p
    alpha, beta, gamma = steps[:, 0].unbind(-1)
    first = (beta * p + 2 * gamma * q * p, gram), (gamma * p * p, square)
    z = _identity_plus(alpha + beta * q + gamma * q * q, *first).to(gram.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return products.product(a, b, active)

    y = product(_identity_plus(q, (p, gram)).to(gram.dtype), z) if steps.shape[1] > 1 else z
    for k in range(1, steps.shape[1]):
        alpha, beta, gamma = steps[:, k].unbind(-1)
        t = products.polynomial(product(z, y), alpha, beta, gamma, active)
        y = product(y, t) if k + 1 < steps.shape[1] else y
        z = product(t, z)
    return z, q.sqrt()


def _scaled(z: Tensor, x: Tensor, factor: Tensor, pick: Tensor | None = None) -> Tensor:
    """Return factor Z X, in float32 at least: the factor may be too small for a half precision."""
    product = matmul(z, x)
    wide = product.to(torch.promote_types(product.dtype, torch.float32))
    return wide * factor.to(wide.dtype)[:, None, None]


def _some_scaled_(out: Tensor, z: Tensor, x: Tensor, factor: Tensor, active: Tensor) -> None:
    clip_update_where_(out, x, z, x, torch.stack([torch.zeros_like(factor), factor], 1), active)


SCALED = Finish(_scaled, _some_scaled_)


def soft_clip_step(
    weight: Tensor,
    x: Tensor,
    c: Tensor,
    *,
    keep: Tensor,
    rate: Tensor,
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return keep W - rate H_c(X) for stacks W, X (B, m, n) and c, keep, rate (B,), where the clip is a minimax one.

    On a GPU with Triton the last product carries the update, so H_c(X) is never in memory. `iterations` and `dtype` as
    in `soft_spectral_clip`.
    """
    scaled, threshold, unit = _prepare(x, c)
    tall = x.shape[1] > x.shape[2]
    w, add = weight.mT if tall else weight, -rate.double() * unit

    def every(z: Tensor, y: Tensor, factor: Tensor, pick: Tensor | None) -> Tensor:
        factors = torch.stack([_pick(keep.double(), pick), _pick(add, pick) * factor], 1)
        out: Tensor = clip_update(_pick(w, pick), z, y, factors)
        return out

    def some_(out: Tensor, z: Tensor, y: Tensor, factor: Tensor, active: Tensor) -> None:
        clip_update_where_(out, w, z, y, torch.stack([keep.double(), add * factor], 1), active)

    out = _minimax(scaled, threshold, iterations=iterations, dtype=dtype, finish=Finish(every, some_))
    return (out.mT if tall else out).to(weight.dtype)


# --- the published iteration -----------------------------------------------------------------------------------------


def _newton_schulz(x: Tensor, c: Tensor, *, iterations: int, dtype: torch.dtype) -> Tensor:
    """Take `iterations` steps with the fixed coefficients 3/2 and -1/2, without the products that change nothing.

    Unconverged, s becomes h_c(s) f^K(sqrt((1 + s^2 / c^2) / a)), f(x) = 1.5 x - 0.5 x^3, a from the published bound.
    """
    y = x.to(dtype)
    gram = y @ y.mT
    p = 1 / (c * c + gram_bound(gram))
    q = c * c * p
    start = _identity_plus(q, (p, gram)).to(dtype)
    half = torch.full_like(q, 1.5)
    z = _identity_plus(half - 0.5 * q, (-0.5 * p, gram)).to(dtype)
    root = start @ z
    for step in range(1, iterations):
        t = _identity_plus(half, (torch.full_like(q, -0.5), z @ root)).to(dtype)
        root = root @ t if step + 1 < iterations else root
        z = t @ z
    return _scaled(z, y, q.sqrt()).to(x.dtype)
