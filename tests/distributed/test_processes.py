"""`epochal train` under `accelerate launch`, as a worker starts it: losses, signals, exit codes, errors."""

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

from epochal import cli
from epochal.campaign import worker
from epochal.distributed.launcher import exit_code
from epochal.records import load_records
from epochal.run import AdamW, Spectra
from epochal.stopping import EXIT_STOPPED
from epochal.training.checkpoint import newest_checkpoint
from epochal.training.loop import train


# benchmarks/parity.csv has every preset; these two have several launchers, and weights that no process holds whole.
@pytest.mark.parametrize(("preset", "sharding"), [("zero3-offload", "zero3"), ("fsdp2-nodes", "fsdp2")])
def test_a_launched_run_has_the_losses_of_one_process(tmp_path: Path, preset: str, sharding: str) -> None:
    space, _, config = tiny.workspace(tmp_path)
    changes: dict[str, Any] = {"epochs": 1, "optimizer": Spectra(base=AdamW(lr=1e-2), clip=1.0)}
    alone = train(tiny.run(config, name="alone", **changes), space)
    assert alone is not None

    run = tiny.run(config, name="launched", **changes)
    codes, output = launch(preset, write_job(tmp_path, run, space, preset), 2)
    assert not any(codes), output

    record = load_records(space).named("launched")
    assert record is not None and record.status == "done"
    assert record.provenance["world_size"] == 2
    assert record.provenance["preset"] == preset
    assert record.provenance["sharding"] == sharding
    assert record.provenance["matrices"] == 16
    assert record.provenance["update_error"] is not None
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


def test_a_signal_saves_on_all_processes_and_ends_with_75(tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = tiny.run(config, name="long", epochs=400)
    job = write_job(tmp_path, run, space, "ddp2")
    process = subprocess.Popen(
        command("ddp2", job, 2), env=ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = space.folder("long") / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # torch's own launcher does not forward it
    _, output = process.communicate(timeout=200)
    assert process.returncode == EXIT_STOPPED, output
    assert "run again to continue" in output
    checkpoints = list(space.folder("long").glob("checkpoints/*"))
    assert len(checkpoints) == 1 and checkpoints[0].name.startswith("step-")
    assert {file.name for file in checkpoints[0].iterdir()} >= {"optimizer-0.safetensors", "optimizer-1.safetensors"}
    meaning = json.loads((space.folder("long") / "meaning.json").read_text())
    assert newest_checkpoint(space.folder("long") / "checkpoints", meaning, warn=pytest.fail) == checkpoints[0]


@pytest.mark.parametrize(
    ("codes", "expected"), [([75, 75], 75), ([75, -15], 75), ([2, -9], 2), ([1, 75], 1), ([-9], 1), ([1], 1)]
)
def test_a_launch_exits_with_the_code_its_processes_agree_on(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_a_launched_process_that_is_refused_writes_its_error_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    space, _, config = tiny.workspace(tmp_path)
    job = write_job(tmp_path, tiny.run(config, name="refused"), space, "ddp2")
    space.folder("refused").mkdir(parents=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate passes a preset
    monkeypatch.setattr(cli, "listen", lambda **_: None)
    monkeypatch.setattr(cli, "_exit", leave)
    with pytest.raises(SystemExit, match="2"):
        cli.train([str(job)])
    error = (space.folder("refused") / worker.ERROR_FILE).read_text()
    assert error == "the preset sets mixed_precision to 'bf16', but the Run sets the precision; write 'no'."


def test_a_worker_reports_the_error_file_of_a_launched_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's event, which `epochal run` prints, has the error message and not an exit code."""
    space, _, config = tiny.workspace(tmp_path)
    script = (
        f"import sys; open({str(space.folder('refused') / worker.ERROR_FILE)!r}, 'w').write('refused'); sys.exit(2)"
    )
    monkeypatch.setattr(worker, "launch_command", lambda _: [sys.executable, "-c", script])
    options = worker.WorkerConfig(
        session="s", scale="tiny", recipes=(), results=str(space.results), work=str(space.work), threads=1, preset="p"
    )
    events: list[dict[str, Any]] = []
    worker.run_job(tiny.run(config, name="refused"), options, events.append, {})
    assert [event["event"] for event in events] == ["started", "failed"]
    assert events[1]["message"] == "refused"
    assert sorted(file.name for file in space.folder("refused").iterdir()) == [
        "failure.json",
        "meaning.json",
        "run.json",
    ]


def test_the_first_error_of_a_launched_run_is_reported(tmp_path: Path) -> None:
    worker.write_error_file(tmp_path, RuntimeError("no space left"))
    worker.write_error_file(tmp_path, RuntimeError("connection closed by peer"))
    assert worker._take_error_file(tmp_path) == "no space left" and worker._take_error_file(tmp_path) == ""
