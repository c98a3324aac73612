"""Losses of averaged models for many subsets, with one member in memory at a time.

n tokens, V vocabulary, K members, S subsets. A row of `shares` (S, K) holds the weight of each member in one subset, 0
for members outside of it.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from epochal.data.store import Tokens
from epochal.evaluation.on_disk_logits import FORWARD_TOKENS, OnDiskLogits, split_sequences
from epochal.loss import token_log_probs
from epochal.models.llama import next_token
from epochal.models.load import Loader, average_parameters
from epochal.optim.roles import head_weight
from epochal.stopping import check_stop

# Tokens for which all members are loaded once; their hidden states are on disk together.
PASS_TOKENS = 2**18

# Memory for a block of all members' hidden states, and for one of their heads; more if a member is larger.
BLOCK_BYTES = 2**24

# Elements of the logits of all members, and of the means of some subsets, in memory at a time.
LOGITS = 2**20


@torch.no_grad()
def target_log_probs(members: Sequence[Loader], sequences: Tokens) -> torch.Tensor:
    """Return log p(target) in nats of each member, on the CPU.

    `sequences` is (r, T), the result (K, r * (T - 1)) float32.
    """
    table = torch.empty(len(members), sequences.shape[0] * (sequences.shape[1] - 1), dtype=torch.float32)
    for row, load in zip(table, members, strict=True):
        model = load()
        start = 0
        for chunk in split_sequences(sequences, FORWARD_TOKENS):
            hidden, targets = next_token(model, chunk.to(model.device))
            row[start : start + len(targets)] = token_log_probs(hidden, head_weight(model), targets).cpu()
            start += len(targets)
        del model  # before the next one is loaded
    return table


def probability_losses(table: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the losses of averaged probabilities for each row of shares, (S,) float64.

    The loss is the mean of -log sum_k w_k p_k(target) over tokens. `table` is (K, n) log p(target), shares (S, K).
    """
    totals = torch.zeros(len(shares), dtype=torch.float64)
    log_shares = shares.double().log()
    for part in torch.split(table, 2**16, dim=1):
        wide = part.double()
        for s, row in enumerate(log_shares):
            # A member outside of the subset has log w = -inf.
            inside = torch.isfinite(row)
            totals[s] -= torch.logsumexp(wide[inside] + row[inside, None], 0).sum()
    return totals / table.shape[1]


@torch.no_grad()
def logit_losses(
    members: Sequence[Loader], sequences: Tokens, shares: torch.Tensor, *, scratch: Path | None = None
) -> torch.Tensor:
    """Return the losses of averaged logits for each row of shares, (S,) float64.

    The loss is the mean of -log softmax(sum_k w_k z_k)(target) over tokens. `sequences` is (r, T), shares (S, K).
    `scratch` is the folder for the temporary files of `OnDiskLogits`, by default the system's.
    """
    totals = torch.zeros(len(shares), dtype=torch.float64)
    for part in split_sequences(sequences, PASS_TOKENS):
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".hidden-") as folder:
            logits = OnDiskLogits(members, part, Path(folder))
            # -log softmax(mean)(target) = log-normalizer of the mean - mean logit of the target.
            totals += log_normalizers(logits, shares) - (shares.double() @ logits.target_logits.double()).sum(1)
    losses: torch.Tensor = totals / (len(sequences) * (sequences.shape[1] - 1))
    return losses


@torch.no_grad()
def parameter_losses(members: Sequence[Loader], sequences: Tokens, shares: torch.Tensor) -> torch.Tensor:
    """Return the losses of averaged parameters for each row of shares, (S,) float64 in nats.

    The model has the parameters sum_k w_k W_k. `sequences` is (r, T), shares (S, K). Two models are in memory at a
    time. Raises ValueError if members differ in shape.
    """
    tables = [target_log_probs([partial(average_parameters, members, row)], sequences) for row in shares.tolist()]
    return torch.stack([-table.double().mean() for table in tables])


def log_normalizers(logits: OnDiskLogits, shares: torch.Tensor) -> torch.Tensor:
    """Return the summed log-normalizers of averaged logits for each row of shares (S, K).

    (S,) float64: the sum over tokens of log sum_v exp(sum_k w_k z_kv).
    """
    # Unlike averaged probabilities, averaged logits need all V logits of every member, for every subset. They are
    # recomputed block by block from hidden states and heads: V logits of K members do not fit into memory.
    columns = logits.rows_in(BLOCK_BYTES)
    rows = max(1, min(columns, 2**21 // len(shares)))
    sums = torch.zeros(len(shares), dtype=torch.float64)
    device_shares = shares.float().to(logits.device)
    for start in range(0, logits.tokens, rows):
        hidden = logits.hidden(start, min(start + rows, logits.tokens))
        # log of an empty sum; blocks of the vocabulary are added by logaddexp.
        total = torch.full((len(shares), len(hidden[0])), -torch.inf, dtype=torch.float64)
        for first in range(0, logits.vocabulary, columns):
            heads = logits.heads(first, min(first + columns, logits.vocabulary))
            _add_columns(total, hidden, heads, device_shares)
        sums += total.sum(1)
    return sums


def _add_columns(
    total: torch.Tensor, hidden: list[torch.Tensor], heads: list[torch.Tensor], shares: torch.Tensor
) -> None:
    """Add exp(sum_k w_k z_kv) of the vocabulary entries v of `heads` to exp(total); `total` is (S, tokens) float64.

    `hidden` are (tokens, d_k), `heads` (columns, d_k).
    """
    members, columns = len(heads), heads[0].shape[0]
    row_limit = max(1, LOGITS // (members * columns))
    # Two buffers, reused: allocating and freeing blocks of this size fragments memory by about the size of a member.
    buffers = [heads[0].new_empty(max(LOGITS, members * columns)) for _ in range(2)]
    for begin in range(0, len(hidden[0]), row_limit):
        check_stop()
        rows = min(row_limit, len(hidden[0]) - begin)
        logits = buffers[0][: members * rows * columns].view(members, rows, columns)
        for z, x, w in zip(logits, hidden, heads, strict=True):
            torch.mm(x[begin : begin + rows], w.T, out=z)
        subset_limit = max(1, LOGITS // (rows * columns))
        for first in range(0, len(shares), subset_limit):
            group = shares[first : first + subset_limit]
            means = buffers[1][: len(group) * rows * columns].view(len(group), rows * columns)
            # The means of all subsets in one product: (S, K) by (K, rows * columns).
            torch.mm(group, logits.view(members, -1), out=means)
            part = total[first : first + subset_limit, begin : begin + rows]
            part.copy_(torch.logaddexp(part, _log_sum_exp_(means.view(-1, rows, columns)).double().cpu()))


def _log_sum_exp_(values: torch.Tensor) -> torch.Tensor:
    """Return log sum exp over the last dimension; `values` are overwritten."""
    top = values.amax(-1)
    # Subtract the largest value first, against overflow.
    sums: torch.Tensor = values.sub_(top[..., None]).exp_().sum(-1)
    return sums.log_().add_(top)
