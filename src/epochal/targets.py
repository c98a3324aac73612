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
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epochal.config import write_atomic
from epochal.data import Batches, Tokens, TokenStore, open_store
from epochal.generate import load_model, member_records
from epochal.loss import cached_distillation_loss
from epochal.model import next_token
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace, file_hash, input_marks
from epochal.run import Job, Run, Targets, fingerprint
from epochal.stopping import check_stop
from epochal.teacher import averaging

log = logging.getLogger(__name__)

SHARD_POSITIONS = 2**20
"""Positions in a shard, about: a stop or a crash loses at most one."""

CHUNK_ELEMENTS = 2**24
"""Elements of the (n, V) buffer of the mixture."""


def compute_targets(job: Targets, workspace: Workspace, records: Records) -> Record:
    """Write the targets of a Run or an Ensemble over its training text; goes on where it was stopped.

    Raises ValueError when the text is shorter than the job or the disk has no room for it.
    """
    members, marks = member_records(job.source, records), input_marks(job, records)
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
        if not _finished(index):
            drawn = _draw(job, models, rows, average, shares, first=start)
            _write_shard(index, drawn, store.vocab_size)
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


def _finished(index: Path) -> bool:
    if not index.is_file():
        return False
    return bool(file_hash(index.with_suffix(".bin")) == json.loads(index.read_text(encoding="utf-8"))["sha256"])


@dataclass(frozen=True)
class Sequence:
    """The targets of one sequence: ids (T - 1, k) rising, weights (T - 1, k), sum of p log p over all positions."""

    ids: Tokens
    weights: Tokens
    negentropy: float
    kept_mass: float


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


def _write_shard(index: Path, sequences: Iterator[Sequence], vocab_size: int) -> None:
    """Write one shard, and its index last: a shard without an index does not exist."""
    blocks, masses = [], []
    for sequence in sequences:
        blocks.append(encode(sequence, vocab_size))
        masses.append(sequence.kept_mass)
    write_atomic(index.with_suffix(".bin"), b"".join(blocks))
    table = {"sizes": [len(block) for block in blocks], "sha256": file_hash(index.with_suffix(".bin"))}
    write_atomic(index, json.dumps({**table, "kept_mass": masses}))


def encode(sequence: Sequence, vocab_size: int) -> bytes:
    """Return one sequence's targets as one compressed block.

    Its first number is the sum over positions of p log p less w log w, with p the teacher's distribution and w the
    weights as `decode` returns them: added to the KL divergence from w, it gives in expectation the one from p.
    """
    steps = np.diff(sequence.ids, axis=1, prepend=0).astype(_id_type(vocab_size))
    weights = sequence.weights.astype("<f2")
    read = _normalised(weights).astype(np.float64)
    missing = sequence.negentropy - float((read * np.log(read, where=read > 0, out=np.zeros_like(read))).sum())
    return zlib.compress(struct.pack("<d", missing) + _planes(steps) + _planes(weights), level=1)


def decode(block: bytes, keep: int, vocab_size: int) -> tuple[Tokens, Tokens, float]:
    """Return (ids (T - 1, k) int32, weights (T - 1, k) float32, missing part of the KL divergence) of a block."""
    data, kind = zlib.decompress(block), _id_type(vocab_size)
    middle = 8 + (len(data) - 8) // (kind.itemsize + 2) * kind.itemsize
    steps = _unplanes(data[8:middle], kind).reshape(-1, keep)
    weights = _unplanes(data[middle:], np.dtype("<f2")).reshape(-1, keep)
    return np.cumsum(steps, axis=1, dtype=np.int32), _normalised(weights), struct.unpack("<d", data[:8])[0]


def _normalised(weights: Tokens) -> Tokens:
    """Scale weights to sum to one again after rounding: what is missing would be taken for a token of its own."""
    wide = weights.astype(np.float32)
    return np.asarray(wide / wide.sum(axis=1, keepdims=True))


def _id_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _planes(values: Tokens) -> bytes:
    return np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8).T.tobytes()


def _unplanes(data: bytes, kind: np.dtype[Any]) -> Tokens:
    planes = np.frombuffer(data, np.uint8).reshape(kind.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(kind).reshape(-1)


@dataclass(frozen=True)
class TargetStore:
    """Targets on disk, memory-mapped by shard; made by a Targets job."""

    meta: dict[str, Any]
    shards: tuple[Tokens, ...]
    ends: tuple[Tokens, ...]

    @classmethod
    def open(cls, folder: Path) -> "TargetStore":
        """Open a finished cache and check every shard; raises ValueError that names a missing or damaged one."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{folder} holds no finished targets; delete its record to compute them again.") from None
        shards, ends = [], []
        for index in sorted(folder.glob("shard-*.json")):
            table, data = json.loads(index.read_text(encoding="utf-8")), index.with_suffix(".bin")
            if not data.is_file() or file_hash(data) != table["sha256"]:
                state = "damaged" if data.is_file() else "missing"
                raise ValueError(f"{data} is {state}; delete {folder} to compute the targets again.")
            shards.append(np.memmap(data, dtype=np.uint8, mode="r"))
            ends.append(np.cumsum(table["sizes"]))
        return cls(meta, tuple(shards), tuple(ends))

    def sequence(self, number: int) -> tuple[Tokens, Tokens, float]:
        """Return what `decode` does for one sequence of the text."""
        shard, place = divmod(number, self.meta["sequences_per_shard"])
        stop = int(self.ends[shard][place])
        start = int(self.ends[shard][place - 1]) if place else 0
        return decode(self.shards[shard][start:stop].tobytes(), self.meta["keep"], self.meta["vocab_size"])


class CachedTeacher:
    """The targets of a cache, looked up by the sequences of a batch."""

    def __init__(self, run: Run, job: Job, batches: Batches, store: TokenStore, workspace: Workspace) -> None:
        assert run.teach is not None
        if not isinstance(job, Targets):
            raise ValueError(
                f'Run {run.name!r} is taught by {job.name!r} with mode "cached", which is no Targets; name some or use '
                'mode "online".'
            )
        self.teach, self.stream = run.teach, batches.real
        self.targets = TargetStore.open(workspace.folder(job.name) / "targets")
        self._check(run, job, store)

    def _check(self, run: Run, job: Targets, store: TokenStore) -> None:
        """Refuse targets of another text or cut."""
        assert run.teach is not None
        trained = run.unique_tokens - run.holdout_tokens
        for what, ours, theirs in (
            ("sequence_length", run.sequence_length, job.sequence_length),
            ("vocabulary", store.vocab_size, self.targets.meta["vocab_size"]),
        ):
            if ours != theirs:
                raise ValueError(f"Run {run.name!r} has {what} {ours}, its targets {job.name!r} {theirs}; use one.")
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
        """See `epochal.teacher.Teacher`."""
        ids, weights, missing = zip(*(self.targets.sequence(self.stream.place(row)) for row in rows), strict=True)
        loss = cached_distillation_loss(
            hidden,
            head,
            targets,
            torch.from_numpy(np.concatenate(ids)).to(hidden.device),
            torch.from_numpy(np.concatenate(weights)).to(hidden.device),
            weight=self.teach.weight,
            normaliser=normaliser,
        )
        return loss + self.teach.weight * math.fsum(missing) / normaliser
