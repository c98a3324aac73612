"""Time and memory of the distillation loss by number of teachers, against the materialised loss and other libraries.

    python benchmarks/losses.py                                   the CPU rows (minutes), into losses.csv
    python benchmarks/losses.py --device cuda --csv losses_gpu.csv
    python benchmarks/losses.py --tokens 64 --vocabulary 128 --width 16 --csv /tmp/try.csv

One process per row, because the peak memory of a CPU process never falls. Measured are forward and backward of the loss;
memory is the peak above the inputs. Rows already in the CSV are skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import HERE, PeakMemory, append, environment, known, seconds
from torch import Tensor

from epochal import loss

METHODS = ("fused", "cached", "materialised", "torch.compile", "linear_cross_entropy", "liger")
STORED = 64
"""Probabilities per token of a cached teacher."""


def materialised(
    hidden: Tensor, head: Tensor, targets: Tensor, teachers: list[tuple[Tensor, Tensor]], average: str
) -> Tensor:
    """The loss without fusion: all logits of the student, teachers one after the other."""
    z = hidden @ head.t()
    if not teachers:
        return F.cross_entropy(z.float(), targets)
    share = 1.0 / len(teachers)
    with torch.no_grad():
        soft: Tensor | None = None
        for x, w in teachers:
            part = (x @ w.t()).float()
            part = share * (part if average == "logits" else part.softmax(1))
            soft = part if soft is None else soft + part
        assert soft is not None
        soft = soft.softmax(1) if average == "logits" else soft
    log_q = z.float().log_softmax(1)
    return 0.5 * F.nll_loss(log_q, targets) + 0.5 * F.kl_div(log_q, soft, reduction="batchmean")


def step(method: str, average: str, inputs: tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]) -> Tensor:
    """The loss of one method; the caller runs backward."""
    hidden, head, targets, teachers = inputs
    if method == "cached":
        ids, probs = teachers[0]
        return loss.cached_distillation_loss(hidden, head, targets, ids, probs, weight=0.5)
    if method == "fused" and teachers:
        return loss.distillation_loss(hidden, head, targets, teachers, average=average, weight=0.5)
    if method == "fused":
        return loss.cross_entropy(hidden, head, targets)
    if method == "linear_cross_entropy":
        return F.linear_cross_entropy(hidden, head, targets)
    if method == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(head, hidden, targets)
    return materialised(hidden, head, targets, teachers, average)


def stored(tokens: int, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) of distinct tokens with 90% of the mass."""
    count = min(STORED, vocabulary)
    steps = torch.arange(count, device=device) * (vocabulary // count)
    first = torch.randint(vocabulary, (tokens, 1), device=device)
    return (first + steps) % vocabulary, torch.randn(tokens, count, device=device).softmax(1) * 0.9


def measure_one(args: argparse.Namespace) -> dict[str, object]:
    """Time and memory of one case in this process."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    make = {"device": args.device, "dtype": dtype}

    def pair() -> tuple[Tensor, Tensor]:
        x = torch.randn(args.tokens, args.width, **make)
        # in-place: a temporary of this size would raise the peak before the measurement
        return x, torch.randn(args.vocabulary, args.width, **make).mul_(args.width**-0.5)

    hidden, head = pair()
    targets = torch.randint(args.vocabulary, (args.tokens,), device=args.device)
    teachers = [pair() for _ in range(args.teachers)]
    if args.method == "cached":
        teachers = [stored(args.tokens, args.vocabulary, args.device)]
    inputs = (hidden.requires_grad_(), head.requires_grad_(), targets, teachers)
    run: Callable[..., Tensor] = torch.compile(step) if args.method == "torch.compile" else step

    def once() -> None:
        hidden.grad = head.grad = None
        run(args.method, args.average, inputs).backward()

    # Warm-up: libraries and thread pools allocate on first use.
    tiny = torch.randn(8, 8, **make)
    step("fused", "logits", (tiny.requires_grad_(), tiny, targets[:8] % 8, [(tiny.detach(), tiny.detach())])).backward()
    with PeakMemory(args.device) as peak:
        first = seconds(once, args.device, 1)
    again = seconds(once, args.device, args.repeats) if args.repeats else first
    return {
        "path": loss.backend(args.device),
        "seconds": f"{min(first, again):.5g}",
        "peak_mb": f"{peak.megabytes:.5g}",
    }


def cases(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(method, average, teachers): the fused loss by K, then its competitors."""
    rows = [("fused", "none", 0), ("cached", f"top {STORED}", 0)]
    rows += [("fused", a, k) for k in (1, 8) for a in ("logits", "probs")]
    rows += [("materialised", "none", 0), ("linear_cross_entropy", "none", 0)]
    rows += [("materialised", "logits", k) for k in (1, 8)] + [("materialised", "probs", 8)]
    if args.device == "cuda":
        rows += [("torch.compile", "none", 0), ("torch.compile", "logits", 8), ("liger", "none", 0)]
    return [row for row in rows if why_not(row[0], args) is None]


def why_not(method: str, args: argparse.Namespace) -> str | None:
    """Print and return why a method cannot be measured on this machine."""
    reason = None
    needed = 7 * 4 * args.tokens * args.vocabulary  # the most blocks of (tokens, vocabulary) alive at once, in float32
    if method == "liger" and not importlib.util.find_spec("liger_kernel"):
        reason = "liger-kernel is not installed"
    elif method == "materialised" and args.device == "cpu" and needed > available_memory():
        reason = f"{needed / 1e9:.0f} GB of memory are not available"
    elif method == "linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        reason = f"torch {torch.__version__} does not have it"
    if reason:
        print(f"left out: {method}, because {reason}")
    return reason


def available_memory() -> int:
    """Bytes that a process could allocate now; unlimited if unknown."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**62)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1, help="further timed calls; the minimum is recorded")
    parser.add_argument("--csv", type=Path, default=HERE / "losses.csv")
    parser.add_argument("--method", choices=sorted(set(METHODS)), help=argparse.SUPPRESS)
    parser.add_argument("--average", default="none", help=argparse.SUPPRESS)
    parser.add_argument("--teachers", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.csv if args.csv.is_absolute() else HERE / args.csv
    if args.method is None:
        failed = 0
        for method, average, teachers in cases(args):
            case = ["--method", method, "--average", average, "--teachers", str(teachers)]
            failed += subprocess.run([sys.executable, __file__, *sys.argv[1:], *case], check=False).returncode != 0
        raise SystemExit(1 if failed else 0)
    keys = {"method": args.method, "average": args.average, "teachers": args.teachers, "tokens": args.tokens}
    keys |= {"vocabulary": args.vocabulary, "width": args.width, "dtype": args.dtype, **environment(args.device)}
    if known(path, keys):
        print("already measured:", *keys.values())
        return
    try:
        append(path, {**keys, **measure_one(args)})
    except torch.OutOfMemoryError as error:
        print(f"left out: {args.method} with {args.teachers} teachers, because it does not fit: {error}".split(". ")[0])


if __name__ == "__main__":
    main()
