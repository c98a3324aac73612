"""Random token replacement: inputs are noise here and there, targets stay (arXiv 2606.16246).

b sequences of T tokens. Each input is replaced with probability `share` by a token drawn uniformly from the vocabulary, which
may be the same one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def replace_tokens(tokens: Tensor, seeds: Sequence[int], *, share: float, vocab_size: int) -> Tensor:
    """Return (b, T) tokens with replacements drawn from one seed per row."""
    rows = []
    for row, seed in zip(tokens, seeds, strict=True):
        generator = torch.Generator(tokens.device).manual_seed(seed)
        chosen = torch.rand(row.shape, generator=generator, device=tokens.device) < share
        drawn = torch.randint(vocab_size, row.shape, generator=generator, device=tokens.device)
        rows.append(torch.where(chosen, drawn, row))
    return torch.stack(rows)
