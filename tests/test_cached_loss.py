"""epochal.loss.cached_distillation_loss against the online loss and the merged distributions, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_loss import gradients, materialised, problem

import epochal.loss
from epochal.loss import cached_distillation_loss, cross_entropy, distillation_loss


def stored(teachers, average, count):
    """(ids, probs) of the averaged teachers, as stored in a cache."""
    logits = torch.stack([x @ w.t() for x, w in teachers])
    p = logits.mean(0).softmax(1) if average == "logits" else logits.softmax(2).mean(0)
    probs, ids = p.topk(count, 1)
    return ids, probs


def merged(hidden, head, targets, ids, probs, *, weight):
    """The definition: k + 1 classes, the last one "any other token"."""
    z = hidden @ head.t()
    q = z.softmax(1)
    hot = q.gather(1, ids.long())
    both = torch.cat([hot, q.scatter(1, ids.long(), 0.0).sum(1, keepdim=True)], 1)
    p = torch.cat([probs.to(q.dtype), 1 - probs.to(q.dtype).sum(1, keepdim=True)], 1)
    soft = F.kl_div(both.log(), p, reduction="none").sum(1)[targets != -100].mean()
    return (1 - weight) * F.cross_entropy(z, targets) + weight * soft


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_storing_all_tokens_gives_the_online_loss(average, weight):
    hidden, head, targets, teachers = problem()
    online = distillation_loss(hidden, head, targets, teachers, average=average, weight=weight)
    cached = cached_distillation_loss(
        hidden, head, targets, *stored(teachers, average, 101), weight=weight, chunk_tokens=10
    )
    torch.testing.assert_close(cached, online, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(cached, hidden, head), gradients(online, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_missing_mass_is_compared_as_one_class(count, weight):
    hidden, head, targets, teachers = problem()
    ids, probs = stored(teachers, "probs", count)
    cached = cached_distillation_loss(hidden, head, targets, ids, probs, weight=weight)
    plain = merged(hidden, head, targets, ids, probs, weight=weight)
    torch.testing.assert_close(cached, plain, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(cached, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_storing_no_tokens_leaves_the_weighted_cross_entropy():
    hidden, head, targets, _ = problem()
    none = torch.zeros(37, 0, dtype=torch.int64), torch.zeros(37, 0)
    cached = cached_distillation_loss(hidden, head, targets, *none, weight=0.5)
    torch.testing.assert_close(cached, 0.5 * cross_entropy(hidden, head, targets))


def test_int32_ids_float16_probs_and_nan_in_ignored_rows():
    hidden, head, targets, teachers = problem(dtype=torch.float32)
    ids, probs = stored(teachers, "probs", 5)
    plain = merged(hidden.double(), head.double(), targets, ids, probs.half(), weight=0.5)
    with torch.no_grad():
        hidden[:4] = torch.nan
        probs[:4] = torch.nan
    cached = cached_distillation_loss(hidden, head, targets, ids.int(), probs.half(), weight=0.5)
    torch.testing.assert_close(cached.double(), plain, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(gradients(cached, hidden)[0]).all()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_with_a_common_normaliser_add_up_to_the_whole_batch(parts):
    exact = problem(tokens=64, vocabulary=257, ignored=23)
    ids, probs = stored(exact[3], "logits", 16)
    plain = merged(*exact[:3], ids, probs, weight=0.6)
    hidden, head, targets, _ = problem(tokens=64, vocabulary=257, ignored=23, dtype=torch.float32)
    total = 0.0
    for chunk in torch.arange(64).split(64 // parts):
        arguments = (hidden[chunk], head, targets[chunk], ids[chunk], probs[chunk].float())
        value = cached_distillation_loss(*arguments, weight=0.6, normaliser=41, chunk_tokens=7)
        value.backward()
        total += value.item()
    assert abs(total - plain.item()) <= 1e-5 * abs(plain.item())
    for mine, true in zip((hidden, head), gradients(plain, *exact[:2]), strict=True):
        assert (mine.grad - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_error_is_within_10_percent_of_eager_in_the_same_dtype(dtype):
    exact = problem(tokens=256, vocabulary=512, width=64)
    low = [0.2 * t.detach().to(dtype) for t in exact[:2]]  # else the softmax of eager float16 is 0 in places
    wide = [t.double().requires_grad_() for t in low]
    ids, probs = stored(exact[3], "probs", 32)
    true = gradients(merged(*wide, exact[2], ids, probs.float(), weight=0.5), *wide)
    errors = []
    for function in (merged, cached_distillation_loss):
        parameters = [t.clone().requires_grad_() for t in low]
        value = function(*parameters, exact[2], ids, probs.float(), weight=0.5)
        computed = gradients(value, *parameters)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(computed, true, strict=True)])
    for eager, mine in zip(*errors, strict=True):
        assert mine <= 1.1 * eager, (mine, eager)


def test_sparse_loss_passes_opcheck_and_compiles_as_one_graph():
    hidden, head, targets, teachers = problem(dtype=torch.float32)
    ids, probs = stored(teachers, "probs", 5)
    options = {"weight": 0.5, "ignore_index": -100, "dtype": torch.float32, "chunk_tokens": 10}
    options |= {"hidden_gradient": True, "head_gradient": True}
    arguments = (hidden, head, targets, ids, probs)
    torch.library.opcheck(torch.ops.epochal.linear_sparse_loss.default, arguments, options)

    def function(hidden, head):
        return cached_distillation_loss(torch.tanh(hidden), head, targets, ids, probs, weight=0.5)

    value, plain = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, head), function(hidden, head)
    torch.testing.assert_close(value, plain)
    for a, b in zip(gradients(value, hidden, head), gradients(plain, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value) encountered:RuntimeWarning"
)  # as in test_sparse_loss
def test_triton_and_torch_give_the_same_loss_and_gradients(monkeypatch):
    pytest.importorskip("triton")
    hidden, head, targets, teachers = problem(dtype=torch.float32)
    ids, probs = stored(teachers, "probs", 5)
    results = []
    for path in ("torch", "triton"):
        monkeypatch.setattr(epochal.loss, "backend", lambda _, path=path: path)
        value = cached_distillation_loss(hidden, head, targets, ids, probs, weight=0.5, chunk_tokens=8)
        results.append((value.detach(), *gradients(value, hidden, head)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -0.5}, "must be between 0 and 1, got -0.5"),
        ({"ids": torch.full((37, 4), 101)}, "stored id 101 is outside"),
        ({"ids": torch.zeros(36, 4, dtype=torch.long)}, "do not fit 37 tokens"),
        ({"ids": torch.zeros(37, 4)}, "ids must be integers and probs floating-point"),
        ({"probs": torch.zeros(37, 4, dtype=torch.long)}, "ids must be integers and probs floating-point"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a positive integer, got 0"),
    ],
)
def test_invalid_arguments_raise_value_error(change, message):
    hidden, head, targets, teachers = problem()
    ids, probs = stored(teachers, "probs", 4)
    arguments = {"hidden": hidden, "head": head, "targets": targets, "ids": ids, "probs": probs, "weight": 0.5}
    with pytest.raises(ValueError, match=message):
        cached_distillation_loss(**{**arguments, **change})


def test_storing_more_tokens_approaches_the_online_loss():
    hidden, head, targets, teachers = problem(vocabulary=400)
    online = materialised(hidden, head, targets, teachers, average="probs", weight=1.0)
    gaps = [
        (online - cached_distillation_loss(hidden, head, targets, *stored(teachers, "probs", k), weight=1.0)).item()
        for k in (8, 64, 256)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > 0, "merging tokens can only lose divergence"
