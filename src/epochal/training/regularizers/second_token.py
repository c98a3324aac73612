"""Multi-token prediction: hidden states also predict the token after the next one (arXiv 2404.19737).

The loss is L1 + weight L2, where L2 is the cross-entropy of x_{t+2} under head(M h_t), h_t the hidden state that predicts
x_{t+1}. The paper has a transformer layer for each further token before the shared head; M is one linear map, as cheap as
that can be, which starts as the identity, is stepped by AdamW with the learning rate and decay of the model's linear maps,
and is not part of the trained model. b sequences of T tokens, width d, vocabulary V.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epochal.loss import cross_entropy
from epochal.optimizer_config import AdamW


class SecondTokenMap:
    """The map M (d, d); `tensors` are it and its optimizer's state, which a checkpoint must hold."""

    def __init__(self, weight: float, width: int, device: torch.device) -> None:
        self.weight = weight
        self.map = torch.eye(width, device=device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.map], betas=(AdamW.beta1, AdamW.beta2))
        # Made here instead of in the first step, so that a checkpoint can be loaded into it.
        state = {"exp_avg": torch.zeros_like(self.map.data), "exp_avg_sq": torch.zeros_like(self.map.data)}
        self.optimizer.state[self.map] = {"step": torch.zeros(()), **state}
        self.tensors = {"map": self.map.data, **self.optimizer.state[self.map]}

    def loss(self, hidden: Tensor, head: Tensor, tokens: Tensor, normaliser: float) -> Tensor:
        """Return weight L2, summed over `normaliser`: hidden (b (T - 1), d), head (V, d), tokens (b, T)."""
        # The last position has no second token.
        states = hidden.view(len(tokens), -1, hidden.shape[1])[:, :-1].flatten(0, 1)
        return self.weight * cross_entropy(states @ self.map.t(), head, tokens[:, 2:].flatten(), normaliser=normaliser)

    def step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Step M like the linear maps of these optimizer groups, and clear its gradient."""
        decayed = next(group for group in groups if group["decay_scale"])
        self.optimizer.param_groups[0].update(lr=decayed["lr"], weight_decay=decayed["weight_decay"])
        self.optimizer.step()
        self.optimizer.zero_grad()
