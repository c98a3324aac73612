"""Open finished models: a run, an ensemble as one model, or a folder exported from either."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from epochal.models.ensemble import EnsembleForCausalLM
from epochal.records import Record, Records, Workspace
from epochal.run import SOUP, Ensemble, Run, Samples, Targets


def member_records(source: str, records: Records) -> list[Record]:
    """Return the records of a run, or of the members of an ensemble; raises ValueError when one is missing."""
    record = records.named(source)
    if record is None:
        raise ValueError(f"{source!r} has no record; run it first.")
    match record.job:
        case Run():
            return [record]
        case Ensemble():
            return [found for name in record.job.runs for found in member_records(name, records)]
        case Samples() | Targets():
            raise ValueError(f"{source!r} is {type(record.job).__name__}, not a model; name a run or an ensemble.")


def load_model(workspace: Workspace, name: str) -> Any:
    """Load the finished model of a run in evaluation mode; raises ValueError when its folder is missing."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = workspace.folder(name) / "model"
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; run {name!r} again to make its weights.")
    model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device)


def load_source(name: str, workspace: Workspace, records: Records) -> Any:
    """Load the finished run or ensemble `name` as one transformers model, on the device that this machine has.

    Raises ValueError when it has no record, or a member no weights.
    """
    members = member_records(name, records)
    record = records.named(name)
    if record is None or not isinstance(record.job, Ensemble):
        return load_model(workspace, name)
    return _load_ensemble(record.job, members, workspace)


def _load_ensemble(ensemble: Ensemble, members: list[Record], workspace: Workspace) -> Any:
    """Load the members' models as one; raises ValueError when one has no weights."""
    if ensemble.average == SOUP:
        shares = ensemble.member_weights or (1.0 / len(members),) * len(members)
        return soup([partial(load_model, workspace, member.job.name) for member in members], shares)
    paths = [workspace.folder(member.job.name) / "model" for member in members]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} does not exist; run {path.parent.name!r} again to make its weights.")
    model = EnsembleForCausalLM.from_members(paths, average=ensemble.average, weights=ensemble.member_weights)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


Loader = Callable[[], Any]
"""Loads one member, ready to evaluate; called when it is its turn, and let go before the next."""


@torch.no_grad()
def soup(members: Sequence[Loader], shares: Sequence[float]) -> Any:
    """Return one model whose weights are sum_k w_k W_k; raises ValueError when members differ in shape."""
    mixed = None
    for share, load in zip(shares, members, strict=True):
        if share:
            mixed = _stir(mixed, load(), share)
    return mixed


def _stir(soup: Any, model: Any, share: float) -> Any:
    """Add a share of a model's weights to a soup, which is a scaled copy of the model at first."""
    if soup is None:
        soup = copy.deepcopy(model)
        for weight in soup.parameters():
            weight.mul_(share)
        return soup
    shapes = [[tuple(weight.shape) for weight in other.parameters()] for other in (soup, model)]
    if shapes[0] != shapes[1]:
        raise ValueError("members of different shapes have no mean weights; average logits or probs instead.")
    for total, weight in zip(soup.parameters(), model.parameters(), strict=True):
        total.add_(weight, alpha=share)
    return soup


RECORD = "epochal_record.json"
"""The record's name in an exported folder."""
