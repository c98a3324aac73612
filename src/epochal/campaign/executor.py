"""Run a campaign on this machine: start workers, report their events, stop them together.

The parent process only watches: all state is in the records, so several starts on one folder share the work.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from epochal.campaign.environment import clean_environment, usable_cores
from epochal.campaign.plan import campaign_jobs, ready_jobs
from epochal.campaign.sweep import LAST_START, sweep
from epochal.campaign.worker import Patience, WorkerConfig, claim_name, kill_tree
from epochal.config import changed, to_table, write_atomic
from epochal.provenance import code_hash
from epochal.records import load_records, read_table
from epochal.scale import load_scale
from epochal.stopping import EXIT_STOPPED, listen, stop_reason

TICK_SECONDS = 0.2

# Variables of glibc's malloc, read when a process starts. By default it returns blocks above 128 KiB to the kernel when they
# are freed, and every step of a small model on a CPU waits for their pages again.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest that glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


@dataclass
class CampaignStatus:
    """What the workers have reported: jobs done, names of running and failed jobs, FLOPs of those done, errors."""

    done: int = 0
    running: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    flops: float = 0.0
    errors: list[str] = field(default_factory=list)


Progress = Callable[[CampaignStatus, dict[str, Any] | None], None]


def run_campaign(config: WorkerConfig, *, jobs: int, progress: Progress, log_prefix: str = "") -> int:
    """Run a campaign with `jobs` workers until no job is left; returns the exit code.

    0: all done. 1: a job failed. 2: wrong use. 75: stopped on purpose, run again to continue. `progress` is called with
    the CampaignStatus and each event, and with None at every tick.
    """
    deadline = float("inf") if config.seconds_left is None else time.monotonic() + config.seconds_left
    listen(deadline=deadline, forget=False)
    workspace = config.workspace
    sweep(workspace)
    log_folder = workspace.work / workspace.scale / "logs"
    log_folder.mkdir(parents=True, exist_ok=True)
    # A log for each worker of each start: two starts may share the folder.
    log_prefix = f"{log_prefix}{time.strftime('%Y%m%d-%H%M%S')}-{config.session[:6]}-"
    events: queue.Queue[dict[str, Any]] = queue.Queue()
    status = CampaignStatus()

    def note(message: str) -> None:
        progress(status, {"event": "note", "message": message})

    for message in notes_on_the_start(config):
        note(message)
    if stop_reason() is not None:
        return EXIT_STOPPED
    # Workers stop when their parent ends, even if it is killed.
    config = replace(config, parent=os.getpid())
    workers = [
        _start(config, number, jobs, log_folder / f"{log_prefix}worker-{number}.log", events) for number in range(jobs)
    ]
    try:
        while any(worker.poll() is None for worker in workers) and stop_reason() is None:
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=TICK_SECONDS)
                _update(status, event)
                progress(status, event)
            progress(status, None)
        if stop_reason() is not None:
            note(f"stopping ({stop_reason()}): saving {', '.join(status.running) or 'nothing'} ...")
    finally:
        # Of several workers, some may have been killed while others run.
        _stop(workers, Patience([workspace.folder(name) for name in status.running], config.grace_seconds))
    while not events.empty():
        event = events.get()
        _update(status, event)
        progress(status, event)
    # Events that arrived while the workers stopped are reported above.
    codes = [worker.returncode for worker in workers]
    if stop_reason() is not None or EXIT_STOPPED in codes:
        return EXIT_STOPPED
    if 2 in codes:
        raise ValueError(status.errors[0] if status.errors else f"a worker refused to start; see {log_folder}.")
    died = [number for number, code in enumerate(codes) if code not in (0, 1)]
    if died and not status.failed and 1 not in codes:
        named = ", ".join(f"worker {number} ended with {_described(codes[number])}" for number in died)
        missing = _missing(config)
        note(f"{named}; " + (f"{missing} jobs are missing: run again." if missing else "the others did its work."))
        return int(missing > 0)
    # Not whether a job ever failed: a retry may have finished it.
    return int(any(codes))


def _described(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}; see its log"


def _missing(config: WorkerConfig) -> int:
    """Return how many jobs of a campaign could still run."""
    records = load_records(config.workspace)
    jobs = campaign_jobs(config.recipes, records, load_scale(config.scale))
    return sum(not config.only or job.name in config.only for job in ready_jobs(jobs, records))


def notes_on_the_start(config: WorkerConfig) -> list[str]:
    """Return what differs from the last start on the work folder; remember this one."""
    workspace = config.workspace
    path = workspace.work / workspace.scale / LAST_START
    scale = to_table(load_scale(config.scale))
    now = {"scale": scale, "results": str(workspace.results.resolve()), "code": code_hash()}
    now = json.loads(json.dumps(now))
    before = read_table(path)
    notes = []
    if before and (differing := changed(before.get("scale", {}), now["scale"])):
        what = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in differing.items())
        notes.append(
            f"scale {workspace.scale!r} differs from that of the last start in {path.parent} ({what}); files of jobs that it "
            "changes are set aside."
        )
    if before and before.get("results") != now["results"]:
        notes.append(
            f"the last start in {path.parent} had its records in {before.get('results')}, not {now['results']}."
        )
    if before and before.get("code") != now["code"]:
        notes.append(f"the last start in {path.parent} was of another version of epochal ({before.get('code')}).")
    with claim_name(workspace, LAST_START) as claimed:
        if before != now and claimed:  # not claimed: another start writes it now
            write_atomic(path, json.dumps(now, indent=1))
    return notes


def _start(config: WorkerConfig, number: int, jobs: int, log_path: Path, events: "queue.Queue[dict[str, Any]]") -> Any:
    """Start one worker process and a thread that reads its events."""
    environment = {**clean_environment(os.environ), **_gpus(number, jobs, launches=config.preset is not None)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, value in KEEP_FREED_MEMORY.items():
        environment.setdefault(name, value)
    # Set before numpy and torch are imported, which read it once.
    environment["OMP_NUM_THREADS"] = str(config.threads)
    with log_path.open("w") as log:
        worker: Any = subprocess.Popen(
            [sys.executable, "-m", "epochal.campaign.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    if "CUDA_VISIBLE_DEVICES" in environment:
        # Before it imports torch: threads inherit the cores. A worker that moves between cores leaves its GPU waiting.
        os.sched_setaffinity(worker.pid, _cores(number, jobs))
    assert worker.stdin is not None and worker.stdout is not None
    with worker.stdin as pipe:
        json.dump(asdict(config), pipe)
    # A thread for each worker: a full pipe would block the worker.
    worker.reader = threading.Thread(target=_listen_to, args=(worker.stdout, events), daemon=True)
    worker.reader.start()
    return worker


def _cores(number: int, jobs: int) -> list[int]:
    """Return a worker's share of the cores that this process may use, at least one."""
    cores = usable_cores()
    return cores[number::jobs] or [cores[number % len(cores)]]


def _gpus(number: int, jobs: int, *, launches: bool) -> dict[str, str]:
    """Assign visible GPUs to workers round-robin: one each, or an equal share if the worker launches processes."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    devices = listed.split(",") if listed else [str(index) for index in range(count)]
    if not devices:
        return {}
    share = devices[number::jobs] if launches else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(share or [devices[number % len(devices)]])}


def _listen_to(pipe: IO[str], events: "queue.Queue[dict[str, Any]]") -> None:
    with pipe:
        for line in pipe:
            with contextlib.suppress(ValueError):
                events.put(json.loads(line))


def _update(status: CampaignStatus, event: dict[str, Any]) -> None:
    name = event.get("name", "")
    match event["event"]:
        case "started":
            status.running.append(name)
        case "done":
            status.done += 1
            status.flops += event["flops"]
        case "failed":
            status.failed.append(f"{name}: {event['message']}")
        case "error":
            status.errors.append(event["message"])
    if event["event"] in ("done", "failed") and name in status.running:  # a job may fail before it starts
        status.running.remove(name)


def _stop(workers: list[Any], patience: Patience) -> None:
    """Ask all workers to stop, wait for them to save, and kill the rest: they resume from the last checkpoint."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    while any(worker.poll() is None for worker in workers) and patience.waits():
        time.sleep(TICK_SECONDS)
    for worker in workers:
        if worker.poll() is None:
            kill_tree(worker.pid)  # its launcher and ranks too
            worker.wait()
    for worker in workers:
        # With a timeout: a process that outlives its worker may hold the pipe open.
        worker.reader.join(TICK_SECONDS)
