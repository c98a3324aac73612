"""Weight decay that follows its hypergradient on held-out text.

A decoupled decay takes lr wd w from the weights w in each step. With g the gradient of the held-out loss L after the step,
dL / d log wd = -lr wd <g, w> over the weights that decay, w before the step. So log wd moves by `rate` times the cosine of g
and w, in every fourth step: the multiplicative rule of arXiv 1703.04782 (section 3), there for learning rates. It sees one
step ahead, where the paper of self-tuning networks (arXiv 1903.03088) learns how the weights respond.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from epochal.data.store import Tokens
from epochal.regularizer_config import SelfTunedDecay
from epochal.training.regularizers.look_ahead import Accumulate
from epochal.training.regularizers.moved import TINY, total_norm
from epochal.training.regularizers.step import Groups, decayed_matrices


def cosine(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the cosine between all gradients and all weights, 0-d float64."""
    product = torch.stack([torch.sum(g.double() * w.double()) for g, w in zip(gradients, weights, strict=True)]).sum()
    return product / (total_norm(gradients).double() * total_norm(weights).double() + TINY)


def held_out_batch(held_out: Tokens, batch_size: int, number: int) -> Tensor:
    """Return one batch (b, T) of sequences (n, T), which repeat."""
    first = number % (len(held_out) // batch_size) * batch_size
    return torch.from_numpy(held_out[first : first + batch_size])


class TunedDecay:
    """The decay of a run over that at its start; `tensors` are the state, which a checkpoint must hold."""

    def __init__(self, choice: SelfTunedDecay, held_out: Tokens, batch_size: int) -> None:
        self.choice, self.held_out, self.batch_size = choice, held_out, batch_size
        self.tensors = {"log_decay": torch.zeros((), dtype=torch.float64)}
        self._before: list[Tensor] = []

    @property
    def decay_factor(self) -> float:
        """What the decay of the next step is multiplied by."""
        return float(self.tensors["log_decay"].exp())

    @property
    def results(self) -> dict[str, float]:
        """What a record says of it: the decay at the end over that at the start."""
        return {"decay_factor": self.decay_factor}

    def before(self, step: int, groups: Groups) -> None:
        """Keep the weights that decay, before this step."""
        self._before = [weight.detach().clone() for weight in decayed_matrices(groups)] if self.choice.due(step) else []

    def after(self, step: int, groups: Groups, accumulate: Accumulate, tokens: Tensor, first_row: int) -> None:
        """Move the decay after a step on tokens (b, T): rows from `first_row` on.

        Gradients are left as `accumulate` makes them.
        """
        if not self.choice.due(step):
            return
        decayed = decayed_matrices(groups)
        rows = held_out_batch(self.held_out, self.batch_size, step // self.choice.every)
        accumulate(rows.to(tokens.device), first_row)
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in decayed]
        # On the CPU, because the next step's decay is a number that Python hands to the optimizer.
        self.tensors["log_decay"] += self.choice.rate * cosine(gradients, self._before).cpu()
        self._before = []
