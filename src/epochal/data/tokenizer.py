"""Load a tokenizer, or train one.

Tokenizers come from a path, the hub, a package or another token store.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from epochal.data.documents import package_folder
from epochal.ranges import Items, Range, Ranged


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


def load_tokenizer(config: TokenizerConfig, training_texts: Iterator[str], stores: Path) -> Any:
    """Load or train a `tokenizers.Tokenizer`; `training_texts` is read only for training.

    `stores` is the folder of all token stores. Raises ValueError if a package, path or store is missing.
    """
    if config.train is not None:
        tokenizer = _train(config.train, config.specials, training_texts)
    elif config.package is not None:
        tokenizer = _from_package(config)
    elif config.store is not None:
        tokenizer = _from_store(stores / config.store)
    else:
        tokenizer = _from_path(config)
    tokenizer.add_special_tokens([token for token in config.specials if tokenizer.token_to_id(token) is None])
    return tokenizer


def _train(size: int, specials: tuple[str, ...], texts: Iterator[str]) -> Any:
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so no text has an unknown token
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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
    from tokenizers import Tokenizer

    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"the token store {folder.name!r} does not exist yet; run epochal data {folder.name} first.")
    return Tokenizer.from_file(str(path))


def _from_path(config: TokenizerConfig) -> Any:
    from tokenizers import Tokenizer

    path = Path(str(config.path))
    if path.is_file():
        return Tokenizer.from_file(str(path))
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(config.path, revision=config.revision or "main")
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {config.path!r} cannot be loaded ({str(error).splitlines()[0]}).") from None
    return fast.backend_tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, *, bos: str, eos: str | None) -> None:
    """Write a tokenizer as a Hugging Face folder that `AutoTokenizer` loads."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos or bos)
    fast.save_pretrained(str(folder))
