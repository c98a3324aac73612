"""Regularisation by noise: dropout on the residual stream, and a second look at inputs with holes.

Every sequence of a run draws its own numbers, from generators seeded by (order seed, its row, the place of use). The row
counts all sequences since the first step, so processes, micro-batches and restarts change no mask; another kind of
device draws other numbers. b sequences of T tokens, width d.

Dropout: Transformer, section 5.4 (on the embeddings and on what attention and MLP add to the residual stream).
Masked inputs: arXiv 2606.06888 and its published code, where each sequence hides a share of its inputs, drawn evenly from
0 to the largest, and predicts every next token all the same. There a mask token is put in; here the embedding is zero,
so the model is the same with and without.
"""

import functools
import hashlib
from typing import Any

import torch

DROPOUT_SITES = ("embed_tokens", "o_proj", "down_proj")
"""Modules of Llama whose outputs are the residual stream's start and its additions."""

MASKED_WEIGHT = 0.4
"""Weight of the next-token loss on masked inputs, beside 1 for the plain one (published code)."""


class Noise:
    """The random masks of one run; `begin` says which rows come next."""

    def __init__(self, *, seed: int, dropout: float, input_mask_prob: float) -> None:
        self.seed, self.dropout, self.masking = seed, dropout, input_mask_prob
        self._rows, self._look = range(0), ""

    def attach(self, model: Any) -> None:
        """Let a Llama drop residual values while it is in training mode; without dropout it is left as it is."""
        if self.dropout:
            for name, module in model.named_modules():
                if name.rpartition(".")[2] in DROPOUT_SITES:
                    module.register_forward_hook(functools.partial(self._drop, name))

    def begin(self, rows: range, look: str = "plain") -> None:
        """Say which rows the next forward pass reads, and which look at them it is: each has its own masks."""
        self._rows, self._look = rows, look

    def hide(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (b, T, d) embeddings with a random share of the positions of each row set to zero."""
        kept = []
        for row in self._rows:
            draws = self._uniform(row, "inputs", (embeddings.shape[1] + 1,), embeddings.device)
            kept.append(draws[1:] >= draws[0] * self.masking)
        return embeddings * torch.stack(kept)[..., None].to(embeddings.dtype)

    def _drop(self, site: str, module: Any, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Drop values of a module's (b, T, d) output and scale up the others; nothing outside training."""
        if not module.training:
            return None
        draws = [self._uniform(row, site, tuple(output.shape[1:]), output.device) for row in self._rows]
        kept = (torch.stack(draws) >= self.dropout).to(output.dtype)
        return output * kept.div_(1.0 - self.dropout)

    def _uniform(self, row: int, site: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        key = f"{self.seed}/{row}/{self._look}/{site}".encode()
        generator = torch.Generator(device)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big"))
        return torch.rand(shape, generator=generator, device=device)
