"""A campaign worker: plan, claim a job, run it, and repeat until no job is left.

Any number of workers on any number of machines may share a folder. A worker claims a job with an exclusive lock (flock) and
writes its result as a record. Events go to the parent process as JSON lines on standard output.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from epochal.campaign.integrity import check_inputs_unchanged, quarantine_corrupt_inputs, write_checksums
from epochal.campaign.plan import campaign_jobs, flops_of, ready_jobs
from epochal.config import LONGEST_SECONDS, changed, from_table, to_table, write_atomic
from epochal.distributed.launcher import ERROR_FILE_VARIABLE, PARENT_VARIABLE
from epochal.distributed.presets import processes_of
from epochal.meaning import take_folder
from epochal.ranges import Batch, Range, Ranged
from epochal.records import Record, Records, Workspace, load_record, load_records, read_table, write_record
from epochal.run import Ensemble, Job, Run, Samples, Targets
from epochal.scale import Scale, load_scale
from epochal.stopping import EXIT_STOPPED, SAVE_SECONDS, Stopped, check_stop, listen, nothing_to_save, stop_reason

POLL_SECONDS = 0.5
TICK_SECONDS = 0.2  # between looks at a process that was asked to stop

# Give up on a job after this many crashes without an error message or a new checkpoint.
MAX_SILENT_CRASHES = 3

# A file in a run's folder that asks its processes to stop.
STOP_NOTE = "stop"

# Sends one event to the parent process.
Emit = Callable[[dict[str, Any]], None]


Seconds = Annotated[float, Range(0.0, LONGEST_SECONDS)]
Nodes = Annotated[int, Range(1, 10_000)]
Retries = Annotated[int, Range(0, 1000)]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(Ranged):
    """Which campaign a worker runs, and with which resources; nothing here changes a result."""

    session: str  # id of one `epochal run`; a job that failed is tried again in the next session
    scale: str
    recipes: tuple[str, ...]
    results: str
    work: str
    threads: Annotated[int, Range(1, 100_000)]  # of torch, on a CPU
    preset: str | None = None  # an accelerate YAML; each Run is then trained by the processes it launches
    micro_batch: Batch | None = None  # sequences per forward pass and process
    modes: tuple[str, ...] = ()  # execution modes of Runs (`epochal.distributed.presets.MODES`)
    trackers: tuple[str, ...] = ()
    checkpoint_seconds: Seconds = 300.0
    seconds_left: Seconds | None = None  # time limit
    parent: Annotated[int, Range(0, 2**62)] | None = None  # process id; the worker stops when its parent ends
    only: tuple[str, ...] = ()  # names of the jobs the worker may take (empty: all)
    nodes: Nodes = 1  # machines per Run, above 1 inside a Slurm allocation only
    retries: Retries = 0  # of a failed job in the same session
    grace_seconds: Seconds = 8.0  # time a job gets at least to save a checkpoint before it is killed
    rank_timeout: Seconds = 1800.0  # after which a rank that does not answer ends its run

    @property
    def workspace(self) -> Workspace:
        """The folders of the campaign."""
        return Workspace(Path(self.scale).name.removesuffix(".toml"), Path(self.results), Path(self.work))


def main() -> int:
    """Run a worker with the WorkerConfig on standard input; returns its exit code."""
    config = from_table(json.load(sys.stdin), WorkerConfig, where="worker config")
    deadline = float("inf") if config.seconds_left is None else time.monotonic() + config.seconds_left
    # Before torch is imported, which takes seconds: a stop request must not be lost.
    listen(deadline=deadline, parent=config.parent)
    emit = _events()
    try:
        with nothing_to_save():
            _prepare_process(config)
        return work(config, emit)
    except Stopped:
        return EXIT_STOPPED
    except ValueError as error:
        emit({"event": "error", "message": str(error)})
        # 2 is "wrong use": the parent prints the sentence without a traceback.
        return 2
    except OSError as error:  # the disk is so full that even failure.json cannot be written
        emit({"event": "error", "message": f"{error}; free some space, then run again."})
        return 1


def work(config: WorkerConfig, emit: Emit) -> int:
    """Run ready jobs until this worker can do no more; returns 1 if a job failed, else 0."""
    workspace, scale, said = config.workspace, load_scale(config.scale), False
    while True:
        check_stop()
        if not said and (message := _edited(config.scale, scale)):
            emit({"event": "note", "message": message})
            said = True
        records = load_records(workspace)
        # Planned again after every job: recipes are functions of the records, and another worker may have added
        # some.
        jobs = campaign_jobs(config.recipes, records, scale)
        allowed = [job for job in ready_jobs(jobs, records) if not config.only or job.name in config.only]
        ready = [job for job in allowed if not has_failed(workspace, job, config)]
        if not ready:
            # A job that a retry finished has not failed. One without a record may have failed and not be ready.
            unfinished = allowed if config.only else [*allowed, *(job for job in jobs if records.get(job) is None)]
            return int(any(has_failed(workspace, job, config) for job in unfinished))
        with claim_next(ready, records) as job:
            if job is not None:
                # Corrupt inputs were moved aside: the next plan recomputes them first.
                if not _corrupt_inputs(job, records, emit):
                    run_job(job, config, emit, {other.name: other for other in jobs})
                continue
        # All ready jobs are claimed by other workers.
        if config.only:
            return 0  # do not idle on a cluster allocation; the next planner run resubmits
        time.sleep(POLL_SECONDS)


def _edited(path: str, scale: Scale) -> str | None:
    """Return a sentence if the file of a scale has changed since it was read."""
    try:
        now = load_scale(path)
    except ValueError as error:
        return f"the scale was edited while its campaign runs, and is no longer valid ({error}); this start does not use it."
    if now == scale:
        return None
    changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed(to_table(scale), to_table(now)).items())
    return (
        f"scale {path} was edited while its campaign runs ({changes}); this start does not use it, the next one will."
    )


def urgency(job: Job) -> tuple[float, str]:
    """Sort key of ready jobs, most urgent last: long runs, then the cheap jobs that unlock others."""
    # Of the runs the longest starts first, so that it does not end long after all others.
    return (flops_of(job) if isinstance(job, Run) else float("inf"), job.name)


@contextmanager
def claim_next(ready: Sequence[Job], records: Records) -> Iterator[Job | None]:
    """Claim the most urgent job that is free and still needed; yields None if there is none."""
    for job in sorted(ready, key=urgency, reverse=True):
        with claim(records.workspace, job) as claimed:
            # Between reading the records and the claim another worker may have finished the job.
            if claimed and _still_needed(job, records):
                yield job
                return
    yield None


def claim(workspace: Workspace, job: Job) -> AbstractContextManager[bool]:
    """Try to claim a job; enters with False if another process holds the claim."""
    return claim_name(workspace, job.name)


@contextmanager
def claim_name(workspace: Workspace, name: str) -> Iterator[bool]:
    """Try to claim the job of this name; yields False if another process holds the claim."""
    # The kernel releases a lock when its process ends, however it ends, so claims need no expiry and no clock.
    path = _lock_path(workspace, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is never deleted: otherwise two processes could lock two files of the same name.
    with path.open("a") as file:
        if not _lock(file, fcntl.LOCK_EX) or not _ranks_are_gone(path):
            yield False
            return
        # The launcher of a run inherits the lock; its ranks, which do not, hold their own.
        os.set_inheritable(file.fileno(), True)
        yield True


def _lock_path(workspace: Workspace, name: str) -> Path:
    return workspace.work / workspace.scale / "locks" / f"{name}.lock"


def _lock(file: IO[str], kind: int) -> bool:
    """Lock a file without waiting; False if another process holds it, ValueError if the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        raise ValueError(
            f"the file system of {file.name} has no file locks ({error.strerror}), by which workers claim jobs; choose a "
            "--work on a local disk, or mount it with locks (Lustre: flock, NFS: without nolock)."
        ) from None
    return True


def _ranks_are_gone(path: Path) -> bool:
    """Whether no rank of an earlier start still trains the job: a killed launcher leaves its ranks to finish a step."""
    with path.with_suffix(".ranks").open("a") as file:
        return _lock(file, fcntl.LOCK_EX)  # released when closed, before ranks of this start need it


@contextmanager
def claim_of_rank(workspace: Workspace, name: str) -> Iterator[None]:
    """Keep a job claimed while this rank lives, whatever happens to its launcher and worker."""
    path = _lock_path(workspace, name).with_suffix(".ranks")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # Shared among the ranks. Waits for a worker that looks at it in this moment.
        while not _lock(file, fcntl.LOCK_SH):
            check_stop()
            time.sleep(0.05)
        yield


def _still_needed(job: Job, records: Records) -> bool:
    # Also true if the record is old and unchanged, but its output is missing on this disk.
    before, now = records.named(job.name), load_record(records.workspace, job.name)
    return now is None or (now == before and not records.has_output(job))


def _corrupt_inputs(job: Job, records: Records, emit: Emit) -> bool:
    messages = quarantine_corrupt_inputs(job, records)
    for message in messages:
        emit({"event": "note", "message": message})
    return bool(messages)


def run_job(job: Job, config: WorkerConfig, emit: Emit, jobs_by_name: Mapping[str, Job]) -> None:
    """Run one claimed job and write its record; a failure is written to the job's folder, not raised.

    `jobs_by_name` are the jobs of the campaign, needed to count the FLOPs of a teacher.
    """
    folder, started = config.workspace.folder(job.name), time.monotonic()
    try:
        _begin_attempt(job, config)
        emit({"event": "started", "name": job.name})
        record = _run_and_record(job, config, emit)
    # A stop is not a failure: without attempt.json the next attempt does not count it as a crash.
    except Stopped:
        (folder / "attempt.json").unlink(missing_ok=True)
        raise
    # Any error of a job: the worker must survive it and go to the next job.
    except Exception as error:
        _write_failure(job, config, str(error), traceback.format_exc())
        (folder / "attempt.json").unlink(missing_ok=True)
        emit({"event": "failed", "name": job.name, "message": str(error) or type(error).__name__})
        return
    for name in ("attempt.json", "failure.json"):
        (folder / name).unlink(missing_ok=True)
    emit(
        {
            "event": "done",
            "name": job.name,
            "loss": record.results.get("loss"),
            "status": record.status,
            "seconds": round(time.monotonic() - started, 2),
            "flops": flops_of(job, jobs=jobs_by_name),
        }
    )


def _run_and_record(job: Job, config: WorkerConfig, emit: Emit) -> Record:
    workspace, records = config.workspace, load_records(config.workspace)
    if not isinstance(job, Ensemble):  # leaves no files
        # Here and not only where the files are written, so that the message reaches the terminal.
        _, message = take_folder(job, workspace, records)
        if message is not None:
            emit({"event": "note", "message": message})
    if isinstance(job, Run) and config.preset is not None:
        _launch(job, config)  # rank 0 writes the record
        record = load_records(workspace).named(job.name)
        assert record is not None
        return record
    record = execute(job, config)
    assert record is not None
    finish(record, workspace, records)
    return record


def finish(record: Record, workspace: Workspace, before: Records) -> Path:
    """Write the checksums and the record of a finished job; returns the record's path.

    Raises ValueError if an input was replaced since the records `before` were read.
    """
    check_inputs_unchanged(record.job, before)
    # Checksums first: a record says that the outputs are complete.
    write_checksums(workspace, record.job)
    path = write_record(workspace, record)
    # Checkpoints last: until the record is written, a failure must cost only the steps since the newest.
    shutil.rmtree(workspace.folder(record.job.name) / "checkpoints", ignore_errors=True)
    return path


def execute(job: Job, config: WorkerConfig) -> Record | None:
    """Run one job in this process; returns its record, or None on ranks other than 0."""
    workspace = config.workspace
    # Imported here because these load torch: planning must stay fast.
    match job:
        case Run():
            with nothing_to_save():
                from epochal.training.loop import RuntimeOptions, train

            options = RuntimeOptions(
                config.micro_batch,
                config.trackers,
                config.checkpoint_seconds,
                # The name alone: a record must not hold the paths of a machine.
                Path(config.preset).stem if config.preset else "here",
                config.modes,
                config.rank_timeout,
            )
            return train(job, workspace, options)
        case Ensemble():
            with nothing_to_save():
                from epochal.evaluation.ensembles import evaluate_ensemble

            return evaluate_ensemble(job, workspace, load_records(workspace))
        case Samples():
            with nothing_to_save():
                from epochal.generation.sample import sample

            return sample(job, workspace, load_records(workspace))
        case Targets():
            with nothing_to_save():
                from epochal.generation.soft_targets import compute_targets

            return compute_targets(job, workspace, load_records(workspace))


# --- runs of several processes ---------------------------------------------------------------------------------------


def _launch(run: Run, config: WorkerConfig) -> None:
    """Train one Run on the processes of a preset; raises if it fails, Stopped if it was stopped."""
    folder = config.workspace.folder(run.name)
    path = folder / "run.json"
    write_atomic(path, json.dumps({"run": to_table(run), "config": asdict(config)}, indent=1))
    # Notes of an earlier attempt would stop or fail this one.
    for note in (STOP_NOTE, ERROR_FILE):
        (folder / note).unlink(missing_ok=True)
    variables = {ERROR_FILE_VARIABLE: str(folder / ERROR_FILE)}
    if config.nodes == 1:  # srun starts the launchers of several nodes
        variables[PARENT_VARIABLE] = str(os.getpid())
    # close_fds=False: the lock of the claim is inherited.
    process = subprocess.Popen(
        [*launch_command(config), "-m", "epochal.cli", "train", str(path)],
        close_fds=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **variables},
    )
    while process.poll() is None:
        if stop_reason() is not None:
            _stop_launched(process, folder, config.grace_seconds)
        time.sleep(0.1)
    if process.returncode == 0:
        return
    check_stop()
    if process.returncode == EXIT_STOPPED:  # a signal reached the run but not this worker
        raise Stopped(f"{run.name} was stopped")
    message = _take_error_file(folder)
    if process.returncode == 2 and message:  # wrong use: the message is already a sentence for the user
        raise ValueError(message)
    message = message or "died without an error message (killed or out of memory); see the worker's log"
    raise RuntimeError(f"{run.name}: accelerate launch ended with exit code {process.returncode}: {message}")


def _stop_launched(process: "subprocess.Popen[bytes]", folder: Path, grace_seconds: float) -> None:
    """Ask the processes of a run to save and stop; terminate any that do not."""
    # A file reaches ranks on other nodes too. A signal to the launcher would leave them only 30 seconds (torchrun's
    # own limit), too short for a large checkpoint.
    (folder / STOP_NOTE).touch()
    patience = Patience([folder], 0.8 * grace_seconds)
    while patience.waits():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TICK_SECONDS)
            return
    process.terminate()
    # The launcher waits for ranks that take no signal, for example stopped ones.
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.wait()


class Patience:
    """How long to wait for jobs that were asked to save and stop.

    At least `grace_seconds`, at least three times the last save of each, and on while a checkpoint is being written.
    """

    def __init__(self, folders: Sequence[Path], grace_seconds: float) -> None:
        self.folders, self.grace_seconds, self._seen = folders, grace_seconds, self._written(folders)
        self.last_save = max((_seconds_in(folder / SAVE_SECONDS) for folder in folders), default=0.0)
        self._deadline = time.monotonic() + max(grace_seconds, 3 * self.last_save)

    def waits(self) -> bool:
        """Whether there is still reason to wait."""
        written = self._written(self.folders)
        if written and written != self._seen:
            self._deadline = max(self._deadline, time.monotonic() + self.grace_seconds)
        self._seen = written
        return time.monotonic() < self._deadline

    @staticmethod
    def _written(folders: Sequence[Path]) -> list[tuple[str, int]]:
        """Names and sizes of the files of checkpoints and models that are being written."""
        sizes, patterns = [], ("checkpoints/.*.tmp/*", ".*.tmp/*")
        for path in (path for folder in folders for pattern in patterns for path in folder.glob(pattern)):
            with contextlib.suppress(OSError):  # renamed in the meantime
                sizes.append((str(path), path.stat().st_size))
        return sorted(sizes)


@contextmanager
def ended_when_stuck(folder: Path, grace_seconds: float) -> Iterator[None]:
    """End this rank if it runs long after it was asked to stop.

    It has had time to save then. It may wait for a rank that was killed, and the launcher, which would end both, may have
    been killed too.
    """
    done = threading.Event()
    threading.Thread(target=_end_when_stuck, args=(folder, grace_seconds, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _end_when_stuck(folder: Path, grace_seconds: float, done: threading.Event) -> None:
    while stop_reason() is None:
        if done.wait(POLL_SECONDS):
            return
    patience = Patience([folder], grace_seconds)
    while patience.waits():
        if done.wait(TICK_SECONDS):
            return
    print(f"epochal: asked to stop ({stop_reason()}), did not come to the end of a step", file=sys.stderr, flush=True)
    os._exit(EXIT_STOPPED)  # the main thread is blocked


def _seconds_in(path: Path) -> float:
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started; those that ended are left out."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for child in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


# A file in a run's folder with the error of the first of its processes that failed, for the worker that launched them.
ERROR_FILE = "error.txt"


def write_error_file(folder: Path, error: BaseException) -> None:
    """Write the error of a launched process, unless another process already has."""
    # Mode "x" fails if the file exists: later processes fail because of the first, so only the first error is useful.
    with contextlib.suppress(OSError), (folder / ERROR_FILE).open("x", encoding="utf-8") as file:
        file.write(str(error) or type(error).__name__)


def _take_error_file(folder: Path) -> str:
    """Return the error that a launched process left, and remove it; empty when there is none."""
    try:
        message = (folder / ERROR_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    (folder / ERROR_FILE).unlink(missing_ok=True)
    return message


def launch_command(config: WorkerConfig) -> list[str]:
    """Return the command that starts a module on all processes of a preset.

    Across nodes it uses srun.
    """
    options = ["--config_file", str(config.preset)]
    if config.nodes == 1:
        return [sys.executable, "-m", "epochal.distributed.launcher", *options]
    # The preset describes one node; the number of nodes multiplies its processes.
    total = config.nodes * processes_of(Path(str(config.preset)))
    options += ["--num_machines", str(config.nodes), "--num_processes", str(total)]
    options += ["--main_process_ip", socket.gethostname(), "--main_process_port", str(_free_port())]
    # Each node expands its own SLURM_NODEID; expanded here, the rank would be 0 on all nodes (accelerate issue 2816).
    shell = 'exec "$0" -m epochal.distributed.launcher --machine_rank "$SLURM_NODEID" "$@"'
    srun = ["srun", f"--nodes={config.nodes}", f"--ntasks={config.nodes}", "--ntasks-per-node=1"]
    srun += ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    cores = os.environ.get("SLURM_CPUS_PER_TASK")  # srun itself ignores it since Slurm 22.05
    srun += [f"--cpus-per-task={cores}"] if cores else []
    return [*srun, "sh", "-c", shell, sys.executable, *options]


def _free_port() -> int:
    # Rank 0 listens on this machine: Slurm runs the batch script on the first node of the allocation.
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# --- attempts and failures -------------------------------------------------------------------------------------------


def has_failed(workspace: Workspace, job: Job, config: WorkerConfig) -> bool:
    """Whether a job has used up its retries in this session; the next session tries it again."""
    failure = read_table(workspace.folder(job.name) / "failure.json")
    return failure.get("session") == config.session and int(failure.get("attempts", 1)) > config.retries


def _write_failure(job: Job, config: WorkerConfig, error: str, trace: str) -> None:
    path = config.workspace.folder(job.name) / "failure.json"
    before = read_table(path)
    # A new session starts counting again: the user may have fixed the cause.
    attempts = 1 + (int(before.get("attempts", 1)) if before.get("session") == config.session else 0)
    failure = {"session": config.session, "attempts": attempts, "error": error, "traceback": trace}
    write_atomic(path, json.dumps(failure, indent=1))


def _begin_attempt(job: Job, config: WorkerConfig) -> None:
    """Write attempt.json for a claimed job; raises RuntimeError after too many silent crashes."""
    path = config.workspace.folder(job.name) / "attempt.json"
    # A new checkpoint is progress: a job that is killed now and then must not be given up.
    checkpoint = max((item.name for item in path.parent.glob("checkpoints/step-*")), default="")
    before = read_table(path)
    # A job that succeeds, fails or is stopped deletes the file: if it exists, the last attempt was killed.
    repeated = before.get("session") == config.session and before.get("checkpoint") == checkpoint
    crashes = int(before.get("crashes", 0)) + 1 if repeated else 0
    if crashes >= MAX_SILENT_CRASHES:
        raise RuntimeError(
            f"{job.name} crashed {crashes} times without an error message or a new checkpoint, last on "
            f"{before.get('host')} (killed, out of memory, or the machine went down)."
        )
    attempt = {
        "session": config.session,
        "checkpoint": checkpoint,
        "crashes": crashes,
        "host": platform.node(),
        "pid": os.getpid(),
    }
    write_atomic(path, json.dumps(attempt))


# --- the worker process ----------------------------------------------------------------------------------------------


def _events() -> Emit:
    """Reserve standard output for events; anything else that is printed goes to standard error (the log)."""
    # At the level of file descriptors, because libraries print from C too.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        # If the parent is gone, the next call of `stop_reason` ends the worker.
        with contextlib.suppress(OSError):
            channel.write(json.dumps(event) + "\n")
            channel.flush()

    return emit


def _prepare_process(config: WorkerConfig) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(config.threads)
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
