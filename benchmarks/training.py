"""Training throughput of one device, and the optimizer's share of a step.

    python benchmarks/training.py                                                       one GPU, into training_gpu.csv
    python benchmarks/training.py --device cpu --model w32 --step-tokens 1024 --micro-batch 4 --csv /tmp/try.csv

The parts of the training loop on random tokens: a Llama of transformers in bf16 autocast, the fused loss, accumulation,
clipping. MFU counts 6 operations for each parameter a token multiplies (the input embedding is a lookup) and 12 L d T for
attention, against the dense bf16 peak. Rows already in the CSV are skipped; ratios are to AdamW of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
from measure import HERE, append, environment, known

from epochal.distributed.processes import Processes
from epochal.models.config import parameter_counts
from epochal.models.llama import build_model, load_config
from epochal.optim.build import build_optimizer
from epochal.optimizer_config import AdamW, Fira, Muon, Optimizer, Spectra
from epochal.provenance import utilisation
from epochal.training.loop import ModelWithLoss
from epochal.training.noise import Noise

OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": AdamW(lr=1e-3),
    "SPECTRA-AdamW": Spectra(base=AdamW(lr=1e-3)),
    "Muon": Muon(lr=1e-3),
    "Fira": Fira(lr=1e-2),
}


def measure(optimizer: Optimizer, args: argparse.Namespace) -> dict[str, object]:
    """Train for a few steps; returns the columns of a row."""
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = load_config(args.model)
    model = build_model(args.model, vocab_size=config.vocab_size, max_positions=args.length, seed=0)
    processes = Processes(clip_norm=1.0, micro_batch=args.micro_batch)
    noise = Noise(seed=0, dropout=0.0, input_mask_prob=0.0)
    noise.attach(model)
    processes.prepare(
        ModelWithLoss(model, noise, None, "bf16"),
        lambda module: build_optimizer(module, optimizer, steps=1000),
    )
    sequences = args.step_tokens // args.length
    tokens = torch.randint(config.vocab_size, (sequences, args.length), device=args.device)
    targets, whole, update = sequences * (args.length - 1), [], []
    for step in range(args.warmup + args.steps):
        begin = mark(args.device)
        for first, part in zip(range(0, sequences, args.micro_batch), tokens.split(args.micro_batch), strict=True):
            with processes.accumulating(last=first + args.micro_batch >= sequences):
                processes.backward(processes.wrapped(part, first, targets))
        before = mark(args.device)
        processes.step()
        end = mark(args.device)
        if step >= args.warmup:
            whole.append(between(begin, end))
            update.append(between(before, end))
    counts = parameter_counts(args.model, vocab_size=config.vocab_size)
    each = 6 * (counts.total - config.vocab_size * config.hidden_size)
    each += 12 * config.num_hidden_layers * config.hidden_size * args.length
    second = statistics.median(whole)
    mfu = utilisation(each * args.step_tokens / second, devices=1)
    return {
        "seconds": f"{second:.5g}",
        "optimizer_seconds": f"{statistics.median(update):.4g}",
        "tokens_per_second": f"{args.step_tokens / second:.0f}",
        "mfu": "" if mfu is None else f"{mfu:.4f}",
        "peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.4g}" if args.device == "cuda" else "",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="spectra-160m")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--step-tokens", type=int, default=131_072)
    parser.add_argument("--micro-batch", type=int, default=64, help="sequences at once")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--csv", type=Path, default=HERE / "training_gpu.csv")
    args = parser.parse_args()
    path = args.csv if args.csv.is_absolute() else HERE / args.csv
    case = {
        "model": args.model,
        "length": args.length,
        "step_tokens": args.step_tokens,
        "micro_batch": args.micro_batch,
    }
    failed, first = 0, None
    for name, optimizer in OPTIMIZERS.items():
        keys = {**case, "optimizer": name, **environment(args.device)}
        if first is not None and known(path, keys):
            print("already measured:", *keys.values())
            continue
        try:
            row = measure(optimizer, args)
        except Exception:
            traceback.print_exc()
            failed += 1
            continue
        first = first or float(str(row["seconds"]))
        if not known(path, keys):
            append(path, {**keys, **row, "ratio_to_adamw": f"{float(str(row['seconds'])) / first:.4g}"})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
