"""Build a token store from text (`epochal data CONFIG`): deduplicate, split by document, tokenize, shuffle once."""

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

# Documents per call of the tokenizer.
CHUNK = 512

# Upper bound on the average length of a token of prose; typical are 4 to 5.
MAX_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Split of documents into training, validation and test.

    by="hash": by content hash. by="stream": the first whole documents that reach `validation_tokens` are validation, the
    next that reach `test_tokens` are test, the rest is training.
    """

    by: str = "hash"
    validation: float = 0.05  # this and the next: fractions of all documents, for "hash"
    test: float = 0.05
    validation_tokens: int = 0  # this and the next: for "stream"
    test_tokens: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("hash", "stream"):
            raise ValueError(f"by must be hash or stream, got {self.by!r}.")
        if self.by == "hash" and not (self.validation > 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError(
                f"validation {self.validation} and test {self.test} leave no training text; give fractions with a sum below 1."
            )
        if self.by == "stream" and self.validation_tokens < 1:
            raise ValueError("by = 'stream' needs validation_tokens, a positive number of tokens.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set, `configs/data/<name>.toml`: the documents of `source`, then of each source in `more`.

    Special tokens in the text itself are encoded as plain text.
    """

    licence: str
    source: Source
    tokenizer: TokenizerConfig
    more: tuple[Source, ...] = ()  # further sources, read after the first
    split: SplitConfig = field(default_factory=SplitConfig)
    before: str = "<|bos|>"  # put in front of each document; may contain special tokens
    after: str = "<|eos|>"  # the same, behind each document
    train_tokens: int = 0  # reading stops once the training split holds so many (0: read everything)
    shuffle: bool = True  # False keeps the order of the source
    shuffle_seed: int = 0
    sha256: str | None = None  # expected hash of the training token file, if known


# --- the build --------------------------------------------------------------------------------------------------------


def prepare(name: str, data_folder: Path) -> TokenStore:
    """Build the token store of a data config, or open it if it exists.

    Raises ValueError for bad input. An interrupted build leaves nothing behind.
    """
    path = find_config("data", name, ".toml")
    folder = data_folder / path.stem
    if folder.exists():
        return TokenStore.open(folder, config_hash=config_hash(path))
    config = load_toml(path, DataConfig)
    data_folder.mkdir(parents=True, exist_ok=True)
    lock_path = data_folder / f".{path.stem}.lock"
    with lock_path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first, then opens its store
        try:
            if not folder.exists():
                with replaced_folder(folder) as temporary:
                    _build(config, temporary, path)
        finally:
            lock_path.unlink(missing_ok=True)
    return TokenStore.open(folder, config_hash=config_hash(path))


def content_hash(text: str) -> int:
    """Return 64 bits of the SHA-256 of a document's text."""
    # "surrogatepass": text from JSON may contain unpaired surrogates, which are not valid UTF-8.
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
            # Held-out splits keep their order, since they are always read whole.
            order = np.random.default_rng(config.shuffle_seed) if config.shuffle and split == "train" else None
            writers[split].close(order)
    if not writers["train"].lengths or not writers["validation"].lengths:
        empty = "training" if not writers["train"].lengths else "validation"
        raise ValueError(f"{path}: the {empty} split has no documents; give more text or change the split.")
    save_tokenizer(tokenizer, folder / "tokenizer", bos=config.tokenizer.specials[0], eos=_eos(config))
    _write_meta(config, folder, path, tokenizer, writers, counts)


def _eos(config: DataConfig) -> str | None:
    """Return the special token in `after`; None if documents end without one."""
    return next((token for token in config.tokenizer.specials if token in config.after), None)


def _dtype(tokenizer: Any) -> np.dtype[Any]:
    # Half the disk for vocabularies of at most 65,536 tokens.
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)


def _split_of(digest: int, config: SplitConfig, written: dict[str, int]) -> str:
    """Choose the split of a document by its hash or the tokens `written`."""
    if config.by == "stream":
        if written["validation"] < config.validation_tokens:
            return "validation"
        return "test" if written["test"] < config.test_tokens else "train"
    # A function of the content alone: a document keeps its split when text is added.
    uniform = digest / 2**64
    if uniform < config.test:
        return "test"
    return "validation" if uniform < config.test + config.validation else "train"


def _unique(config: DataConfig, counts: dict[str, int]) -> Iterator[tuple[int, str]]:
    """Yield (content hash, text) of each distinct document; add blank ones and duplicates to `counts`."""
    seen: set[int] = set()
    for text in chain.from_iterable(read_documents(source) for source in (config.source, *config.more)):
        digest = content_hash(text)
        if not text.strip():
            counts["blank"] += 1
        elif digest in seen:
            counts["duplicates"] += 1
        else:
            seen.add(digest)
            yield digest, text


def _training_texts(config: DataConfig) -> Iterator[str]:
    """Yield the training documents, the only ones a tokenizer is trained on."""
    split, counts = config.split, {"blank": 0, "duplicates": 0}
    by_stream = split.by == "stream"
    # Tokens cannot be counted without a tokenizer, so skip more characters than the held-out tokens can hold.
    skip = MAX_CHARACTERS_PER_TOKEN * (split.validation_tokens + split.test_tokens) if by_stream else 0
    for digest, text in _unique(config, counts):
        if skip > 0:
            skip -= len(text)
        elif by_stream or _split_of(digest, split, {}) == "train":
            yield text


def _tokenize(config: DataConfig, tokenizer: Any, writers: dict[str, "_Writer"], advance: Any) -> dict[str, int]:
    """Encode all documents and append each to its split; return the counts of dropped documents."""
    counts = {"blank": 0, "duplicates": 0}
    before = tokenizer.encode(config.before, add_special_tokens=False).ids if config.before else []
    after = tokenizer.encode(config.after, add_special_tokens=False).ids if config.after else []
    tokenizer.encode_special_tokens = True  # special tokens in a text are encoded as plain text
    documents = _unique(config, counts)
    while chunk := list(islice(documents, CHUNK)):
        encodings = tokenizer.encode_batch([text for _, text in chunk], add_special_tokens=False)
        for (digest, text), encoding in zip(chunk, encodings, strict=True):
            # Counted in the inner loop: a split may fill up within a chunk.
            written = {split: writer.tokens for split, writer in writers.items()}
            split = _split_of(digest, config.split, written)
            writers[split].append(digest, [*before, *encoding.ids, *after])
            writers[split].bytes += len(text.encode("utf-8", "replace"))
        advance(len(chunk))
        if config.train_tokens and writers["train"].tokens >= config.train_tokens:
            break
    tokenizer.encode_special_tokens = False
    return counts


# --- files ------------------------------------------------------------------------------------------------------------


class _Writer:
    """Appends the documents of one split to a file; `close` writes the final order, lengths and hashes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.path = folder / f"{split}.bin"
        self.lengths: list[int] = []
        self.hashes: list[int] = []
        self.tokens = 0
        self.bytes = 0  # of the text, in UTF-8
        self._file: BinaryIO = self.path.open("wb")

    def append(self, digest: int, ids: list[int]) -> None:
        self._file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.lengths.append(len(ids))
        self.hashes.append(digest)
        self.tokens += len(ids)

    def close(self, shuffle: np.random.Generator | None) -> None:
        self._file.close()
        lengths = np.asarray(self.lengths, dtype=np.int64)
        hashes = np.asarray(self.hashes, dtype=np.uint64)
        if shuffle is not None and len(lengths):
            # Shuffled once: runs share the first D tokens of this order, so a smaller subset is part of every
            # larger one.
            order = shuffle.permutation(len(lengths))
            self._reorder(order, lengths)
            lengths, hashes = lengths[order], hashes[order]
        np.save(self.folder / f"{self.split}.lengths.npy", lengths)
        np.save(self.folder / f"{self.split}.hashes.npy", hashes)

    def _reorder(self, order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        """Rewrite the token file with its documents in `order`."""
        ends = np.cumsum(lengths)
        # Memory-mapped, because the file may be larger than memory.
        source = np.memmap(self.path, dtype=self.dtype, mode="r")
        shuffled = self.path.with_suffix(".shuffled")
        with shuffled.open("wb") as file:
            for index in order:
                file.write(source[ends[index] - lengths[index] : ends[index]].tobytes())
        shuffled.replace(self.path)


def _write_meta(
    config: DataConfig, folder: Path, path: Path, tokenizer: Any, writers: dict[str, _Writer], counts: dict[str, int]
) -> None:
    # Before meta.json is written, which cannot contain its hash.
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
        "bytes": {split: writer.bytes for split, writer in writers.items()},
        "dropped": counts,
        "files": {str(item.relative_to(folder)): file_hash(item) for item in files},
    }
    if config.sha256 is not None and meta["files"]["train.bin"] != config.sha256:
        raise ValueError(
            f"{path}: sha256 of the training tokens must be {config.sha256}, got {meta['files']['train.bin']}; "
            "the source or the tokenizer differs from the published one."
        )
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
