"""Where a result comes from: commit, versions, machine. What is known afterwards, never what determines a result."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from epochal.config import REPOSITORY

PACKAGES = ("epochal", "torch", "transformers", "accelerate", "numpy", "tokenizers", "deepspeed", "triton")

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 FLOP/s with float32 accumulation, from the makers' data sheets; the base of every MFU here."""


@functools.cache
def commit() -> dict[str, Any]:
    """Return {"commit", "dirty"} of the repository; both None outside a git checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def device_name() -> str:
    """Return the name of the GPU, or of the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def utilisation(flops_per_second: float, *, devices: int) -> float | None:
    """Return model FLOPs utilisation (0 to 1) of `devices` known GPUs; None for a device whose peak is not listed."""
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device_name()), None)
    return None if peak is None else flops_per_second / (peak * devices)


def provenance() -> dict[str, Any]:
    """Return commit, versions, device and date for a record."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**commit(), "versions": versions(), "device": device_name(), "date": now}
