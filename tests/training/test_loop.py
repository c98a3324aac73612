"""The training loop against a loop written by hand, and against itself stopped, resumed, split and diverging."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from epochal.data.store import Batches, TokenStore
from epochal.models.llama import build_model
from epochal.records import Record, Workspace, load_records, write_record
from epochal.run import AdamW, Fira, Muon, Optimizer, Run, Spectra
from epochal.stopping import Stopped
from epochal.training import loop
from epochal.training.loop import LOG_STEPS, Progress, RuntimeOptions, Stopper, own_sum, train

Setup = tuple[Workspace, TokenStore, Path]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return tiny.workspace(tmp_path)


def trained(run: Run, space: Workspace, options: RuntimeOptions | None = None) -> Record:
    record = train(run, space, options or RuntimeOptions())
    assert record is not None
    return record


def metrics(space: Workspace, name: str) -> list[dict[str, Any]]:
    lines = (space.folder(name) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_second"} for line in lines]


def weights(space: Workspace, name: str) -> dict[str, torch.Tensor]:
    return load_file(space.folder(name) / "model" / "model.safetensors")


def by_hand(run: Run, store: TokenStore) -> tuple[torch.nn.Module, list[float]]:
    """The same run without the training loop: whole logits, torch's AdamW, the schedule as a formula."""
    model = build_model(run.model, vocab_size=store.vocab_size, max_positions=run.sequence_length, seed=run.init_seed)
    names = dict(model.named_parameters())
    kept = [name for name in names if "norm" in name or "embed_tokens" in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": [names[name] for name in names if name not in kept], "weight_decay": run.optimizer.wd},
            {"params": [names[name] for name in kept], "weight_decay": 0.0},
        ],
        lr=run.optimizer.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    batches = Batches(store.training_stream(run), None, 0.0, run.batch_size)
    rise = round(0.1 * run.steps)
    losses = []
    for step in range(run.steps):
        rate = step / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (run.steps - rise))
        for group in optimizer.param_groups:
            group["lr"] = run.optimizer.lr * rate
        tokens = torch.from_numpy(batches(step))
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def exact_loss(model: Any, store: TokenStore, split: str, length: int) -> float:
    """The mean loss of a split in float64 from whole logits."""
    tokens = torch.from_numpy(store.sequences(split, length))
    with torch.no_grad():
        logits = model.double()(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def load(space: Workspace, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(space.folder(name) / "model")


def test_weights_losses_and_record_equal_a_loop_written_by_hand(setup: Setup) -> None:
    space, store, config = setup
    run = tiny.run(config)
    record = trained(run, space)
    reference, losses = by_hand(run, store)

    final = weights(space, run.name)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(final[name], parameter.detach(), rtol=0.0, atol=1e-4)

    lines = metrics(space, run.name)
    logged = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    assert sorted(logged) == [10, 20, 30, 40, 48]
    for stop, loss in logged.items():
        start = (stop - 1) // LOG_STEPS * LOG_STEPS
        assert loss == pytest.approx(sum(losses[start:stop]) / (stop - start), abs=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    assert logged[48] < logged[20] < logged[10]

    assert record.status == "done"
    assert [step for step, _ in record.results["curve"]] == [12, 24, 36, 48]
    assert record.results["loss"] == record.results["curve"][-1][1]
    assert record.results["best_loss"] == min(loss for _, loss in record.results["curve"])
    assert record.results["train_loss"] == logged[48]
    assert record.results["steps"] == 48 and record.results["tokens"] == 48 * 128
    model = load(space, run.name)
    assert record.results["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record.results["loss"] == pytest.approx(exact_loss(model, store, "validation", 32), abs=1e-5)
    assert record.results["test_loss"] == pytest.approx(exact_loss(model, store, "test", 32), abs=1e-5)
    assert not (space.folder(run.name) / "checkpoints").exists()
    evaluated = [[line["step"], line["validation_loss"]] for line in lines if "validation_loss" in line]
    assert evaluated == record.results["curve"]
    write_record(space, record)
    assert load_records(space).named(run.name) == record


def test_gradient_accumulation_does_not_change_the_losses(setup: Setup) -> None:
    space, _, config = setup
    records = [
        trained(tiny.run(config, name=f"micro{size}"), space, RuntimeOptions(micro_batch=size)) for size in (4, 2, 1)
    ]
    for record in records[1:]:
        for key in ("loss", "train_loss", "test_loss"):
            assert record.results[key] == pytest.approx(records[0].results[key], abs=1e-5)
        for (_, one), (_, other) in zip(record.results["curve"], records[0].results["curve"], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_at_any_step_is_bit_identical(setup: Setup, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    space, _, config = setup
    whole = trained(tiny.run(config, name="whole", precision=precision), space)
    stops = [1, 7, 10, 12, 25, 47]  # on the steps that log and evaluate, and between them
    run, calls = tiny.run(config, name="cut", precision=precision), [0]

    def stop_reason() -> str | None:
        calls[0] += 1
        return "on request" if calls[0] in stops else None

    monkeypatch.setattr("epochal.training.loop.stop_reason", stop_reason)
    for step in stops:
        with pytest.raises(Stopped, match=f"cut at step {step} of 48: on request"):
            train(run, space)
    cut = trained(run, space)
    assert cut.results == whole.results
    assert cut.provenance["resumed_at"] == 47 and whole.provenance["resumed_at"] is None
    assert metrics(space, "cut") == metrics(space, "whole")
    one, other = weights(space, "whole"), weights(space, "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("averaging", ["last", "ema"])
def test_a_run_that_is_stopped_in_its_evaluations_reaches_the_same_record(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, averaging: str
) -> None:
    space, _, config = setup
    monkeypatch.setattr(loop, "EVALUATION_TOKENS", 1)  # one sequence in a batch
    settings = {"weight_averaging": averaging, "epochs": 1}
    whole = trained(tiny.run(config, name="whole", **settings), space)
    run, evaluate, number, batches = tiny.run(config, name="cut", **settings), loop.evaluate, [0], [0]
    last = len(whole.results["curve"])
    # The first evaluation twice, the last one, and that of the test split.
    stops = {1: whole.results["curve"][0][0], 2: whole.results["curve"][0][0], last + 2: run.steps, last + 4: run.steps}

    def counted(*arguments: Any) -> float | None:
        number[0], batches[0] = number[0] + 1, 0
        return evaluate(*arguments)

    def stop_reason() -> str | None:
        batches[0] += 1
        return "on request" if number[0] in stops and batches[0] == 2 else None

    monkeypatch.setattr(loop, "evaluate", counted)
    monkeypatch.setattr(loop, "stop_reason", stop_reason)
    for call, step in stops.items():
        with pytest.raises(Stopped, match=f"cut at step {step} of {run.steps}: on request"):
            train(run, space)
        assert number[0] == call, "stopped outside of an evaluation"
    assert trained(run, space).results == whole.results
    assert metrics(space, "cut") == metrics(space, "whole")
    one, other = weights(space, "whole"), weights(space, "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "choice",
    [Fira(lr=1e-2, gap=20), Spectra(base=AdamW(lr=1e-2), clip=1.0), Muon(lr=1e-2)],
    ids=["fira", "spectra", "muon"],
)
def test_matrix_optimizers_learn_resume_and_are_described_in_the_record(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: Optimizer
) -> None:
    space, _, config = setup
    runs = [tiny.run(config, name=name, optimizer=choice, wd_schedule="antiphase") for name in ("whole", "cut")]
    with caplog.at_level(logging.INFO):
        whole = trained(runs[0], space)
    matrices = 16 if isinstance(choice, Spectra) else 14
    assert f"whole: {type(choice).__name__} stepped {matrices} parameters as whole matrices" in caplog.text
    assert whole.provenance["matrices"] == matrices
    assert whole.provenance["state_bytes"] > 0 and 0 < whole.provenance["optimizer_share"] < 1
    assert whole.results["spectral_norms"].keys() >= {"q_proj", "lm_head"}
    assert whole.results["curve"][-1][1] < whole.results["curve"][0][1]
    stops = iter([None] * 20 + ["on request"])
    with monkeypatch.context() as patch:
        patch.setattr("epochal.training.loop.stop_reason", lambda: next(stops))
        with pytest.raises(Stopped, match="at step 21 of 48"):
            train(runs[1], space)
    assert trained(runs[1], space).results == whole.results


def test_decay_in_antiphase_is_applied_in_every_step(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _, config = setup
    seen: list[tuple[float, ...]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append(tuple(group["weight_decay"] for group in self.param_groups))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = tiny.run(config, epochs=1, wd=0.4, wd_schedule="antiphase")
    trained(run, space)
    rise = round(0.1 * run.steps)
    for number, (decayed, kept) in enumerate(seen):
        rate = number / rise if number < rise else 0.5 + 0.5 * math.cos(math.pi * (number - rise) / (run.steps - rise))
        assert decayed == pytest.approx(0.4 * (1.5 - rate)) and kept == 0.0
    assert len(seen) == run.steps


def test_saving_checkpoints_changes_no_result(setup: Setup) -> None:
    space, _, config = setup
    rarely = trained(tiny.run(config, name="rarely"), space)
    often = trained(tiny.run(config, name="often"), space, RuntimeOptions(checkpoint_seconds=0.0))
    assert often.results == rarely.results
    assert metrics(space, "often") == metrics(space, "rarely")


def test_more_evaluations_than_steps_are_one_after_each_step(setup: Setup) -> None:
    space, _, config = setup
    run = tiny.run(config, name="often", epochs=1)
    run = replace(run, num_evals=3 * run.steps)
    assert [step for step, _ in trained(run, space).results["curve"]] == list(range(1, run.steps + 1))


def test_a_killed_run_resumes_from_the_last_intact_checkpoint(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space, _, config = setup
    whole = trained(tiny.run(config, name="whole"), space)
    run, calls = tiny.run(config, name="cut"), [0]

    def killed() -> None:
        calls[0] += 1
        if calls[0] == 33:
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr("epochal.training.loop.stop_reason", killed)
        with pytest.raises(SystemExit):
            train(run, space, RuntimeOptions(checkpoint_seconds=0.0))
    folder = space.folder("cut")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train_lo')  # half a line
    newest = max((folder / "checkpoints").glob("step-*"))
    saved = AutoModelForCausalLM.from_pretrained(newest, local_files_only=True).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in load_file(newest / "model.safetensors").items())
    assert AutoTokenizer.from_pretrained(newest).model_max_length == run.sequence_length
    (newest / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        cut = trained(run, space)
    assert f"{newest} is damaged" in caplog.text
    assert cut.provenance["resumed_at"] == 31
    assert cut.results == whole.results
    assert metrics(space, "cut") == metrics(space, "whole")


def test_a_diverging_run_ends_with_the_status_diverged(setup: Setup) -> None:
    space, _, config = setup
    run = tiny.run(config, name="up", lr=100.0, wd=1000.0)
    record = trained(run, space)
    assert record.status == "diverged"
    assert record.results["loss"] is None and record.results["train_loss"] is None
    assert record.results["test_loss"] is None
    assert record.results["steps"] < run.steps
    assert all(math.isfinite(loss) for _, loss in record.results["curve"])
    assert not (space.folder("up") / "model").exists()
    write_record(space, record)
    again = load_records(space).named("up")
    assert again is not None and again.loss == math.inf


def test_seeds_change_the_result_and_nothing_else_does(setup: Setup) -> None:
    space, _, config = setup
    base = tiny.run(config, epochs=1)
    losses = {}
    for name, changes in {"a": {}, "b": {}, "init": {"init_seed": 1}, "order": {"order_seed": 1}}.items():
        torch.manual_seed(len(name))
        losses[name] = trained(replace(base, name=name, **changes), space).results["loss"]
    assert losses["a"] == losses["b"]
    assert len({losses["a"], losses["init"], losses["order"]}) == 3


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, RuntimeOptions(micro_batch=3), "micro-batch 3 does not divide the 4 sequences"),
        ({"unique_tokens": 128_000_000}, RuntimeOptions(), "above the"),
        ({"model": "w61"}, RuntimeOptions(), r"configs/models has no 'w61' \(did you mean"),
        ({"data": "kvj"}, RuntimeOptions(), r"has no 'kvj' \(did you mean 'kjv'\?\)"),
    ],
)
def test_a_run_that_does_not_fit_its_data_model_or_processes_is_refused(
    setup: Setup, changes: dict[str, Any], options: RuntimeOptions, message: str
) -> None:
    space, _, config = setup
    with pytest.raises(ValueError, match=message):
        train(tiny.run(config, **changes), space, options)


def test_a_resumed_process_continues_its_own_sum_of_losses() -> None:
    """The logged loss is equal to the last bit after a resume; with another number of processes by rounding."""
    losses = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))

    def summed(rank: int, steps: range, start: float) -> Any:
        progress = Progress(0, [], _sum=start)
        for step in steps:
            progress.add(losses[rank, step])
        return progress._sum

    cut = [float(summed(rank, range(6), 0.0)) for rank in range(2)]
    for rank in range(2):
        whole = summed(rank, range(10), 0.0)
        assert torch.equal(summed(rank, range(6, 10), own_sum(cut, rank, 2)), whole)
    assert own_sum(cut, 3, 4) == pytest.approx(losses[:, :6].sum().item() / 2, rel=1e-6)


class OneOfTwo:
    """One of two processes; the other one is due to save and has a stop request when it is given one."""

    world, other = 2, None

    def gather(self, value: tuple[str | None, bool, float]) -> list[tuple[str | None, bool, float]]:
        return [value, (self.other, True, 0.01)]


def test_all_processes_save_as_soon_as_one_is_due() -> None:
    """Their clocks differ, and saving is a collective."""
    stopper = Stopper(OneOfTwo(), checkpoint_seconds=1e9)  # type: ignore[arg-type]
    assert stopper.poll() == (None, True)


def test_a_stop_that_processes_agreed_on_stays() -> None:
    """Within an evaluation it ends the evaluation, and behind it the run: all of them must leave at both places."""
    one = OneOfTwo()
    stopper = Stopper(one, checkpoint_seconds=1e9)  # type: ignore[arg-type]
    one.other = "SIGTERM"  # type: ignore[assignment]
    stopper.poll_next()
    assert stopper.poll() == stopper.poll() == ("another process was asked to stop (SIGTERM)", True)
