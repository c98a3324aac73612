"""On a GPU: every optimizer takes the step it takes on a CPU, without a host sync, and fits into a CUDA graph.

tests/kernels/test_no_sync.py checks what can be checked without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from epochal.optim import AdEMAMix, Fira, Lion, Mars, Muon, Signum, Spectra, soft_spectral_clip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = ((96, 160), (96, 160), (160, 96), (128, 128), (300, 64), (64,))
BASES = ("adamw", "signum", "ademamix", "mars", "lion", "sgdm")
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "signum": Signum,
    "ademamix": AdEMAMix,
    "mars": Mars,
    "lion": Lion,
    "muon": Muon,
    "fira": lambda params, lr: Fira(projected(params), lr=lr),
    "fira-paper": lambda params, lr: Fira(projected(params), lr=lr, variant="paper"),
    "galore": lambda params, lr: Fira(projected(params), lr=lr, variant="galore"),
    **{f"spectra-{base}": lambda params, lr, base=base: Spectra(params, lr, base=base, clip=2.0) for base in BASES},
}
# Largest difference of the weights relative to how far they moved. SPECTRA's clip is accurate to 1% on a GPU; Muon
# multiplies in bfloat16, Fira in tf32.
ALLOWED = {"spectra": 3e-2, "muon": 5e-2, "fira": 1e-2, "galore": 1e-2}


def projected(params: list[Tensor]) -> list[dict[str, object]]:
    matrices = {"params": [p for p in params if p.ndim == 2], "rank": 16, "update_proj_gap": 2, "alpha": 0.25}
    return [matrices, {"params": [p for p in params if p.ndim == 1]}]


def parameters(device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def fill(params: list[torch.nn.Parameter], step: int) -> None:
    """Set gradients with well separated singular values, so that the leading subspace is the same on every device."""
    generator = torch.Generator().manual_seed(10 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator)
        if g.ndim == 2:
            left, s, right = torch.linalg.svd(g, full_matrices=False)
            g = left * (s * 0.8 ** torch.arange(len(s))) @ right
        p.grad = g.to(p.device)


@pytest.mark.parametrize("name", MAKE)
def test_a_gpu_takes_the_steps_of_a_cpu(name: str) -> None:
    weights = {}
    for device in ("cpu", "cuda"):
        params = parameters(device)
        optimizer = MAKE[name](params, lr=1e-2)
        for step in range(4):
            fill(params, step)
            optimizer.step()
        weights[device] = [p.detach().cpu() for p in params]
    allowed = next((value for start, value in ALLOWED.items() if name.startswith(start)), 1e-3)
    for before, cpu, gpu in zip(parameters("cpu"), weights["cpu"], weights["cuda"], strict=True):
        moved, off = (cpu - before).norm(), (cpu - gpu).norm()
        assert moved > 0 and off <= allowed * moved, (tuple(cpu.shape), float(off / moved))


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Raise for any operation that syncs the host with the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MAKE)
def test_a_step_between_refreshes_does_not_sync(name: str) -> None:
    params = parameters("cuda")
    optimizer = MAKE[name](params, lr=1e-2)
    for step in range(3):  # Fira refreshes at 0 and 2, which may sync
        fill(params, step)
        optimizer.step()
    fill(params, 3)
    with no_sync():
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("base", BASES)
def test_spectra_steps_in_a_cuda_graph(base: str) -> None:
    """A replay equals an eager step, also with other gradients than those of the capture."""
    eager, captured_params = parameters("cuda"), parameters("cuda")
    reference, captured = (
        Spectra(params, 1e-2, base=base, clip=2.0, grad_clip=1.0) for params in (eager, captured_params)
    )
    for params in (eager, captured_params):
        fill(params, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()  # compiles the kernels and builds the tables
    torch.cuda.current_stream().wait_stream(side)
    reference.step()
    fill(captured_params, 1)
    gradients = [p.grad for p in captured_params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in (1, 2, 3):
        fill(eager, step)
        for given, p in zip(gradients, eager, strict=True):
            given.copy_(p.grad)  # type: ignore[union-attr, arg-type]
        graph.replay()
        fill(eager, step)  # grad_clip wrote into them
        reference.step()
    for a, b in zip(eager, captured_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(768, 768), (768, 2048), (2048, 768), (2, 130, 200)])
@pytest.mark.parametrize("decades", [0, 2, 4])
def test_the_clip_is_within_one_percent_of_float64(shape: tuple[int, ...], decades: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    s = 10 ** torch.linspace(decades / 2, -decades / 2, s.shape[-1], dtype=torch.float64)
    exact = (left * (s / torch.sqrt(1 + s * s))) @ right
    got = soft_spectral_clip((left * s @ right).float().cuda(), 1.0).double().cpu()
    assert (got - exact).norm() <= 1e-2 * exact.norm()
    inner = (left.mT @ got @ right.mT).diagonal(dim1=-2, dim2=-1)
    clipped = s / torch.sqrt(1 + s * s)
    # Rounding the matrix to float16 moves the smallest singular values by a fixed amount.
    assert ((inner - clipped).abs() <= 2e-2 * clipped + 1e-3).all()
    assert torch.linalg.matrix_norm(got, 2).max() <= 1 + 1e-2
