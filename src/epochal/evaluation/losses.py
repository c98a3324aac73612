"""Losses of averaged models, for any number of subsets and weightings at once, with one member in memory at a time.

n tokens, d width, V vocabulary, K members, S subsets. A subset is a row of `shares` (S, K): the weight of each member in
it, zero for those outside. probs: -log sum_k w_k p_k(target) needs only the table of log p_k(target), (K, n). logits:
-log softmax(sum_k w_k z_k)(target) needs the log-normaliser of S means; hidden states and heads of all members go to disk
and come back in blocks, so that logits exist for a few rows and columns at a time.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epochal.data.store import Tokens
from epochal.loss import token_log_probs
from epochal.models.llama import next_token
from epochal.models.load import Loader, soup
from epochal.stopping import check_stop

FORWARD_TOKENS = 2**13
"""Tokens of one forward pass of a member."""

PASS_TOKENS = 2**18
"""Tokens for which every member is loaded once; their hidden states lie on disk, 4 d bytes for each and member."""

BLOCK_BYTES = 2**24
"""Least memory for a block of all members' hidden states, and for one of their heads; a large member allows more."""

LOGITS = 2**20
"""Elements of the logits of all members, or of the means of some subsets, that exist at a time."""


@torch.no_grad()
def target_log_probs(members: Sequence[Loader], sequences: Tokens) -> torch.Tensor:
    """Return log p(target) in nats of each member for (r, T) sequences: (K, r * (T - 1)) float32 on the CPU."""
    table = torch.empty(len(members), sequences.shape[0] * (sequences.shape[1] - 1), dtype=torch.float32)
    for row, load in zip(table, members, strict=True):
        model = load()
        place = 0
        for chunk in _chunks(sequences, FORWARD_TOKENS):
            hidden, targets = next_token(model, chunk.to(model.device))
            row[place : place + len(targets)] = token_log_probs(hidden, model.lm_head.weight, targets).cpu()
            place += len(targets)
        del model
    return table


def probability_losses(table: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log sum_k w_k p_k(target) over tokens for each row of shares, (S,) float64.

    `table` is (K, n) log p(target), shares (S, K).
    """
    totals = torch.zeros(len(shares), dtype=torch.float64)
    logs = shares.double().log()
    for part in torch.split(table, 2**16, dim=1):
        wide = part.double()
        for s, row in enumerate(logs):
            inside = torch.isfinite(row)
            totals[s] -= torch.logsumexp(wide[inside] + row[inside, None], 0).sum()
    return totals / table.shape[1]


@torch.no_grad()
def logit_losses(
    members: Sequence[Loader], sequences: Tokens, shares: torch.Tensor, *, scratch: Path | None = None
) -> torch.Tensor:
    """Return the mean of -log softmax(sum_k w_k z_k)(target) over tokens for each row of shares, (S,) float64.

    `sequences` is (r, T), shares (S, K). `scratch` is the folder for the temporary files, 4 (n d + V d) bytes for each
    member and `PASS_TOKENS`; by default the system's.
    """
    totals = torch.zeros(len(shares), dtype=torch.float64)
    for part in _chunks(sequences, PASS_TOKENS):
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".hidden-") as folder:
            spools = [_spool(load, part, Path(folder) / str(k)) for k, load in enumerate(members)]
            targets = torch.stack([spool.target_logits for spool in spools]).double()
            totals += _normalisers(spools, shares) - (shares.double() @ targets).sum(1)
    losses: torch.Tensor = totals / (len(sequences) * (sequences.shape[1] - 1))
    return losses


@torch.no_grad()
def soup_losses(members: Sequence[Loader], sequences: Tokens, shares: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats of one model for each row of shares, its weights sum_k w_k W_k: (S,) float64.

    `sequences` is (r, T), shares (S, K). Two models are in memory at a time. Raises ValueError when members differ in
    shape.
    """
    tables = [target_log_probs([partial(soup, members, row)], sequences) for row in shares.tolist()]
    return torch.stack([-table.double().mean() for table in tables])


@dataclass(frozen=True)
class _Spool:
    """What is left of a member after its forward passes: two files of float32 rows of width d, and (n,) target logits."""

    path: Path
    width: int
    vocabulary: int
    target_logits: torch.Tensor
    bytes: int
    device: torch.device

    def rows(self, what: str, start: int, stop: int) -> torch.Tensor:
        """Read rows of "hidden" (n, d) or "head" (V, d). Plain reads: mapped pages would count as memory."""
        file, count = self.path.with_suffix(f".{what}"), (stop - start) * self.width
        flat: torch.Tensor = torch.from_numpy(
            np.fromfile(file, dtype=np.float32, count=count, offset=4 * start * self.width)
        )
        return flat.view(-1, self.width).to(self.device)


def _spool(load: Loader, sequences: torch.Tensor, path: Path) -> _Spool:
    """Run one member over (r, T) sequences and write its hidden states and its head to disk."""
    model = load()
    head = model.lm_head.weight.detach().float()
    head.cpu().numpy().tofile(path.with_suffix(".head"))
    logits = []
    with path.with_suffix(".hidden").open("wb") as file:
        for chunk in _chunks(sequences, FORWARD_TOKENS):
            hidden, targets = next_token(model, chunk.to(model.device))
            hidden.float().cpu().numpy().tofile(file)
            parts = zip(torch.split(hidden.float(), 1024), torch.split(targets, 1024), strict=True)
            logits += [(part * head[wanted]).sum(1).cpu() for part, wanted in parts]
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return _Spool(path, head.shape[1], head.shape[0], torch.cat(logits), size, model.device)


def _normalisers(spools: list[_Spool], shares: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of log sum_v exp(sum_k w_k z_kv) for each row of shares, (S,) float64."""
    tokens, vocabulary = len(spools[0].target_logits), spools[0].vocabulary
    budget = max(BLOCK_BYTES, max(spool.bytes for spool in spools) // 2)
    fitting = max(1, budget // (4 * sum(spool.width for spool in spools)))
    rows = max(1, min(fitting, 2**21 // len(shares)))
    sums = torch.zeros(len(shares), dtype=torch.float64)
    device_shares = shares.float().to(spools[0].device)
    for start in range(0, tokens, rows):
        hidden = [spool.rows("hidden", start, min(start + rows, tokens)) for spool in spools]
        total = torch.full((len(shares), len(hidden[0])), -torch.inf, dtype=torch.float64)
        for first in range(0, vocabulary, fitting):
            heads = [spool.rows("head", first, min(first + fitting, vocabulary)) for spool in spools]
            _add_columns(total, hidden, heads, device_shares)
        sums += total.sum(1)
    return sums


def _add_columns(
    total: torch.Tensor, hidden: list[torch.Tensor], heads: list[torch.Tensor], shares: torch.Tensor
) -> None:
    """Add exp(sum_k w_k z_kv) of the columns v of some heads to what `total`, (S, tokens) float64, is the log of.

    `hidden` are (tokens, d_k), `heads` (columns, d_k). The two buffers are used again and again: blocks of this size that
    come and go leave an allocator with holes as large as the members.
    """
    members, columns = len(heads), heads[0].shape[0]
    most = max(1, LOGITS // (members * columns))
    buffers = [heads[0].new_empty(max(LOGITS, members * columns)) for _ in range(2)]
    for begin in range(0, len(hidden[0]), most):
        check_stop()
        rows = min(most, len(hidden[0]) - begin)
        logits = buffers[0][: members * rows * columns].view(members, rows, columns)
        for z, x, w in zip(logits, hidden, heads, strict=True):
            torch.mm(x[begin : begin + rows], w.T, out=z)
        some = max(1, LOGITS // (rows * columns))
        for first in range(0, len(shares), some):
            group = shares[first : first + some]
            means = buffers[1][: len(group) * rows * columns].view(len(group), rows * columns)
            torch.mm(group, logits.view(members, -1), out=means)
            part = total[first : first + some, begin : begin + rows]
            part.copy_(torch.logaddexp(part, _log_sum_exp_(means.view(-1, rows, columns)).double().cpu()))


def _log_sum_exp_(values: torch.Tensor) -> torch.Tensor:
    """Return log sum exp over the last dimension; `values` are overwritten."""
    top = values.amax(-1)
    sums: torch.Tensor = values.sub_(top[..., None]).exp_().sum(-1)
    return sums.log_().add_(top)


def _chunks(sequences: Any, tokens: int) -> tuple[torch.Tensor, ...]:
    """Split (r, T) sequences into groups of whole rows of about `tokens` tokens."""
    return torch.split(torch.as_tensor(sequences), max(1, tokens // sequences.shape[1]))
