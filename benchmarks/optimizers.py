"""What do the optimizers cost, and how wrong are they, against the code they were published with?

    python benchmarks/optimizers.py                                     every question, CPU, into optimizers.csv
    python benchmarks/optimizers.py --question clip --shapes 768x3072
    python benchmarks/optimizers.py --question step --spectra-code PATH  with SPECTRA's own code, a clone of its repository

One function for a question; the methods of a case are timed alternately in one process, so that `ratio` (time over the
published way) comes from one run. Rows already in the CSV are skipped.

clip: SPECTRA's soft clip at c = 10 of a float32 matrix, Gaussian or sign-like (the sign of a rank-8 matrix and noise,
as the updates of sign methods and early Adam are), against the published ten steps in bfloat16. `error` is relative,
in the Frobenius norm, against float64; `ceiling` is the largest singular value over c.

fira: one matrix (rows x columns x rank, float32, singular values falling as 1/k), a step between two refreshes and one
with a refresh, and the refresh alone ("basis"), against the package `fira`; `error` is the share of the best possible
energy that the basis misses.
step: a step of each optimizer over the 56 matrices of a 60M model (8 blocks of 4 512x512, 2 1376x512, 1 512x1376), against
the package `fira` for Fira, torch's AdamW wrapped as SPECTRA's code wraps it for Spectra, torch's Muon for Muon and torch's
fused AdamW for the others: `ratio` is time, `error` the peak of memory beyond weights, gradients and state in MB (as
torch's allocator counts it), `ceiling` the state in MB.
With --spectra-code, the wrapper is the published one (PATH/src/optim/spectra.py), and clip has a row of the published
function; else a rewrite from its description.
fira_stagger: steps of 56 matrices of a 60M model after the first; `ratio` is the slowest step over the median.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import HERE, append, environment, known, seconds
from torch import Tensor

from epochal.optim import AdEMAMix, Lion, Mars, Muon, Signum, Spectra, soft_spectral_clip
from epochal.optim.fira import Fira
from epochal.optim.projection import compute_basis

CLIP = 10.0
CLIP_METHODS = ("published", "newton_schulz", "exact", "polar", "auto")


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
    for shape in args.shapes or ["768x3072", "2048x5632"]:
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
            if args.spectra_code:
                theirs = published_module(args.spectra_code, "post_process").clip_sigvals
                ways["published code"] = lambda x=x, theirs=theirs: theirs(x, CLIP)
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


def one_over_k(rows: int, columns: int) -> Tensor:
    """A gradient-like matrix with singular values 1, 1/2, 1/3, ..."""
    torch.manual_seed(0)
    k = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(size, k)).Q for size in (rows, columns))
    return 0.1 * (left / torch.arange(1, k + 1)) @ right.mT


def fira_ways(gradient: Tensor, rank: int, gap: int) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for each way to refresh, and the package's, each with its own matrix."""
    from fira import FiraAdamW

    def groups() -> list[dict[str, object]]:
        p = torch.nn.Parameter(torch.zeros_like(gradient))
        p.grad = gradient
        return [{"params": [p], "rank": rank, "update_proj_gap": gap, "alpha": 0.25, "proj_type": "std"}]

    published = f"fira {importlib.metadata.version('fira')}"
    ways: dict[str, torch.optim.Optimizer] = {published: FiraAdamW(groups(), no_deprecation_warning=True)}
    return ways | {method: Fira(groups(), refresh=method) for method in ("svd", "gram", "subspace")}


def fira_bases(gradient: Tensor, rank: int) -> dict[str, Callable[[], Tensor]]:
    """The refresh alone; "subspace" starts from the basis of a gradient with 30% noise."""
    from fira.gradient_projection import GradientProjector

    side = "right" if gradient.shape[0] >= gradient.shape[1] else "left"
    noise = torch.randn_like(gradient)
    noise *= 0.3 * torch.linalg.matrix_norm(gradient) / torch.linalg.matrix_norm(noise)
    older = compute_basis(gradient + noise, rank, side, method="gram")
    projector = GradientProjector(rank)
    ways: dict[str, Callable[[], Tensor]] = {
        f"fira {importlib.metadata.version('fira')}": lambda: projector.get_orthogonal_matrix(gradient, rank, side)
    }
    for method in ("svd", "gram", "subspace"):
        ways[method] = lambda method=method: compute_basis(gradient, rank, side, method=method, previous=older)
    return ways


def missed_energy(gradient: Tensor, basis: Tensor) -> float:
    """1 - the energy in the subspace over the most that a subspace of this rank can hold."""
    wide, rank = gradient.double(), min(basis.shape)
    low = basis.double().mT @ wide if len(basis) == len(wide) else wide @ basis.double().mT
    return 1 - float(low.square().sum() / torch.linalg.svdvals(wide)[:rank].square().sum())


def fira(args: argparse.Namespace) -> None:
    """How long does a step of Fira take, between refreshes and with one, and a refresh alone?"""
    for shape in args.shapes or ["512x512x128", "768x3072x256", "2048x5504x512"]:
        rows, columns, rank = (int(part) for part in shape.split("x"))
        gradient = one_over_k(rows, columns).to(args.device)
        for kind, gap in (("plain", 10**9), ("refresh", 1), ("basis", 0)):
            keys = {"question": "fira", "shape": shape, "input": kind, **environment(args.device)}
            if known(args.csv, keys):
                print("already measured:", *keys.values())
                continue
            ways: dict[str, Callable[[], object]] = dict(fira_bases(gradient, rank))
            errors = dict.fromkeys(ways, "")
            if gap:
                ways = {method: optimizer.step for method, optimizer in fira_ways(gradient, rank, gap).items()}
            else:
                errors = {method: f"{missed_energy(gradient, way()):.1e}" for method, way in ways.items()}
            best = dict.fromkeys(ways, float("inf"))
            for way in ways.values():
                way()
            for _ in range(args.repeats * (10 if kind == "plain" else 1)):
                for method, way in ways.items():
                    best[method] = min(best[method], seconds(way, args.device, 1))
            first = best[next(iter(ways))]
            for method, time in best.items():
                row = {"method": method, "seconds": f"{time:.4g}", "ratio": f"{time / first:.3f}"}
                append(args.csv, {**keys, **row, "error": errors[method], "ceiling": ""})


def fira_stagger(args: argparse.Namespace) -> None:
    """Is any step much slower than the others when the refreshes are spread?"""
    gradients = {shape: one_over_k(*shape).to(args.device) for shape in ((512, 512), (1376, 512), (512, 1376))}
    block = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
    for method in ("gram", "subspace"):
        for stagger in (False, True):
            name = "staggered" if stagger else "aligned"
            keys = {"question": "fira_stagger", "shape": "8 blocks", "input": name, **environment(args.device)}
            if known(args.csv, {**keys, "method": method}):
                print("already measured:", *keys.values(), method)
                continue
            params = [torch.nn.Parameter(torch.zeros_like(gradients[shape])) for shape in block * 8]
            for p, shape in zip(params, block * 8, strict=True):
                p.grad = gradients[shape]
            group = {"params": params, "rank": 128, "update_proj_gap": 56, "alpha": 0.25}
            optimizer = Fira([group], refresh=method, stagger=stagger)
            optimizer.step()  # everything needs a basis to begin with
            times = [seconds(optimizer.step, args.device, 1) for _ in range(60)]
            row = {"method": method, "seconds": f"{max(times):.4g}"}
            row["ratio"] = f"{max(times) / statistics.median(times):.3f}"
            append(args.csv, {**keys, **row, "error": "", "ceiling": ""})


BLOCK = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]


class Wrapped:
    """AdamW with its updates clipped from outside, as SPECTRA's code does it: clone, step, recover U, clip, step again."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, wd: float) -> None:
        self.base = torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=wd, fused=True)
        self.params, self.lr, self.wd = params, lr, wd
        self.state = self.base.state

    @torch.no_grad()
    def step(self) -> None:
        before = [p.detach().clone() for p in self.params]
        self.base.step()
        for p, old in zip(self.params, before, strict=True):
            update = (old - p) / self.lr - self.wd * old
            alpha = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.copy_((1 - self.lr * self.wd) * old - alpha * self.lr * published_clip(update, CLIP))


def published_module(path: Path, name: str) -> Any:
    """A module of the published code, out of a clone of its repository; raises ValueError when it is not there."""
    if not (path / "src" / "optim" / f"{name}.py").is_file():
        raise ValueError(f"{path} holds no src/optim/{name}.py; give the path of a clone of llm-spectral-clipping.")
    if str(path / "src") not in sys.path:
        sys.path.insert(0, str(path / "src"))
    return importlib.import_module(f"optim.{name}")


def published_spectra(path: Path, params: list[torch.nn.Parameter]) -> Any:
    """The published wrapper around AdamW."""
    base = torch.optim.AdamW(params, 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return published_module(path, "spectra").SPECTRA(base, clip_c=CLIP, base_lr=1e-3)


def optimizer_ways(args: argparse.Namespace) -> dict[str, Any]:
    """Every optimizer over its own weights; the baseline comes first."""
    gradients = {shape: one_over_k(*shape).to(args.device) for shape in set(BLOCK)}

    def params() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.zeros_like(gradients[shape])) for shape in BLOCK * 8]
        for p, shape in zip(made, BLOCK * 8, strict=True):
            p.grad = gradients[shape]
        return made

    def projected(**keys: object) -> list[dict[str, object]]:
        return [{"params": params(), "rank": 128, "update_proj_gap": 10**9, "alpha": 0.25, "proj_type": "std", **keys}]

    from fira import FiraAdamW

    ways: dict[str, Any] = {
        f"fira {importlib.metadata.version('fira')}": FiraAdamW(projected(), no_deprecation_warning=True)
    }
    ways["Fira"] = Fira(projected())
    if args.spectra_code:
        ways["spectra, published"] = published_spectra(args.spectra_code, params())
    else:
        ways["spectra, rewritten"] = Wrapped(params(), 1e-3, 0.1)
    ways["Spectra"] = Spectra(params(), 1e-3)
    ways["Muon (torch)"] = torch.optim.Muon(params(), 1e-3)
    ways["Muon"] = Muon(params(), 1e-3)
    ways["AdamW (torch)"] = torch.optim.AdamW(params(), 1e-3, fused=True)
    makes = {"Signum": Signum, "AdEMAMix": AdEMAMix, "Mars": Mars, "Lion": Lion}
    return ways | {name: make(params(), 1e-3) for name, make in makes.items()}


def peak_of(function: Callable[[], object]) -> float:
    """The most that one call holds beyond what was held before, in MB, as torch's allocator counts it."""
    held = highest = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest / 1e6


def step(args: argparse.Namespace) -> None:
    """How long does a step between refreshes take, how much memory does it need, and how much state does it keep?"""
    keys = {"question": "step", "shape": "8 blocks", "input": "1/k", **environment(args.device)}
    if known(args.csv, keys):
        print("already measured:", *keys.values())
        return
    ways = optimizer_ways(args)
    for way in ways.values():
        way.step()
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(args.repeats):
        for name, way in ways.items():
            best[name] = min(best[name], seconds(way.step, args.device, 1))
    reference = ""
    for name, way in ways.items():
        reference = name if name.startswith(("fira ", "spectra,", "AdamW", "Muon (")) else reference
        tensors = [value for state in way.state.values() for value in state.values() if isinstance(value, Tensor)]
        memory = {"error": f"{peak_of(way.step):.1f}", "ceiling": f"{sum(t.nbytes for t in tensors) / 1e6:.1f}"}
        row = {"method": name, "seconds": f"{best[name]:.4g}", "ratio": f"{best[name] / best[reference]:.3f}"}
        append(args.csv, {**keys, **row, **memory})


QUESTIONS = {"clip": clip, "fira": fira, "fira_stagger": fira_stagger, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", choices=sorted(QUESTIONS), help="one only; all without it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", help="rows x columns; fira: x rank")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the best of each method counts")
    parser.add_argument("--spectra-code", type=Path, help="a clone of the repository SPECTRA was published with")
    parser.add_argument("--csv", type=Path, default=HERE / "optimizers.csv")
    args = parser.parse_args()
    args.csv = args.csv if args.csv.is_absolute() else HERE / args.csv
    torch.set_num_threads(args.threads)
    for name, question in QUESTIONS.items():
        if args.question in (None, name):
            question(args)


if __name__ == "__main__":
    main()
