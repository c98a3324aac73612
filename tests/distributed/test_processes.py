"""Several processes train the same model as one: `epochal train` under `accelerate launch`, as a worker starts it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from launching import ENVIRONMENT, command, launch, write_job
from safetensors.torch import load_file

from epochal.campaign import worker
from epochal.distributed.launcher import exit_code
from epochal.records import load_records
from epochal.run import AdamW, Spectra
from epochal.stopping import EXIT_STOPPED
from epochal.training.checkpoint import newest_checkpoint
from epochal.training.loop import train


@pytest.mark.parametrize(
    ("profile", "world", "sharding"),
    [("ddp2", 2, "replicated"), ("zero3-offload", 2, "zero3"), ("fsdp2-nodes", 2, "fsdp2")],
)
def test_a_launched_run_has_the_losses_of_one_process(tmp_path: Path, profile: str, world: int, sharding: str) -> None:
    space, _, config = tiny.workspace(tmp_path)
    # Every profile is launched in benchmarks/parity.py.
    # Masks belong to rows of the global batch, so noise is the same on any number of processes.
    noise = {"dropout": 0.1, "input_mask_prob": 0.5, "weight_averaging": "ema"} if profile == "ddp2" else {}
    changes = {"epochs": 1, "optimizer": Spectra(base=AdamW(lr=1e-2), clip=1.0), **noise}
    alone = train(tiny.run(config, name="alone", **changes), space)
    assert alone is not None

    run = tiny.run(config, name="launched", **changes)
    codes, said = launch(profile, write_job(tmp_path, run, space, profile), world)
    assert not any(codes), said

    record = load_records(space).named("launched")
    assert record is not None and record.status == "done"
    assert record.provenance["world_size"] == world
    assert record.provenance["profile"] == profile
    assert record.provenance["sharding"] == sharding
    assert record.provenance["matrices"] == 16
    assert (record.provenance["update_error"] is None) == (world == 1)
    for key in ("loss", "train_loss", "test_loss", "best_loss"):
        assert record.results[key] == pytest.approx(alone.results[key], abs=1e-5)
    assert record.results["spectral_norms"] == pytest.approx(alone.results["spectral_norms"], rel=1e-3)
    assert [step for step, _ in record.results["curve"]] == [step for step, _ in alone.results["curve"]]
    assert [loss for _, loss in record.results["curve"]] == pytest.approx(
        [loss for _, loss in alone.results["curve"]], abs=1e-5
    )
    weights = [load_file(space.folder(name) / "model" / "model.safetensors") for name in ("alone", "launched")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert float((weight - weights[1][name]).abs().max()) < 1e-4, name
    lines = (space.folder("launched") / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and len(lines) == 2 + 4, "one process writes the metrics"


@pytest.mark.parametrize(("profile", "number"), [("ddp2", signal.SIGTERM), ("zero2", signal.SIGUSR1)])
def test_a_signal_saves_on_all_processes_and_ends_with_75(tmp_path: Path, profile: str, number: int) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = tiny.run(config, name="long", epochs=400)
    job = write_job(tmp_path, run, space, profile)
    process = subprocess.Popen(
        command(profile, job, 2), env=ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = space.folder("long") / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=200)
    assert process.returncode == EXIT_STOPPED, said
    assert "run again to continue" in said
    checkpoints = list(space.folder("long").glob("checkpoints/*"))
    assert len(checkpoints) == 1 and checkpoints[0].name.startswith("step-")
    assert {file.name for file in checkpoints[0].iterdir()} >= {"optimizer-0.safetensors", "optimizer-1.safetensors"}
    assert newest_checkpoint(space.folder("long") / "checkpoints", warn=pytest.fail) == checkpoints[0]


@pytest.mark.parametrize(
    ("codes", "expected"), [([75, 75], 75), ([75, -15], 75), ([2, -9], 2), ([1, 75], 1), ([-9], 1), ([1], 1)]
)
def test_the_exit_code_of_a_launch_is_that_of_its_processes(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_why_a_launched_run_was_refused_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event that a worker sends, which is what `epochal run` prints, is the sentence and not an exit code."""
    space, _, config = tiny.workspace(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate hands a profile over
    monkeypatch.setattr(worker, "launch_command", lambda orders: [sys.executable])
    orders = worker.Orders(
        session="s", scale="tiny", recipes=(), results=str(space.results), work=str(space.work), threads=1, profile="p"
    )
    said: list[dict[str, Any]] = []
    worker.run_job(tiny.run(config, name="refused"), orders, said.append, {})
    assert [event["event"] for event in said] == ["started", "failed"]
    assert said[1]["message"] == "the profile sets mixed_precision to 'bf16'; a Run names its own: write 'no'."
    assert sorted(file.name for file in space.folder("refused").iterdir()) == ["failure.json", "run.json"]


def test_the_first_error_of_a_launched_run_is_the_one_that_counts(tmp_path: Path) -> None:
    worker.write_error_file(tmp_path, RuntimeError("no space left"))
    worker.write_error_file(tmp_path, RuntimeError("connection closed by peer"))
    assert worker._take_error_file(tmp_path) == "no space left" and worker._take_error_file(tmp_path) == ""
