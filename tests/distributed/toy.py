"""A model of many small odd matrices, trained on one process and, under a preset, on many."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import nn

from epochal import optim
from epochal.config import REPOSITORY
from epochal.distributed.first_step_check import ShardedUpdateCheck
from epochal.distributed.processes import Processes

STEPS, ROWS, VOCABULARY, WIDTH = 30, 8, 23, 12
PEAK = 5e-2
"""A learning rate at which weights move by about their own size, so that differences are not only their rounding."""

NAMES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
    "FSDP_TRANSFORMER_CLS_TO_WRAP",
)
BASES = ("adamw", "signum", "ademamix", "mars", "lion", "sgdm")


class Block(nn.Module):
    """Three matrices, one of them with 17 rows, which neither 2 nor 4 divides, and a vector."""

    inner = 17

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(self.inner, WIDTH, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(WIDTH, self.inner, generator=generator) / 4)
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 4)
        self.norm = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x @ self.mix.T) * self.norm
        return x + torch.tanh(y @ self.up.T) @ self.down.T


class Layers(nn.Module):
    def __init__(self, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(generator) for _ in range(depth))


class Toy(nn.Module):
    """A tied embedding and head, and blocks, under the names of a transformers Llama."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator) / 2)
        self.model = Layers(depth, generator)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class ModelWithLoss(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.model = Toy(depth)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(tokens[:, :-1], self.model.lm_head.weight)
        for block in self.model.model.layers:
            x = block(x)
        logits = x @ self.model.lm_head.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


class MakeOptimizer:
    """Builds an optimizer that treats the matrices of the blocks as matrices."""

    eps = 1e-3
    """Large, to damp rounding where a second moment is near zero."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        inside = [pair for pair in named if is_matrix(pair[0])]
        others = [pair for pair in named if not is_matrix(pair[0])]
        decayed: dict[str, Any] = {"params": [p for _, p in inside], "weight_decay": 0.1}
        kept: dict[str, Any] = {"params": [p for _, p in others], "weight_decay": 0.0}
        if self.kind == "adamw":
            return torch.optim.AdamW([decayed, kept], lr=1e-2, betas=(0.9, 0.95), eps=self.eps, fused=True)
        if self.kind == "fira":
            return optim.Fira([{**decayed, "rank": 4, "update_proj_gap": 15, "alpha": 0.5}, kept], eps=self.eps)
        if self.kind.startswith("muon"):
            return optim.Muon([decayed, {**kept, "orthogonalize": False}], eps=self.eps)
        base = self.kind.removesuffix("-spectra")
        own = {} if base in ("signum", "lion", "sgdm") else {"eps": self.eps}
        groups = [{**decayed, "params": inside}, {**kept, "params": others}]
        return optim.Spectra(groups, 1e-2, base=base, clip=0.5, apply_to=["layers.*(up|down|mix)"], **own)


def choose(preset: str) -> None:
    """Set the environment as `accelerate launch` would for a preset, given by name or as a DeepSpeed config's path."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the last call in this process may have had another preset
    for name in NAMES:
        os.environ.pop(name, None)
    if preset.startswith("zero") or preset.endswith(".json"):
        path = preset if preset.endswith(".json") else str(REPOSITORY / "configs" / "deepspeed" / f"{preset}.json")
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": path}
    elif preset.startswith("fsdp2"):
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        if preset == "fsdp2-nodes":
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Linear"


def start(preset: str, **settings: Any) -> Processes:
    choose(preset)
    return Processes(**{"clip_norm": 1e9, **settings})


def batch(step: int) -> torch.Tensor:
    """The global batch of a step."""
    return torch.randint(VOCABULARY, (ROWS, 9), generator=torch.Generator().manual_seed(step))


def take_step(processes: Processes, step: int, parts: int = 1, scale: float = 1.0) -> torch.Tensor:
    """One step on this process's rows of the batch, in `parts` micro-batches; returns the gradient norm."""
    rows = batch(step)[processes.rank :: processes.world]
    chunks = rows.chunk(parts)
    for number, chunk in enumerate(chunks, start=1):
        with processes.accumulating(last=number == len(chunks)):
            processes.backward(scale * processes.wrapped(chunk) / (len(rows) * 8))
    return processes.step()


@contextlib.contextmanager
def counted(kind: str) -> Iterator[dict[str, int]]:
    """Count the matrices that this process clips or orthogonalizes, and the bases that it computes.

    Muon's products are in bfloat16, where the last bit is 2^-8; for "muon-float32" they are in float32.
    """
    from epochal.optim import fira, muon, spectra

    counts = {"clips": 0, "refreshes": 0}
    clip, basis, polar = spectra.clip_matrices, fira.compute_basis, muon.orthogonalize

    def counting_clip(update: torch.Tensor, *arguments: Any) -> torch.Tensor:
        counts["clips"] += len(update)
        return clip(update, *arguments)

    def counting_basis(*arguments: Any, **options: Any) -> torch.Tensor:
        counts["refreshes"] += 1
        return basis(*arguments, **options)

    def counting_polar(x: torch.Tensor, **options: Any) -> torch.Tensor:
        counts["clips"] += len(x)
        return polar(x, **options, **({"dtype": torch.float32} if kind == "muon-float32" else {}))

    with (
        mock.patch.object(muon, "orthogonalize", counting_polar),
        mock.patch.object(spectra, "clip_matrices", counting_clip),
        mock.patch.object(fira, "compute_basis", counting_basis),
    ):
        yield counts


def active_backend(processes: Processes) -> str:
    """The backend that shards the model, by the type of the wrapper and not by the preset."""
    if type(processes.wrapped).__name__ == "DeepSpeedEngine":
        return f"zero{processes.wrapped.zero_optimization_stage()}"
    if all(isinstance(p, torch.distributed.tensor.DTensor) for p in processes.model.parameters()):
        return "fsdp2"
    return type(processes.wrapped).__name__


def is_offloaded(processes: Processes) -> bool:
    """Whether DeepSpeed keeps the optimizer's state in host memory."""
    inner = getattr(processes.wrapped, "optimizer", None)
    return bool(getattr(inner, "cpu_offload", False) or getattr(inner, "offload_optimizer", False))


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: linear from the peak to zero."""
    return peak * (1 - step / steps)


def alone(
    kind: str, steps: int = STEPS, depth: int = 2, *, sums: int = 1, clip_norm: float = 1e9, peak: float = PEAK
) -> dict[str, Any]:
    """The oracle: a plain loop in this process, with an optimizer and nothing else of epochal.

    `sums`: the number of parts in which the gradient is summed, which changes its rounding.
    """
    model = ModelWithLoss(depth)
    optimizer, norms = MakeOptimizer(kind)(model.model), []
    with counted(kind) as counts:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            optimizer.zero_grad()
            rows = batch(step)
            for part in range(sums):
                (model(rows[part::sums]) / (ROWS * 8)).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip_norm)))
            optimizer.step()
    weights = {name: p.detach() for name, p in model.model.named_parameters()}
    state = {
        name: sum(value.numel() * value.element_size() for value in optimizer.state[p].values())
        for name, p in model.model.named_parameters()
    }
    return {"weights": weights, "matrices": sum(map(is_matrix, weights)), "state": state, "norms": norms, **counts}


def trained(
    preset: str,
    kind: str,
    steps: int = STEPS,
    depth: int = 2,
    parts: int = 1,
    peak: float = PEAK,
    **settings: Any,
) -> dict[str, Any]:
    """Train; returns weights, the active backend, and what the optimizer did in this process."""
    processes = start(preset, micro_batch=max(1, ROWS // parts), **settings)
    processes.prepare(ModelWithLoss(depth), MakeOptimizer(kind))
    counts_at_start = [int(state["step"]) for state in processes.optimizer.state.values()]
    check, norms = ShardedUpdateCheck(processes, "toy"), []
    with counted(kind) as counts:
        for step in range(steps):
            for group in processes.optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            norm = take_step(processes, step, parts) if step else _checked(processes, check, parts, counts)
            norms.append(float(norm))
    named = processes.optimizer.named_state()
    return {
        "weights": {entry.name: processes.whole_weight(entry.parameter) for entry in processes.optimizer.entries},
        "backend": active_backend(processes),
        "offloaded": is_offloaded(processes),
        "counts_at_start": counts_at_start,
        "steps": {int(value) for name, value in named.items() if name.endswith(".step")},
        "matrices": len(processes.optimizer.matrices),
        "whole": [entry.name for entry in processes.optimizer.matrices],
        "bytes": sum(v.numel() * v.element_size() for n, v in named.items() if "@" not in n),
        "sent": processes.optimizer.bytes_sent,
        "error": check.error,
        "norms": norms,
        **counts,
    }


def _checked(processes: Processes, check: ShardedUpdateCheck, parts: int, counts: dict[str, int]) -> torch.Tensor:
    """The first step, checked; what the check itself computes is not counted."""
    step = processes.step

    def checked() -> torch.Tensor:
        with check:
            norm = step()
            before = dict(counts)
        counts.update(before)
        return norm

    with mock.patch.object(processes, "step", checked):
        return take_step(processes, 0, parts)


def is_matrix(name: str) -> bool:
    """Whether the matrix optimizers treat a parameter as a matrix: those of the blocks, not the embedding."""
    return "layers" in name and "norm" not in name


ODD = 13
"""A width with which no parameter's elements divide by two or four: shards then end in padding."""


def trained_odd(preset: str, kind: str, steps: int) -> dict[str, Any]:
    with mock.patch.object(sys.modules[__name__], "WIDTH", ODD):
        return trained(preset, kind, steps)


def first_weights(depth: int = 2) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in Toy(depth).named_parameters()}


def distance(one: dict[str, Any], other: dict[str, Any], *, matrices: bool = True, bits: bool = False) -> float:
    """The largest difference of two trained models' weights as a share of the largest movement of that weight.

    With `bits`: in units of the last bit of its largest element.
    """
    start, largest = first_weights(len(one["weights"]) // 4), 0.0
    for name, weight in one["weights"].items():
        if not matrices or is_matrix(name):
            moved = float((weight - start[name]).abs().max())
            last_bit = 2.0 ** (math.floor(math.log2(float(weight.abs().max()))) - 23)
            largest = max(largest, float((weight - other["weights"][name]).abs().max()) / (last_bit if bits else moved))
    return largest


def write_preset(folder: Path, base: str, **zero: Any) -> str:
    """Write a DeepSpeed config like `base` with other keys in zero_optimization; returns its path."""
    table = json.loads((REPOSITORY / "configs" / "deepspeed" / f"{base}.json").read_text(encoding="utf-8"))
    table["zero_optimization"] |= zero
    path = folder / f"{base}-{'-'.join(sorted(zero))}.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    return str(path)


def trained_with(
    preset: str, kind: str, settings: dict[str, Any], parts: int, steps: int = STEPS, depth: int = 2
) -> dict[str, Any]:
    return trained(preset, kind, steps, depth, parts, **settings)


def step_with_nan_then_without(preset: str) -> dict[str, list[bool]]:
    """Step twice, first with a NaN on one process only; returns whether any weight moved in each step."""
    processes = start(preset)
    processes.prepare(ModelWithLoss(2), MakeOptimizer("fira"))

    def weights() -> list[torch.Tensor]:
        return [processes.whole_weight(entry.parameter) for entry in processes.optimizer.entries]

    moved, before = [], weights()
    for scale in (float("nan") if processes.rank == 1 else 1.0, 1.0):
        take_step(processes, 0, scale=scale)
        after = weights()
        moved.append(not all(map(torch.equal, before, after)))
        before = after
    return {"moved": moved}
