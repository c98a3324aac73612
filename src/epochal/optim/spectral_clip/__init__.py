"""Spectral clipping: bound the singular values of a matrix by c, keep its singular vectors (SPECTRA, arXiv 2603.14315).

    soft   H_c(X) = (I + X X^T / c^2)^(-1/2) X      s -> s / sqrt(1 + s^2 / c^2)
    hard   clip_c(X)                                s -> min(s, c)

| method        | how                                          | largest error                                |
|---------------|----------------------------------------------|----------------------------------------------|
| exact         | eigendecomposition of X X^T or SVD of X      | rounding                                     |
| polar         | 5 quintic steps on [X, c I], float16 on GPUs | 0.6% up to a = 3,000, 1.3% at 30,000         |
| newton_schulz | the published 10 cubic steps in bfloat16     | 47% of a singular value at a = 10,000        |
| auto          | exact on a CPU, polar elsewhere              | 1% on a CPU                                  |

with a = 1 + ||X||^2 / c^2. This file turns any batch into wide matrices X (B, m, n), m <= n, and picks the method; each
method is one `clip(X, c)` in a file. A matrix with a NaN or an infinity becomes NaN; the other matrices are unaffected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epochal.optim.base import known_true, largest_magnitude, per_item
from epochal.optim.spectral_clip import exact, newton_schulz, polar

__all__ = ["METHODS", "hard_spectral_clip", "soft_spectral_clip"]

METHODS = ("auto", "exact", "polar", "newton_schulz")


def soft_spectral_clip(
    x: Tensor,
    c: float | Tensor,
    *,
    method: str = "auto",
    iterations: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Map each singular value s of x to s / sqrt(1 + s^2 / c^2).

    The result has x's dtype. `c` > 0 is in units of x, one number or one per matrix. `iterations` sets the number of
    published steps; `dtype` sets the arithmetic of any method (default: bfloat16 for newton_schulz, float16 for polar on a
    GPU, else by condition number). polar and newton_schulz read nothing back, so a CUDA graph can hold them; exact does,
    and compiled it runs in float64.
    Raises ValueError for a tensor with fewer than two axes, c <= 0, an unknown method, or an option that the method
    does not have. Source: section 1.2 of the SPECTRA paper; newton_schulz follows the published code.
    """
    _check(x, c, method, METHODS)
    if iterations is not None and (method != "newton_schulz" or iterations < 1):
        raise ValueError(
            f"iterations={iterations} has no meaning for method={method!r}; pass a positive integer with "
            "'newton_schulz', or leave it out."
        )
    if x.numel() == 0:
        return x.clone()
    if method == "auto":
        # Reading a value costs nothing on a CPU, and there a decomposition is faster than products in float32.
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        method = "exact" if on_cpu else "polar"
        # 1% is the promise of "auto", so float32 decompositions suffice up to a much higher condition number.
        float32_up_to = exact.CONDITION_ONE_PERCENT
    else:
        float32_up_to = exact.CONDITION_ROUNDING
    if method == "polar":
        wide, threshold = _wide(x, c)
        return _restore(polar.clip(wide, threshold, dtype=dtype), x)
    scaled, threshold, unit = _prepare(x, c)
    if method == "newton_schulz":
        out = newton_schulz.clip(scaled, threshold, iterations=iterations or 10, dtype=dtype or torch.bfloat16)
    else:
        out = exact.clip(scaled, threshold, float32_up_to=float32_up_to, dtype=dtype)
    return _restore(out * per_item(unit, out).to(out.dtype), x)


def hard_spectral_clip(x: Tensor, c: float | Tensor, *, method: str = "auto") -> Tensor:
    """Map every singular value s of x (..., m, n) to min(s, c); the result has x's dtype.

    `c` > 0 is in units of x, one number or one per matrix; the only method is exact.
    Raises ValueError as `soft_spectral_clip` does. Source: section 1.2 of the SPECTRA paper (its theory uses this one).
    """
    _check(x, c, method, ("auto", "exact"))
    if x.numel() == 0:
        return x.clone()
    wide, threshold, unit = _prepare(x, c)
    out = exact.clip(wide, threshold, hard=True)
    return _restore(out * per_item(unit, out).to(out.dtype), x)


def _check(x: Tensor, c: float | Tensor, method: str, methods: tuple[str, ...]) -> None:
    if x.ndim < 2:
        raise ValueError(f"x must be a matrix or a batch of matrices, got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"x must have a real floating-point dtype, got {x.dtype}.")
    if not isinstance(c, Tensor) and not c > 0:
        raise ValueError(f"the threshold c must be above 0, got {c}.")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}.")


def _wide(x: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return wide matrices (B, m, n), m <= n, and their thresholds (B,) in float64."""
    # Wide, so that X X^T is the smaller of the two Gram matrices.
    rows, columns = x.shape[-2:]
    batch = x.reshape(-1, rows, columns)
    # Not as_tensor: on a GPU that is a copy, which a CUDA graph refuses.
    given = c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.float64, device=x.device)
    threshold = given.to(device=x.device, dtype=torch.float64).expand(x.shape[:-2]).reshape(-1)
    return batch.mT if rows > columns else batch, threshold


def _prepare(x: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return wide matrices (B, m, n) of order 1, their thresholds (B,) and units (B,)."""
    wide, threshold = _wide(x, c)
    # Non-finite matrices are zero in a decomposition, and get a NaN unit, which makes their result NaN.
    largest = largest_magnitude(wide, (-2, -1)).double()
    finite = torch.isfinite(largest)
    if not known_true(finite):
        wide = torch.where(per_item(finite, wide), wide, 0)
    # Entries below 1 / sqrt(n) keep those of X X^T below 1, so no product overflows.
    size = torch.where(finite & (largest > 0), largest, 1.0) * math.sqrt(wide.shape[-1])
    # Scaling by a power of two does not round.
    exponent = torch.frexp(size).exponent.clamp(-120, 120)
    unit = torch.ldexp(torch.ones_like(size), exponent)

    work = torch.promote_types(x.dtype, torch.float32)
    scaled = (wide.to(work) * per_item(1 / unit, wide).to(work)).contiguous()
    return scaled, (threshold / unit).clamp(1e-100, 1e100), torch.where(finite, unit, torch.nan)


def _restore(out: Tensor, x: Tensor) -> Tensor:
    return (out.mT if x.shape[-2] > x.shape[-1] else out).to(x.dtype).reshape(x.shape)
