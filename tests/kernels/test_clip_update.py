"""The spectral clip with Triton kernels: as accurate as with torch, and the weight update in its last product."""

from __future__ import annotations

import math

import pytest
import torch

from epochal.optim import Spectra, soft_spectral_clip
from epochal.optim.spectral_clip import minimax, soft_clip_step
from triton_kernels.clip_update import clip_update, clip_update_reference, clip_update_where_
from triton_kernels.sym_mm import sym_mm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def kernels(device, monkeypatch):
    """Take the kernel path, in the interpreter too."""
    monkeypatch.setattr(minimax, "backend", lambda _: "triton")
    return device


def exact(x, c):
    """H_c from a singular value decomposition in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    c = c.double()[:, None]
    return (u * (s * c / torch.hypot(c, s))[:, None, :]) @ vh


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 130), (1, 70, 70), (0, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_update_is_as_accurate_as_torch(device, no_worse, shape, dtype):
    batch, m, _ = shape
    w, x = (randn(*shape, seed=s).to(device, dtype) for s in (1, 2))
    z = randn(batch, m, m, seed=3).to(device, dtype)
    f = torch.tensor([[0.9, -0.3]], device=device).repeat(batch, 1)
    true, plain = clip_update_reference(*(t.double() for t in (w, z, x, f))), clip_update_reference(w, z, x, f)
    tall = w.mT.contiguous()  # a tall parameter is passed as a transposed view
    no_worse(clip_update(tall.mT, z, x, f), plain, true)
    no_worse(clip_update(w.float(), z, x, f), clip_update_reference(w.float(), z, x, f), true)


def test_wrong_arguments_are_refused_and_opcheck_passes(device):
    a, f = randn(2, 3, 5).to(device, torch.float32), torch.ones(2, 2, device=device)
    z = torch.zeros(2, 3, 3, device=device)
    with pytest.raises(ValueError, match="do not match W"):
        clip_update(a, torch.zeros(2, 4, 4), a, f)
    torch.library.opcheck(torch.ops.epochal_kernels.clip_update.default, (a, z, a, f))
    tall = randn(2, 5, 3).to(device, torch.float32)
    torch.library.opcheck(torch.ops.epochal_kernels.clip_update.default, (tall.mT, z, a, f))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 60, 24), (2, 33, 33), (1, 1, 5)])
@pytest.mark.parametrize("iterations", [None, 5])
@pytest.mark.parametrize("cublas", [False, True])
def test_clip_with_and_without_the_weight_update_is_as_accurate_as_torch(
    kernels, monkeypatch, dtype, shape, iterations, cublas
):
    """For conditions of 5 to 400 in one stack, as accurate as torch in that dtype."""
    if cublas:  # torch's products in the kernels' path
        monkeypatch.setattr("triton_kernels.sym_mm.sym_mm_path", lambda *_, **__: "torch")
    x = randn(*shape) / max(shape) ** 0.5 * torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)[: shape[0], None, None]
    x, c = x.to(kernels, torch.float32), torch.tensor([0.5, 0.2, 0.4][: shape[0]], device=kernels)
    weight = randn(*shape, seed=4).to(kernels, torch.float32)
    decay_factor, step_size = torch.full_like(c, 0.9), torch.full_like(c, 0.5)
    change = -0.5 * exact(x, c)
    options = {"iterations": iterations, "dtype": dtype}
    updated = soft_clip_step(weight, x, c, decay_factor=decay_factor, step_size=step_size, **options)
    fused = error(updated.double() - 0.9 * weight.double(), change)
    alone = error(soft_spectral_clip(x, c, method="minimax", **options), change / -0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimax, "backend", lambda _: "torch")
        incumbent = error(soft_spectral_clip(x, c, method="minimax", **options), change / -0.5)
    assert (fused <= 1.5 * incumbent + 1e-5).all(), (fused, incumbent)
    assert (alone <= 1.5 * incumbent + 1e-5).all(), (alone, incumbent)


def error(value, true):
    norm = torch.linalg.matrix_norm
    return norm(value.double() - true) / norm(true)


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_singular_values_shrink_and_never_grow_beyond_the_safe_condition(dtype, condition):
    """With a fixed count nothing is chosen by value: what half precision cannot resolve must not diverge."""
    u, v = (torch.linalg.qr(randn(96, 96, seed=s)).Q for s in (1, 2))
    x = (u * torch.logspace(0, -4, 96, dtype=torch.float64) * math.sqrt(condition)) @ v
    out = soft_spectral_clip(x.float(), 1.0, method="minimax", iterations=5, dtype=dtype).double()
    assert torch.linalg.matrix_norm(out, 2) <= 1.1
    assert torch.linalg.matrix_norm(out - exact(x[None], torch.ones(1))[0], 2) <= 1.1


def test_a_zero_update_leaves_the_decayed_weights(kernels):
    weight, one = torch.ones(2, 3, 4, device=kernels), torch.ones(2, device=kernels)
    updated = soft_clip_step(weight, torch.zeros_like(weight), one, decay_factor=0.5 * one, step_size=one)
    assert torch.equal(updated, torch.full_like(weight, 0.5))


def test_only_ill_conditioned_matrices_are_computed_in_float32(kernels, monkeypatch):
    """Conditions of 10 to 30,000 in one stack, chosen on the device: all within 1%, none above its threshold."""
    conditions = torch.tensor([10.0, 200.0, 2e3, 3e4])
    masks = []
    original = minimax.clip_update_where_
    monkeypatch.setattr(minimax, "clip_update_where_", lambda *a: masks.append(a[-1].tolist()) or original(*a))
    u, v = (torch.linalg.qr(randn(4, n, 40, seed=n)).Q for n in (40, 70))
    s = torch.logspace(0, -2, 40, dtype=torch.float64) * (conditions - 1).double().sqrt()[:, None]
    x = ((u * s[:, None, :]) @ v.mT).to(kernels, torch.float32)
    c, weight = torch.ones(4, device=kernels), randn(4, 40, 70, seed=9).to(kernels, torch.float32)
    true = exact(x, c)
    updated = soft_clip_step(weight, x, c, decay_factor=0.9 * c, step_size=0.5 * c)
    alone = soft_spectral_clip(x, c, method="minimax")
    for out in ((0.9 * weight.double() - updated.double()) / 0.5, alone.double()):
        assert (error(out, true) <= 1e-2).all()
        assert (torch.linalg.matrix_norm(out, 2) <= 1 + 1e-2).all()
    # The bound exceeds the largest singular value, so the second matrix may be on either side.
    assert [(first, last) for first, _, *last in masks] == [(0, [1, 1])] * 2


def test_inactive_matrices_are_not_computed(device):
    """Inactive outputs stay as they were, although a product would have made them NaN."""
    a, z = randn(3, 33, 33).to(device, torch.float32), torch.full((3, 33, 33), math.nan, device=device)
    z[1] = torch.eye(33)
    on, f = torch.tensor([0, 1, 0], dtype=torch.int32, device=device), torch.ones(3, 2, device=device)
    out = a.clone()
    clip_update_where_(out, a, z, a, f, on)
    torch.testing.assert_close(out, a * (1 + on)[:, None, None])
    product = sym_mm(a, a.mT, active=torch.ones_like(on), whole=True)  # not symmetric
    torch.testing.assert_close(product, a @ a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sym_mm(a, a, active=on)[1], a[1] @ a[1].mT, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.epochal_kernels.clip_update_where_.default, (a.clone(), a, a, a, f, on))
    torch.library.opcheck(torch.ops.epochal_kernels.sym_mm.default, (a, a, None, None, torch.ones_like(on), True))


def models(device, dtype):
    sizes = [(24, 10), (24, 10), (10, 24), (16, 16), (7,)]
    return [torch.nn.Parameter((randn(*s, seed=i) / 4).to(device, dtype)) for i, s in enumerate(sizes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_spectra_takes_the_same_steps_with_and_without_kernels(kernels, dtype, blocks):
    """Kernels clip in the weight update; a non-finite gradient skips its matrix only."""
    results = []
    for path in ("triton", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(minimax, "backend", lambda _, path=path: path)
            calls = []
            step = minimax.clip_update
            patch.setattr(minimax, "clip_update", lambda *a, step=step, calls=calls: calls.append(1) or step(*a))
            parameters = models(kernels, dtype)
            options = {"method": "minimax", "blocks": blocks, "clip": 0.5, "iterations": 5, "weight_decay": 0.1}
            optimizer = Spectra(
                [{"params": parameters[:4]}, {"params": parameters[4:]}], lr=0.1, base="sgdm", **options
            )
            for k in range(3):
                for i, p in enumerate(parameters):
                    p.grad = randn(*p.shape, seed=10 * k + i).to(kernels, dtype)
                parameters[1].grad[0, 0] = math.nan if k == 1 else 0.0
                optimizer.step()
            assert bool(calls) == (path == "triton")
            assert optimizer.skipped == 1
            results.append(parameters)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
