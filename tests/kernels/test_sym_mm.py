"""Symmetric products and the spectral clip on top of them, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from epochal.optim.spectral_clip import schedule, soft_spectral_clip
from triton_kernels.spectral_clip import clip_update, spectral_clip_reference, spectral_clip_step_, update_reference
from triton_kernels.sym_mm import sym_mm, sym_mm_path, sym_mm_reference

SHAPES = [(1, 1, 1), (2, 5, 7), (1, 130, 33), (3, 64, 128), (2, 1, 9), (0, 4, 4), (2, 0, 3), (2, 4, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram(device, no_worse, shape, dtype):
    a = randn(*shape).to(device, dtype)
    out = sym_mm(a, a)
    assert out.dtype == dtype and out.shape == (shape[0], shape[1], shape[1])
    no_worse(out, sym_mm_reference(a, a), sym_mm_reference(a.double(), a.double()))
    assert torch.equal(out, out.mT), "a Gram matrix is symmetric bit by bit"


@pytest.mark.parametrize("rows", [3, 65, 140])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_on_commuting_matrices(device, no_worse, rows, dtype):
    """gamma Q Q + beta Q + alpha I with another set of numbers for each matrix."""
    x = randn(2, rows, rows) / rows**0.5
    q = (x @ x.mT / 4).to(device, dtype)
    w = torch.tensor([[0.5, -1.5, 2.0], [1.0, 0.25, -3.0]], device=device)
    exact = sym_mm_reference(q.double(), q.double(), q.double(), w.double())
    no_worse(sym_mm(q, q, q, w), sym_mm_reference(q, q, q, w), exact)


def test_transposed_and_strided_inputs(device):
    wide = randn(2, 40, 60).to(device, torch.float32)
    for view in (wide.mT, wide[:, ::2, 5:31], wide[:1].expand(3, -1, -1)):
        torch.testing.assert_close(sym_mm(view, view), view @ view.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_matrix(device, bad):
    a = randn(2, 5, 6).to(device, torch.float32)
    a[0, 2, 3] = bad
    out = sym_mm(a, a)
    assert not torch.isfinite(out[0, 2]).any() or torch.isinf(out[0, 2, 2]) or torch.isnan(out[0, 2, 2])
    torch.testing.assert_close(out[1], a[1] @ a[1].mT)


def test_the_path_is_a_value():
    assert sym_mm_path(4096, torch.float64, "cpu") == "torch"
    assert sym_mm_path(64, torch.float16, "meta") == "torch"


def test_wrong_use():
    a = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="no symmetric product"):
        sym_mm(a, a[:, :2])
    with pytest.raises(ValueError, match="without coefficients"):
        sym_mm(a, a, torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="coefficients"):
        sym_mm(a, a, None, torch.zeros(3))
    with pytest.raises(ValueError, match="do not fit W"):
        clip_update(a, torch.zeros(2, 4, 4), a, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="m <= n"):
        spectral_clip_step_(a.mT, a.mT, torch.ones(2), torch.zeros(1, 1, 3))


def test_opcheck(device):
    a, w = randn(2, 5, 5).to(device, torch.float32), torch.ones(2, 3, device=device)
    torch.library.opcheck(torch.ops.epochal_kernels.sym_mm.default, (a, a, a, w))
    torch.library.opcheck(torch.ops.epochal_kernels.clip_update.default, (a.clone(), a, a, w[:, :2].contiguous()))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 130), (1, 70, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(device, no_worse, shape, dtype):
    batch, m, _ = shape
    w, x = (randn(*shape, seed=s).to(device, dtype) for s in (1, 2))
    z = randn(batch, m, m, seed=3).to(device, dtype)
    f = torch.tensor([[0.9, -0.3]] * batch, device=device)
    exact, plain = update_reference(*(t.double() for t in (w, z, x, f))), update_reference(w, z, x, f)
    tall = w.mT.contiguous()  # a tall parameter, seen wide through its strides
    clip_update(tall.mT, z, x, f)
    no_worse(tall.mT, plain, exact)


def table():
    rows = [schedule(level, None) for level in range(1, 15)]
    longest = max(map(len, rows))
    return torch.tensor([row + ((1.0, 0.0, 0.0),) * (longest - len(row)) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 24, 60), (2, 33, 33), (1, 1, 5)])
def test_spectral_clip_step(device, dtype, shape):
    """Conditions of 5 to 400 in one stack: as near to the float64 decomposition as the torch path of that dtype."""
    x = randn(*shape) / shape[2] ** 0.5
    x *= torch.tensor([0.3, 1.0, 3.0][: shape[0]], dtype=torch.float64)[:, None, None]
    x = x.to(device, dtype)
    c = torch.tensor([0.5, 0.2, 0.4][: shape[0]], device=device)
    weight = randn(*shape, seed=4).to(device, torch.float32)
    expected = 0.9 * weight.double() - 0.5 * spectral_clip_reference(x.double(), c.double())
    change = expected - 0.9 * weight.double()
    spectral_clip_step_(weight, x, c, table(), rate=0.5, decay=0.1)
    error = torch.linalg.matrix_norm(weight.double() - expected) / torch.linalg.matrix_norm(change)
    plain = soft_spectral_clip(x, c, method="minimax", dtype=dtype).double()
    exact = change / -0.5
    incumbent = torch.linalg.matrix_norm(plain - exact) / torch.linalg.matrix_norm(exact)
    assert (error <= 1.5 * incumbent + 1e-3).all(), (error, incumbent)


def test_spectral_clip_of_nothing(device):
    weight = torch.ones(2, 3, 4, device=device)
    spectral_clip_step_(weight, torch.zeros_like(weight), torch.ones(2, device=device), table(), decay=0.5)
    assert torch.equal(weight, torch.full_like(weight, 0.5))
    spectral_clip_step_(weight[:0], weight[:0], torch.ones(0, device=device), table())
