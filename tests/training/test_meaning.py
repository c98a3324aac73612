"""State belongs to a meaning: a run resumes only what was made by the same job from the same inputs."""

import functools
import itertools
import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file

from epochal.config import REPOSITORY
from epochal.data.prepare import prepare
from epochal.meaning import meaning_of, set_aside, take_folder
from epochal.records import Record, Workspace, load_records, write_record
from epochal.run import AdamW, Muon, Run, fingerprint
from epochal.stopping import Stopped
from epochal.training import loop
from epochal.training.checkpoint import newest_checkpoint
from epochal.training.loop import RuntimeOptions, train


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny.workspace(folder)
    return folder


@pytest.fixture
def place(text: Path, tmp_path: Path) -> tuple[Workspace, Run]:
    """A workspace with a token store, and a run of 32 steps on a model file that may be edited."""
    shutil.copytree(text / "work", tmp_path / "work")
    shutil.copytree(text / "text", tmp_path / "text")
    shutil.copy(REPOSITORY / "configs" / "models" / "w16.json", tmp_path / "model.json")
    run = tiny.run(tmp_path / "text" / "tiny.toml", name="r", epochs=2, num_evals=2, model=str(tmp_path / "model.json"))
    return Workspace("tiny", tmp_path / "results", tmp_path / "work"), run


def stopped_at(step: int, run: Run, space: Workspace, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Train until a stop is requested after `step` steps."""
    polls = itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "stop_reason", lambda: "test" if next(polls) >= step else None)
        train(run, space, RuntimeOptions(**options))


def trained(run: Run, space: Workspace, **options: Any) -> Record:
    record = train(run, space, RuntimeOptions(**options))
    assert record is not None
    return record


def edit_model(run: Run) -> None:
    path = Path(run.model)
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 24}))


def edit_text(run: Run, space: Workspace) -> None:
    """Build the token store again from other text, with the same config."""
    (corpus,) = tomllib.loads(Path(run.data).read_text())["source"]["files"]
    before = Path(corpus).read_text()
    Path(corpus).write_text(before.replace("king", "queen"))
    shutil.rmtree(space.data)
    prepare(run.data, space.data)
    Path(corpus).write_text(before)


CHANGES: dict[str, tuple[Callable[[Run], Run], str]] = {
    "batch": (lambda run: replace(run, batch_size=8), "batch_size 4 instead of 8"),
    "rate": (lambda run: replace(run, optimizer=AdamW(lr=1e-3, wd=0.8)), "optimizer.lr 0.01 instead of 0.001"),
    "optimizer": (lambda run: replace(run, optimizer=Muon(lr=1e-2)), "optimizer.kind AdamW instead of Muon"),
    "warmup": (lambda run: replace(run, warmup=0.5), "warmup 0.1 instead of 0.5"),
    "precision": (lambda run: replace(run, precision="bf16"), "precision fp32 instead of bf16"),
    "order": (lambda run: replace(run, data_order="fixed"), "data_order documents instead of fixed"),
    "length": (lambda run: replace(run, sequence_length=16), "sequence_length 32 instead of 16"),
    "noise": (lambda run: replace(run, dropout=0.1), "dropout 0.0 instead of 0.1"),
    "model file": (lambda run: run, "model file "),
    "text": (lambda run: run, "text "),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_that_was_changed_while_it_was_stopped_starts_afresh_and_says_what_differs(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    space, run = place
    change, said = CHANGES[what]
    stopped_at(20, run, space, monkeypatch)
    if what == "model file":
        edit_model(run)
    if what == "text":
        edit_text(run, space)
    run = change(run)
    record = trained(run, space)
    scratch = trained(replace(run, name="scratch"), space)
    assert record.results == scratch.results, "a mixture of two runs"
    assert record.provenance["resumed_at"] is None
    assert said in caplog.text and "starting afresh" in caplog.text
    aside = space.folder("r") / "aside"
    assert (aside / "checkpoints" / "step-00000020").is_dir(), "what was there is kept"
    steps = [json.loads(line)["step"] for line in (space.folder("r") / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[0] <= 16, "metrics.jsonl holds steps of two runs"


def test_an_unchanged_run_resumes_and_nothing_is_set_aside(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space, run = place
    stopped_at(20, run, space, monkeypatch)
    record = trained(run, space)
    assert record.provenance["resumed_at"] == 20 and record.provenance["resumed_from_code"] is None
    assert record.results == trained(replace(run, name="scratch"), space).results
    assert not (space.folder("r") / "aside").exists() and caplog.text == ""


def test_weights_that_are_replaced_under_the_same_path_restart_a_run_that_begins_with_them(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    space, run = place
    trained(replace(run, name="base", epochs=1), space)
    folder = tmp_path / "elsewhere"
    shutil.copytree(space.folder("base") / "model", folder)
    run = replace(run, init_from=str(folder))
    stopped_at(20, run, space, monkeypatch)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, folder / "model.safetensors")
    assert trained(run, space).results == trained(replace(run, name="scratch"), space).results
    assert "weights to start from" in caplog.text


def test_a_run_made_again_restarts_what_begins_with_it(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The record of the input has the same name and another fingerprint."""
    space, run = place
    base = replace(run, name="base", epochs=1)
    write_record(space, trained(base, space))
    run = replace(run, init_from="base")
    stopped_at(20, run, space, monkeypatch)
    before = fingerprint(base)
    base = replace(base, warmup=0.5)
    write_record(space, trained(base, space))
    record = trained(run, space)
    assert record.results == trained(replace(run, name="scratch"), space).results
    assert f"input base {before} instead of {fingerprint(base)}" in caplog.text


def test_a_model_file_edited_during_a_run_leaves_the_record_of_what_was_trained(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = place
    before, polls = fingerprint(run), itertools.count(1)

    def edit() -> None:
        if next(polls) == 5:
            edit_model(run)

    monkeypatch.setattr(loop, "stop_reason", edit)
    record = trained(run, space)
    assert fingerprint(run) != before, "the file was edited"
    assert record.fingerprint == before == json.loads((space.folder("r") / "meaning.json").read_text())["fingerprint"]
    weights = load_file(space.folder("r") / "model" / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].shape[0] != 24
    write_record(space, record)
    with pytest.raises(ValueError, match="was made with another a model or data file"):
        load_records(space).get(run)


def test_a_checkpoint_copied_from_another_job_is_renamed_and_not_used(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = place
    stopped_at(20, run, space, monkeypatch)
    other = replace(run, warmup=0.3)
    folder, said = space.folder("r") / "checkpoints", list[str]()
    newest = functools.partial(newest_checkpoint, folder, warn=said.append)
    assert newest(meaning_of(run, space, load_records(space))) == folder / "step-00000020" and not said
    assert newest(meaning_of(other, space, load_records(space))) is None
    assert "warmup 0.1 instead of 0.3" in said[0] and "renamed to aside-step-00000020" in said[0]
    assert [path.name for path in folder.iterdir()] == ["aside-step-00000020"]


def test_a_process_killed_while_it_sets_state_aside_loses_none_of_it(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, run = place
    folder, records = space.folder("r"), load_records(space)
    take_folder(run, space, records)
    (folder / "model").mkdir()
    (folder / "checkpoints").mkdir()
    replace_path, calls = Path.replace, itertools.count()

    def killed(self: Path, target: Path) -> Path:
        if next(calls):
            raise KeyboardInterrupt
        return replace_path(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        set_aside(folder)
    take_folder(replace(run, warmup=0.3), space, records)
    assert sorted(path.name for path in (folder / "aside").iterdir()) == ["checkpoints", "meaning.json", "model"]
    assert json.loads((folder / "aside" / "meaning.json").read_text())["job"]["warmup"] == 0.1
    (folder / "samples.npy").touch()
    take_folder(replace(run, warmup=0.4), space, records)  # one earlier state is kept
    assert sorted(path.name for path in (folder / "aside").iterdir()) == ["meaning.json", "samples.npy"]


def test_a_checkpoint_of_another_version_of_the_code_is_used_and_recorded(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space, run = place
    with monkeypatch.context() as patch:
        patch.setattr(loop, "code_hash", lambda: "older")
        stopped_at(20, run, space, monkeypatch)
    record = trained(run, space)
    assert record.provenance["resumed_from_code"] == "older" != record.provenance["code"]
    assert "was written by another version of epochal" in caplog.text


def test_a_resumed_run_is_one_line_in_tensorboard(
    place: tuple[Workspace, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process has logged steps after its checkpoint; the resumed one logs them again."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    space, run = place
    tracked: dict[str, Any] = {"trackers": ("tensorboard",)}
    stopped_at(10, run, space, monkeypatch, **tracked)
    aside = space.folder("r").with_name("kept")
    shutil.copytree(space.folder("r") / "checkpoints", aside)
    stopped_at(15, run, space, monkeypatch, **tracked)  # logs step 20 at its end, then is killed: no checkpoint
    shutil.rmtree(space.folder("r") / "checkpoints")
    aside.rename(space.folder("r") / "checkpoints")
    trained(run, space, **tracked)
    (folder,) = (path for path in space.folder("r").iterdir() if path.is_dir() and any(path.glob("events.*")))
    events = accumulators.EventAccumulator(str(folder)).Reload()
    steps = [event.step for event in events.Scalars("train_loss")]
    assert steps == [10, 20, 30, 32], "a step is drawn twice"


def test_every_tracker_resumes_the_page_of_the_job(place: tuple[Workspace, Run]) -> None:
    """The same page for a resumed run, another one for a run of another meaning."""

    class Accelerator:
        def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, dict[str, Any]]) -> None:
            self.settings = init_kwargs

    class Processes:
        accelerator = Accelerator()

    def settings(mark: str, step: int) -> dict[str, Any]:
        options = RuntimeOptions(trackers=("tensorboard", "wandb", "trackio"))
        loop._start_trackers(place[1], Processes(), options, {"fingerprint": mark}, step)  # type: ignore[arg-type]
        return Processes.accelerator.settings

    fresh, resumed, other = settings("a" * 16, 0), settings("a" * 16, 7), settings("b" * 16, 0)
    assert fresh["wandb"] == resumed["wandb"] == {"name": "r", "id": "r-aaaaaaaaaaaaaaaa", "resume": "allow"}
    assert fresh["trackio"] == resumed["trackio"] != other["trackio"] and other["wandb"]["id"] != fresh["wandb"]["id"]
    assert fresh["tensorboard"] == {"purge_step": None} and resumed["tensorboard"] == {"purge_step": 8}
