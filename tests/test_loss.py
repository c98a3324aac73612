"""epochal.loss against the materialised loss in float64, built from torch's own primitives."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epochal import loss as epochal_loss
from epochal.loss import cross_entropy, distillation_loss, token_log_probs

ROOT = Path(__file__).parent.parent
HALF_AND_SINGLE = (torch.float32, torch.float16)


def materialised(hidden, head, targets, teachers, *, average, weight, temperature=1.0, shares=None, ignore_index=-100):
    """The definition, with all logits in memory."""
    z = hidden @ head.t()
    shares = [1.0] * len(teachers) if shares is None else shares
    shares = [share / sum(shares) for share in shares]
    logits = [x @ w.t() for x, w in teachers]
    if average == "logits":
        p = (sum(s * z_k for s, z_k in zip(shares, logits, strict=True)) / temperature).softmax(1)
    else:
        p = sum(s * (z_k / temperature).softmax(1) for s, z_k in zip(shares, logits, strict=True))
    divergence = F.kl_div((z / temperature).log_softmax(1), p, reduction="none").sum(1)
    kept = targets != ignore_index
    hard = F.cross_entropy(z, targets, ignore_index=ignore_index)
    return (1 - weight) * hard + weight * temperature**2 * divergence[kept].mean()


def problem(tokens=37, vocabulary=101, width=16, teachers=3, dtype=torch.float64, seed=0, ignored=4):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, head = randn(tokens, width).requires_grad_(), randn(vocabulary, width).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[:ignored] = -100
    return hidden, head, targets, [(randn(tokens, 5 + k), randn(vocabulary, 5 + k)) for k in range(teachers)]


def gradients(value, *parameters):
    return torch.autograd.grad(value, parameters)


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shares", [None, [1.0, 0.0, 5.0]])
def test_equals_the_materialised_loss_in_float64(average, temperature, weight, shares):
    hidden, head, targets, teachers = problem()
    options = {"average": average, "weight": weight, "temperature": temperature}
    fused = distillation_loss(hidden, head, targets, teachers, **options, teacher_weights=shares, chunk_tokens=10)
    plain = materialised(hidden, head, targets, teachers, **options, shares=shares)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(fused, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30),
    vocabulary=st.integers(2, 40),
    width=st.integers(1, 9),
    chunk=st.integers(1, 40),
    teachers=st.integers(1, 4),
    average=st.sampled_from(["logits", "probs"]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_materialised_loss_for_any_shape_and_chunk_size(
    tokens, vocabulary, width, chunk, teachers, average, seed
):
    hidden, head, targets, models = problem(tokens, vocabulary, width, teachers, seed=seed, ignored=tokens // 3)
    fused = distillation_loss(hidden, head, targets, models, average=average, weight=0.4, chunk_tokens=chunk)
    plain = materialised(hidden, head, targets, models, average=average, weight=0.4)
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(fused, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_with_a_common_normaliser_add_up_to_the_whole_batch(average, parts):
    """Uneven numbers of ignored tokens per part: only a normaliser of the whole step gives the same loss."""
    exact = problem(tokens=64, vocabulary=257, ignored=23)
    plain = materialised(*exact, average=average, weight=0.6, temperature=1.5)
    hidden, head, targets, teachers = problem(tokens=64, vocabulary=257, ignored=23, dtype=torch.float32)
    size, total = 64 // parts, 0.0
    for start in range(0, 64, size):
        part = slice(start, start + size)
        models = [(x[part], w) for x, w in teachers]
        options = {"average": average, "weight": 0.6, "temperature": 1.5, "normaliser": 41, "chunk_tokens": 7}
        value = distillation_loss(hidden[part], head, targets[part], models, **options)
        value.backward()
        total += value.item()
    assert abs(total - plain.item()) <= 1e-5 * abs(plain.item())
    for mine, true in zip((hidden, head), gradients(plain, *exact[:2]), strict=True):
        assert (mine.grad - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize(
    ("path", "dtype"),
    # no bfloat16 in Triton's interpreter: it truncates where a GPU rounds
    [
        *(("torch", d) for d in (torch.float32, torch.bfloat16, torch.float16)),
        *(("triton", d) for d in HALF_AND_SINGLE),
    ],
)
@pytest.mark.parametrize("average", ["logits", "probs"])
def test_gradient_error_is_within_10_percent_of_eager_in_the_same_dtype(path, dtype, average, monkeypatch):
    if path == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(epochal_loss, "backend", lambda _: "triton")
    exact = problem(tokens=64 if path == "triton" else 256, vocabulary=512, width=64, dtype=torch.float64)
    low = [t.detach().to(dtype) for t in exact[:2]]
    teachers = [(x.to(dtype), w.to(dtype)) for x, w in exact[3]]
    # the same rounded numbers, so that only the arithmetic differs
    wide = [t.double().requires_grad_() for t in low]
    models = [(x.double(), w.double()) for x, w in teachers]
    true = gradients(materialised(*wide, exact[2], models, average=average, weight=0.5), *wide)
    errors = []
    for function in (materialised, distillation_loss):
        parameters = [t.clone().requires_grad_() for t in low]
        value = function(*parameters, exact[2], teachers, average=average, weight=0.5)
        errors.append(
            [(a.double() - b).norm() / b.norm() for a, b in zip(gradients(value, *parameters), true, strict=True)]
        )
    for mine, eager in zip(errors[1], errors[0], strict=True):
        assert mine <= 1.1 * eager, (mine, eager)


def test_head_gradient_is_accumulated_in_float32_over_chunks():
    """Summing many chunks in bfloat16 would lose the small terms."""
    hidden, head, targets, _ = problem(tokens=2048, vocabulary=64, width=8, teachers=0, ignored=0)
    low = [hidden.detach().bfloat16(), head.detach().bfloat16().requires_grad_()]
    rounded = [t.detach().double().requires_grad_() for t in low]
    exact = gradients(F.cross_entropy(rounded[0] @ rounded[1].t(), targets, reduction="sum"), rounded[1])[0]
    errors = {}
    for chunk in (4, 2048):
        value = cross_entropy(*low, targets, normaliser=1, chunk_tokens=chunk)
        errors[chunk] = (gradients(value, low[1])[0].double() - exact).norm() / exact.norm()
    assert errors[4] <= 1.5 * errors[2048]


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_a_tied_head_sums_both_gradients(average):
    _, head, targets, teachers = problem()
    indices = torch.arange(37) % 101
    fused = distillation_loss(head[indices], head, targets, teachers, average=average, weight=0.5)
    plain = materialised(head[indices], head, targets, teachers, average=average, weight=0.5)
    torch.testing.assert_close(gradients(fused, head)[0], gradients(plain, head)[0], rtol=1e-10, atol=1e-13)


def test_cross_entropy_and_token_log_probs_equal_torch():
    hidden, head, targets, _ = problem()
    value = cross_entropy(hidden, head, targets, chunk_tokens=8)
    plain = F.cross_entropy(hidden @ head.t(), targets)
    torch.testing.assert_close(value, plain, rtol=1e-13, atol=0)
    scores = token_log_probs(hidden, head, targets, chunk_tokens=8)
    expected = -F.cross_entropy(hidden @ head.t(), targets, reduction="none").detach()
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
    assert not scores.requires_grad


def test_another_ignore_index_and_batches_without_counted_tokens():
    hidden, head, targets, teachers = problem()
    other = targets.where(targets != -100, 7)
    mine = distillation_loss(hidden, head, other, teachers, average="probs", weight=0.5, ignore_index=7)
    plain = materialised(hidden, head, other, teachers, average="probs", weight=0.5, ignore_index=7)
    torch.testing.assert_close(mine, plain)
    value = cross_entropy(hidden, head, torch.full_like(targets, -100))
    assert value == 0.0
    assert all(not g.any() for g in gradients(value, hidden, head))
    none = cross_entropy(hidden[:0], head, targets[:0])
    assert none == 0.0
    assert not gradients(none, head)[0].any()


def test_nan_in_ignored_rows_has_no_effect():
    hidden, head, targets, _ = problem()
    plain = cross_entropy(hidden, head, targets)
    dirty = hidden.detach().clone()
    dirty[:4] = math.nan
    dirty.requires_grad_()
    value = cross_entropy(dirty, head, targets)
    assert value == plain
    torch.testing.assert_close(gradients(value, dirty)[0], gradients(plain, hidden)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_in_a_counted_row_propagate(bad):
    hidden, head, targets, teachers = problem()
    with torch.no_grad():
        hidden[20, 3] = bad
    assert not torch.isfinite(distillation_loss(hidden, head, targets, teachers, average="probs", weight=0.5))


def test_frozen_head_no_grad_and_teachers_get_no_gradient():
    hidden, head, targets, teachers = problem()
    frozen = distillation_loss(hidden, head.detach(), targets, teachers, average="logits", weight=0.5)
    plain = materialised(hidden, head.detach(), targets, teachers, average="logits", weight=0.5)
    torch.testing.assert_close(gradients(frozen, hidden)[0], gradients(plain, hidden)[0], rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert not cross_entropy(hidden, head, targets).requires_grad
    models = [(x.requires_grad_(), w.requires_grad_()) for x, w in teachers]
    distillation_loss(hidden, head, targets, models, average="logits", weight=0.5).backward()
    assert models[0][0].grad is None, "teachers are constants"


def test_backward_can_run_twice_but_second_derivatives_raise():
    hidden, head, targets, _ = problem()
    value = cross_entropy(hidden, head, targets)
    first = torch.autograd.grad(value, (hidden, head), retain_graph=True)
    again = torch.autograd.grad(3.0 * value, (hidden, head), create_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3.0 * a, b.detach())
    with pytest.raises(RuntimeError, match="no second derivative"):
        (value.detach() + again[0].square().sum()).backward()


def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients():
    hidden, head, targets, teachers = problem(tokens=128, vocabulary=300, width=64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = distillation_loss(hidden, head, targets, teachers, average="probs", weight=0.5)
        eager = materialised(hidden, head, targets, teachers, average="probs", weight=0.5)
    true = materialised(hidden, head, targets, teachers, average="probs", weight=0.5)
    assert value.dtype == torch.float32
    assert 0 < abs(value - true) <= 2 * abs(eager - true) + 1e-3
    reference = gradients(true, hidden, head)
    for a, b, e in zip(gradients(value, hidden, head), reference, gradients(eager, hidden, head), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1.1 * (e - b).norm()


def test_linear_loss_passes_opcheck():
    hidden, head, targets, teachers = problem(dtype=torch.float32)
    x, w = [x for x, _ in teachers], [w for _, w in teachers]
    options = {"teacher_weights": [0.5, 0.3, 0.2], "average": "probs", "temperature": 2.0, "weight": 0.5}
    options |= {"ignore_index": -100, "dtype": torch.float32, "chunk_tokens": 10, "hidden_gradient": True}
    for need in (True, False):
        arguments = (hidden, head.detach().requires_grad_(need), targets, x, w)
        torch.library.opcheck(torch.ops.epochal.linear_loss.default, arguments, {**options, "head_gradient": need})


def test_compiles_as_one_graph():
    hidden, head, targets, teachers = problem(dtype=torch.float32)

    def function(hidden, head):
        return distillation_loss(torch.tanh(hidden), head, targets, teachers, average="logits", weight=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, plain = compiled(hidden, head), function(hidden, head)
    torch.testing.assert_close(value, plain)
    for a, b in zip(gradients(value, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


RANKS = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from epochal.loss import cached_distillation_loss, cross_entropy, distillation_loss
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
x, y = torch.randn(12, 6), torch.randint(50, (12,))
teachers = [(torch.randn(12, d), torch.randn(50, d)) for d in (5, 3)]
probs, ids = sum((h @ w.t()).softmax(1) / 2 for h, w in teachers).topk(7, 1)
y[:3] = -100  # all on rank 0: a mean per rank would weight the ranks wrongly
def online(average):
    def loss(hidden, head, rows, **options):
        models = [(h[rows], w) for h, w in teachers]
        return distillation_loss(hidden, head, y[rows], models, average=average, weight=0.5, temperature=1.5, **options)
    return loss
def cached(hidden, head, rows, **options):
    return cached_distillation_loss(hidden, head, y[rows], ids[rows], probs[rows], weight=0.5, **options)
def plain(hidden, head, rows, **options):
    return cross_entropy(hidden, head, y[rows], **options)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 50, bias=False)
    def forward(self, x):
        return self.body(x), self.head.weight
for loss in (plain, online("logits"), online("probs"), cached):
    model = Model()
    parallel = DistributedDataParallel(model)
    for half in range(2):  # and two micro-batches on each rank
        start = (2 * rank + half) * 3
        rows = slice(start, start + 3)
        with parallel.no_sync() if half == 0 else torch.enable_grad():
            loss(*parallel(x[rows]), rows, normaliser=9 / world).backward()
    whole = loss(*model(x), slice(None))
    for p, q in zip(model.parameters(), torch.autograd.grad(whole, list(model.parameters()))):
        assert (p.grad - q).norm() <= 1e-5 * q.norm(), (loss, p.grad - q)
dist.destroy_process_group()
"""


def test_two_ranks_give_the_gradient_of_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS], env={**shared, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


PEAK = """
import torch
from pathlib import Path
from epochal.loss import distillation_loss, token_log_probs
torch.set_num_threads(1)
N, V, d = 2048, 16384, 32
def pair(rows, vocabulary):
    return torch.randn(rows, d), torch.randn(vocabulary, d)
def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def step(count, average, rows=N, vocabulary=V):
    hidden, head = (t.requires_grad_() for t in pair(rows, vocabulary))
    targets, teachers = torch.randint(vocabulary, (rows,)), [pair(rows, vocabulary) for _ in range(count)]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    base = field("VmRSS")
    distillation_loss(hidden, head, targets, teachers, average=average, weight=0.5, chunk_tokens=128).backward()
    return field("VmHWM") - base
for average in ("logits", "probs"):
    step(1, average, 8, 8)  # warm-up: libraries allocate on first use
    print(step(1, average), step(8, average))
hidden, head = pair(N, V)
Path("/proc/self/clear_refs").write_text("5")
base = field("VmRSS")
token_log_probs(hidden, head, torch.randint(V, (N,)), chunk_tokens=128)
print("scores", field("VmHWM") - base)
"""


def test_chunks_are_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as many full chunks as fit and a short one, whose products would run at a fraction of the speed."""
    rows: list[int] = []
    plain = epochal_loss._softmax_loss

    def spy(z: Tensor, *arguments: object) -> Tensor:
        rows.append(len(z))
        return plain(z, *arguments)

    monkeypatch.setattr(epochal_loss, "_softmax_loss", spy)
    hidden, head, targets = torch.randn(100, 8), torch.randn(20, 8), torch.arange(100) % 20
    cross_entropy(hidden, head, targets, chunk_tokens=33)
    assert rows == [25, 25, 25, 25]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak of memory")
def test_peak_memory_does_not_depend_on_the_number_of_teachers():
    """All logits at once would be 134 MB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # else the C library keeps what was freed
    answer = subprocess.run([sys.executable, "-c", PEAK], env=environment, check=True, capture_output=True, text=True)
    *lines, scores = answer.stdout.splitlines()
    assert 4e6 < int(scores.split()[1]) < 0.25 * 2048 * 16384 * 4, scores  # a chunk of 128 tokens is a sixteenth
    for line in lines:
        one, eight = map(int, line.split())
        assert eight <= 1.1 * one + 1e6, line  # 1 MB of allocator granularity
        assert 8e6 < max(one, eight) < 0.4 * 2048 * 16384 * 4, line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"average": "mean"}, "must be 'logits' or 'probs', got 'mean'"),
        ({"weight": 1.5}, "must be between 0 and 1, got 1.5"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"teachers": []}, "teachers is empty"),
        ({"teacher_weights": [1.0]}, "do not fit 3 teachers"),
        ({"teacher_weights": [1.0, -1.0, 1.0]}, "do not fit 3 teachers"),
        ({"targets": torch.full((37,), 101)}, "target 101 is outside"),
        ({"targets": torch.zeros(36, dtype=torch.long)}, "do not match hidden"),
        ({"targets": torch.zeros(37)}, "int64"),
        ({"head": torch.zeros(101, 15, dtype=torch.float64)}, "do not multiply"),
        ({"head": torch.zeros(101, 16)}, "under torch.autocast"),
        ({"chunk_tokens": -1}, "chunk_tokens must be a positive integer, got -1"),
    ],
)
def test_invalid_arguments_raise_value_error(change, message):
    hidden, head, targets, teachers = problem()
    arguments = {"hidden": hidden, "head": head, "targets": targets, "teachers": teachers}
    arguments |= {"average": "probs", "weight": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments)


def test_a_teacher_with_another_vocabulary_raises():
    hidden, head, targets, teachers = problem()
    teachers[1] = (teachers[1][0], teachers[1][1][:-1])
    with pytest.raises(ValueError, match="teacher 1"):
        distillation_loss(hidden, head, targets, teachers, average="probs", weight=0.5)


def test_backend_names_the_implementation():
    assert epochal_loss.backend("cpu") == "torch"
    assert epochal_loss.backend("cuda") in ("torch", "triton")
