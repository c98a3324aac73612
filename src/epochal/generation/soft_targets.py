"""Compute soft targets: k weighted tokens of a teacher's distribution at each position.

Members are averaged here, so the cost of a student's step does not depend on K. The k tokens are a VarOpt sample (Cohen
et al., arXiv 0803.0473): tokens with a probability above a threshold are kept as they are; each of the others is kept
with a chance proportional to its probability, with the threshold as weight.

n tokens, V vocabulary, T sequence length, k kept tokens.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epochal.config import write_atomic
from epochal.data.soft_targets import Sequence, shard_is_complete, write_shard
from epochal.data.store import Tokens, TokenStore, open_store
from epochal.meaning import take_folder
from epochal.models.llama import next_token
from epochal.models.load import load_model, member_records
from epochal.optim.roles import head_weight
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace, input_fingerprints
from epochal.run import Run, Targets, averaging, fingerprint
from epochal.stopping import check_stop

log = logging.getLogger(__name__)

# Approximate positions in a shard; an interrupted job recomputes at most one shard.
SHARD_POSITIONS = 2**20

# Elements of the (n, V) buffer of the mixture.
CHUNK_ELEMENTS = 2**24


def compute_targets(job: Targets, workspace: Workspace, records: Records) -> Record:
    """Write the targets of a Run or an Ensemble over its training text; resumes an interrupted job.

    Raises ValueError if the text is shorter than the job or the targets do not fit on the disk.
    """
    members, marks = member_records(job.source, records), input_fingerprints(job, records)
    run, source = members[0].job, records.named(job.source)
    assert isinstance(run, Run) and source is not None
    store = open_store(run.data, workspace)
    sequences = training_sequences(job, store)
    folder = workspace.folder(job.name) / "targets"
    # After this, shards of an interrupted job are of this job and these inputs.
    take_folder(job, workspace, records)
    temporary = folder.with_name(".targets.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    _check_room(job, store.vocab_size, temporary)
    # All members in memory: each batch of text needs all of them.
    models = [load_model(workspace, member.job.name) for member in members]
    average, shares = averaging(source.job)
    per_shard = max(1, SHARD_POSITIONS // job.sequence_length)
    kept = []
    for number, start in enumerate(range(0, len(sequences), per_shard)):
        rows = sequences[start : start + per_shard]
        index = temporary / f"shard-{number:05d}.json"
        # Resume: shards of an interrupted job are kept.
        if not shard_is_complete(index):
            drawn = _draw(job, models, rows, average, shares, first=start)
            write_shard(index, drawn, store.vocab_size)
        kept.append(json.loads(index.read_text(encoding="utf-8"))["kept_mass"])
    meta: dict[str, Any] = {
        "vocab_size": store.vocab_size,
        "keep": min(job.keep, store.vocab_size),
        "sequences_per_shard": per_shard,
    }
    meta |= {"vocabulary": store.vocabulary, "training_tokens": store.meta["files"]["train.bin"]}
    meta["shards"] = len(kept)
    write_atomic(temporary / "meta.json", json.dumps({**meta, "sequence_length": job.sequence_length}))
    size = sum(file.stat().st_size for file in temporary.iterdir())
    # All shards are complete: now they replace what an older job left.
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return Record(
        job=job,
        fingerprint=fingerprint(job),
        status="done",
        results={
            "positions": len(sequences) * (job.sequence_length - 1),
            "kept_mass": math.fsum(mass for masses in kept for mass in masses) / len(sequences),
            "bytes": size,
            "members": len(members),
        },
        inputs=marks,
        provenance=provenance(),
    )


def training_sequences(job: Targets, store: TokenStore) -> Tokens:
    """Return the text of the targets, (count, T) int64: training tokens in the order of the store."""
    available = int(store.meta["tokens"]["train"])
    if job.unique_tokens > available:
        raise ValueError(f"unique_tokens must be at most {available}, the training tokens, got {job.unique_tokens}.")
    count = job.unique_tokens // job.sequence_length
    tokens = store.tokens("train")[: count * job.sequence_length]
    return tokens.reshape(count, job.sequence_length).astype(np.int64)


def _check_room(job: Targets, vocab_size: int, folder: Path) -> None:
    """Log the largest possible size and raise ValueError if it does not fit; finished shards are subtracted."""
    need = job.bytes(vocab_size) - sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    log.warning("%s needs up to %.1f MB of disk, %.1f MB are free.", job.name, need / 1e6, free / 1e6)
    if need > free:
        raise ValueError(
            f"targets {job.name!r} need up to {need / 1e6:.1f} MB at keep {job.keep}, and {free / 1e6:.1f} MB are "
            f"free in {folder.parent}; make room or keep fewer tokens."
        )


# --- targets of one sequence ------------------------------------------------------------------------------------------


def _draw(
    job: Targets, models: list[Any], rows: Tokens, average: str, shares: tuple[float, ...] | None, *, first: int
) -> Iterator[Sequence]:
    """Yield the targets of each sequence of (r, T) tokens; `first` is the number of the first one in the text."""
    vocabulary = models[0].config.vocab_size
    per_pass = max(1, CHUNK_ELEMENTS // vocabulary // job.sequence_length)
    for chunk in torch.split(torch.from_numpy(rows), per_pass):
        check_stop()
        p = averaged_probabilities(models, chunk, average=average, shares=shares)
        for one in torch.split(p, rows.shape[1] - 1):
            generator = torch.Generator().manual_seed(first)  # per sequence, so that shards can be recomputed alone
            yield _sample(one.cpu().double(), min(job.keep, vocabulary), generator)
            first += 1


def _sample(p: torch.Tensor, keep: int, generator: torch.Generator) -> Sequence:
    """Draw `keep` tokens of each row of p (T - 1, V), float64."""
    p = p.clamp(min=1e-30)  # softmax may round to 0, and then fewer than `keep` tokens could be drawn
    p = p / p.sum(1, keepdim=True)
    # Sampled, not cut at the top k: the loss is then unbiased. For small models on little text the top 64
    # tokens hold only two thirds of the mass. (Sampled targets beat top-k ones: arXiv 2503.16870.)
    ids, weights = varopt(p, keep, generator)
    exact = torch.where(p.gather(1, ids) == weights, weights, 0.0)
    kept_mass, negentropy = float(exact.sum(1).mean()), float(torch.xlogy(p, p).sum())
    return Sequence(ids.numpy(), weights.numpy(), negentropy, kept_mass)


def varopt(p: torch.Tensor, keep: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a VarOpt sample of each row of p (n, V), float64 summing to one: ids (n, keep) ascending, weights (n, keep).

    A token v is kept with chance min(1, p_v / threshold) and weight max(p_v, threshold), so its expected weight is p_v.
    The threshold is such that the chances sum to `keep`. Systematic sampling: one random number per row.
    """
    highest, order = torch.topk(p, keep, dim=1)
    # The mass outside of the top `keep` tokens.
    lower = p.scatter(1, order, 0.0).sum(1, keepdim=True)
    # If the j most probable tokens are exact, the other keep - j share the remaining mass: that is their threshold.
    remaining = lower + highest.flip(1).cumsum(1).flip(1)
    thresholds = remaining / torch.arange(keep, 0, -1, dtype=p.dtype)
    exact = (highest > thresholds).long().cumprod(1).sum(1, keepdim=True).clamp(max=keep - 1)
    threshold = thresholds.gather(1, exact)
    ends = torch.cumsum((p / threshold).clamp(max=1.0), 1)
    ends = torch.round(ends * (keep / ends[:, -1:]) * 2**32)  # integers, so that a chance of 1 is exact
    offset = torch.randint(2**32, (len(p), 1), generator=generator).double()
    counts = torch.floor((ends + offset) / 2**32)
    drawn = torch.diff(counts, dim=1, prepend=torch.zeros_like(counts[:, :1])) > 0
    ids = drawn.nonzero()[:, 1].reshape(len(p), keep)
    return ids, torch.maximum(p.gather(1, ids), threshold)


@torch.no_grad()
def averaged_probabilities(
    models: list[Any], tokens: torch.Tensor, *, average: str, shares: tuple[float, ...] | None
) -> torch.Tensor:
    """Return the teacher's distribution at each prediction of (b, T) tokens, (n, V) float32.

    n = b (T - 1).
    """
    shares = shares or (1.0 / len(models),) * len(models)
    total: torch.Tensor | None = None
    for share, model in zip(shares, models, strict=True):
        hidden, _ = next_token(model, tokens.to(model.device))
        part = (hidden @ head_weight(model).T).float()
        part = torch.softmax(part, 1) if average == "probs" else part
        total = part.mul_(share) if total is None else total.add_(part, alpha=share)
    assert total is not None
    return total if average == "probs" else torch.softmax(total, 1)
