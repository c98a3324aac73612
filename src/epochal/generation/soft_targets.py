"""A cache of soft targets: k weighted tokens of a teacher's distribution at every position of the training text.

Members are averaged first, so the cost of a student's step does not depend on K. The k tokens are a VarOpt sample (Cohen
et al., arXiv 0803.0473): every token with a probability above a threshold is kept as it is, of the others each is kept
with a chance in proportion to its probability and then weighs as much as the threshold. The weights sum to one and the
loss against them is right in expectation, which a cut at the top k is not: of small models on small text the top 64
tokens hold two thirds of the mass, and what a cut loses is a bias. (That sampled targets beat cut ones: arXiv 2503.16870.)

targets/ holds shards of sequences and beside each an index: `shard-00000.bin` is one zlib block for each sequence,
`shard-00000.json` their sizes and the hash of the file. A block holds what the KL divergence lacks (see `encode`), then
T - 1 positions of k ids in rising order, as differences, then their weights in float16; bytes of one significance lie
together, because so they compress.

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
from epochal.models.llama import next_token
from epochal.models.load import load_model, member_records
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace, input_fingerprints
from epochal.run import Run, Targets, averaging, fingerprint
from epochal.stopping import check_stop

log = logging.getLogger(__name__)

SHARD_POSITIONS = 2**20
"""Positions in a shard, about: a stop or a crash loses at most one."""

CHUNK_ELEMENTS = 2**24
"""Elements of the (n, V) buffer of the mixture."""


def compute_targets(job: Targets, workspace: Workspace, records: Records) -> Record:
    """Write the targets of a Run or an Ensemble over its training text; goes on where it was stopped.

    Raises ValueError when the text is shorter than the job or the disk has no room for it.
    """
    members, marks = member_records(job.source, records), input_fingerprints(job, records)
    run, source = members[0].job, records.named(job.source)
    assert isinstance(run, Run) and source is not None
    store = open_store(run.data, workspace)
    sequences = training_sequences(job, store)
    folder = workspace.folder(job.name) / "targets"
    beside = _prepare(folder, {"job": fingerprint(job), "inputs": marks})
    _check_room(job, store.vocab_size, beside)
    models = [load_model(workspace, member.job.name) for member in members]
    average, shares = averaging(source.job)
    per_shard = max(1, SHARD_POSITIONS // job.sequence_length)
    kept = []
    for number, start in enumerate(range(0, len(sequences), per_shard)):
        rows = sequences[start : start + per_shard]
        index = beside / f"shard-{number:05d}.json"
        if not shard_is_complete(index):
            drawn = _draw(job, models, rows, average, shares, first=start)
            write_shard(index, drawn, store.vocab_size)
        kept.append(json.loads(index.read_text(encoding="utf-8"))["kept_mass"])
    meta = {"vocab_size": store.vocab_size, "keep": min(job.keep, store.vocab_size), "sequences_per_shard": per_shard}
    write_atomic(beside / "meta.json", json.dumps({**meta, "sequence_length": job.sequence_length}))
    size = sum(file.stat().st_size for file in beside.iterdir())
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
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
    """Return the text of the targets, (count, T) int64: the training tokens in the order of the store."""
    available = int(store.meta["tokens"]["train"])
    if job.unique_tokens > available:
        raise ValueError(f"unique_tokens {job.unique_tokens} is above the {available} training tokens; use fewer.")
    count = job.unique_tokens // job.sequence_length
    tokens = store.tokens("train")[: count * job.sequence_length]
    return tokens.reshape(count, job.sequence_length).astype(np.int64)


def _prepare(folder: Path, meaning: dict[str, Any]) -> Path:
    """Return the folder to fill: what an interrupted start of the same meaning left, or an empty one."""
    beside = folder.with_name(".targets.tmp")
    mark = beside / "meaning.json"
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != meaning:
        shutil.rmtree(beside, ignore_errors=True)
        write_atomic(mark, json.dumps(meaning))
    return beside


def _check_room(job: Targets, vocab_size: int, folder: Path) -> None:
    """Say what the cache needs at most, and refuse what does not fit; shards that are there already count."""
    need = job.bytes(vocab_size) - sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    log.warning("%s needs up to %.1f MB of disk, %.1f MB are free.", job.name, need / 1e6, free / 1e6)
    if need > free:
        raise ValueError(
            f"targets {job.name!r} need up to {need / 1e6:.1f} MB at keep {job.keep}, and {free / 1e6:.1f} MB are "
            f"free in {folder.parent}; make room or keep fewer tokens."
        )


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
            generator = torch.Generator().manual_seed(first)
            yield _sample(one.cpu().double(), min(job.keep, vocabulary), generator)
            first += 1


def _sample(p: torch.Tensor, keep: int, generator: torch.Generator) -> Sequence:
    """Draw `keep` tokens of each row of p (T - 1, V), float64."""
    p = p.clamp(min=1e-30)  # a probability that softmax rounds to zero has no chance to fill the sample
    p = p / p.sum(1, keepdim=True)
    ids, weights = varopt(p, keep, generator)
    exact = torch.where(p.gather(1, ids) == weights, weights, 0.0)
    kept_mass, negentropy = float(exact.sum(1).mean()), float(torch.xlogy(p, p).sum())
    return Sequence(ids.numpy(), weights.numpy(), negentropy, kept_mass)


def varopt(p: torch.Tensor, keep: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a VarOpt sample of each row of p (n, V), float64 summing to one: ids (n, keep) rising, weights (n, keep).

    A token v is in it with chance min(1, p_v / threshold) and weighs max(p_v, threshold), so its mean weight is p_v. The
    threshold makes the chances sum to `keep`; tokens are drawn by systematic sampling, one number for each row.
    """
    highest, order = torch.topk(p, keep, dim=1)
    lower = p.scatter(1, order, 0.0).sum(1, keepdim=True)
    left = lower + highest.flip(1).cumsum(1).flip(1)  # the mass that the tokens before each do not hold
    thresholds = left / torch.arange(keep, 0, -1, dtype=p.dtype)
    exact = (highest > thresholds).long().cumprod(1).sum(1, keepdim=True).clamp(max=keep - 1)
    threshold = thresholds.gather(1, exact)
    ends = torch.cumsum((p / threshold).clamp(max=1.0), 1)
    ends = torch.round(ends * (keep / ends[:, -1:]) * 2**32)  # whole numbers, so that a chance of one is certain
    offset = torch.randint(2**32, (len(p), 1), generator=generator).double()
    counts = torch.floor((ends + offset) / 2**32)
    drawn = torch.diff(counts, dim=1, prepend=torch.zeros_like(counts[:, :1])) > 0
    ids = drawn.nonzero()[:, 1].reshape(len(p), keep)
    return ids, torch.maximum(p.gather(1, ids), threshold)


@torch.no_grad()
def averaged_probabilities(
    models: list[Any], tokens: torch.Tensor, *, average: str, shares: tuple[float, ...] | None
) -> torch.Tensor:
    """Return the teacher's distribution at each of the n = b (T - 1) predictions of (b, T) tokens: (n, V) float32."""
    shares = shares or (1.0 / len(models),) * len(models)
    total: torch.Tensor | None = None
    for share, model in zip(shares, models, strict=True):
        hidden, _ = next_token(model, tokens.to(model.device))
        part = (hidden @ model.lm_head.weight.T).float()
        part = torch.softmax(part, 1) if average == "probs" else part
        total = part.mul_(share) if total is None else total.add_(part, alpha=share)
    assert total is not None
    return total if average == "probs" else torch.softmax(total, 1)


# --- the files ----------------------------------------------------------------------------------------------------------
