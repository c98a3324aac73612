"""Spectral clipping: bound the singular values of a matrix by c, keep its singular vectors (SPECTRA, arXiv 2603.14315).

    soft   H_c(X) = (I + X X^T / c^2)^(-1/2) X      s -> s / sqrt(1 + s^2 / c^2)
    hard   clip_c(X)                                s -> min(s, c)

| method        | how                                          | largest error of a singular value            |
|---------------|----------------------------------------------|----------------------------------------------|
| exact         | eigendecomposition of X X^T or SVD of X      | rounding                                     |
| minimax       | 2 to 6 quintic steps with optimal coefficients | -0.5%, never too large                     |
| newton_schulz | the published 10 cubic steps in bfloat16     | grows with a = 1 + ||X||^2 / c^2; 47% at 1e4 |
| auto          | CPU and below 256 rows: exact; else minimax  | 1%                                           |

This file turns any batch into wide matrices X (B, m, n), m <= n, scaled to order 1, and picks the method; each method is
one `clip(X, c)` in a file. A matrix with a NaN or an infinity becomes NaN; the other matrices are unaffected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epochal.optim.base import largest_magnitude
from epochal.optim.spectral_clip import exact, minimax, newton_schulz
from epochal.optim.spectral_clip.minimax import uses_kernels

__all__ = ["METHODS", "hard_spectral_clip", "soft_clip_step", "soft_spectral_clip", "uses_kernels"]

METHODS = ("auto", "exact", "minimax", "newton_schulz")
# Rows of the smaller side from which products are faster than a decomposition on a CPU.
MINIMAX_FROM_ROWS = 256


def soft_spectral_clip(
    x: Tensor,
    c: float | Tensor,
    *,
    method: str = "auto",
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Map each singular value s of x to s / sqrt(1 + s^2 / c^2).

    The result has x's dtype. `c` > 0 is in units of x, one number or one per matrix. `iterations` (minimax,
    newton_schulz) sets the number of steps; `dtype` sets the arithmetic (default: bfloat16 for newton_schulz, else by
    condition number). minimax reads values back on a CPU only. On a GPU and under torch.compile a CUDA graph can hold
    it, after one earlier call that builds the table of coefficients. With Triton all matrices run in float16, those
    with a condition number above 256 again in float32; without Triton, or with `dtype` or `iterations`, all run in one
    arithmetic, and above a condition number of 2^20 (float16: 2^12, bfloat16: 2^8) small singular values shrink.
    exact reads values back; compiled, it runs in float64.
    Raises ValueError for a tensor with fewer than two axes, c <= 0, an unknown method, or an option that the method
    does not have. Source: section 1.2 of the SPECTRA paper; newton_schulz follows the published code.
    """
    _check(x, c, method, METHODS)
    if iterations is not None and (method == "exact" or iterations < 1):
        raise ValueError(
            f"iterations={iterations} has no meaning for method={method!r}; pass a positive integer with 'minimax' or "
            "'newton_schulz', or leave it out."
        )
    if x.numel() == 0:
        return x.clone()
    wide, threshold, unit = _prepare(x, c)
    if method == "newton_schulz":
        out = newton_schulz.clip(wide, threshold, iterations=iterations or 10, dtype=dtype or torch.bfloat16)
    elif method == "exact":
        out = exact.clip(wide, threshold, dtype=dtype)
    elif method == "auto" and iterations is None and dtype is None and _prefers_exact(wide):
        # 1% is the promise of "auto", so float32 decompositions suffice up to a much higher condition number.
        out = exact.clip(wide, threshold, float32_up_to=exact.CONDITION_ONE_PERCENT)
    else:
        out = minimax.clip(wide, threshold, iterations=iterations, dtype=dtype)
    return _restore(out, x, unit)


def hard_spectral_clip(x: Tensor, c: float | Tensor, *, method: str = "auto") -> Tensor:
    """Map every singular value s of x (..., m, n) to min(s, c); the result has x's dtype.

    `c` > 0 is in units of x, one number or one per matrix; the only method is exact.
    Raises ValueError as `soft_spectral_clip` does. Source: section 1.2 of the SPECTRA paper (its theory uses this one).
    """
    _check(x, c, method, ("auto", "exact"))
    if x.numel() == 0:
        return x.clone()
    wide, threshold, unit = _prepare(x, c)
    return _restore(exact.clip(wide, threshold, hard=True), x, unit)


def soft_clip_step(
    weight: Tensor,
    x: Tensor,
    c: Tensor,
    *,
    decay_factor: Tensor,
    step_size: Tensor,
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return decay_factor W - step_size H_c(X), clipped by minimax.

    W and X are (B, m, n), the rest (B,).
    With Triton the last product of the iteration carries the update, so H_c(X) is never in memory. `iterations` and
    `dtype` as in `soft_spectral_clip`.
    """
    wide, threshold, unit = _prepare(x, c)
    tall = x.shape[1] > x.shape[2]
    # The iteration clips X / unit.
    update = minimax.WeightUpdate(weight.mT if tall else weight, decay_factor.double(), -step_size.double() * unit)
    out = minimax.clip(wide, threshold, iterations=iterations, dtype=dtype, update=update)
    return (out.mT if tall else out).to(weight.dtype)


def _check(x: Tensor, c: float | Tensor, method: str, methods: tuple[str, ...]) -> None:
    if x.ndim < 2:
        raise ValueError(f"x must be a matrix or a batch of matrices, got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"x must have a real floating-point dtype, got {x.dtype}.")
    if not isinstance(c, Tensor) and not c > 0:
        raise ValueError(f"the threshold c must be above 0, got {c}.")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}.")


def _prefers_exact(x: Tensor) -> bool:
    few_rows = x.shape[1] < MINIMAX_FROM_ROWS or x.dtype == torch.float64
    return few_rows and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _prepare(x: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return wide scaled matrices (B, m, n), their thresholds (B,) and units (B,)."""
    # Wide, so that X X^T is the smaller of the two Gram matrices.
    rows, columns = x.shape[-2:]
    batch = x.reshape(-1, rows, columns)
    wide = batch.mT if rows > columns else batch
    # Not as_tensor: on a GPU that is a copy, which a CUDA graph refuses.
    given = c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.float64, device=x.device)
    threshold = given.to(device=x.device, dtype=torch.float64).expand(x.shape[:-2]).reshape(-1)

    # Non-finite matrices are zero during the iteration, and get a NaN unit, which makes their result NaN.
    largest = largest_magnitude(wide, (-2, -1)).double()
    finite = torch.isfinite(largest)
    if torch.compiler.is_compiling() or finite.device.type != "cpu" or not bool(finite.all()):
        wide = torch.where(finite[:, None, None], wide, 0)
    # Entries below 1 / sqrt(n) keep those of X X^T below 1, so no product overflows, in float16 either.
    size = torch.where(finite & (largest > 0), largest, 1.0) * math.sqrt(max(rows, columns))
    # Scaling by a power of two does not round.
    exponent = torch.frexp(size).exponent.clamp(-120, 120)
    unit = torch.ldexp(torch.ones_like(size), exponent)

    work = torch.promote_types(x.dtype, torch.float32)
    scaled = (wide.to(work) * (1 / unit).to(work)[:, None, None]).contiguous()
    return scaled, (threshold / unit).clamp(1e-100, 1e100), torch.where(finite, unit, torch.nan)


def _restore(out: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    out = out * unit.to(out.dtype)[:, None, None]
    return (out.mT if x.shape[-2] > x.shape[-1] else out).to(x.dtype).reshape(x.shape)
