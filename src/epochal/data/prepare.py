"""Build a token store from text (`epochal data CONFIG`): deduplicate, split by document, tokenize, shuffle once."""

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np

from epochal.config import find_config, load_toml, replaced_folder, to_table
from epochal.data.documents import Source, read_documents, source_paths
from epochal.data.store import META_VERSION, SPLITS, TokenStore, write_meta
from epochal.data.text import Reading, content_hash, normal_form
from epochal.data.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer, vocab_size, vocabulary_hash
from epochal.ranges import OneOf, Ranged, Seed, Share, TokensOrNone
from epochal.records import file_hash
from epochal.run import config_hash

# Documents per call of the tokenizer.
CHUNK = 512

# Upper bound on the average length of a token of prose; typical are 4 to 5.
MAX_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Ranged):
    """Split of documents into training, validation and test.

    by="hash": by content hash. by="stream": the first whole documents that reach `validation_tokens` are validation, the
    next that reach `test_tokens` are test, the rest is training.
    """

    by: Annotated[str, OneOf(("hash", "stream"))] = "hash"
    validation: Share = 0.05  # this and the next: fractions of all documents, for "hash"
    test: Share = 0.05
    validation_tokens: TokensOrNone = 0  # this and the next: for "stream"
    test_tokens: TokensOrNone = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "hash" and not (self.validation > 0 and self.validation + self.test < 1):
            raise ValueError(
                f"validation {self.validation} and test {self.test} leave no training text; give fractions with a sum below 1."
            )
        if self.by == "stream" and self.validation_tokens < 1:
            raise ValueError("by = 'stream' needs validation_tokens, a positive number of tokens.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Ranged):
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
    train_tokens: TokensOrNone = 0  # reading stops once the training split holds so many (0: read everything)
    shuffle: bool = True  # False keeps the order of the source
    shuffle_seed: Seed = 0
    sha256: str | None = None  # expected hash of the training token file, if known


# --- the build --------------------------------------------------------------------------------------------------------


def prepare(name: str, data_folder: Path) -> TokenStore:
    """Build the token store of a data config, or open it if it exists.

    Raises ValueError for bad input, and if the files of the config are not those the store was built from. An interrupted
    build leaves no store behind. Of several starts one builds, the others wait for it.
    """
    path = find_config("data", name, ".toml")
    config, folder = load_toml(path, DataConfig), data_folder / path.stem
    if not folder.exists():
        data_folder.mkdir(parents=True, exist_ok=True)
        with _claimed(data_folder / ".locks" / f"{path.stem}.lock"):
            if not folder.exists():
                with replaced_folder(folder) as temporary:
                    _build(config, temporary, path)
    store = TokenStore.open(folder, config_hash=config_hash(path))
    _check_sources(config, store)
    return store


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Wait for the exclusive claim on a store, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # As for jobs: the kernel releases a lock when its process ends, and the file is never deleted, since otherwise two
    # processes could lock two files of the same name.
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {path.stem}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be locked ({error.strerror}), so two processes could write one store; prepare the data in a "
                "folder on a local disk, then copy it."
            ) from None
        yield


def _sizes(config: DataConfig) -> dict[str, int]:
    """Return the sizes of the files named by a config; those of packages and the hub have a version instead."""
    local = [source for source in (config.source, *config.more) if source.files]
    return {str(path): path.stat().st_size for source in local for path in source_paths(source)}


def _check_sources(config: DataConfig, store: TokenStore) -> None:
    """Raise ValueError if a config's files are not those of its store."""
    try:
        now = _sizes(config)
    except (OSError, ValueError):
        return  # a machine may have the store without the text
    before = store.meta["sources"]
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) != before.get(name):
            what = "is new" if name not in before else "is gone" if name not in now else "has another size"
            raise ValueError(
                f"{store.folder} was built from other files: {name} {what}; delete {store.folder} and build it again."
            )


def _build(config: DataConfig, folder: Path, path: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    sizes, notes = _sizes(config), list[str]()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{path.stem}: reading", total=None)
        texts = _advancing(
            _training_texts(config),
            lambda: progress.advance(task),
            lambda: progress.update(task, description=f"{path.stem}: training the tokenizer"),
        )
        tokenizer = load_tokenizer(config.tokenizer, texts, folder.parent, notes)
        progress.update(task, description=f"{path.stem}: tokenizing", completed=0)
        writers = {split: _Writer(folder, split, _dtype(tokenizer)) for split in SPLITS}
        counts = _tokenize(config, tokenizer, writers, lambda n: progress.advance(task, n))
        for split in SPLITS:
            # Held-out splits keep their order, since they are always read whole.
            order = np.random.default_rng(config.shuffle_seed) if config.shuffle and split == "train" else None
            writers[split].close(order)
    if not writers["train"].lengths or not writers["validation"].lengths:
        empty = "training" if not writers["train"].lengths else "validation"
        lost = counts["first"].get("separators that occur nowhere")  # then each file is one document
        why = "" if lost is None else f", since the separator occurs nowhere in {lost}"
        raise ValueError(f"{path}: the {empty} split has no documents{why}; give more text or change the split.")
    # Text is read twice, for the tokenizer and for the tokens.
    if _sizes(config) != sizes:
        raise ValueError(f"{path}: its files changed while they were read; run again when they are complete.")
    notes += _spelled_specials(config, tokenizer)
    save_tokenizer(tokenizer, folder / "tokenizer", bos=config.tokenizer.specials[0], eos=_eos(config))
    _write_meta(config, folder, path, tokenizer, writers, {**counts, "sources": sizes, "notes": notes})


def _spelled_specials(config: DataConfig, tokenizer: Any) -> list[str]:
    """Say which special tokens in `before` and `after` are written as ordinary text."""
    notes = []
    for key, text in (("before", config.before), ("after", config.after)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        notes += [
            f"{token} in {key} is written as {len(ids)} ordinary tokens: the tokenizer has a token of that name, but not as a "
            "special one"
            for token in config.tokenizer.specials
            if token in text and tokenizer.token_to_id(token) not in ids
        ]
    return notes


def _advancing(texts: Iterator[str], advance: Callable[[], None], end: Callable[[], None]) -> Iterator[str]:
    for text in texts:
        advance()
        yield text
    end()


def _eos(config: DataConfig) -> str | None:
    """Return the special token in `after`; None if documents end without one."""
    return next((token for token in config.tokenizer.specials if token in config.after), None)


def _dtype(tokenizer: Any) -> np.dtype[Any]:
    # Half the disk for vocabularies of at most 65,536 tokens.
    return np.dtype(np.uint16 if vocab_size(tokenizer) <= 2**16 else np.uint32)


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


@dataclass(frozen=True)
class _Document:
    """A document as it is tokenized, and two hashes: that of its text, and that of what its copies have in common."""

    text: str
    digest: int
    normal: int


def _unique(config: DataConfig, dropped: dict[str, int], reading: Reading) -> Iterator[_Document]:
    """Yield the first of all documents with the same normal form; add blank ones and copies to `dropped`."""
    seen: set[int] = set()
    for text in chain.from_iterable(read_documents(source, reading) for source in (config.source, *config.more)):
        normal = normal_form(text)
        key = content_hash(normal)
        if not normal:
            dropped["blank"] += 1
        elif key in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(key)
            # The split follows the text as it is: committed stores keep their splits.
            yield _Document(text, content_hash(text), key)


def _training_texts(config: DataConfig) -> Iterator[str]:
    """Yield the training documents, the only ones a tokenizer is trained on."""
    split, dropped = config.split, {"blank": 0, "duplicates": 0}
    by_stream = split.by == "stream"
    # Tokens cannot be counted without a tokenizer, so skip more characters than the held-out tokens can hold.
    skip = MAX_CHARACTERS_PER_TOKEN * (split.validation_tokens + split.test_tokens) if by_stream else 0
    for document in _unique(config, dropped, Reading()):
        if skip > 0:
            skip -= len(document.text)
        elif by_stream or _split_of(document.digest, split, {}) == "train":
            yield document.text


def _tokenize(config: DataConfig, tokenizer: Any, writers: dict[str, "_Writer"], advance: Any) -> dict[str, Any]:
    """Encode all documents and append each to its split; return the counts of what was changed and dropped."""
    dropped, reading = {"blank": 0, "duplicates": 0}, Reading()
    before = tokenizer.encode(config.before, add_special_tokens=False).ids if config.before else []
    after = tokenizer.encode(config.after, add_special_tokens=False).ids if config.after else []
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    tokenizer.encode_special_tokens = True  # special tokens in a text are encoded as plain text
    documents = _unique(config, dropped, reading)
    while chunk := list(islice(documents, CHUNK)):
        encodings = tokenizer.encode_batch([document.text for document in chunk], add_special_tokens=False)
        for document, encoding in zip(chunk, encodings, strict=True):
            # Counted in the inner loop: a split may fill up within a chunk.
            written = {split: writer.tokens for split, writer in writers.items()}
            split = _split_of(document.digest, config.split, written)
            ids = encoding.ids
            if unknown is not None and unknown in ids:
                reading.note("characters that the tokenizer has no token for", f"the {split} split", ids.count(unknown))
            writers[split].append(document.normal, [*before, *ids, *after])
            writers[split].bytes += len(document.text.encode("utf-8", "replace"))
        advance(len(chunk))
        if config.train_tokens and writers["train"].tokens >= config.train_tokens:
            break
    tokenizer.encode_special_tokens = False
    return {"dropped": dropped, "changed": dict(reading.counts), "first": reading.first}


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
    config: DataConfig, folder: Path, path: Path, tokenizer: Any, writers: dict[str, _Writer], counts: dict[str, Any]
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
        "vocab_size": vocab_size(tokenizer),
        "vocabulary": vocabulary_hash(tokenizer),
        "bos": tokenizer.token_to_id(config.tokenizer.specials[0]),
        "eos": tokenizer.token_to_id(_eos(config) or config.tokenizer.specials[0]),
        "documents": {split: len(writer.lengths) for split, writer in writers.items()},
        "tokens": {split: writer.tokens for split, writer in writers.items()},
        **counts,
        "bytes": {split: writer.bytes for split, writer in writers.items()},
        "files": {str(item.relative_to(folder)): file_hash(item) for item in files},
    }
    if config.sha256 is not None and meta["files"]["train.bin"] != config.sha256:
        raise ValueError(
            f"{path}: sha256 of the training tokens must be {config.sha256}, got {meta['files']['train.bin']}; "
            "the source or the tokenizer differs from the published one."
        )
    write_meta(folder, meta)
