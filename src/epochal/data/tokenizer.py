"""Open a tokenizer, or train one; compare two by the ids of their tokens.

Tokenizers come from a path, the hub, a package or another token store.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from epochal.data.documents import package_folder
from epochal.ranges import Items, Range, Ranged

# Training takes a time that grows with the square of a run without white space, or of white space; longer ones are cut.
LONGEST_RUN = 1000


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Ranged):
    """Origin of a tokenizer: exactly one of `path`, `package`, `store` and `train`."""

    path: str | None = None  # a folder, a tokenizer.json or a hub name
    revision: str | None = None  # of a hub name
    package: str | None = None  # an installed package with GPT-2 style files
    install: str | None = None  # pip requirement of the package, for error messages
    vocabulary: str | None = None  # this and the next: files inside the package
    merges: str | None = None
    store: str | None = None  # another data set whose tokenizer is shared, for continued pre-training
    train: Annotated[int, Range(256, 2**22)] | None = None  # vocabulary size of a byte-level BPE to train
    # added to the vocabulary if missing; sampled text starts with the first one
    specials: Annotated[tuple[str, ...], Items()] = ("<|bos|>", "<|eos|>")

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(value is not None for value in (self.path, self.package, self.store, self.train)) != 1:
            raise ValueError("a tokenizer needs exactly one of path, package, store and train; set one of them.")
        if self.train is not None and self.train < 256 + len(self.specials):
            raise ValueError(
                f"train must be at least {256 + len(self.specials)} (256 bytes and {len(self.specials)} special tokens), "
                f"got {self.train}."
            )


def load_tokenizer(
    config: TokenizerConfig, training_texts: Iterator[str], stores: Path, notes: list[str] | None = None
) -> Any:
    """Load or train a `tokenizers.Tokenizer`; `training_texts` is read only for training.

    `stores` is the folder of all token stores. What was turned off is added to `notes`, in sentences. Raises ValueError if
    a package, path or store is missing.
    """
    notes = [] if notes is None else notes
    if config.train is not None:
        tokenizer = _train(config.train, config.specials, training_texts, notes)
    elif config.package is not None:
        tokenizer = _from_package(config)
    elif config.store is not None:
        tokenizer = _from_store(stores / config.store)
    else:
        tokenizer = open_tokenizer(str(config.path), revision=config.revision, notes=notes)
    # A token of the vocabulary that is not special would be spelled letter by letter in `before`, and be read in a text.
    # Those of packages stay as they are, because committed records were made so; `prepare` says it.
    missing = [token for token in config.specials if config.package is None or tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(missing)
    ids = list(tokenizer.get_vocab().values())
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"the tokenizer has gaps between its ids, so the new special tokens {', '.join(config.specials)} would share ids with "
            "others; name specials that it has."
        )
    return tokenizer


# --- the door ---------------------------------------------------------------------------------------------------------


def open_tokenizer(path: str | Path, *, revision: str | None = None, notes: list[str] | None = None) -> Any:
    """Open a tokenizer (a tokenizer.json, a folder or a hub name) that changes no text.

    Turned off: truncation, padding, the tokens of a post-processor, and random merges (BPE dropout). A normalizer is kept,
    as part of the tokenizer. Each is said in `notes`. Raises ValueError if there is no tokenizer, or it needs code of its
    folder.
    """
    table, notes = _read(path, revision), [] if notes is None else notes
    model = table.get("model") or {}
    for key in ("truncation", "padding"):
        if table.get(key) is not None:
            table[key] = None
            notes.append(f"the {key} of tokenizer {path} is turned off")
    if _adds_tokens(table.get("post_processor")):
        table["post_processor"] = None
        notes.append(
            f"the tokens that tokenizer {path} adds to each text are turned off; documents get before and after"
        )
    if model.get("dropout"):
        model["dropout"] = None
        notes.append(f"the random merges (dropout) of tokenizer {path} are turned off")
    if table.get("normalizer") is not None:
        notes.append(
            f"tokenizer {path} changes text by its normalizer {table['normalizer'].get('type')}, which is kept"
        )
    if _drops_characters(table):
        notes.append(f"tokenizer {path} has no token for unknown characters: it leaves them out of the text")
    return _build(table, path)


def _build(table: dict[str, Any], path: str | Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(table))
    except Exception as error:  # tokenizers raises the bare class
        raise ValueError(f"{path} is not a tokenizer that can be read ({error}); give another.") from None


def _read(path: str | Path, revision: str | None) -> dict[str, Any]:
    """Return the content of tokenizer.json of a file, a folder or a hub name."""
    place = Path(path).expanduser()
    if place.is_dir() and (place / "tokenizer.json").is_file():
        _check_own_code(place)
        place = place / "tokenizer.json"
    text = place.read_text(encoding="utf-8") if place.is_file() else _converted(path, revision)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}); give another tokenizer.json.") from None
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        raise ValueError(f"{place} is not a tokenizer.json: it has no model; give the one of a fast tokenizer.")
    return table


def _check_own_code(folder: Path) -> None:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and "auto_map" in config:
        raise ValueError(
            f"{folder}/tokenizer_config.json names code of its own (auto_map), which is never run; remove the key if "
            "tokenizer.json alone is the tokenizer."
        )


def _converted(path: str | Path, revision: str | None) -> str:
    """Return the tokenizer.json of a hub name, or of a folder with older files."""
    fast = auto_tokenizer(path, revision=revision)
    if getattr(fast, "backend_tokenizer", None) is None:
        raise ValueError(f"tokenizer {str(path)!r} has no fast version (tokenizer.json); give another.")
    return str(fast.backend_tokenizer.to_str())


def auto_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """Open a tokenizer with transformers; it neither cuts nor pads, and code of its folder is not run.

    Raises ValueError if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().exists() else str(path),
            revision=revision or "main",
            trust_remote_code=False,
        )
    except Exception as error:  # the libraries below raise whatever a damaged file leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            reason = "it needs code of its own, which is never run"
        raise ValueError(f"tokenizer {str(path)!r} cannot be loaded ({reason}); give another.") from None
    backend = getattr(fast, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return fast


def _adds_tokens(post: Any) -> bool:
    """Whether a post-processor adds tokens; that of byte-level BPE only moves offsets."""
    if not isinstance(post, dict) or post.get("type") == "ByteLevel":
        return False
    if post.get("type") == "Sequence":
        return any(map(_adds_tokens, post.get("processors", ())))
    if post.get("type") == "TemplateProcessing":
        return any("SpecialToken" in piece for key in ("single", "pair") for piece in post.get(key, ()))
    return True


def _drops_characters(table: dict[str, Any]) -> bool:
    """Whether characters outside of the vocabulary vanish."""
    model = table["model"]
    if model.get("unk_token") or model.get("unk_id") is not None or model.get("byte_fallback"):
        return False
    return '"ByteLevel"' not in json.dumps([table.get("pre_tokenizer"), table.get("normalizer")])


# --- identity ---------------------------------------------------------------------------------------------------------


def vocab_size(tokenizer: Any) -> int:
    """Return the largest id of a tokenizer, plus one: the rows that an embedding needs."""
    # Not the number of tokens: ids may have gaps.
    return int(max(tokenizer.get_vocab().values())) + 1


def vocabulary_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of the map from token to id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def vocabulary_of(folder: Path) -> dict[str, int]:
    """Return the map from token to id of a model or tokenizer folder; raises ValueError without a tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, so its vocabulary cannot be compared; copy it there.")
    stat = path.stat()
    return _vocabulary(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)  # members of an ensemble are compared one after another
def _vocabulary(path: Path, inode: int, mtime_ns: int, size: int) -> dict[str, int]:
    vocabulary: dict[str, int] = open_tokenizer(path).get_vocab()
    return vocabulary


def vocabulary_difference(one: Path, other: Path) -> str | None:
    """Describe how the vocabularies of two folders differ; None if each token has the same id in both.

    Raises ValueError if a folder has no tokenizer.
    """
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None  # the usual case, without reading 100,000 tokens
    first, second = vocabulary_of(one), vocabulary_of(other)
    if first == second:
        return None
    differing = sorted(first.items() ^ second.items(), key=lambda item: item[1])
    token = differing[0][0]
    return (
        f"{len({name for name, _ in differing})} tokens differ, for example {token!r}, which has id "
        f"{first.get(token, 'none')} in {one} and {second.get(token, 'none')} in {other}"
    )


# --- training and files -----------------------------------------------------------------------------------------------


def _train(size: int, specials: tuple[str, ...], texts: Iterator[str], notes: list[str]) -> Any:
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so no text has an unknown token
        show_progress=False,
    )
    cut = 0

    def pieces() -> Iterator[str]:
        nonlocal cut
        for text in texts:
            parts = short_runs(text)
            cut += len(parts) > 1
            yield from parts

    tokenizer.train_from_iterator(pieces(), trainer)
    if cut:
        notes.append(
            f"{cut:,} training documents have more than {LONGEST_RUN:,} characters without white space, or only of it, in a "
            "row; such runs were cut for the training of the tokenizer, not in the text"
        )
    return tokenizer


def short_runs(text: str) -> list[str]:
    """Cut a text within long runs, of letters or of white space.

    The pieces give the text again; no run in one has more than `LONGEST_RUN` characters.
    """
    if len(text) <= LONGEST_RUN:
        return [text]
    parts, start = [], 0
    for run in re.finditer(rf"\S{{{LONGEST_RUN + 1},}}|\s{{{LONGEST_RUN + 1},}}", text):
        for place in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            parts.append(text[start:place])
            start = place
    return [*parts, text[start:]]


def _from_package(config: TokenizerConfig) -> Any:
    from tokenizers import models

    folder = package_folder(str(config.package), config.install)
    vocabulary, merges = folder / str(config.vocabulary), folder / str(config.merges)
    for path in (vocabulary, merges):
        if not path.is_file():
            raise ValueError(f"package {config.package!r} has no file {path.name}; check vocabulary and merges.")
    return _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    # As GPT-2: no space is added in front of a document.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_store(folder: Path) -> Any:
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        raise ValueError(f"the token store {folder.name!r} does not exist yet; run epochal data {folder.name} first.")
    return open_tokenizer(folder / "tokenizer")


def save_tokenizer(tokenizer: Any, folder: Path, *, bos: str, eos: str | None) -> None:
    """Write a tokenizer as a Hugging Face folder that `AutoTokenizer` loads."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos or bos)
    fast.save_pretrained(str(folder))
