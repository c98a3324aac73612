"""What do the optimizers cost, and how wrong are they, against the code they were published with?

    python benchmarks/optimizers.py                                     every question, CPU, into optimizers.csv
    python benchmarks/optimizers.py --question clip --shapes 768x3072

One function for a question; the methods of a case are timed in turn in one process, so that `ratio` (time over the
published way) comes from one run. Rows already in the CSV are skipped.

clip: SPECTRA's soft clip at c = 10 of a float32 matrix, Gaussian or sign-like (the sign of a rank-8 matrix and noise,
as the updates of sign methods and early Adam are), against the published ten steps in bfloat16. `error` is relative,
in the Frobenius norm, against float64; `ceiling` is the largest singular value over c.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure import HERE, append, environment, known, seconds
from torch import Tensor

from epochal.optim import soft_spectral_clip

CLIP = 10.0
CLIP_METHODS = ("published", "newton_schulz", "exact", "minimax", "auto")


def published_clip(x: Tensor, c: float, steps: int = 10, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The clip as SPECTRA's code does it (order of operations from its description): every step, every product."""
    wide = x.to(dtype)
    wide = wide.mT if x.shape[0] > x.shape[1] else wide
    gram = wide @ wide.mT
    bound = torch.minimum(gram.abs().sum(-1).max(), torch.linalg.matrix_norm(gram))
    eye = torch.eye(len(gram), dtype=dtype, device=x.device)
    a = 1 + bound / c**2
    y, z = (eye + gram / c**2) / a, eye
    for _ in range(steps):
        t = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    out = (z / a.sqrt()) @ wide
    return (out.mT if x.shape[0] > x.shape[1] else out).to(x.dtype)


def clip_input(kind: str, rows: int, columns: int) -> Tensor:
    """A float32 matrix whose entries have the size of an update's."""
    torch.manual_seed(0)
    noise = torch.randn(rows, columns)
    return noise if kind == "gaussian" else torch.sign(torch.randn(rows, 8) @ torch.randn(8, columns) + noise)


def true_clip(x: Tensor, c: float) -> Tensor:
    """The definition, in float64 (at these condition numbers the Gram matrix loses nothing that would show)."""
    x = x.double()
    values, vectors = torch.linalg.eigh(x @ x.mT)
    return (vectors / torch.sqrt(1 + values.clamp(min=0) / c**2)) @ (vectors.mT @ x)


def clip(args: argparse.Namespace) -> None:
    """How long does SPECTRA's clip take, and how wrong is it?"""
    for shape in args.shapes:
        rows, columns = (int(part) for part in shape.split("x"))
        for kind in ("gaussian", "sign"):
            keys = {"question": "clip", "shape": shape, "input": kind, **environment(args.device)}
            if known(args.csv, keys):
                print("already measured:", *keys.values())
                continue
            x = clip_input(kind, rows, columns)
            truth = true_clip(x, CLIP)
            x = x.to(args.device)
            ways: dict[str, Callable[[], Tensor]] = {"published": lambda x=x: published_clip(x, CLIP)}
            for method in CLIP_METHODS[1:]:
                ways[method] = lambda x=x, method=method: soft_spectral_clip(x, CLIP, method=method)
            outs = {method: way().double().cpu() for method, way in ways.items()}
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(args.repeats):
                for method, way in ways.items():
                    best[method] = min(best[method], seconds(way, args.device, 1))
            for method, out in outs.items():
                error = torch.linalg.matrix_norm(out - truth) / torch.linalg.matrix_norm(truth)
                ceiling = torch.linalg.eigvalsh(out @ out.mT)[-1].sqrt() / CLIP
                append(
                    args.csv,
                    {
                        **keys,
                        "method": method,
                        "seconds": f"{best[method]:.4g}",
                        "ratio": f"{best[method] / best['published']:.3f}",
                        "error": f"{float(error):.2e}",
                        "ceiling": f"{float(ceiling):.4f}",
                    },
                )


QUESTIONS = {"clip": clip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", choices=sorted(QUESTIONS), help="one only; all without it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["768x3072", "2048x5632"], help="rows x columns")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the best of each method counts")
    parser.add_argument("--csv", type=Path, default=HERE / "optimizers.csv")
    args = parser.parse_args()
    args.csv = args.csv if args.csv.is_absolute() else HERE / args.csv
    torch.set_num_threads(args.threads)
    for name, question in QUESTIONS.items():
        if args.question in (None, name):
            question(args)


if __name__ == "__main__":
    main()
