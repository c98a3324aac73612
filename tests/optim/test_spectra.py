"""SPECTRA against the published rules, written again from their description, and its invariants (numbers: section 4.2)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from compiling import CountGraphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epochal.optim import Spectra, hard_spectral_clip, soft_spectral_clip
from epochal.optim.spectra import clip_threshold, pre_clip_threshold

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = ((12, 20), (20, 12), (12, 20), (16, 16), (40, 8), (11,))
few = settings(max_examples=15, deadline=None, derandomize=True)
side = st.integers(1, 24)
seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def norm2(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), ord=2))


# --- the published code, again, in float64 ----------------------------------------------------------------------------


def oracle_clip(x: Tensor, c: float, steps: int) -> Tensor:
    """Section 1.6 through its closed form: what `steps` exact iterations do to each singular value."""
    if x.ndim == 1:
        n = float(x.norm())
        return x if n <= c else x / math.sqrt(1 + (n / c) ** 2)
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    gram = wide @ wide.mT
    a = 1 + min(float(gram.abs().sum(1).max()), float(gram.norm())) / c**2
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    f = torch.sqrt((1 + (s / c) ** 2) / a)
    for _ in range(steps):
        f = 1.5 * f - 0.5 * f**3
    return (left * (f * s / torch.sqrt(1 + (s / c) ** 2))) @ right


def oracle_normalize(x: Tensor, steps: int) -> Tensor:
    """Section 1.7 in float64."""
    if x.ndim == 1:
        return x / (x.norm() + 1e-7)
    y = (x if x.shape[0] <= x.shape[1] else x.mT) / (x.norm() + 1e-7)
    for _ in range(steps):
        g = y @ y.mT
        y = 3.4445 * y + (-4.7750 * g + 2.0315 * g @ g) @ y
    return y if x.shape[0] <= x.shape[1] else y.mT


class Published:
    """The wrapper of sections 1.3 to 1.10 on one list of float64 tensors: base step, recover U, clip, step again."""

    def __init__(self, weights: list[Tensor], lr: float, wd: float, **o: Any) -> None:
        self.w, self.peak, self.wd, self.o = weights, lr, wd, o
        self.memory: list[dict] = [{} for _ in weights]
        self.k = 0

    def base_step(self, w: Tensor, g: Tensor, m: dict, lr: float) -> Tensor:
        base, t, wd = self.o["base"], self.k + 1, self.wd
        b1, b2, *rest = self.o.get("betas", (0.9, 0.95))
        decayed = w * (1 - lr * wd)

        def adam(c: Tensor, b1: float, b2: float) -> Tensor:
            m["m"] = b1 * m.get("m", 0) + (1 - b1) * c
            m["v"] = b2 * m.get("v", 0) + (1 - b2) * c * c
            return m["m"] / (1 - b1**t) / ((m["v"] / (1 - b2**t)).sqrt() + 1e-8)

        if base == "adamw":
            return decayed - lr * adam(g, b1, b2)
        if base in ("signum", "sgdm"):
            m["b"] = 0.95 * m.get("b", decayed) + g
            d = g + 0.95 * m["b"]
            return decayed - lr * (d.sign() if base == "signum" else d)
        if base == "lion":
            old = m.get("m", torch.zeros_like(g))
            m["m"] = b2 * old + (1 - b2) * g
            return decayed - lr * (b1 * old + (1 - b1) * g).sign()
        if base == "ademamix":
            b3, alpha, warm = rest[0], 8.0, self.o["warm"]
            done = min(t / warm, 1.0)
            f1, f3 = (math.log(0.5) / math.log(b + 1e-8) - 1 for b in (b1, b3))
            b3_t = b3 if done == 1 else 0.5 ** (1 / ((1 - done) * f1 + done * f3 + 1))
            m["s"] = b3_t * m.get("s", 0) + (1 - b3_t) * g
            fast = adam(g, b1, b2)
            return decayed - lr * (fast + alpha * done * m["s"] / ((m["v"] / (1 - b2**t)).sqrt() + 1e-8))
        if g.ndim < 2:  # MARS vectors: their own rate and decay, inside the step
            own = lr / 3
            return w * (1 - own * 0.1) - own * adam(g, 0.8, 0.999)
        c = g + 0.025 * 0.95 / 0.05 * (g - m.get("last", 0))
        c = c / max(1.0, float(c.norm()))
        m["last"] = g
        u = adam(c, 0.95, 0.99)
        return decayed - lr * (m["m"].sign() if self.o.get("mars_type") == "mars-lion" else u)

    def threshold(self, lr: float) -> float:
        c, warm = self.o["clip"], self.o.get("warmup_steps", 0)
        return c * self.peak / max(lr, 1e-10) if self.k < warm else c

    def step(self, gradients: list[Tensor], lr: float) -> None:
        if pre := self.o.get("pre_clip"):
            c = pre * self.peak / max(lr, 1e-10) if self.k < self.o.get("warmup_steps", 0) else pre
            gradients = [oracle_clip(g, c, self.o["steps"]) if g.ndim == 2 else g for g in gradients]
        if top := self.o.get("grad_clip"):
            total = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients))
            gradients = [g * min(1, top / (total + 1e-6)) for g in gradients]
        for i, g in enumerate(gradients):
            x = self.w[i]
            after = self.base_step(x, g, self.memory[i], lr)
            if x.ndim != 2 and self.o["apply_to"] == "2d":
                self.w[i] = after
                continue
            u = (x - after) / lr - self.wd * x
            alpha = math.sqrt(max(1, x.shape[0] / x.shape[1])) if x.ndim == 2 else 1.0
            if self.o.get("operator") == "normalize":
                h = oracle_normalize(u, self.o["steps"])
            else:
                h = oracle_clip(u, self.threshold(lr), self.o["steps"])
            self.w[i] = (1 - self.wd * lr) * x - alpha * lr * h
        self.k += 1


def compare(dtype: torch.dtype, steps: int, tolerance: float, **o: Any) -> None:
    """Twenty steps of both from the same weights and gradients; the worst deviation over the largest movement."""
    start = [0.3 * normal(i, *s) for i, s in enumerate(SHAPES)]
    lr, wd, n = 1e-2, 0.1, 20
    published = Published([w.clone() for w in start], lr, wd, steps=steps, warm=n, **o)
    params = [torch.nn.Parameter(w.float()) for w in start]
    extra = dict(o)
    if o["base"] == "ademamix":
        extra |= {"alpha_warmup": n, "beta3_warmup": n, "alpha": 8.0}
    ours = Spectra(params, lr, compat="upstream", weight_decay=wd, iterations=steps, dtype=dtype, **extra)
    for k in range(n):
        now = lr * (k + 1) / 5 if k < 5 else lr
        gradients = [0.1 * normal(1000 + 50 * k + i, *s) for i, s in enumerate(SHAPES)]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.float()
        ours.param_groups[0]["lr"] = now
        ours.step()
        published.step([g.float().double() for g in gradients], now)
    moved = max(float((w - s).abs().max()) for w, s in zip(published.w, start, strict=True))
    worst = max(float((p.detach().double() - w).abs().max()) for p, w in zip(params, published.w, strict=True))
    print(f"{o} {dtype}: {worst / moved:.1e} of {tolerance}")
    assert worst <= tolerance * moved


BASES: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95)},
    "signum": {},
    "sgdm": {},
    "lion": {"betas": (0.9, 0.99)},
    "ademamix": {"betas": (0.9, 0.95, 0.999)},
    "mars": {},
}


@pytest.mark.parametrize("apply_to", ["2d", "all"])
@pytest.mark.parametrize("base", BASES)
def test_upstream_float32(base: str, apply_to: str) -> None:
    compare(F32, 15, 5e-4, base=base, clip=1.0, apply_to=apply_to, warmup_steps=5, **BASES[base])


def test_upstream_float32_pre_clip_and_global_clip() -> None:
    compare(F32, 10, 5e-4, base="adamw", clip=2.0, apply_to="all", warmup_steps=5, pre_clip=0.2, grad_clip=0.5)
    compare(F32, 10, 5e-4, base="mars", clip=2.0, apply_to="all", mars_type="mars-lion")


@pytest.mark.parametrize("base", ["adamw", "ademamix", "sgdm"])
def test_upstream_far_from_converged(base: str) -> None:
    compare(F32, 10, 1e-2, base=base, clip=1e-2, apply_to="2d", **BASES[base])


@pytest.mark.parametrize("base", ["adamw", "ademamix", "mars"])
def test_upstream_bfloat16_clip(base: str) -> None:
    compare(BF16, 10, 3e-2, base=base, clip=1.0, apply_to="all", warmup_steps=5, **BASES[base])


def test_upstream_bfloat16_normalize() -> None:
    compare(BF16, 5, 6e-2, base="adamw", clip=1.0, operator="normalize", apply_to="all")


def test_upstream_vector_rule_jumps_and_ours_does_not() -> None:
    for compat, jump in (("upstream", True), (None, False)):
        moved = []
        for size in (0.999, 1.001):
            p = torch.nn.Parameter(torch.zeros(4))
            optimizer = Spectra([p], 1.0, base="sgdm", clip=1.0, apply_to="all", weight_decay=0.0, compat=compat)
            optimizer.param_groups[0]["nesterov"] = False
            p.grad = torch.full((4,), size / 2)
            optimizer.step()
            moved.append(float(p.detach().norm()))
        assert (abs(moved[0] - moved[1]) > 0.2) is jump


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
@given(st.integers(1, 50), st.floats(1e-4, 1), st.floats(0.1, 100), seeds)
def test_16_threshold_times_rate_is_constant_in_warm_up(warm: int, peak: float, c: float, seed: int) -> None:
    group = group_of(lr=peak, clip=c, warmup_steps=warm)
    steps = torch.arange(0, warm + 3, dtype=F32)
    rates = peak * (torch.arange(1, warm + 4, dtype=F64) / warm).clamp(max=1)
    for k, lr in zip(steps, rates, strict=True):
        got = float(clip_threshold(k[None], lr, group))
        if k < warm:
            assert got * float(lr) == pytest.approx(c * peak, rel=1e-12)
        else:
            assert got == c


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("decay", ["linear", "sqrt", "cosine", "square", "exp"])
def test_decay_of_the_threshold(decay: str, final: float) -> None:
    T, fraction, c = 100, 0.2, 5.0
    group = group_of(clip=c, clip_decay=decay, clip_final_scale=final, clip_decay_fraction=fraction, total_steps=T)
    shape = {
        "linear": lambda x: final + (1 - final) * (1 - x),
        "sqrt": lambda x: final + (1 - final) * (1 - math.sqrt(x)),
        "cosine": lambda x: final + (1 - final) * (1 + math.cos(math.pi * x)) / 2,
        "square": lambda x: final + (1 - final) * (1 - x * x),
        "exp": lambda x: final**x if final > 0 else 1 - x,
    }[decay]
    for k in (0, 79, 80, 81, 90, 99, 150):
        want = c if k < 80 else c * shape(min((k - 80) / 20, 1.0))
        got = float(clip_threshold(torch.tensor([float(k)]), torch.tensor(1e-2), group))
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("curve", ["linear", "cosine", "sqrt", "square", "exp"])
def test_curve_of_the_pre_clip_threshold(curve: str) -> None:
    group = group_of(pre_clip=0.5, pre_clip_end=0.05, pre_clip_curve=curve, total_steps=40)
    for k in (0, 10, 39, 60):
        x = min(k / 40, 1.0)
        y = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "sqrt": math.sqrt(x), "square": x * x}.get(curve)
        want = 0.5 * 0.1**x if y is None else 0.5 - 0.45 * y
        got = float(pre_clip_threshold(torch.tensor([float(k)]), torch.tensor(1e-2), group))
        assert got == pytest.approx(want, rel=1e-6)


# --- the step ---------------------------------------------------------------------------------------------------------


@few
@given(side, side, seeds, st.sampled_from(["adamw", "signum", "sgdm"]), st.sampled_from(["soft", "hard"]))
def test_14_step_is_bounded(rows: int, columns: int, seed: int, base: str, operator: str) -> None:
    lr, wd, c = 0.1, 0.2, 0.7
    p = torch.nn.Parameter(normal(seed, rows, columns))
    optimizer = Spectra([p], lr, base=base, clip=c, operator=operator, weight_decay=wd)
    alpha = math.sqrt(max(1, rows / columns))
    for k in range(3):
        before = p.detach().clone()
        p.grad = 100 * normal(seed + k + 1, rows, columns)
        optimizer.step()
        assert norm2(p.detach() - (1 - lr * wd) * before) <= alpha * lr * c * (1 + 1e-10)


@few
@given(side, side, seeds, st.floats(0.05, 1))
def test_15_weights_stay_in_their_ball(rows: int, columns: int, seed: int, decay: float) -> None:
    lr, c = 0.5, 1.0
    wd = decay / lr
    alpha = math.sqrt(max(1, rows / columns))
    start = normal(seed, rows, columns)
    start *= alpha * c / wd / norm2(start)
    p = torch.nn.Parameter(start.clone())
    optimizer = Spectra([p], lr, base="sgdm", clip=c, weight_decay=wd)
    for k in range(6):
        p.grad = 1e3 * normal(seed + k, rows, columns)
        optimizer.step()
        assert norm2(p.detach()) <= alpha * c / wd * (1 + 1e-9)
    free = torch.nn.Parameter(start.clone())
    optimizer = Spectra([free], lr, base="sgdm", clip=c, weight_decay=0.0)
    for k in range(1, 4):
        free.grad = 1e3 * normal(seed + k, rows, columns)
        optimizer.step()
        assert norm2(free.detach() - start) <= alpha * lr * c * k * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_17_a_large_threshold_leaves_the_base(dtype: torch.dtype) -> None:
    """Wide and square: the same trajectory; tall: the update times alpha (no decay, so movements are proportional)."""
    shapes = ((5, 9), (7, 7), (12, 3))
    start = [normal(i, *s) for i, s in enumerate(shapes)]
    ours = [torch.nn.Parameter(w.to(dtype, copy=True)) for w in start]
    theirs = [torch.nn.Parameter(w.clone()) for w in start]
    spectra = Spectra(ours, 1e-2, clip=1e6, weight_decay=0.0)
    adam = torch.optim.AdamW(theirs, 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = normal(100 + 10 * k + i, *q.shape)
            p.grad = q.grad.to(dtype)
        spectra.step()
        adam.step()
    for p, q, w in zip(ours, theirs, start, strict=True):
        alpha = math.sqrt(max(1, p.shape[0] / p.shape[1]))
        moved = q.detach() - w
        assert float((p.detach().double() - w - alpha * moved).abs().max()) <= 1e-5 * float(moved.abs().max())


@few
@given(st.integers(1, 10), st.integers(1, 14), seeds)
def test_18_hard_clip_is_a_frank_wolfe_step(rows: int, columns: int, seed: int) -> None:
    rows, columns = sorted((rows, columns))  # alpha = 1
    lr, wd, c = 0.3, 0.5, 0.8
    p = torch.nn.Parameter(normal(seed, rows, columns))
    optimizer = Spectra([p], lr, base="sgdm", clip=c, operator="hard", weight_decay=wd, momentum=0.0)
    x = p.detach().clone()
    gamma, b, D = wd * lr, wd, c / wd
    for k in range(4):
        g = normal(seed + k + 1, rows, columns)
        p.grad = g.clone()
        optimizer.step()
        # argmin <G, V> + b/2 ||V||_F^2 over ||V||_2 <= D is the projection of -G / b onto that ball
        left, s, right = torch.linalg.svd(-g / b, full_matrices=False)
        x = (1 - gamma) * x + gamma * (left * s.clamp(max=D)) @ right
        assert float((p.detach() - x).abs().max()) <= 1e-12


@few
@given(side, side, seeds, st.floats(0.01, 10))
def test_20_pre_clip_then_global_clip(rows: int, columns: int, seed: int, top: float) -> None:
    params = [torch.nn.Parameter(normal(0, *s)) for s in ((rows, columns), (columns, rows), (5,))]
    pre = Spectra(params, 0.1, apply_to="all", pre_clip=0.5)
    both = Spectra(params, 0.1, apply_to="all", pre_clip=0.5, grad_clip=top)
    for optimizer in (pre, both):
        for i, p in enumerate(params):
            p.grad = 7 * normal(seed + i, *p.shape)
        optimizer.step()
        if optimizer is pre:
            for i, p in enumerate(params[:2]):
                want = soft_spectral_clip(7 * normal(seed + i, *p.shape), 0.5, method="exact")
                assert norm2(p.grad) <= 0.5 * (1 + 1e-12)
                assert torch.allclose(p.grad, want, rtol=0, atol=1e-9)
            assert torch.equal(params[2].grad, 7 * normal(seed + 2, 5))
    assert float(torch.stack([p.grad.norm() for p in params]).norm()) <= top * (1 + 1e-6)


@pytest.mark.parametrize("compat", [None, "upstream"])
def test_pre_clip_and_global_clip_pass_a_nan_by(compat: str | None) -> None:
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


# --- selection --------------------------------------------------------------------------------------------------------


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 3))


def clipped_ones(net: torch.nn.Module, **options: Any) -> set[str]:
    """Names of the parameters whose first step differs from AdamW's."""
    plain = copy.deepcopy(net)
    named = list(net.named_parameters())
    optimizer = Spectra(named, 1e-2, clip=0.1, weight_decay=0.0, **options)
    adam = torch.optim.AdamW(plain.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step()
    adam.step()
    pairs = zip(net.named_parameters(), plain.parameters(), strict=True)
    return {name for (name, p), q in pairs if not torch.allclose(p, q, atol=1e-6)}


def test_selection() -> None:
    names = {name for name, _ in model().named_parameters()}
    assert clipped_ones(model()) == {"0.weight", "2.weight"}
    assert clipped_ones(model(), apply_to="all") == names
    assert clipped_ones(model(), apply_to=[r"^2\.w", "^1"]) == {"2.weight", "1.weight", "1.bias"}


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), seeds)
def test_blocks_are_matrices_of_their_own(blocks: int, rows: int, columns: int, seed: int) -> None:
    p = torch.nn.Parameter(normal(seed, blocks * rows, columns))
    start = p.detach().clone()
    optimizer = Spectra([p], 1.0, base="sgdm", momentum=0.0, clip=0.5, weight_decay=0.0, blocks=blocks)
    p.grad = normal(seed + 1, blocks * rows, columns)
    optimizer.step()
    alpha = math.sqrt(max(1, rows / columns))
    want = torch.cat([soft_spectral_clip(part, 0.5, method="exact") for part in p.grad.chunk(blocks)])
    assert torch.allclose(p.detach(), start - alpha * want, atol=1e-9)


def test_convolutions_under_all_are_batches_of_matrices() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3, 6, 5, dtype=F64))
    optimizer = Spectra([p], 1.0, base="sgdm", momentum=0.0, clip=0.5, weight_decay=0.0, apply_to="all")
    p.grad = normal(0, 4, 3, 6, 5)
    optimizer.step()
    want = -math.sqrt(6 / 5) * soft_spectral_clip(p.grad, 0.5, method="exact")
    assert torch.allclose(p.detach(), want, atol=1e-9)


@pytest.mark.parametrize("operator", ["soft", "hard"])
def test_operator(operator: str) -> None:
    p = torch.nn.Parameter(torch.zeros(5, 8, dtype=F64))
    optimizer = Spectra([p], 1.0, base="sgdm", momentum=0.0, clip=0.5, weight_decay=0.0, operator=operator)
    p.grad = normal(0, 5, 8)
    optimizer.step()
    clip = {"soft": soft_spectral_clip, "hard": hard_spectral_clip}[operator]
    assert torch.allclose(p.detach(), -clip(p.grad, 0.5), atol=1e-9)


def test_groups_have_options_of_their_own() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    groups = [{"params": [a], "clip": 0.1}, {"params": [b], "clip": 0.4, "lr": 2.0}]
    optimizer = Spectra(groups, 1.0, clip=1.0, weight_decay=0.0)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    # sign-like all-ones update: one singular value of 4
    assert norm2(a.detach()) == pytest.approx(0.1, rel=1e-2)
    assert norm2(b.detach()) == pytest.approx(2 * 0.4, rel=2e-2)


def test_a_parameter_swapped_for_a_flat_shard_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Spectra([p], 1e-2)
    flat = torch.nn.Parameter(torch.ones(16))
    flat.grad = torch.ones(16)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="keeps them whole"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "soap"}, "adamw"),
        ({"compat": "paper"}, "upstream"),
        ({"betaz": (0.9, 0.9)}, "betas"),
        ({"clip": 0.0}, "above 0"),
        ({"pre_clip": -1.0}, "above 0"),
        ({"method": "svd"}, "minimax"),
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
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spectra([torch.nn.Parameter(torch.ones(4, 4))], 1e-2, **options)


def test_selecting_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="selects none of 1"):
        Spectra([torch.nn.Parameter(torch.ones(16))], 1e-2)
    with pytest.raises(ValueError, match="matches none"):
        Spectra(list(model().named_parameters()), 1e-2, apply_to=["attention"])


def test_update_compiles_whole_and_once() -> None:
    params = [torch.nn.Parameter(normal(i, 6, 9, dtype=F32)) for i in range(2)]
    optimizer = Spectra(params, torch.tensor(1e-2), clip=0.7, warmup_steps=3, method="minimax")
    backend = CountGraphs()
    group = optimizer.param_groups[0]
    compiled = torch.compile(lambda p, g, s: optimizer.update(p, g, s, group), fullgraph=True, backend=backend)
    for step in range(5):
        for p in params:
            p.grad = normal(step, 6, 9, dtype=F32)
        group["lr"].fill_(1e-2 * min(1, (step + 1) / 3))
        optimizer.step()
        state = {key: torch.stack([optimizer.state[p][key] for p in params]) for key in optimizer.state[params[0]]}
        weights, grads = torch.stack([p.detach() for p in params]), normal(50 + step, 2, 6, 9, dtype=F32)
        want = optimizer.update(weights, grads, state, group)[0]
        got = compiled(weights, grads, state)[0]
        assert float((got - want).norm() / want.norm()) <= 1e-2
    assert backend.graphs == 1
