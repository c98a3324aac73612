"""A tiny Run trained in parts under different presets, as in a campaign that is stopped and resumed."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import toy

from epochal.models import layers
from epochal.records import Workspace
from epochal.run import AdamW, Fira, Optimizer, Run, Spectra
from epochal.stopping import Stopped
from epochal.training import loop

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(lr=1e-2),
    "fira": Fira(lr=1e-2, gap=7, eps=1e-3),
    "spectra": Spectra(base=AdamW(lr=1e-2, eps=1e-3), clip=1.0),
}


def make_run(config: Path, name: str, kind: str, **changes: Any) -> Run:
    return tiny.run(config, name=name, optimizer=OPTIMIZERS[kind], epochs=2, **changes)


def part(
    preset: str,
    space: Workspace,
    run: Run,
    stop_after: int | None,
    micro_batch: int = 1,
    modes: tuple[str, ...] = (),
    compiler: str = layers.COMPILER,
) -> dict[str, Any] | str:
    """Train until a stop is requested after so many steps; returns the results of the record, or the stop's message."""
    toy.choose(preset)
    polls = itertools.count(1)

    def reason() -> str | None:
        return "test" if stop_after is not None and next(polls) > stop_after else None

    # Processes agree on a stop at least every LOG_STEPS steps.
    with (
        mock.patch.object(loop, "stop_reason", reason),
        mock.patch.object(loop, "LOG_STEPS", 2),
        mock.patch.object(layers, "COMPILER", compiler),
    ):
        try:
            record = loop.train(run, space, loop.RuntimeOptions(micro_batch=micro_batch, modes=modes))
        except Stopped as stopped:
            return str(stopped)
    return {} if record is None else {**record.results, "provenance": record.provenance}


def part_with_a_full_disk(preset: str, space: Workspace, run: Run) -> str:
    """The last process cannot write its state; returns the error that ends the loop."""
    from epochal.training import checkpoint

    save, rank = checkpoint.save_file, int(os.environ["RANK"])

    def full(tensors: Any, path: Path) -> None:
        if rank == 1:
            raise OSError("no space left on device")
        save(tensors, path)

    with mock.patch.object(checkpoint, "save_file", full):
        try:
            part(preset, space, run, 3)
        except OSError as error:
            return str(error)
    return "saved"


def refusal(preset: str, space: Workspace, run: Run) -> str:
    """The error with which a run is refused."""
    try:
        part(preset, space, run, None)
    except ValueError as error:
        return str(error)
    return "trained"


def graphs_so_far() -> int:
    """The number of graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
