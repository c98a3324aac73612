"""One worker of a campaign: plan, claim, run, again, until nothing is left.

Any number of workers on any number of machines may share a folder. A job is claimed by an exclusive lock (flock) on its
lock file, which the kernel drops when the process ends however it ends, so there is nothing to expire and no clock; the
result is a record that is renamed into place. Workers speak to their parent in JSON lines on standard output.
"""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epochal.campaign.integrity import seal, set_aside_damaged_inputs
from epochal.campaign.plan import campaign_jobs, flops_of
from epochal.config import from_table, to_table, write_atomic
from epochal.records import Record, Records, Workspace, load_record, load_records, needed, write_record
from epochal.run import Ensemble, Job, Run, Samples, Targets
from epochal.scale import load_scale
from epochal.stopping import EXIT_STOPPED, Stopped, check_stop, listen, stop_reason

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a worker is told: which campaign, and how fast (never what).

    `only` names the jobs it may take (none: all), `nodes` the machines of one Run where Slurm gave it several, `retries`
    how often a job that failed is tried again in the same session, `grace_seconds` how long it may take to save itself.
    """

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
    only: tuple[str, ...] = ()
    nodes: int = 1
    retries: int = 0
    grace_seconds: float = 8.0

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
        mine_to_do = [job for job in needed(jobs, records) if not orders.only or job.name in orders.only]
        ready = [job for job in mine_to_do if not failed(workspace, job, orders)]
        if not ready:
            return int(any(failed(workspace, job, orders) for job in (mine_to_do if orders.only else jobs)))
        for job in sorted(ready, key=urgency, reverse=True):
            with claim(workspace, job) as mine:
                if mine and _still_needed(job, records):
                    if _inputs_are_sound(job, records, say):
                        run_job(job, orders, say, {other.name: other for other in jobs})
                    break
        else:  # every ready job is in other hands
            if orders.only:
                return 0  # an allocation is not for waiting in; whoever plans next looks again
            time.sleep(POLL_SECONDS)


def urgency(job: Job) -> tuple[float, str]:
    """Order of the ready jobs: what is cheap and unlocks others first, then the longest."""
    return (flops_of(job) if isinstance(job, Run) else float("inf"), job.name)


def _still_needed(job: Job, records: Records) -> bool:
    """Look again after the claim: another worker may have finished the job since `records` were read."""
    before, now = records.named(job.name), load_record(records.workspace, job.name)
    return now is None or (now == before and not records.has_output(job))


def _inputs_are_sound(job: Job, records: Records, say: Any) -> bool:
    """Check what a job reads; what is damaged is moved aside, so that the next plan makes it again."""
    said = set_aside_damaged_inputs(job, records)
    for message in said:
        say({"event": "note", "message": message})
    return not said


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


def run_job(job: Job, orders: Orders, say: Any, jobs: Mapping[str, Job]) -> None:
    """Run one claimed job and write its record; a failure is written to the job's folder, not raised.

    `jobs` are those of the campaign by name, for what a teacher among them costs.
    """
    workspace, started = orders.workspace, time.monotonic()
    attempt = workspace.folder(job.name) / "attempt.json"
    try:
        _begin_attempt(job, orders)
        say({"event": "started", "name": job.name})
        if isinstance(job, Run) and orders.profile is not None:
            _launch(job, orders)
            record = load_records(workspace).named(job.name)
            assert record is not None
        else:
            found = execute(job, orders)
            assert found is not None
            record = found
            seal(workspace, job)
            write_record(workspace, record)
    except Stopped:
        attempt.unlink(missing_ok=True)
        raise
    except Exception as error:
        _write_failure(job, orders, str(error), traceback.format_exc())
        attempt.unlink(missing_ok=True)
        say({"event": "failed", "name": job.name, "message": str(error) or type(error).__name__})
        return
    for name in ("attempt.json", "failure.json"):
        (workspace.folder(job.name) / name).unlink(missing_ok=True)
    seconds = round(time.monotonic() - started, 2)
    say(
        {
            "event": "done",
            "name": job.name,
            "loss": record.results.get("loss"),
            "status": record.status,
            "seconds": seconds,
            "flops": flops_of(job, jobs=jobs),
        }
    )


def execute(job: Job, orders: Orders) -> Record | None:
    """Do one job in this process and return its record (None on processes that are not the main one)."""
    workspace = orders.workspace
    match job:
        case Run():
            from epochal.training.loop import RuntimeOptions, train

            options = RuntimeOptions(
                orders.micro_batch, orders.trackers, orders.checkpoint_seconds, orders.profile or "here"
            )
            return train(job, workspace, options)
        case Ensemble():
            from epochal.evaluation.ensembles import evaluate_ensemble

            return evaluate_ensemble(job, workspace, load_records(workspace))
        case Samples():
            from epochal.generation.sample import sample

            return sample(job, workspace, load_records(workspace))
        case Targets():
            from epochal.generation.soft_targets import compute_targets

            return compute_targets(job, workspace, load_records(workspace))


def _launch(run: Run, orders: Orders) -> None:
    """Train one Run on the processes of an accelerate profile; raises when it fails, Stopped when it was stopped."""
    folder = orders.workspace.folder(run.name)
    path = folder / "run.json"
    write_atomic(path, json.dumps({"run": to_table(run), "orders": asdict(orders)}, indent=1))
    for note in (STOP_NOTE, ERROR_FILE):
        (folder / note).unlink(missing_ok=True)
    process = subprocess.Popen(
        [*launch_command(orders), "-m", "epochal.cli", "train", str(path)], close_fds=False, stdin=subprocess.DEVNULL
    )
    while process.poll() is None:
        if stop_reason() is not None:
            _stop_launched(process, folder / STOP_NOTE, orders.grace_seconds)
        time.sleep(0.1)
    if process.returncode != 0:
        check_stop()
        if process.returncode == EXIT_STOPPED:  # a signal reached the run and not this worker
            raise Stopped(f"{run.name} was stopped")
        said = _take_error_file(folder)
        if process.returncode == 2 and said:  # a refusal is a sentence for people
            raise ValueError(said)
        said = said or "without a word (killed, or it could not start); see the worker's log"
        raise RuntimeError(f"{run.name}: accelerate launch ended with exit code {process.returncode}: {said}")


def _stop_launched(process: "subprocess.Popen[bytes]", note: Path, grace_seconds: float) -> None:
    """Let the processes of a run save themselves: a file asks them, on whatever node; a signal ends what is left.

    A signal to the launcher first would give them 30 seconds (torchrun's own limit), too few for a large checkpoint.
    """
    note.touch()
    try:
        process.wait(0.8 * grace_seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


STOP_NOTE = "stop"
"""A file in a run's folder that asks its processes to stop."""

ERROR_FILE = "error.txt"
"""A file in a run's folder with the error of the first of its processes that failed, for the worker that launched them."""


def write_error_file(folder: Path, error: BaseException) -> None:
    """Write the error of a launched process, unless another has; what fails after the first fails because of it."""
    with contextlib.suppress(OSError), (folder / ERROR_FILE).open("x", encoding="utf-8") as file:
        file.write(str(error) or type(error).__name__)


def _take_error_file(folder: Path) -> str:
    """Return the error that a launched process left, and remove it; empty when there is none."""
    try:
        said = (folder / ERROR_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    (folder / ERROR_FILE).unlink(missing_ok=True)
    return said


def failed(workspace: Workspace, job: Job, orders: Orders) -> bool:
    """Whether a job failed too often in this session: it is tried again in the next, not in a circle."""
    failure = _read_table(workspace.folder(job.name) / "failure.json")
    return failure.get("session") == orders.session and int(failure.get("attempts", 1)) > orders.retries


def _write_failure(job: Job, orders: Orders, error: str, trace: str) -> None:
    """Write the failure of a job to its folder, with how often it failed in this session."""
    path = orders.workspace.folder(job.name) / "failure.json"
    before = _read_table(path)
    attempts = 1 + (int(before.get("attempts", 1)) if before.get("session") == orders.session else 0)
    text = {"session": orders.session, "attempts": attempts, "error": error, "traceback": trace}
    write_atomic(path, json.dumps(text, indent=1))


SILENT_ENDS = 3
"""Starts of a job that may end without a word and without a new checkpoint (killed, out of memory) before it counts
as failed: a job that takes its machine down must not do so for ever."""


def _begin_attempt(job: Job, orders: Orders) -> None:
    """Note that the job has started; raises RuntimeError when its last starts all ended without a word.

    Called with the claim held. The note is removed by whoever ends in good order, so one that is found here
    belongs to a process that was killed.
    """
    path = orders.workspace.folder(job.name) / "attempt.json"
    mark = max((item.name for item in path.parent.glob("checkpoints/step-*")), default="")
    before = _read_table(path)
    same = before.get("session") == orders.session and before.get("mark") == mark
    silent = int(before.get("silent", 0)) + 1 if same else 0
    if silent >= SILENT_ENDS:
        raise RuntimeError(
            f"{job.name} ended {silent} times without a word or a new checkpoint (killed, out of memory, or its "
            f"machine went down); last on {before.get('host')}."
        )
    text = {"session": orders.session, "mark": mark, "silent": silent, "host": platform.node(), "pid": os.getpid()}
    write_atomic(path, json.dumps(text))


def _read_table(path: Path) -> dict[str, Any]:
    """Read a small JSON table; empty when there is none or it makes no sense."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def launch_command(orders: Orders) -> list[str]:
    """Return the command that starts a module on every process of a profile: accelerate, on several nodes under srun.

    The profile says what one node does. Each node must name its own rank, so the shell that srun starts there reads
    it; written into the command here it would be 0 everywhere (accelerate issue 2816).
    """
    options = ["--config_file", str(orders.profile)]
    if orders.nodes == 1:
        return [sys.executable, "-m", "epochal.distributed.launcher", *options]
    import yaml

    per_node = int(yaml.safe_load(Path(str(orders.profile)).read_text(encoding="utf-8")).get("num_processes", 1))
    options += ["--num_machines", str(orders.nodes), "--num_processes", str(orders.nodes * per_node)]
    options += ["--main_process_ip", socket.gethostname(), "--main_process_port", str(_free_port())]
    shell = 'exec "$0" -m epochal.distributed.launcher --machine_rank "$SLURM_NODEID" "$@"'
    srun = [
        "srun",
        f"--nodes={orders.nodes}",
        f"--ntasks={orders.nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    cores = os.environ.get("SLURM_CPUS_PER_TASK")  # which srun itself reads no more since Slurm 22.05
    srun += [f"--cpus-per-task={cores}"] if cores else []
    return [*srun, "--cpu-bind=none", "sh", "-c", shell, sys.executable, *options]


def _free_port() -> int:
    """Return a port that is free on this machine, where rank 0 will listen: the batch script runs on the first node."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


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
