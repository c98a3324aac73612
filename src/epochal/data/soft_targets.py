"""Soft targets on disk: kept token ids and weights of each sequence, in shards with a checksum.

`shard-00000.npz` holds two arrays for each sequence i of T tokens with k kept ones, `i.ids` (T - 1, k) uint16 or uint32 and
`i.weights` (T - 1, k) float16, so that a batch reads only its own sequences; and one number per sequence in `missing`.
`shard-00000.json` holds the shard's SHA-256 and the kept mass of each sequence.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epochal.config import write_atomic
from epochal.data.store import Tokens
from epochal.records import file_hash


@dataclass(frozen=True)
class Sequence:
    """Targets of one sequence: ids (T - 1, k), weights (T - 1, k), sum of p log p over all positions, mean kept mass."""

    ids: Tokens  # (T - 1, k)
    weights: Tokens  # (T - 1, k)
    negentropy: float  # sum of p log p over all positions
    kept_mass: float  # mean over positions


def write_shard(index: Path, sequences: Iterator[Sequence], vocab_size: int) -> None:
    """Write one shard next to its `index` file."""
    id_type = np.uint16 if vocab_size <= 2**16 else np.uint32
    arrays: dict[str, Any] = {}
    missing, kept_mass = [], []
    for number, sequence in enumerate(sequences):
        weights = sequence.weights.astype(np.float16)
        arrays[f"{number}.ids"], arrays[f"{number}.weights"] = sequence.ids.astype(id_type), weights
        # KL(p || q) needs sum p log p of the teacher's distribution p, a student sees only sum w log w of the kept weights
        # as it reads them. With the difference added, the loss is that of p in expectation.
        w = _normalized(weights).astype(np.float64)
        missing.append(sequence.negentropy - float((w * np.log(w, where=w > 0, out=np.zeros_like(w))).sum()))
        kept_mass.append(sequence.kept_mass)
    # Written to memory first, because the file must appear as a whole.
    data = io.BytesIO()
    np.savez_compressed(data, missing=np.array(missing), **arrays)
    write_atomic(_shard_of(index), data.getvalue())
    # The index comes last: a shard without one is incomplete.
    write_atomic(index, json.dumps({"sha256": file_hash(_shard_of(index)), "kept_mass": kept_mass}))


def shard_is_complete(index: Path) -> bool:
    """Whether a shard has an index that contains the shard's hash."""
    if not (index.is_file() and _shard_of(index).is_file()):
        return False
    return _hash_in(index) == file_hash(_shard_of(index))


def _hash_in(index: Path) -> str | None:
    """Return the hash in a shard's index; None if the index is damaged."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return str(table["sha256"]) if isinstance(table, dict) and "sha256" in table else None


def _shard_of(index: Path) -> Path:
    return index.with_suffix(".npz")


def _normalized(weights: Tokens) -> Tokens:
    """Scale rows to sum to one after rounding to float16; otherwise the missing mass would act as an extra token."""
    wide = weights.astype(np.float32)
    return np.asarray(wide / wide.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class TargetStore:
    """Finished targets of a Targets job; sequences are read from disk on access."""

    meta: dict[str, Any]
    shards: tuple[Any, ...]
    missing: tuple[Tokens, ...]

    @classmethod
    def open(cls, folder: Path) -> "TargetStore":
        """Open finished targets and verify every shard; raises ValueError naming a missing or damaged one."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict) or not isinstance(meta.get("sequences_per_shard"), int):
            raise ValueError(f"{folder} has no finished targets; delete its record to compute them again.") from None
        shards = []
        for index in sorted(folder.glob("shard-*.json")):
            path, expected = _shard_of(index), _hash_in(index)
            if not path.is_file() or file_hash(path) != expected:
                state = "damaged" if path.is_file() else "missing"
                raise ValueError(f"{path} is {state}; delete {folder} to compute the targets again.")
            shards.append(np.load(path, allow_pickle=False))
        if len(shards) != meta.get("shards", len(shards)):
            raise ValueError(
                f"{folder} holds {len(shards)} shards of {meta['shards']}; delete it to compute the targets again."
            )
        return cls(meta, tuple(shards), tuple(shard["missing"] for shard in shards))

    def sequence(self, number: int) -> tuple[Tokens, Tokens, float]:
        """Return (ids, weights, missing part of the KL divergence) of a sequence.

        ids are (T - 1, k) int32, weights (T - 1, k) float32.
        """
        shard, row = divmod(number, self.meta["sequences_per_shard"])
        ids, weights = (self.shards[shard][f"{row}.{name}"] for name in ("ids", "weights"))
        return ids.astype(np.int32), _normalized(weights), float(self.missing[shard][row])
