"""Cost of a teacher per training step: models run on every batch, or soft targets computed once.

    python benchmarks/teachers.py                       w64 and w128 on one CPU thread (a minute), into teachers.csv
    python benchmarks/teachers.py --model ic-150m --members 8 --tokens 8192 --device cuda --csv teachers_gpu.csv

A step is forward, backward and AdamW on random tokens. The three kinds alternate, so that load on the machine cancels in
their ratios. "cached" includes reading the targets of each row from disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import HERE, append, environment

from epochal.data.soft_targets import TargetStore, write_shard
from epochal.generation.soft_targets import _sample
from epochal.models.llama import build_model
from epochal.run import SoftTargetDistillation
from epochal.training.loop import ModelWithLoss
from epochal.training.noise import Noise
from epochal.training.teacher import CachedTeacher, OnlineTeacher


class Stream:
    """A stream of 16 sequences in order."""

    def place(self, row: int) -> int:
        """Return the sequence of a row."""
        return row % 16


def cached_teacher(folder: Path, vocabulary: int, length: int, keep: int) -> CachedTeacher:
    """Return a teacher with 16 sequences of random targets, written to `folder`."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(16):
        logits = 2.0 * torch.randn(length - 1, vocabulary, generator=generator, dtype=torch.float64)
        sequences.append(_sample(torch.softmax(logits, 1), keep, generator))
    write_shard(folder / "shard-00000.json", iter(sequences), vocabulary)
    meta = {"vocab_size": vocabulary, "keep": keep, "sequences_per_shard": 16}
    (folder / "meta.json").write_text(json.dumps(meta))
    teacher: Any = object.__new__(CachedTeacher)
    teacher.teach, teacher.stream = SoftTargetDistillation(source="t", mode="cached"), Stream()
    teacher.targets = TargetStore.open(folder)
    return teacher  # type: ignore[no-any-return]


def main() -> None:
    """Time the kinds alternately and append one row for each to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["w64", "w128"])
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="of a step, in sequences of 128")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=HERE / "teachers.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.model:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(name, options, Path(folder))
        for row in rows:
            append(options.csv, {**row, **environment(options.device)})
            print(row)


def measure(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each kind of teacher of one model."""
    length, device = 128, options.device
    tokens = torch.randint(options.vocabulary, (options.tokens // length, length), device=device)
    models = [
        build_model(name, vocab_size=options.vocabulary, max_positions=length, seed=seed).to(device).eval()
        for seed in range(options.members)
    ]
    teach = SoftTargetDistillation(source="e")
    teachers: dict[str, Any] = {
        "none": None,
        "cached": cached_teacher(folder, options.vocabulary, length, options.keep),
        "online": OnlineTeacher(teach, models, average="probs", shares=None),
    }
    noise = Noise(seed=0, dropout=0.0, input_mask_prob=0.0)
    student = build_model(name, vocab_size=options.vocabulary, max_positions=length, seed=99).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    objectives = {kind: ModelWithLoss(student, noise, teacher, "fp32") for kind, teacher in teachers.items()}
    clock = time.process_time if device == "cpu" else time.perf_counter  # CPU time: other processes may share the cores
    times: dict[str, list[float]] = {kind: [] for kind in teachers}
    for turn in range(options.repeats + 2):
        for kind, objective in objectives.items():
            started = clock()
            objective(tokens, 0, float(len(tokens) * (length - 1))).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn > 1:
                times[kind].append(clock() - started)
    ratios = {
        kind: statistics.median(one / plain for one, plain in zip(taken, times["none"], strict=True))
        for kind, taken in times.items()
    }
    return [
        {
            "model": name,
            "vocabulary": options.vocabulary,
            "tokens": options.tokens,
            "members": options.members if kind == "online" else "",
            "keep": options.keep if kind == "cached" else "",
            "teacher": kind,
            "milliseconds": round(1e3 * statistics.median(times[kind]), 3),
            "against_none": round(ratios[kind], 3),
        }
        for kind in teachers
    ]


if __name__ == "__main__":
    main()
