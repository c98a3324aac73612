"""How fast is each kernel, in GB/s or TFLOP/s and against torch, torch.compile and the published optimizers?

    python benchmarks/kernel_times.py --device cuda                     into kernels_gpu.csv, row by row
    TRITON_INTERPRET=1 python benchmarks/kernel_times.py --tiny --csv /tmp/try.csv     runs to its end; the times mean nothing

Bytes and multiplications are those the operation needs, not those a method makes, so rates compare across methods.
Rows already in the CSV are skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from measure import HERE, append, environment, known, seconds
from torch import Tensor

from epochal.optim import fira, soft_spectral_clip
from epochal.optim.fira import Fira
from epochal.optim.muon import orthogonalize
from triton_kernels.backend import backend
from triton_kernels.softmax_add import softmax_add
from triton_kernels.softmax_loss import softmax_loss, softmax_loss_reference
from triton_kernels.sparse_loss import sparse_loss, sparse_loss_reference

# (shape, method -> function, bytes moved at least, floating-point operations at least)
Case = tuple[str, dict[str, Callable[[], object]], float, float]

COMPILED = torch.compile(softmax_loss_reference)


def softmax_cases(device: str, tiny: bool) -> list[Case]:
    cases: list[Case] = []
    for rows, vocabulary in [(4, 60)] if tiny else [(4096, 50304), (4096, 128256)]:
        z = torch.randn(rows, vocabulary, device=device)
        y = torch.randint(vocabulary, (rows,), device=device)
        p = torch.randn_like(z).softmax(1)
        top, ids = p.topk(min(64, vocabulary), 1)
        shape, size = f"{rows}x{vocabulary}", float(rows * vocabulary * 4)
        methods: dict[str, Callable[[], object]] = {
            "kernel": lambda z=z, y=y, p=p: softmax_loss(z, y, p, 0.5),
            "torch": lambda z=z, y=y, p=p: softmax_loss_reference(z, y, p, weight=0.5),
        }
        if device == "cuda":
            methods["torch.compile"] = lambda z=z, y=y, p=p: COMPILED(z, y, p, weight=0.5)
        cases.append((f"softmax_loss {shape}", methods, 3 * size, 0.0))
        add: dict[str, Callable[[], object]] = {
            "kernel": lambda z=z, p=p: softmax_add(p, z, 0.5, 2.0, True),
            "torch": lambda z=z, p=p: p.add_((z / 2.0).softmax(1), alpha=0.5),
        }
        cases.append((f"softmax_add {shape}", add, 3 * size, 0.0))
        sparse: dict[str, Callable[[], object]] = {
            "kernel": lambda z=z, y=y, ids=ids, top=top: sparse_loss(z, y, ids, top, 0.5),
            "torch": lambda z=z, y=y, ids=ids, top=top: sparse_loss_reference(z, y, ids, top, weight=0.5),
        }
        cases.append((f"sparse_loss {shape} k{top.shape[1]}", sparse, 2 * size, 0.0))
    return cases


def clip_cases(device: str, tiny: bool) -> list[Case]:
    """A clipped step of all matrices of equal shape in one stack, against one call per matrix of the published ten steps."""
    cases: list[Case] = []
    for layers, m, n in [(2, 20, 40)] if tiny else [(48, 768, 768), (24, 1600, 1600), (24, 2048, 2048)]:
        w, x = (torch.randn(layers, m, n, device=device) for _ in range(2))

        def update(w: Tensor, x: Tensor, method: str) -> None:
            for k in range(len(x)):
                w[k].mul_(0.99).sub_(soft_spectral_clip(x[k], 10.0, method=method), alpha=0.01)

        def stacked(w: Tensor, x: Tensor) -> Tensor:
            return w.mul_(0.99).sub_(soft_spectral_clip(x, 10.0, method="polar"), alpha=0.01)

        methods: dict[str, Callable[[], object]] = {
            "polar": functools.partial(stacked, w, x),
            "published steps": lambda w=w, x=x, update=update: update(w, x, "newton_schulz"),
            "muon, 5 steps": lambda w=w, x=x: w.mul_(0.99).sub_(orthogonalize(x), alpha=0.01),
        }
        if device == "cuda":
            compiled = torch.compile(orthogonalize)
            methods["muon, 5 steps, torch.compile"] = lambda w=w, x=x, compiled=compiled: w.mul_(0.99).sub_(
                compiled(x), alpha=0.01
            )
        published = float(layers * (4 * m * m * n + 60 * m**3))
        cases.append((f"spectral_clip {layers}x{m}x{n}", methods, 0.0, published))
    return cases


def fira_cases(device: str, tiny: bool) -> list[Case]:
    cases: list[Case] = []
    for batch, a, b, r in [(2, 12, 20, 4)] if tiny else [(48, 768, 768, 192), (24, 768, 3072, 192)]:
        w, g = (torch.randn(batch, a, b, device=device) for _ in range(2))
        shapes = {"basis": (batch, a, r), "exp_avg": (batch, r, b), "exp_avg_sq": (batch, r, b), "limiter": (batch,)}
        state = {name: torch.zeros(shape, device=device) for name, shape in (shapes | {"step": (batch,)}).items()}
        state["basis"] = torch.linalg.qr(torch.randn(batch, a, r, device=device))[0].contiguous()
        adam = torch.optim.AdamW([torch.nn.Parameter(w.clone())], fused=True)
        adam.param_groups[0]["params"][0].grad = g

        group = {"params": [torch.nn.Parameter(w[0].clone())], "rank": r, "alpha": 0.25}
        group = Fira([group], lr=1e-3, weight_decay=0.1).param_groups[0]
        run = functools.partial(fira.fira_update, w, g, state, group, "left")
        eager = functools.partial(fira._update_.__wrapped__, w, g, state, *fira.constants(w, state, group), "left")
        methods = {"Fira": run, "torch": eager, "fused AdamW": adam.step}
        if importlib.util.find_spec("fira"):
            methods["published Fira"] = published_fira(w, g, r)
        moved = float(4 * batch * (4 * a * b + 9 * r * b))
        cases.append((f"fira_step {batch}x{a}x{b} r{r}", methods, moved, float(4 * batch * a * b * r)))
    return cases


def published_fira(w: Tensor, g: Tensor, rank: int) -> Callable[[], object]:
    """A step of the published package over the same matrices, one parameter each; it never refreshes while timed."""
    from fira import FiraAdamW

    parameters = [torch.nn.Parameter(one.clone()) for one in w]
    for parameter, gradient in zip(parameters, g, strict=True):
        parameter.grad = gradient.clone()
    group = {"params": parameters, "rank": rank, "update_proj_gap": 10**9, "alpha": 0.25, "proj_type": "left"}
    step: Callable[[], object] = FiraAdamW([group], lr=1e-3, no_deprecation_warning=True).step
    return step


def reference_of(methods: dict[str, Callable[[], object]]) -> str:
    """What the ratios of a case are against: the published optimizer's clip, or torch."""
    return "published steps" if "published steps" in methods else "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="shapes for a trial under the interpreter")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=HERE / "kernels_gpu.csv")
    args = parser.parse_args()
    path = args.csv if args.csv.is_absolute() else HERE / args.csv
    repeats, failed = 1 if args.tiny else args.repeats, 0
    for make in (softmax_cases, clip_cases, fira_cases):
        for case in make(args.device, args.tiny):
            failed += measure_case(case, args.device, repeats, path)
    raise SystemExit(1 if failed else 0)


def measure_case(case: Case, device: str, repeats: int, path: Path) -> int:
    """Append the rows of a case that the CSV lacks and return how many methods failed, which cost the others nothing.

    The reference is timed again in any case, as ratios are of one run only.
    """
    name, methods, moved, operations = case
    reference = reference_of(methods)
    keys = {method: {"case": name, "method": method, **environment(device)} for method in methods}
    missing = [method for method in sorted(methods, key=lambda m: m != reference) if not known(path, keys[method])]
    if not missing:
        print("already measured:", name)
        return 0
    first, failed = timed(methods[reference], device, repeats), 0
    for method in missing:
        try:
            best = first if method == reference else timed(methods[method], device, repeats)
        except Exception:
            traceback.print_exc()
            print(f"failed: {name}, {method}", flush=True)
            failed += 1
            continue
        row: dict[str, object] = {**keys[method], "path": backend(device), "milliseconds": f"{best * 1e3:.5g}"}
        row["gb_per_s"] = f"{moved / best / 1e9:.4g}" if moved and best else ""
        row["tflop_per_s"] = f"{operations / best / 1e12:.4g}" if operations and best else ""
        row["ratio_to_reference"] = f"{best / first:.4g}" if first else ""
        append(path, row)
    return failed


def timed(function: Callable[[], object], device: str, repeats: int) -> float:
    """Best time in seconds after one call, which may compile, tune or refresh."""
    function()
    return seconds(function, device, repeats)


if __name__ == "__main__":
    main()
