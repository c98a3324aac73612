"""The clips against float64 singular value decompositions; numbers in names are those of docs/spectra.md, section 4.2.

| invariant | here                                         | invariant | here or in test_spectra.py                     |
|-----------|----------------------------------------------|-----------|------------------------------------------------|
| 1         | test_1_*, test_converged_1_*                 | 12        | test_12_*                                      |
| 2         | test_2_*                                     | 13        | test_13_*                                      |
| 3, 4      | test_3_*, test_4_*                           | 14 to 18  | test_spectra.py: test_14_* to test_18_*        |
| 5         | test_5_*, test_converged_5_*                 | 19        | test_19_*                                      |
| 6, 7      | test_6_*, test_7_*                           | 20        | test_spectra.py: test_20_*                     |
| 8         | test_8_*, test_converged_8_*                 | 21        | distributed: not here                          |
| 9, 10, 11 | test_9_* to test_11_*, test_converged_9_*    | 22        | test_22_*                                      |
"""

from __future__ import annotations

import math

import pytest
import torch
from compiling import CountGraphs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from epochal.optim import hard_spectral_clip, soft_spectral_clip, spectral_clip
from epochal.optim.rational import (
    fewest_poles,
    inverse,
    inverse_factor,
    inverse_root,
    largest_eigenvalue_bound,
    weighted_inverses,
)
from epochal.optim.spectral_clip import (
    RATIONAL_FROM,
    TOLERANCE,
    TOLERANCE_RATIONAL,
    best_quintic,
    gram_bound,
    schedule,
)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

side = st.integers(1, 40)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None, derandomize=True)


def truth(x: Tensor, c: float, *, hard: bool = False) -> Tensor:
    """The definition, by a float64 SVD."""
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    s = s.clamp(max=c) if hard else s / torch.sqrt(1 + (s / c) ** 2)
    return (left * s) @ right


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def with_spectrum(seed: int, rows: int, columns: int, s: Tensor) -> Tensor:
    """A float64 matrix with these singular values."""
    left, _, right = torch.linalg.svd(normal(seed, rows, columns), full_matrices=False)
    return (left * s) @ right


def conditioned(seed: int, rows: int, columns: int, a: float, c: float) -> Tensor:
    """A matrix whose largest singular value makes 1 + s^2 / c^2 = a, the others spread over two decades below."""
    s = c * math.sqrt(a - 1) * torch.logspace(0, -2, min(rows, columns), dtype=F64)
    return with_spectrum(seed, rows, columns, s)


def rel(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def norm2(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), ord=2))


def clip(x: Tensor, c: float | Tensor, method: str) -> Tensor:
    """The soft clip by a method; "rational", what auto takes on a CPU from 256 rows on, at any size."""
    return spectral_clip._rational(x, c) if method == "rational" else soft_spectral_clip(x, c, method=method)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@few
@given(side, side, seeds, st.floats(1.1, 5e3))
def test_1_agrees_with_svd(rows: int, columns: int, seed: int, a: float) -> None:
    x = conditioned(seed, rows, columns, a, 3.0)
    assert rel(soft_spectral_clip(x, 3.0, method="exact"), truth(x, 3.0)) <= 1e-10
    assert rel(soft_spectral_clip(x.float(), 3.0, method="exact"), truth(x.float(), 3.0)) <= 2e-5
    iterated = soft_spectral_clip(x.float(), 3.0, method="newton_schulz", iterations=20, dtype=F32)
    assert rel(iterated, truth(x.float(), 3.0)) <= max(2e-5, torch.finfo(F32).eps / 2 * a)  # half a rounding, times a
    assert rel(soft_spectral_clip(x, 3.0, method="newton_schulz", iterations=25, dtype=F64), truth(x, 3.0)) <= 1e-10


@few
@given(side, side, seeds, st.floats(1.1, 1e3))
def test_1_half_precision_input(rows: int, columns: int, seed: int, a: float) -> None:
    x = conditioned(seed, rows, columns, a, 3.0)
    for dtype, tolerance in ((F16, 5e-3), (BF16, 3e-2)):
        for method in ("exact", "auto"):
            out = soft_spectral_clip(x.to(dtype), 3.0, method=method)
            assert out.dtype == dtype
            assert rel(out, truth(x.to(dtype), 3.0)) <= tolerance


@few
@given(side, side, seeds, st.floats(0.02, 4))
def test_minimax_within_one_percent_and_below_the_threshold(rows: int, columns: int, seed: int, decades: float) -> None:
    x = conditioned(seed, rows, columns, 1 + 10**decades, 10.0).float()
    for method in ("minimax", "auto", "rational"):
        out = clip(x, 10.0, method)
        assert rel(out, truth(x, 10.0)) <= 1e-2
        assert norm2(out) <= 10.0 * (1 + (1e-2 if method == "rational" else 1e-4))


@pytest.mark.parametrize("method", ["exact", "auto"])
@pytest.mark.parametrize("decades", [4, 5, 6, 7, 9, 12, 18])
def test_exact_and_auto_change_arithmetic_in_time(method: str, decades: int) -> None:
    """Up to the conditions where every cheaper arithmetic has lost the small singular values."""
    s = 10.0 * torch.logspace(decades / 2, decades / 2 - 4, 24, dtype=F64)
    for dtype in (F64, F32):
        x = with_spectrum(decades, 24, 40, s).to(dtype)
        assert rel(soft_spectral_clip(x, 10.0, method=method), truth(x, 10.0)) <= (1e-2 if method == "auto" else 2e-5)
        assert norm2(soft_spectral_clip(x, 10.0, method=method)) <= 10.0 * (1 + 1e-4)
    # In float64 each direction by itself, the ones far below c and 1e-9 of the largest too.
    s = torch.tensor([1e5, 1e2, 1.0, 1e-2, 1e-4], dtype=F64)
    left, _, right = torch.linalg.svd(normal(decades, 5, 9), full_matrices=False)
    got = (left.mT @ soft_spectral_clip((left * s) @ right, 0.1, method="exact") @ right.mT).diagonal()
    assert torch.allclose(got, s / torch.sqrt(1 + (s / 0.1) ** 2), rtol=1e-6, atol=1e-10)


@few
@given(side, side, seeds, st.floats(0.02, 4))
def test_13_minimax_moves_no_singular_value_by_more_than_designed(
    rows: int, columns: int, seed: int, decades: float
) -> None:
    x = conditioned(seed, rows, columns, 1 + 10**decades, 1.0)
    s = torch.linalg.svdvals(x)
    got = torch.linalg.svdvals(soft_spectral_clip(x, 1.0, method="minimax"))
    ratio = got / (s / torch.sqrt(1 + s * s))
    assert float(ratio.max()) <= 1 + 1e-9
    assert float(ratio.min()) >= 1 - TOLERANCE - 1e-9


@few
@given(side, side, seeds, st.floats(0.02, 4.9))
@example(1, 7, 0, 4.0)  # of one row the bound is exact, so that this is the largest error that the poles for 1e4 leave
def test_13_rational_moves_no_singular_value_by_more_than_designed(
    rows: int, columns: int, seed: int, decades: float
) -> None:
    x = conditioned(seed, rows, columns, 1 + 10**decades, 1.0).float()
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    ratio = (left.mT @ clip(x, 1.0, "rational").double() @ right.mT).diagonal() / (s / torch.sqrt(1 + s * s))
    rounding = 2e-6 * 10 ** (decades / 2) + 1e-6
    assert float(ratio.max()) <= 1 + TOLERANCE_RATIONAL + rounding
    assert float(ratio.min()) >= 1 - TOLERANCE_RATIONAL - rounding


@pytest.mark.parametrize("a", [1.0, 1.001, 3.0, 400.0, 2e4, 1e5])
@pytest.mark.parametrize("poles", [1, 2, 3, 4])
def test_rational_approximation_is_the_best_one(a: float, poles: int) -> None:
    weight, residues, negative_poles, error = inverse_root(a, poles)
    x = torch.logspace(0, math.log10(a), 20001, dtype=F64)
    r = sum((residue / (x + p) for residue, p in zip(residues, negative_poles, strict=True)), torch.ones_like(x))
    y = weight * r * x.sqrt()
    assert float(y.max() - 1) == pytest.approx(error, rel=1e-3, abs=1e-12)
    assert float(1 - y.min()) == pytest.approx(error, rel=1e-3, abs=1e-12)
    if error > 1e-9:
        # Chebyshev: 2 k + 1 parameters, so the best when 2 k + 2 extremes of the error alternate.
        signs = torch.sign((y - 1)[(y - 1).abs() > error * (1 - 1e-3)])
        assert int((signs[1:] != signs[:-1]).sum()) == 2 * poles + 1
    best = fewest_poles(a, 5e-3)
    assert best.error <= 5e-3
    assert len(best.poles) == 1 or inverse_root(a, len(best.poles) - 1).error > 5e-3


@pytest.mark.parametrize("m", [1, 7, 128, 129, 301, 520])
def test_inverse_by_halves(m: int) -> None:
    q = torch.linalg.qr(normal(m, m, m)).Q
    a = (q * torch.logspace(0, -3, m, dtype=F64)) @ q.mT
    assert rel(inverse(a.float()), torch.linalg.inv(a.float().double())) <= 1e-4
    factor = inverse_factor(a.float()).double()
    assert torch.equal(factor, factor.tril())
    assert rel(factor.mT @ factor, torch.linalg.inv(a.float().double())) <= 1e-4
    for function in (inverse, inverse_factor):
        with pytest.raises(torch.linalg.LinAlgError):
            function(a.float() - 2 * torch.eye(m))


@pytest.mark.parametrize("shifts", [[1e-3, 0.5], [5e-4, 8e-4, 1e-3], [0.3, 0.02, 2.0]])
@pytest.mark.parametrize("m", [1, 2, 5, 301])
def test_weighted_inverses(m: int, shifts: list[float]) -> None:
    """Small shifts, large ones and both; a matrix of little rank, the hardest for an inverse by halves."""
    x = normal(m, m, 40)
    a = x @ x.mT
    a /= norm2(a)
    weights = [1.0 + i for i in range(len(shifts))]
    want = sum(w * torch.linalg.inv(a + s * torch.eye(m)) for s, w in zip(shifts, weights, strict=True))
    got = weighted_inverses(a.float(), shifts, weights, 1.0)
    assert norm2(got.double() - want) <= 2e-3 * norm2(want)


@few
@given(side, seeds, st.booleans())
def test_13_bound_from_two_moments_is_never_below(m: int, seed: int, spiky: bool) -> None:
    x = normal(seed, m, 1 if spiky else 2 * m)
    gram = x @ x.mT
    bound, largest = largest_eigenvalue_bound(gram), norm2(gram)
    assert largest * (1 - 1e-12) <= bound <= math.sqrt(m) * largest * (1 + 1e-12)


@pytest.mark.parametrize("a", [2e3, 9e4])
@pytest.mark.parametrize("shape", [(RATIONAL_FROM + 44, 450), (450, RATIONAL_FROM)])
def test_auto_on_a_matrix_of_many_rows(shape: tuple[int, int], a: float) -> None:
    """Half of the singular values at the top, where the bound is at its loosest; also flat ones."""
    small = min(shape)
    for s in (torch.logspace(0, -3, small, dtype=F64), (torch.arange(small) % 2 + 0.01).double()):
        x = with_spectrum(small, *shape, 10 * math.sqrt(a - 1) * s / s.max()).float()
        out = soft_spectral_clip(x, 10.0)
        assert rel(out, truth(x, 10.0)) <= 1e-2
        assert norm2(out) <= 10.0 * (1 + 1e-2)
        assert torch.equal(soft_spectral_clip(x.mT.contiguous(), 10.0), out.mT)


@few
@given(side, side, seeds, st.sampled_from([F64, F32, F16]))
def test_13_bound_is_never_below(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    rows, columns = sorted((rows, columns))
    for x in (normal(seed, rows, columns), normal(seed, rows, 1) @ normal(seed + 1, 1, columns)):
        x = (x / x.abs().max() / math.sqrt(columns)).to(dtype)
        gram = x @ x.mT
        largest = float(torch.linalg.eigvalsh(gram.double())[-1])
        slack = 1 - 8 * torch.finfo(dtype).eps
        assert float(gram_bound(gram[None])) >= largest * slack
        assert float(gram_bound(gram[None], (gram @ gram)[None])) >= largest * slack


@pytest.mark.parametrize("level", range(1, 21))
def test_schedule_is_the_minimax_one(level: int) -> None:
    low, high = 2.0 ** (-level / 2), 1.0
    alpha, beta, gamma, error = best_quintic(low, high)
    x = torch.linspace(low, high, 20001, dtype=F64)
    deviation = alpha * x + beta * x**3 + gamma * x**5 - 1
    # Chebyshev: optimal when the largest error is met four times with alternating signs.
    assert float(deviation.abs().max()) == pytest.approx(error, rel=1e-6)
    signs = torch.sign(deviation[deviation.abs() > error * (1 - 1e-4)])
    assert int((signs[1:] != signs[:-1]).sum()) == 3
    y = x.clone()
    for a, b, g in schedule(level, None):
        y = a * y + b * y**3 + g * y**5
    assert float(y.max()) <= 1 + 1e-12
    assert float(y.min()) >= 1 - TOLERANCE


@few
@given(st.integers(2, 30), st.integers(2, 30), seeds, st.integers(1, 15))
def test_12_unconverged_iteration_has_its_closed_form(rows: int, columns: int, seed: int, iterations: int) -> None:
    c = 0.3
    x = normal(seed, rows, columns, dtype=F32)
    got = soft_spectral_clip(x, c, method="newton_schulz", iterations=iterations, dtype=F32)
    wide = x.double() if rows <= columns else x.double().mT
    gram = wide @ wide.mT
    a = 1 + float(torch.minimum(gram.abs().sum(1).max(), gram.norm())) / c**2
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    f = torch.sqrt((1 + (s / c) ** 2) / a)
    for _ in range(iterations):
        f = 1.5 * f - 0.5 * f**3
    h = s / torch.sqrt(1 + (s / c) ** 2)
    assert rel(got, (left * (h * f)) @ right) <= 1e-5 * max(1.0, a / 1e3)
    assert float((torch.linalg.svdvals(got.double()) - h).max()) <= 1e-4 * c


# --- invariants -------------------------------------------------------------------------------------------------------

ARITHMETICS = [
    ("exact", F64),
    ("exact", F32),
    ("minimax", F64),
    ("minimax", F32),
    ("auto", F32),
    ("rational", F32),
    ("newton_schulz", F32),
]
arithmetics = pytest.mark.parametrize(("method", "dtype"), ARITHMETICS)


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds, scale=st.floats(0.01, 100))
def test_2_ceiling(method: str, dtype: torch.dtype, rows: int, columns: int, seed: int, scale: float) -> None:
    if method == "newton_schulz":
        scale = min(scale, 4.0)  # the published arithmetic holds 7% up to a = 1e3 only
    x = (scale * normal(seed, rows, columns)).to(dtype)
    slack = {"newton_schulz": 7e-2, "rational": 1e-2}.get(method, {F64: 1e-12, F32: 1e-4}[dtype])
    assert norm2(clip(x, 2.0, method)) <= min(2.0, norm2(x)) * (1 + slack)


@few
@given(side, side, seeds, st.sampled_from([(F16, 1e-2), (BF16, 7e-2)]))
def test_2_ceiling_half(rows: int, columns: int, seed: int, kind: tuple[torch.dtype, float]) -> None:
    x = (5 * normal(seed, rows, columns)).to(kind[0])
    assert norm2(soft_spectral_clip(x, 2.0)) <= min(2.0, norm2(x)) * (1 + kind[1])


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds)
def test_3_odd_and_zero(method: str, dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    x = normal(seed, rows, columns, dtype=dtype)
    assert torch.equal(clip(-x, 1.0, method), -clip(x, 1.0, method))
    zero = clip(torch.zeros_like(x), 1.0, method)
    assert torch.equal(zero, torch.zeros_like(x))


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds)
def test_4_transpose(method: str, dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    x = normal(seed, rows, columns, dtype=dtype)
    out, turned = (
        clip(x, 1.0, method),
        clip(x.mT.contiguous(), 1.0, method),
    )
    if rows != columns:
        assert torch.equal(turned, out.mT)
    else:
        slack = {F64: 1e-12, F32: 1e-5}[dtype] if method != "newton_schulz" else 3e-2
        assert rel(turned, out.mT) <= slack * (100 if method == "exact" else 1)


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds)
def test_5_orthogonal_equivariance(method: str, dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    if method in ("minimax", "newton_schulz"):
        return  # the bound, and with it the designed error, is not invariant: test_13 says how far that goes
    x = normal(seed, rows, columns)
    q = torch.linalg.qr(normal(seed + 1, rows, rows))[0]
    r = torch.linalg.qr(normal(seed + 2, columns, columns))[0]
    whole = clip((q @ x @ r).to(dtype), 1.0, method)
    parts = q @ clip(x.to(dtype), 1.0, method).double() @ r
    assert rel(whole, parts) <= {F64: 1e-10, F32: 1e-5}[dtype]


@arithmetics
@few
@given(rows=side, columns=side, seed=seeds, power=st.integers(-40, 40))
def test_6_scaling_by_powers_of_two_is_exact(
    method: str, dtype: torch.dtype, rows: int, columns: int, seed: int, power: int
) -> None:
    x, t = normal(seed, rows, columns, dtype=dtype), 2.0**power
    assert torch.equal(clip(t * x, t * 1.5, method), t * clip(x, 1.5, method))


@few
@given(side, side, seeds, st.floats(0.1, 10))
def test_7_soft_is_sandwiched_by_hard(rows: int, columns: int, seed: int, c: float) -> None:
    x = normal(seed, rows, columns)
    soft, hard = soft_spectral_clip(x, c, method="exact"), hard_spectral_clip(x, c)
    s, h = torch.linalg.svdvals(x).clamp(max=c), torch.linalg.svdvals(soft)
    assert bool((h <= s + 1e-10).all()) and bool((h >= s / math.sqrt(2) - 1e-10).all())
    assert float((soft - hard).norm()) <= 0.293 * c * math.sqrt(min(rows, columns)) + 1e-10


@few
@given(side, side, seeds, st.sampled_from([(F64, 1e-10), (F32, 1e-4)]), st.booleans())
def test_8_firm_contraction(rows: int, columns: int, seed: int, kind: tuple[torch.dtype, float], near: bool) -> None:
    dtype, slack = kind
    x = normal(seed, rows, columns, dtype=dtype)
    y = x + (1e-2 if near else 1.0) * normal(seed + 1, rows, columns, dtype=dtype)
    hx, hy = (soft_spectral_clip(v, 1.0, method="exact").double() for v in (x, y))
    moved, apart = hx - hy, (x - y).double()
    assert float(moved.norm()) <= float(apart.norm()) * (1 + slack)
    assert float((moved * apart).sum()) >= float(moved.norm() ** 2) * (1 - slack) - slack * float(apart.norm() ** 2)


@few
@given(side, side, seeds, st.floats(0.3, 3), st.floats(0.3, 3))
def test_9_semigroup(rows: int, columns: int, seed: int, a: float, b: float) -> None:
    d = 1 / math.sqrt(1 / a**2 + 1 / b**2)
    for dtype, tolerance in ((F64, 1e-12), (F32, 1e-5)):
        x = normal(seed, rows, columns, dtype=dtype)
        twice = soft_spectral_clip(soft_spectral_clip(x, b, method="exact"), a, method="exact")
        assert rel(twice, soft_spectral_clip(x, d, method="exact")) <= tolerance


@few
@given(side, side, seeds)
def test_10_inverse(rows: int, columns: int, seed: int) -> None:
    x = normal(seed, rows, columns)
    c = norm2(x) / 9
    h = soft_spectral_clip(x, c, method="exact")
    left, s, right = torch.linalg.svd(h, full_matrices=False)
    assert rel((left * (s / torch.sqrt(1 - (s / c) ** 2))) @ right, x) <= 1e-8


@few
@given(side, side, seeds)
def test_11_limits(rows: int, columns: int, seed: int) -> None:
    s = torch.linspace(1, 3, min(rows, columns), dtype=F64)
    x = with_spectrum(seed, rows, columns, s)
    assert rel(soft_spectral_clip(x, 3e4, method="exact"), x) <= 5.1e-9
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    small = soft_spectral_clip(x, 1e-4, method="exact")
    assert norm2(small - 1e-4 * left @ right) <= 1e-8 * 1e-4


@few
@given(st.integers(2, 30), st.integers(2, 30), seeds)
def test_19_spikes_leave_the_signal(rows: int, columns: int, seed: int) -> None:
    g = normal(seed, rows, columns)
    c = norm2(g)
    u, v = normal(seed + 1, rows, 1), normal(seed + 2, 1, columns)
    spike = 50 * c * u @ v / (u.norm() * v.norm())
    for clip in (hard_spectral_clip, soft_spectral_clip):
        bound = min(c, 50 * c + c) ** 2 + float(g.norm() ** 2)
        assert float(clip(g + spike, c).norm() ** 2) <= bound + 1e-9 * bound


def test_19_signal_kept_on_average() -> None:
    g = normal(0, 96, 128)
    c = norm2(g)
    for seed in range(5):
        u, v = normal(seed + 1, 96, 1), normal(seed + 100, 1, 128)
        noisy = g + 50 * c * u @ v / (u.norm() * v.norm())
        for clip in (hard_spectral_clip, soft_spectral_clip):
            assert float((g * clip(noisy, c)).sum() / g.norm() ** 2) >= 1 / 3


@few
@given(st.integers(6, 30), st.integers(6, 30), seeds, st.integers(1, 5))
def test_22_rank_is_kept(rows: int, columns: int, seed: int, rank: int) -> None:
    x = (normal(seed, rows, rank) @ normal(seed + 1, rank, columns)).float()
    for method in ("exact", "minimax", "auto", "rational"):
        s = torch.linalg.svdvals(clip(x, norm2(x) / 2, method).double())
        assert float(s[rank:].max()) <= 1e-6 * float(s[0])


# --- the invariants that need an exact operator, for the iterations run to convergence --------------------------------

CONVERGED = {"minimax": {"iterations": 10}, "newton_schulz": {"iterations": 40}}
converged = pytest.mark.parametrize("method", CONVERGED)


def run_out(x: Tensor, c: float, method: str) -> Tensor:
    """The clip by an iteration that has converged, in the arithmetic of x."""
    return soft_spectral_clip(x, c, method=method, dtype=x.dtype, **CONVERGED[method])


@converged
@few
@given(rows=side, columns=side, seed=seeds, a=st.floats(1.1, 5e3))
def test_converged_1_agrees_with_svd(method: str, rows: int, columns: int, seed: int, a: float) -> None:
    x = conditioned(seed, rows, columns, a, 3.0)
    assert rel(run_out(x, 3.0, method), truth(x, 3.0)) <= 1e-10
    assert rel(run_out(x.float(), 3.0, method), truth(x.float(), 3.0)) <= 2e-5 * max(1.0, a / 1e3)


@converged
@few
@given(rows=side, columns=side, seed=seeds)
def test_converged_5_orthogonal_equivariance(method: str, rows: int, columns: int, seed: int) -> None:
    x = normal(seed, rows, columns)
    q = torch.linalg.qr(normal(seed + 1, rows, rows))[0]
    r = torch.linalg.qr(normal(seed + 2, columns, columns))[0]
    for dtype, tolerance in ((F64, 1e-10), (F32, 1e-5)):
        whole = run_out((q @ x @ r).to(dtype), 1.0, method)
        assert rel(whole, q @ run_out(x.to(dtype), 1.0, method).double() @ r) <= tolerance


@pytest.mark.parametrize("dtype", [F16, BF16])
@few
@given(rows=side, columns=side, seed=seeds)
def test_4_and_5_in_half_precision(dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    x = normal(seed, rows, columns)
    q = torch.linalg.qr(normal(seed + 1, rows, rows))[0]
    half = x.to(dtype)
    out = soft_spectral_clip(half, 1.0)
    assert rel(soft_spectral_clip(half.mT.contiguous(), 1.0), out.mT) <= 1e-2
    turned = soft_spectral_clip((q @ half.double()).to(dtype), 1.0)
    assert rel(turned, q @ out.double()) <= 2e-2


@converged
@few
@given(rows=side, columns=side, seed=seeds, near=st.booleans())
def test_converged_8_firm_contraction(method: str, rows: int, columns: int, seed: int, near: bool) -> None:
    for dtype, slack in ((F64, 1e-10), (F32, 1e-4)):
        x = normal(seed, rows, columns, dtype=dtype)
        y = x + (1e-2 if near else 1.0) * normal(seed + 1, rows, columns, dtype=dtype)
        hx, hy = (run_out(v, 1.0, method).double() for v in (x, y))
        moved, apart = hx - hy, (x - y).double()
        assert float(moved.norm()) <= float(apart.norm()) * (1 + slack)
        assert float((moved * apart).sum()) >= float(moved.norm() ** 2) * (1 - slack) - slack * float(apart.norm() ** 2)


@converged
@few
@given(rows=side, columns=side, seed=seeds, a=st.floats(0.3, 3), b=st.floats(0.3, 3))
def test_converged_9_to_11(method: str, rows: int, columns: int, seed: int, a: float, b: float) -> None:
    d = 1 / math.sqrt(1 / a**2 + 1 / b**2)
    for dtype, tolerance in ((F64, 1e-11), (F32, 1e-5)):
        x = normal(seed, rows, columns, dtype=dtype)
        assert rel(run_out(run_out(x, b, method), a, method), run_out(x, d, method)) <= tolerance
    x = normal(seed, rows, columns)
    c = norm2(x) / 9
    left, s, right = torch.linalg.svd(run_out(x, c, method), full_matrices=False)
    assert rel((left * (s / torch.sqrt(1 - (s / c) ** 2))) @ right, x) <= 1e-8
    assert rel(run_out(x, 1e4 * norm2(x), method), x) <= 5.1e-9


# --- hard -------------------------------------------------------------------------------------------------------------


@few
@given(side, side, seeds, st.floats(0.1, 10))
def test_hard_agrees_with_svd(rows: int, columns: int, seed: int, c: float) -> None:
    x = normal(seed, rows, columns)
    assert rel(hard_spectral_clip(x, c), truth(x, c, hard=True)) <= 1e-10
    assert rel(hard_spectral_clip(x.float(), c), truth(x.float(), c, hard=True)) <= 2e-5
    assert norm2(hard_spectral_clip(x, c)) <= c * (1 + 1e-12)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "minimax", "auto", "rational"])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-3, 1e3, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 17), (17, 5)])
def test_any_scale(method: str, scale: float, shape: tuple[int, int]) -> None:
    x = normal(3, *shape, dtype=F32) * scale
    for c in (scale, 10.0):
        assert rel(clip(x, c, method), truth(x, c)) <= 1e-2


@pytest.mark.parametrize("method", ["exact", "minimax", "auto", "rational", "newton_schulz"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_matrix_is_nan_alone(method: str, bad: float) -> None:
    x = normal(0, 3, 6, 4, dtype=F32)
    clean = clip(x, 1.0, method)
    x[1, 2, 3] = bad
    out = clip(x, 1.0, method)
    assert bool(out[1].isnan().all())
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("method", ["exact", "minimax", "auto", "rational", "newton_schulz"])
@few
@given(seed=seeds, scales=st.lists(st.floats(-3, 5), min_size=2, max_size=5))
def test_a_matrix_does_not_depend_on_its_batch(method: str, seed: int, scales: list[float]) -> None:
    x = normal(seed, len(scales), 7, 12, dtype=F32) * torch.tensor([10.0**s for s in scales])[:, None, None]
    c = torch.linspace(0.5, 2, len(scales), dtype=F64)
    whole = clip(x, c, method)
    for i in range(len(scales)):
        assert rel(clip(x[i], c[i], method), whole[i]) <= (3e-2 if method == "newton_schulz" else 1e-5)
        if method != "newton_schulz":
            assert rel(whole[i], truth(x[i], float(c[i]))) <= 1e-2


def test_batches_of_any_depth_and_empty() -> None:
    x = normal(0, 2, 3, 5, 4)
    out = soft_spectral_clip(x, 1.0)
    assert out.shape == x.shape
    assert torch.allclose(out[1, 2], truth(x[1, 2], 1.0))
    assert soft_spectral_clip(torch.zeros(0, 4, 5), 1.0).shape == (0, 4, 5)
    assert hard_spectral_clip(torch.zeros(3, 0), 1.0).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_spectral_clip(torch.ones(3), 1.0), "no singular values"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 0.0), "above 0"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), math.nan), "above 0"),
        (lambda: soft_spectral_clip(torch.ones(3, 3).int(), 1.0), "floating-point"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, method="svd"), "not offered"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, method="exact", iterations=3), "no meaning"),
        (lambda: soft_spectral_clip(torch.ones(3, 3), 1.0, iterations=0), "no meaning"),
        (lambda: hard_spectral_clip(torch.ones(3, 3), 1.0, method="minimax"), "not offered"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method", ["auto", "minimax", "newton_schulz", "exact"])
def test_compiles_whole_and_once(method: str) -> None:
    backend = CountGraphs()
    clip = torch.compile(lambda x, c: soft_spectral_clip(x, c, method=method), fullgraph=True, backend=backend)
    for seed, c in enumerate((0.1, 1.0, 10.0)):
        x = normal(seed, 2, 6, 9, dtype=F32)
        got = clip(x, torch.tensor(c, dtype=F64))
        for i in range(2):
            tolerance = 1e-2 if method != "newton_schulz" else 1.0
            assert rel(got[i], truth(x[i], c)) <= tolerance
    assert backend.graphs == 1
