"""Soft targets for a student: from models that read every batch beside it, or from a cache computed once.

n tokens, d width, V vocabulary, K models of the teacher.
"""

from typing import Any, Protocol

import torch

from epochal.data import Batches, TokenStore
from epochal.generate import load_model, member_records
from epochal.loss import distillation_loss
from epochal.model import next_token
from epochal.records import Records, Workspace, file_hash
from epochal.run import SOUP, Ensemble, Job, Run, Teach


class Teacher(Protocol):
    """What gives the loss of a student in place of plain cross-entropy."""

    def loss(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        tokens: torch.Tensor,
        rows: range,
        normaliser: float,
    ) -> torch.Tensor:
        """Return the summed loss over `normaliser`: hidden (n, d), head (V, d), targets (n,), tokens (b, T) in `rows`."""


class OnlineTeacher:
    """The models of a Run or an Ensemble, which read every micro-batch just before the student learns from it.

    Memory on every process: the weights of K models, and their hidden states (n, d_k) of one micro-batch; logits are
    never whole and do not depend on K (`epochal.loss`).
    """

    def __init__(self, teach: Teach, models: list[Any], *, average: str, shares: tuple[float, ...] | None) -> None:
        self.teach, self.models, self.average, self.shares = teach, models, average, shares

    def loss(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        tokens: torch.Tensor,
        rows: range,
        normaliser: float,
    ) -> torch.Tensor:
        """See `Teacher`."""
        with torch.no_grad():
            pairs = [(next_token(model, tokens)[0], model.lm_head.weight) for model in self.models]
        return distillation_loss(
            hidden,
            head,
            targets,
            pairs,
            average=self.average,
            weight=self.teach.weight,
            temperature=self.teach.temperature,
            teacher_weights=self.shares,
            normaliser=normaliser,
        )


def load_teacher(
    run: Run, batches: Batches, store: TokenStore, workspace: Workspace, records: Records
) -> Teacher | None:
    """Return the teacher of a Run on this process's device, or None where it has none.

    Raises ValueError for a source that cannot teach: no weights, another tokenizer, targets of another text.
    """
    teach = run.teach
    if teach is None:
        return None
    record = records.named(teach.source)
    assert record is not None  # `input_marks` has looked
    if teach.mode == "cached":
        from epochal.targets import CachedTeacher

        return CachedTeacher(run, record.job, batches, store, workspace)
    members = member_records(teach.source, records)
    for member in members:
        check_tokenizer(run.name, member.job.name, store, workspace)
    models = [load_model(workspace, member.job.name).requires_grad_(False) for member in members]
    average, shares = averaging(record.job)
    return OnlineTeacher(teach, models, average=average, shares=shares)


def averaging(job: Job) -> tuple[str, tuple[float, ...] | None]:
    """Return how a Run or an Ensemble averages the models that it stands for, and their weights (None: equal).

    Raises ValueError for an average of weights: that is one model, which is nowhere saved.
    """
    if not isinstance(job, Ensemble):
        return "logits", None
    if job.average == SOUP:
        raise ValueError(f"{job.name!r} averages weights; teach with an ensemble of logits or probs, or with a member.")
    return job.average, job.weights


def check_tokenizer(student: str, teacher: str, store: TokenStore, workspace: Workspace) -> None:
    """Refuse a teacher whose tokens mean something else; another data set with the same tokenizer is welcome."""
    theirs = workspace.folder(teacher) / "model" / "tokenizer.json"
    if not theirs.is_file() or file_hash(theirs) != file_hash(store.tokenizer_folder / "tokenizer.json"):
        raise ValueError(
            f"{student!r} cannot learn from {teacher!r}: {theirs} is not the tokenizer of {store.folder}; "
            "use a teacher with the same tokenizer."
        )
