"""What `epochal doctor` tries out in processes of its own: a Triton kernel, an all-reduce of two processes, a ZeRO step.

python -m epochal.doctor_checks triton | ranks          what those processes run; each ends with 0 or an exception
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field

from epochal.config import find_config

SECONDS = 180


@dataclass
class Check:
    """Lines for people, and whether something that is installed does not work."""

    lines: list[str] = field(default_factory=list)
    failed: bool = False


def triton_kernel(gpus: int) -> Check:
    """Compare the loss kernel with its definition: on the GPU, or under Triton's interpreter where there is none."""
    if importlib.util.find_spec("triton") is None:
        return Check(["Triton kernel: not tried, plain torch is used; pip install triton (Linux, NVIDIA or AMD GPUs)"])
    where = "on the GPU" if gpus else "under the interpreter"
    environment = {} if gpus else {"TRITON_INTERPRET": "1"}
    problem = _run([sys.executable, "-m", "epochal.doctor_checks", "triton"], environment)
    if problem is None:
        return Check([f"Triton kernel: works {where}"])
    remedy = (
        "a kernel is compiled with the driver and a C compiler: check nvidia-smi and gcc"
        if gpus
        else "reinstall triton"
    )
    return Check([f"Triton kernel: fails {where} ({problem}); {remedy}"], failed=True)


def two_processes(gpus: int) -> Check:
    """Launch two processes with DDP and with ZeRO-2: an all-reduce, and one step whose update is compared with one process."""
    check, devices = Check(), "two GPUs" if gpus > 1 else "the CPU"
    # Two processes cannot share one GPU under NCCL.
    environment = {} if gpus > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    for profile, what in (("ddp2", "all-reduce and DDP step"), ("zero2", "ZeRO-2 step")):
        if profile == "zero2" and importlib.util.find_spec("deepspeed") is None:
            check.lines.append(f"{what}: not tried; pip install deepspeed for ZeRO profiles, or use fsdp2")
            continue
        config = str(find_config("accelerate", profile, ".yaml"))
        launcher = [
            sys.executable,
            "-m",
            "epochal.distributed.launcher",
            "--config_file",
            config,
            "--num_processes",
            "2",
        ]
        problem = _run([*launcher, "-m", "epochal.doctor_checks", "ranks"], environment)
        if problem is None:
            check.lines.append(f"{what}: works with two processes on {devices}")
        else:
            check.failed = True
            check.lines.append(f"{what}: fails with two processes on {devices} ({problem}); {_remedy(problem, gpus)}")
    return check


def _remedy(problem: str, gpus: int) -> str:
    """Say what to try for the usual reasons."""
    if "minutes" in problem or "timed out" in problem.lower():
        return "processes do not reach each other: set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the right interface"
    if "address already in use" in problem.lower():
        return "a port is taken: end what a former launch left behind"
    if gpus > 1:
        return (
            "run it again with NCCL_DEBUG=INFO, and with NCCL_P2P_DISABLE=1 to see whether the link between GPUs is it"
        )
    return "reinstall torch, accelerate and deepspeed in the versions of constraints.txt"


def _run(command: list[str], environment: dict[str, str]) -> str | None:
    """Run a command; returns None when it succeeds, else the last telling line of what it said."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS // 60} minutes"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if "Error: " in line]
    return lines[0] if lines else f"exit code {done.returncode}"


# --- in the processes that are started -------------------------------------------------------------------------------


def run_triton() -> None:
    """Raise unless the loss kernel agrees with its definition."""
    import torch

    from triton_kernels.softmax_loss import softmax_loss, softmax_loss_reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(4, device=device)
    expected, _ = softmax_loss_reference(logits.double(), targets)
    torch.testing.assert_close(softmax_loss(logits.clone(), targets).double(), expected, rtol=1e-5, atol=1e-5)


def run_ranks() -> None:
    """Raise unless an all-reduce adds up, and one step of a matrix optimizer is that of one process."""
    import torch

    from epochal.distributed.first_step_check import ShardedUpdateCheck
    from epochal.distributed.processes import Processes
    from epochal.optim import Muon

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(x).square().mean()
            return found

    processes = Processes(clip_norm=1.0)
    total = float(processes.sum(torch.tensor(processes.rank + 1.0)))
    if total != processes.world * (processes.world + 1) / 2:
        raise RuntimeError(f"the sum of ranks is {total} over {processes.world} processes")
    processes.prepare(Small(), lambda model: Muon(model.parameters(), lr=0.1))
    with processes.accumulating(last=True):
        processes.backward(processes.wrapped(torch.randn(4, 9, device=processes.device)))
    with ShardedUpdateCheck(processes, "doctor"):
        processes.step()
    sys.stdout.flush()
    os._exit(0)  # the destructor of a gloo group may hang


if __name__ == "__main__":
    {"triton": run_triton, "ranks": run_ranks}[sys.argv[1]]()
