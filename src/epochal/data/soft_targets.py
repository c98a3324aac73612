"""Soft targets on disk: ids and weights of the kept tokens, one compressed block per sequence, in checked shards."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epochal.config import write_atomic
from epochal.data.store import Tokens
from epochal.records import file_hash


def shard_is_complete(index: Path) -> bool:
    """Whether a shard has its index and the index has its hash."""
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


def write_shard(index: Path, sequences: Iterator[Sequence], vocab_size: int) -> None:
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
