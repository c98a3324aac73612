"""Silent failures of DeepSpeed and accelerate, provoked on purpose: each must stop the run.

Each function runs in every process and returns the error that stopped the run, or "trained".
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import toy

from epochal.distributed import presets, processes


def first_step(preset: str) -> str:
    """Train one step with the check of the first step."""
    try:
        toy.trained(preset, "fira", steps=1)
    except ValueError as error:
        return str(error)
    return "trained"


def permuted_parameters(path: str) -> str:
    """Under round_robin_gradients DeepSpeed maps shards to the wrong parameters."""
    accepted = mock.patch.object(presets, "ZERO_KEYS", presets.ZERO_KEYS | {"round_robin_gradients"})
    # Square blocks: matrices of other shapes would not fit in each other's places.
    with accepted, mock.patch.object(toy.Block, "inner", toy.WIDTH):
        return first_step(path)


def replaced_optimizer() -> str:
    """accelerate may replace the Run's optimizer with DeepSpeed's Adam; torch's AdamW stands for it."""
    prepare = processes.Accelerator.prepare

    def replacing(self: Any, model: Any, optimizer: Any) -> Any:
        return prepare(self, model, torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups]))

    with mock.patch.object(processes.Accelerator, "prepare", replacing):
        return first_step("zero2")


def trained_as_ddp() -> str:
    """`Accelerator(cpu=True)` trains as DDP, whatever the DeepSpeed plugin says."""
    accelerator = processes.Accelerator

    def on_cpu(**settings: Any) -> Any:
        settings.pop("kwargs_handlers", None)
        return accelerator(cpu=True, **settings)

    with mock.patch.object(processes, "Accelerator", on_cpu):
        return first_step("zero2")


def half_reduced_matrix(preset: str) -> str:
    """DeepSpeed's own Muon stepped matrices of which only a part was reduced: half of what arrives is wrong."""
    exchange = dist.all_to_all_single

    def damaged(received: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        result = exchange(received, *arguments, **options)
        received[: len(received) // 2] *= 0.5
        return result

    with mock.patch.object(dist, "all_to_all_single", damaged):
        return first_step(preset)
