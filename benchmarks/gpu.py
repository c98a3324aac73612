"""Everything that needs one GPU, in one call of under nine minutes, the most valuable part first.

    python benchmarks/gpu.py [--seconds 530]         rows into benchmarks/{training_gpu,gpu}.csv, which commit as they are
    python benchmarks/gpu.py --only small clip       these parts alone
    python benchmarks/gpu.py --device cpu --csv-folder /tmp/try        the same path at toy sizes, where times mean nothing

A part that exceeds its own limit is stopped, one whose time is not left is dropped; both are said, and both cost the others
nothing. A row that the CSV has, from this device with these versions, is not added again.

What each part should show (a desk estimate for an H100, torch 2.11): training 548 ms a step eager, 290 compiled (MFU 0.36), 250
with fused products and a bf16 residual stream (0.42); small 25 ms eager, 9 with a graph, 5 compiled with a graph; clip of
24x2048x2048 below 13 ms; optimizers 3 to 4% above AdamW; long at least 0.48; head 13 ms; a default run may differ from its
repetition, a deterministic one does not, at 3 to 8% of the time.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# cuBLAS reads it when it is first used: the part `deterministic` is not the first.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from measure import HERE, append, environment, known, seconds
from training import OPTIMIZERS, Case, Training, append_row

from epochal.config import REPOSITORY
from epochal.loss import cross_entropy
from epochal.optim import Fira, Muon, Spectra, soft_spectral_clip


@dataclass(frozen=True)
class Bench:
    """Where rows go, and how large the cases are."""

    device: str
    folder: Path  # of the CSVs

    @property
    def tiny(self) -> bool:
        """A rehearsal."""
        return self.device == "cpu"

    @property
    def large(self) -> Case:
        """The model of the published SPECTRA results."""
        return Case("w6", 16, 64, 2) if self.tiny else Case()

    @property
    def small(self) -> Case:
        """A member of the gpu campaign, with the tokens of one of its steps."""
        return Case("w6", 16, 64, 4) if self.tiny else Case("gpu-25m", 512, 8192, 16)

    def training(self, case: Case, first: float | None = None) -> float | None:
        """Add a row of training throughput."""
        steps = {"warmup": 1, "steps": 1} if self.tiny else {}
        return append_row(self.folder / "training_gpu.csv", case, self.device, first, **steps)

    def row(self, part: str, case: str, quantity: str, value: float | str, unit: str = "") -> None:
        """Add a row of anything else."""
        text = value if isinstance(value, str) else f"{value:.5g}"
        keys: dict[str, object] = {"part": part, "case": case, "quantity": quantity, **environment(self.device)}
        print(part, case, quantity, text, unit, flush=True)
        if not known(self.folder / "gpu.csv", keys):
            append(self.folder / "gpu.csv", {**keys, "value": text, "unit": unit})

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Best of some calls, after one that is not counted."""
        function()
        return 1e3 * seconds(function, self.device, 1 if self.tiny else 6)


# --- the parts --------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    """Where the MFU of 160M parameters goes: eager, compiled, fused products, a bf16 residual stream."""
    fused = ("compile", "fused")
    for modes, residual in (((), "float32"), (("compile",), "float32"), (fused, "float32"), (fused, "bfloat16")):
        bench.training(replace(bench.large, modes=modes, residual=residual))


def small(bench: Bench) -> None:
    """A step of 25M parameters: eager, as a CUDA graph, compiled, compiled as a graph."""
    for modes in ((), ("cuda-graph",), ("compile",), ("compile", "cuda-graph")):
        bench.training(replace(bench.small, modes=modes))


def clip(bench: Bench) -> None:
    """The spectral clip of a stack: time, and error against float64 at three conditions."""
    for batch, m, n in ((2, 8, 12),) if bench.tiny else ((24, 2048, 2048), (48, 768, 768), (36, 768, 2048)):
        x = torch.randn(batch, m, n, device=bench.device)
        name = f"{batch}x{m}x{n}"
        for method in ("polar", "newton_schulz"):
            clipped = functools.partial(soft_spectral_clip, x, 10.0, method=method)
            bench.row("clip", name, method, bench.milliseconds(clipped), "ms")
    x = torch.randn((8, 12) if bench.tiny else (512, 768), device=bench.device)
    largest = float(torch.linalg.matrix_norm(x.double(), ord=2))
    for condition in (30, 1000, 30_000):
        c = largest / (condition - 1) ** 0.5
        exact = soft_spectral_clip(x.double(), c, method="exact")
        error = (soft_spectral_clip(x, c, method="polar").double() - exact).norm() / exact.norm()
        bench.row("clip", f"condition {condition}", "relative error", float(error))


def deterministic(bench: Bench) -> None:
    """Two runs from one seed, by default and in the mode deterministic: equal or not, and the price."""
    case = replace(bench.large, step_tokens=bench.large.micro_batch * bench.large.length)
    for modes in ((), ("deterministic",)):
        runs = []
        for _ in range(2):
            trained = Training(replace(case, modes=modes), bench.device)
            losses = torch.stack([trained.step() for _ in range(2 if bench.tiny else 6)])
            runs.append((losses, [p.detach().clone() for p in trained.model.parameters()]))
        (first, weights), (again, others) = runs
        same = torch.equal(first, again) and all(map(torch.equal, weights, others))
        name = " ".join(modes) or "default"
        bench.row("deterministic", name, "two runs", "equal to the last bit" if same else "different")
        bench.row("deterministic", name, "step", bench.milliseconds(trained.step), "ms")
    Training(replace(case, model="w6", length=16, step_tokens=32, micro_batch=2), bench.device)  # the default again


def optimizers(bench: Bench) -> None:
    """What each optimizer adds to a compiled step of 160M parameters."""
    first = None
    for name in OPTIMIZERS:
        first = bench.training(replace(bench.large, modes=("compile",), optimizer=name), first) or first


def long(bench: Bench) -> None:
    """600M parameters at 4,096 tokens, eager and compiled."""
    case = replace(bench.large, length=32) if bench.tiny else Case("ic-600m", 4096, 16_384, 2)
    for modes in ((), ("compile",)):
        bench.training(replace(case, modes=modes))


def head(bench: Bench) -> None:
    """The head and its loss, forward and backward, of 32,768 tokens."""
    tokens, width, vocabulary = (64, 8, 50) if bench.tiny else (32_768, 768, 50_304)
    hidden = torch.randn(tokens, width, device=bench.device, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, device=bench.device)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=bench.device)

    def both() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(bench.device, torch.bfloat16):
            loss = cross_entropy(hidden, weight, targets)
        loss.backward()

    bench.row("head", f"{tokens}x{width}x{vocabulary}", "forward and backward", bench.milliseconds(both), "ms")


def fira(bench: Bench) -> None:
    """A step of Fira over equal matrices, next to fused AdamW's."""
    for batch, m, n, rank in ((2, 12, 20, 4),) if bench.tiny else ((48, 768, 768, 192), (24, 768, 3072, 192)):
        layers = torch.nn.ModuleList(torch.nn.Linear(n, m, bias=False) for _ in range(batch)).to(bench.device)
        for layer in layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        name = f"{batch}x{m}x{n} r{rank}"
        group = {"params": list(layers.parameters()), "rank": rank, "update_proj_gap": 10**9, "alpha": 0.25}
        step = Fira([group], lr=1e-3).step
        bench.row("fira", name, "step", bench.milliseconds(step), "ms")
        bench.row(
            "fira",
            name,
            "fused AdamW",
            bench.milliseconds(torch.optim.AdamW(layers.parameters(), fused=True).step),
            "ms",
        )


def batch_invariance(bench: Bench) -> None:
    """Whether a matrix stepped alone moves as it does in a stack: what the check of the first step compares."""
    batch, m, n = (3, 8, 12) if bench.tiny else (28, 768, 2048)
    start, gradient = torch.randn(batch, m, n, device=bench.device), torch.randn(batch, m, n, device=bench.device)
    for name, make in (("Muon", Muon), ("SPECTRA", lambda params, lr: Spectra(params, lr, apply_to="all"))):
        moved = []
        for count in (1, batch):
            weights = [torch.nn.Parameter(start[k].clone()) for k in range(count)]
            for weight, each in zip(weights, gradient, strict=False):
                weight.grad = each.clone()
            make(weights, lr=0.1).step()
            moved.append(weights[0].detach() - start[0])
        difference = (moved[0] - moved[1]).abs().max() / moved[1].abs().max()
        bench.row("batch invariance", f"{batch}x{m}x{n}", name, float(difference), "of the largest movement")


def jobs(bench: Bench) -> None:
    """Steps of 1, 2, 4 and 8 members on one GPU, each in a process, without and with an MPS daemon."""
    counts, duration = ((1, 2), 0.1) if bench.tiny else ((1, 2, 4, 8), 3.0)
    for shared in (False, True):
        with mps_daemon(wanted=shared, tiny=bench.tiny) as environment_of_clients:
            if environment_of_clients is None:
                print("no nvidia-cuda-mps-control here: the MPS rows are left out")
                continue
            for count, rate in members_per_second(bench, counts, duration, environment_of_clients):
                name = f"{count} jobs" + " under MPS" * shared
                bench.row("jobs", name, "steps of all", rate, "1/s")


def kernel_tests(bench: Bench) -> None:
    """The tests of kernels and optimizers, on the GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "tests/optim/test_gpu.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    if bench.tiny:
        command = [sys.executable, "-c", "print('1 passed')"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:])
    bench.row(
        "kernel tests",
        "tests/kernels tests/optim/test_gpu.py",
        "result",
        done.stdout.strip().splitlines()[-1].strip("= "),
    )


# --- members that share a GPU -----------------------------------------------------------------------------------------


@contextmanager
def mps_daemon(*, wanted: bool, tiny: bool) -> Iterator[dict[str, str] | None]:
    """Run an MPS daemon of this call's own; yields the environment of its clients, None if there is no such program."""
    if not wanted or tiny:
        yield {}
        return
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        clients = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run([program, "-d"], env={**os.environ, **clients}, check=True)
        try:
            yield clients
        finally:
            subprocess.run([program], input="quit\n", text=True, env={**os.environ, **clients}, check=False)


def members_per_second(
    bench: Bench, counts: tuple[int, ...], duration: float, clients: dict[str, str]
) -> Iterator[tuple[int, float]]:
    """Yield (number of processes, their steps a second together); the processes are started once."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    cores = sorted(os.sched_getaffinity(0))
    os.environ.update(clients)  # inherited
    try:
        for number in range(max(counts)):
            pipe, child = context.Pipe()
            process = context.Process(target=member, args=(bench, child, cores[number % len(cores)]), daemon=True)
            process.start()
            child.close()  # so that a member that dies ends its pipe, and the part, instead of blocking it
            pipes.append(pipe)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()  # ready
        for count in counts:
            for pipe in pipes[:count]:
                pipe.send(duration)
            yield count, sum(pipe.recv() for pipe in pipes[:count])
    finally:
        for process in processes:
            process.kill()
        for name in clients:
            os.environ.pop(name, None)


def member(bench: Bench, pipe: Any, core: int) -> None:
    """Train until killed: for each number of seconds received, send the steps a second."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    trained = Training(bench.small, bench.device)
    for _ in range(3):
        trained.step()
    pipe.send("ready")
    while True:
        duration = pipe.recv()
        begin, steps = time.monotonic(), 0
        while time.monotonic() < begin + duration:
            loss = float(trained.step())  # waits for the device
            steps += 1
        assert loss > 0
        pipe.send(steps / (time.monotonic() - begin))


# --- the call ---------------------------------------------------------------------------------------------------------

# Parts in order of value, with the most seconds each may take.
PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "training": (training, 150),
    "small": (small, 60),
    "clip": (clip, 40),
    "deterministic": (deterministic, 40),
    "batch_invariance": (batch_invariance, 20),
    "optimizers": (optimizers, 60),
    "long": (long, 60),
    "jobs": (jobs, 90),
    "head": (head, 15),
    "fira": (fira, 20),
    "kernel_tests": (kernel_tests, 120),
}


class PartTimeoutError(Exception):
    """A part exceeded its limit."""


def run_parts(bench: Bench, names: list[str], total: float) -> list[str]:
    """Run parts in order within `total` seconds; returns a sentence for each that did not end well."""
    deadline, problems = time.monotonic() + total, []

    def stop(*_: object) -> None:
        raise PartTimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for name in names:
            function, limit = PARTS[name]
            left = deadline - time.monotonic()
            # Half of its limit may be enough: the limits are generous.
            if left < limit / 2:
                problems.append(f"{name}: dropped, {left:.0f} s were left")
                continue
            begin = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, min(limit, left))
            try:
                function(bench)
            except PartTimeoutError:
                problems.append(f"{name}: stopped after {time.monotonic() - begin:.0f} s")
            except Exception:
                traceback.print_exc()
                problems.append(f"{name}: failed, see above")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"[{time.monotonic() - begin:5.1f} s] {name}", flush=True)
            if bench.device == "cuda":
                torch.cuda.empty_cache()
    finally:
        signal.signal(signal.SIGALRM, before)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=530)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--csv-folder", type=Path, default=HERE)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    args.csv_folder.mkdir(parents=True, exist_ok=True)
    problems = run_parts(Bench(args.device, args.csv_folder), args.only, args.seconds)
    print(*(problems or ["all parts done"]), sep="\n")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
