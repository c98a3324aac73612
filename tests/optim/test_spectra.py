"""SPECTRA against a float64 rewrite of the published wrapper, and the bounds of docs/spectra.md, section 4.2."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from compiling import CountGraphs
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.published_spectra import PublishedSpectra
from torch import Tensor

from epochal.optim import Spectra, hard_spectral_clip, soft_spectral_clip
from epochal.optim.spectra_options import clip_threshold, pre_clip_threshold

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
few = settings(max_examples=15, deadline=None, derandomize=True)
side = st.integers(1, 24)
seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spectral_norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), ord=2))


def alpha_of(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / columns))


# --- compat="upstream" against the published wrapper ------------------------------------------------------------------

STEPS, WARMUP, LR, DECAY = 20, 5, 1e-2, 0.1
SHAPES = ((12, 20), (20, 12), (12, 20), (16, 16), (40, 8), (11,))
RISING = {"alpha_warmup": STEPS, "beta3_warmup": STEPS, "alpha": 8.0}
BASES: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95)},
    "signum": {},
    "sgdm": {},
    "lion": {"betas": (0.9, 0.99)},
    "ademamix": {"betas": (0.9, 0.95, 0.999)},
    "mars": {},
}
FLOAT32 = [
    *[(base, {"apply_to": apply_to, "warmup_steps": WARMUP}) for base in BASES for apply_to in ("2d", "all")],
    (
        "adamw",
        {"clip": 2.0, "iterations": 10, "apply_to": "all", "warmup_steps": WARMUP, "pre_clip": 0.2, "grad_clip": 0.5},
    ),
    ("mars", {"clip": 2.0, "iterations": 10, "apply_to": "all", "mars_type": "mars-lion"}),
]


def worst_deviation(base: str, dtype: torch.dtype, **options: Any) -> float:
    """Largest deviation from the published weights after 20 steps, relative to the largest movement."""
    start = [0.3 * normal(i, *shape) for i, shape in enumerate(SHAPES)]
    options = {"clip": 1.0, "iterations": 15, **BASES[base], **options}
    published = PublishedSpectra(
        [w.clone() for w in start], base, peak_lr=LR, weight_decay=DECAY, total_steps=STEPS, **options
    )
    params = [torch.nn.Parameter(w.float()) for w in start]
    options |= RISING if base == "ademamix" else {}
    spectra = Spectra(params, LR, base=base, compat="upstream", weight_decay=DECAY, dtype=dtype, **options)
    for k in range(STEPS):
        lr = LR * min(1.0, (k + 1) / WARMUP)
        gradients = [0.1 * normal(1000 + 50 * k + i, *shape, dtype=F32) for i, shape in enumerate(SHAPES)]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        spectra.param_groups[0]["lr"] = lr
        spectra.step()
        published.step([g.double() for g in gradients], lr)
    pairs = zip(params, published.weights, strict=True)
    deviation = max(float((p.detach().double() - w).abs().max()) for p, w in pairs)
    return deviation / max(float((w - s).abs().max()) for w, s in zip(published.weights, start, strict=True))


@pytest.mark.parametrize(("base", "options"), FLOAT32, ids=str)
def test_upstream_in_float32_takes_the_published_steps(base: str, options: dict[str, Any]) -> None:
    assert worst_deviation(base, F32, **options) <= 5e-4


@pytest.mark.parametrize("base", ["adamw", "ademamix", "sgdm"])
def test_upstream_takes_the_published_steps_far_from_convergence(base: str) -> None:
    assert worst_deviation(base, F32, clip=1e-2, iterations=10, apply_to="2d") <= 1e-2


@pytest.mark.parametrize("base", ["adamw", "ademamix", "mars"])
def test_upstream_in_bfloat16_takes_the_published_steps(base: str) -> None:
    assert worst_deviation(base, BF16, iterations=10, apply_to="all", warmup_steps=WARMUP) <= 3e-2


def test_upstream_normalize_takes_the_published_steps() -> None:
    assert worst_deviation("adamw", BF16, iterations=5, operator="normalize", apply_to="all") <= 6e-2


@pytest.mark.parametrize(("compat", "jumps"), [("upstream", True), (None, False)])
def test_only_the_published_vector_rule_jumps_at_the_threshold(compat: str | None, jumps: bool) -> None:
    norms = []
    for size in (0.999, 1.001):
        p = torch.nn.Parameter(torch.zeros(4))
        options = {"apply_to": "all", "weight_decay": 0.0, "nesterov": False, "compat": compat}
        optimizer = Spectra([p], 1.0, base="sgdm", clip=1.0, **options)
        p.grad = torch.full((4,), size / 2)
        optimizer.step()
        norms.append(float(p.detach().norm()))
    assert (abs(norms[0] - norms[1]) > 0.2) is jumps


@pytest.mark.parametrize("base", ["signum", "sgdm"])
def test_upstream_momentum_starts_at_the_decayed_weights(base: str) -> None:
    p = torch.nn.Parameter(normal(0, 4, 6))
    start = p.detach().clone()
    optimizer = Spectra([p], 0.5, base=base, compat="upstream", weight_decay=0.4, momentum=0.9)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], 0.9 * (1 - 0.2) * start)


# --- thresholds -------------------------------------------------------------------------------------------------------


def group_of(**options: Any) -> dict[str, Any]:
    lr = options.pop("lr", 1e-2)
    return Spectra([torch.nn.Parameter(torch.ones(2, 2))], lr, **options).param_groups[0]


@few
@given(st.integers(1, 50), st.floats(1e-4, 1), st.floats(0.1, 100))
def test_threshold_times_lr_is_constant_during_warmup(warmup: int, peak: float, c: float) -> None:
    group = group_of(lr=peak, clip=c, warmup_steps=warmup)
    for k in range(warmup + 3):
        lr = peak * min(1.0, (k + 1) / warmup)
        threshold = float(clip_threshold(torch.tensor([float(k)]), torch.tensor(lr, dtype=F64), group))
        assert threshold == (pytest.approx(c * peak / lr, rel=1e-12) if k < warmup else c)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("decay", ["linear", "sqrt", "cosine", "square", "exp"])
def test_threshold_decays_over_the_last_steps(decay: str, final: float) -> None:
    c = 5.0
    group = group_of(clip=c, clip_decay=decay, clip_final_scale=final, clip_decay_fraction=0.2, total_steps=100)
    shape = {
        "linear": lambda x: final + (1 - final) * (1 - x),
        "sqrt": lambda x: final + (1 - final) * (1 - math.sqrt(x)),
        "cosine": lambda x: final + (1 - final) * (1 + math.cos(math.pi * x)) / 2,
        "square": lambda x: final + (1 - final) * (1 - x * x),
        "exp": lambda x: final**x if final > 0 else 1 - x,
    }[decay]
    for k in (0, 79, 80, 81, 90, 99, 150):
        expected = c if k < 80 else c * shape(min((k - 80) / 20, 1.0))
        threshold = float(clip_threshold(torch.tensor([float(k)]), torch.tensor(1e-2), group))
        assert threshold == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("curve", ["linear", "cosine", "sqrt", "square", "exp"])
def test_pre_clip_threshold_follows_its_curve(curve: str) -> None:
    group = group_of(pre_clip=0.5, pre_clip_end=0.05, pre_clip_curve=curve, total_steps=40)
    for k in (0, 10, 39, 60):
        x = min(k / 40, 1.0)
        y = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "sqrt": math.sqrt(x), "square": x * x}.get(curve)
        expected = 0.5 * 0.1**x if y is None else 0.5 - 0.45 * y
        threshold = float(pre_clip_threshold(torch.tensor([float(k)]), torch.tensor(1e-2), group))
        assert threshold == pytest.approx(expected, rel=1e-6)


# --- the step ---------------------------------------------------------------------------------------------------------


@few
@given(side, side, seeds, st.sampled_from(["adamw", "signum", "sgdm"]), st.sampled_from(["soft", "hard"]))
def test_a_step_is_bounded_by_alpha_lr_c(rows: int, columns: int, seed: int, base: str, operator: str) -> None:
    lr, wd, c = 0.1, 0.2, 0.7
    p = torch.nn.Parameter(normal(seed, rows, columns))
    optimizer = Spectra([p], lr, base=base, clip=c, operator=operator, weight_decay=wd)
    for k in range(3):
        before = p.detach().clone()
        p.grad = 100 * normal(seed + k + 1, rows, columns)
        optimizer.step()
        step = spectral_norm(p.detach() - (1 - lr * wd) * before)
        assert step <= alpha_of(rows, columns) * lr * c * (1 + 1e-10)


@few
@given(side, side, seeds, st.floats(0.05, 1))
def test_weight_decay_keeps_the_weights_in_a_ball(rows: int, columns: int, seed: int, lr_wd: float) -> None:
    lr, c = 0.5, 1.0
    radius = alpha_of(rows, columns) * c / (lr_wd / lr)
    start = normal(seed, rows, columns)
    p = torch.nn.Parameter(start * radius / spectral_norm(start))
    optimizer = Spectra([p], lr, base="sgdm", clip=c, weight_decay=lr_wd / lr)
    for k in range(6):
        p.grad = 1e3 * normal(seed + k, rows, columns)
        optimizer.step()
        assert spectral_norm(p.detach()) <= radius * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_large_threshold_leaves_alpha_times_the_base_step(dtype: torch.dtype) -> None:
    start = [normal(i, *shape) for i, shape in enumerate(((5, 9), (7, 7), (12, 3)))]
    clipped = [torch.nn.Parameter(w.to(dtype, copy=True)) for w in start]
    plain = [torch.nn.Parameter(w.clone()) for w in start]
    spectra = Spectra(clipped, 1e-2, clip=1e6, weight_decay=0.0)  # without decay movements are proportional
    adam = torch.optim.AdamW(plain, 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(20):
        for i, (p, q) in enumerate(zip(clipped, plain, strict=True)):
            q.grad = normal(100 + 10 * k + i, *q.shape)
            p.grad = q.grad.to(dtype)
        spectra.step()
        adam.step()
    for p, q, w in zip(clipped, plain, start, strict=True):
        movement = alpha_of(*p.shape) * (q.detach() - w)
        assert float((p.detach().double() - w - movement).abs().max()) <= 1e-5 * float(movement.abs().max())


@few
@given(st.integers(1, 10), st.integers(1, 14), seeds)
def test_a_step_with_the_hard_clip_is_a_frank_wolfe_step(rows: int, columns: int, seed: int) -> None:
    rows, columns = sorted((rows, columns))  # alpha = 1
    lr, wd, c = 0.3, 0.5, 0.8
    p = torch.nn.Parameter(normal(seed, rows, columns))
    optimizer = Spectra([p], lr, base="sgdm", clip=c, operator="hard", weight_decay=wd, momentum=0.0)
    x = p.detach().clone()
    gamma, b, radius = wd * lr, wd, c / wd
    for k in range(4):
        g = normal(seed + k + 1, rows, columns)
        p.grad = g.clone()
        optimizer.step()
        # argmin <G, V> + b/2 ||V||_F^2 over ||V||_2 <= radius is the projection of -G / b onto that ball.
        left, s, right = torch.linalg.svd(-g / b, full_matrices=False)
        x = (1 - gamma) * x + gamma * (left * s.clamp(max=radius)) @ right
        assert float((p.detach() - x).abs().max()) <= 1e-12


@few
@given(side, side, seeds, st.floats(0.01, 10))
def test_gradients_are_pre_clipped_and_then_clipped_globally(rows: int, columns: int, seed: int, top: float) -> None:
    params = [torch.nn.Parameter(normal(0, *shape)) for shape in ((rows, columns), (columns, rows), (5,))]
    gradients = [7 * normal(seed + i, *p.shape) for i, p in enumerate(params)]
    for grad_clip in (None, top):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        Spectra(params, 0.1, apply_to="all", pre_clip=0.5, grad_clip=grad_clip).step()
        if grad_clip is None:
            for p, g in zip(params[:2], gradients, strict=False):
                assert spectral_norm(p.grad) <= 0.5 * (1 + 1e-12)
                assert torch.allclose(p.grad, soft_spectral_clip(g, 0.5, method="exact"), rtol=0, atol=1e-9)
            assert torch.equal(params[2].grad, gradients[2])
    assert float(torch.stack([p.grad.norm() for p in params]).norm()) <= top * (1 + 1e-6)


@pytest.mark.parametrize("compat", [None, "upstream"])
def test_a_nan_gradient_skips_its_matrix_only(compat: str | None) -> None:
    params = [torch.nn.Parameter(normal(i, 4, 6, dtype=F32)) for i in range(3)]
    start = copy.deepcopy(params)
    optimizer = Spectra(params, 0.1, pre_clip=0.5, grad_clip=0.3, compat=compat)
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[0, 0] = math.nan
    optimizer.step()
    assert int(optimizer.skipped) == 1
    assert torch.equal(params[1], start[1])
    for i in (0, 2):
        assert bool(params[i].isfinite().all()) and not torch.equal(params[i], start[i])


def test_a_vector_of_published_mars_that_is_skipped_does_not_decay() -> None:
    """Its weight decay is inside of the update that is clipped."""
    params = [torch.nn.Parameter(normal(i, 5, dtype=F32)) for i in range(2)]
    start = copy.deepcopy(params)
    optimizer = Spectra(params, 0.1, base="mars", compat="upstream", apply_to="all")
    params[0].grad, params[1].grad = torch.full((5,), math.nan), torch.ones(5)
    optimizer.step()
    assert torch.equal(params[0], start[0]) and not torch.equal(params[1], start[1])


# --- which matrices, and how ------------------------------------------------------------------------------------------


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 3))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"0.weight", "2.weight"}),
        ({"apply_to": "all"}, {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}),
        ({"apply_to": [r"^2\.w", "^1"]}, {"2.weight", "1.weight", "1.bias"}),
    ],
    ids=("matrices", "all", "patterns"),
)
def test_apply_to_selects_what_is_clipped(options: dict[str, Any], expected: set[str]) -> None:
    clipped, plain = model(), model()
    spectra = Spectra(list(clipped.named_parameters()), 1e-2, clip=0.1, weight_decay=0.0, **options)
    adam = torch.optim.AdamW(plain.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for p in (*clipped.parameters(), *plain.parameters()):
        p.grad = torch.ones_like(p)
    spectra.step()
    adam.step()
    pairs = zip(clipped.named_parameters(), plain.parameters(), strict=True)
    assert {name for (name, p), q in pairs if not torch.allclose(p, q, atol=1e-6)} == expected


def first_step(gradient: Tensor, **options: Any) -> Tensor:
    """The movement of zero weights at lr 1 by a base step that is the gradient."""
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    Spectra([p], 1.0, base="sgdm", momentum=0.0, clip=0.5, weight_decay=0.0, **options).step()
    return p.detach()


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), seeds)
def test_blocks_are_clipped_separately(blocks: int, rows: int, columns: int, seed: int) -> None:
    g = normal(seed, blocks * rows, columns)
    expected = torch.cat([soft_spectral_clip(part, 0.5, method="exact") for part in g.chunk(blocks)])
    assert torch.allclose(first_step(g, blocks=blocks), -alpha_of(rows, columns) * expected, atol=1e-9)


def test_convolutions_are_batches_of_matrices() -> None:
    g = normal(0, 4, 3, 6, 5)
    expected = -alpha_of(6, 5) * soft_spectral_clip(g, 0.5, method="exact")
    assert torch.allclose(first_step(g, apply_to="all"), expected, atol=1e-9)


@pytest.mark.parametrize(("operator", "clip"), [("soft", soft_spectral_clip), ("hard", hard_spectral_clip)])
def test_operator_chooses_the_clip(operator: str, clip: Any) -> None:
    g = normal(0, 5, 8)
    assert torch.allclose(first_step(g, operator=operator), -clip(g, 0.5), atol=1e-9)


def test_groups_have_their_own_options() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    groups = [{"params": [a], "clip": 0.1}, {"params": [b], "clip": 0.4, "lr": 2.0}]
    optimizer = Spectra(groups, 1.0, clip=1.0, weight_decay=0.0)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()  # Adam's update is all ones: one singular value of 4
    assert spectral_norm(a.detach()) == pytest.approx(0.1, rel=1e-2)
    assert spectral_norm(b.detach()) == pytest.approx(2 * 0.4, rel=2e-2)


# --- refusals and compilation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "soap"}, "adamw"),
        ({"compat": "paper"}, "upstream"),
        ({"betaz": (0.9, 0.9)}, "betas"),
        ({"clip": 0.0}, "above 0"),
        ({"pre_clip": -1.0}, "above 0"),
        ({"method": "svd"}, "polar"),
        ({"iterations": 5}, "newton_schulz"),
        ({"operator": "firm"}, "hard"),
        ({"clip_decay": "sqrt"}, "total_steps"),
        ({"clip_decay": "root", "total_steps": 10}, "cosine"),
        ({"pre_clip": 1.0, "pre_clip_end": 0.1, "pre_clip_curve": "exp"}, "total_steps"),
        ({"apply_to": "1d"}, "regular expressions"),
        ({"apply_to": ["attention"]}, "named_parameters"),
        ({"blocks": 3}, "does not divide"),
        ({"base": "mars", "mars_type": "mars-shampoo"}, "mars-lion"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spectra([torch.nn.Parameter(torch.ones(4, 4))], 1e-2, **options)


def test_selecting_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="selects none of 1"):
        Spectra([torch.nn.Parameter(torch.ones(16))], 1e-2)
    with pytest.raises(ValueError, match="matches none"):
        Spectra(list(model().named_parameters()), 1e-2, apply_to=["attention"])


def test_update_compiles_to_one_graph_for_all_steps() -> None:
    params = [torch.nn.Parameter(normal(i, 6, 9, dtype=F32)) for i in range(2)]
    optimizer = Spectra(params, torch.tensor(1e-2), clip=0.7, warmup_steps=3, method="polar")
    backend = CountGraphs()
    group = optimizer.param_groups[0]

    def clipped(g: Tensor, s: dict[str, Tensor]) -> Tensor:
        rule, options = optimizer.direction(params[0], group)
        return optimizer.transform(rule(g, s, **options)[0], g, s["step"], group)

    compiled = torch.compile(clipped, fullgraph=True, backend=backend)
    for step in range(5):
        for p in params:
            p.grad = normal(step, 6, 9, dtype=F32)
        group["lr"].fill_(1e-2 * min(1, (step + 1) / 3))
        optimizer.step()
        state = {key: torch.stack([optimizer.state[p][key] for p in params]) for key in optimizer.state[params[0]]}
        grads = normal(50 + step, 2, 6, 9, dtype=F32)
        eager = clipped(grads, state)
        assert float((compiled(grads, state) - eager).norm() / eager.norm()) <= 1e-2
    assert backend.graphs == 1
