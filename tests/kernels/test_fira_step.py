"""The three passes of Fira's step against the reference with a residual in float64, and against epochal's optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from epochal.optim import Fira
from triton_kernels.fira_step import fira_step, fira_step_reference

OPTIONS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "alpha": 0.25, "gamma": 1.01, "weight_decay": 0.1}


def problem(batch, a, b, r, dtype=torch.float32, device="cpu", steps=3):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(batch, a, b, generator=generator).to(device, dtype)
    gradients = [(torch.randn(batch, a, b, generator=generator) * 3**k).to(device, dtype) for k in range(steps)]
    basis = torch.linalg.qr(torch.randn(batch, a, r, generator=generator))[0].to(device)
    return weight, gradients, basis


def fresh(batch, r, b, device, dtype=torch.float32):
    moments = [torch.zeros(batch, r, b, device=device, dtype=dtype) for _ in range(2)]
    return [*moments, *(torch.zeros(batch, device=device, dtype=dtype) for _ in range(2))]


def run_reference(weight, gradients, basis, state, lr, dtype):
    options = {k: v for k, v in OPTIONS.items() if not k.startswith("beta")}
    weight, state = weight.to(dtype), [t.to(dtype) for t in state]
    for g in gradients:
        weight, *state = fira_step_reference(
            weight, g.to(dtype), basis.to(dtype), *state, lr=lr.to(dtype), betas=(0.9, 0.99), **options
        )
    return weight, state


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 70, 3), (1, 33, 65, 33), (2, 70, 100, 66)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_three_steps(device, no_worse, shape, dtype):
    """Gradients that grow threefold, so the limiter acts."""
    batch, a, b, r = shape
    weight, gradients, basis = problem(batch, a, b, r, dtype, device)
    lr = torch.tensor(0.01, device=device)
    state = fresh(batch, r, b, device)
    exact, exact_state = run_reference(weight, gradients, basis, state, lr, torch.float64)
    plain, plain_state = run_reference(weight, gradients, basis, state, lr, torch.float32)
    mine = weight.clone()
    for g in gradients:
        fira_step(mine, g, basis, *state, lr, **OPTIONS)
    # float16 weights are rounded after each step, and the basis meets float16 gradients rounded to their dtype
    floor = 1e-5 if dtype == torch.float32 else 5e-3
    no_worse(mine, plain.to(dtype), exact, floor=floor)
    if a > r:  # at full rank the residual is rounding, and so is its norm
        no_worse(state[2], plain_state[2], exact_state[2], floor=floor)
    for a_tensor, b_tensor, c in zip(state[:2], plain_state[:2], exact_state[:2], strict=True):
        no_worse(a_tensor, b_tensor, c, floor=floor)
    assert (state[3] == 3).all()


def test_equals_the_optimizer(device):
    """A refresh never comes, so both must walk the same way from the same basis."""
    weight, gradients, _ = problem(1, 12, 40, 4, device=device)
    parameter = torch.nn.Parameter(weight[0].clone())
    group = {"params": [parameter], "rank": 4, "update_proj_gap": 1000, "alpha": 0.25, "proj_type": "left"}
    optimizer = Fira([group], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    parameter.grad = gradients[0][0].clone()
    optimizer.step()
    chosen = optimizer.state[parameter]["basis"].reshape(1, 12, 4).clone()
    mine, state = weight.clone(), fresh(1, 4, 40, device)
    lr = torch.tensor(0.01, device=device)
    fira_step(mine, gradients[0], chosen, *state, lr, **OPTIONS)
    for g in gradients[1:]:
        parameter.grad = g[0].clone()
        optimizer.step()
        fira_step(mine, g, chosen, *state, lr, **OPTIONS)
    torch.testing.assert_close(mine[0], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_a_tall_matrix_through_its_strides(device):
    weight, gradients, basis = problem(2, 10, 30, 4, device=device)
    lr = torch.tensor(0.01, device=device)
    wide, tall = weight.clone(), weight.mT.contiguous()
    state, other = fresh(2, 4, 30, device), fresh(2, 4, 30, device)
    fira_step(wide, gradients[0], basis, *state, lr, **OPTIONS)
    fira_step(tall.mT, gradients[0].mT.contiguous().mT, basis, *other, lr, **OPTIONS)
    torch.testing.assert_close(wide, tall.mT)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_matrix(device, bad):
    weight, gradients, basis = problem(2, 8, 20, 4, device=device)
    alone, lr = weight[1:].clone(), torch.tensor(0.01, device=device)
    fira_step(alone, gradients[0][1:], basis[1:], *fresh(1, 4, 20, device), lr, **OPTIONS)
    gradients[0][0, 3, 5] = bad
    fira_step(weight, gradients[0], basis, *fresh(2, 4, 20, device), lr, **OPTIONS)
    assert not torch.isfinite(weight[0]).all()
    torch.testing.assert_close(weight[1], alone[0])


def test_empty_zero_gradient_wrong_use_and_opcheck(device):
    lr = torch.tensor(0.01, device=device)
    weight, gradients, basis = problem(2, 6, 9, 2, device=device)
    fira_step(weight[:0], gradients[0][:0], basis[:0], *fresh(0, 2, 9, device), lr, **OPTIONS)
    state, before = fresh(2, 2, 9, device), weight.clone()
    fira_step(weight, torch.zeros_like(weight), basis, *state, lr, **OPTIONS)
    torch.testing.assert_close(weight, before * (1 - 0.01 * 0.1))
    with pytest.raises(ValueError, match="do not fit"):
        fira_step(weight, gradients[0], basis[:, :-1], *fresh(2, 2, 9, device), lr, **OPTIONS)
    with pytest.raises(ValueError, match="moments"):
        fira_step(weight, gradients[0], basis, *fresh(2, 3, 9, device), lr, **OPTIONS)
    arguments = (weight, gradients[0], basis, *fresh(2, 2, 9, device), lr, *OPTIONS.values())
    torch.library.opcheck(torch.ops.epochal_kernels.fira_step.default, arguments)
