"""Invariants of docs/fira.md, section 4; hypothesis draws shapes, ranks and signs.

The number in the comment at each test is that of the section; test_fira.py has those that need the published package
or only the class around the update.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fira_oracle import Oracle, difference, drive, movement, numpy_basis, spread_gradients, start
from hypothesis import given, settings
from hypothesis import strategies as st

import epochal.optim.fira as fira_module
from epochal.optim.fira import Fira
from epochal.optim.projection import compute_basis, projected_side, rotate_moments

METHODS = ("svd", "gram", "subspace")
DIM = st.integers(2, 24)
few = settings(max_examples=12, deadline=None, derandomize=True)
many = settings(max_examples=30, deadline=None, derandomize=True)


def fira(p, rank, alpha=0.25, gap=10**6, proj_type="std", **options):
    keys = {"rank": rank, "update_proj_gap": gap, "alpha": alpha, "proj_type": proj_type}
    return Fira([{"params": [p], **keys}], **{"lr": 1e-2, **options})


class Injected:
    """Context in which `source(grad, rank, side)` computes every basis; hypothesis forbids monkeypatch."""

    def __init__(self, source):
        self.source = source

    def __enter__(self):
        self.saved = fira_module.compute_basis
        fira_module.compute_basis = lambda grad, rank, side, **_: self.source(grad, rank, side)

    def __exit__(self, *_):
        fira_module.compute_basis = self.saved


def from_numpy(grad, rank, side):
    return torch.tensor(np.ascontiguousarray(numpy_basis(grad.double(), rank, side)), dtype=grad.dtype)


# --- the step itself -----------------------------------------------------------------------------------------------


@many
@given(
    m=DIM,
    n=DIM,
    rank=st.integers(1, 8),
    alpha=st.sampled_from([0.0625, 0.25, 1.0]),
    variant=st.sampled_from(["code", "paper", "galore"]),
    scaling=st.sampled_from(["column", "matrix"]),
    correct_bias=st.booleans(),
    proj_type=st.sampled_from(["std", "reverse_std"]),
    seed=st.integers(0, 99),
)
def test_the_step_equals_the_oracle_that_forms_the_residual(
    m, n, rank, alpha, variant, scaling, correct_bias, proj_type, seed
):  # invariant 19
    rank = min(rank, m, n)
    side = projected_side((m, n), proj_type)
    gradients = spread_gradients((m, n), 6, seed=seed)
    p = start((m, n), scale=0.0)
    options = {"variant": variant, "scaling": scaling, "correct_bias": correct_bias}
    optimizer = fira(p, rank, alpha, proj_type=proj_type, **options)
    oracle = Oracle(side, alpha=alpha, lr=1e-2, correct_bias=correct_bias)
    w = np.zeros((m, n))
    condition = 0.0
    with Injected(from_numpy):
        for g in gradients:
            drive(optimizer, p, [g])
            basis = optimizer.state[p]["basis"].numpy()
            w = w - oracle.step(g.double(), basis, variant, scaling)
            # phi_i divides by ||R_i||, whose rounding error is relative to ||G_i||.
            rounded = np.linalg.norm(g.double().numpy(), axis=oracle.axis) / oracle.low_norms
            condition = max(condition, 2**-24 * rounded.max())
            moved = np.abs(w).max()
            held = np.linalg.norm(oracle.residual) ** 2 / max(np.linalg.norm(g.numpy()) ** 2, 1e-30)
            if held < 1e-2 and variant != "galore":
                return  # the residual is mostly rounding noise, so its norm cannot be compared
            assert np.abs(p.detach().double().numpy() - w).max() <= max(2e-6, condition) * moved
            if variant != "galore":
                assert optimizer.state[p]["limiter"].item() == pytest.approx(oracle.s, rel=1e-4)


@many
@given(m=DIM, n=DIM, rank=st.integers(1, 6), alpha=st.sampled_from([0.25, 1.0]), half=st.booleans())
def test_the_residual_is_orthogonal_to_the_subspace(m, n, rank, alpha, half):  # invariant 3
    rank = min(rank, m, n)
    side = projected_side((m, n), "std")
    dtype = torch.bfloat16 if half else torch.float32
    p = start((m, n), scale=0.0, dtype=dtype)
    optimizer = fira(p, rank, alpha, lr=1.0, correct_bias=False)
    g = spread_gradients((m, n), 1)[0].to(dtype)
    drive(optimizer, p, [g])
    state = {name: value.double() for name, value in optimizer.state[p].items()}
    basis = state["basis"] if side == "left" else state["basis"].mT
    turned = g.double() if side == "left" else g.double().mT
    update = -(p.detach().double() if side == "left" else p.detach().double().mT)
    direction = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6)
    direction = direction if side == "left" else direction.mT
    low = basis.mT @ turned
    phi = direction.norm(dim=0) / (low.norm(dim=0) + 1e-8)
    # P^T S = (1 - alpha) phi R, which is zero at alpha = 1.
    inside = basis.mT @ update - alpha * direction
    wanted = (1 - alpha) * phi * low
    tolerance = 5e-3 if half else 2e-6
    assert (inside - wanted).norm() <= tolerance * update.norm()


@few
@given(m=st.integers(3, 16), n=st.integers(3, 16), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_full_rank_equals_adam_in_rotated_coordinates(m, n, dtype):  # invariant 5
    gradients = spread_gradients((m, n), 12, dtype=dtype)
    p, q = start((m, n), dtype=dtype), start((m, n), dtype=dtype)
    path = drive(fira(p, min(m, n), 1.0, eps=0.0, gamma=None), p, gradients)
    side = projected_side((m, n), "std")
    basis = torch.tensor(np.ascontiguousarray(numpy_basis(gradients[0].double(), min(m, n), side)))
    turn = basis if side == "left" else basis.mT  # square: every row or column is in the subspace
    turned = torch.nn.Parameter((turn.mT @ q.double() if side == "left" else q.double() @ turn).detach())
    adam = torch.optim.AdamW([turned], lr=1e-2, eps=1e-30, weight_decay=0.0)
    other = []
    for g in gradients:
        turned.grad = turn.mT @ g.double() if side == "left" else g.double() @ turn
        adam.step()
        other.append((turn @ turned if side == "left" else turned @ turn.mT).detach())
    assert difference(path, other) <= 5e-6 * movement(other, q.detach())


def test_vectors_without_eps_equal_torchs_adamw():  # invariant 18
    for dtype in (torch.float32, torch.float64):
        p, q, w = (start((13,), dtype=dtype) for _ in range(3))
        gradients = spread_gradients((13,), 30, dtype=dtype)
        path = drive(Fira([p], lr=1e-2, eps=0.0), p, gradients)
        other = drive(torch.optim.AdamW([q], lr=1e-2, eps=1e-30, weight_decay=0.0), q, gradients)
        assert difference(path, other) <= 1e-6 * movement(other, w.detach())


@few
@given(m=DIM, n=DIM, matrix=st.booleans())
def test_decay_shrinks_the_updated_weight(m, n, matrix):  # invariant 17
    g = spread_gradients((m, n), 1)[0]
    plain, decayed = start((m, n), scale=1.0), start((m, n), scale=1.0)
    for p, decay in ((plain, 0.0), (decayed, 0.3)):
        optimizer = fira(p, 2, weight_decay=decay) if matrix else Fira([p], lr=1e-2, weight_decay=decay)
        drive(optimizer, p, [g])
    expected = plain.double() * (1 - 1e-2 * 0.3)
    largest = max(1.0, plain.abs().max().item())
    # Three roundings: of the plain weight, of its decayed value, and of the difference.
    assert (decayed.double() - expected).abs().max() <= 3 * 2**-24 * largest


@few
@given(seed=st.integers(0, 99), m=DIM, n=DIM)
def test_variants_agree_at_alpha_one_without_bias_correction(seed, m, n):
    gradients = spread_gradients((m, n), 8, seed=seed, dtype=torch.float64)
    p, q = start((m, n), dtype=torch.float64), start((m, n), dtype=torch.float64)
    code = drive(fira(p, 2, 1.0, correct_bias=False), p, gradients)
    paper = drive(fira(q, 2, 1.0, correct_bias=False, variant="paper"), q, gradients)
    assert difference(code, paper) <= 1e-11 * movement(code, torch.zeros(()))


def test_the_direction_is_bounded():  # invariant 12
    for seed, eps in ((0, 0.0), (1, 1e-6), (2, 0.0)):
        p = start((6, 9), scale=0.0)
        optimizer = fira(p, 3, eps=eps)
        rng = np.random.default_rng(seed)
        largest = 0.0
        for t in range(60):
            g = torch.tensor(rng.standard_normal((6, 9)) * 10.0 ** (rng.uniform(-3, 3) if t else 0))
            drive(optimizer, p, [g.float()])
            state = optimizer.state[p]
            largest = max(largest, (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + max(eps, 1e-30))).abs().max())
        assert largest <= 7.28


@pytest.mark.parametrize("variant", ["code", "paper", "galore"])
def test_zero_gradients_without_eps_move_nothing(variant):
    p, v = start((6, 9)), start((5,))
    optimizer = Fira([{"params": [p], "rank": 3, "alpha": 0.25}, {"params": [v]}], eps=0.0, variant=variant)
    for _ in range(3):
        p.grad, v.grad = torch.zeros(6, 9), torch.zeros(5)
        optimizer.step()
    assert torch.equal(p, start((6, 9))) and torch.equal(v, start((5,)))


# --- limiter -------------------------------------------------------------------------------------------------------


@few
@given(m=DIM, n=DIM, spike=st.integers(1, 18), mode=st.sampled_from(["zero_safe", "compat"]))
def test_the_residual_grows_by_at_most_one_percent_per_step(m, n, spike, mode):  # invariant 6
    gradients = spread_gradients((m, n), 20)
    gradients[spike] = gradients[spike] * 100
    rank = max(1, min(m, n) // 2)
    p = start((m, n))
    optimizer = fira(p, rank, limiter=mode)
    last = None
    oracle = Oracle(projected_side((m, n), "std"), alpha=0.25, lr=1e-2)
    for g in gradients:
        drive(optimizer, p, [g])
        now = optimizer.state[p]["limiter"].item()
        oracle.step(g.double(), optimizer.state[p]["basis"].numpy())
        if last is not None:
            assert now <= 1.01 * (last + 1e-8) * (1 + 1e-6)
            if oracle.raw_norm <= 1.009 * last:
                assert now == pytest.approx(oracle.raw_norm, rel=1e-4)
        assert now <= oracle.raw_norm * (1 + 1e-4)
        last = now


@pytest.mark.parametrize("mode", ["compat", "zero_safe"])
def test_a_zero_gradient_at_the_start_throttles_only_the_compat_limiter(mode):  # invariant 7
    rng = np.random.default_rng(0)
    p = start((6, 10), scale=0.0)
    optimizer = fira(p, 2, lr=1e-3, limiter=mode)
    drive(optimizer, p, [torch.zeros(6, 10)])
    steps = 0
    while optimizer.state[p]["limiter"] <= 1 and steps < 1500:
        drive(optimizer, p, [torch.tensor(rng.standard_normal((6, 10)), dtype=torch.float32)])
        steps += 1
    assert steps in (range(1386, 1391) if mode == "compat" else (1,))


def test_a_later_zero_residual_is_ignored_by_the_zero_safe_limiter():
    gradients = spread_gradients((6, 10), 4)
    values = {}
    for mode in ("zero_safe", "compat"):
        p = start((6, 10))
        optimizer = fira(p, 2, limiter=mode)
        values[mode] = []
        for g in [*gradients[:2], torch.zeros(6, 10), *gradients[2:]]:
            drive(optimizer, p, [g])
            values[mode].append(optimizer.state[p]["limiter"].item())
    assert values["zero_safe"][2] == values["zero_safe"][1] > 0
    assert values["compat"][2] == 0
    assert values["compat"][4] < 1e-7 < 0.5 * values["zero_safe"][1] < values["zero_safe"][4]


# --- symmetries ----------------------------------------------------------------------------------------------------


@many
@given(m=DIM, n=DIM, rank=st.integers(1, 6), signs=st.integers(0, 63), seed=st.integers(0, 9))
def test_signs_of_the_basis_do_not_matter(m, n, rank, signs, seed):  # invariant 8
    rank = min(rank, m, n)
    flip = torch.tensor([1.0 if signs >> i & 1 else -1.0 for i in range(rank)], dtype=torch.float64)
    gradients = spread_gradients((m, n), 6, seed=seed, dtype=torch.float64)
    p, q = start((m, n), dtype=torch.float64), start((m, n), dtype=torch.float64)
    with Injected(from_numpy):
        path = drive(fira(p, rank), p, gradients)
    with Injected(lambda g, r, s: from_numpy(g, r, s) * (flip if s == "left" else flip[:, None])):
        other = drive(fira(q, rank), q, gradients)
    assert difference(path, other) <= 1e-15


@few
@given(m=st.integers(4, 16), n=st.integers(17, 30), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_permuting_columns_or_rotating_rows_commutes_with_the_step(m, n, rank, seed):  # invariant 9
    gradients = spread_gradients((m, n), 10, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    w = start((m, n)).detach()
    p, q, v = (torch.nn.Parameter(x) for x in (w.clone(), w[:, order].clone(), (turn @ w.double()).float()))
    path = drive(fira(p, rank), p, gradients)
    permuted = drive(fira(q, rank), q, [g[:, order] for g in gradients])
    turned = drive(fira(v, rank), v, [(turn @ g.double()).float() for g in gradients])
    allowed = 2e-5 * movement(path, w)
    assert difference([x[:, order] for x in path], permuted) <= allowed
    assert difference(path, [turn.mT @ x.double() for x in turned]) <= allowed


@few
@given(m=DIM, n=DIM, seed=st.integers(0, 99))
def test_transposing_commutes_with_the_step_unless_square(m, n, seed):  # invariant 10
    gradients = spread_gradients((m, n), 10, seed=seed)
    w = start((m, n)).detach()
    p, q = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.mT.contiguous())
    path = drive(fira(p, 2), p, gradients)
    other = drive(fira(q, 2), q, [g.mT for g in gradients])
    gap = difference(path, [x.mT for x in other]) / movement(path, w)
    if m != n:
        assert gap <= 2e-5
    elif m > 4:
        assert gap > 1e-2  # a square matrix is "right" both ways


@few
@given(m=DIM, n=DIM, variant=st.sampled_from(["code", "paper"]))
def test_scaling_gradients_by_a_power_of_two_changes_nothing_without_eps(m, n, variant):  # invariant 11
    gradients = spread_gradients((m, n), 10, scale=1.0)
    p, q = start((m, n)), start((m, n))
    path = drive(fira(p, 2, eps=0.0, variant=variant), p, gradients)
    other = drive(fira(q, 2, eps=0.0, variant=variant), q, [g * 1024 for g in gradients])
    assert difference(path, other) <= 2e-6 * movement(path, start((m, n)).detach())


@pytest.mark.parametrize("refresh", METHODS)
def test_runs_are_bitwise_equal_and_the_order_of_parameters_does_not_matter(refresh):  # invariant 16
    shapes = [(12, 20), (20, 12), (12, 20), (12, 20)]
    gradients = [spread_gradients(shape, 12, seed=i) for i, shape in enumerate(shapes)]
    ends = []
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 2, 1]):
        params = {i: start(shapes[i], seed=i) for i in range(4)}
        keys = {"rank": 4, "update_proj_gap": 5, "alpha": 0.25}
        optimizer = Fira([{"params": [params[i] for i in order], **keys}], lr=1e-2, refresh=refresh)
        for t in range(12):
            for i, p in params.items():
                p.grad = gradients[i][t]
            optimizer.step()
        ends.append([params[i].detach() for i in range(4)])
    assert difference(ends[0], ends[1]) == 0
    assert difference(ends[0], ends[2]) <= 1e-6 * movement(ends[0], torch.zeros(()))


# --- bases ---------------------------------------------------------------------------------------------------------


@many
@given(
    m=DIM,
    n=DIM,
    rank=st.integers(1, 30),
    side=st.sampled_from(["left", "right"]),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["spread", "noise", "rank one", "zero", "tiny", "huge"]),
)
def test_bases_are_orthonormal(m, n, rank, side, method, dtype, kind):  # invariant 4
    g = {
        "spread": spread_gradients((m, n), 1)[0],
        "noise": torch.tensor(np.random.default_rng(m * n).standard_normal((m, n))),
        "rank one": torch.outer(torch.arange(1.0, m + 1), torch.arange(1.0, n + 1)) / (m * n),
        "zero": torch.zeros(m, n),
        "tiny": spread_gradients((m, n), 1)[0].double() * (1e-25 if dtype != torch.float16 else 1e-6),
        "huge": spread_gradients((m, n), 1)[0].double() * (1e30 if dtype != torch.float16 else 1e4),
    }[kind].to(dtype)
    previous = compute_basis(spread_gradients((m, n), 1, seed=5)[0].to(dtype), rank, side, method="gram")
    basis = compute_basis(g, rank, side, method=method, previous=previous)
    k = min(m, n, rank)
    assert basis.shape == ((m, k) if side == "left" else (k, n))
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    p = basis.double() if side == "left" else basis.double().mT
    assert (p.mT @ p - torch.eye(k)).abs().max() <= (1e-13 if dtype == torch.float64 else 5e-6)
    if kind == "zero":
        assert torch.equal(basis, previous)


def captured(g, basis, side):
    low = basis.double().mT @ g.double() if side == "left" else g.double() @ basis.double().mT
    rank = min(basis.shape)
    return (low.norm() ** 2 / (torch.linalg.svdvals(g.double())[:rank] ** 2).sum()).item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
@pytest.mark.parametrize(("spectrum", "floor"), [("1/k", 0.995), ("flat", 0.98)])
def test_bases_capture_the_energy_of_the_optimum(shape, side, spectrum, floor):  # invariant 23
    rng = np.random.default_rng(3)
    m, n = shape
    k = min(m, n)
    u, v = np.linalg.qr(rng.standard_normal((m, k)))[0], np.linalg.qr(rng.standard_normal((n, k)))[0]
    values = 1 / np.arange(1, k + 1) if spectrum == "1/k" else np.ones(k)
    clean = (u * values) @ v.T
    noise = rng.standard_normal(shape)
    noise *= 0.3 * np.linalg.norm(clean) / np.linalg.norm(noise)
    g, older = torch.tensor(clean, dtype=torch.float32), torch.tensor(clean + noise, dtype=torch.float32)
    rank = k // 4
    previous = compute_basis(older, rank, side, method="svd")
    assert captured(g, compute_basis(g, rank, side, method="subspace", previous=previous), side) >= floor
    assert captured(g, compute_basis(g, rank, side, method="gram"), side) >= 0.99999
    assert captured(g, compute_basis(g, rank, side, method="svd"), side) >= 0.99999


def test_methods_agree_vector_by_vector():
    for shape in [(24, 40), (40, 24), (200, 260)]:  # the last is too large for float64 Gram matrices
        g = spread_gradients(shape, 1)[0]
        for side in ("left", "right"):
            exact = torch.tensor(np.ascontiguousarray(numpy_basis(g.double(), 6, side)))
            for method in METHODS:
                basis = compute_basis(g, 6, side, method=method, previous=exact.float())
                assert (basis - exact).abs().max() <= 1e-5  # including the signs of the previous basis


@pytest.mark.parametrize("scale", [1e-25, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_a_gradient_does_not_change_the_basis(method, scale):  # its squares are outside float32
    g = spread_gradients((140, 150), 1, scale=1.0)[0]
    previous = compute_basis(g, 6, "left", method="svd")
    basis = compute_basis((g.double() * scale).float(), 6, "left", method=method, previous=previous)
    assert (basis - previous).abs().max() <= 1e-5


def test_an_unknown_refresh_method_is_refused():
    with pytest.raises(ValueError, match="qr"):
        compute_basis(torch.ones(3, 4), 2, "left", method="qr")


# --- rotated moments -----------------------------------------------------------------------------------------------


@few
@given(m=st.integers(4, 16), n=st.integers(4, 16), seed=st.integers(0, 99))
def test_with_rotated_moments_signs_and_order_of_the_basis_do_not_matter(m, n, seed):
    rank = 4
    rng = np.random.default_rng(seed)
    gradients = spread_gradients((m, n), 15, seed=seed, dtype=torch.float64)

    def shuffled(g, r, s):
        basis = from_numpy(g, r, s)
        signs = torch.tensor(rng.choice([-1.0, 1.0], r))
        order = torch.tensor(rng.permutation(r))
        return (basis * signs)[:, order] if s == "left" else (basis * signs[:, None])[order]

    paths = {}
    for name, source in (("plain", from_numpy), ("shuffled", shuffled)):
        for rotate in (False, True):
            p = start((m, n), dtype=torch.float64)
            with Injected(source):
                paths[name, rotate] = drive(fira(p, rank, gap=5, rotate_states=rotate), p, gradients)
    moved = movement(paths["plain", True], start((m, n), dtype=torch.float64).detach())
    assert difference(paths["plain", True], paths["shuffled", True]) <= 1e-9 * moved
    assert difference(paths["plain", False], paths["shuffled", False]) > 1e-3 * moved


def test_rotate_moments_equals_the_formula_of_ldadam():
    rng = np.random.default_rng(0)
    old, new = (np.linalg.qr(rng.standard_normal((9, 3)))[0] for _ in range(2))
    mean, square = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)) ** 2 + 1
    c, b1, b2 = new.T @ old, 1 - 0.9**7, 1 - 0.999**7
    wanted_mean = np.zeros_like(mean)
    wanted_square = np.zeros_like(square)
    for i in range(3):
        for k in range(5):
            wanted_mean[i, k] = sum(c[i, j] * mean[j, k] for j in range(3))
            variance = sum(c[i, j] ** 2 * (square[j, k] / b2 - (mean[j, k] / b1) ** 2) for j in range(3))
            wanted_square[i, k] = abs(variance + (wanted_mean[i, k] / b1) ** 2) * b2
    tensors = [torch.tensor(x) for x in (mean, square, old, new)]
    for side in ("left", "right"):
        given_ = tensors if side == "left" else [x.mT for x in tensors]
        got = rotate_moments(*given_, side, torch.tensor(7.0), (0.9, 0.999))
        got = got if side == "left" else [x.mT for x in got]
        np.testing.assert_allclose(got[0], wanted_mean, rtol=1e-12)
        np.testing.assert_allclose(got[1], wanted_square, rtol=1e-12)


def test_options_without_another_test_lower_a_loss():
    torch.manual_seed(0)
    target = torch.randn(24, 40)
    for options in ({"refresh": "subspace", "rotate_states": True, "gap": 1}, {"scaling": "matrix"}, {"gamma": None}):
        p = torch.nn.Parameter(torch.zeros(24, 40))
        optimizer = fira(p, 4, **options)
        for _ in range(60):
            optimizer.zero_grad()
            (p - target).square().mean().backward()
            optimizer.step()
        assert (p - target).square().mean() < 0.8 * target.square().mean()
