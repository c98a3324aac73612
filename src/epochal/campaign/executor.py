"""Run a campaign on this machine: start workers, report their events, stop them together.

The parent process only watches: all state is in the records, so several starts on one folder share the work.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from epochal.campaign.worker import WorkerConfig
from epochal.stopping import EXIT_STOPPED, listen, stop_reason

TICK_SECONDS = 0.5


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
    listen(deadline=deadline)
    log_folder = config.workspace.work / config.workspace.scale / "logs"
    log_folder.mkdir(parents=True, exist_ok=True)
    events: queue.Queue[dict[str, Any]] = queue.Queue()
    status = CampaignStatus()
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
    finally:
        _stop(workers, config.grace_seconds)
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
    return int(bool(status.failed) or any(codes))


def _start(config: WorkerConfig, number: int, jobs: int, log_path: Path, events: "queue.Queue[dict[str, Any]]") -> Any:
    """Start one worker process and a thread that reads its events."""
    environment = {**os.environ, **_gpus(number, jobs, launches=config.preset is not None)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    cores = sorted(os.sched_getaffinity(0))
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


def _stop(workers: list[Any], grace_seconds: float) -> None:
    """Ask all workers to stop, wait for them to save, and kill the rest: they resume from the last checkpoint."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + grace_seconds
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    for worker in workers:
        # With a timeout: a process that outlives its worker may hold the pipe open.
        worker.reader.join(TICK_SECONDS)
