"""A model of many small odd matrices, trained under a profile: the same in one process and in many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epochal import optim
from epochal.config import REPOSITORY
from epochal.processes import Processes

STEPS, ROWS = 30, 8
DIMS = [(17, 12), (12, 17), (12, 12), (9, 12)]


class Block(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(17, 12, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(12, 17, generator=generator) / 4)
        self.mix = nn.Parameter(torch.randn(12, 12, generator=generator) / 4)
        self.norm = nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x @ self.mix.T) * self.norm
        return x + torch.tanh(y @ self.up.T) @ self.down.T


class Layers(nn.Module):
    def __init__(self, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(generator) for _ in range(depth))


class Toy(nn.Module):
    """Tied embedding and head, `depth` blocks of three matrices and a vector."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(23, 12, generator=generator) / 2)
        self.model = Layers(depth, generator)
        self.lm_head = nn.Linear(12, 23, bias=False)
        self.lm_head.weight = self.embed


class Objective(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.model = Toy(depth)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(tokens[:, :-1], self.model.embed)
        for block in self.model.model.layers:
            x = block(x)
        logits = x @ self.model.lm_head.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def make_optimizer(kind: str) -> Any:
    """Return a function from the model to an optimizer; matrices are those of the blocks."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        inside = [(n, p) for n, p in named if p.ndim == 2 and "layers" in n]
        others = [(n, p) for n, p in named if not (p.ndim == 2 and "layers" in n)]
        params = lambda pairs: [p for _, p in pairs]  # noqa: E731
        decayed, kept = {"params": params(inside), "weight_decay": 0.1}, {"params": params(others), "weight_decay": 0.0}
        if kind == "adamw":
            return torch.optim.AdamW([decayed, kept], lr=1e-2, betas=(0.9, 0.95), eps=1e-3, fused=True)
        if kind == "fira":
            projected = {**decayed, "rank": 4, "update_proj_gap": 15, "alpha": 0.5}
            return optim.Fira([projected, kept], lr=1e-2, eps=1e-3)
        if kind == "muon":
            return optim.Muon([decayed, {**kept, "orthogonalize": False}], lr=1e-2, eps=1e-3)
        own = {} if kind in ("signum", "lion", "sgdm") else {"eps": 1e-3}
        return optim.Spectra([decayed, {**kept, "apply_to": "2d"}], 1e-2, base=kind, clip=0.5, **own)

    return build


def environment(profile: str) -> dict[str, str]:
    """What `accelerate launch` would put into the environment for a profile."""
    if profile.startswith("zero"):
        path = profile if profile.endswith(".json") else str(REPOSITORY / "configs" / "deepspeed" / f"{profile}.json")
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": path}
    return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if profile == "fsdp2" else {}


def start(profile: str, **settings: Any) -> Processes:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        os.environ.pop(name, None)
    os.environ.update(environment(profile))
    return Processes(**{"clip_norm": 1e9, **settings})


def batch(step: int) -> torch.Tensor:
    return torch.randint(23, (ROWS, 9), generator=torch.Generator().manual_seed(step))


def take_step(processes: Processes, step: int, parts: int = 1) -> torch.Tensor:
    rows = batch(step)[processes.rank :: processes.world]
    chunks = rows.chunk(parts)
    for number, chunk in enumerate(chunks, start=1):
        with processes.accumulating(last=number == len(chunks)):
            processes.backward(processes.objective(chunk) / (len(rows) * 8))
    return processes.step()


def trained(
    profile: str, kind: str, steps: int = STEPS, depth: int = 2, parts: int = 1, **settings: Any
) -> dict[str, Any]:
    """Train, and return weights, state bytes, and what the optimizer did in this process."""
    processes = start(profile, **settings)
    processes.prepare(Objective(depth), make_optimizer(kind))
    for step in range(steps):
        for group in processes.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        take_step(processes, step, parts)
    return {
        "weights": {name: weight.clone() for name, weight in processes.whole_weights()},
        "bytes": processes.optimizer.state_bytes(),
        "sent": processes.optimizer.bytes_sent,
    }


def folder_profile(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    return str(path)
