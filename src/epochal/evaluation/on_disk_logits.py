"""Logits of K members, too large for memory, recomputed block by block from files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epochal.data.store import Tokens
from epochal.models.llama import next_token
from epochal.models.load import Loader
from epochal.optim.roles import head_weight

# Tokens of one forward pass of a member.
FORWARD_TOKENS = 2**13


class OnDiskLogits:
    """Logits of K members over n tokens, as hidden states and heads in `folder`.

    Each member is loaded once, and only one is in memory at a time. Files: 4 (n d_k + V d_k) bytes for member k.
    """

    def __init__(self, members: Sequence[Loader], sequences: Tokens | torch.Tensor, folder: Path) -> None:
        self.vocabulary, self.device = 0, torch.device("cpu")
        self._folder, self._widths, self._largest_member = folder, list[int](), 0
        # Logit of each target token, (K, n) float32 on the CPU.
        self.target_logits = torch.stack([self._write(load(), sequences, k) for k, load in enumerate(members)])

    @property
    def tokens(self) -> int:
        """Number of predicted tokens n."""
        return self.target_logits.shape[1]

    def hidden(self, start: int, stop: int) -> list[torch.Tensor]:
        """Return each member's hidden states of tokens `start` to `stop`, (stop - start, d_k)."""
        return [self._read("hidden", k, start, stop) for k in range(len(self._widths))]

    def heads(self, start: int, stop: int) -> list[torch.Tensor]:
        """Return each member's head rows `start` to `stop`, (stop - start, d_k)."""
        return [self._read("head", k, start, stop) for k in range(len(self._widths))]

    def rows_in(self, budget: int) -> int:
        """Return how many rows of all members fit into `budget` bytes, at least 1."""
        # A budget below half of the largest member is raised to that: memory for it was needed anyway.
        return max(1, max(budget, self._largest_member // 2) // (4 * sum(self._widths)))

    def _write(self, model: Any, sequences: Tokens | torch.Tensor, k: int) -> torch.Tensor:
        """Write the files of one member and return its target logits, (n,)."""
        head = head_weight(model).detach().float()
        # Written once, read many times: a block of the vocabulary is needed for every block of tokens.
        head.cpu().numpy().tofile(self._folder / f"{k}.head")
        self._widths.append(head.shape[1])
        self.vocabulary, self.device = head.shape[0], model.device
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self._largest_member = max(self._largest_member, size)
        target_logits = []
        with (self._folder / f"{k}.hidden").open("wb") as file:
            for chunk in split_sequences(sequences, FORWARD_TOKENS):
                hidden, targets = next_token(model, chunk.to(model.device))
                hidden.float().cpu().numpy().tofile(file)
                # In parts, because head[ids] is as large as the hidden states.
                parts = zip(torch.split(hidden.float(), 1024), torch.split(targets, 1024), strict=True)
                target_logits += [(part * head[ids]).sum(1).cpu() for part, ids in parts]
        return torch.cat(target_logits)

    def _read(self, kind: str, k: int, start: int, stop: int) -> torch.Tensor:
        width = self._widths[k]
        # Plain reads, not a memory map: mapped pages would count as memory of this process.
        flat: torch.Tensor = torch.from_numpy(
            np.fromfile(
                self._folder / f"{k}.{kind}", np.float32, count=(stop - start) * width, offset=4 * start * width
            )
        )
        return flat.view(-1, width).to(self.device)


def split_sequences(sequences: Any, tokens: int) -> tuple[torch.Tensor, ...]:
    """Split (r, T) sequences into groups of whole rows of about `tokens` tokens."""
    return torch.split(torch.as_tensor(sequences), max(1, tokens // sequences.shape[1]))
