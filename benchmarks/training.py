"""Training throughput of one device, and the optimizer's share of a step.

    python benchmarks/training.py                                              one GPU, into training_gpu.csv
    python benchmarks/training.py --mode compile --mode fused                  the same in execution modes
    python benchmarks/training.py --device cpu --model w32 --step-tokens 1024 --micro-batch 4 --csv /tmp/try.csv

The parts of the training loop on random tokens: a Llama of transformers in bf16 autocast, the fused loss, accumulation,
clipping. MFU is that of the records (`epochal.models.config.flops_per_token`), against the dense bf16 peak. Rows already in
the CSV are skipped; ratios are to AdamW of the same run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import HERE, append, environment, known

from epochal.distributed.processes import Processes
from epochal.models.config import flops_per_token
from epochal.models.layers import apply_modes, set_deterministic, use_bf16_residual
from epochal.models.llama import build_model, load_config
from epochal.optim.build import build_optimizer
from epochal.optimizer_config import AdamW, Fira, Muon, Optimizer, Spectra
from epochal.provenance import utilisation
from epochal.training.loop import ModelWithLoss
from epochal.training.noise import Noise
from epochal.training.step import gradient_pass

OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": AdamW(lr=1e-3),
    "SPECTRA-AdamW": Spectra(base=AdamW(lr=1e-3)),
    "Muon": Muon(lr=1e-3),
    "Fira": Fira(lr=1e-2),
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    model: str = "spectra-160m"
    length: int = 512  # tokens of a sequence
    step_tokens: int = 131_072
    micro_batch: int = 64  # sequences at once
    modes: tuple[str, ...] = ()
    residual: str = "float32"
    optimizer: str = "AdamW"

    def keys(self, device: str) -> dict[str, object]:
        """The columns that identify a row."""
        columns = ("model", "length", "step_tokens", "micro_batch")
        modes = " ".join((*sorted(self.modes), *(["bf16-residual"] if self.residual == "bfloat16" else [])))
        case = {column: getattr(self, column) for column in columns}
        return {**case, "modes": modes, "optimizer": self.optimizer, **environment(device)}


class Training:
    """A model in training on random tokens."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        config = load_config(case.model)
        self.model = build_model(case.model, vocab_size=config.vocab_size, max_positions=case.length, seed=0)
        self.processes = Processes(clip_norm=1.0, micro_batch=case.micro_batch, modes=case.modes)
        noise = Noise(seed=0, dropout=0.0, input_mask_prob=0.0)
        noise.attach(self.model)
        if case.residual == "bfloat16":
            use_bf16_residual(self.model)
        apply_modes(self.model, case.modes, torch.device(device), noise.recomputing)
        set_deterministic("deterministic" in case.modes)
        self.processes.prepare(
            ModelWithLoss(self.model, noise, None, "bf16"),
            lambda module: build_optimizer(module, OPTIMIZERS[case.optimizer], steps=1000),
        )
        self.add_gradients = gradient_pass(self.processes, self.model)
        self.sequences = case.step_tokens // case.length
        self.tokens = torch.randint(config.vocab_size, (self.sequences, case.length)).to(device)

    def accumulate(self) -> torch.Tensor:
        """The micro-batches of one step; returns its loss."""
        size, loss = self.case.micro_batch, torch.zeros((), device=self.device)
        for first, part in zip(range(0, self.sequences, size), self.tokens.split(size), strict=True):
            with self.processes.accumulating(last=first + size >= self.sequences):
                loss += self.add_gradients(part, first, self.sequences * (self.case.length - 1))
        return loss

    def step(self) -> torch.Tensor:
        """A whole step; returns its loss."""
        loss = self.accumulate()
        self.processes.step()
        return loss


def measure(case: Case, device: str, *, warmup: int = 3, steps: int = 8) -> dict[str, object]:
    """Train for a few steps; returns the columns of a row."""
    gc.collect()  # the model before: layers that are compiled refer to themselves
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training, whole, update = Training(case, device), [], []
    for step in range(warmup + steps):
        begin = mark(device)
        training.accumulate()
        before = mark(device)
        training.processes.step()
        end = mark(device)
        if step >= warmup:
            whole.append(between(begin, end))
            update.append(between(before, end))
    second = statistics.median(whole)
    mfu = utilisation(flops_per_token(case.model, case.length) * case.step_tokens / second, devices=1)
    return {
        "seconds": f"{second:.5g}",
        "optimizer_seconds": f"{statistics.median(update):.4g}",
        "tokens_per_second": f"{case.step_tokens / second:.0f}",
        "mfu": "" if mfu is None else f"{mfu:.4f}",
        "peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.4g}" if device == "cuda" else "",
    }


def mark(device: str) -> float | torch.cuda.Event:
    """Return a point in the device's time, without synchronizing."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Return the seconds between two marks."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def append_row(
    path: Path, case: Case, device: str, first: float | None, *, warmup: int = 3, steps: int = 8
) -> float | None:
    """Measure a case unless the CSV has it; returns its seconds. Ratios are to `first`, if that was measured."""
    keys = case.keys(device)
    if first is not None and known(path, keys):
        print("already measured:", *keys.values())
        return None
    row = measure(case, device, warmup=warmup, steps=steps)
    second = float(str(row["seconds"]))
    if not known(path, keys):
        append(path, {**keys, **row, "ratio_to_adamw": f"{second / (first or second):.4g}"})
    return second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="spectra-160m")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--step-tokens", type=int, default=131_072)
    parser.add_argument("--micro-batch", type=int, default=64, help="sequences at once")
    parser.add_argument("--mode", action="append", default=[], help="an execution mode; may be repeated")
    parser.add_argument("--residual", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--csv", type=Path, default=HERE / "training_gpu.csv")
    args = parser.parse_args()
    path = args.csv if args.csv.is_absolute() else HERE / args.csv
    failed, first = 0, None
    for name in OPTIMIZERS:
        case = Case(args.model, args.length, args.step_tokens, args.micro_batch, tuple(args.mode), args.residual, name)
        try:
            second = append_row(path, case, args.device, first, warmup=args.warmup, steps=args.steps)
        except Exception:
            traceback.print_exc()
            failed += 1
            continue
        first = first or second
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
