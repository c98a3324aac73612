"""Proof at the start of a run: a sharded update is compared with what one process alone makes of the same matrix.

At the first step whose learning rate is not zero (and again after every resume), each process takes the smallest matrix
that it owns. Its whole weight and gradient are gathered by the backend's own means, not by the exchange under test, and
a plain optimizer with a copy of the state steps them. A difference stops the run.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epochal.optim.layout import Entry
from epochal.processes import Processes

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference allowed, as a share of the largest movement of the matrix.

Rounding of the update makes about 1e-6; that of weights makes 1e-7 of the largest weight, more where the learning rate is
tiny, as in the first steps of a warm-up: so much is allowed besides.
"""


class Before(NamedTuple):
    """A matrix before the step: its number, whole weight and gradient, and on its owner the state."""

    number: int
    entry: Entry
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class Proof:
    """A context manager around one optimizer step. `error`: the largest difference found, relative; None before."""

    error: float | None = None

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes, self.name, self._done = processes, name, False
        self._before: list[Before] = []

    def __enter__(self) -> None:
        optimizer = self.processes.optimizer
        if not self._done and any(float(group["lr"]) for group in optimizer.param_groups):
            self._before = [self._look(number) for number in self._chosen()]
            optimizer.stepped.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        optimizer, norm = self.processes.optimizer, self.processes.norm
        # A gradient that is not finite moves nothing, and would prove nothing.
        moving = any(float(group["lr"]) for group in optimizer.param_groups) and bool(torch.isfinite(norm))
        if kind is None and not self._done and moving:
            self._done = True
            errors = [self._compare(before) for before in self._before]
            self.error = max((error for error, _ in errors), default=None)
            wrong = any(not error <= allowed for error, allowed in errors)
            self._judge(sum(self.processes.gather(len(optimizer.stepped))), wrong)
        self._before = []

    def _judge(self, stepped: int, wrong: bool) -> None:
        optimizer, backend = self.processes.optimizer, self.processes.backend
        kind, world = type(optimizer.rule).__name__, self.processes.world
        found = f"{kind} treats {stepped} matrices as such, on {world} processes under {backend}"
        if self.error is not None:
            found += f", and moves one by {self.error:.1e} of its movement away from what one process does"
        if self.processes.is_main:
            log.info("%s: %s", self.name, found)
        if stepped != len(optimizer.matrices) or wrong:
            raise ValueError(
                f"Run {self.name!r}: {found}, but {len(optimizer.matrices)} are matrices and rounding "
                f"explains no more than {TOLERANCE}; use another profile, and report the versions."
            )

    def _chosen(self) -> list[int]:
        """Return the smallest matrix of each owner."""
        smallest: dict[int, int] = {}
        entries = self.processes.optimizer.entries
        for index, entry in enumerate(entries):
            if entry.owner is not None:
                best = smallest.setdefault(entry.owner, index)
                if entry.shape.numel() < entries[best].shape.numel():
                    smallest[entry.owner] = index
        return sorted(smallest.values()) if self.processes.world > 1 or self.processes.backend != "replicated" else []

    def _look(self, number: int) -> Before:
        processes = self.processes
        entry = processes.optimizer.entries[number]
        weight, gradient = processes.whole_weight(entry.parameter), processes.whole_gradient(entry.parameter)
        state = processes.optimizer.owned_state(number) if entry.owner == processes.rank else {}
        return Before(number, entry, weight, gradient, state)

    def _compare(self, before: Before) -> tuple[float, float]:
        """Return the difference of one matrix, and what is allowed, as shares of its largest movement; from its owner."""
        processes = self.processes
        after, found = processes.whole_weight(before.entry.parameter), (0.0, TOLERANCE)
        if before.entry.owner == processes.rank:
            gradient = before.gradient * clip_factor(processes.norm, processes.clip_norm)
            alone = processes.optimizer.reference_step(before.number, before.weight, gradient, before.state)
            moved = max(float((alone - before.weight).abs().max()), float((after - before.weight).abs().max()), 1e-30)
            rounding = torch.finfo(after.dtype).eps * float(before.weight.abs().max())
            found = (float((alone - after).abs().max()) / moved, TOLERANCE + rounding / moved)
        gathered: tuple[float, float] = processes.gather(found)[before.entry.owner or 0]
        return gathered


def clip_factor(norm: Tensor, largest: float) -> float:
    """Return what clipping multiplied the gradient with."""
    return min(1.0, largest / (float(norm) + 1e-6))
