"""Proof at the start of a run: a sharded update is compared with what one process alone makes of the same parameter.

At the first step whose learning rate is not zero (and again after every resume), the smallest matrix of every owner and
the smallest of the other parameters are looked at. Whole weight and gradient are gathered by the backend's own means, not
by the exchange under test; one process builds the Run's optimizer anew, as if there were no other, and steps them. Of
the optimizer under test it takes the state, and today's learning rate and decay. A difference stops the run.

It sees: a gradient that is not the average or not clipped as the Run says, a matrix that was cut, permuted or stepped as
a vector, twice or not at all, an update that came to the wrong place, an optimizer that is not the Run's.
It does not see: an error in the rule itself (the tests in tests/optim compare it with published code), state that a
checkpoint gave to the wrong parameter (tests/distributed/test_elastic.py), parameters it did not choose, later steps.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epochal.distributed.layout import Entry
from epochal.distributed.processes import Processes

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference allowed, as a share of the largest movement of the matrix.

Rounding of the update makes about 1e-6; that of weights makes 1e-7 of the largest weight, more where the learning rate is
tiny, as in the first steps of a warm-up: so much is allowed besides.
"""


class Before(NamedTuple):
    """A parameter before the step: its number, whole weight and gradient, and where it is judged the whole state."""

    number: int
    entry: Entry
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class Proof:
    """A context manager around one optimizer step. `error`: the largest difference found, relative; None before."""

    error: float | None = None

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes, self.name = processes, name
        self._done = self._due = False
        self._before: list[Before] = []

    def __enter__(self) -> None:
        optimizer = self.processes.optimizer
        self._due = not self._done and any(float(group["lr"]) for group in optimizer.param_groups)
        if self._due:
            self._before = [self._look(number) for number in self._chosen()]
            optimizer.stepped.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # A gradient that is not finite moves nothing, and would prove nothing.
        if kind is None and self._due and bool(torch.isfinite(self.processes.norm)):
            self._done = True
            errors = [self._compare(before) for before in self._before]
            self.error = max((error for error, _ in errors), default=None)
            wrong = any(not error <= allowed for error, allowed in errors)
            self._judge(sum(self.processes.gather(len(self.processes.optimizer.stepped))), wrong)
        self._before = []

    def _judge(self, stepped: int, wrong: bool) -> None:
        optimizer, backend = self.processes.optimizer, self.processes.backend
        kind, world = type(optimizer.rule).__name__, self.processes.world
        found = f"{kind} treats {stepped} matrices as such, on {world} processes under {backend}"
        if self.error is not None:
            found += f", and moves a parameter by {self.error:.1e} of its movement away from what one process does"
        if self.processes.is_main:
            log.info("%s: %s", self.name, found)
        if stepped != len(optimizer.matrices) or wrong:
            raise ValueError(
                f"Run {self.name!r}: {found}, but {len(optimizer.matrices)} are matrices and rounding "
                f"explains no more than {TOLERANCE}; use another profile, and report the versions."
            )

    def _chosen(self) -> list[int]:
        """Return the smallest matrix of each owner, and the smallest of the parameters that are stepped in pieces."""
        if self.processes.world == 1 and self.processes.backend == "replicated":
            return []
        smallest: dict[int | None, int] = {}
        entries = self.processes.optimizer.entries
        for index, entry in enumerate(entries):
            best = smallest.setdefault(entry.owner, index)
            if entry.shape.numel() < entries[best].shape.numel():
                smallest[entry.owner] = index
        return sorted(smallest.values())

    def _look(self, number: int) -> Before:
        processes = self.processes
        entry = processes.optimizer.entries[number]
        weight, gradient = processes.whole_weight(entry.parameter), processes.whole_gradient(entry.parameter)
        start, state = processes.optimizer.state_of(number)
        if entry.owner is None:  # a small one: its pieces may travel as objects
            pieces = processes.gather((start, {key: value.cpu() for key, value in state.items()}))
            state = _whole_state(pieces, entry.shape)
        return Before(number, entry, weight, gradient, state)

    def _compare(self, before: Before) -> tuple[float, float]:
        """Return the difference of a parameter and what is allowed, as shares of its largest movement, from who judges it."""
        processes, judge = self.processes, before.entry.owner or 0
        after, found = processes.whole_weight(before.entry.parameter), (0.0, TOLERANCE)
        if judge == processes.rank:
            alone = self._alone(before)
            moved = max(float((alone - before.weight).abs().max()), float((after - before.weight).abs().max()), 1e-30)
            rounding = torch.finfo(after.dtype).eps * float(before.weight.abs().max())
            found = (float((alone - after).abs().max()) / moved, TOLERANCE + rounding / moved)
        gathered: tuple[float, float] = processes.gather(found)[judge]
        return gathered

    def _alone(self, before: Before) -> Tensor:
        """Return what one process alone makes of a whole weight: nothing of the exchange is used."""
        processes, weight = self.processes, before.weight
        optimizer, parameter = processes.fresh_optimizer(before.entry.name, weight)
        for group, today in zip(optimizer.param_groups, processes.optimizer.numbers, strict=True):
            group.update({key: today[key] for key in ("lr", "weight_decay")})
        if before.state:
            optimizer.state[parameter] = {
                key: value.to(weight.device, copy=True) for key, value in before.state.items()
            }
        parameter.grad = before.gradient * clip_factor(processes.norm, processes.clip_norm)
        optimizer.step()
        return parameter.detach()


def _whole_state(pieces: list[tuple[int, dict[str, Tensor]]], shape: torch.Size) -> dict[str, Tensor]:
    """Put the state of a parameter together from what each process has of it, flat; 0-d tensors are the same everywhere."""
    found: dict[str, Tensor] = {}
    for start, state in sorted(pieces, key=lambda piece: piece[0]):
        for key, value in state.items():
            whole = found.setdefault(key, value if value.ndim == 0 else value.new_empty(shape.numel()))
            if value.ndim:
                whole[start : start + value.numel()] = value.reshape(-1)
    return {key: value if value.ndim == 0 else value.view(shape) for key, value in found.items()}


def clip_factor(norm: Tensor, largest: float) -> float:
    """Return what clipping multiplied the gradient with."""
    return min(1.0, largest / (float(norm) + 1e-6))
