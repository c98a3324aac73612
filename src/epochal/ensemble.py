"""Several models as one: the loss of every K, averaged over members in logits or in probabilities.

logits: softmax of the mean of raw logits, the paper's rule (spec section 6). probs: the mean of the members'
distributions; there only p(target) of each member matters. n tokens, V vocabulary, K members.
"""

import math
from typing import Any

import torch

from epochal.data import Tokens, open_store
from epochal.generate import load_model, member_records
from epochal.loss import token_log_probs
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace
from epochal.run import Ensemble, Run, fingerprint
from epochal.stopping import check_stop
from epochal.train import next_token

CHUNK_TOKENS = 2**13
"""Tokens of one pass through all members; the logits of one member for them are in memory at a time, and their sum."""


def evaluate_ensemble(ensemble: Ensemble, workspace: Workspace, records: Records) -> Record:
    """Return the record of an ensemble: its loss, and for every k <= K the losses of K subsets of k members.

    The subsets of size k are the K runs of k neighbours on the circle of members, so every member counts equally.
    With `weights` only the whole ensemble is evaluated. Raises ValueError when members differ in their data or
    sequence length, or lack weights.
    """
    members = [record for name in ensemble.runs for record in member_records(name, records)]
    run = _common_run(ensemble, members)
    store = open_store(run.data, workspace)
    models = [load_model(workspace, record.job.name) for record in members]
    results: dict[str, Any] = {}
    for split in ("validation", "test"):
        if split == "test" and store.meta["tokens"]["test"] < run.sequence_length:
            continue
        sequences = store.sequences(split, run.sequence_length)
        curve = ensemble_losses(models, sequences, average=ensemble.average, weights=ensemble.weights)
        prefix = "" if split == "validation" else "test_"
        whole = curve[len(models)]
        results[f"{prefix}loss"] = math.fsum(whole) / len(whole)
        results[f"{prefix}curve"] = {str(k): losses for k, losses in curve.items()}
    parameters = sum(int(record.results["parameters"]) for record in members)
    return Record(
        job=ensemble,
        fingerprint=fingerprint(ensemble),
        status="done",
        results={**results, "members": len(models), "parameters": parameters},
        inputs={record.job.name: record.fingerprint for record in members},
        provenance=provenance(),
    )


def _common_run(ensemble: Ensemble, members: list[Record]) -> Run:
    """Return one member after checking that all read the same tokens."""
    runs = [record.job for record in members if isinstance(record.job, Run)]
    views = {(run.data, run.sequence_length) for run in runs}
    if len(views) != 1:
        raise ValueError(
            f"ensemble {ensemble.name!r} mixes members of {len(views)} data sets or sequence lengths; use members of one."
        )
    return runs[0]


@torch.no_grad()
def ensemble_losses(
    models: list[Any], sequences: Tokens, *, average: str, weights: tuple[float, ...] | None = None
) -> dict[int, list[float]]:
    """Return {k: mean losses in nats of the evaluated subsets of k members} over (n, T) sequences."""
    count = len(models)
    sizes = [count] if weights is not None else list(range(1, count + 1))
    totals = {k: torch.zeros(1 if k == count else count, dtype=torch.float64) for k in sizes}
    rows = torch.split(torch.from_numpy(sequences), max(1, CHUNK_TOKENS // sequences.shape[1]))
    losses = _logit_losses if average == "logits" else _probability_losses
    for chunk in rows:
        check_stop()
        for k, sums in losses(models, chunk, sizes, weights).items():
            totals[k] += sums
    predictions = len(sequences) * (sequences.shape[1] - 1)
    return {k: (total / predictions).tolist() for k, total in totals.items()}


def _subsets(count: int, k: int) -> list[list[int]]:
    """The k neighbours from each start on the circle of members; one subset when k is all of them."""
    starts = 1 if k == count else count
    return [[(start + offset) % count for offset in range(k)] for start in range(starts)]


def _probability_losses(
    models: list[Any], rows: torch.Tensor, sizes: list[int], weights: tuple[float, ...] | None
) -> dict[int, torch.Tensor]:
    """Sum of -log mean_k p_k(target) for every subset, from the (K, n) table of log p(target)."""
    table = torch.stack([_target_log_probs(model, rows) for model in models]).double()
    if weights is not None:
        shares = torch.tensor(weights, dtype=torch.float64).log()[:, None]
        return {len(models): -torch.logsumexp(table + shares, 0).sum()[None]}
    return {
        k: torch.stack(
            [-(torch.logsumexp(table[subset], 0) - math.log(k)).sum() for subset in _subsets(len(models), k)]
        )
        for k in sizes
    }


def _logit_losses(
    models: list[Any], rows: torch.Tensor, sizes: list[int], weights: tuple[float, ...] | None
) -> dict[int, torch.Tensor]:
    """Sum of -log softmax(mean_k logits_k)(target) for every subset."""
    pairs = [next_token(model, rows.to(model.device)) for model in models]
    targets = pairs[0][1]
    logits = [hidden.float() @ model.lm_head.weight.float().T for (hidden, _), model in zip(pairs, models, strict=True)]
    shares = weights or (1.0 / len(models),) * len(models)
    sums: dict[int, torch.Tensor] = {}
    for k in sizes:
        losses = []
        for subset in _subsets(len(models), k):
            mean = torch.zeros_like(logits[0])
            for member in subset:
                mean.add_(logits[member], alpha=shares[member] if weights is not None else 1.0 / k)
            losses.append(torch.nn.functional.cross_entropy(mean, targets, reduction="none").double().sum().cpu())
        sums[k] = torch.stack(losses)
    return sums


def _target_log_probs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return log p(target) of one member for (b, T) rows, (b * (T - 1),) float32 on the CPU."""
    hidden, targets = next_token(model, rows.to(model.device))
    return token_log_probs(hidden, model.lm_head.weight, targets).cpu()
