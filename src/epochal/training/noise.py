"""Regularization by noise: dropout on the residual stream, and a second forward pass on masked inputs.

Masks do not depend on processes, micro-batches and restarts; they do depend on the kind of device. b sequences of T
tokens, width d.

Dropout: Transformer, section 5.4 (on the embeddings and on the outputs of attention and MLP).
Masked inputs: arXiv 2606.06888 and its published code. Each sequence masks a share of its inputs, uniform between 0 and
`input_mask_prob`, and predicts every next token. The published code uses a mask token; here the embedding is zero, so
that the model has the same parameters with and without.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from epochal.optim.roles import residual_outputs
from triton_kernels.backend import backend
from triton_kernels.row_dropout import row_dropout

# Weight of the next-token loss on masked inputs, relative to the plain one (published code).
MASKED_WEIGHT = 0.4


class Noise:
    """The random masks of one run; call `begin` before every forward pass in training mode."""

    def __init__(self, *, seed: int, dropout: float, input_mask_prob: float) -> None:
        self.seed, self.dropout, self.masking = seed, dropout, input_mask_prob
        self._sites: dict[str, torch.nn.Module] = {}

    def attach(self, model: Any) -> None:
        """Add dropout hooks to a decoder, active in training mode; without dropout the model is not changed.

        They follow the token embedding and the last linear map of each block, before a norm of the block's output.
        """
        if self.dropout:
            # The residual stream's start and its additions.
            sites = {id(module) for module in (model.get_input_embeddings(), *residual_outputs(model))}
            for name, module in model.named_modules():
                if id(module) in sites:
                    self._sites[name] = module
                    # The same function at all sites, which reads attributes: one compiled graph serves all layers.
                    module.dropout_share, module.row_seeds = self.dropout, torch.zeros(0, dtype=torch.int64)
                    module.register_forward_hook(_drop)

    def begin(self, rows: range, name: str = "plain") -> None:
        """Draw the seeds of the next forward pass; every (row, pass, site) has its own."""
        if self._sites:
            table = [[self._seed(row, name, site) for row in rows] for site in self._sites]
            device = next(next(iter(self._sites.values())).parameters()).device
            # The kernel reads seeds on the device; generators are seeded by the host.
            seeds = torch.tensor(table, device=device if backend(device) == "triton" else "cpu")
            self._set([each.clone() for each in seeds])

    def hide(self, embeddings: Tensor, rows: range) -> Tensor:
        """Set embeddings (b, T, d) to zero at a random share of each row's positions."""
        kept = []
        for row in rows:
            generator = torch.Generator(embeddings.device).manual_seed(self._seed(row, "masked", "inputs"))
            # One draw more than positions: the first is the share that this row masks.
            draws = torch.rand((embeddings.shape[1] + 1,), generator=generator, device=embeddings.device)
            kept.append(draws[1:] >= draws[0] * self.masking)
        return embeddings * torch.stack(kept)[..., None].to(embeddings.dtype)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a forward pass and of its recomputation: the `context_fn` of torch's checkpoint."""
        # By the time of the backward pass `begin` may have been called for another pass.
        return nullcontext(), self._seeds_of(self._current())

    @contextmanager
    def _seeds_of(self, seeds: Sequence[Tensor]) -> Iterator[None]:
        last = self._current()
        self._set(seeds)
        try:
            yield
        finally:
            self._set(last)

    def _current(self) -> list[Any]:
        return [module.row_seeds for module in self._sites.values()]

    def _set(self, seeds: Sequence[Any]) -> None:
        for module, each in zip(self._sites.values(), seeds, strict=True):
            module.row_seeds = each

    def _seed(self, row: int, name: str, site: str) -> int:
        # Every sequence has its own random numbers: `row` counts all sequences since the first step of the run.
        key = f"{self.seed}/{row}/{name}/{site}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


def _drop(module: Any, _: Any, output: Tensor) -> Tensor | None:
    return row_dropout(output, module.row_seeds, module.dropout_share) if module.training else None
