"""The token store and the batch at step t.

`batch(t)` is the global batch, a pure function of (order seed, t): the number of processes, micro-batches and restarts
do not change it. T is the sequence length, B the sequences of a batch, D the unique training tokens.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epochal.config import find_config
from epochal.records import Workspace, file_hash
from epochal.run import Run, config_hash

SPLITS = ("train", "validation", "test")
META_VERSION = 1
Tokens = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TokenStore:
    """Tokens of one data set on disk, memory-mapped; made by `epochal data`."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, *, config_hash: str | None = None) -> "TokenStore":
        """Open a finished store and check it: every file's hash, and training apart from validation and test.

        Raises ValueError when it is missing, damaged, or made from another config than `config_hash`.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no token store; make it with epochal data {folder.name}.") from None
        except ValueError:
            raise ValueError(f"{folder}/meta.json is damaged; delete {folder} and make it again.") from None
        if meta.get("version") != META_VERSION:
            raise ValueError(
                f"{folder} has version {meta.get('version')}, not {META_VERSION}; delete it, make it again."
            )
        if config_hash is not None and meta["config_hash"] != config_hash:
            raise ValueError(f"{folder} was made from another version of its config; delete it and make it again.")
        store = cls(folder, meta)
        store._check_files()
        store._check_disjoint()
        return store

    def _check_files(self) -> None:
        for name, expected in self.meta["files"].items():
            path = self.folder / name
            if not path.is_file() or file_hash(path) != expected:
                state = "damaged" if path.is_file() else "missing"
                raise ValueError(f"{path} is {state}; delete {self.folder} and make it again with epochal data.")

    def _check_disjoint(self) -> None:
        marks = {split: np.load(self.folder / f"{split}.hashes.npy") for split in SPLITS}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = np.intersect1d(marks[one], marks[other])
            if len(shared):
                raise ValueError(
                    f"{self.folder}: {len(shared)} documents are in both {one} and {other}; delete it, make it again."
                )

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer."""
        return int(self.meta["vocab_size"])

    @property
    def tokenizer_folder(self) -> Path:
        """A folder that `AutoTokenizer.from_pretrained` loads."""
        return self.folder / "tokenizer"

    def tokens(self, split: str) -> Tokens:
        """All tokens of a split, memory-mapped."""
        if not self.meta["tokens"][split]:
            return np.zeros(0, dtype=self.meta["dtype"])
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")

    def lengths(self, split: str) -> Tokens:
        """Tokens of each document of a split, in the order of `tokens`."""
        return np.asarray(np.load(self.folder / f"{split}.lengths.npy"))

    def sequences(self, split: str, sequence_length: int) -> Tokens:
        """Return a held-out split as whole sequences, (count, T) int64; the incomplete last one is left out."""
        tokens = self.tokens(split)
        count = len(tokens) // sequence_length
        if count == 0:
            raise ValueError(
                f"sequence_length {sequence_length} is longer than the {split} split of {len(tokens)} tokens; shorten it."
            )
        return tokens[: count * sequence_length].reshape(count, sequence_length).astype(np.int64)

    def training_stream(self, run: Run) -> "Stream":
        """Return the shared subset of `run.unique_tokens` tokens in this run's order."""
        available = int(self.meta["tokens"]["train"])
        if run.unique_tokens > available:
            raise ValueError(
                f"unique_tokens {run.unique_tokens} is above the {available} training tokens of {self.folder.name}; "
                f"use at most {available // run.batch_tokens * run.batch_tokens}."
            )
        trained = run.unique_tokens - run.holdout_tokens
        ends = np.cumsum(self.lengths("train"))
        count = int(np.searchsorted(ends, trained)) + 1
        starts = np.concatenate([[0], ends[: count - 1]])
        return Stream(self.tokens("train")[:trained], starts, run.sequence_length, run.data_order, run.order_seed)

    def holdout(self, run: Run) -> Tokens:
        """Return the part of a run's budget that it does not train on, the last of its tokens, (count, T) int64."""
        tokens = self.tokens("train")[run.unique_tokens - run.holdout_tokens : run.unique_tokens]
        return tokens.reshape(-1, run.sequence_length).astype(np.int64)


def open_store(data: str, workspace: Workspace) -> TokenStore:
    """Open the finished token store of a data config; raises ValueError when it is missing, damaged or out of date."""
    path = find_config("data", data, ".toml")
    return TokenStore.open(workspace.data / path.stem, config_hash=config_hash(path))


@dataclass(frozen=True)
class Stream:
    """An endless stream of sequences over fixed tokens, one epoch after another.

    order="documents": documents are permuted and packed anew each epoch; "sequences": the cut stays, the sequences
    are permuted anew; "fixed": one permutation of the sequences, the same in every epoch (the paper).
    """

    tokens: Tokens
    starts: Tokens
    sequence_length: int
    order: str
    seed: int

    @property
    def sequences_per_epoch(self) -> int:
        """Whole sequences in the tokens."""
        return len(self.tokens) // self.sequence_length

    @cached_property
    def _permutations(self) -> dict[int, tuple[Tokens, Tokens]]:
        return {}

    def _permutation(self, epoch: int) -> tuple[Tokens, Tokens]:
        """Return (order, ends): the units of this epoch in order, and in order "documents" their cumulative lengths."""
        if epoch not in self._permutations:
            self._permutations.clear()
            rng = np.random.default_rng([self.seed, 0 if self.order == "fixed" else epoch])
            if self.order == "documents":
                order = rng.permutation(len(self.starts))
                lengths = np.diff(np.append(self.starts, len(self.tokens)))
                self._permutations[epoch] = (order, np.cumsum(lengths[order]))
            else:
                self._permutations[epoch] = (rng.permutation(self.sequences_per_epoch), self.starts[:0])
        return self._permutations[epoch]

    def sequence(self, index: int) -> Tokens:
        """Return sequence number `index` of the endless stream, (T,)."""
        if self.order != "documents":
            begin = self.place(index) * self.sequence_length
            return self.tokens[begin : begin + self.sequence_length]
        epoch, position = divmod(index, self.sequences_per_epoch)
        return self._gather(position * self.sequence_length, *self._permutation(epoch))

    def place(self, index: int) -> int:
        """Return which sequence of the text comes as number `index`, in the orders that keep the cut."""
        assert self.order != "documents"
        epoch, position = divmod(index, self.sequences_per_epoch)
        return int(self._permutation(epoch)[0][position])

    def _gather(self, begin: int, order: Tokens, ends: Tokens) -> Tokens:
        """Cut T tokens at `begin` out of the documents laid end to end in `order`."""
        pieces, wanted = [], self.sequence_length
        unit = int(np.searchsorted(ends, begin, side="right"))
        while wanted:
            document = int(order[unit])
            start = int(self.starts[document])
            stop = int(self.starts[document + 1]) if document + 1 < len(self.starts) else len(self.tokens)
            skip = begin - (int(ends[unit]) - (stop - start))
            piece = self.tokens[start + skip : min(stop, start + skip + wanted)]
            pieces.append(piece)
            wanted -= len(piece)
            begin += len(piece)
            unit += 1
        return np.concatenate(pieces)


@dataclass(frozen=True)
class Batches:
    """The global batch at every step: real text, mixed with sampled text in an exact share where there is some."""

    real: Stream
    sampled: Stream | None
    fraction: float
    batch_size: int

    def __call__(self, step: int) -> Tokens:
        """Return the global batch of a step, (B, T) int64.

        Of the first n sequences of the run, floor(n * (1 - fraction)) are real at every n.
        """
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.stack([self._row(row) for row in rows]).astype(np.int64)

    def _row(self, row: int) -> Tokens:
        if self.sampled is None:
            return self.real.sequence(row)
        real_before, real_after = self._real_count(row), self._real_count(row + 1)
        if real_after > real_before:
            return self.real.sequence(real_before)
        return self.sampled.sequence(row - real_before)

    def _real_count(self, rows: int) -> int:
        return int(np.floor(rows * (1.0 - self.fraction) + 1e-9))


def sampled_stream(tokens: Tokens, bos: int, run: Run) -> Stream:
    """Return sampled text as a stream; a new text begins at every start token.

    Raises ValueError when there are fewer tokens than one sequence.
    """
    if len(tokens) < run.sequence_length:
        raise ValueError(
            f"{len(tokens)} sampled tokens do not fill one sequence of {run.sequence_length}; sample more."
        )
    starts = np.flatnonzero(tokens == bos)
    if not len(starts) or starts[0] != 0:
        starts = np.append(0, starts)
    return Stream(tokens, starts, run.sequence_length, run.data_order, run.order_seed)
