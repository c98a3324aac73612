"""`epochal doctor`: what is installed, what works, and which parallelism preset suits this machine.

`python -m epochal.doctor step | triton | ranks` runs one check in its own process and raises if it fails.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from epochal.campaign.environment import clean_environment, usable_cores
from epochal.config import find_config
from epochal.provenance import device_name, versions

OPTIONAL = {
    "datasets": "Hugging Face data sets",
    "matplotlib": "figures of reports",
    "mpld3": "figures of reports on a page",
    "deepspeed": "ZeRO presets",
    "triton": "GPU kernels",
    "submitit": "Slurm clusters",
    "lm_eval": "downstream tasks",
    "tensorboard": "the default tracker",
}
TIMEOUT_SECONDS = 180
NETWORK_REMEDY = (
    "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the right network interface; on GPUs, run it again with "
    "NCCL_DEBUG=INFO, then with NCCL_P2P_DISABLE=1"
)


def examine() -> int:
    """Print what is installed and what works; returns 1 if something installed does not work, else 0."""
    import torch

    gpus, cores = torch.cuda.device_count(), len(usable_cores())
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(
        f"device: {device_name()}, {gpus} GPUs, {cores} cores; {shutil.disk_usage('.').free / 1e9:.0f} GB free on disk"
    )
    installed = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    for name, purpose in OPTIONAL.items():
        print(f"{name} ({purpose}): {'installed' if installed[name] else 'missing'}")

    works = [_check("training step in fp32 and bf16", ["epochal.doctor", "step"], {}, "reinstall torch")]
    if installed["triton"]:
        # Without a GPU Triton runs the kernel in its interpreter, which tests the installation but not the driver.
        interpret = {} if gpus else {"TRITON_INTERPRET": "1"}
        works.append(_check("Triton kernel", ["epochal.doctor", "triton"], interpret, "check nvidia-smi and gcc"))
    # Two NCCL processes cannot share one GPU: with fewer than two GPUs they run on the CPU with gloo.
    backend, environment = ("NCCL", {}) if gpus > 1 else ("gloo", {"CUDA_VISIBLE_DEVICES": ""})
    for preset in ("ddp2", *(["zero2"] if installed["deepspeed"] else [])):
        launch = ["epochal.distributed.launcher", "--config_file", str(find_config("accelerate", preset, ".yaml"))]
        arguments = [*launch, "--num_processes", "2", "-m", "epochal.doctor", "ranks"]
        works.append(_check(f"two processes ({preset}, {backend})", arguments, environment, NETWORK_REMEDY))

    print(f"recommended for many small runs: --jobs {gpus or cores}")
    if gpus:
        total = float(torch.cuda.get_device_properties(0).total_memory)
        print(*gpu_advice(total, gpus, cores, mps=mps_runs()), sep="\n")
    if gpus > 1:
        print(
            f"recommended for one large run: a copy of --preset ddp8, or fsdp2 to shard the model, with {gpus} processes"
        )
    print(*next_steps(all(works), [name for name in OPTIONAL if not installed[name]], gpus or cores), sep="\n")
    return int(not all(works))


def next_steps(works: bool, missing: list[str], workers: int) -> list[str]:
    """Return what to do next, as lines."""
    steps = [] if works else ["correct what FAILS above, then run epochal doctor again"]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        steps.append(f"only if you need {', '.join(OPTIONAL[name] for name in missing)}: pip install {names}")
    if works:
        steps.append(f"try it: epochal data kjv, then epochal run --scale demo --jobs {workers}, then epochal report")
    return ["to do:", *(f"  {step}" for step in steps)]


def mps_runs() -> bool:
    """Whether an MPS daemon serves this machine's CUDA processes."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # NVIDIA's default
    return (Path(folder) / "control").exists()


def gpu_advice(device_bytes: float, gpus: int, cores: int, *, mps: bool) -> list[str]:
    """Return lines on sharing GPUs, on determinism, and on the micro-batches that fit."""
    from epochal.distributed.memory import describe_fitting
    from epochal.run import AdamW, Run

    daemon = "runs" if mps else "does not run: start it with nvidia-cuda-mps-control -d before workers share a GPU"
    lines = [
        f"MPS daemon: {daemon}; each worker of --jobs is pinned to its share of {cores} cores",
        "the same Run twice: equal to the last bit with --mode deterministic; without it the backward pass of attention may "
        "add in another order each time",
    ]
    for model in ("ic-300m", "ic-1.4b", "ic-3.2b"):
        base = Run(
            name=model, model=model, data="dclm", unique_tokens=64 * 4096, epochs=1, batch_size=64,
            sequence_length=4096, optimizer=AdamW(),
        )  # fmt: skip
        lines.append(describe_fitting(base, device_bytes, world=gpus))
    return lines


def _check(title: str, arguments: list[str], environment: dict[str, str], remedy: str) -> bool:
    """Run a module in its own process and print whether it works."""
    try:
        # In a separate process: a crash of a driver must not end the doctor.
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            env={**clean_environment(os.environ), "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        print(f"{title}: FAILS (timed out after {TIMEOUT_SECONDS} s); {remedy}")
        return False
    errors = [line.strip() for line in result.stderr.splitlines() if "Error: " in line] or ["no error message"]
    print(f"{title}: works" if result.returncode == 0 else f"{title}: FAILS ({errors[0]}); {remedy}")
    return result.returncode == 0


# --- in the processes that are started -------------------------------------------------------------------------------


def run_step() -> None:
    """Raise if a training step fails."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.ones(4, 4, device=device))
    for bf16 in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = (weight @ weight).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([weight], fused=True).step()


def run_triton() -> None:
    """Raise if the loss kernel disagrees with its reference."""
    import torch

    from triton_kernels.softmax_loss import softmax_loss, softmax_loss_reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(4, device=device)
    expected, _ = softmax_loss_reference(logits.double(), targets)
    torch.testing.assert_close(softmax_loss(logits.clone(), targets).double(), expected, rtol=1e-5, atol=1e-5)


def run_ranks() -> None:
    """Raise if an all-reduce is wrong, or Muon's step differs from one process's."""
    import torch

    from epochal.distributed.first_step_check import ShardedUpdateCheck
    from epochal.distributed.processes import Processes
    from epochal.optim import Muon

    class MeanSquare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.model(x)
            return output.square().mean()

    processes = Processes(clip_norm=1.0)
    total = float(processes.sum(torch.tensor(processes.rank + 1.0)))
    if total != processes.world * (processes.world + 1) / 2:
        raise RuntimeError(f"the sum of ranks is {total} over {processes.world} processes")
    processes.prepare(MeanSquare(), lambda model: Muon(model.parameters(), lr=0.1))
    with processes.accumulating(last=True):
        processes.backward(processes.wrapped(torch.randn(4, 9, device=processes.device)))
    with ShardedUpdateCheck(processes, "doctor"):
        processes.step()
    os._exit(0)  # the destructor of a gloo group may hang


if __name__ == "__main__":
    {"step": run_step, "triton": run_triton, "ranks": run_ranks}[sys.argv[1]]()
