"""What is installed, what works, and which profile suits this machine."""

import importlib.util
import os
import shutil

from epochal import doctor_checks as checks
from epochal.provenance import device_name, versions

OPTIONAL = {
    "datasets": "hub data sets",
    "matplotlib": "figures of reports",
    "deepspeed": "ZeRO profiles",
    "triton": "GPU kernels",
    "submitit": "Slurm clusters",
    "lm_eval": "downstream tasks",
    "tensorboard": "the default tracker",
}


def examine() -> int:
    """Print the findings; returns 0 when what is installed works here, else 1."""
    import torch

    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    for name, purpose in OPTIONAL.items():
        state = "installed" if importlib.util.find_spec(name) else f"missing: pip install {name.replace('_', '-')}"
        print(f"{name} ({purpose}): {state}")
    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0))
    print(f"device: {device_name()}, {gpus} GPUs, {cores} cores, {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
    try:
        weight = torch.nn.Parameter(torch.ones(4, 4, device="cuda" if gpus else "cpu"))
        (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]
        torch.optim.AdamW([weight], fused=True).step()
    except RuntimeError as error:
        print(f"a training step fails here: {error}")
        return 1
    found = [checks.triton_kernel(gpus), checks.two_processes(gpus)]
    for line in (line for check in found for line in check.lines):
        print(line)
    suggestion = f"--jobs {max(gpus, 1)}" if gpus else f"--jobs {cores}"
    print(f"a training step works; for many small runs use {suggestion}")
    if gpus > 1:
        print("for a run that one GPU does not hold: --profile zero3 or fsdp2, with num_processes as many as GPUs")
    return int(any(check.failed for check in found))
