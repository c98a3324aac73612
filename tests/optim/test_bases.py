"""The base optimizers against torch's own and against float64 loops written from their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from epochal.optim import AdEMAMix, Lion, Mars, Muon, Signum, Spectra
from epochal.optim.ademamix import slow_decay

SHAPES = ((6, 10), (10, 6), (6, 10), (7, 7), (9,))
STEPS = 20


def start(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    # every third one is small: MARS divides by the norm only if it exceeds 1
    scale = 0.02 if step % 3 == 0 else 1.0
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Weights after STEPS steps; every call has the same gradients."""
    params = [torch.nn.Parameter(p) for p in start(dtype)]
    optimizer = make(params)
    for step in range(STEPS):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


def loop(lr: float, wd: float, rule: Callable[[Tensor, dict, int], Tensor]) -> list[Tensor]:
    """The oracle: float64, one parameter at a time; `rule(g, memory, t)` returns the direction U, t from 1."""
    weights = start()
    memory: list[dict] = [{} for _ in weights]
    for step in range(STEPS):
        for i, g in enumerate(gradients(step)):
            u = rule(g, memory[i], step + 1)
            weights[i] = weights[i] - lr * wd * weights[i] - lr * u
    return weights


def check(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    moved = max(float((w - p).abs().max()) for w, p in zip(want, start(), strict=False))
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).abs().max()) <= tolerance * moved


def adam(g: Tensor, s: dict, t: int, b1: float, b2: float, eps: float = 1e-8) -> Tensor:
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    return s["m"] / (1 - b1**t) / ((s["v"] / (1 - b2**t)).sqrt() + eps)


def signum(g: Tensor, s: dict, t: int) -> Tensor:
    s["b"] = 0.9 * s.get("b", 0) + g
    return torch.sign(g + 0.9 * s["b"])


def lion(g: Tensor, s: dict, t: int) -> Tensor:
    m = s.get("m", torch.zeros_like(g))
    s["m"] = 0.99 * m + 0.01 * g
    return torch.sign(0.9 * m + 0.1 * g)


def ademamix(g: Tensor, s: dict, t: int) -> Tensor:
    b1, b2, b3, alpha, warm = 0.9, 0.99, 0.995, 4.0, 12

    def f(b: float) -> float:
        return math.log(0.5) / math.log(b + 1e-8) - 1

    done = min(t / warm, 1.0)
    b3_t = b3 if done == 1 else 0.5 ** (1 / ((1 - done) * f(b1) + done * f(b3) + 1))
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["n"] = b3_t * s.get("n", 0) + (1 - b3_t) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    return (s["m"] / (1 - b1**t) + alpha * done * s["n"]) / ((s["v"] / (1 - b2**t)).sqrt() + 1e-8)


def mars(g: Tensor, s: dict, t: int, lion_like: bool = False) -> Tensor:
    if g.ndim < 2:
        return 0.25 * adam(g, s, t, 0.8, 0.999)
    c = g + 0.025 * 0.95 / 0.05 * (g - s.get("last", 0))
    c = c / max(1.0, float(c.norm()))
    s["last"] = g
    u = adam(c, s, t, 0.95, 0.99)
    return torch.sign(s["m"]) if lion_like else u


CASES = {
    "signum": (lambda p: Signum(p, 0.01, momentum=0.9, weight_decay=0.1), signum),
    "lion": (lambda p: Lion(p, 0.01, weight_decay=0.1), lion),
    "ademamix": (
        lambda p: AdEMAMix(p, 0.01, (0.9, 0.99, 0.995), alpha=4.0, alpha_warmup=12, beta3_warmup=12),
        ademamix,
    ),
    "mars": (lambda p: Mars(p, 0.01, vector_lr_scale=0.25), mars),
    "mars-lion": (
        lambda p: Mars(p, 0.01, vector_lr_scale=0.25, mars_type="mars-lion"),
        lambda g, s, t: mars(g, s, t, lion_like=True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_float64_weights_equal_the_formula(name: str) -> None:
    make, rule = CASES[name]
    check(run(make), loop(0.01, 0.1, rule), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_float32_weights_are_close_to_the_formula(name: str) -> None:
    make, rule = CASES[name]
    check(run(make, torch.float32), loop(0.01, 0.1, rule), 5e-4)


def test_base_adamw_of_spectra_equals_torchs_adamw() -> None:
    """The threshold is out of reach and one vector is clipped, so the matrices take the plain base step."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        return Spectra(named, 0.01, base="adamw", clip=1e12, apply_to=["p4"], weight_decay=0.1, betas=(0.9, 0.95))

    check(run(make), run(lambda p: torch.optim.AdamW(p, 0.01, betas=(0.9, 0.95), weight_decay=0.1)), 1e-9)


def test_base_sgdm_of_spectra_equals_torchs_sgd() -> None:
    # without decay, which is coupled in torch
    options = {"weight_decay": 0.0, "momentum": 0.9, "nesterov": False}
    got = run(lambda p: Spectra(p, 0.01, base="sgdm", clip=1e12, apply_to="all", **options))
    want = run(lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    # tall matrices move by alpha > 1 times the step of the base; test_spectra.py covers them
    assert torch.allclose(got[0], want[0], atol=1e-8) and torch.allclose(got[3], want[3], atol=1e-8)


@pytest.mark.parametrize("rule", [None, "match_rms_adamw"])
def test_muon_equals_torchs_muon_on_matrices(rule: str | None) -> None:
    got = run(lambda p: Muon(p, 0.01, adjust_lr_fn=rule), torch.float32)
    params = [torch.nn.Parameter(p) for p in start(torch.float32)[:4]]
    reference = torch.optim.Muon(params, 0.01, adjust_lr_fn=rule)
    for step in range(STEPS):
        for p, g in zip(params, gradients(step), strict=False):
            p.grad = g.float()
        reference.step()
    # both iterate in bfloat16, epochal in batches and torch one by one
    check(got[:4], [p.detach().double() for p in params], 3e-2)


def test_muon_without_orthogonalize_equals_torchs_adamw() -> None:
    got = run(lambda p: Muon([{"params": p, "orthogonalize": False}], 0.01, 0.1, betas=(0.9, 0.95)))
    check(got, run(lambda p: torch.optim.AdamW(p, 0.01, betas=(0.9, 0.95), weight_decay=0.1)), 1e-9)


def test_slow_decay_starts_at_the_fast_one_and_ends_at_its_own() -> None:
    steps = torch.tensor([0.0, 50.0, 100.0, 1000.0])
    values = slow_decay(steps, 0.9, 0.999, 100)
    assert float(values[0]) == pytest.approx(0.9, abs=1e-6)
    assert 0.9 < float(values[1]) < 0.999
    assert values[2:].tolist() == [0.999, 0.999]


def test_unknown_variants_are_refused() -> None:
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match="mars-lion"):
        Mars(p, mars_type="mars-shampoo")
    with pytest.raises(ValueError, match="match_rms_adamw"):
        Muon(p, adjust_lr_fn="rms")
