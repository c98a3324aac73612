"""How much a step moves through memory, and how many kernels it launches, counted on the device "meta".

The parameters are those of spectra-160m, and the rules of counting those of a GPU: views and allocations cost nothing; an
operation reads each input and writes each output once; a matrix product launches a kernel and, as arithmetic bounds it,
moves nothing, except that a baddbmm copies its summand; a function that is compiled on a GPU is one kernel, and one more
that reads its first input if it reduces something, before and after each product in it. Bytes of Fira's step, which holds
two products, are counted as if it were not compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epochal.optim import AdEMAMix, Fira, Lion, Mars, Muon, Signum, Spectra, base, fira, spectra
from epochal.optim.spectral_clip import polar

WIDTH, INNER, LAYERS, VOCABULARY = 768, 2048, 12, 50304
BLOCK = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2
SHAPES = [*BLOCK * LAYERS, (WIDTH,), (VOCABULARY, WIDTH), (VOCABULARY, WIDTH)]
# Views, allocations, and what stays on the host.
FREE = ("empty", "new_empty", "empty_like", "_unsafe_view", "scalar_tensor", "promote_types")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def tensors(tree: object) -> dict[int, torch.Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def size(tree: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(tree).values())


class Count(TorchDispatchMode):
    """Counts launches and bytes of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0
        self.compiled: list[str] | None = None
        self.unfused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.compiled is not None:
            self.compiled.append(name)
        if (self.compiled is None or self.unfused) and not func.is_view and name not in FREE and name[:7] != "_record":
            self.launches += 1
            if name.startswith("_foreach"):
                # At most 320 blocks of 65,536 elements in one launch.
                self.launches += sum(t.numel() for t in tensors(args[0]).values()) // (320 * 65536)
            if name not in PRODUCTS:
                self.bytes += size((args, kwargs)) + size(out) if not name.endswith("_") else size(args) + size(args[0])
            elif name == "baddbmm":
                self.bytes += 2 * size(args[0])
        return out

    def fused(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None:  # inside of another
            return function(*args, **kwargs)
        before = {key: t._version for key, t in tensors((args, kwargs)).items()}
        launches, self.compiled, self.unfused = self.launches, [], function.__name__ == "_update_"
        out = function(*args, **kwargs)
        reduces = any(name in ("amax", "amin", "sum", "linalg_vector_norm") for name in self.compiled)
        products = sum(name in PRODUCTS for name in self.compiled)
        self.launches = launches + products + (products + 1) * (1 + reduces)
        self.compiled = None
        if self.unfused:
            return out
        written = {key: t for key, t in tensors((args, kwargs)).items() if t._version != before[key]}
        self.bytes += size((args, kwargs)) + size(out) + size(list(written.values())) + reduces * size(args[0])
        return out


def counted(optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Return launches of a step, and bytes per parameter, after a first step that makes the state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    count = Count()
    compiled = {
        base: ("_direct_", "_step_"),
        polar: ("_scaled", "_normalised", "_augmented"),
        spectra: ("_threshold",),
        fira: ("_update_",),
    }
    for module, names in compiled.items():
        for name in names:
            monkeypatch.setattr(module, name, functools.partial(count.fused, getattr(module, name).__wrapped__))
    with count:
        optimizer.step()
    return count.launches, count.bytes / sum(p.numel() for p in params)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.empty(*shape, device="meta")) for shape in SHAPES]


def ends_apart(**matrices: Any) -> list[dict[str, Any]]:
    params = parameters()
    inner = [p for p in params if p.ndim == 2 and p.shape[0] != VOCABULARY]
    others = [p for p in params if p.ndim == 1 or p.shape[0] == VOCABULARY]
    return [{"params": inner, **matrices}, {"params": others, "orthogonalize": False}]


def projected() -> Fira:
    optimizer = Fira(ends_apart(rank=192, update_proj_gap=10**9, alpha=0.25), lr=1e-3, weight_decay=0.1)
    optimizer._clock = dict.fromkeys(optimizer.param_groups[0]["params"], 1)  # a step between two refreshes
    return optimizer


MAKE: dict[str, tuple[Callable[[], torch.optim.Optimizer], float]] = {
    "signum": (lambda: Signum(parameters()), 60),
    "lion": (lambda: Lion(parameters()), 60),
    "ademamix": (lambda: AdEMAMix(parameters()), 60),
    "mars": (lambda: Mars(parameters()), 120),
    "muon": (lambda: Muon(ends_apart(), lr=1e-3), 120),
    "spectra": (lambda: Spectra(parameters(), 1e-3, warmup_steps=10), 120),
    "spectra-signum": (lambda: Spectra(parameters(), 1e-3, base="signum"), 120),
    "fira": (projected, 120),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_step_of_160_million_parameters_makes_few_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, allowed = MAKE[name]
    launches, moved = counted(make(), monkeypatch)
    print(f"{name}: {launches} launches, {moved:.0f} bytes a parameter")
    assert launches <= 200
    assert math.isfinite(moved) and moved <= allowed
