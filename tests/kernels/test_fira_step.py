"""Fira's three kernels against their references in float64, and the optimizer with the kernels against torch's path."""

from __future__ import annotations

import math

import pytest
import torch

from epochal.optim import fira
from epochal.optim.fira import Fira
from triton_kernels.fira_step import (
    fira_adam,
    fira_adam_reference,
    fira_project,
    fira_project_reference,
    fira_update,
    fira_update_reference,
)

SHAPES = [(1, 1, 1, 1), (2, 9, 70, 3), (1, 33, 65, 33), (2, 70, 100, 66), (0, 4, 5, 2)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(shape, device, dtype, transposed):
    """G, P, R, M, V; transposed: as views of transposed matrices."""
    batch, a, b, r = shape
    tensors = [randn(batch, a, b), torch.linalg.qr(randn(batch, a, r, seed=1)).Q if r <= a else randn(batch, a, r)]
    tensors += [randn(batch, r, b, seed=2), randn(batch, r, b, seed=3), randn(batch, r, b, seed=4).square()]
    tensors = [t.to(device, dtype if i == 0 else torch.float32) for i, t in enumerate(tensors)]
    return [t.mT.contiguous().mT for t in tensors] if transposed else tensors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_project_is_as_accurate_as_the_reference(device, no_worse, shape, dtype, transposed):
    g, p, low, _, _ = operands(shape, device, dtype, transposed)
    exact, plain = fira_project_reference(g.double(), p.double()), fira_project_reference(g, p)
    for mine, same, true in zip(fira_project(g, p, low), plain, exact, strict=True):
        no_worse(mine, same, true)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_adam_is_as_accurate_as_the_reference(device, no_worse, shape, transposed):
    _, _, low, mean, square = operands(shape, device, torch.float32, transposed)
    weights = torch.tensor([[0.1, 0.01], [0.0, 0.0]], device=device)[: shape[0]]  # the second must not change
    eps = torch.tensor(1e-6, device=device)
    exact = fira_adam_reference(*(t.double() for t in (low, mean, square, weights, eps)))
    plain, before = fira_adam_reference(low, mean, square, weights, eps), mean.clone()
    results = (*fira_adam(low, mean, square, weights, eps), mean, square)
    for mine, same, true in zip(results, plain, exact, strict=True):
        no_worse(mine, same, true)
    assert torch.equal(mean[1:], before[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_update_is_as_accurate_as_the_reference(device, no_worse, shape, dtype, transposed):
    batch, a, b, _ = shape
    g, p, low, direction, _ = operands(shape, device, dtype, transposed)
    w = randn(batch, a, b, seed=5).to(device, dtype)
    lowrank_scale, decay = (randn(batch, seed=s).to(device).float() for s in (6, 7))
    projection_coef, residual_scale = (randn(batch, b, seed=s).to(device).float() for s in (8, 9))
    residual_scale[:, 1:2] = 0.0
    numbers = (g, p, direction, low, lowrank_scale, projection_coef, residual_scale, decay)
    exact, plain = fira_update_reference(*(t.double() for t in (w, *numbers))), fira_update_reference(w, *numbers)
    g[:, :, 1:2] = math.nan  # a residual_scale of 0 skips it
    fira_update(w, *numbers)
    no_worse(w, plain.to(dtype), exact)


def test_zero_state_and_zero_eps_give_no_nan_outside_the_matrix(device):
    low = torch.ones(1, 3, 5, device=device)
    mean, square = (torch.zeros_like(low) for _ in range(2))
    eps, weights = torch.zeros((), device=device), torch.ones(1, 2, device=device)
    direction, low_squares, direction_squares = fira_adam(low, mean, square, weights, eps)
    assert torch.equal(direction, low) and (low_squares == 3).all() and (direction_squares == 3).all()


def test_shapes_that_do_not_fit_are_refused_and_opcheck_passes(device):
    g, p, low, mean, square = operands((2, 6, 9, 2), device, torch.float32, False)
    weights, eps, one = torch.ones(2, 2, device=device), torch.ones((), device=device), torch.ones(2, device=device)
    column = torch.ones(2, 9, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        fira_project(g, p[:, :-1], low)
    with pytest.raises(ValueError, match="moments"):
        fira_adam(low, mean[:, :1], square, weights, eps)
    with pytest.raises(ValueError, match="do not fit W"):
        fira_update(g, g, p, low, low, one, one, column, one)
    ops = torch.ops.epochal_kernels
    torch.library.opcheck(ops.fira_project.default, (g, p, low))
    torch.library.opcheck(ops.fira_project.default, (g, p, low.mT.contiguous().mT))
    torch.library.opcheck(ops.fira_adam.default, (low, mean, square, weights, eps))
    torch.library.opcheck(ops.fira_update.default, (g.clone(), g, p, mean, low, one, column, column, one))


# --- the optimizer with the kernels ----------------------------------------------------------------------------------


@pytest.fixture
def kernels(device, monkeypatch):
    """The device, with kernels even on a CPU, where Triton interprets them."""
    monkeypatch.setattr(fira, "backend", lambda _: "triton")
    assert fira.uses_kernels(torch.zeros(1, device=device))
    return device


def four_steps(path, device, dtype, options, monkeypatch):
    """The parameters and the optimizer after four steps with one basis: bases of a GPU and of a CPU may differ."""
    monkeypatch.setattr(fira, "backend", lambda _: path)
    shapes = [(24, 10), (24, 10), (10, 24), (16, 16), (7, 1)]
    parameters = [torch.nn.Parameter(randn(*s, seed=i).to(device, dtype)) for i, s in enumerate(shapes)]
    group = {"params": parameters, "rank": 4, "update_proj_gap": 1000, "alpha": 0.25}
    optimizer = Fira([group], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, **options)
    for k in range(4):
        for i, p in enumerate(parameters):
            p.grad = (3.0**k * randn(*p.shape, seed=10 * k + i)).to(device, dtype)  # growing, so that the limiter acts
        if k == 2:
            parameters[1].grad[3, 4] = math.nan
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "paper"},
        {"variant": "galore"},
        {"scaling": "matrix"},
        {"limiter": "compat"},
        {"gamma": None, "correct_bias": False},
        {"eps": 0.0},
    ],
    ids=str,
)
def test_the_optimizer_takes_the_same_steps_with_kernels_and_with_torch(kernels, monkeypatch, options):
    kernel, reference = (four_steps(path, kernels, torch.float32, options, monkeypatch) for path in ("triton", "torch"))
    assert kernel[1].skipped == reference[1].skipped == 1
    for a, b in zip(kernel[0], reference[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for name, value in reference[1].state[b].items():
            if name == "limiter" and min(b.shape) == 1 and options.get("variant") == "paper":
                continue  # at full rank the residual is rounding noise, and the limiter remembers its norm
            torch.testing.assert_close(kernel[1].state[a][name], value, rtol=2e-4, atol=1e-5, msg=name)


def test_bfloat16_weights_step_alike_with_kernels_and_with_torch(kernels, monkeypatch):
    kernel, reference = (four_steps(path, kernels, torch.bfloat16, {}, monkeypatch)[0] for path in ("triton", "torch"))
    for a, b in zip(kernel, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
