"""Fields of Run that make ensemble members differ, alone, together, and through stops and micro-batches."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from epochal.data.store import TokenStore
from epochal.models.llama import build_model, start_from
from epochal.records import Record, Workspace, write_record
from epochal.run import Run, Samples, SequenceDistillation, SoftTargetDistillation, fingerprint
from epochal.stopping import Stopped
from epochal.training.loop import RuntimeOptions, _batches, train
from epochal.training.noise import Noise
from epochal.training.weight_average import WeightAverage, mixing_rate

World = tuple[Workspace, TokenStore, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A workspace with a finished run "first", its token store and its data config."""
    space, store, config = tiny.workspace(tmp_path_factory.mktemp("members"))
    trained(tiny.run(config, name="first"), space)
    return space, store, config


def trained(run: Run, space: Workspace, options: RuntimeOptions | None = None) -> Record:
    record = train(run, space, options or RuntimeOptions())
    assert record is not None
    write_record(space, record)
    return record


def assert_same_weights(space: Workspace, first: str, second: str) -> None:
    one, other = (load_file(space.folder(name) / "model" / "model.safetensors") for name in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def everything(config: Path, **changes: Any) -> Run:
    """A run that uses every field tested below."""
    values = {
        "dropout": 0.1,
        "input_mask_prob": 0.5,
        "weight_averaging": "ema",
        "init_from": "first",
        "teach": SoftTargetDistillation(source="first"),
    }
    return tiny.run(config, epochs=2, **{**values, "order_seed": 1, "wd_schedule": "antiphase", **changes})


# --- all fields together ----------------------------------------------------------------------------------------------


def test_stops_and_micro_batches_do_not_change_the_result(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _, config = world
    whole = trained(everything(config, name="whole"), space)
    stops, polls = (1, 13, 24), itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr("epochal.training.loop.stop_reason", lambda: "stop requested" if next(polls) in stops else None)
        for _ in stops:
            with pytest.raises(Stopped):
                train(everything(config, name="cut"), space)
        cut = trained(everything(config, name="cut"), space)
    assert cut.results == whole.results
    assert_same_weights(space, "whole", "cut")
    parts = trained(everything(config, name="parts"), space, RuntimeOptions(micro_batch=1))
    assert parts.results["loss"] == pytest.approx(whole.results["loss"], abs=1e-5)
    assert parts.results["train_loss"] == pytest.approx(whole.results["train_loss"], abs=1e-5)


def test_each_field_changes_the_result(world: World) -> None:
    space, _, config = world
    base = everything(config, name="base")
    changes = {"dropout": 0.0, "input_mask_prob": 0.0, "weight_averaging": "last", "init_from": None, "teach": None}
    losses = [
        trained(replace(base, name=f"other-{field}", **{field: value}), space).loss for field, value in changes.items()
    ]
    assert len({trained(base, space).loss, *losses}) == len(losses) + 1


# --- initial weights --------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_final_weights_of_another(world: World) -> None:
    space, _, config = world
    record = trained(tiny.run(config, name="still", init_from="first", lr=0.0, epochs=1), space)
    assert_same_weights(space, "first", "still")
    assert record.inputs.keys() == {"first"}


def test_a_start_of_another_shape_or_without_a_record_is_refused(world: World) -> None:
    space, _, config = world
    with pytest.raises(ValueError, match=r"\(w32\) cannot start from 'first'.*start from a run of the same model"):
        train(tiny.run(config, name="wrong", init_from="first", model="w32"), space)
    with pytest.raises(ValueError, match=r"reads 'missing', which has no record"):
        train(tiny.run(config, name="wrong", init_from="missing"), space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocabulary", r"2 tokens differ, for example '.', which has id \d+ in"),
        ("layout", None),
        ("heads", "num_attention_heads is 1 in one and 2 in the other"),
        ("rotary", "rope_theta of the rotary embedding"),
        ("pickle", r"holds pickled weights \(pytorch_model\.bin\)"),
        ("code", "names code of its own"),
        ("tokenizer", r"has no tokenizer\.json"),
    ],
)
def test_a_start_from_a_folder_is_compared_by_identity_not_by_size(
    world: World, tmp_path: Path, change: str, message: str | None
) -> None:
    space, store, config = world
    folder = tmp_path / "elsewhere"
    shutil.copytree(space.folder("first") / "model", folder)
    table, settings = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "config.json"))
    if change == "vocabulary":
        vocabulary = table["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    settings |= {"heads": {"num_attention_heads": 2}, "code": {"auto_map": {}}}.get(change, {})
    if change == "rotary":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "config.json").write_text(json.dumps(settings))
    if change == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if change == "tokenizer":
        (folder / "tokenizer.json").unlink()
    run = tiny.run(config, name="begun", init_from=str(folder))
    model = build_model(run.model, vocab_size=300, max_positions=32, seed=1)
    if message is None:
        start_from(run, model, space, store.tokenizer_folder)
        assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])
        return
    with pytest.raises(ValueError, match=message):
        start_from(run, model, space, store.tokenizer_folder)


def test_a_student_of_text_from_another_vocabulary_is_refused(world: World) -> None:
    space, store, config = world
    samples = Samples(name="drawn", source="first", tokens=64, max_length=32)
    write_record(space, Record(samples, fingerprint(samples), "done", {"vocabulary": "0" * 64}))
    run = tiny.run(config, name="taught", distill=SequenceDistillation(samples="drawn", fraction=0.5))
    with pytest.raises(ValueError, match="its text was sampled with another vocabulary than that of"):
        _batches(run, store, space)
    write_record(space, Record(samples, fingerprint(samples), "done", {"vocabulary": store.vocabulary}))
    space.folder("drawn").mkdir()
    np.save(space.folder("drawn") / "samples.npy", np.zeros(64))
    with pytest.raises(ValueError, match="must hold one dimension of uint16, got 1 dimensions of float64"):
        _batches(run, store, space)


# --- held-out tokens --------------------------------------------------------------------------------------------------


def test_held_out_tokens_are_the_end_of_the_budget_and_never_trained_on(world: World) -> None:
    _, store, config = world
    text = np.asarray(store.tokens("train")[:2048])
    for order in ("documents", "sequences", "fixed"):
        run = tiny.run(config, holdout_tokens=512, data_order=order)
        stream = store.training_stream(run)
        epoch = np.concatenate([stream.sequence(index) for index in range(48)])
        assert sorted(epoch) == sorted(text[:1536])
        assert np.array_equal(store.holdout(run).ravel(), text[1536:])
    assert store.holdout(tiny.run(config)).shape == (0, 32)


# --- averaged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "window"), [("ema", 0.1), ("ema", 1.0), ("swa", 0.25), ("swa", 1.0)])
def test_weight_averages_follow_their_formulas(kind: str, window: float) -> None:
    run = tiny.run(Path("kjv"), weight_averaging=kind, averaging_window=window, data="kjv")
    model, rng = torch.nn.Linear(3, 2).double(), torch.Generator().manual_seed(0)
    average, path = WeightAverage(run, model), []
    for step in range(1, run.steps + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=rng, dtype=torch.float64))
        path.append(model.weight.detach().clone())
        average.update(model, step)
    if kind == "swa":
        expected = torch.stack(path[-round(window * run.steps) :]).mean(0)
    else:
        shares = torch.tensor([math.exp((i - run.steps) / (window * run.steps)) for i in range(run.steps)]).double()
        expected = torch.einsum("t,tij->ij", shares / shares.sum(), torch.stack(path))
    torch.testing.assert_close(average.tensors["weight"], expected)
    with average.in_place(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), path[-1])
    assert mixing_rate(run, 1) == 1.0


def test_a_run_evaluates_and_saves_the_average(world: World) -> None:
    from transformers import AutoModelForCausalLM

    space, store, config = world
    record = trained(tiny.run(config, name="swa", weight_averaging="swa", averaging_window=0.5), space)
    model = AutoModelForCausalLM.from_pretrained(space.folder("swa") / "model")
    tokens = torch.from_numpy(store.sequences("validation", 32)).long()
    with torch.no_grad():
        logits = model.double()(input_ids=tokens).logits[:, :-1]
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert record.loss == pytest.approx(exact.item(), abs=1e-6)
    last = trained(tiny.run(config, name="last", weight_averaging="swa", averaging_window=0.01), space)
    plain = trained(tiny.run(config, name="plain"), space)
    assert last.results == plain.results  # a window of one step
    assert record.results["train_loss"] == plain.results["train_loss"]  # training itself is unchanged
    assert record.loss != plain.loss


# --- noise ------------------------------------------------------------------------------------------------------------


def test_a_mask_depends_on_the_sequence_and_the_seed() -> None:
    noise = Noise(seed=3, dropout=0.0, input_mask_prob=0.5)
    ones = torch.ones(8, 40, 5)
    whole = noise.hide(ones, range(8))
    assert torch.equal(noise.hide(ones[6:], range(6, 8)), whole[6:])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 8
    other = Noise(seed=4, dropout=0.0, input_mask_prob=0.5)
    assert not torch.equal(other.hide(ones, range(8)), whole)


def test_inputs_are_masked_whole_at_a_rate_drawn_per_sequence() -> None:
    noise = Noise(seed=0, dropout=0.0, input_mask_prob=0.5)
    kept = noise.hide(torch.ones(2000, 400, 2), range(2000))
    assert torch.equal(kept[..., 0], kept[..., 1])
    shares = 1.0 - kept[..., 0].mean(1)
    assert shares.mean() == pytest.approx(0.25, abs=0.012)  # uniform between 0 and 0.5, to 4 sigma
    assert shares.std() == pytest.approx(0.5 / 12**0.5, abs=0.006)
    assert shares.max() < 0.6


def test_dropout_acts_on_the_residual_stream_in_training_and_keeps_the_mean() -> None:
    model = build_model("w16", vocab_size=64, max_positions=16, seed=0)
    noise = Noise(seed=0, dropout=0.25, input_mask_prob=0.0)
    noise.attach(model)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    tokens = torch.randint(64, (256, 16), generator=torch.Generator().manual_seed(0))

    model.eval()
    model(input_ids=tokens)
    clean = dict(seen)
    model.train()
    noise.begin(range(256))
    model(input_ids=tokens)
    dropped = {name for name, output in seen.items() if isinstance(output, torch.Tensor) and (output == 0).any()}
    layers = range(model.config.num_hidden_layers)
    sites = {f"model.layers.{i}.{part}" for i in layers for part in ("self_attn.o_proj", "mlp.down_proj")}
    assert dropped >= {"model.embed_tokens", *sites}
    embedded, original = seen["model.embed_tokens"], clean["model.embed_tokens"]
    kept = embedded != 0
    assert 1.0 - kept.float().mean() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(embedded[kept], original[kept] / 0.75)

    plain = build_model("w16", vocab_size=64, max_positions=16, seed=0)
    Noise(seed=0, dropout=0.0, input_mask_prob=0.0).attach(plain)
    assert not plain.model.embed_tokens._forward_hooks
