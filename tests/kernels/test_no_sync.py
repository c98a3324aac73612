"""No step on a GPU waits for the GPU, or could not be held by a CUDA graph; shown without one.

A tensor on the device "meta" has no value: reading one, or a shape that depends on one, raises. What is left are copies
between devices, which `StaysThere` refuses.
"""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epochal.optim import Fira, Spectra, fira, soft_spectral_clip
from epochal.optim.spectral_clip import minimax, soft_clip_step


class StaysThere(TorchDispatchMode):
    """Fails for an operation on tensors of two devices: a copy that somebody has to wait for, and no graph can hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, f"{func} works on {sorted(devices)}"
        return out


@pytest.fixture(params=["triton", "torch"])
def table(request, monkeypatch):
    """Kernels, or torch as on a GPU without Triton."""
    monkeypatch.setattr(minimax, "backend", lambda _: request.param)
    monkeypatch.setattr(fira, "backend", lambda _: request.param)


def zeros(*shapes):
    return [torch.nn.Parameter(torch.zeros(*shape, device="meta")) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"iterations": 5}, {"dtype": torch.float16}], ids=str)
def test_the_clip(table, options):
    x, one = torch.zeros(3, 12, 8, device="meta"), torch.ones(3, device="meta")
    for mode in (contextlib.nullcontext(), StaysThere()):  # the first call makes the table of coefficients
        with mode:
            assert soft_clip_step(x, x, one, decay_factor=one, step_size=one, **options).shape == x.shape
            assert soft_spectral_clip(x, 1.0, **options).shape == x.shape


@pytest.mark.parametrize("base", ["adamw", "signum", "ademamix", "mars", "lion", "sgdm"])
def test_a_step_of_spectra(table, base):
    """The whole optimizer: pre-clip, global clip, base, clip, weights, what is skipped."""
    params = zeros((6, 4), (6, 4), (4, 6), (5, 5), (7,))
    optimizer = Spectra(params, 0.1, base=base, pre_clip=1.0, grad_clip=1.0, apply_to="all", warmup_steps=3)
    for mode in (contextlib.nullcontext(), StaysThere()):
        for p in params:
            p.grad = torch.zeros_like(p)
        with mode:
            optimizer.step()
    assert all(value.is_meta for p in params for value in optimizer.state[p].values())


@pytest.mark.parametrize("variant", ["code", "paper", "galore"])
def test_a_step_of_fira_with_a_state_from_another_device(table, variant):  # invariant 15 of Fira
    """A refresh reads the gradient's size and the count of steps; between two of them nothing is read."""
    shapes = ((6, 4), (6, 4), (4, 6), (7,))
    start = [torch.nn.Parameter(torch.ones(*shape)) for shape in shapes]
    there = zeros(*shapes)

    def make(params):
        group = {"params": params[:3], "rank": 2, "update_proj_gap": 100, "alpha": 0.25}
        return Fira([group, {"params": params[3:]}], lr=0.1, weight_decay=0.1, variant=variant)

    here, optimizer = make(start), make(there)
    for p in start:
        p.grad = torch.rand_like(p)
    here.step()
    file = io.BytesIO()
    torch.save(here.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(start, there, strict=True):
        for name, value in here.state[p].items():
            moved = optimizer.state[q][name]
            assert moved.is_meta and (moved.dtype, moved.shape) == (value.dtype, value.shape)
        optimizer._clock[q] = 1  # as after a step: the count itself cannot be read here
        q.grad = torch.zeros_like(q)
    with StaysThere():
        optimizer.step()


def test_what_reads_or_copies_would_show():
    x = torch.zeros(3, 12, 8, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        soft_spectral_clip(x, 1.0, method="exact")
    with pytest.raises(AssertionError, match="cpu"), StaysThere():
        x.copy_(torch.zeros(3, 12, 8))
