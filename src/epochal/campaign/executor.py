"""Run a campaign here: start workers, show what they do, stop them together.

The parent only watches. What is done is in the records; workers of another start on the same folder share the work.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from epochal.campaign.worker import Orders
from epochal.stopping import EXIT_STOPPED, listen, stop_reason

TICK_SECONDS = 0.5


@dataclass
class Board:
    """What is known about a campaign in flight: for the display only."""

    total: int
    done: int
    running: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    flops: float = 0.0
    errors: list[str] = field(default_factory=list)


def run_campaign(orders: Orders, *, jobs: int, progress: Any, log_prefix: str = "") -> int:
    """Run a campaign with `jobs` workers until nothing is left; returns the exit code.

    0: all done. 1: a job failed. 2: wrong use. 75: stopped on purpose, run again to continue. `progress` is called
    with the Board and an event (or None) whenever something changed.
    """
    deadline = float("inf") if orders.seconds_left is None else time.monotonic() + orders.seconds_left
    listen(deadline=deadline)
    log_folder = orders.workspace.work / orders.workspace.scale / "logs"
    log_folder.mkdir(parents=True, exist_ok=True)
    events: queue.Queue[dict[str, Any]] = queue.Queue()
    board = Board(0, 0)
    mine = replace(orders, parent=os.getpid())
    workers = [
        _start(mine, number, jobs, log_folder / f"{log_prefix}worker-{number}.log", events) for number in range(jobs)
    ]
    try:
        while any(worker.poll() is None for worker in workers) or not events.empty():
            if stop_reason() is not None:
                break
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=TICK_SECONDS)
                _note(board, event)
                progress(board, event)
            progress(board, None)
    finally:
        _stop(workers, orders.grace_seconds)
    while not events.empty():  # what workers said last
        event = events.get()
        _note(board, event)
        progress(board, event)
    codes = [worker.returncode for worker in workers]
    if stop_reason() is not None or EXIT_STOPPED in codes:
        return EXIT_STOPPED
    if 2 in codes:
        raise ValueError(board.errors[0] if board.errors else f"a worker refused to start; see {log_folder}.")
    return int(bool(board.failed) or any(codes))


def _start(orders: Orders, number: int, jobs: int, log_path: Path, events: "queue.Queue[dict[str, Any]]") -> Any:
    """Start one worker process and a thread that reads its events."""
    environment = {**os.environ, **_gpus(number, jobs, launches=orders.profile is not None)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["OMP_NUM_THREADS"] = str(orders.threads)
    with log_path.open("w") as log:
        worker: Any = subprocess.Popen(
            [sys.executable, "-m", "epochal.campaign.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert worker.stdin is not None and worker.stdout is not None
    with worker.stdin as pipe:
        json.dump(asdict(orders), pipe)
    worker.reader = threading.Thread(target=_listen_to, args=(worker.stdout, events), daemon=True)
    worker.reader.start()
    return worker


def _gpus(number: int, jobs: int, *, launches: bool) -> dict[str, str]:
    """Give a worker its GPUs of those in sight: one, in turn, or its share where it launches several processes."""
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


def _note(board: Board, event: dict[str, Any]) -> None:
    name = event.get("name", "")
    match event["event"]:
        case "started":
            board.running[name] = time.monotonic()
        case "done":
            board.running.pop(name, None)
            board.done += 1
            board.flops += event["flops"]
        case "failed":
            board.running.pop(name, None)
            board.failed.append(f"{name}: {event['message']}")
        case "error":
            board.errors.append(event["message"])


def _stop(workers: list[Any], grace_seconds: float) -> None:
    """Ask all workers to stop, wait for them to save, and kill what is left: it resumes from before."""
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
        worker.reader.join(TICK_SECONDS)  # a process that outlives its worker may hold the pipe open
