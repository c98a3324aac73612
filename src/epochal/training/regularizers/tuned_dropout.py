"""Dropout that follows its hypergradient on held-out text.

A step takes lr g(p) from the weights, where g(p) is the gradient of a batch under dropout p. With G the gradient of the
held-out loss L, dL / dp = -lr <G, dg / dp>. So log p moves by `rate` times the cosine of G and g(p + h) - g(p - h), h = p / 2,
in every fourth step, with the same random numbers in both, as masks are where those are below p. The rule is that of
`tuned_decay`, and sees one step ahead too; the scale that Adam gives to each weight is left out. Self-tuning networks (arXiv
1903.03088) learn how the weights respond instead.
"""

import math

import torch
from torch import Tensor

from epochal.data.store import Tokens, TokenStore
from epochal.regularizer_config import SelfTunedDecay, SelfTunedDropout
from epochal.run import Run
from epochal.training.noise import Noise
from epochal.training.regularizers.look_ahead import Accumulate
from epochal.training.regularizers.moved import copied_gradients
from epochal.training.regularizers.step import Groups, all_parameters
from epochal.training.regularizers.tuned_decay import TunedDecay, cosine, held_out_batch

SPREAD = 0.5  # h / p


class TunedDropout:
    """The dropout of a run over that at its start; `tensors` are the state, which a checkpoint must hold."""

    decay_factor = 1.0

    def __init__(self, choice: SelfTunedDropout, noise: Noise, held_out: Tokens, batch_size: int) -> None:
        self.choice, self.noise, self.held_out, self.batch_size = choice, noise, held_out, batch_size
        self.start = noise.dropout
        self.tensors = {"log_dropout": torch.zeros((), dtype=torch.float64)}

    @property
    def share(self) -> float:
        """The dropout of the next step."""
        return self.start * float(self.tensors["log_dropout"].exp())

    @property
    def results(self) -> dict[str, float]:
        """What a record says of it."""
        return {"dropout_factor": self.share / self.start}

    def before(self, step: int, groups: Groups) -> None:
        """Set the dropout of this step."""
        self.noise.set_dropout(self.share)

    def after(self, step: int, groups: Groups, accumulate: Accumulate, tokens: Tensor, first_row: int) -> None:
        """Move the dropout after a step on tokens (b, T): rows from `first_row` on."""
        if not self.choice.due(step):
            return
        parameters = all_parameters(groups)
        held_out = held_out_batch(self.held_out, self.batch_size, step // self.choice.every).to(tokens.device)
        share, gradients = self.share, []
        for rows, dropout in ((held_out, 0.0), (tokens, share * (1 + SPREAD)), (tokens, share * (1 - SPREAD))):
            for parameter in parameters:
                parameter.grad = None
            self.noise.set_dropout(dropout)
            accumulate(rows, first_row)
            gradients.append(copied_gradients(parameters))
        judged, more, less = gradients
        difference = [one - other for one, other in zip(more, less, strict=True)]
        # On the CPU, because the share is a number that Python hands to the forward pass.
        moved = self.tensors["log_dropout"] + self.choice.rate * cosine(judged, difference).cpu()
        self.tensors["log_dropout"].copy_(moved.clamp(max=math.log(self.choice.highest / self.start)))


def self_tuned(run: Run, store: TokenStore, noise: Noise) -> TunedDecay | TunedDropout | None:
    """Return what a run tunes while it trains, None for any other."""
    choice = run.regularizer
    if choice is None or choice.off:
        return None
    if isinstance(choice, SelfTunedDecay):
        return TunedDecay(choice, store.holdout(run), run.batch_size)
    if isinstance(choice, SelfTunedDropout):
        return TunedDropout(choice, noise, store.holdout(run), run.batch_size)
    return None
