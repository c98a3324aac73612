"""Text to a token store (`epochal data CONFIG`): deduplicate, split by document, tokenize, shuffle once, write, rename.

The store keeps training documents in one shuffled order, chosen here and never again: the subset of D tokens that all
runs of a campaign share is the first D tokens of that order, so a smaller subset is part of every larger one.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from epochal.config import find_config, load_toml, replaced_folder, to_table
from epochal.data.documents import Source, read_documents
from epochal.data.store import META_VERSION, SPLITS, TokenStore
from epochal.data.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer
from epochal.records import file_hash
from epochal.run import config_hash

CHUNK = 512
"""Documents encoded at a time."""

MOST_CHARACTERS_A_TOKEN = 16
"""No tokenizer trained on prose averages more; usual are 4 to 5."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How documents are divided.

    by="hash": a document goes to test or validation by its content hash, in the shares `test` and `validation`.
    by="stream": the first whole documents up to `validation_tokens` are validation, the next up to `test_tokens`
    test, the rest training.
    """

    by: str = "hash"
    validation: float = 0.05
    test: float = 0.05
    validation_tokens: int = 0
    test_tokens: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("hash", "stream"):
            raise ValueError(f"by is {self.by!r}; choose from hash, stream.")
        if self.by == "hash" and not (self.validation > 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError(
                f"validation {self.validation} and test {self.test} leave no training text; give shares below 1."
            )
        if self.by == "stream" and self.validation_tokens < 1:
            raise ValueError("by = 'stream' needs validation_tokens; give a number of tokens.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set: `configs/data/<name>.toml`. Documents are those of `source`, then those of each in `more`.

    `before` and `after` frame each document and are encoded with special tokens recognised; the text itself never is.
    `train_tokens` stops reading once the training split holds that many (0: read all). `shuffle=False` keeps the order
    of the source. `sha256` names the expected hash of the training token file, where one is known.
    """

    licence: str
    source: Source
    tokenizer: TokenizerConfig
    more: tuple[Source, ...] = ()
    split: SplitConfig = field(default_factory=SplitConfig)
    before: str = "<|bos|>"
    after: str = "<|eos|>"
    train_tokens: int = 0
    shuffle: bool = True
    shuffle_seed: int = 0
    sha256: str | None = None


def prepare(name: str, data_folder: Path) -> TokenStore:
    """Make the token store of a data config, or open the finished one; returns it.

    Raises ValueError for bad input; nothing half-done is left behind.
    """
    path = find_config("data", name, ".toml")
    folder = data_folder / path.stem
    if folder.exists():
        return TokenStore.open(folder, config_hash=config_hash(path))
    config = load_toml(path, DataConfig)
    data_folder.mkdir(parents=True, exist_ok=True)
    lock_path = data_folder / f".{path.stem}.lock"
    with lock_path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second start waits here, then finds the store
        try:
            if not folder.exists():
                with replaced_folder(folder) as temporary:
                    _build(config, temporary, path)
        finally:
            lock_path.unlink(missing_ok=True)
    return TokenStore.open(folder, config_hash=config_hash(path))


def content_hash(text: str) -> int:
    """Return 64 bits of the SHA-256 of a document's text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _build(config: DataConfig, folder: Path, path: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{path.stem}: reading", total=None)
        tokenizer = load_tokenizer(config.tokenizer, _training_texts(config), folder.parent)
        progress.update(task, description=f"{path.stem}: tokenizing")
        writers = {split: _Writer(folder, split, _dtype(tokenizer)) for split in SPLITS}
        counts = _tokenize(config, tokenizer, writers, lambda n: progress.advance(task, n))
        for split in SPLITS:
            order = np.random.default_rng(config.shuffle_seed) if config.shuffle and split == "train" else None
            writers[split].close(order)
    if not writers["train"].lengths or not writers["validation"].lengths:
        empty = "training" if not writers["train"].lengths else "validation"
        raise ValueError(f"{path}: the {empty} split has no documents; give more text or change the split.")
    save_tokenizer(tokenizer, folder / "tokenizer", bos=config.tokenizer.specials[0], eos=_eos(config))
    _write_meta(config, folder, path, tokenizer, writers, counts)


def _eos(config: DataConfig) -> str | None:
    """The token that ends a document: a special in `after`, else the one that opens the next."""
    return next((token for token in config.tokenizer.specials if token in config.after), None)


def _dtype(tokenizer: Any) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)


def _split_of(mark: int, config: SplitConfig, written: dict[str, int]) -> str:
    """Say which split a document belongs to, from its hash or from what is written so far."""
    if config.by == "stream":
        if written["validation"] < config.validation_tokens:
            return "validation"
        return "test" if written["test"] < config.test_tokens else "train"
    share = mark / 2**64
    if share < config.test:
        return "test"
    return "validation" if share < config.test + config.validation else "train"


def _unique(config: DataConfig, counts: dict[str, int]) -> Iterator[tuple[int, str]]:
    """Yield (content hash, text) once per distinct text; blank documents and duplicates are counted."""
    seen: set[int] = set()
    for text in chain.from_iterable(read_documents(source) for source in (config.source, *config.more)):
        mark = content_hash(text)
        if not text.strip():
            counts["blank"] += 1
        elif mark in seen:
            counts["duplicates"] += 1
        else:
            seen.add(mark)
            yield mark, text


def _training_texts(config: DataConfig) -> Iterator[str]:
    """Yield the training documents: what a tokenizer may learn from.

    The tokens of a stream split cannot be counted before there is a tokenizer, so more text than they can hold is skipped.
    """
    counts = {"blank": 0, "duplicates": 0}
    skip = (
        MOST_CHARACTERS_A_TOKEN * (config.split.validation_tokens + config.split.test_tokens)
        if config.split.by == "stream"
        else 0
    )
    for mark, text in _unique(config, counts):
        if skip > 0:
            skip -= len(text)
        elif config.split.by == "stream" or _split_of(mark, config.split, {}) == "train":
            yield text


def _tokenize(config: DataConfig, tokenizer: Any, writers: dict[str, "_Writer"], advance: Any) -> dict[str, int]:
    """Encode all documents in chunks and append each to its split; return the counts of what was dropped."""
    counts = {"blank": 0, "duplicates": 0}
    before = tokenizer.encode(config.before, add_special_tokens=False).ids if config.before else []
    after = tokenizer.encode(config.after, add_special_tokens=False).ids if config.after else []
    tokenizer.encode_special_tokens = True  # a document that spells out a special token does not get one
    documents = _unique(config, counts)
    while chunk := list(islice(documents, CHUNK)):
        encodings = tokenizer.encode_batch([text for _, text in chunk], add_special_tokens=False)
        for (mark, _), encoding in zip(chunk, encodings, strict=True):
            written = {split: writer.tokens for split, writer in writers.items()}
            split = _split_of(mark, config.split, written)
            writers[split].append(mark, [*before, *encoding.ids, *after])
        advance(len(chunk))
        if config.train_tokens and writers["train"].tokens >= config.train_tokens:
            break
    tokenizer.encode_special_tokens = False
    return counts


class _Writer:
    """Appends the documents of one split to a file; `close` writes them in their final order, with their index."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.path = folder / f"{split}.bin"
        self.lengths: list[int] = []
        self.marks: list[int] = []
        self.tokens = 0
        self._file: BinaryIO = self.path.open("wb")

    def append(self, mark: int, ids: list[int]) -> None:
        self._file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.lengths.append(len(ids))
        self.marks.append(mark)
        self.tokens += len(ids)

    def close(self, shuffle: np.random.Generator | None) -> None:
        self._file.close()
        lengths = np.asarray(self.lengths, dtype=np.int64)
        marks = np.asarray(self.marks, dtype=np.uint64)
        if shuffle is not None and len(lengths):
            order = shuffle.permutation(len(lengths))
            self._reorder(order, lengths)
            lengths, marks = lengths[order], marks[order]
        np.save(self.folder / f"{self.split}.lengths.npy", lengths)
        np.save(self.folder / f"{self.split}.hashes.npy", marks)

    def _reorder(self, order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        """Rewrite the token file with its documents in `order`."""
        ends = np.cumsum(lengths)
        source = np.memmap(self.path, dtype=self.dtype, mode="r")
        shuffled = self.path.with_suffix(".shuffled")
        with shuffled.open("wb") as file:
            for index in order:
                file.write(source[ends[index] - lengths[index] : ends[index]].tobytes())
        shuffled.replace(self.path)


def _write_meta(
    config: DataConfig, folder: Path, path: Path, tokenizer: Any, writers: dict[str, _Writer], counts: dict[str, int]
) -> None:
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    meta = {
        "version": META_VERSION,
        "name": path.stem,
        "config": to_table(config),
        "config_hash": config_hash(path),
        "licence": config.licence,
        "dtype": str(_dtype(tokenizer)),
        "vocab_size": tokenizer.get_vocab_size(),
        "bos": tokenizer.token_to_id(config.tokenizer.specials[0]),
        "eos": tokenizer.token_to_id(_eos(config) or config.tokenizer.specials[0]),
        "documents": {split: len(writer.lengths) for split, writer in writers.items()},
        "tokens": {split: writer.tokens for split, writer in writers.items()},
        "dropped": counts,
        "files": {str(item.relative_to(folder)): file_hash(item) for item in files},
    }
    if config.sha256 is not None and meta["files"]["train.bin"] != config.sha256:
        raise ValueError(
            f"{path}: training tokens have SHA-256 {meta['files']['train.bin']}, not {config.sha256}; "
            "the source or the tokenizer differs from the published one."
        )
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
