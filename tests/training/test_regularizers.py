"""Regularizers against their closed forms in float64, and runs with and without them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from epochal.campaign.plan import flops_of
from epochal.data.store import TokenStore
from epochal.distributed.presets import Preset, check_modes
from epochal.models.llama import build_model
from epochal.names import named_run
from epochal.optim import Muon
from epochal.optim.muon import normalized_rows
from epochal.records import Record, Workspace
from epochal.run import (
    EarlyLearning,
    GradientNorm,
    LookAhead,
    OrthogonalStep,
    OwnPredictions,
    RandomTokens,
    Regularizer,
    Run,
    SecondToken,
    SelfTunedDecay,
    SelfTunedDropout,
    StableMax,
    StochasticDepth,
)
from epochal.stopping import Stopped
from epochal.training.loop import RuntimeOptions, train
from epochal.training.noise import Noise
from epochal.training.regularizers.early_learning import early_learning_loss, running_average
from epochal.training.regularizers.gradient_norm import gradient_norm
from epochal.training.regularizers.look_ahead import look_ahead
from epochal.training.regularizers.orthogonal import orthogonal, orthogonal_step
from epochal.training.regularizers.own_predictions import soft_target_loss, weight_at
from epochal.training.regularizers.random_tokens import replace_tokens
from epochal.training.regularizers.second_token import SecondTokenMap
from epochal.training.regularizers.stable_max import stable_logits
from epochal.training.regularizers.stochastic_depth import keep_factors, skip_share
from epochal.training.regularizers.tuned_decay import TunedDecay
from epochal.training.regularizers.tuned_dropout import TunedDropout

ALL: dict[str, Regularizer] = {
    type(each).__name__ + getattr(each, "of", ""): each
    for each in (
        RandomTokens(share=0.3),
        StochasticDepth(share=0.3),
        OwnPredictions(),
        EarlyLearning(),
        OrthogonalStep(of="gradient"),
        OrthogonalStep(of="update"),
        LookAhead(),
        GradientNorm(),
        SelfTunedDecay(),
        SelfTunedDropout(),
        SecondToken(),
        StableMax(),
    )
}
OFF: tuple[Regularizer, ...] = (
    RandomTokens(share=0.0),
    StochasticDepth(share=0.0),
    OwnPredictions(weight=0.0),
    EarlyLearning(strength=0.0),
    LookAhead(radius=0.0),
    GradientNorm(strength=0.0),
    SecondToken(weight=0.0),
)
World = tuple[Workspace, TokenStore, Path]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_random_tokens_are_a_share_of_the_vocabulary_and_depend_on_their_row_alone() -> None:
    tokens = torch.zeros((8, 4000), dtype=torch.int64)
    noisy = replace_tokens(tokens, range(8), share=0.3, vocab_size=10)
    counts = torch.bincount(noisy.flatten(), minlength=10) / noisy.numel()
    # A token is drawn again with probability 1 / V.
    assert counts.tolist() == pytest.approx([1 - 0.3 + 0.03, *[0.03] * 9], abs=0.01)
    assert torch.equal(noisy[3:5], replace_tokens(tokens[3:5], [3, 4], share=0.3, vocab_size=10))


def test_skipped_blocks_leave_the_expectation_and_deeper_ones_are_skipped_more() -> None:
    assert [skip_share(layer, 4, 0.2) for layer in (1, 2, 4)] == pytest.approx([0.05, 0.1, 0.2])
    factors = keep_factors(range(4000), 0.2)
    assert set(factors.unique().tolist()) == {0.0, 1.25}
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.03)


def test_a_row_that_skips_every_block_is_its_embedding() -> None:
    model = build_model("w16", vocab_size=300, max_positions=32, seed=0)
    noise = Noise(seed=1, dropout=0.0, input_mask_prob=0.0, regularizer=StochasticDepth(share=0.5))
    noise.attach(model)
    tokens = torch.arange(64).reshape(2, 32)
    noise.begin(range(2))
    for module in model.modules():
        if hasattr(module, "row_factors"):
            module.row_factors = torch.tensor([0.0, 1.0])
    out = model.train().base_model(input_ids=tokens).last_hidden_state
    plain = model.eval().base_model(input_ids=tokens).last_hidden_state
    embedded = model.base_model.norm(model.get_input_embeddings()(tokens))
    assert torch.equal(out[0], embedded[0])
    torch.testing.assert_close(out[1], plain[1])


def test_own_predictions_move_a_table_of_probabilities_as_the_recursion_says() -> None:
    """1 - q_T(y) = (1 - u) prod a_t for a tabular model that reaches its targets in every epoch."""
    q, y, epochs = torch.full((1, 5), 0.2, dtype=torch.float64), torch.tensor([2]), 6
    rest = 0.8
    for epoch in range(1, epochs):
        weight = weight_at(epoch, epochs, 0.7)
        z = q.log().requires_grad_()
        loss = soft_target_loss(torch.log_softmax(z, 1), y, q, weight)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        label = torch.nn.functional.one_hot(y, 5)
        # dL/dz = p - (1 - a) y - a p_prev, here with p = p_prev; the minimum of the loss is its target.
        torch.testing.assert_close(gradient, q - (1 - weight) * label - weight * q)
        q, rest = q - gradient, rest * weight
        assert 1 - float(q[0, 2]) == pytest.approx(rest, rel=1e-12)
    assert weight_at(0, epochs, 0.7) == 0.0 and weight_at(epochs - 1, epochs, 0.7) == pytest.approx(0.7)


def test_early_learning_has_the_gradient_of_its_formula() -> None:
    z, q = drawn(3, 6).requires_grad_(), torch.softmax(drawn(3, 6, seed=1), 1)
    p = torch.softmax(z, 1)
    (gradient,) = torch.autograd.grad(early_learning_loss(p, q).sum(), z)
    inner = (p * q).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, (-p * (q - inner) / (1 - inner)).detach())
    (none,) = torch.autograd.grad(early_learning_loss(torch.softmax(z, 1), torch.full_like(q, 1 / 6)).sum(), z)
    assert float(none.abs().max()) < 1e-15, "no gradient where the average is uniform"
    average = torch.zeros_like(q)
    for _ in range(4):
        average = running_average(average, p, 0.7)
    torch.testing.assert_close(average, p.detach() * (1 - 0.7**4))


def test_orthogonal_steps_keep_their_size_and_do_not_touch_the_norm_of_the_weights() -> None:
    w, g = drawn(4, 5), drawn(4, 5, seed=1)
    flat = orthogonal(g, w)
    assert float((w * flat).sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(flat.norm()) == pytest.approx(float(g.norm()))
    torch.testing.assert_close(orthogonal(flat, w), flat)
    squares = float(w.square().sum())
    for seed in range(5):
        gradient = drawn(4, 5, seed=10 + seed)
        w, squares = w - 0.1 * orthogonal(gradient, w), squares + 0.01 * float(gradient.square().sum())
    assert float(w.square().sum()) == pytest.approx(squares), "|w_t|^2 = |w_0|^2 + lr^2 sum |g|^2"
    after = orthogonal_step(0.9 * w - 0.1 * g, w, 0.9)
    torch.testing.assert_close(after, 0.9 * w - 0.1 * orthogonal(g, w))


H = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)) + 0.1


def quadratic(w: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Accumulate the gradient of the mean over rows x of (w - x) H (w - x) / 2, as shares of two rows."""

    def accumulate(rows: torch.Tensor, first_row: int) -> torch.Tensor:
        loss = sum(0.5 * (w - x) @ H @ (w - x) for x in rows) / 2
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss.detach()

    return accumulate


def test_the_penalty_on_the_gradient_is_exact_on_a_quadratic_and_sam_is_one_case() -> None:
    w, rows = drawn(3).requires_grad_(), drawn(2, 3, seed=1)
    before = w.detach().clone()
    g = H @ (before - rows.mean(0))
    for strength, radius in ((0.3, 0.01), (0.05, 0.05), (0.2, 5.0)):
        w.grad = None
        gradient_norm(quadratic(w), [w], rows, 0, strength, radius)
        torch.testing.assert_close(w.grad, g + strength * H @ g / g.norm())
        assert torch.equal(w.detach(), before)
    w.grad = None
    gradient_norm(quadratic(w), [w], rows, 0, 0.4, 0.4)
    torch.testing.assert_close(w.grad, H @ (before + 0.4 * g / g.norm() - rows.mean(0)))


def test_the_second_half_of_a_batch_is_seen_after_a_step_of_the_first() -> None:
    w, rows = drawn(3).requires_grad_(), drawn(2, 3, seed=1)
    before = w.detach().clone()
    loss = look_ahead(quadratic(w), [w], rows, 0, 0.3)
    g1 = H @ (before - rows[0])
    moved = before - 0.3 * g1 / g1.norm()
    torch.testing.assert_close(w.grad, (g1 + H @ (moved - rows[1])) / 2)
    d1, d2 = before - rows[0], moved - rows[1]
    torch.testing.assert_close(loss, (d1 @ H @ d1 + d2 @ H @ d2) / 4)
    assert torch.equal(w.detach(), before)


def groups_of(weight: torch.Tensor) -> list[dict[str, Any]]:
    """The groups of an optimizer of one matrix."""
    return [{"params": [weight], "decay_scale": 1.0}]


def test_the_decay_moves_along_its_hypergradient() -> None:
    """Against a central difference of the held-out loss in log wd, through a step with decoupled decay."""
    choice, lr, wd = SelfTunedDecay(rate=0.3), 0.1, 0.8
    w, g, held_out = drawn(3), drawn(3, seed=1), drawn(2, 3, seed=2)

    def after_step(log_wd: float) -> torch.Tensor:
        return w - lr * math.exp(log_wd) * w - lr * g

    def loss(log_wd: float) -> float:
        return sum(float(0.5 * (after_step(log_wd) - x) @ H @ (after_step(log_wd) - x)) for x in held_out) / 2

    slope = (loss(math.log(wd) + 1e-5) - loss(math.log(wd) - 1e-5)) / 2e-5
    tuned = TunedDecay(choice, held_out.numpy(), batch_size=2)
    moved = after_step(math.log(wd)).requires_grad_()
    for step in range(choice.every):
        tuned.before(step, groups_of(w))
        assert tuned.decay_factor == 1.0
        tuned.after(step, groups_of(moved), quadratic(moved), held_out, 0)
    gradient = H @ (moved.detach() - held_out.mean(0))
    # dL / d log wd = -lr wd <g, w>, so the decay moves against the slope, by at most its rate.
    cosine = -slope / (lr * wd * float(gradient.norm() * w.norm()))
    assert math.log(tuned.decay_factor) == pytest.approx(0.3 * cosine, rel=1e-6)


def test_the_dropout_moves_along_its_hypergradient() -> None:
    """Against a central difference in log p of the held-out loss after a step, for a gradient that is linear in p."""
    choice, lr, p = SelfTunedDropout(rate=0.3), 0.1, 0.2
    w, g, slope_of_g, held_out = drawn(3), drawn(3, seed=1), drawn(3, seed=2), drawn(2, 3, seed=3)

    def after_step(log_p: float) -> torch.Tensor:
        return w - lr * (g + math.exp(log_p) * slope_of_g)

    def loss(log_p: float) -> float:
        return sum(float(0.5 * (after_step(log_p) - x) @ H @ (after_step(log_p) - x)) for x in held_out) / 2

    slope = (loss(math.log(p) + 1e-5) - loss(math.log(p) - 1e-5)) / 2e-5
    noise = Noise(seed=0, dropout=p, input_mask_prob=0.0)
    tuned = TunedDropout(choice, noise, held_out.numpy(), batch_size=2)
    moved = after_step(math.log(p)).requires_grad_()

    def accumulate(rows: torch.Tensor, first_row: int) -> torch.Tensor:
        if torch.equal(rows, held_out):
            assert noise.dropout == 0.0
            return quadratic(moved)(rows, first_row)
        moved.grad = g + noise.dropout * slope_of_g
        return torch.zeros(())

    for step in range(choice.every):
        assert tuned.results == {"dropout_factor": 1.0}
        tuned.before(step, groups_of(w))
        tuned.after(step, groups_of(moved), accumulate, torch.zeros(2, 3), 0)
    gradient = H @ (moved.detach() - held_out.mean(0))
    cosine = -slope / (lr * p * float(gradient.norm() * slope_of_g.norm()))
    assert abs(cosine) > 0.1
    assert math.log(tuned.results["dropout_factor"]) == pytest.approx(0.3 * cosine, rel=1e-6)
    tuned.before(choice.every, groups_of(moved))
    assert noise.dropout == pytest.approx(p * math.exp(0.3 * cosine))
    # Far along the slope or against it: p + p / 2 stays below 1.
    shares = []
    for _ in range(2):
        slope_of_g = -slope_of_g
        far = TunedDropout(SelfTunedDropout(rate=100.0), noise, held_out.numpy(), batch_size=2)
        far.after(3, groups_of(moved), accumulate, torch.zeros(2, 3), 0)
        shares.append(far.share)
    assert max(shares) == pytest.approx(0.6) and min(shares) < 1e-6


def test_a_run_tunes_its_dropout_on_text_that_it_does_not_train_on(world: World) -> None:
    space, _, config = world
    runs = [short(config, name=f"dropout-rate{rate}", **changed(SelfTunedDropout(rate=rate))) for rate in (0.0, 1.0)]
    fixed = short(config, name="fixed-dropout", holdout_tokens=256, dropout=0.2)
    off, on, plain = (trained(run, space) for run in (*runs, fixed))
    assert plain.results["curve"] == off.results["curve"] != on.results["curve"]
    assert "dropout_factor" not in off.results
    assert on.results["dropout_factor"] != 1.0
    assert [run.passes for run in runs] == [1.0, 1.75], "three passes more in every fourth step"


def test_the_loss_of_the_second_token_is_the_cross_entropy_two_ahead() -> None:
    """Against float64 over positions one by one, in value and gradient of hidden states, head and map."""
    tokens, head = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0)), drawn(11, 4).requires_grad_()
    hidden, second = drawn(2, 5, 4, seed=1).requires_grad_(), SecondTokenMap(0.3, 4, torch.device("cpu"))
    matrix = (torch.eye(4, dtype=torch.float64) + 0.1 * drawn(4, 4, seed=2)).requires_grad_()
    second.map.data = matrix.detach().float()
    exact = 0.3 * sum(
        -torch.log_softmax(head @ (matrix @ hidden[row, place]), 0)[tokens[row, place + 2]]
        for row in range(2)
        for place in range(4)
    )
    exact_gradients = torch.autograd.grad(exact / 10, [hidden, head, matrix])
    single, flat = head.detach().float().requires_grad_(), hidden.detach().float().flatten(0, 1).requires_grad_()
    loss = second.loss(flat, single, tokens, 10.0)
    assert loss.item() == pytest.approx(exact.item() / 10, rel=1e-6)
    found = torch.autograd.grad(loss, [flat, single, second.map])
    for one, other in zip(found, exact_gradients, strict=True):
        torch.testing.assert_close(one.double().reshape(other.shape), other, rtol=1e-4, atol=1e-6)


def test_the_map_of_the_second_token_is_stepped_like_the_matrices_of_the_model() -> None:
    """Against the closed form of Adam's first step: each entry moves by lr against the sign of its gradient."""
    second, groups = SecondTokenMap(0.3, 4, torch.device("cpu")), groups_of(torch.zeros(1))
    groups.insert(0, {"params": [], "decay_scale": 0.0, "lr": 9.0, "weight_decay": 9.0})
    groups[1].update(lr=0.01, weight_decay=0.5)
    gradient = drawn(4, 4).float()
    second.map.grad = gradient.clone()
    second.step(groups)
    torch.testing.assert_close(second.map.detach(), torch.eye(4) * (1 - 0.01 * 0.5) - 0.01 * gradient.sign())
    assert second.map.grad is None
    assert torch.equal(second.tensors["map"], second.map.detach()) and second.tensors["step"] == 1.0


def test_the_map_of_the_second_token_learns_and_is_not_in_the_model(
    world: World, plain: tuple[Record, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, _, config = world
    run = short(config, name="second", regularizer=SecondToken())
    learned = trained(run, space)
    monkeypatch.setattr(SecondTokenMap, "step", lambda self, groups: None)
    fixed = trained(dataclasses.replace(run, name="second-fixed"), space)
    assert learned.results["curve"] != fixed.results["curve"]
    assert weights(space, "second").keys() == plain[1].keys()
    # As many passes, and 6 more FLOPs for each weight of the map and of the head.
    vocabulary, width = 512, 16
    bare = dataclasses.replace(run, regularizer=None)
    assert flops_of(run, vocabulary) - flops_of(bare, vocabulary) == 6 * run.tokens * width * (width + vocabulary)


def test_a_run_tunes_its_decay_on_text_that_it_does_not_train_on(world: World) -> None:
    space, _, config = world
    runs = [short(config, name=f"rate{rate}", **changed(SelfTunedDecay(rate=rate))) for rate in (0.0, 1.0)]
    held_out = short(config, name="held-out", holdout_tokens=256)
    off, on, plain = (trained(run, space) for run in (*runs, held_out))
    assert plain.results["curve"] == off.results["curve"] != on.results["curve"]
    assert "decay_factor" not in off.results
    assert on.results["decay_factor"] != 1.0
    assert runs[1].passes == 1.25, "a pass more in every fourth step"


def test_stable_max_is_the_published_ratio() -> None:
    z = torch.cat([drawn(4, 7) * 5, torch.zeros(1, 7, dtype=torch.float64)])
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    torch.testing.assert_close(torch.softmax(stable_logits(z), 1), s / s.sum(1, keepdim=True))


def test_muon_eq_r_does_not_see_the_scale_of_a_row() -> None:
    gradient, scales = drawn(4, 6).float(), torch.tensor([1.0, 8.0, 0.5, 4.0])[:, None]
    torch.testing.assert_close(normalized_rows(gradient * 3).norm(dim=1), torch.ones(4))

    def step(gradient: torch.Tensor, normalize_rows: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(4, 6))
        weight.grad = gradient
        Muon([weight], lr=0.1, weight_decay=0.0, normalize_rows=normalize_rows).step()
        return weight.detach()

    torch.testing.assert_close(step(gradient, True), step(gradient * scales, True))
    torch.testing.assert_close(step(gradient, True), step(normalized_rows(gradient), False), rtol=0.02, atol=2e-3)
    assert not torch.allclose(step(gradient, False), step(gradient * scales, False), rtol=0.1)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny.workspace(tmp_path_factory.mktemp("regularizers"))


def short(config: Path, **changes: Any) -> Run:
    """A run of 16 steps."""
    values = {"data_order": "sequences", "unique_tokens": 1024, "epochs": 2, "num_evals": 1, "lr": 3e-3}
    return tiny.run(config, **{**values, **changes})


def changed(regularizer: Regularizer) -> dict[str, Any]:
    """A regularizer as a field of a run, with the held-out text that it needs."""
    more: dict[str, Any] = {}
    if isinstance(regularizer, SelfTunedDecay | SelfTunedDropout):
        more["holdout_tokens"] = 256
    if isinstance(regularizer, SelfTunedDropout):
        more["dropout"] = 0.2
    return {"regularizer": regularizer, **more}


def trained(run: Run, space: Workspace) -> Record:
    record = train(run, space, RuntimeOptions(micro_batch=2))
    assert record is not None
    return record


def weights(space: Workspace, name: str) -> dict[str, torch.Tensor]:
    return load_file(space.folder(name) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def plain(world: World) -> tuple[Record, dict[str, torch.Tensor]]:
    space, _, config = world
    return trained(short(config, name="plain"), space), weights(space, "plain")


def test_a_knob_at_zero_is_the_plain_run_bit_for_bit(world: World, plain: tuple[Record, Any]) -> None:
    space, _, config = world
    for off in OFF:
        name = f"off-{type(off).__name__}"
        record = trained(short(config, name=name, regularizer=off), space)
        assert record.results["curve"] == plain[0].results["curve"], name
        assert all(torch.equal(tensor, plain[1][key]) for key, tensor in weights(space, name).items()), name


@pytest.mark.parametrize("kind", ALL)
def test_a_run_differs_from_the_plain_one_and_resumes_to_the_last_bit(
    world: World, plain: tuple[Record, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, _, config = world
    whole = trained(short(config, name=f"whole-{kind}", **changed(ALL[kind])), space)
    assert whole.status == "done" and math.isfinite(whole.loss)
    assert whole.loss != plain[0].loss
    run, calls = short(config, name=f"cut-{kind}", **changed(ALL[kind])), [0]

    def stop_reason() -> str | None:
        calls[0] += 1
        return "on request" if calls[0] in (5, 11) else None

    monkeypatch.setattr("epochal.training.loop.stop_reason", stop_reason)
    for _ in range(2):
        with pytest.raises(Stopped):
            trained(run, space)
    resumed = trained(run, space)
    assert resumed.results == whole.results
    one, other = weights(space, whole.job.name), weights(space, run.name)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_own_predictions_are_the_plain_run_until_the_first_epoch_ends(world: World, plain: tuple[Record, Any]) -> None:
    """Their weight is 0 in epoch 0, so a run of one epoch is the plain one."""
    space, _, config = world
    for name, regularizer in (("one-epoch", None), ("one-epoch-own", OwnPredictions())):
        trained(short(config, name=name, epochs=1, regularizer=regularizer), space)
    one, other = weights(space, "one-epoch"), weights(space, "one-epoch-own")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_of_stable_max_is_that_of_its_own_probabilities(world: World) -> None:
    from transformers import AutoModelForCausalLM

    space, store, config = world
    record = trained(short(config, name="stable", regularizer=StableMax()), space)
    model = AutoModelForCausalLM.from_pretrained(space.folder("stable") / "model").double()
    tokens = torch.from_numpy(store.sequences("validation", 32))
    with torch.no_grad():
        logits = stable_logits(model(input_ids=tokens).logits[:, :-1])
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert record.loss == pytest.approx(float(exact), abs=1e-5)


# --- what is refused, and what a Run says ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_every_preset_supports_a_regularizer_or_refuses_it_in_one_sentence(kind: str) -> None:
    works = {
        "any": {("replicated", 1), ("replicated", 2), ("zero1", 2), ("zero3", 2), ("fsdp2", 2)},
        "whole": {("replicated", 1), ("replicated", 2)},
        "one": {("replicated", 1)},
    }
    run = short(Path("kjv"), **changed(ALL[kind]))
    for backend, world in works["any"]:
        if (backend, world) in works[ALL[kind].reach]:
            check_modes(Preset(backend), run, world=world, device="cpu")
        else:
            with pytest.raises(ValueError, match=rf"regularizer {type(ALL[kind]).__name__}, which .*; use ") as refused:
                check_modes(Preset(backend), run, world=world, device="cpu")
            assert str(refused.value).count(". ") == 0
    with pytest.raises(ValueError, match="cannot use the mode cuda-graph"):
        check_modes(Preset(modes=frozenset({"cuda-graph"})), run, world=1, device="cuda")


def test_impossible_combinations_are_refused(world: World) -> None:
    _, _, config = world
    for changes, reason in (
        ({"regularizer": OwnPredictions(), "data_order": "documents"}, "keeps predictions for fixed sequences"),
        ({"regularizer": LookAhead(), "batch_size": 1}, "needs batches of two halves"),
        ({"regularizer": StableMax(), "input_mask_prob": 0.5}, "no loss on masked inputs"),
        ({"regularizer": SelfTunedDecay()}, "set optimizer.wd and holdout_tokens"),
        ({"regularizer": SelfTunedDropout(), "holdout_tokens": 256}, "set dropout and holdout_tokens"),
        ({**changed(SelfTunedDropout()), "dropout": 0.7}, "keeps dropout at most 0.6, got 0.7"),
    ):
        with pytest.raises(ValueError, match=reason):
            short(config, **changes)


def test_names_and_fingerprints_tell_regularizers_apart_and_ignore_none() -> None:
    base = tiny.run(Path("kjv"), data_order="sequences")
    runs = [named_run(tiny.run(Path("kjv"), data_order="sequences", **changed(each)), base) for each in ALL.values()]
    runs.append(named_run(tiny.run(Path("kjv"), data_order="sequences", regularizer=RandomTokens(share=0.15)), base))
    plain = named_run(base, base)
    assert len({run.name for run in (*runs, plain)}) == len(runs) + 1
    assert "-randomtokens-share0.3-" in runs[0].name
