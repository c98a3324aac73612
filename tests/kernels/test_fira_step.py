"""Fira's three passes against their definitions in float64, and the optimizer over the kernels' table against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from epochal.optim import Fira, fira
from epochal.optim.fira import KERNELS, Form, fira_step_, make_hyper, operations
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


def operands(shape, device, dtype, turned):
    """G, P, R, M, V; turned: as views of the transposed matrices."""
    batch, a, b, r = shape
    made = [randn(batch, a, b), torch.linalg.qr(randn(batch, a, r, seed=1)).Q if r <= a else randn(batch, a, r)]
    made += [randn(batch, r, b, seed=2), randn(batch, r, b, seed=3), randn(batch, r, b, seed=4).square()]
    made = [t.to(device, dtype if i == 0 else torch.float32) for i, t in enumerate(made)]
    return [t.mT.contiguous().mT for t in made] if turned else made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_project(device, no_worse, shape, dtype, turned):
    g, p, low, _, _ = operands(shape, device, dtype, turned)
    exact, plain = fira_project_reference(g.double(), p.double()), fira_project_reference(g, p)
    for mine, same, true in zip(fira_project(g, p, low), plain, exact, strict=True):
        no_worse(mine, same, true)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_adam(device, no_worse, shape, turned):
    _, _, low, mean, square = operands(shape, device, torch.float32, turned)
    weights = torch.tensor([[0.1, 0.01], [0.0, 0.0]], device=device)[: shape[0]]  # the second one must stay as it is
    eps = torch.tensor(1e-6, device=device)
    exact = fira_adam_reference(*(t.double() for t in (low, mean, square, weights, eps)))
    plain, before = fira_adam_reference(low, mean, square, weights, eps), mean.clone()
    found = (*fira_adam(low, mean, square, weights, eps), mean, square)
    for mine, same, true in zip(found, plain, exact, strict=True):
        no_worse(mine, same, true)
    assert torch.equal(mean[1:], before[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_update(device, no_worse, shape, dtype, turned):
    batch, a, b, _ = shape
    g, p, low, direction, _ = operands(shape, device, dtype, turned)
    w = randn(batch, a, b, seed=5).to(device, dtype)
    whole, keep = (randn(batch, seed=s).to(device).float() for s in (6, 7))
    share, factor = (randn(batch, b, seed=s).to(device).float() for s in (8, 9))
    factor[:, 1:2] = 0.0
    numbers = (g, p, direction, low, whole, share, factor, keep)
    exact, plain = fira_update_reference(*(t.double() for t in (w, *numbers))), fira_update_reference(w, *numbers)
    g[:, :, 1:2] = math.nan  # a factor of 0 skips it
    fira_update(w, *numbers)
    no_worse(w, plain.to(dtype), exact)


def test_zero_state_and_zero_eps_give_no_nan_outside_the_matrix(device):
    low = torch.ones(1, 3, 5, device=device)
    mean, square = (torch.zeros_like(low) for _ in range(2))
    eps, weights = torch.zeros((), device=device), torch.ones(1, 2, device=device)
    direction, inside, size = fira_adam(low, mean, square, weights, eps)
    assert torch.equal(direction, low) and (inside == 3).all() and (size == 3).all()


def test_wrong_use_and_opcheck(device):
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


# --- the optimizer over the kernels ---------------------------------------------------------------------------------


@pytest.fixture
def kernels(device, monkeypatch):
    """Take the kernels' table, on the interpreter too."""
    monkeypatch.setattr(fira, "backend", lambda _: "triton")
    assert operations(torch.zeros(1, device=device)) is KERNELS
    return device


def walk(path, device, dtype, options, monkeypatch):
    """The weights after three steps from one basis (a GPU's and a CPU's may differ), and the optimizer."""
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
def test_the_optimizer_takes_the_same_steps_over_either_table(kernels, monkeypatch, options):
    mine, theirs = (walk(path, kernels, torch.float32, options, monkeypatch) for path in ("triton", "torch"))
    assert mine[1].skipped == theirs[1].skipped == 1
    for a, b in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for name, value in theirs[1].state[b].items():
            if name == "limiter" and min(b.shape) == 1 and options.get("variant") == "paper":
                continue  # of full rank nothing is left but rounding, and the limiter remembers its norm
            torch.testing.assert_close(mine[1].state[a][name], value, rtol=2e-4, atol=1e-5, msg=name)


def test_bfloat16_weights_step_alike(kernels, monkeypatch):
    mine, theirs = (walk(path, kernels, torch.bfloat16, {}, monkeypatch)[0] for path in ("triton", "torch"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_waits_for_nothing(kernels, side):
    """A tensor on the device "meta" has no value: reading one, or a shape that depends on one, raises."""
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "alpha": 0.25, "gamma": 1.01}
    w = torch.zeros(3, 12, 8, device="meta")
    low = (3, 4, 8) if side == "left" else (3, 12, 4)
    shapes = {"basis": (3, 12, 4) if side == "left" else (3, 4, 8), "exp_avg": low, "exp_avg_sq": low}
    shapes |= {"limiter": (3,), "step": (3,)}
    state = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    finite = torch.ones(3, dtype=torch.bool, device="meta")
    assert operations(w) is KERNELS
    fira_step_(w, torch.zeros_like(w), state, make_hyper(group, w), Form(side), finite=finite)
    with pytest.raises(RuntimeError, match="meta"):  # it would tell
        finite.all().item()
