"""Loss of a student against its teacher: models run on every micro-batch, or soft targets computed once.

n tokens, d width, V vocabulary, K models of the teacher.
"""

import math
from typing import Any

import numpy as np
import torch

from epochal.data.soft_targets import TargetStore
from epochal.data.store import Batches, TokenStore
from epochal.data.tokenizer import vocabulary_difference
from epochal.loss import cached_distillation_loss, distillation_loss
from epochal.models.layers import use_causal_attention
from epochal.models.llama import next_token
from epochal.models.load import load_model, member_records
from epochal.optim.roles import head_weight
from epochal.records import Records, Workspace
from epochal.run import Job, Run, SoftTargetDistillation, Targets, averaging


class OnlineTeacher:
    """The models of a Run or an Ensemble, run on every micro-batch of the student.

    Memory on every rank: the weights of K models and their hidden states (n, d_k) for one micro-batch.
    """

    def __init__(
        self, teach: SoftTargetDistillation, models: list[Any], *, average: str, shares: tuple[float, ...] | None
    ) -> None:
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
        """Return the summed loss over `normaliser`: hidden (n, d), head (V, d), targets (n,), tokens (b, T)."""
        with torch.no_grad():
            pairs = [(next_token(model, tokens)[0], head_weight(model)) for model in self.models]
        return distillation_loss(
            hidden,
            head,
            targets,
            pairs,
            average=self.average,
            weight=self.teach.kd_weight,
            temperature=self.teach.temperature,
            teacher_weights=self.shares,
            normaliser=normaliser,
        )


class CachedTeacher:
    """Soft targets of a Targets job, looked up by the sequences of a batch."""

    def __init__(self, run: Run, job: Job, batches: Batches, store: TokenStore, workspace: Workspace) -> None:
        assert run.teach is not None
        if not isinstance(job, Targets):
            raise ValueError(
                f'Run {run.name!r} has teacher {job.name!r} with mode "cached", which must be a Targets job; name one or '
                'use mode "online".'
            )
        self.teach, self.stream = run.teach, batches.real
        self.targets = TargetStore.open(workspace.folder(job.name) / "targets")
        self._check(run, job, store)

    def _check(self, run: Run, job: Targets, store: TokenStore) -> None:
        assert run.teach is not None
        trained = run.unique_tokens - run.holdout_tokens
        for field, student_value, target_value in (
            ("sequence_length", run.sequence_length, job.sequence_length),
            ("vocabulary size", store.vocab_size, self.targets.meta["vocab_size"]),
            ("vocabulary", store.vocabulary, self.targets.meta.get("vocabulary")),
            # Not only the length of the text: targets belong to its tokens one by one.
            ("training tokens", store.meta["files"]["train.bin"], self.targets.meta.get("training_tokens")),
        ):
            if student_value != target_value:
                raise ValueError(
                    f"Run {run.name!r} has {field} {student_value}, its targets {job.name!r} have {target_value}; "
                    "they must be equal: compute the targets from this data set."
                )
        if job.unique_tokens < trained:
            raise ValueError(
                f"Run {run.name!r} trains on {trained} tokens, its targets {job.name!r} cover {job.unique_tokens}; "
                "compute more targets."
            )

    def loss(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        tokens: torch.Tensor,
        rows: range,
        normaliser: float,
    ) -> torch.Tensor:
        """See `OnlineTeacher.loss`; `rows` are the rows of `tokens` in the run's stream."""
        ids, weights, missing = zip(*(self.targets.sequence(self.stream.place(row)) for row in rows), strict=True)
        loss = cached_distillation_loss(
            hidden,
            head,
            targets,
            torch.from_numpy(np.concatenate(ids)).to(hidden.device),
            torch.from_numpy(np.concatenate(weights)).to(hidden.device),
            weight=self.teach.kd_weight,
            normaliser=normaliser,
        )
        # KL needs sum p log p of the whole distribution; the cache has what the kept tokens lack of it.
        return loss + self.teach.kd_weight * math.fsum(missing) / normaliser


Teacher = OnlineTeacher | CachedTeacher


def load_teacher(
    run: Run, batches: Batches, store: TokenStore, workspace: Workspace, records: Records
) -> Teacher | None:
    """Return the teacher of a Run, on this rank's device; None without one.

    Raises ValueError if the source has no weights or another tokenizer, or its targets belong to another text.
    """
    teach = run.teach
    if teach is None:
        return None
    record = records.named(teach.source)
    assert record is not None  # checked by `input_fingerprints`
    if teach.mode == "cached":
        return CachedTeacher(run, record.job, batches, store, workspace)
    members = member_records(teach.source, records)
    for member in members:
        check_tokenizer(run.name, member.job.name, store, workspace)
    models = [load_model(workspace, member.job.name).requires_grad_(False) for member in members]
    for model in models:
        use_causal_attention(model)
    average, shares = averaging(record.job)
    return OnlineTeacher(teach, models, average=average, shares=shares)


def check_tokenizer(student: str, teacher: str, store: TokenStore, workspace: Workspace) -> None:
    """Raise ValueError if a token has another id in the two; the data sets may differ."""
    difference = vocabulary_difference(workspace.folder(teacher) / "model", store.tokenizer_folder)
    if difference is not None:
        raise ValueError(
            f"{student!r} cannot learn from {teacher!r}: {difference}; use a teacher with the same tokenizer."
        )
