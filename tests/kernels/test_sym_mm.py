"""Symmetric products against float64."""

from __future__ import annotations

import math

import pytest
import torch

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
    """gamma Q Q + beta Q + alpha I with different coefficients for each matrix."""
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
def test_non_finite_numbers_stay_in_their_matrix(device, bad):
    a = randn(2, 5, 6).to(device, torch.float32)
    a[0, 2, 3] = bad
    out = sym_mm(a, a)
    assert not torch.isfinite(out[0, 2]).any() or torch.isinf(out[0, 2, 2]) or torch.isnan(out[0, 2, 2])
    torch.testing.assert_close(out[1], a[1] @ a[1].mT)


@pytest.mark.parametrize("rows", [5, 70])
def test_any_nonzero_active_computes_and_whole_needs_no_symmetry(device, rows):
    """In one tile and in several, and with a strided `active`."""
    a, b = (randn(4, rows, 9, seed=seed).to(device, torch.float32) for seed in (0, 1))
    active = torch.tensor([[2, 0], [0, 7], [-1, 0], [1, 0]], dtype=torch.int32, device=device)[:, 0]
    out = sym_mm(a, b, active=active, whole=True)
    gram = sym_mm(a, a, active=active)
    for k in (0, 2, 3):
        torch.testing.assert_close(out[k], a[k] @ b[k].mT, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gram[k], a[k] @ a[k].mT, rtol=1e-4, atol=1e-4)


def test_plain_products_go_to_cublas_and_float64_to_torch(monkeypatch):
    half = torch.float16
    assert sym_mm_path(torch.float64, "cpu", plain=False) == "torch"
    assert sym_mm_path(half, "meta", plain=False) == "torch"
    monkeypatch.setattr("triton_kernels.sym_mm.backend", lambda device: "triton")
    assert sym_mm_path(half, "cuda", plain=True) == "torch"
    assert sym_mm_path(half, "cuda", plain=False) == "triton"
    assert sym_mm_path(torch.float64, "cuda", plain=False) == "torch"


def test_wrong_arguments_are_refused():
    a = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="same shape and dtype"):
        sym_mm(a, a[:, :2])
    with pytest.raises(ValueError, match="without coefficients"):
        sym_mm(a, a, torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="coefficients"):
        sym_mm(a, a, None, torch.zeros(3))


def test_opcheck(device):
    a, w = randn(2, 5, 5).to(device, torch.float32), torch.ones(2, 3, device=device)
    torch.library.opcheck(torch.ops.epochal_kernels.sym_mm.default, (a, a, a, w))
