"""What the benchmarks share: a timer, the peak of memory, and rows appended to a CSV that can be resumed."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import importlib.util
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent


def environment(device: str) -> dict[str, object]:
    """The columns that say where a row was measured."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "hardware": hardware,
        "threads": torch.get_num_threads() if device == "cpu" else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else "",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Best of ``repeats``: device time on a GPU, CPU time of this process elsewhere (others may use the machine)."""
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            start = time.process_time()
            function()
            best = min(best, time.process_time() - start)
    return best


class PeakMemory:
    """Peak of memory above what was held at entry, in MB; on a CPU of the whole process, so use a fresh one."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.megabytes = 0.0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = float(torch.cuda.memory_allocated())
        else:
            self.base = _resident_now()
        return self

    def __exit__(self, *_: object) -> None:
        peak = float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else _resident_peak()
        self.megabytes = (peak - self.base) / 1e6


def _resident_now() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def _resident_peak() -> float:
    scale = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)


def known(path: Path, keys: dict[str, object]) -> bool:
    """Whether the CSV has a row with these values already: an interrupted benchmark resumes from there."""
    if not path.exists():
        return False
    with path.open(newline="") as file:
        return any(all(row.get(k) == str(v) for k, v in keys.items()) for row in csv.DictReader(file))


def append(path: Path, row: dict[str, object]) -> None:
    """Append a row with today's date; the first row of a file (or its committed header) sets the columns."""
    row = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **row}
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"{path.name} has the columns {columns}, not {list(row)}; move the old file away.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
