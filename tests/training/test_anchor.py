"""Against forgetting: each pull to the start against its closed form, and runs that use it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from epochal.data.store import TokenStore
from epochal.loss import distillation_loss
from epochal.models.llama import build_model, next_token
from epochal.optim.roles import head_weight
from epochal.records import Record, Workspace, load_records, write_record
from epochal.run import AdamW, Anchor, Run, SequenceDistillation, SoftTargetDistillation
from epochal.stopping import Stopped
from epochal.training import loop
from epochal.training.loop import train
from epochal.training.regularizers.anchor import (
    WeightAnchor,
    check_anchor,
    drawn_loss,
    language_fisher,
    mean_squared_gradient,
    old_text,
)

Setup = tuple[Workspace, TokenStore, Path]


def vector(seed: int, size: int = 4) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- closed forms -------------------------------------------------------------------------------------------------------


def test_a_pull_alone_shrinks_the_distance_to_the_start_by_its_rate() -> None:
    w, start = vector(0), vector(1)
    before = w - start
    WeightAnchor(3.0, {w: start}, None).pull([{"params": [w], "lr": 0.01}])
    torch.testing.assert_close(w - start, (1 - 0.01 * 3.0) * before, rtol=1e-14, atol=0)


def test_a_quadratic_ends_between_its_minimum_and_the_start() -> None:
    """w* = (H + eps F)^-1 (H w_new + eps F w0), for any step size, because pull and gradient are of the same weights."""
    start, new, fisher = vector(1), vector(2), vector(3).abs()
    half = torch.stack([vector(seed) for seed in range(4, 8)])
    hessian = half @ half.T + torch.eye(4, dtype=torch.float64)
    for weights in (None, fisher):
        w, anchor_weight = vector(0), torch.ones(4, dtype=torch.float64) if weights is None else weights
        anchor = WeightAnchor(2.0, {w: start}, None if weights is None else {w: weights})
        for _ in range(3000):
            gradient = hessian @ (w - new)
            anchor.pull([{"params": [w], "lr": 0.02}])
            w -= 0.02 * gradient
        pull = 2.0 * torch.diag(anchor_weight)
        torch.testing.assert_close(w, torch.linalg.solve(hessian + pull, hessian @ new + pull @ start))


def test_ewc_with_equal_information_is_l2_and_never_goes_past_the_start() -> None:
    start, one, other = vector(1), vector(0), vector(0)
    WeightAnchor(3.0, {one: start}, None).pull([{"params": [one], "lr": 0.01}])
    WeightAnchor(3.0, {other: start}, {other: torch.ones_like(other)}).pull([{"params": [other], "lr": 0.01}])
    assert torch.equal(one, other)
    WeightAnchor(3.0, {other: start}, {other: torch.full_like(other, 1e6)}).pull([{"params": [other], "lr": 0.01}])
    assert torch.equal(other, start), "a weight of large information returns to the start"


def test_the_information_of_softmax_regression_is_p_times_one_minus_p() -> None:
    x = torch.stack([vector(seed, 3) for seed in range(5)])
    w = torch.stack([vector(seed, 3) for seed in range(10, 14)]).requires_grad_()
    p = (x @ w.T).softmax(-1).detach()
    expected = (p * (1 - p)).T @ x.square() / len(x)

    def all_labels() -> Any:
        # Over every label with its probability: no draw, so this is exact.
        for row, share in zip(x, p, strict=True):
            for label, probability in enumerate(share):
                yield -probability.sqrt() * (w @ row).log_softmax(-1)[label]

    (exact,) = mean_squared_gradient(all_labels(), [w], len(x))
    torch.testing.assert_close(exact, expected)
    # Drawn labels, and several predictions in one loss.
    draws = 4000
    (drawn,) = mean_squared_gradient((drawn_loss(x @ w.T, seed) for seed in range(draws)), [w], draws * len(x))
    assert (drawn - expected).norm() < 0.05 * expected.norm()


def test_the_information_of_a_model_is_that_of_its_drawn_losses() -> None:
    model = build_model("w16", vocab_size=300, max_positions=8, seed=0)
    rows = np.arange(16).reshape(2, 8)
    whole = [torch.zeros_like(p) for p in model.parameters()]
    for number, row in enumerate(torch.from_numpy(rows)):
        model.zero_grad()
        drawn_loss(model(input_ids=row[None]).logits[0, :-1], number).backward()
        whole = [a + p.grad.square() / 14 for a, p in zip(whole, model.parameters(), strict=True) if p.grad is not None]
    for one, other in zip(language_fisher(model, rows), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_distillation_from_the_start_has_no_gradient_at_the_start() -> None:
    model = build_model("w16", vocab_size=300, max_positions=8, seed=0).double()
    tokens = torch.arange(16).reshape(2, 8)
    hidden, targets = next_token(model, tokens)
    teacher = [(hidden.detach(), head_weight(model).detach())]
    loss = distillation_loss(hidden, head_weight(model), targets, teacher, average="logits", weight=1.0)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 1e-7, "the divergence from itself is at its minimum"


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A workspace with a trained base."""
    space, store, config = tiny.workspace(tmp_path_factory.mktemp("anchor"))
    trained(tiny.run(config, name="base", epochs=2), space)
    return space, store, config


def trained(run: Run, space: Workspace) -> Record:
    record = train(run, space)
    assert record is not None
    write_record(space, record)
    return record


def weights(space: Workspace, name: str) -> dict[str, torch.Tensor]:
    return load_file(space.folder(name) / "model/model.safetensors")


def later(setup: Setup, name: str, **changes: Any) -> Run:
    return tiny.run(setup[2], name=name, init_from="base", epochs=1, order_seed=1, data_order="sequences", **changes)


def distance(space: Workspace, name: str) -> float:
    base, other = weights(space, "base"), weights(space, name)
    return sum((other[key] - base[key]).square().sum().item() for key in base) ** 0.5


def test_a_knob_of_zero_is_the_plain_run_and_a_pull_ends_nearer_to_the_start(setup: Setup) -> None:
    plain = trained(later(setup, "plain"), setup[0])
    for name, anchor in (("l2-off", Anchor(strength=0)), ("ewc-off", Anchor(strength=0, fisher=True))):
        assert trained(later(setup, name, anchor=anchor), setup[0]).results == plain.results
        off, on = weights(setup[0], name), weights(setup[0], "plain")
        assert all(torch.equal(off[key], on[key]) for key in on)
    for name, anchor in (("l2", Anchor(strength=20.0)), ("ewc", Anchor(strength=20.0, fisher=True))):
        trained(later(setup, name, anchor=anchor), setup[0])
        assert distance(setup[0], name) < 0.97 * distance(setup[0], "plain")


@pytest.mark.parametrize(
    "changes",
    [{"anchor": Anchor(strength=5.0)}, {"anchor": Anchor(strength=5.0, fisher=True)}, {"replay": 0.5}],
    ids=["l2", "ewc", "replay"],
)
def test_resumed_runs_are_bit_identical(setup: Setup, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    name = "-".join(changes) + str(getattr(changes.get("anchor"), "fisher", ""))
    whole, cut = later(setup, f"{name}-whole", **changes), later(setup, f"{name}-cut", **changes)
    expected = trained(whole, setup[0])
    with monkeypatch.context() as patch:
        calls = iter([None] * 4 + ["on request"] + [None] * 99)
        patch.setattr(loop, "stop_reason", lambda: next(calls))
        with pytest.raises(Stopped, match="at step 5 of"):
            train(cut, setup[0])
    assert trained(cut, setup[0]).results == expected.results
    one, other = weights(setup[0], whole.name), weights(setup[0], cut.name)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_replay_shows_all_new_text_and_the_text_of_the_base(setup: Setup) -> None:
    space, store, config = setup
    run = later(setup, "replayed", replay=0.25, unique_tokens=1536)
    assert run.steps == 16, "12 steps of new text are three quarters"
    old = old_text(run, store, space, load_records(space))
    assert len(old.tokens) == tiny.run(config).unique_tokens
    batches = loop._batches(run, store, space)
    shown = [tuple(row) for step in range(run.steps) for row in batches(step)]
    new = [tuple(batches.real.sequence(number)) for number in range(48)]
    assert sorted(shown) == sorted([*new, *(tuple(old.sequence(number)) for number in range(16))])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "start": ({"anchor": Anchor(strength=1.0)}, "anchor pulls the weights to those of init_from, which is not set"),
    "text": (
        {"anchor": Anchor(strength=1.0, fisher=True), "init_from": "models/here"},
        "anchor.fisher needs the text that a Run was trained on, and init_from is 'models/here'",
    ),
    "replay": ({"replay": 0.1}, "replay needs the text that a Run was trained on, and init_from is None"),
    "distill": (
        {"replay": 0.1, "init_from": "base", "distill": SequenceDistillation(samples="s", fraction=0.5)},
        "replay and distill both mix text into the batches",
    ),
    "cached": (
        {
            "replay": 0.1,
            "init_from": "base",
            "data_order": "fixed",
            "teach": SoftTargetDistillation(source="t", mode="cached"),
        },
        "there are no cached targets",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny.run(Path("tiny.toml"), **changes)


@pytest.mark.parametrize(
    ("backend", "world", "fisher", "message"),
    [
        ("zero1", 2, False, "moves whole weights, and zero1 keeps pieces or copies of them; use one process or ddp"),
        ("zero3", 2, False, "zero3 keeps pieces"),
        ("fsdp2", 2, True, "fsdp2 keeps pieces"),
        ("replicated", 2, True, "estimates Fisher information, which one process does"),
    ],
)
def test_sharded_weights_have_no_anchor(backend: str, world: int, fisher: bool, message: str) -> None:
    run = tiny.run(Path("tiny.toml"), init_from="base", anchor=Anchor(strength=1.0, fisher=fisher))
    with pytest.raises(ValueError, match=message):
        check_anchor(run, backend, world)
    check_anchor(replace(run, anchor=None, optimizer=AdamW(lr=1e-3, wd=0.1)), backend, world)
