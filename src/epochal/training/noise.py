"""Regularization by noise: dropout on the residual stream, and a second forward pass on masked inputs.

Masks do not depend on processes, micro-batches and restarts; they do depend on the kind of device. b sequences of T
tokens, width d.

Dropout: Transformer, section 5.4 (on the embeddings and on the outputs of attention and MLP).
Masked inputs: arXiv 2606.06888 and its published code. Each sequence masks a share of its inputs, uniform between 0 and
`input_mask_prob`, and predicts every next token. The published code uses a mask token; here the embedding is zero, so
that the model has the same parameters with and without.
"""

import functools
import hashlib
from typing import Any

import torch

# Modules of Llama whose outputs are the residual stream's start and its additions.
DROPOUT_SITES = ("embed_tokens", "o_proj", "down_proj")

# Weight of the next-token loss on masked inputs, relative to the plain one (published code).
MASKED_WEIGHT = 0.4


class Noise:
    """The random masks of one run; call `begin` before every forward pass in training mode."""

    def __init__(self, *, seed: int, dropout: float, input_mask_prob: float) -> None:
        self.seed, self.dropout, self.masking = seed, dropout, input_mask_prob
        self._rows, self._pass = range(0), ""

    def attach(self, model: Any) -> None:
        """Add dropout hooks to a Llama, active in training mode; without dropout the model is not changed."""
        if self.dropout:
            for name, module in model.named_modules():
                if name.rpartition(".")[2] in DROPOUT_SITES:
                    module.register_forward_hook(functools.partial(self._drop, name))

    def begin(self, rows: range, name: str = "plain") -> None:
        """Set the rows and the name of the next forward pass; every (row, pass) has its own masks."""
        self._rows, self._pass = rows, name

    def hide(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Set embeddings (b, T, d) to zero at a random share of each row's positions."""
        kept = []
        for row in self._rows:
            # One draw more than positions: the first is the share that this row masks.
            draws = self._uniform(row, "inputs", (embeddings.shape[1] + 1,), embeddings.device)
            kept.append(draws[1:] >= draws[0] * self.masking)
        return embeddings * torch.stack(kept)[..., None].to(embeddings.dtype)

    def _drop(self, site: str, module: Any, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        draws = [self._uniform(row, site, tuple(output.shape[1:]), output.device) for row in self._rows]
        kept = (torch.stack(draws) >= self.dropout).to(output.dtype)
        # Inverted dropout: scaled in training, so that evaluation needs no factor.
        return output * kept.div_(1.0 - self.dropout)

    def _uniform(self, row: int, site: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        # Every sequence has its own random numbers: `row` counts all sequences since the first step of the run.
        key = f"{self.seed}/{row}/{self._pass}/{site}".encode()
        generator = torch.Generator(device)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big"))
        return torch.rand(shape, generator=generator, device=device)
