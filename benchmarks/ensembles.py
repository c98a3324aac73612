"""Cost of an ensemble of K models relative to one: sampling in tokens/s, and peak memory of evaluation.

    python benchmarks/ensembles.py                                    the CPU rows (minutes), into ensembles.csv
    python benchmarks/ensembles.py --device cuda --csv ensembles_gpu.csv
    python benchmarks/ensembles.py --model w64 --tokens 64 --rounds 1 --csv /tmp/try.csv

Speed: batch 1, sampling after a short prompt; one model and the ensembles alternate, and `ratio` is the median over
rounds of the ratio to one model. The goal for "one member a token" at K = 8 is 0.5; running all members gives about
1 / K. Memory: one process per row, `ratio` is its peak over that of K = 1. The goal at K = 16 is 1.2. Members have
random weights, which affect neither. Rows already in the CSV are skipped.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import HERE, append, environment, known
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from epochal.evaluation.ensembles import ensemble_losses
from epochal.models.ensemble import EnsembleForCausalLM
from epochal.models.llama import build_model

SYSTEMS = {
    "one member a token": ("probs", 0),
    "all members, probs": ("probs", 10**6),
    "all members, logits": ("logits", 0),
}
"""Name to (average, top_k); a top_k above the vocabulary keeps all tokens but needs the mean distribution."""


def write_members(folder: Path, args: argparse.Namespace, count: int) -> list[Path]:
    paths = [folder / str(seed) for seed in range(count)]
    for seed, path in enumerate(paths):
        build_model(args.model, vocab_size=args.vocabulary, max_positions=4096, seed=seed).save_pretrained(path)
    return paths


def tokens_per_second(model: Any, args: argparse.Namespace, top_k: int = 0) -> float:
    prompt = torch.zeros(1, 8, dtype=torch.long, device=args.device)
    start = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=top_k, max_new_tokens=args.tokens
    )
    if args.device == "cuda":
        torch.cuda.synchronize()
    return args.tokens / (time.perf_counter() - start)


def measure_speed(args: argparse.Namespace, path: Path) -> None:
    keys = {"question": "tokens/s", "model": args.model, "vocabulary": args.vocabulary, "tokens": args.tokens}
    keys |= {"members": args.members, **environment(args.device)}
    if known(path, {**keys, "system": "one member a token"}):
        print("already measured:", *keys.values())
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = write_members(Path(folder), args, args.members)
        alone = AutoModelForCausalLM.from_pretrained(paths[0]).eval().to(args.device)
        ensembles = {
            average: EnsembleForCausalLM.from_members(paths, average=average).to(args.device)
            for average in ("probs", "logits")
        }
        tokens_per_second(alone, args)
        rates: dict[str, list[float]] = {name: [] for name in ("one model", *SYSTEMS)}
        ratios: dict[str, list[float]] = {name: [] for name in rates}
        for _ in range(args.rounds):
            before = tokens_per_second(alone, args)
            rates_now = {name: tokens_per_second(ensembles[average], args, k) for name, (average, k) in SYSTEMS.items()}
            base = (before + tokens_per_second(alone, args)) / 2
            for name, rate in {"one model": base, **rates_now}.items():
                rates[name].append(rate)
                ratios[name].append(rate / base)
    for name in rates:
        row = {"value": f"{statistics.median(rates[name]):.4g}", "ratio": f"{statistics.median(ratios[name]):.4g}"}
        append(path, {**keys, "system": name, **row})


def peak_of_evaluation(args: argparse.Namespace) -> float:
    """Peak memory in MB of this process while it evaluates an ensemble with members on disk."""
    logging.disable_progress_bar()
    folder = Path(args.folder)

    def load(seed: int) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / str(seed)).eval()

    sequences = np.random.default_rng(0).integers(0, args.vocabulary, (args.tokens // 128, 128))
    ensemble_losses([partial(load, seed) for seed in range(args.members)], sequences, average=args.average)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure_memory(args: argparse.Namespace, path: Path) -> None:
    counts = (1, args.members)
    with tempfile.TemporaryDirectory() as folder:
        write_members(Path(folder), args, max(counts))
        for average in ("logits", "probs"):
            peaks: dict[int, float] = {}
            for members in counts:
                keys = {"question": "peak MB", "model": args.model, "vocabulary": args.vocabulary}
                keys |= {"tokens": args.tokens, "members": members, **environment("cpu")}
                case = ["--question", "memory", "--average", average, "--folder", folder, "--model", args.model]
                case += ["--vocabulary", str(args.vocabulary), "--tokens", str(args.tokens), "--members", str(members)]
                done = subprocess.run([sys.executable, __file__, *case], check=True, stdout=subprocess.PIPE, text=True)
                peaks[members] = float(done.stdout.split()[-1])
                row = {"value": f"{peaks[members]:.5g}", "ratio": f"{peaks[members] / peaks[counts[0]]:.4g}"}
                if not known(path, {**keys, "system": average}):
                    append(path, {**keys, "system": average, **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="both", choices=("both", "speed", "memory"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="ic-150m", help="a name from configs/models, or a path")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=128, help="tokens sampled; for memory, evaluated")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=HERE / "ensembles.csv")
    parser.add_argument("--average", default="logits", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.csv if args.csv.is_absolute() else HERE / args.csv
    if args.folder:
        print(peak_of_evaluation(args))
        return
    if args.question != "memory":
        measure_speed(args, path)
    if args.question != "speed":
        # 16 members take minutes, and an additional member in memory would be visible in the peak.
        args.model, args.vocabulary, args.tokens, args.members = "gpu-25m", 8192, 2048, 16
        measure_memory(args, path)


if __name__ == "__main__":
    main()
