"""Weight decay that follows its hypergradient on held-out text.

A decoupled decay takes lr wd w from the weights w in each step. With g the gradient of the held-out loss L after the step,
dL / d log wd = -lr wd <g, w> over the weights that decay, w before the step. So log wd moves by `rate` times the cosine of g
and w, in every fourth step: the multiplicative rule of arXiv 1703.04782 (section 3), there for learning rates. It sees one
step ahead, where the paper of self-tuning networks (arXiv 1903.03088) learns how the weights respond.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from epochal.data.store import Tokens, TokenStore
from epochal.regularizer_config import SelfTunedDecay
from epochal.run import Run
from epochal.training.regularizers.look_ahead import Accumulate
from epochal.training.regularizers.moved import TINY, total_norm


def cosine(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the cosine between all gradients and all weights, 0-d float64."""
    product = torch.stack([torch.sum(g.double() * w.double()) for g, w in zip(gradients, weights, strict=True)]).sum()
    return product / (total_norm(gradients).double() * total_norm(weights).double() + TINY)


class TunedDecay:
    """The decay of a run over that at its start; `tensors` are the state, which a checkpoint must hold."""

    def __init__(self, choice: SelfTunedDecay, held_out: Tokens, batch_size: int) -> None:
        self.choice, self.held_out, self.batch_size = choice, held_out, batch_size
        self.tensors = {"log_decay": torch.zeros((), dtype=torch.float64)}
        self._before: list[Tensor] = []

    @property
    def factor(self) -> float:
        """What the decay of the next step is multiplied by."""
        return float(self.tensors["log_decay"].exp())

    def due(self, step: int) -> bool:
        """Whether the decay moves after this step, counted from 0."""
        return step % self.choice.every == self.choice.every - 1

    def before(self, step: int, decayed: Sequence[Tensor]) -> None:
        """Keep the weights that decay, before the step of the optimizer."""
        self._before = [weight.detach().clone() for weight in decayed] if self.due(step) else []

    def after(self, step: int, decayed: Sequence[Tensor], accumulate: Accumulate, first_row: int) -> None:
        """Move the decay, after the step of the optimizer; gradients are left as `accumulate` makes them."""
        if not self.due(step):
            return
        count = len(self.held_out) // self.batch_size
        batch = step // self.choice.every % count
        rows = torch.from_numpy(self.held_out[batch * self.batch_size : (batch + 1) * self.batch_size])
        accumulate(rows.to(decayed[0].device), first_row)
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in decayed]
        # On the CPU, because the next step's decay is a number that Python hands to the optimizer.
        self.tensors["log_decay"] += self.choice.rate * cosine(gradients, self._before).cpu()
        self._before = []


def tuned_decay(run: Run, store: TokenStore) -> TunedDecay | None:
    """Return the decay of a run that tunes it, None for any other."""
    if not isinstance(run.regularizer, SelfTunedDecay) or run.regularizer.off:
        return None
    return TunedDecay(run.regularizer, store.holdout(run), run.batch_size)
