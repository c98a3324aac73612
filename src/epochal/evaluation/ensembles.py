"""Several models as one: the loss of every K, averaged over members in logits or in probabilities.

logits: softmax of the mean of raw logits, the paper's rule (spec section 6). probs: the mean of the members'
distributions; there only p(target) of each member matters. weights: one model whose weights are the members' mean.
Members are in memory one at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epochal.data.store import Tokens, TokenStore, open_store
from epochal.evaluation.losses import logit_losses, probability_losses, soup_losses, target_log_probs
from epochal.evaluation.member_weights import learn
from epochal.evaluation.subsets import Curve, Subset, curve_of
from epochal.models.load import Loader, _load_ensemble, load_model, member_records
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace
from epochal.run import SOUP, Ensemble, Run, fingerprint


def evaluate_ensemble(ensemble: Ensemble, workspace: Workspace, records: Records) -> Record:
    """Return the record of an ensemble: its loss, and for every k <= K the losses of K subsets of k members.

    The subsets of size k are the K runs of k neighbours on the circle of members, so every member counts equally; with
    `weights`, those of a subset are scaled to sum to one. `interval` and `without` are those of `Curve`. `holdout` says
    what the text that all members held out teaches about their weights (`Learned`), without `weights` of its own;
    `tasks` how each task went (`Accuracy`). Raises ValueError when members differ in their data or sequence length, or
    lack weights.
    """
    members = [record for name in ensemble.runs for record in member_records(name, records)]
    run = _common_run(ensemble, members)
    store = _judged_on(ensemble, run, workspace)
    loaders = [partial(load_model, workspace, record.job.name) for record in members]
    scratch = workspace.folder(ensemble.name)
    scratch.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for split in _splits(store, run.sequence_length):
        sequences = store.sequences(split, run.sequence_length)
        curve = ensemble_losses(
            loaders, sequences, average=ensemble.average, weights=ensemble.member_weights, scratch=scratch
        )
        prefix = "" if split == "validation" else "test_"
        results[f"{prefix}loss"] = curve.losses[len(members)][0]
        results[f"{prefix}curve"] = {str(k): losses for k, losses in curve.losses.items()}
        results[f"{prefix}without"] = {str(k): losses for k, losses in curve.without.items()}
        results[f"{prefix}interval"] = {str(k): list(bounds) for k, bounds in curve.intervals().items()}
    if _may_learn(ensemble, members):
        sequences = open_store(run.data, workspace).holdout(run)
        results["holdout"] = {"tokens": sequences.size, **asdict(learn(loaders, sequences, average=ensemble.average))}
    if ensemble.tasks:
        results["tasks"] = _answers(ensemble, members, workspace, store)
    parameters = sum(int(record.results["parameters"]) for record in members)
    return Record(
        job=ensemble,
        fingerprint=fingerprint(ensemble),
        status="done",
        results={**results, "members": len(members), "parameters": parameters},
        inputs={record.job.name: record.fingerprint for record in members},
        provenance=provenance(),
    )


def member_log_probs(names: Sequence[str], workspace: Workspace, sequences: Tokens) -> torch.Tensor:
    """Return log p(target) in nats of finished runs for (r, T) sequences: (K, r * (T - 1)) float32 on the CPU.

    Row k is run `names[k]`; columns are the next tokens of each sequence in order. One model is in memory at a time.
    Raises ValueError when a run has no weights.
    """
    return target_log_probs([partial(load_model, workspace, name) for name in names], sequences)


def _answers(
    ensemble: Ensemble, members: list[Record], workspace: Workspace, store: TokenStore
) -> dict[str, dict[str, Any]]:
    """Return how the ensemble answers each of its tasks, as tables of `Accuracy`."""
    from transformers import AutoTokenizer

    from epochal.evaluation.downstream import score

    model, tokenizer = (
        _load_ensemble(ensemble, members, workspace),
        AutoTokenizer.from_pretrained(store.tokenizer_folder),
    )
    found = score(model, tokenizer, list(ensemble.tasks), store=store)
    return {task: asdict(accuracy) for task, accuracy in found.items()}


def ensemble_losses(
    members: Sequence[Loader],
    sequences: Tokens,
    *,
    average: str,
    weights: Sequence[float] | None = None,
    scratch: Path | None = None,
) -> Curve:
    """Return the losses in nats of subsets of members over (r, T) sequences; `scratch` as in `logit_losses`."""
    table = target_log_probs(members, sequences) if average == "probs" else None

    def losses_of(subsets: list[Subset]) -> dict[Subset, float]:
        rows = {subset: row for subset in subsets if (row := _share(subset, len(members), weights)) is not None}
        shares = torch.tensor(list(rows.values()), dtype=torch.float64)
        if table is not None:
            losses = probability_losses(table, shares)
        elif average == SOUP:
            losses = soup_losses(members, sequences, shares)
        else:
            losses = logit_losses(members, sequences, shares, scratch=scratch)
        return dict(zip(rows, losses.tolist(), strict=True))

    return curve_of(len(members), losses_of)


def _share(subset: Subset, count: int, weights: Sequence[float] | None) -> list[float] | None:
    """Return each member's weight in a subset, summing to one; None where all its members weigh nothing."""
    given = [(1.0 if weights is None else weights[member]) if member in subset else 0.0 for member in range(count)]
    total = math.fsum(given)
    return [value / total for value in given] if total > 0 else None


def _judged_on(ensemble: Ensemble, run: Run, workspace: Workspace) -> TokenStore:
    """Return the store that an ensemble is judged on: its members', or another one of the same tokenizer."""
    own = open_store(run.data, workspace)
    if ensemble.data is None:
        return own
    other = open_store(ensemble.data, workspace)
    tokenizers = {(store.tokenizer_folder / "tokenizer.json").read_bytes() for store in (own, other)}
    if len(tokenizers) != 1:
        raise ValueError(
            f"ensemble {ensemble.name!r} cannot be judged on {ensemble.data!r}: its tokenizer is not that of {run.data!r}; "
            f"give that data set the tokenizer store = {run.data!r}."
        )
    return other


def _splits(store: TokenStore, sequence_length: int) -> list[str]:
    """The held-out splits that hold a whole sequence; validation always, so that its absence is an error."""
    return ["validation", *(["test"] if store.meta["tokens"]["test"] >= sequence_length else [])]


def _may_learn(ensemble: Ensemble, members: list[Record]) -> bool:
    """Whether there is text that all members held out, and weights that nobody gave."""
    runs = [record.job for record in members if isinstance(record.job, Run)]
    slices = {(run.unique_tokens, run.holdout_tokens) for run in runs}
    held = len(slices) == 1 and runs[0].holdout_tokens > 0
    return held and len(runs) > 1 and ensemble.member_weights is None and ensemble.average != SOUP


def _common_run(ensemble: Ensemble, members: list[Record]) -> Run:
    """Return one member after checking that all read the same tokens."""
    runs = [record.job for record in members if isinstance(record.job, Run)]
    views = {(run.data, run.sequence_length) for run in runs}
    if len(views) != 1:
        raise ValueError(
            f"ensemble {ensemble.name!r} mixes members of {len(views)} data sets or sequence lengths; use members of one."
        )
    return runs[0]
