"""Losses of regularizers that replace the cross-entropy, with their state; the interface is that of a teacher.

n positions, d width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from epochal.data.store import Stream
from epochal.loss import cross_entropy
from epochal.regularizer_config import EarlyLearning, OwnPredictions, SecondToken, StableMax
from epochal.run import Run
from epochal.training.regularizers.early_learning import CLAMP, early_learning_loss, running_average
from epochal.training.regularizers.own_predictions import soft_target_loss, weight_at
from epochal.training.regularizers.second_token import SecondTokenMap
from epochal.training.regularizers.stable_max import stable_logits
from epochal.training.regularizers.step import Groups

# Rows of an evaluation's logits (rows, V).
EVALUATED_ROWS = 1024


class RegularizedLoss:
    """The loss of a run with one of these regularizers.

    `tensors` are the state, which a checkpoint must hold: for each position a distribution (V,) in float16, or the map of the
    second token.
    """

    def __init__(self, run: Run, stream: Stream, config: Any, device: torch.device) -> None:
        self.choice, self.stream = run.regularizer, stream
        self.epochs = run.epochs
        self.tensors: dict[str, Tensor] = {}
        if run.regularizer is not None and run.regularizer.per_position:
            shape = stream.sequences_per_epoch, stream.sequence_length - 1, config.vocab_size
            self.tensors["distributions"] = torch.zeros(shape, dtype=torch.float16, device=device)
        self.second: SecondTokenMap | None = None
        if isinstance(run.regularizer, SecondToken):
            self.second = SecondTokenMap(run.regularizer.weight, config.hidden_size, device)
            self.tensors = self.second.tensors

    def loss(
        self, hidden: Tensor, head: Tensor, targets: Tensor, tokens: Tensor, rows: range, normaliser: float
    ) -> Tensor:
        """Return the summed loss over `normaliser`: hidden (n, d), head (V, d), targets (n,), tokens (b, T)."""
        if isinstance(self.choice, StableMax):
            return functional.cross_entropy(stable_logits(_logits(hidden, head)), targets, reduction="sum") / normaliser
        if self.second is not None:
            plain = cross_entropy(hidden, head, targets, normaliser=normaliser)
            return plain + self.second.loss(hidden, head, tokens, normaliser)
        places = torch.tensor([self.stream.place(row) for row in rows], device=hidden.device)
        table = self.tensors["distributions"]
        stored = table[places].flatten(0, 1).float()
        if isinstance(self.choice, OwnPredictions):
            loss, new = self._own_predictions(hidden, head, targets, stored, rows, normaliser)
        else:
            assert isinstance(self.choice, EarlyLearning)
            probs = torch.softmax(_logits(hidden, head), dim=1).clamp(CLAMP, 1.0 - CLAMP)
            new = running_average(stored, probs, self.choice.momentum)
            more = early_learning_loss(probs, new).sum() / normaliser
            loss = cross_entropy(hidden, head, targets, normaliser=normaliser) + self.choice.strength * more
        table[places] = new.to(table.dtype).reshape(len(places), *table.shape[1:])
        return loss

    def _own_predictions(
        self, hidden: Tensor, head: Tensor, targets: Tensor, stored: Tensor, rows: range, normaliser: float
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(self.choice, OwnPredictions)
        # A batch is within one epoch: epochs are whole steps.
        weight = weight_at(rows.start // self.stream.sequences_per_epoch, self.epochs, self.choice.weight)
        log_probs = functional.log_softmax(_logits(hidden, head), dim=1)
        if weight:
            loss = soft_target_loss(log_probs, targets, stored, weight).sum() / normaliser
        else:
            # Nothing to learn from yet, so this is the plain loss to the last bit.
            loss = cross_entropy(hidden, head, targets, normaliser=normaliser)
        return loss, log_probs.detach().exp()

    def step(self, groups: Groups) -> None:
        """Step what the loss trains itself, after the optimizer with these groups."""
        if self.second is not None:
            self.second.step(groups)

    @property
    def evaluates(self) -> bool:
        """Whether held-out text is judged by these probabilities instead of the softmax."""
        return isinstance(self.choice, StableMax)

    def evaluate(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss under StableMax, float64."""
        return sum(
            (_stable_sum(*part) for part in _parts(hidden, head, targets)), hidden.new_zeros((), dtype=torch.float64)
        )


def regularized_loss(run: Run, stream: Stream, config: Any, device: torch.device) -> RegularizedLoss | None:
    """Return the loss of a run whose regularizer has one, None for any other; `config` is the model's."""
    if run.regularizer is None or not run.regularizer.has_loss or run.regularizer.off:
        return None
    return RegularizedLoss(run, stream, config, device)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = hidden @ head.t()
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _parts(hidden: Tensor, head: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(hidden), EVALUATED_ROWS):
        yield hidden[start : start + EVALUATED_ROWS], head, targets[start : start + EVALUATED_ROWS]


def _stable_sum(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(stable_logits(_logits(hidden, head)), targets, reduction="none")
    return losses.double().sum()
