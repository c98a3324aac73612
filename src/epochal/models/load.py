"""Load finished runs and ensembles as models."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from epochal.models.ensemble import EnsembleForCausalLM
from epochal.models.files import architecture_difference, check_folder, open_model
from epochal.records import Record, Records, Workspace
from epochal.run import SOUP, Ensemble, Run, Samples, Targets


def member_records(source: str, records: Records) -> list[Record]:
    """Return the record of a run, or those of all members of an ensemble.

    Raises ValueError if one is missing or `source` is not a model.
    """
    record = records.named(source)
    if record is None:
        raise ValueError(f"{source!r} has no record; run it first.")
    match record.job:
        case Run() as run:
            # Read as a softmax, its logits would give other probabilities than it was trained and judged with.
            if type(run.regularizer).__name__ == "StableMax":
                raise ValueError(
                    f"{source!r} was trained with StableMax, and ensembles, teachers and samples read a softmax; name another run."
                )
            return [record]
        case Ensemble():
            return [member for name in record.job.runs for member in member_records(name, records)]
        case Samples() | Targets():
            raise ValueError(f"{source!r} is {type(record.job).__name__}, not a model; name a run or an ensemble.")


def load_model(workspace: Workspace, name: str) -> Any:
    """Load the model of a finished run in evaluation mode; raises ValueError if its weights are missing."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = workspace.folder(name) / "model"
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; run {name!r} again to make its weights.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_model(folder).to(device)


def load_source(name: str, workspace: Workspace, records: Records) -> Any:
    """Load the finished run or ensemble `name` as one transformers model.

    It is on the GPU if there is one. Raises ValueError if it has no record or the weights of a member are missing.
    """
    members = member_records(name, records)
    record = records.named(name)
    if record is None or not isinstance(record.job, Ensemble):
        return load_model(workspace, name)
    return load_ensemble(record.job, members, workspace)


def load_ensemble(ensemble: Ensemble, members: list[Record], workspace: Workspace) -> Any:
    """Load members as one model, given their records; raises ValueError if the weights of one are missing."""
    if ensemble.average == SOUP:
        shares = ensemble.member_weights or (1.0 / len(members),) * len(members)
        return average_parameters([partial(load_model, workspace, member.job.name) for member in members], shares)
    paths = [workspace.folder(member.job.name) / "model" for member in members]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} does not exist; run {path.parent.name!r} again to make its weights.")
        check_folder(path)
    model = EnsembleForCausalLM.from_members(paths, average=ensemble.average, weights=ensemble.member_weights)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# Loads one member in evaluation mode; callers drop the member before they load the next.
Loader = Callable[[], Any]


@torch.no_grad()
def average_parameters(members: Sequence[Loader], shares: Sequence[float]) -> Any:
    """Return one model with parameters sum_k w_k W_k; raises ValueError if members differ in shape."""
    mean = None
    for share, load in zip(shares, members, strict=True):
        if not share:
            continue
        model = load()
        if mean is None:
            mean = copy.deepcopy(model)  # a loader may return a shared model, which must not change
            for total in mean.parameters():
                total.mul_(share)
            continue
        if [weight.shape for weight in mean.parameters()] != [weight.shape for weight in model.parameters()]:
            raise ValueError("parameters of members of different shapes cannot be averaged; average logits or probs.")
        difference = architecture_difference(mean.config.to_dict(), model.config.to_dict())
        if difference is not None:
            raise ValueError(f"parameters of members with other settings cannot be averaged: {difference}.")
        for total, weight in zip(mean.parameters(), model.parameters(), strict=True):
            total.add_(weight, alpha=share)
        del model  # before the next one is loaded
    return mean


# File name of the record in an exported folder.
RECORD = "epochal_record.json"
