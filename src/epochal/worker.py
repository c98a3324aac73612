"""One worker of a campaign: plan, claim, run, again, until nothing is left.

Any number of workers on any number of machines may share a folder. A job is claimed by an exclusive lock (flock) on its
lock file, which the kernel drops when the process ends however it ends, so there is nothing to expire and no clock; the
result is a record that is renamed into place. Workers speak to their parent in JSON lines on standard output.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epochal.campaign import campaign_jobs, flops_of
from epochal.config import from_table, to_table, write_atomic
from epochal.records import Record, Workspace, load_records, needed, write_record
from epochal.run import Ensemble, Job, Run, Samples, Targets
from epochal.scale import load_scale
from epochal.stopping import EXIT_STOPPED, Stopped, check_stop, listen, stop_reason

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a worker is told: which campaign, and how fast (never what)."""

    session: str
    scale: str
    recipes: tuple[str, ...]
    results: str
    work: str
    threads: int
    profile: str | None = None
    micro_batch: int | None = None
    trackers: tuple[str, ...] = ()
    checkpoint_seconds: float = 300.0
    seconds_left: float | None = None
    parent: int | None = None

    @property
    def workspace(self) -> Workspace:
        """The folders of the campaign."""
        return Workspace(Path(self.scale).name.removesuffix(".toml"), Path(self.results), Path(self.work))


def main() -> int:
    """Run a worker with the orders on standard input; returns its exit code."""
    orders = from_table(json.load(sys.stdin), Orders, where="orders")
    deadline = float("inf") if orders.seconds_left is None else time.monotonic() + orders.seconds_left
    listen(deadline=deadline, parent=orders.parent)
    say = _events()
    _prepare_process(orders)
    try:
        return work(orders, say)
    except Stopped:
        return EXIT_STOPPED
    except ValueError as error:
        say({"event": "error", "message": str(error)})
        return 2
    except OSError as error:  # a disk so full that not even a failure can be written
        say({"event": "error", "message": f"{error}; make room, then run again."})
        return 1


def work(orders: Orders, say: Any) -> int:
    """Run ready jobs until none is left that this worker could do; returns 1 if one failed, else 0."""
    workspace, scale = orders.workspace, load_scale(orders.scale)
    while True:
        check_stop()
        records = load_records(workspace)
        jobs = campaign_jobs(orders.recipes, records, scale)
        ready = [job for job in needed(jobs, records) if not _failed(workspace, job, orders.session)]
        if not ready:
            return int(any(_failed(workspace, job, orders.session) for job in jobs))
        for job in sorted(ready, key=_urgency, reverse=True):
            with claim(workspace, job) as mine:
                if mine and _still_needed(job, orders, scale):
                    run_job(job, orders, say)
                    break
        else:
            time.sleep(POLL_SECONDS)  # every ready job is in other hands


def _urgency(job: Job) -> tuple[float, str]:
    """Order of the ready jobs: what is cheap and unlocks others first, then the longest."""
    return (flops_of(job) if isinstance(job, Run) else float("inf"), job.name)


def _still_needed(job: Job, orders: Orders, scale: Any) -> bool:
    """Look again after the claim: another worker may have finished the job in between."""
    records = load_records(orders.workspace)
    return any(other.name == job.name for other in needed(campaign_jobs(orders.recipes, records, scale), records))


@contextmanager
def claim(workspace: Workspace, job: Job) -> Iterator[bool]:
    """Try to claim a job; gives False when it is in other hands. The lock file stays: only the lock counts."""
    path = workspace.work / workspace.scale / "locks" / f"{job.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # A process started for the job inherits the lock: while it lives, the job is taken, whoever else dies.
        os.set_inheritable(file.fileno(), True)
        yield True


def run_job(job: Job, orders: Orders, say: Any) -> None:
    """Run one claimed job and write its record; a failure is written to the job's folder, not raised."""
    workspace, started = orders.workspace, time.monotonic()
    say({"event": "started", "name": job.name})
    try:
        if isinstance(job, Run) and orders.profile is not None:
            _launch(job, orders)
            record = load_records(workspace).named(job.name)
            assert record is not None
        else:
            found = execute(job, orders)
            assert found is not None
            record = found
            write_record(workspace, record)
    except Stopped:
        raise
    except Exception as error:
        folder = workspace.folder(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        text = {"session": orders.session, "error": str(error), "traceback": traceback.format_exc()}
        write_atomic(folder / "failure.json", json.dumps(text, indent=1))
        say({"event": "failed", "name": job.name, "message": str(error) or type(error).__name__})
        return
    (workspace.folder(job.name) / "failure.json").unlink(missing_ok=True)
    seconds = round(time.monotonic() - started, 2)
    say(
        {
            "event": "done",
            "name": job.name,
            "loss": record.results.get("loss"),
            "status": record.status,
            "seconds": seconds,
            "flops": flops_of(job),
        }
    )


def execute(job: Job, orders: Orders) -> Record | None:
    """Do one job in this process and return its record (None on processes that are not the main one)."""
    workspace = orders.workspace
    match job:
        case Run():
            from epochal.train import Pace, train

            pace = Pace(orders.micro_batch, orders.trackers, orders.checkpoint_seconds, orders.profile or "here")
            return train(job, workspace, pace)
        case Ensemble():
            from epochal.ensemble import evaluate_ensemble

            return evaluate_ensemble(job, workspace, load_records(workspace))
        case Samples():
            from epochal.generate import sample

            return sample(job, workspace, load_records(workspace))
        case Targets():
            from epochal.targets import compute_targets

            return compute_targets(job, workspace, load_records(workspace))


def _launch(run: Run, orders: Orders) -> None:
    """Train one Run on the processes of an accelerate profile; raises when it fails, Stopped when it was stopped."""
    folder = orders.workspace.folder(run.name)
    path = folder / "run.json"
    write_atomic(path, json.dumps({"run": to_table(run), "orders": asdict(orders)}, indent=1))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(orders.profile)]
    process = subprocess.Popen(
        [*command, "-m", "epochal.cli", "train", str(path)], close_fds=False, stdin=subprocess.DEVNULL
    )
    while process.poll() is None:
        if stop_reason() is not None:
            process.terminate()
            process.wait()
            check_stop()
        time.sleep(0.1)
    if process.returncode == EXIT_STOPPED:
        raise Stopped(f"{run.name} was stopped")
    if process.returncode != 0:
        raise RuntimeError(f"{run.name}: accelerate launch ended with exit code {process.returncode}")


def _failed(workspace: Workspace, job: Job, session: str) -> bool:
    """Whether a job failed in this session: it is tried again in the next, not in a circle."""
    try:
        text = json.loads((workspace.folder(job.name) / "failure.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(text.get("session") == session)


def _events() -> Any:
    """Keep standard output for events and send everything else that is printed to standard error (the log)."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        try:
            channel.write(json.dumps(event) + "\n")
            channel.flush()
        except OSError:
            pass  # the parent is gone; the next look at `stop_reason` says so

    return say


def _prepare_process(orders: Orders) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(orders.threads)
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
