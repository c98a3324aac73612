"""What is broken on purpose, in every process: the guard in front of a trap is taken away, and a later one must stop the run.

Each function returns the sentence with which the run is stopped, or "trained".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import toy

from epochal.distributed import layout, sharding
from epochal.distributed import presets as profile
from epochal.distributed import processes as module
from epochal.distributed.layout import Entry, Found, Span


def first_step(name: str, kind: str, depth: int = 2) -> str:
    """Train one step with the proof around it."""
    try:
        toy.trained(name, kind, 1, depth)
    except ValueError as error:
        return str(error)
    return "trained"


@contextlib.contextmanager
def accepting(*keys: str) -> Iterator[None]:
    """Let a DeepSpeed profile hold what is refused."""
    with mock.patch.object(profile, "ZERO_KEYS", profile.ZERO_KEYS | set(keys)):
        yield


def round_robin(path: str) -> str:
    """Matrices of one shape, since others would not even fit into each other's places."""
    with accepting("round_robin_gradients"), mock.patch.object(toy.Block, "inner", toy.WIDTH):
        return first_step(path, "fira")


def reversed_layout(shard: torch.Tensor, members: list[tuple[int, Entry]], rank: int) -> Found:
    """A map of a flat shard with the parameters in the wrong order."""
    first, begin, spans = rank * shard.numel(), 0, []
    for index, entry in reversed(members):
        start, stop = max(0, first - begin), min(entry.shape.numel(), first + shard.numel() - begin)
        if start < stop:
            spans.append(Span(index, start, stop, begin + start - first))
        begin += entry.shape.numel()
    return spans, None


def wrong_map() -> str:
    """The layout is permuted, and nothing compares its values: only the proof is left."""
    with mock.patch.object(sharding, "locate_flat", reversed_layout):
        return first_step("zero2", "fira")


def wrong_offsets() -> str:
    """Parameters seem to lie elsewhere in the buffer than they do: their values tell."""

    def locate(shard: torch.Tensor, members: list[tuple[int, Entry]], rank: int) -> Found:
        moved = [(index, entry._replace(parameter=Moved(entry.parameter))) for index, entry in members]
        return layout.locate_flat(shard, moved, rank)  # type: ignore[arg-type]

    with mock.patch.object(sharding, "locate_flat", locate):
        return first_step("zero2", "fira")


class Moved:
    """A parameter that says it lies one element before its place."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter

    def storage_offset(self) -> int:
        return max(0, self.parameter.storage_offset() - 1)

    def detach(self) -> torch.Tensor:
        return self.parameter.detach()


def replaced_optimizer() -> str:
    """accelerate may put DeepSpeed's own Adam in place of the Run's optimizer; torch's stands for it here."""
    prepare = module.Accelerator.prepare

    def replacing(self: Any, objective: Any, optimizer: Any) -> Any:
        return prepare(self, objective, torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups]))

    with mock.patch.object(module.Accelerator, "prepare", replacing):
        return first_step("zero2", "fira")


def cpu_flag() -> str:
    """`Accelerator(cpu=True)` trains as DDP, whatever the plugin says."""
    accelerator = module.Accelerator

    def on_cpu(**settings: Any) -> Any:
        settings.pop("kwargs_handlers", None)
        return accelerator(cpu=True, **settings)

    with mock.patch.object(module, "Accelerator", on_cpu):
        return first_step("zero2", "fira")


def spoiled(name: str, kind: str, what: str) -> str:
    """One part of the exchange does something else than it should."""
    owner = sharding.Distributed

    def wrong(original: Callable[..., Any]) -> Callable[..., Any]:
        def gather(self: Any, layout: Any, mine: Any, device: Any) -> Any:  # one half of a matrix is not reduced
            found = original(self, layout, mine, device)
            for whole in found.values():
                whole[: len(whole) // 2] *= 0.5
            return found

        def copy_numbers(self: Any, optimizer: Any) -> None:  # a schedule that does not arrive
            original(self, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = 0.9 * group["lr"]

        def keep(self: Any, index: int, before: Any) -> Any:  # no decay
            return torch.ones_like(original(self, index, before))

        return {"gather": gather, "numbers": copy_numbers, "keep": keep}[what]

    target, attribute = {
        "gather": (sharding.Sharded, "_gather_gradients"),
        "numbers": (owner, "_copy_numbers"),
        "keep": (sharding.Sharded, "_keep"),
    }[what]
    with mock.patch.object(target, attribute, wrong(getattr(target, attribute))):
        return first_step(name, kind)
