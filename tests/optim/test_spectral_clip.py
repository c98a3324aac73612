"""The clips against float64 singular value decompositions and the closed form of the published steps.

Invariants of docs/spectra.md, section 4.2, that follow from agreement with the decomposition have no test of their own.
"""

from __future__ import annotations

import math

import pytest
import torch
from compiling import CountGraphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epochal.optim import hard_spectral_clip, soft_spectral_clip
from epochal.optim.spectral_clip import polar
from epochal.optim.spectral_clip._common import gram_bound

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

side = st.integers(1, 40)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None, derandomize=True)
arithmetics = pytest.mark.parametrize(
    ("method", "dtype"),
    [("exact", F64), ("exact", F32), ("polar", F64), ("polar", F32), ("auto", F32), ("newton_schulz", F32)],
)
all_methods = pytest.mark.parametrize("method", ["exact", "polar", "auto", "newton_schulz"])


def svd_clip(x: Tensor, c: float, *, hard: bool = False) -> Tensor:
    """The definition, by a float64 SVD."""
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    s = s.clamp(max=c) if hard else s / torch.sqrt(1 + (s / c) ** 2)
    return (left * s) @ right


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def with_spectrum(seed: int, rows: int, columns: int, s: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(normal(seed, rows, columns), full_matrices=False)
    return (left * s) @ right


def conditioned(seed: int, rows: int, columns: int, a: float, c: float) -> Tensor:
    """A matrix with 1 + s^2 / c^2 = a for its largest singular value, the others spread over two decades below."""
    return with_spectrum(
        seed, rows, columns, c * math.sqrt(a - 1) * torch.logspace(0, -2, min(rows, columns), dtype=F64)
    )


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def spectral_norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), ord=2))


# --- accuracy ---------------------------------------------------------------------------------------------------------


@few
@given(side, side, seeds, st.floats(1.1, 5e3))
def test_agrees_with_the_svd_up_to_rounding(rows: int, columns: int, seed: int, a: float) -> None:
    x, c = conditioned(seed, rows, columns, a, 3.0), 3.0
    exact, exact32 = svd_clip(x, c), svd_clip(x.float(), c)
    assert relative_error(soft_spectral_clip(x, c, method="exact"), exact) <= 1e-10
    assert relative_error(soft_spectral_clip(x.float(), c, method="exact"), exact32) <= 2e-5
    # The iteration, run until it has converged.
    options = {"method": "newton_schulz", "iterations": 40}
    assert relative_error(soft_spectral_clip(x, c, dtype=F64, **options), exact) <= 1e-10
    assert relative_error(soft_spectral_clip(x.float(), c, dtype=F32, **options), exact32) <= 2e-5 * max(1.0, a / 1e3)
    # Half a rounding times the condition number.
    published = soft_spectral_clip(x.float(), c, method="newton_schulz", iterations=20, dtype=F32)
    assert relative_error(published, exact32) <= max(2e-5, torch.finfo(F32).eps / 2 * a)


@few
@given(side, side, seeds, st.floats(0.1, 10))
def test_hard_clip_agrees_with_the_svd_up_to_rounding(rows: int, columns: int, seed: int, c: float) -> None:
    x = normal(seed, rows, columns)
    assert relative_error(hard_spectral_clip(x, c), svd_clip(x, c, hard=True)) <= 1e-10
    assert relative_error(hard_spectral_clip(x.float(), c), svd_clip(x.float(), c, hard=True)) <= 2e-5
    assert spectral_norm(hard_spectral_clip(x, c)) <= c * (1 + 1e-12)


@few
@given(side, side, seeds, st.floats(1.1, 1e3))
def test_half_precision_input_is_clipped_in_float32(rows: int, columns: int, seed: int, a: float) -> None:
    x = conditioned(seed, rows, columns, a, 3.0)
    for dtype, tolerance in ((F16, 5e-3), (BF16, 3e-2)):
        for method in ("exact", "auto"):
            out = soft_spectral_clip(x.to(dtype), 3.0, method=method)
            assert out.dtype == dtype
            assert relative_error(out, svd_clip(x.to(dtype), 3.0)) <= tolerance


def spectra(size: int) -> dict[str, Tensor]:
    """Seven ways in which singular values fall off."""
    k = torch.arange(1, size + 1, dtype=F64)
    return {
        "gaussian": torch.linalg.svdvals(normal(1, size, 3 * size // 2)),
        "flat": torch.ones(size, dtype=F64),
        "two levels": k % 2 + 0.01,  # half of them at the top, where the bound on the norm is loosest
        "spikes": torch.where(k <= 4, 1 / k, 0.01),
        "three decades": torch.logspace(0, -3, size, dtype=F64),
        "1 / k": 1 / k,
        "1 / k^2": 1 / k**2,
    }


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize(
    ("a", "allowed"), [(1.0001, 0.006), (30, 0.006), (300, 0.006), (3_000, 0.006), (30_000, 0.013)]
)
def test_the_polar_clip_is_accurate_in_float16(dtype: torch.dtype, a: float, allowed: float) -> None:
    """Seven spectra in one batch, whose products run in `dtype`: in float16 those of the CPU, which sums in float32."""
    cases, c = spectra(96), 10.0
    x = torch.stack([with_spectrum(7, 96, 160, s * (c * math.sqrt(a - 1) / s.max())) for s in cases.values()])
    out = soft_spectral_clip(x if dtype == F64 else x.float(), c, method="polar", dtype=dtype)
    for name, one, clipped in zip(cases, x, out, strict=True):
        exact = svd_clip(one, c)
        assert relative_error(clipped, exact) <= allowed, (name, relative_error(clipped, exact))
        assert spectral_norm(clipped) <= 1.01 * spectral_norm(exact), name


@pytest.mark.parametrize("dtype", [F16, F32])
def test_above_its_condition_the_polar_clip_shrinks_small_singular_values_and_none_grows(dtype: torch.dtype) -> None:
    s = 10.0 * torch.logspace(4, 0, 24, dtype=F64)
    clipped = soft_spectral_clip(with_spectrum(5, 24, 40, s).float(), 10.0, method="polar", dtype=dtype)
    assert bool(clipped.isfinite().all())
    assert spectral_norm(clipped) <= 10.0 * 1.01


@pytest.mark.parametrize("method", ["exact", "auto"])
@pytest.mark.parametrize("decades", [4, 5, 6, 7, 9, 12, 18])
def test_ill_conditioned_matrices_get_a_finer_arithmetic(method: str, decades: int) -> None:
    s = 10.0 * torch.logspace(decades / 2, decades / 2 - 4, 24, dtype=F64)
    for dtype in (F64, F32):
        x = with_spectrum(decades, 24, 40, s).to(dtype)
        out = soft_spectral_clip(x, 10.0, method=method)
        assert relative_error(out, svd_clip(x, 10.0)) <= (2e-5 if method == "exact" else 1e-2)
        assert spectral_norm(out) <= 10.0 * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_exact_resolves_singular_values_far_below_the_largest(seed: int) -> None:
    s = torch.tensor([1e5, 1e2, 1.0, 1e-2, 1e-4], dtype=F64)
    left, _, right = torch.linalg.svd(normal(seed, 5, 9), full_matrices=False)
    clipped = (left.mT @ soft_spectral_clip((left * s) @ right, 0.1, method="exact") @ right.mT).diagonal()
    assert torch.allclose(clipped, s / torch.sqrt(1 + (s / 0.1) ** 2), rtol=1e-6, atol=1e-10)


@few
@given(side, side, seeds, st.sampled_from([F64, F32, F16]))
def test_bound_is_never_below_the_norm(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    rows, columns = sorted((rows, columns))
    for x in (normal(seed, rows, columns), normal(seed, rows, 1) @ normal(seed + 1, 1, columns)):
        x = (x / x.abs().max() / math.sqrt(columns)).to(dtype)
        gram = x @ x.mT
        largest = float(torch.linalg.eigvalsh(gram.double())[-1]) * (1 - 8 * torch.finfo(dtype).eps)
        assert float(gram_bound(gram[None])) >= largest
        assert float(gram_bound((gram @ gram)[None]).sqrt()) >= largest


@pytest.mark.parametrize("level", range(1, 18))
def test_coefficients_are_the_best_ones(level: int) -> None:
    low, high = 2.0 ** (-level / 2), 1.0
    alpha, beta, gamma, error = polar.best_quintic(low, high)
    x = torch.linspace(low, high, 20001, dtype=F64)
    deviation = alpha * x + beta * x**3 + gamma * x**5 - 1
    # Chebyshev: optimal if and only if the largest error occurs four times with alternating signs.
    assert float(deviation.abs().max()) == pytest.approx(error, rel=1e-6)
    signs = torch.sign(deviation[deviation.abs() > error * (1 - 1e-4)])
    assert int((signs[1:] != signs[:-1]).sum()) == 3


def test_the_composition_brings_every_singular_value_near_one() -> None:
    y = torch.logspace(-math.log10(polar.CONDITION) / 2, 0, 20001, dtype=F64)
    for a, b, g in polar.COEFFICIENTS:
        y = a * y + b * y**3 + g * y**5
    assert float((y - 1).abs().max()) <= 3e-3


@few
@given(st.integers(2, 30), st.integers(2, 30), seeds, st.integers(1, 15))
def test_unconverged_published_steps_have_their_closed_form(
    rows: int, columns: int, seed: int, iterations: int
) -> None:
    c = 0.3
    x = normal(seed, rows, columns, dtype=F32)
    clipped = soft_spectral_clip(x, c, method="newton_schulz", iterations=iterations, dtype=F32)
    wide = x.double() if rows <= columns else x.double().mT
    gram = wide @ wide.mT
    a = 1 + float(torch.minimum(gram.abs().sum(1).max(), gram.norm())) / c**2
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    f = torch.sqrt((1 + (s / c) ** 2) / a)
    for _ in range(iterations):
        f = 1.5 * f - 0.5 * f**3
    h = s / torch.sqrt(1 + (s / c) ** 2)
    assert relative_error(clipped, (left * (h * f)) @ right) <= 1e-5 * max(1.0, a / 1e3)
    assert float((torch.linalg.svdvals(clipped.double()) - h).max()) <= 1e-4 * c


# --- what holds bit by bit, or at any conditioning --------------------------------------------------------------------


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds, scale=st.floats(0.01, 100))
def test_no_singular_value_exceeds_the_threshold(
    method: str, dtype: torch.dtype, rows: int, columns: int, seed: int, scale: float
) -> None:
    if method == "newton_schulz":
        scale = min(scale, 4.0)  # the published arithmetic overshoots by more than 7% from a = 1e3
    x = (scale * normal(seed, rows, columns)).to(dtype)
    slack = {"newton_schulz": 7e-2, "polar": 1e-2}.get(method, {F64: 1e-12, F32: 1e-4}[dtype])
    assert spectral_norm(soft_spectral_clip(x, 2.0, method=method)) <= min(2.0, spectral_norm(x)) * (1 + slack)


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds, power=st.integers(-40, 40))
def test_sign_zero_and_powers_of_two_are_exact(
    method: str, dtype: torch.dtype, rows: int, columns: int, seed: int, power: int
) -> None:
    x, t = normal(seed, rows, columns, dtype=dtype), 2.0**power
    out = soft_spectral_clip(x, 1.5, method=method)
    assert torch.equal(soft_spectral_clip(-x, 1.5, method=method), -out)
    assert torch.equal(soft_spectral_clip(t * x, t * 1.5, method=method), t * out)
    zero = torch.zeros_like(x)
    assert torch.equal(soft_spectral_clip(zero, 1.5, method=method), zero)


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds)
def test_commutes_with_transposition(method: str, dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    x = normal(seed, rows, columns, dtype=dtype)
    out, transposed = (soft_spectral_clip(y, 1.0, method=method) for y in (x, x.mT.contiguous()))
    if rows != columns:
        assert torch.equal(transposed, out.mT)
    else:
        slack = {F64: 1e-12, F32: 1e-5}[dtype] if method != "newton_schulz" else 3e-2
        assert relative_error(transposed, out.mT) <= slack * (100 if method == "exact" else 1)


@few
@given(st.integers(6, 30), st.integers(6, 30), seeds, st.integers(1, 5))
def test_rank_is_kept(rows: int, columns: int, seed: int, rank: int) -> None:
    x = (normal(seed, rows, rank) @ normal(seed + 1, rank, columns)).float()
    for method in ("exact", "polar", "auto"):
        s = torch.linalg.svdvals(soft_spectral_clip(x, spectral_norm(x) / 2, method=method).double())
        assert float(s[rank:].max()) <= 1e-6 * float(s[0])


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "polar", "auto"])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-3, 1e3, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 17), (17, 5)])
def test_any_scale_is_clipped(method: str, scale: float, shape: tuple[int, int]) -> None:
    x = normal(3, *shape, dtype=F32) * scale
    for c in (scale, 10.0):
        assert relative_error(soft_spectral_clip(x, c, method=method), svd_clip(x, c)) <= 1e-2


@all_methods
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_the_non_finite_matrix_becomes_nan(method: str, bad: float) -> None:
    x = normal(0, 3, 6, 4, dtype=F32)
    clean = soft_spectral_clip(x, 1.0, method=method)
    x[1, 2, 3] = bad
    out = soft_spectral_clip(x, 1.0, method=method)
    assert bool(out[1].isnan().all())
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@all_methods
@few
@given(seed=seeds, scales=st.lists(st.floats(-3, 5), min_size=2, max_size=5))
def test_a_matrix_does_not_depend_on_its_batch(method: str, seed: int, scales: list[float]) -> None:
    x = normal(seed, len(scales), 7, 12, dtype=F32) * torch.tensor([10.0**s for s in scales])[:, None, None]
    c = torch.linspace(0.5, 2, len(scales), dtype=F64)
    batch = soft_spectral_clip(x, c, method=method)
    for i in range(len(scales)):
        alone = soft_spectral_clip(x[i], c[i], method=method)
        assert relative_error(alone, batch[i]) <= (3e-2 if method == "newton_schulz" else 1e-5)
        if method != "newton_schulz":
            assert relative_error(batch[i], svd_clip(x[i], float(c[i]))) <= 1e-2


def test_batches_of_any_depth_and_empty_ones() -> None:
    x = normal(0, 2, 3, 5, 4)
    out = soft_spectral_clip(x, 1.0)
    assert out.shape == x.shape
    assert torch.allclose(out[1, 2], svd_clip(x[1, 2], 1.0))
    assert soft_spectral_clip(torch.zeros(0, 4, 5), 1.0).shape == (0, 4, 5)
    assert hard_spectral_clip(torch.zeros(3, 0), 1.0).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_spectral_clip(torch.ones(3), 1.0), "must be a matrix"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 0.0), "above 0"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), math.nan), "above 0"),
        (lambda: soft_spectral_clip(torch.ones(3, 3).int(), 1.0), "floating-point"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, method="svd"), "must be one of"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, method="exact", iterations=3), "no meaning"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, method="newton_schulz", iterations=0), "no meaning"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, iterations=5), "no meaning"),
        (lambda: hard_spectral_clip(torch.ones(3, 3), 1.0, method="polar"), "must be one of"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@all_methods
def test_compiles_to_one_graph_for_all_thresholds(method: str) -> None:
    backend = CountGraphs()
    clip = torch.compile(lambda x, c: soft_spectral_clip(x, c, method=method), fullgraph=True, backend=backend)
    for seed, c in enumerate((0.1, 1.0, 10.0)):
        x = normal(seed, 2, 6, 9, dtype=F32)
        clipped = clip(x, torch.tensor(c, dtype=F64))
        for i in range(2):
            assert relative_error(clipped[i], svd_clip(x[i], c)) <= (1e-2 if method != "newton_schulz" else 1.0)
    assert backend.graphs == 1
