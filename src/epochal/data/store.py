"""The token store and the batch at step t.

The global batch at step t is a pure function of (order seed, t). T is the sequence length, B the sequences per batch, D
the unique training tokens.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from epochal.config import find_config
from epochal.data.tokenizer import open_tokenizer
from epochal.records import Workspace, file_hash
from epochal.run import Run, config_hash

SPLITS = ("train", "validation", "test")
META_VERSION = 2
Tokens = np.ndarray[Any, np.dtype[Any]]

# Tokens that are counted in one piece.
COUNTED = 2**20


@dataclass(frozen=True)
class TokenStore:
    """The memory-mapped tokens of one data set, written by `epochal data`."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, *, config_hash: str | None = None) -> "TokenStore":
        """Open a store after checking its files and splits.

        File hashes must match, and no document may be in two splits. Raises ValueError if it is missing, damaged, or
        was built from another config than `config_hash`.
        """
        meta = read_meta(folder)
        # Comments and layout of a config do not count; see `run.config_hash`.
        if config_hash is not None and meta["config_hash"] != config_hash:
            raise ValueError(f"{folder} was built from another version of its config; delete it and build it again.")
        store = cls(folder, meta)
        # Every open checks all hashes: a damaged store would silently change every result.
        store._check_files()
        store._check_disjoint()
        return store

    def _check_files(self) -> None:
        for name, expected in self.meta["files"].items():
            path = self.folder / name
            if not path.is_file() or file_hash(path) != expected:
                state = "damaged" if path.is_file() else "a folder" if path.is_dir() else "missing"
                raise ValueError(f"{path} is {state}; delete {self.folder} and build it again with epochal data.")

    def _check_disjoint(self) -> None:
        # By the hash of the normal form: the same text in two splits would make held-out losses too low.
        hashes = {split: np.load(self.folder / f"{split}.hashes.npy") for split in SPLITS}
        for one, other in combinations(SPLITS, 2):
            shared = np.intersect1d(hashes[one], hashes[other])
            if len(shared):
                raise ValueError(
                    f"{self.folder}: {len(shared)} documents are in both {one} and {other}; delete and rebuild it."
                )

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self.meta["vocab_size"])

    def text(self, unique_tokens: int) -> dict[str, Any]:
        """Return what results on this text are compared with, for a budget of D tokens.

        The size of the text, bytes per validation token (None in stores that did not count bytes), and the validation loss
        in nats of the frequencies of tokens in the first D training tokens (each counted once more than it occurs).
        """
        counts = self._frequencies("train", unique_tokens) + 1
        losses = -np.log(counts / counts.sum())
        held_out, size = self.meta["tokens"]["validation"], self.meta.get("bytes")
        return {
            "tokens": self.meta["tokens"]["train"],
            "documents": self.meta["documents"]["train"],
            "vocab_size": self.vocab_size,
            "bytes_per_token": round(size["validation"] / held_out, 6) if size else None,
            "unigram_loss": round(float(self._frequencies("validation") @ losses / held_out), 6),
        }

    def _frequencies(self, split: str, count: int | None = None) -> Tokens:
        """Return how often each token occurs in the first `count` tokens of a split."""
        tokens = self.tokens(split)[:count]
        # In pieces: numpy counts 8-byte copies of the tokens.
        pieces = (tokens[first : first + COUNTED] for first in range(0, len(tokens), COUNTED))
        return sum((np.bincount(piece, minlength=self.vocab_size) for piece in pieces), np.zeros(self.vocab_size, int))

    @property
    def tokenizer_folder(self) -> Path:
        """A folder that `AutoTokenizer.from_pretrained` loads."""
        return self.folder / "tokenizer"

    @property
    def vocabulary(self) -> str:
        """Hash of the map from token to id; see `epochal.data.tokenizer.vocabulary_hash`."""
        return str(self.meta["vocabulary"])

    def tokenizer(self) -> Any:
        """Return the store's `tokenizers.Tokenizer`."""
        return open_tokenizer(self.tokenizer_folder)

    def tokens(self, split: str) -> Tokens:
        """All tokens of a split, memory-mapped, (tokens,) uint16 or uint32."""
        if not self.meta["tokens"][split]:
            return np.zeros(0, dtype=self.meta["dtype"])
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")

    def lengths(self, split: str) -> Tokens:
        """Number of tokens of each document of a split, in the order of `tokens`."""
        return np.asarray(np.load(self.folder / f"{split}.lengths.npy"))

    def sequences(self, split: str, sequence_length: int) -> Tokens:
        """Return a held-out split as whole sequences, (count, T) int64, without the incomplete last one.

        Raises ValueError if the split is shorter than one sequence.
        """
        tokens = self.tokens(split)
        count = len(tokens) // sequence_length
        if count == 0:
            raise ValueError(
                f"sequence_length {sequence_length} is longer than the {split} split of {len(tokens)} tokens; shorten it."
            )
        return tokens[: count * sequence_length].reshape(count, sequence_length).astype(np.int64)

    def training_stream(self, run: Run) -> "Stream":
        """Return the first `run.unique_tokens` training tokens, less the holdout, in the order of this run.

        Raises ValueError if the store has fewer.
        """
        available = int(self.meta["tokens"]["train"])
        if run.unique_tokens > available:
            raise ValueError(
                f"unique_tokens {run.unique_tokens} is above the {available} training tokens of {self.folder.name}; "
                f"use at most {available // run.batch_tokens * run.batch_tokens}."
            )
        trained = run.unique_tokens - run.holdout_tokens
        ends = np.cumsum(self.lengths("train"))
        # Documents that start within the budget; the last one may be cut.
        count = int(np.searchsorted(ends, trained)) + 1
        starts = np.concatenate([[0], ends[: count - 1]])
        return Stream(self.tokens("train")[:trained], starts, run.sequence_length, run.data_order, run.order_seed)

    def holdout(self, run: Run) -> Tokens:
        """Return the held-out last tokens of a run's budget, (count, T) int64."""
        tokens = self.tokens("train")[run.unique_tokens - run.holdout_tokens : run.unique_tokens]
        return tokens.reshape(-1, run.sequence_length).astype(np.int64)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the meta.json of a store; raises ValueError if it is missing, damaged, edited or of another version."""
    path = folder / "meta.json"
    again = f"delete {folder} and build it again with epochal data"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a token store; build it with epochal data {folder.name}.") from None
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path} is damaged; {again}.") from None
    if not isinstance(meta, dict) or meta.get("version") != META_VERSION:
        version = meta.get("version") if isinstance(meta, dict) else None
        raise ValueError(f"{folder} has version {version}, not {META_VERSION}; {again}.")
    # The sizes and types in it decide how the tokens are read.
    if meta.get("self") != _meta_hash(meta):
        raise ValueError(f"{path} was edited or damaged: it does not match its own hash; {again}.")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write the meta.json of a store, with the hash of its values."""
    text = json.dumps({**meta, "self": _meta_hash(meta)}, indent=1) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")


def _meta_hash(meta: dict[str, Any]) -> str:
    values = {key: value for key, value in meta.items() if key != "self"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_store(data: str, workspace: Workspace) -> TokenStore:
    """Open the token store of a data config; raises ValueError if it is missing, damaged or out of date."""
    path = find_config("data", data, ".toml")
    return TokenStore.open(workspace.data / path.stem, config_hash=config_hash(path))


# --- sequences and batches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """An endless stream of sequences over fixed tokens, one epoch after another.

    order="documents": documents are permuted in each epoch, concatenated and cut into sequences. "sequences": the text is
    cut once, and its sequences are permuted in each epoch. "fixed": one permutation for all epochs (the paper).
    `starts` are the positions at which documents start.
    """

    tokens: Tokens
    starts: Tokens
    sequence_length: int
    order: str
    seed: int

    @property
    def sequences_per_epoch(self) -> int:
        """Number of whole sequences per epoch."""
        return len(self.tokens) // self.sequence_length

    @cached_property
    def _permutations(self) -> dict[int, tuple[Tokens, Tokens]]:
        return {}

    def _permutation(self, epoch: int) -> tuple[Tokens, Tokens]:
        """Return the permutation of an epoch and, for documents, their cumulative lengths in that order."""
        if epoch not in self._permutations:
            self._permutations.clear()  # only the current epoch is kept in memory
            # A generator per epoch, so that any epoch can be computed without those before it.
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
        """Return the position in the text of sequence number `index`, in units of T."""
        assert (
            self.order != "documents"
        )  # where documents are packed again each epoch, sequences have no fixed position
        epoch, position = divmod(index, self.sequences_per_epoch)
        return int(self._permutation(epoch)[0][position])

    def _gather(self, begin: int, order: Tokens, ends: Tokens) -> Tokens:
        """Cut T tokens at `begin` out of the documents concatenated in `order`."""
        pieces, wanted = [], self.sequence_length
        # The document in which the sequence begins; it may continue over several.
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
    """The global batch at every step: real text, mixed with an exact fraction of sampled text if given."""

    real: Stream
    sampled: Stream | None
    fraction: float
    batch_size: int

    def __call__(self, step: int) -> Tokens:
        """Return the global batch of a step, (B, T) int64.

        Of the first n sequences of a run, floor(n * (1 - fraction)) are real, for every n.
        """
        # From the step alone: processes, micro-batches and restarts do not change it.
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.stack([self._row(row) for row in rows]).astype(np.int64)

    def _row(self, row: int) -> Tokens:
        if self.sampled is None:
            return self.real.sequence(row)
        # Row i is real exactly if the count of real rows grows at i, which spreads them evenly.
        real_before, real_after = self._real_count(row), self._real_count(row + 1)
        if real_after > real_before:
            return self.real.sequence(real_before)
        return self.sampled.sequence(row - real_before)

    def _real_count(self, rows: int) -> int:
        return int(np.floor(rows * (1.0 - self.fraction) + 1e-9))  # 1e-9: products that are integers up to rounding


def open_samples(path: Path, store: TokenStore) -> Tokens:
    """Open the sampled tokens of a Samples job, memory-mapped, (tokens,).

    Raises ValueError if the file is missing or damaged, or its tokens are not of the type and vocabulary of `store`.
    """
    again = f"delete {path} to sample again"
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as sampled tokens ({error}); {again}.") from None
    expected = np.dtype(store.meta["dtype"])
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype != expected:
        found = f"{tokens.ndim} dimensions of {tokens.dtype}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise ValueError(f"{path} must hold one dimension of {expected}, got {found}; {again}.")
    if len(tokens) and int(tokens.max()) >= store.vocab_size:
        raise ValueError(
            f"{path} holds token {int(tokens.max())}, but the vocabulary of {store.folder} ends at "
            f"{store.vocab_size - 1}; {again}."
        )
    return tokens


def sampled_stream(tokens: Tokens, bos: int, run: Run) -> Stream:
    """Return sampled text as a stream of documents, each starting with `bos`.

    Raises ValueError if there are fewer tokens than one sequence.
    """
    if len(tokens) < run.sequence_length:
        raise ValueError(
            f"{len(tokens)} sampled tokens do not fill one sequence of {run.sequence_length}; sample more."
        )
    starts = np.flatnonzero(tokens == bos)
    if not len(starts) or starts[0] != 0:
        # Tokens before the first bos are a document too.
        starts = np.append(0, starts)
    return Stream(tokens, starts, run.sequence_length, run.data_order, run.order_seed)
