"""One step of the training loop: gradients of its micro-batches, what regularizers do to them, and the optimizer.

b sequences of T tokens are one micro-batch of one process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from epochal.data.store import Tokens
from epochal.distributed.first_step_check import ShardedUpdateCheck
from epochal.distributed.processes import Processes
from epochal.run import Run
from epochal.training.cuda_graph import GraphedPass
from epochal.training.regularizers.anchor import WeightAnchor
from epochal.training.regularizers.losses import RegularizedLoss
from epochal.training.regularizers.step import OrthogonalUpdate, add_gradients
from epochal.training.regularizers.tuned_decay import TunedDecay
from epochal.training.regularizers.tuned_dropout import TunedDropout
from epochal.training.timing import StepClock

# Adds the gradient of a micro-batch (b, T), given its first row and the normaliser, and returns its loss.
GradientPass = Callable[[torch.Tensor, int, float], torch.Tensor]


def gradient_pass(processes: Processes, model: torch.nn.Module) -> GradientPass:
    """Return the forward and backward pass of a micro-batch; a CUDA graph in the mode cuda-graph."""

    def add(tokens: torch.Tensor, first_row: int, normaliser: float) -> torch.Tensor:
        loss: torch.Tensor = processes.wrapped(tokens, first_row, normaliser)
        processes.backward(loss)
        return loss.detach()

    return GraphedPass(add, model.parameters()) if "cuda-graph" in processes.modes else add


@dataclass(frozen=True)
class TrainingStep:
    """What the steps of a run share."""

    run: Run
    processes: Processes
    pass_of: GradientPass
    micro_batch: int | None
    clock: StepClock
    check: ShardedUpdateCheck
    anchor: WeightAnchor | None
    tuned: TunedDecay | TunedDropout | None
    own: RegularizedLoss | None

    def __call__(self, number: int, rows: Tokens, first_row: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one optimizer step over this process's rows; returns (loss, gradient norm before clipping).

        rows (b, T) are rows `first_row`, ... of the run; `factor` is the step's learning rate over the peak.
        """
        processes, groups = self.processes, self.processes.optimizer.param_groups
        self.clock.mark()
        tokens = torch.from_numpy(rows).to(processes.device)
        if self.tuned is not None:
            self.tuned.before(number, groups)
        loss = add_gradients(self.run, self.accumulate, groups, tokens, first_row, factor)
        self.clock.mark()
        # Before the optimizer's step and after the gradient: both are of the same weights, and their steps add up.
        if self.anchor is not None:
            self.anchor.pull(groups)
        # At the first step this compares the update with that of one process; later it does nothing.
        with OrthogonalUpdate(self.run, groups), self.check:
            norm = processes.step()
        self.clock.mark()
        if self.own is not None:
            self.own.step(groups)
        if self.tuned is not None:
            self.tuned.after(number, groups, self.accumulate, tokens, first_row)
            processes.optimizer.zero_grad()
        return loss, norm

    def accumulate(self, tokens: torch.Tensor, first_row: int) -> torch.Tensor:
        """Add the gradient of tokens (b, T) by micro-batches; each counts as its share of this process's batch."""
        # Normalized by the targets of this process: gradients and losses are then averaged over processes.
        targets = self.run.batch_size // self.processes.world * (self.run.sequence_length - 1)
        parts = torch.split(tokens, self.micro_batch or len(tokens))
        loss = torch.zeros((), device=self.processes.device)
        for number, part in enumerate(parts, start=1):
            with self.processes.accumulating(last=number == len(parts)):
                loss += self.pass_of(part, first_row, targets)
            first_row += len(part)
        return loss

    def settle_buckets(self, rows: Tokens, first_row: int) -> None:
        """Let DDP arrange its buckets in a step that changes nothing."""
        # After its first backward pass DDP arranges gradients in the order in which they became ready, and sums them in
        # that order from then on. A resumed run would sum its first step in another order than the undisturbed one, which
        # from three processes on changes the last bit.
        part = torch.from_numpy(rows[: self.micro_batch or len(rows)]).to(self.processes.device)
        loss = self.processes.wrapped(part, first_row, len(rows) * (self.run.sequence_length - 1))
        self.processes.backward(0.0 * loss)
        self.processes.optimizer.zero_grad()
