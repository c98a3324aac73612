"""Whether an operation runs as a Triton kernel, in Triton's interpreter, or in plain torch.

Triton is optional. Every kernel file imports ``triton`` and ``tl`` from this module, so the package imports without it.
The choice is a value (`backend`) that the caller can record, not a silent fallback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

triton: Any = None
tl: Any = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:  # plain torch only
    triton = tl = None

HAS_TRITON: bool = triton is not None
# Read once: Triton decides when a kernel is decorated, so a later change of the variable has no effect.
INTERPRETED: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def backend(device: torch.device | str) -> str:
    """Return ``"triton"``, ``"triton-interpreter"`` or ``"torch"`` for tensors on ``device``."""
    kind = torch.device(device).type
    if INTERPRETED:
        return "triton-interpreter" if kind == "cpu" else "torch"
    return "triton" if HAS_TRITON and kind == "cuda" else "torch"


def use_kernel(device: torch.device | str) -> bool:
    """Whether the wrappers of this package launch a kernel for tensors on ``device``."""
    return backend(device) != "torch"


def jit(function: Callable[..., Any]) -> Any:
    """Decorate with ``triton.jit`` if Triton is installed; otherwise the kernel is never launched."""
    return triton.jit(function) if HAS_TRITON else function
