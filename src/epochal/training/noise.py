"""Regularization by noise: dropout, masked and random inputs, blocks that are skipped.

Masks do not depend on processes, micro-batches and restarts; they do depend on the kind of device. b sequences of T
tokens, width d.

Dropout: Transformer, section 5.4 (on the embeddings and on the outputs of attention and MLP).
Masked inputs: arXiv 2606.06888 and its published code. Each sequence masks a share of its inputs, uniform between 0 and
`input_mask_prob`, and predicts every next token. The published code uses a mask token; here the embedding is zero, so
that the model has the same parameters with and without.
Random inputs and skipped blocks: `epochal.training.regularizers`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from epochal.optim.roles import decoder_layers, residual_outputs
from epochal.regularizer_config import RandomTokens, Regularizer, StochasticDepth
from epochal.training.regularizers.random_tokens import replace_tokens
from epochal.training.regularizers.stochastic_depth import keep_factors, skip_share
from triton_kernels.backend import backend
from triton_kernels.row_dropout import row_dropout

# Weight of the next-token loss on masked inputs, relative to the plain one (published code).
MASKED_WEIGHT = 0.4


class Noise:
    """The random masks of one run; call `begin` before every forward pass in training mode."""

    def __init__(
        self, *, seed: int, dropout: float, input_mask_prob: float, regularizer: Regularizer | None = None
    ) -> None:
        self.seed, self.dropout, self.masking = seed, dropout, input_mask_prob
        self.random_share = regularizer.share if isinstance(regularizer, RandomTokens) else 0.0
        self.skip_share = regularizer.share if isinstance(regularizer, StochasticDepth) else 0.0
        self.vocab_size = 0
        self._sites: dict[str, Any] = {}  # modules with a hook
        self._blocks: dict[str, tuple[torch.nn.Module, float]] = {}  # that may be skipped, and how often

    def attach(self, model: Any) -> None:
        """Add dropout hooks to a decoder, active in training mode; without dropout the model is not changed.

        They follow the token embedding and the last linear map of each block, before a norm of the block's output.
        """
        self.vocab_size = model.config.vocab_size
        if self.skip_share:
            self._attach_skips(model)
        if self.dropout:
            # The residual stream's start and its additions.
            sites = {id(module) for module in (model.get_input_embeddings(), *residual_outputs(model))}
            for name, module in model.named_modules():
                if id(module) in sites:
                    self._sites[name] = module
                    # The same function at all sites, which reads attributes: one compiled graph serves all layers.
                    module.row_seeds = torch.zeros(0, dtype=torch.int64)
                    module.register_forward_hook(_drop)
            self.set_dropout(self.dropout)

    def _attach_skips(self, model: Any) -> None:
        layers = decoder_layers(model)
        outputs = {id(module) for module in residual_outputs(model)}
        depths = {
            id(m): depth for depth, layer in enumerate(layers, start=1) for m in layer.modules() if id(m) in outputs
        }
        for name, module in model.named_modules():
            if id(module) in depths:
                self._blocks[name] = module, skip_share(depths[id(module)], len(layers), self.skip_share)
                module.row_factors = torch.zeros(0)
                module.register_forward_hook(_skip)

    def set_dropout(self, share: float) -> None:
        """Drop another share from now on; only where there was dropout when the hooks were added."""
        self.dropout = share
        for module in self._sites.values():
            module.dropout_share = torch.tensor(share, dtype=torch.float64)

    def begin(self, rows: range, name: str = "plain") -> None:
        """Draw the seeds of the next forward pass; every (row, pass, site) has its own."""
        for site, (block, share) in self._blocks.items():
            factors = keep_factors([self._seed(row, name, f"{site}/skip") for row in rows], share)
            block.row_factors = factors.to(next(block.parameters()).device)
        if self._sites:
            table = [[self._seed(row, name, site) for row in rows] for site in self._sites]
            device = next(next(iter(self._sites.values())).parameters()).device
            # The kernel reads seeds on the device; generators are seeded by the host.
            seeds = torch.tensor(table, device=device if backend(device) == "triton" else "cpu")
            self._set([*(each.clone() for each in seeds), *(block.row_factors for block, _ in self._blocks.values())])

    def hide(self, embeddings: Tensor, rows: range) -> Tensor:
        """Set embeddings (b, T, d) to zero at a random share of each row's positions."""
        kept = []
        for row in rows:
            generator = torch.Generator(embeddings.device).manual_seed(self._seed(row, "masked", "inputs"))
            # One draw more than positions: the first is the share that this row masks.
            draws = torch.rand((embeddings.shape[1] + 1,), generator=generator, device=embeddings.device)
            kept.append(draws[1:] >= draws[0] * self.masking)
        return embeddings * torch.stack(kept)[..., None].to(embeddings.dtype)

    def replaced(self, tokens: Tensor, rows: range) -> Tensor:
        """Return input tokens (b, T) of which a share is random."""
        if not self.random_share:
            return tokens
        seeds = [self._seed(row, "random", "inputs") for row in rows]
        return replace_tokens(tokens, seeds, share=self.random_share, vocab_size=self.vocab_size)

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
        seeds = [module.row_seeds for module in self._sites.values()]
        return [*seeds, *(block.row_factors for block, _ in self._blocks.values())]

    def _set(self, seeds: Sequence[Any]) -> None:
        for module, each in zip(self._sites.values(), seeds, strict=False):
            module.row_seeds = each
        for (block, _), each in zip(self._blocks.values(), seeds[len(self._sites) :], strict=True):
            block.row_factors = each

    def _seed(self, row: int, name: str, site: str) -> int:
        # Every sequence has its own random numbers: `row` counts all sequences since the first step of the run.
        key = f"{self.seed}/{row}/{name}/{site}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


def _drop(module: Any, _: Any, output: Tensor) -> Tensor | None:
    return row_dropout(output, module.row_seeds, module.dropout_share) if module.training else None


def _skip(module: Any, _: Any, output: Tensor) -> Tensor | None:
    return output * module.row_factors[:, None, None].to(output.dtype) if module.training else None
