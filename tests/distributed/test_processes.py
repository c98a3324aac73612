"""Several processes train the same model as one: `epochal train` under `accelerate launch`, as a worker starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from epochal.config import REPOSITORY, to_table
from epochal.records import load_records
from epochal.train import train

ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def launch(profile: str, run_json: Path) -> None:
    """What `epochal.worker` runs for a profile."""
    config = REPOSITORY / "configs" / "accelerate" / f"{profile}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*command, "-m", "epochal.cli", "train", str(run_json)],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("profile", "world"), [("cpu", 1), ("ddp2", 2)])
def test_a_launched_run_has_the_losses_of_one_process(tmp_path: Path, profile: str, world: int) -> None:
    space, _, config = tiny.workspace(tmp_path)
    # Masks belong to rows of the global batch, so noise is the same on any number of processes.
    changes = {"epochs": 1, "dropout": 0.1, "mask_inputs": 0.5, "weights": "ema"}
    alone = train(tiny.run(config, name="alone", **changes), space)
    assert alone is not None

    run = tiny.run(config, name="launched", **changes)
    orders = {"session": "s", "scale": "tiny", "recipes": [], "threads": 1, "profile": profile, "micro_batch": 1}
    orders |= {"results": str(space.results), "work": str(space.work)}
    run_json = tmp_path / "run.json"
    run_json.write_text(json.dumps({"run": to_table(run), "orders": orders}), encoding="utf-8")
    launch(profile, run_json)

    record = load_records(space).named("launched")
    assert record is not None and record.status == "done"
    assert record.provenance["world_size"] == world
    assert record.provenance["profile"] == profile
    for key in ("loss", "train_loss", "test_loss", "best_loss"):
        assert record.results[key] == pytest.approx(alone.results[key], abs=1e-5)
    assert [step for step, _ in record.results["curve"]] == [step for step, _ in alone.results["curve"]]
    assert [loss for _, loss in record.results["curve"]] == pytest.approx(
        [loss for _, loss in alone.results["curve"]], abs=1e-5
    )
    assert (space.folder("launched") / "model" / "model.safetensors").is_file()
    lines = (space.folder("launched") / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and len(lines) == 2 + 4, "one process writes the metrics"
