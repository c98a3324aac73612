"""Evaluate ensembles: the loss for every number of members, and accuracy on tasks.

logits: softmax of the mean of raw logits, the paper's rule (spec section 6). probs: the mean of the members'
distributions. parameters: one model with the mean of the members' parameters. One member is in memory at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epochal.data.store import Tokens, TokenStore, open_store
from epochal.data.tokenizer import auto_tokenizer, vocabulary_difference
from epochal.evaluation.losses import logit_losses, parameter_losses, probability_losses, target_log_probs
from epochal.evaluation.member_weights import learn
from epochal.evaluation.sharpness import sharpness
from epochal.evaluation.subsets import Curve, Subset, curve_of
from epochal.models.load import Loader, load_ensemble, load_model, member_records
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace
from epochal.run import SOUP, Ensemble, Run, fingerprint

# Called with a split, the tokens of one more member that are evaluated, and the tokens of all members.
Shown = Callable[[str, int, int], None]


def evaluate_ensemble(ensemble: Ensemble, workspace: Workspace, records: Records, shown: Shown | None = None) -> Record:
    """Return the record of an ensemble: its loss, and the losses of K subsets of each size k.

    Subsets are those of `cyclic_subsets`; `member_weights` of a subset are scaled to sum to one. Results, each also with
    the prefix `test_`: `loss`, `curve` (losses by k), `without` (leave-one-out means by k) and `interval` of `Curve`.
    `holdout` is `Learned` from text that all members held out, `tasks` the `Accuracy` on each task, `sharpness` that of each
    member. Raises ValueError if members differ in their data or sequence length, two are the same model, or the weights of
    one are missing.

    `shown` is called with a split, the tokens of it that one more member has begun, and those of all members.
    """
    members = [record for name in ensemble.runs for record in member_records(name, records)]
    run = _common_run(ensemble, members)
    refuse_equal_members(ensemble, members)
    store = _evaluation_store(ensemble, run, workspace)
    _check_vocabularies(members, store, workspace)
    # Loaders, not models: one member is in memory at a time.
    loaders = [partial(load_model, workspace, record.job.name) for record in members]
    scratch = workspace.folder(ensemble.name)
    scratch.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for split in _splits(store, run.sequence_length):
        sequences = store.sequences(split, run.sequence_length)
        curve = ensemble_losses(
            _watched(loaders, split, sequences.size, shown),
            sequences,
            average=ensemble.average,
            weights=ensemble.member_weights,
            scratch=scratch,
        )
        prefix = "" if split == "validation" else "test_"
        results[f"{prefix}loss"] = curve.losses[len(members)][0]
        results[f"{prefix}curve"] = {str(k): losses for k, losses in curve.losses.items()}
        results[f"{prefix}without"] = {str(k): losses for k, losses in curve.leave_one_out.items()}
        results[f"{prefix}interval"] = {str(k): list(bounds) for k, bounds in curve.intervals().items()}
    if _can_learn_weights(ensemble, members):
        # Not the validation split: weights learned there would make its loss too low.
        sequences = open_store(run.data, workspace).holdout(run)
        results["holdout"] = {"tokens": sequences.size, **asdict(learn(loaders, sequences, average=ensemble.average))}
    if ensemble.tasks:
        results["tasks"] = _task_accuracies(ensemble, members, workspace, store)
    if ensemble.sharpness:
        text = open_store(run.data, workspace)
        runs = [record.job for record in members if isinstance(record.job, Run)]
        results["sharpness"] = [
            sharpness(load(), text.training_stream(one)) for load, one in zip(loaders, runs, strict=True)
        ]
    parameters = sum(int(record.results["parameters"]) for record in members)
    return Record(
        job=ensemble,
        fingerprint=fingerprint(ensemble),
        status="done",
        results={**results, "members": len(members), "parameters": parameters},
        inputs={record.job.name: record.fingerprint for record in members},
        provenance=provenance(),
    )


def _watched(loaders: Sequence[Loader], split: str, tokens: int, shown: Shown | None) -> Sequence[Loader]:
    """Return loaders that report the members before them as evaluated; averaged logits may load each several times."""
    if shown is None:
        return loaders
    report = shown

    def watched(load: Loader, before: int) -> Loader:
        def load_and_report() -> Any:
            report(split, before, tokens * len(loaders))
            return load()

        return load_and_report

    return [watched(load, tokens * (k > 0)) for k, load in enumerate(loaders)]


def member_log_probs(names: Sequence[str], workspace: Workspace, sequences: Tokens) -> torch.Tensor:
    """Return log p(target) in nats of finished runs for (r, T) sequences, on the CPU.

    The result is (K, r * (T - 1)) float32. Row k is run `names[k]`; columns are the next tokens of each sequence in
    order. Raises ValueError if the weights of a run are missing.
    """
    return target_log_probs([partial(load_model, workspace, name) for name in names], sequences)


def _task_accuracies(
    ensemble: Ensemble, members: list[Record], workspace: Workspace, store: TokenStore
) -> dict[str, dict[str, Any]]:
    from epochal.evaluation.downstream import score

    model = load_ensemble(ensemble, members, workspace)
    tokenizer = auto_tokenizer(store.tokenizer_folder)
    accuracies = score(model, tokenizer, list(ensemble.tasks), store=store)
    return {task: asdict(accuracy) for task, accuracy in accuracies.items()}


def ensemble_losses(
    members: Sequence[Loader],
    sequences: Tokens,
    *,
    average: str,
    weights: Sequence[float] | None = None,
    scratch: Path | None = None,
) -> Curve:
    """Return the losses in nats of subsets of members over (r, T) sequences; `scratch` as in `logit_losses`."""
    # A mean of probabilities at the target needs nothing but each member's probability of the target.
    table = target_log_probs(members, sequences) if average == "probs" else None

    def losses_of(subsets: list[Subset]) -> dict[Subset, float]:
        rows = {subset: row for subset in subsets if (row := _share(subset, len(members), weights)) is not None}
        shares = torch.tensor(list(rows.values()), dtype=torch.float64)
        if table is not None:
            losses = probability_losses(table, shares)
        elif average == SOUP:
            losses = parameter_losses(members, sequences, shares)
        else:
            losses = logit_losses(members, sequences, shares, scratch=scratch)
        return dict(zip(rows, losses.tolist(), strict=True))

    return curve_of(len(members), losses_of)


def _share(subset: Subset, count: int, weights: Sequence[float] | None) -> list[float] | None:
    """Return each member's weight in a subset, summing to one; None if all of its members have weight 0."""
    raw = [(1.0 if weights is None else weights[member]) if member in subset else 0.0 for member in range(count)]
    total = math.fsum(raw)
    return [value / total for value in raw] if total > 0 else None


def _evaluation_store(ensemble: Ensemble, run: Run, workspace: Workspace) -> TokenStore:
    """Return the store with the held-out text: the members', or another one with the same tokenizer."""
    members_store = open_store(run.data, workspace)
    if ensemble.data is None:
        return members_store
    other = open_store(ensemble.data, workspace)
    if members_store.vocabulary != other.vocabulary:
        raise ValueError(
            f"ensemble {ensemble.name!r} cannot be evaluated on {ensemble.data!r}, which has another tokenizer than {run.data!r}; "
            f"prepare it with the tokenizer setting store = {run.data!r}."
        )
    return other


def _check_vocabularies(members: list[Record], store: TokenStore, workspace: Workspace) -> None:
    """Raise ValueError if the vocabulary of a member is not that of the store."""
    for member in members:
        folder = workspace.folder(member.job.name) / "model"
        if not (folder / "tokenizer.json").is_file():
            continue  # then the fingerprint of the data config is all there is
        difference = vocabulary_difference(folder, store.tokenizer_folder)
        if difference is not None:
            raise ValueError(f"{member.job.name!r} cannot be evaluated on {store.folder}: {difference}; run it again.")


def _splits(store: TokenStore, sequence_length: int) -> list[str]:
    # validation always, so that a missing one is an error; test only if it has at least one whole sequence
    return ["validation", *(["test"] if store.meta["tokens"]["test"] >= sequence_length else [])]


def refuse_equal_members(ensemble: Ensemble, members: list[Record]) -> None:
    """Raise ValueError if two members were trained to the same losses: they are one model, counted twice."""
    seen: dict[tuple[float, float], Record] = {}
    for record in members:
        if "train_loss" not in record.results:
            continue
        other = seen.setdefault((record.loss, record.results["train_loss"]), record)
        if other is not record:
            raise ValueError(
                f"ensemble {ensemble.name!r}: members {other.job.name!r} and {record.job.name!r} ended with equal losses "
                f"({record.loss:.6f}), so they are one model. Their seeds gave the same order of the data: use "
                'data_order "sequences", a budget of more documents, or other weights.'
            )


def _can_learn_weights(ensemble: Ensemble, members: list[Record]) -> bool:
    """True if the members share a held-out slice and no weights were given explicitly."""
    runs = [record.job for record in members if isinstance(record.job, Run)]
    # Members with other budgets may have trained on what one of them held out.
    slices = {(run.unique_tokens, run.holdout_tokens) for run in runs}
    shared = len(slices) == 1 and runs[0].holdout_tokens > 0
    return shared and len(runs) > 1 and ensemble.member_weights is None and ensemble.average != SOUP


def _common_run(ensemble: Ensemble, members: list[Record]) -> Run:
    """Return one member's run after checking that all use the same data and sequence length."""
    runs = [record.job for record in members if isinstance(record.job, Run)]
    views = {(run.data, run.sequence_length) for run in runs}
    if len(views) != 1:
        raise ValueError(
            f"ensemble {ensemble.name!r} mixes {len(views)} data sets or sequence lengths; all members must use the same."
        )
    return runs[0]
