"""A Run under `accelerate launch` with a committed profile, as a worker starts it, on processes of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny

from epochal.config import REPOSITORY, to_table
from epochal.records import Workspace, load_records
from epochal.run import Fira, Run
from epochal.training.loop import train

ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def command(profile: str, run_json: Path, world: int, *options: str) -> list[str]:
    """What `epochal.campaign.worker` runs for a profile, on fewer processes where it names eight."""
    config = REPOSITORY / "configs" / "accelerate" / f"{profile}.yaml"
    launcher = [
        sys.executable,
        "-m",
        "epochal.distributed.launcher",
        "--config_file",
        str(config),
        "--num_processes",
        str(world),
    ]
    return [*launcher, *options, "-m", "epochal.cli", "train", str(run_json)]


def commands(profile: str, run_json: Path, world: int) -> list[list[str]]:
    """One command, or for a profile of several machines one for each of two, as their users would type them."""
    if not profile.endswith("-nodes"):
        return [command(profile, run_json, world)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return [command(profile, run_json, world, *there, "--machine_rank", str(rank)) for rank in range(2)]


def launch(profile: str, run_json: Path, world: int) -> tuple[list[int], str]:
    """Run a profile's commands beside each other; returns their exit codes and all that they said."""
    launched = [
        subprocess.Popen(
            words,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in commands(profile, run_json, world)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in launched]
    finally:
        for process in launched:
            process.kill()
    return [process.returncode for process in launched], "\n".join(said)


def write_job(folder: Path, run: Run, space: Workspace, profile: str, **changes: Any) -> Path:
    """What a worker hands to the processes that it launches."""
    config = {"session": "s", "scale": "tiny", "recipes": [], "threads": 1, "preset": profile, "micro_batch": 1}
    config |= {"results": str(space.results), "work": str(space.work), **changes}
    run_json = folder / "run.json"
    run_json.write_text(json.dumps({"run": to_table(run), "config": config}), encoding="utf-8")
    return run_json


def launched_and_alone(profile: str, folder: Path, world: int) -> dict[str, Any]:
    """Train a tiny Run under a profile and in this process; returns how far the losses are apart, and what was on."""
    space, _, config = tiny.workspace(folder)
    changes: dict[str, Any] = {"epochs": 1, "optimizer": Fira(lr=1e-2, gap=8)}
    alone = train(tiny.run(config, name="alone", **changes), space)
    run = tiny.run(config, name="launched", **changes)
    codes, said = launch(profile, write_job(folder, run, space, profile), world)
    assert not any(codes), said
    record = load_records(space).named("launched")
    assert record is not None and alone is not None and record.provenance["world_size"] == world
    losses = ("loss", "train_loss", "test_loss", "best_loss")
    return {
        "deviation": max(abs(record.results[key] - alone.results[key]) for key in losses),
        "on": record.provenance["sharding"],
        "matrices": record.provenance["matrices"],
        "proof": record.provenance["update_error"],
        "said": said,
    }
