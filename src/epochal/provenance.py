"""Commit, package versions, device and date of a result, for its record."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from epochal.config import REPOSITORY

PACKAGES = ("epochal", "torch", "transformers", "accelerate", "numpy", "tokenizers", "deepspeed", "triton")

# Peak dense bf16 FLOP/s with float32 accumulation, from the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


@functools.cache
def commit() -> dict[str, Any]:
    """Return {"commit", "dirty"} of the repository; both None outside a git checkout."""
    if not (REPOSITORY / ".git").exists():  # an installed package may lie in the checkout of another project
        return {"commit": None, "dirty": None}
    try:
        head = _git("rev-parse", "HEAD")
        # Untracked files do not count: records and reports appear while a campaign runs.
        return {"commit": head, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def code_hash() -> str:
    """Return a hash of the installed source files of epochal and its kernels."""
    digest = hashlib.sha256()
    for folder in (REPOSITORY / "src" / "epochal", REPOSITORY / "triton_kernels"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change a result."""
    by_package = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_package[name] = importlib.metadata.version(name)
    return by_package


@functools.cache
def device_name() -> str:
    """Return the name of the GPU, or of the CPU if there is none."""
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
    """Return model FLOPs utilization (0 to 1) of `devices` GPUs; None for a device that is not in PEAK_FLOPS."""
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device_name()), None)
    return None if peak is None else flops_per_second / (peak * devices)


def float32_products() -> str:
    """Return how float32 matrices are multiplied: "ieee", or "tf32" where a caller allowed that."""
    # Evaluations, ensembles, sampling and soft targets compute in float32 with IEEE products: on a GPU a tenth of bf16's
    # speed, for losses that do not depend on the device. Training and its own evaluations have the precision of the Run.
    import torch

    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def provenance() -> dict[str, Any]:
    """Return commit, versions, device, float32 arithmetic and date for a record."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        **commit(),
        "versions": versions(),
        "device": device_name(),
        "float32_products": float32_products(),
        "date": now,
    }
