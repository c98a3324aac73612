"""A cache of soft targets: the top-k tokens of a teacher at every position of the training text, computed once.

Members are averaged first, so the cost of a student's step does not depend on K. What the k tokens leave over is one
bucket of the loss (`epochal.loss`), and its mass goes into the record. targets/ holds shards of sequences and beside
each an index: `shard-00000.bin` is one zlib block for each sequence, `shard-00000.json` their sizes and the hash of the
file. A block holds T - 1 positions of k tokens in rising order, as differences, and their probabilities in float16; bytes
of one significance lie together, because so they compress.

n tokens, V vocabulary, T sequence length, k kept tokens.
"""

import json
import logging
import math
import shutil
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
from epochal.model import next_token
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace, file_hash, input_marks
from epochal.run import Ensemble, Job, Run, Targets, fingerprint
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
    members, marks = member_records(job.source, records), input_marks(job, records)
    run, source = members[0].job, records.named(job.source)
    assert isinstance(run, Run) and source is not None
    store = open_store(run.data, workspace)
    sequences = training_sequences(job, store)
    folder = workspace.folder(job.name) / "targets"
    beside = _prepare(folder, {"job": fingerprint(job), "inputs": marks})
    _check_room(job, store.vocab_size, beside)
    models = [load_model(workspace, member.job.name) for member in members]
    average, shares = ("logits", None)
    if isinstance(source.job, Ensemble):
        average, shares = source.job.average, source.job.weights
    per_shard = max(1, SHARD_POSITIONS // job.sequence_length)
    kept = []
    for number, start in enumerate(range(0, len(sequences), per_shard)):
        rows = sequences[start : start + per_shard]
        index = beside / f"shard-{number:05d}.json"
        if not _finished(index):
            _write_shard(index, _top(job, models, rows, average, shares), store.vocab_size)
        kept.append(json.loads(index.read_text(encoding="utf-8"))["kept_mass"])
    meta = {"vocab_size": store.vocab_size, "top_k": min(job.top_k, store.vocab_size), "sequences_per_shard": per_shard}
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
            f"targets {job.name!r} need up to {need / 1e6:.1f} MB at top_k {job.top_k}, and {free / 1e6:.1f} MB are "
            f"free in {folder.parent}; make room or keep fewer tokens."
        )


def _finished(index: Path) -> bool:
    if not index.is_file():
        return False
    return bool(file_hash(index.with_suffix(".bin")) == json.loads(index.read_text(encoding="utf-8"))["sha256"])


@torch.no_grad()
def _top(
    job: Targets, models: list[Any], rows: Tokens, average: str, shares: tuple[float, ...] | None
) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield (ids (T - 1, k), probabilities (T - 1, k)) of each sequence, ids rising."""
    vocabulary = models[0].config.vocab_size
    per_pass = max(1, CHUNK_ELEMENTS // vocabulary // job.sequence_length)
    for chunk in torch.split(torch.from_numpy(rows), per_pass):
        check_stop()
        p = averaged_probabilities(models, chunk, average=average, shares=shares, temperature=job.temperature)
        ids = torch.topk(p, min(job.top_k, vocabulary), dim=1).indices.sort(dim=1).values
        kept = p.gather(1, ids)
        shape = (len(chunk), rows.shape[1] - 1, -1)
        yield from zip(ids.reshape(shape).cpu().numpy(), kept.reshape(shape).cpu().numpy(), strict=True)


@torch.no_grad()
def averaged_probabilities(
    models: list[Any], tokens: torch.Tensor, *, average: str, shares: tuple[float, ...] | None, temperature: float
) -> torch.Tensor:
    """Return the teacher's distribution at each of the n = b (T - 1) predictions of (b, T) tokens: (n, V) float32."""
    shares = shares or (1.0 / len(models),) * len(models)
    total: torch.Tensor | None = None
    for share, model in zip(shares, models, strict=True):
        hidden, _ = next_token(model, tokens.to(model.device))
        part = (hidden @ model.lm_head.weight.T).float() / temperature
        part = torch.softmax(part, 1) if average == "probs" else part
        total = part.mul_(share) if total is None else total.add_(part, alpha=share)
    assert total is not None
    return total if average == "probs" else torch.softmax(total, 1)


# --- the files ----------------------------------------------------------------------------------------------------------


def _write_shard(index: Path, sequences: Iterator[tuple[Tokens, Tokens]], vocab_size: int) -> None:
    """Write one shard, and its index last: a shard without an index does not exist."""
    blocks, masses = [], []
    for ids, p in sequences:
        blocks.append(encode(ids, p, vocab_size))
        masses.append(float(p.sum(axis=1, dtype=np.float64).mean()))
    write_atomic(index.with_suffix(".bin"), b"".join(blocks))
    table = {"sizes": [len(block) for block in blocks], "sha256": file_hash(index.with_suffix(".bin"))}
    write_atomic(index, json.dumps({**table, "kept_mass": masses}))


def encode(ids: Tokens, p: Tokens, vocab_size: int) -> bytes:
    """Return one sequence's targets, (T - 1, k) rising ids and their probabilities, as one compressed block."""
    steps = np.diff(ids, axis=1, prepend=0).astype(_id_type(vocab_size))
    return zlib.compress(_planes(steps) + _planes(p.astype(np.float16)), level=1)


def decode(block: bytes, top_k: int, vocab_size: int) -> tuple[Tokens, Tokens]:
    """Return (ids (T - 1, k) int64, probabilities (T - 1, k) float32) of a block of `encode`."""
    data, kind = zlib.decompress(block), _id_type(vocab_size)
    count = len(data) // (kind.itemsize + 2)
    steps = _unplanes(data[: count * kind.itemsize], kind).reshape(-1, top_k)
    p = _unplanes(data[count * kind.itemsize :], np.dtype("<f2")).reshape(-1, top_k)
    return np.cumsum(steps, axis=1, dtype=np.int64), p.astype(np.float32)


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

    def sequence(self, number: int) -> tuple[Tokens, Tokens]:
        """Return (ids (T - 1, k) int64, probabilities (T - 1, k) float32) of one sequence of the text."""
        shard, place = divmod(number, self.meta["sequences_per_shard"])
        stop = int(self.ends[shard][place])
        start = int(self.ends[shard][place - 1]) if place else 0
        return decode(self.shards[shard][start:stop].tobytes(), self.meta["top_k"], self.meta["vocab_size"])


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
        """Refuse targets of another text, cut or temperature."""
        assert run.teach is not None
        trained = run.unique_tokens - run.holdout_tokens
        for what, ours, theirs in (
            ("sequence_length", run.sequence_length, job.sequence_length),
            ("temperature", run.teach.temperature, job.temperature),
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
        found = [self.targets.sequence(self.stream.place(row)) for row in rows]
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in found])).to(hidden.device)
        p = torch.from_numpy(np.concatenate([p for _, p in found])).to(hidden.device)
        return cached_distillation_loss(
            hidden,
            head,
            targets,
            ids,
            p,
            weight=self.teach.weight,
            temperature=self.teach.temperature,
            normaliser=normaliser,
        )


def cached_distillation_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    ids: torch.Tensor,
    p: torch.Tensor,
    *,
    weight: float,
    temperature: float,
    normaliser: float,
) -> torch.Tensor:
    """Return (1 - weight) CE + weight T^2 KL of (the kept tokens, or any other) from whole logits, over `normaliser`."""
    logits = (hidden @ head.T).float()
    hard = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    log_q = torch.log_softmax(logits / temperature, 1)
    kept, rest = log_q.gather(1, ids), log_q.scatter(1, ids, -math.inf).logsumexp(1)
    left = (1.0 - p.sum(1)).clamp(min=0.0)
    soft = (torch.xlogy(p, p) - p * kept).sum() + (torch.xlogy(left, left) - left * rest).sum()
    return ((1.0 - weight) * hard + weight * temperature**2 * soft) / normaliser
