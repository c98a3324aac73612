"""Check one distributed optimizer step against the same step on one process.

At the first step with a nonzero learning rate, and again after every resume, `ShardedUpdateCheck` picks the smallest matrix
of every owner and the smallest elementwise parameter. The backend's own gather (not the exchange under test) gives the
whole weight and gradient; one process builds the Run's optimizer as if it were alone and steps them. From the
optimizer under test it takes state, learning rate and weight decay. A difference stops the run.

It detects: a gradient that is not the average or not clipped as the Run says; a matrix that was cut, permuted, stepped as
a vector, stepped twice or not at all; an update applied in the wrong place; another optimizer than the Run's.
It does not detect: an error in the update rule itself (tests/optim compares it with published code), state restored to the
wrong parameter (tests/distributed/test_elastic.py), errors in parameters it did not pick, or at later steps.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epochal.distributed.layout import Entry
from epochal.distributed.processes import Processes
from epochal.optim.base import MatrixOptimizer

log = logging.getLogger(__name__)

# Largest difference allowed, as a share of the parameter's largest movement; rounding of the update gives about 1e-6.
TOLERANCE = 1e-3
# The same in roundings of the products, for matrices whose products are less precise than float32: the product of one
# matrix and of a stack of them run in different kernels of a GPU, which sum in different orders.
ROUNDINGS = 8


class Before(NamedTuple):
    """A parameter before the step: its number, whole weight and gradient and, on the rank that judges it, its state."""

    number: int
    entry: Entry
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class ShardedUpdateCheck:
    """A context manager around an optimizer step. `error`: the largest relative difference; None before the check."""

    error: float | None = None

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes, self.name = processes, name
        self._done = self._due = False
        self._before: list[Before] = []
        self.allowed = TOLERANCE

    def __enter__(self) -> None:
        optimizer = self.processes.optimizer
        # With a learning rate of 0, as at the start of a warm-up, any update would pass.
        self._due = not self._done and any(float(group["lr"]) for group in optimizer.param_groups)
        if self._due:
            self._before = [self._record(number) for number in self._chosen()]
            # Only the matrices of the checked step count.
            optimizer.stepped.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # A gradient that is not finite moves nothing; the check then waits for the next step.
        if kind is None and self._due and bool(torch.isfinite(self.processes.norm)):
            self._done = True
            errors = [self._compare(before) for before in self._before]
            self.error = max((error for error, _ in errors), default=None)
            wrong = any(not error <= allowed for error, allowed in errors)  # so that NaN is wrong
            self._report(sum(self.processes.gather(len(self.processes.optimizer.stepped))), wrong)
        self._before = []

    def _report(self, stepped: int, wrong: bool) -> None:
        optimizer, processes = self.processes.optimizer, self.processes
        # Logged even when it passes: the number of matrices shows that sharding did not flatten them.
        summary = (
            f"{type(optimizer.rule).__name__} stepped {stepped} parameters as whole matrices on {processes.world} "
            f"processes ({processes.backend})"
        )
        if self.error is not None:
            summary += f"; largest difference from one process: {self.error:.1e} of a parameter's movement"
        if processes.is_main:
            log.info("%s: %s", self.name, summary)
        if stepped != len(optimizer.matrices) or wrong:
            raise ValueError(
                f"Run {self.name!r} failed the check of its first step: {summary}. Expected {len(optimizer.matrices)} "
                f"matrices and at most {self.allowed:.1e} plus rounding; use another preset, and report the versions."
            )

    def _chosen(self) -> list[int]:
        """List the smallest matrix of each owner and the smallest of the elementwise parameters."""
        if self.processes.world == 1 and self.processes.backend == "replicated":
            return []  # one process is the reference itself
        # The smallest, because whole weights and gradients are gathered; one of each owner, because each owner has its
        # own exchange.
        smallest: dict[int | None, int] = {}
        entries = self.processes.optimizer.entries
        for index, entry in enumerate(entries):
            best = smallest.setdefault(entry.owner, index)
            if entry.shape.numel() < entries[best].shape.numel():
                smallest[entry.owner] = index
        return sorted(smallest.values())

    def _record(self, number: int) -> Before:
        processes = self.processes
        entry = processes.optimizer.entries[number]
        weight, gradient = processes.whole_weight(entry.parameter), processes.whole_gradient(entry.parameter)
        start, state = processes.optimizer.state_of(number)
        if entry.owner is None:  # a small one, so its pieces may be pickled
            pieces = processes.gather((start, {key: value.cpu() for key, value in state.items()}))
            state = _whole_state(pieces, entry.shape)
        return Before(number, entry, weight, gradient, state)

    def _compare(self, before: Before) -> tuple[float, float]:
        """Return (difference, largest allowed) as shares of the largest movement.

        The owner of the parameter computes it, or rank 0 for an elementwise one.
        """
        processes, judge = self.processes, before.entry.owner or 0
        after, difference = processes.whole_weight(before.entry.parameter), (0.0, TOLERANCE)
        rule, allowed = processes.optimizer.rule, TOLERANCE
        if before.entry.owner is not None and isinstance(rule, MatrixOptimizer):
            allowed = max(allowed, ROUNDINGS * rule.rounding(after.device))
        self.allowed = max(self.allowed, allowed)  # for the message
        if judge == processes.rank:
            alone = self._step_alone(before)
            moved = max(float((alone - before.weight).abs().max()), float((after - before.weight).abs().max()), 1e-30)
            # The rounding of weights is 1e-7 of the largest, which can exceed a small movement early in a warm-up.
            rounding = torch.finfo(after.dtype).eps * float(before.weight.abs().max())
            difference = (float((alone - after).abs().max()) / moved, allowed + rounding / moved)
        gathered: tuple[float, float] = processes.gather(difference)[judge]
        return gathered

    def _step_alone(self, before: Before) -> Tensor:
        """Return the weight that one process alone would get, without the exchange."""
        processes, weight = self.processes, before.weight
        optimizer, parameter = processes.fresh_optimizer(before.entry.name, weight)
        # Only what the schedule changes: every other option must come from the Run, or the check would compare an
        # optimizer with itself.
        for group, current in zip(optimizer.param_groups, processes.optimizer.hyperparameters, strict=True):
            group.update({key: current[key] for key in ("lr", "weight_decay")})
        if before.state:
            optimizer.state[parameter] = {
                key: value.to(weight.device, copy=True) for key, value in before.state.items()
            }
        # The gathered gradient is averaged but not clipped yet.
        parameter.grad = before.gradient * clip_factor(processes.norm, processes.clip_norm)
        optimizer.step()
        return parameter.detach()


def _whole_state(pieces: list[tuple[int, dict[str, Tensor]]], shape: torch.Size) -> dict[str, Tensor]:
    """Assemble the state of a parameter from every rank's flat piece; 0-d tensors are the same on all."""
    whole: dict[str, Tensor] = {}
    for start, state in sorted(pieces, key=lambda piece: piece[0]):
        for key, value in state.items():
            # The step count is 0-d and the same in every piece.
            tensor = whole.setdefault(key, value if value.ndim == 0 else value.new_empty(shape.numel()))
            if value.ndim:
                tensor[start : start + value.numel()] = value.reshape(-1)
    return {key: value if value.ndim == 0 else value.view(shape) for key, value in whole.items()}


def clip_factor(norm: Tensor, largest: float) -> float:
    """Return the factor that clipping at a norm of `largest` multiplies a gradient with."""
    return min(1.0, largest / (float(norm) + 1e-6))
