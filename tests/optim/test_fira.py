"""Fira against the published package, and the class around the update: state, refreshes, groups, precision, compiling.

A comment "invariant N" refers to docs/fira.md, section 4; test_fira_invariants.py has the others.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from compiling import CountGraphs
from fira_oracle import difference, drive, movement, spread_gradients, start

import epochal.optim.fira as fira_module
from epochal.optim.fira import Fira, _update_, constants, fira_param_groups, fira_update

STEPS, GAP, RANK = 30, 10, 8
SHAPES = [(48, 32), (32, 48), (32, 32), (24,)]


def group(*params, rank=RANK, gap=GAP, alpha=0.25, proj_type="std"):
    keys = {"rank": rank, "update_proj_gap": gap, "alpha": alpha, "proj_type": proj_type}
    return [{"params": list(params), **(keys if params[0].ndim == 2 else {})}]


# --- parity with the published package -----------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """Return a function that runs the package: (p, gradients, ...) -> (weights per step, bases, last limiter value)."""
    package = pytest.importorskip("fira", reason="the published package `fira` is the oracle; it is in the test extra")
    from fira.gradient_projection import GradientProjector

    bases = []
    original = GradientProjector.get_orthogonal_matrix

    def recording(self, *args, **kwargs):
        bases.append(original(self, *args, **kwargs))
        return bases[-1]

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", recording)

    def run(p, gradients, *, weight_decay=0.0, **keys):
        groups = group(p, **keys)
        optimizer = package.FiraAdamW(groups, lr=1e-2, weight_decay=weight_decay, no_deprecation_warning=True)
        path = drive(optimizer, p, gradients)
        return path, list(bases), optimizer.state[p].get("scaling_grad")

    return run


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refresh", ["svd", "gram"])
def test_ten_steps_with_our_own_bases_equal_the_package(published, shape, alpha, refresh):  # invariant 1
    gradients = spread_gradients(shape, GAP)
    p, q = start(shape), start(shape)
    path, _, _ = published(q, gradients, alpha=alpha)
    weights = drive(Fira(group(p, alpha=alpha), lr=1e-2, refresh=refresh), p, gradients)
    assert difference(weights, path) <= 1e-5 * movement(path, start(shape))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_thirty_steps_with_the_bases_of_the_package_equal_it(
    published, monkeypatch, shape, alpha, weight_decay
):  # invariant 2
    gradients = spread_gradients(shape, STEPS, seed=1)
    p, q = start(shape), start(shape)
    path, bases, limiter = published(q, gradients, alpha=alpha, weight_decay=weight_decay)
    queue = iter(bases)
    monkeypatch.setattr(fira_module, "compute_basis", lambda *args, **kwargs: next(queue))
    optimizer = Fira(group(p, alpha=alpha), lr=1e-2, weight_decay=weight_decay)
    weights = drive(optimizer, p, gradients)
    assert difference(weights, path) <= 5e-6 * movement(path, start(shape))
    if len(shape) == 2:
        assert len(bases) == STEPS // GAP
        assert optimizer.state[p]["limiter"].item() == pytest.approx(limiter.item(), rel=5e-6)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_every_projection_type_equals_the_package(published, monkeypatch, shape, proj_type):
    gradients = spread_gradients(shape, STEPS, seed=2)
    p, q = start(shape), start(shape)
    path, bases, _ = published(q, gradients, proj_type=proj_type)
    queue = iter(bases)
    monkeypatch.setattr(fira_module, "compute_basis", lambda *args, **kwargs: next(queue))
    weights = drive(Fira(group(p, proj_type=proj_type), lr=1e-2), p, gradients)
    assert difference(weights, path) <= 5e-6 * movement(path, start(shape))


def test_groups_of_the_package_can_be_passed_to_fira():
    divide_params = pytest.importorskip("fira", reason="the published package is the oracle").divide_params
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(6, 4), "head": torch.nn.Linear(4, 3)})
    groups = divide_params(model=model, target_modules_list=["attn"], rank=2, alpha=0.5)
    keys = [set(g) for g in groups]
    optimizer = Fira(groups, lr=1e-2)
    model.head(model.attn(torch.ones(5, 6))).square().sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.attn.weight]) == {"step", "basis", "exp_avg", "exp_avg_sq", "limiter"}
    assert set(optimizer.state[model.head.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert [set(g) for g in groups] == keys  # the caller's groups are not changed


# --- saving and copying ---------------------------------------------------------------------------------------------


def through_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [9, 10, 11])
@pytest.mark.parametrize("options", [{}, {"refresh": "subspace", "rotate_states": True, "stagger": True}])
def test_resume_is_bitwise(cut, dtype, options):  # invariant 15: before, at and after a refresh
    shapes = [(12, 20), (20, 12), (12, 20), (9,)]
    gradients = [spread_gradients(shape, 25, seed=i) for i, shape in enumerate(shapes)]
    params = [start(shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    def make(ps):
        return Fira([*group(*ps[:3], rank=4), {"params": ps[3:]}], lr=1e-2, weight_decay=0.1, **options)

    def go(optimizer, ps, steps):
        for t in steps:
            for p, g in zip(ps, gradients, strict=True):
                p.grad = g[t].to(dtype)
            optimizer.step()

    optimizer = make(params)
    go(optimizer, params, range(cut))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(copies)
    resumed.load_state_dict(through_a_file(optimizer))
    go(optimizer, params, range(cut, 25))
    go(resumed, copies, range(cut, 25))
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert value.dtype == torch.float32  # not cast to bfloat16 on the way
            assert torch.equal(value, resumed.state[q][name])
            assert value.data_ptr() != resumed.state[q][name].data_ptr()


def test_an_older_state_can_be_loaded_again():
    gradients = spread_gradients((12, 20), 15)
    p = start((12, 20))
    optimizer = Fira(group(p, rank=4, gap=5), lr=1e-2)
    drive(optimizer, p, gradients[:3])
    saved, weights = through_a_file(optimizer), p.detach().clone()
    ends = []
    for _ in range(2):  # the second time, refreshes must be at the same steps again
        p.data.copy_(weights)
        optimizer.load_state_dict(saved)
        ends.append(drive(optimizer, p, gradients[3:])[-1])
    assert torch.equal(*ends)


def test_copies_and_pickles_continue_identically():
    gradients = spread_gradients((12, 20), 15)
    p = start((12, 20))
    optimizer = Fira(group(p, rank=4), lr=1e-2)
    drive(optimizer, p, gradients[:7])
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    end = drive(optimizer, p, gradients[7:])[-1]
    for other in others:
        q = other.param_groups[0]["params"][0]
        assert torch.equal(drive(other, q, gradients[7:])[-1], end)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_has_the_documented_size(shape, proj_type, dtype):  # invariant 13
    p = start(shape, dtype=dtype)
    optimizer = Fira(group(p, rank=4, proj_type=proj_type), lr=1e-2)
    drive(optimizer, p, spread_gradients(shape, 3))
    state = optimizer.state[p]
    small, large = min(shape), max(shape)
    a, b = (small, large) if proj_type == "std" else (large, small)
    width = 8 if dtype == torch.float64 else 4
    counted = {name: value for name, value in state.items() if name != "step"}
    assert set(counted) == {"basis", "exp_avg", "exp_avg_sq", "limiter"}
    assert sum(value.numel() for value in counted.values()) == a * 4 + 2 * b * 4 + 1
    assert sum(value.untyped_storage().nbytes() for value in counted.values()) == width * (a * 4 + 2 * b * 4 + 1)
    assert state["step"].shape == () and state["step"].item() == 3


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("shape", [(384, 640), (640, 384)])
def test_a_step_between_refreshes_allocates_one_matrix(shape, rank):
    """Beyond weights, gradients and state: one product (or the squares) of one matrix, and low-rank factors."""
    params = [start(shape, seed=i) for i in range(4)]
    gradient = spread_gradients(shape, 1)[0]
    for p in params:
        p.grad = gradient
    optimizer = Fira(group(*params, rank=rank), lr=1e-2)
    optimizer.step()
    current = highest = 0
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            highest = max(highest, current)
    matrix, low = 4 * shape[0] * shape[1], 4 * rank * max(shape)
    assert low < highest <= matrix + 4 * low


# --- refresh -------------------------------------------------------------------------------------------------------


def test_a_refresh_happens_at_multiples_of_the_gap_and_changes_only_the_basis(monkeypatch):  # invariant 14
    calls = []
    original = fira_module.compute_basis

    def counting(grad, rank, side, **kwargs):
        calls.append(int(optimizer.state[p]["step"]))
        return original(grad, rank, side, **kwargs)

    monkeypatch.setattr(fira_module, "compute_basis", counting)
    p = start((12, 20), dtype=torch.float64)
    optimizer = Fira(group(p, rank=4, gap=5), lr=1e-2)
    for t, g in enumerate(spread_gradients((12, 20), 12, dtype=torch.float64)):
        before = {name: value.clone() for name, value in optimizer.state[p].items()}
        drive(optimizer, p, [g])
        after = optimizer.state[p]
        low = after["basis"].mT @ g
        if t:
            # The moments continue from their old values although the basis is new.
            torch.testing.assert_close(after["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * low)
            torch.testing.assert_close(after["exp_avg_sq"], 0.999 * before["exp_avg_sq"] + 0.001 * low**2)
            assert torch.equal(before["basis"], after["basis"]) == (t % 5 != 0)
    assert calls == [0, 5, 10]


def test_staggered_refreshes_are_spread_over_the_gap(monkeypatch):
    step, calls = 0, {}
    original = fira_module.compute_basis

    def counting(grad, *args, **kwargs):
        calls.setdefault(step, []).append(int(grad[0, 0]))
        return original(grad, *args, **kwargs)

    monkeypatch.setattr(fira_module, "compute_basis", counting)
    params = [start((8, 8), seed=i) for i in range(5)]
    optimizer = Fira(group(*params, rank=2, gap=10), stagger=True)
    for step in range(21):  # noqa: B007  read by `counting`
        for i, p in enumerate(params):
            p.grad = torch.eye(8) * (i + 1)
        optimizer.step()
    assert calls.pop(0) == [1, 2, 3, 4, 5]  # every matrix needs a basis at its first step
    assert all(len(names) == 1 for names in calls.values())
    assert calls == {2: [5], 4: [4], 6: [3], 8: [2], 10: [1], 12: [5], 14: [4], 16: [3], 18: [2], 20: [1]}


def test_a_basis_of_the_wrong_shape_is_refused(monkeypatch):
    monkeypatch.setattr(fira_module, "compute_basis", lambda *args, **kwargs: torch.eye(3))
    p = start((8, 12))
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*return \(8, 4\)"):
        drive(Fira(group(p, rank=4)), p, spread_gradients((8, 12), 1))


# --- gradients that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("when", [0, 4, 5])
def test_a_non_finite_gradient_skips_only_its_parameter(poison, when):  # invariant 20
    shapes = [(8, 12), (8, 12), (40, 10), (6,)]
    params = [start(shape, seed=i) for i, shape in enumerate(shapes)]
    clean = [start(shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [spread_gradients(shape, 12, seed=i) for i, shape in enumerate(shapes)]

    def make(ps):
        return Fira([*group(*ps[:3], rank=4, gap=5), {"params": ps[3:]}], lr=1e-2, weight_decay=0.1)

    bad, good = make(params), make(clean)
    for t in range(12):
        for i, (p, q) in enumerate(zip(params, clean, strict=True)):
            p.grad, q.grad = gradients[i][t].clone(), gradients[i][t].clone()
        if t == when:
            params[1].grad[2, 3] = poison
            params[2].grad[0, 0] = poison
            clean[1].grad = clean[2].grad = None  # skipping equals not stepping
        bad.step()
        good.step()
    assert bad.skipped == 2
    for p, q in zip(params, clean, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-8)
        for name in bad.state[p]:
            torch.testing.assert_close(bad.state[p][name], good.state[q][name], rtol=1e-5, atol=1e-7)
    assert bad.state[params[1]]["step"] == 11


# --- groups and validation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rank", value) for value in (0, -1, 2.5, True)),
        *(("gap", value) for value in (0, -3, 1.5)),
        *(("alpha", value) for value in (0.0, -1.0, float("nan"))),
        ("proj_type", "full"),
    ],
)
def test_illegal_groups_are_refused_at_construction(key, value):  # invariant 22
    with pytest.raises(ValueError, match="update_proj_gap" if key == "gap" else key):
        Fira(group(start((4, 6)), **{key: value}))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.999)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"gamma": 0.5},
        {"variant": "other"},
        {"scaling": "row"},
        {"limiter": "none"},
        {"refresh": "lanczos"},
    ],
)
def test_illegal_options_are_refused_at_construction(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Fira(group(start((4, 6))), **options)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5)])
def test_only_matrices_are_projected(shape):
    with pytest.raises(ValueError, match="whole matrices"):
        Fira([{"params": [torch.nn.Parameter(torch.zeros(shape))], "rank": 2}])


def test_a_rank_above_the_smaller_side_equals_the_smaller_side():  # invariant 22
    gradients = spread_gradients((12, 20), 15)
    a, b = start((12, 20)), start((12, 20))
    one = drive(Fira(group(a, rank=12)), a, gradients)
    assert difference(one, drive(Fira(group(b, rank=1000)), b, gradients)) == 0


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_embedding = torch.nn.Embedding(7, 4)
        self.attn = torch.nn.Linear(4, 4)
        self.mlp_up = torch.nn.Linear(4, 8)
        self.mlp_down = torch.nn.Linear(8, 4)
        self.frozen_mlp = torch.nn.Linear(4, 4).requires_grad_(False)
        self.head = torch.nn.Linear(4, 7, bias=False)


def test_parameter_groups_count_the_matches_of_each_pattern():
    model = Model()
    others, chosen = fira_param_groups(model, 2, alpha=0.25)
    assert chosen["matched"] == {"attn": 1, "mlp": 2}
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in chosen["params"]] == ["attn.weight", "mlp_up.weight", "mlp_down.weight"]
    assert len(others["params"]) == 5
    assert (chosen["rank"], chosen["update_proj_gap"], chosen["alpha"], chosen["proj_type"]) == (2, 200, 0.25, "std")
    Fira([others, chosen])


@pytest.mark.parametrize("patterns", [("attn", "Linear"), ("attn_embedding",), ("frozen",), ()])
def test_a_pattern_without_a_match_is_refused(patterns):
    with pytest.raises(ValueError, match=r"pattern"):
        fira_param_groups(Model(), 2, patterns)


# --- precision -----------------------------------------------------------------------------------------------------


def test_the_second_moment_of_bfloat16_weights_decays():
    p = start((8, 12), dtype=torch.bfloat16)
    optimizer = Fira(group(p, rank=4, gap=10**6), lr=0.0)
    drive(optimizer, p, spread_gradients((8, 12), 1))
    before = optimizer.state[p]["exp_avg_sq"].clone()
    drive(optimizer, p, [torch.zeros(8, 12)] * 700)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], before * 0.999**700, rtol=1e-3, atol=0)


def test_stochastic_rounding_keeps_small_steps():
    torch.manual_seed(0)
    gradient = spread_gradients((64, 64), 1)[0]
    ends = {}
    for rounding in (False, True):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        drive(Fira(group(p, gap=10**6), lr=2e-5, stochastic_rounding=rounding), p, [gradient] * 20)
        ends[rounding] = p.detach().double() - 1
    exact = torch.nn.Parameter(torch.ones(64, 64))
    path = drive(Fira(group(exact, gap=10**6), lr=2e-5), exact, [gradient.bfloat16().float()] * 20)
    wanted = path[-1].double() - 1
    assert ends[False].abs().max() == 0  # steps below half a unit are lost when rounding to nearest
    slope = (ends[True] * wanted).sum() / wanted.square().sum()
    assert slope.item() == pytest.approx(1, abs=0.15)


# --- one step between refreshes: compiled, masked, without reading from the device ---------------------------------


def problem(side, batch=2, dtype=torch.float32, m=6, n=10, r=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    left = side == "left"
    basis = torch.linalg.qr(noise(batch, m if left else n, r)).Q
    low = (batch, r, n) if left else (batch, m, r)
    state = {
        "step": torch.full((batch,), 4.0),
        "basis": basis if left else basis.mT.contiguous(),
        "exp_avg": 0.1 * noise(*low),
        "exp_avg_sq": 0.01 * noise(*low).square(),
        "limiter": torch.full((batch,), 0.5, dtype=dtype),
    }
    return noise(batch, m, n), noise(batch, m, n), state


def hyper(**changes):
    """The hyper-parameters of a group, as `fira_update` reads them."""
    defaults = Fira([{"params": [start((4, 6))], "rank": 2, "alpha": 0.25}], weight_decay=0.1).param_groups[0]
    return {key: value for key, value in defaults.items() if key != "params"} | changes


@pytest.mark.parametrize("variant", ["code", "paper", "galore"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_update_compiles_to_one_graph_for_all_steps_and_learning_rates(side, variant):
    backend = CountGraphs()
    torch._dynamo.reset()
    compiled = torch.compile(_update_, backend=backend, fullgraph=True)  # a graph break or a sync raises
    for i in range(4):
        w, g, state = problem(side, seed=i)
        state["step"] += i
        if i % 2:
            g[1, 2, 3] = float("nan")
        w2, state2 = w.clone(), {name: value.clone() for name, value in state.items()}
        group = hyper(lr=torch.tensor(1e-2 / (i + 1)), variant=variant)
        assert compiled(w, g, state, *constants(w, state, group), side).tolist() == [True, i % 2 == 0]
        fira_update(w2, g, state2, group, side)
        torch.testing.assert_close(w, w2)
    assert backend.graphs == 1


def test_step_counts_are_read_only_when_a_refresh_is_due(monkeypatch):
    p = start((12, 20))
    optimizer = Fira(group(p, rank=4, gap=5))
    gradients = spread_gradients((12, 20), 12)
    reads = []
    original = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: reads.append(step) or original(self))
    for step, g in enumerate(gradients):  # noqa: B007  read by the patch
        drive(optimizer, p, [g])
    assert set(reads) == {0, 5, 10}


@pytest.mark.parametrize("variant", ["code", "paper", "galore"])
@pytest.mark.parametrize("limiter", ["zero_safe", "compat"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_masked_matrix_stays_bit_for_bit_and_its_neighbor_steps_as_usual(side, limiter, variant):
    clean, masked = problem(side), problem(side)
    masked[1][1, 0, 0] = float("nan")
    before = [masked[0].clone(), {name: value.clone() for name, value in masked[2].items()}]
    group = hyper(variant=variant, limiter=limiter)
    assert fira_update(*clean, group, side).all()
    assert fira_update(*masked, group, side).tolist() == [True, False]
    assert torch.equal(masked[0][1], before[0][1])
    torch.testing.assert_close(masked[0][0], clean[0][0], rtol=1e-6, atol=1e-7)
    for name, value in masked[2].items():
        assert torch.equal(value[1], before[1][name][1]), name
        torch.testing.assert_close(value[0], clean[2][name][0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_new_learning_rate_holds_from_the_next_step(tensor):
    gradients = spread_gradients((8, 12), 2)
    p, q = start((8, 12)), start((8, 12))
    optimizer = Fira(group(p, rank=4), lr=torch.tensor(1e-2) if tensor else 1e-2)
    drive(optimizer, p, gradients[:1])
    if tensor:
        optimizer.param_groups[0]["lr"].fill_(0.0)
    else:
        optimizer.param_groups[0]["lr"] = 0.0
    after = p.detach().clone()
    assert difference(drive(optimizer, p, gradients[1:]), [after]) == 0
    assert difference(drive(Fira(group(q, rank=4), lr=1e-2), q, gradients[:1]), [after]) <= 1e-8
    assert optimizer.state[p]["step"] == 2


def test_closure_may_call_backward():
    p = start((8, 12))
    optimizer = Fira(group(p, rank=4))

    def closure():
        loss = p.square().sum()
        optimizer.zero_grad()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert optimizer.state[p]["step"] == 1
