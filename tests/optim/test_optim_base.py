"""Behavior that every optimizer inherits: buckets, decay, non-finite gradients, saving, memory."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable

import pytest
import torch
from compiling import CountGraphs
from torch import Tensor

from epochal.optim import AdEMAMix, Fira, Lion, Mars, Muon, Signum, Spectra, base
from epochal.optim.base import MatrixOptimizer, round_stochastically

OPTIMIZERS: dict[str, Callable[..., MatrixOptimizer]] = {
    "signum": Signum,
    "ademamix": AdEMAMix,
    "mars": Mars,
    "lion": Lion,
    "muon": Muon,
    "spectra": lambda params, **kw: Spectra(params, kw.pop("lr", 1e-3), clip=2.0, apply_to="all", **kw),
    "spectra-signum": lambda params, **kw: Spectra(params, kw.pop("lr", 1e-3), base="signum", clip=2.0, **kw),
    "spectra-upstream": lambda params, **kw: Spectra(params, kw.pop("lr", 1e-3), compat="upstream", clip=2.0, **kw),
}
# Buffers of the parameter's shape for a matrix and for a vector.
BUFFERS = {"signum": (1, 1), "ademamix": (3, 3), "mars": (3, 2), "lion": (1, 1), "muon": (1, 2)} | {
    "spectra": (2, 2),
    "spectra-signum": (1, 1),
    "spectra-upstream": (2, 2),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = ((6, 8), (8, 6), (6, 8), (6, 8), (5,), (5,), ())


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def fill(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(10 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: MatrixOptimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        fill(params, step)
        optimizer.step()


@every
def test_a_batched_step_equals_one_parameter_at_a_time(name: str) -> None:
    together, alone = parameters(), parameters()
    train(OPTIMIZERS[name](together), together, 0, 4)
    separate = [OPTIMIZERS[name]([p]) for p in alone if p.ndim == 2 or "spectra" not in name]
    for step in range(4):
        fill(alone, step)
        for optimizer in separate:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        if a.ndim == 2 or "spectra" not in name:
            moved = float(a.detach().abs().max())
            tolerance = 3e-3 if name in ("muon", "spectra-upstream") else 1e-6
            assert torch.allclose(a, b, rtol=0, atol=tolerance * moved)


@every
def test_two_runs_are_bitwise_equal(name: str) -> None:
    runs = []
    for _ in range(2):
        params = parameters()
        train(OPTIMIZERS[name](params), params, 0, 3)
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_only_its_parameter(name: str, bad: float) -> None:
    params, clean = parameters(), parameters()
    optimizer, reference = OPTIMIZERS[name](params), OPTIMIZERS[name](clean)
    train(optimizer, params, 0, 2)
    train(reference, clean, 0, 2)
    before = params[0].detach().clone()
    state = copy.deepcopy(dict(optimizer.state[params[0]]))
    fill(params, 2)
    fill(clean, 2)
    params[0].grad[1, 2] = bad
    optimizer.step()
    reference.step()
    assert int(optimizer.skipped) == 1 and int(reference.skipped) == 0
    assert torch.equal(params[0], before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[params[0]].items())
    for a, b in zip(params[1:], clean[1:], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    train(optimizer, params, 3, 5)
    assert all(bool(p.isfinite().all()) for p in params)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_saved_state_is_bitwise(name: str, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    train(OPTIMIZERS[name](whole), whole, 0, 6)
    params = parameters(dtype)
    optimizer = OPTIMIZERS[name](params)
    train(optimizer, params, 0, 3)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": params}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved["weights"]]
    again = OPTIMIZERS[name](resumed)
    again.load_state_dict(saved["optimizer"])
    for a, b in zip(params, resumed, strict=True):
        assert {k: v.dtype for k, v in optimizer.state[a].items()} == {k: v.dtype for k, v in again.state[b].items()}
    train(again, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    # the loaded state shares no memory with the dictionary it was loaded from
    assert all(v.data_ptr() != saved["optimizer"]["state"][0][k].data_ptr() for k, v in again.state[resumed[0]].items())


@every
def test_a_deepcopy_continues_identically(name: str) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    train(optimizer, params, 0, 2)
    twin_params, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params, 2, 4)
    train(twin, twin_params, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(params, twin_params, strict=True))
    assert int(twin.skipped) == 0


@every
def test_state_is_plain_tensors_of_the_documented_size(name: str) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    train(optimizer, params, 0, 2)
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage() for s in optimizer.state.values() for v in s.values()
    }
    elements = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert sum(storage.nbytes() for storage in storages.values()) == 4 * elements, "stacked, and nothing else is kept"
    for p in params:
        state = optimizer.state[p]
        buffers = BUFFERS[name][0 if p.ndim == 2 else 1]
        assert sum(value.numel() for value in state.values()) == 1 + buffers * p.numel()
        for value in state.values():
            assert type(value) is Tensor and value.dtype == torch.float32 and value.is_contiguous()


@every
def test_bfloat16_weights_move_and_have_float32_state(name: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = OPTIMIZERS[name](params, lr=0.5)
    train(optimizer, params, 0, 3)
    for p, p0 in zip(params, parameters(torch.bfloat16), strict=True):
        assert p.dtype == torch.bfloat16 and not torch.equal(p, p0)
        assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())


@every
def test_parameters_without_a_gradient_do_not_move(name: str) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    fill(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state


@every
def test_zero_gradients_only_decay(name: str) -> None:
    if name in ("spectra-upstream", "muon"):
        pytest.skip("zero gradients are not a zero update: 0 / 0 + eps, or a bfloat16 iteration")
    params = parameters()
    optimizer = OPTIMIZERS[name](params, lr=0.1, weight_decay=0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, p0 in zip(params, parameters(), strict=True):
        assert torch.allclose(p, p0 * (1 - 0.05), rtol=1e-6, atol=0)


@every
def test_a_tensor_learning_rate_works_with_torchs_schedulers(name: str) -> None:
    params, other = parameters(), parameters()
    optimizer, reference = OPTIMIZERS[name](params, lr=0.02), OPTIMIZERS[name](other, lr=torch.tensor(0.02))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)) for o in (optimizer, reference)]
    for step in range(3):
        train(optimizer, params, step, step + 1)
        train(reference, other, step, step + 1)
        for schedule in schedules:
            schedule.step()
    for a, b in zip(params, other, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@every
def test_a_plain_loop_with_a_closure_learns(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    assert losses[-1] < 0.95 * losses[0]


def projected(params: list[torch.nn.Parameter]) -> Fira:
    return Fira([{"params": params, **({"rank": 8} if params[0].ndim == 2 else {})}])


MATRICES = [(name, shape) for name in (*OPTIMIZERS, "fira") for shape in ((40, 24), (24, 56), (301, 130))]
VECTORS = [(name, (33,)) for name in ("signum", "ademamix", "mars", "lion", "muon", "spectra", "fira")]  # by pieces


@pytest.mark.parametrize(("name", "shape"), [*MATRICES, *VECTORS])
def test_a_shard_that_receives_the_update_gets_the_bits_of_an_unsharded_step(name: str, shape: tuple[int, ...]) -> None:
    """The owner steps a matrix of zeros; the holder of the weights computes W <- decay_factor W + (what came out)."""
    torch.manual_seed(0)
    whole, alone = torch.nn.Parameter(3 * torch.randn(shape)), torch.nn.Parameter(torch.zeros(shape))
    make = projected if name == "fira" else OPTIMIZERS[name]
    optimizers = [make([p]) for p in (whole, alone)]
    # In the second and third case 1 - lr wd is a different float32 if lr is rounded first.
    for gradient, lr, wd in zip(torch.randn(3, *shape), (0.0123, 0.2535, 0.1308), (0.7, 2.29, 1.85), strict=True):
        before = whole.detach().clone()
        alone.data.zero_()
        for p, optimizer in zip((whole, alone), optimizers, strict=True):
            optimizer.param_groups[0].update(lr=lr, weight_decay=wd)
            p.grad = gradient.clone()
            optimizer.step()
        factor = MatrixOptimizer.decay_factor(before, optimizers[0].param_groups[0])
        assert torch.equal(whole, before * factor + alone)


@every
def test_the_peak_memory_of_a_step_does_not_grow_with_the_number_of_buckets(name: str) -> None:
    # temporaries of one bucket are freed before the next
    one, many = (peak_of_a_step(name, [(64, 96 + i) for i in range(count)]) for count in (1, 6))
    assert many <= 1.6 * one


@every
def test_equal_shapes_are_split_so_that_a_step_needs_less_memory_than_a_copy_of_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limits in (base.STACKED_ELEMENTS, base.ELEMENTWISE_ELEMENTS):
        monkeypatch.setitem(limits, "cpu", 64 * 128)
    assert peak_of_a_step(name, [(64, 128)] * 16) <= 16 * 4 * 64 * 128


def peak_of_a_step(name: str, shapes: list[tuple[int, int]]) -> int:
    """Return the most bytes that a step allocates at a time."""
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = OPTIMIZERS[name](params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    high = held = 0
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            high = max(high, held)
    return high


def test_sparse_gradient_is_refused() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = Signum(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


def test_stochastic_rounding_is_unbiased_and_exact_on_representable_values() -> None:
    torch.manual_seed(0)
    x = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    rounded = round_stochastically(x)
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float(rounded.float().mean()) == pytest.approx(float(x[0]), abs=1e-4)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float()), exact)


@pytest.mark.parametrize("name", ["signum", "lion", "ademamix", "mars", "muon"])
def test_update_compiles_to_one_graph_for_all_steps(name: str) -> None:
    """No graph break, and no recompilation when the step count changes."""
    params = parameters()[:1]
    optimizer = OPTIMIZERS[name](params)
    fill(params, 0)
    optimizer.step()
    backend = CountGraphs()
    group = optimizer.param_groups[0]
    rule, options = optimizer.direction(params[0], group)
    compiled = torch.compile(lambda g, s: rule(g, s, **options), fullgraph=True, backend=backend)
    for step in range(1, 4):
        state = {key: value.unsqueeze(0) for key, value in optimizer.state[params[0]].items()}
        grads = torch.randn(1, *params[0].shape)
        want, want_state = rule(grads, state, **options)
        got, got_state = compiled(grads, state)
        assert torch.allclose(got, want, atol=1e-5)
        assert all(torch.allclose(got_state[key], want_state[key]) for key in want_state)
        train(optimizer, params, step, step + 1)
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["lion", "muon", "spectra"])  # element-wise, and with a transform of matrices
def test_a_step_compiled_as_on_a_gpu_moves_like_an_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a gradient that is not finite: the masks are in the graph, as nothing may be read back there."""
    eager, compiled = parameters(), parameters()
    optimizers = [OPTIMIZERS[name](params) for params in (eager, compiled)]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for step in range(3):
        for params, optimizer, device in ((eager, optimizers[0], "torch"), (compiled, optimizers[1], "triton")):
            fill(params, step)
            if step == 1:
                params[2].grad[0, 0] = math.nan
            with monkeypatch.context() as patch:
                patch.setattr(base, "backend", lambda _, device=device: device)
                optimizer.step()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert int(optimizers[1].skipped) == 1
