"""No optimizer step syncs with the GPU, so a CUDA graph can hold it; tested without a GPU.

A tensor on the device "meta" has no value: reading one, or a shape that depends on one, raises. `OneDevice` refuses
copies between devices, the remaining way to sync.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epochal.optim import Fira, Spectra, soft_spectral_clip


class OneDevice(TorchDispatchMode):
    """Fails for an operation on tensors of two devices, which is a copy and a sync."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, f"{func} works on {sorted(devices)}"
        return out


def zeros(*shapes):
    return [torch.nn.Parameter(torch.zeros(*shape, device="meta")) for shape in shapes]


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float32}, {"method": "newton_schulz", "iterations": 5}], ids=str
)
def test_the_clip_does_not_sync(options):
    x = torch.zeros(3, 12, 8, device="meta")
    with OneDevice():
        assert soft_spectral_clip(x, 1.0, **options).shape == x.shape


@pytest.mark.parametrize("base", ["adamw", "signum", "ademamix", "mars", "lion", "sgdm"])
def test_a_step_of_spectra_does_not_sync(base):
    """The whole optimizer: pre-clip, global clip, base, clip, weights, skipped gradients."""
    params = zeros((6, 4), (6, 4), (4, 6), (5, 5), (7,))
    optimizer = Spectra(params, 0.1, base=base, pre_clip=1.0, grad_clip=1.0, apply_to="all", warmup_steps=3)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        with OneDevice():
            optimizer.step()
    assert all(value.is_meta for p in params for value in optimizer.state[p].values())


@pytest.mark.parametrize("variant", ["code", "paper", "galore"])
def test_a_step_of_fira_does_not_sync_with_a_state_from_another_device(variant):  # invariant 15 of Fira
    """A refresh reads the gradient's norm and the step count; the steps between refreshes read nothing."""
    shapes = ((6, 4), (6, 4), (4, 6), (7,))
    start = [torch.nn.Parameter(torch.ones(*shape)) for shape in shapes]
    params = zeros(*shapes)

    def make(tensors):
        group = {"params": tensors[:3], "rank": 2, "update_proj_gap": 100, "alpha": 0.25}
        return Fira([group, {"params": tensors[3:]}], lr=0.1, weight_decay=0.1, variant=variant)

    on_cpu, optimizer = make(start), make(params)
    for p in start:
        p.grad = torch.rand_like(p)
    on_cpu.step()
    file = io.BytesIO()
    torch.save(on_cpu.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(start, params, strict=True):
        for name, value in on_cpu.state[p].items():
            loaded = optimizer.state[q][name]
            assert loaded.is_meta and (loaded.dtype, loaded.shape) == (value.dtype, value.shape)
        optimizer._clock[q] = 1  # as after a step: the count cannot be read from a meta tensor
        q.grad = torch.zeros_like(q)
    with OneDevice():
        optimizer.step()


def test_a_read_or_a_copy_would_fail():
    x = torch.zeros(3, 12, 8, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        soft_spectral_clip(x, 1.0, method="exact")
    with pytest.raises(AssertionError, match="cpu"), OneDevice():
        x.copy_(torch.zeros(3, 12, 8))
