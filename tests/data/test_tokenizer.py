"""Tokenizers are opened without what cuts, pads or adds, and compared by the ids of their tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from epochal.data import tokenizer as module
from epochal.data.prepare import prepare
from epochal.data.tokenizer import (
    LONGEST_RUN,
    TokenizerConfig,
    load_tokenizer,
    open_tokenizer,
    short_runs,
    vocab_size,
    vocabulary_difference,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer.json of a byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("trained")
    load_tokenizer(TokenizerConfig(train=300), iter(tiny.documents(60)), folder).save(str(folder / "tokenizer.json"))
    return folder


def changed(trained: Path, folder: Path, **changes: Any) -> Path:
    """Write a copy of the tokenizer with other keys; those of the model begin with model_."""
    table = json.loads((trained / "tokenizer.json").read_text())
    for key, value in changes.items():
        place = table["model"] if key.startswith("model_") else table
        place[key.removeprefix("model_")] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


def test_a_store_does_not_depend_on_truncation_padding_added_tokens_and_random_merges(
    trained: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=64)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    (tmp_path / "cut").mkdir()
    tokenizer.save(str(tmp_path / "cut" / "tokenizer.json"))
    changed(tmp_path / "cut", tmp_path / "cut", model_dropout=0.5)
    stores = []
    for folder in (trained, tmp_path / "cut"):
        path = f'path = "{folder}"'
        config = tiny.write_text(tmp_path / folder.name, tiny.documents(60), tokenizer=path)
        stores.append(prepare(str(config), tmp_path / folder.name / "data"))
    plain, cut = stores
    assert plain.meta["files"] == cut.meta["files"], "the stored tokenizer and all tokens must be the same bytes"
    assert plain.meta["notes"] == []
    notes = " ".join(cut.meta["notes"])
    for what in ("the truncation of", "the padding of", "adds to each text", "random merges"):
        assert what in notes
    assert (tmp_path / "cut" / "tokenizer.json").read_text().find('"max_length": 32') > 0, "the original stays"


def test_a_normalizer_is_kept_and_said(trained: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    notes: list[str] = []
    opened = open_tokenizer(tmp_path, notes=notes)
    assert opened.encode("KING").ids == opened.encode("king").ids
    assert notes == [f"tokenizer {tmp_path} changes text by its normalizer Lowercase, which is kept"]


def test_characters_without_a_token_are_counted_or_said(tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyzACS .0123456789\u2581?")}
    for unknown, counted in (("?", True), (None, False)):
        tokenizer = Tokenizer(models.BPE({**letters}, [], unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        path = tmp_path / f"{unknown is None}.json"
        tokenizer.save(str(path))
        texts = [f"{text} 日本" for text in tiny.documents(60)]
        config = tiny.write_text(tmp_path / path.stem, texts, tokenizer=f'path = "{path}"')
        meta = prepare(str(config), tmp_path / path.stem / "data").meta
        assert meta["changed"].get("characters that the tokenizer has no token for", 0) == 120 * counted
        assert any("leaves them out of the text" in note for note in meta["notes"]) != counted


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {}}', "[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"is not (valid JSON|a tokenizer)"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_a_folder_that_names_its_own_code_is_refused_without_a_question(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    folder = changed(trained, tmp_path / "with")
    for place in (folder, tmp_path / "without"):
        place.mkdir(exist_ok=True)
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        (place / "evil.py").write_text("raise SystemExit('code of the folder ran')")
        with pytest.raises(ValueError, match=r"code of its own|cannot be loaded"):
            open_tokenizer(place)


def test_vocabularies_are_compared_by_ids_not_by_bytes_or_size(trained: Path, tmp_path: Path) -> None:
    compact = changed(trained, tmp_path / "compact")
    assert (compact / "tokenizer.json").read_bytes() != (trained / "tokenizer.json").read_bytes()
    assert vocabulary_difference(trained, compact) is None
    vocabulary = json.loads((trained / "tokenizer.json").read_text())["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    other = changed(trained, tmp_path / "other", model_vocab=vocabulary)
    difference = vocabulary_difference(trained, other)
    assert difference is not None and difference.startswith("2 tokens differ, for example ")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        vocabulary_difference(trained, tmp_path)


def test_the_vocabulary_size_is_the_largest_id_plus_one(tmp_path: Path) -> None:
    letters = {letter: 2 * number for number, letter in enumerate("abc")}
    special = {"<|bos|>": 1, "<|eos|>": 3}
    tokenizer = Tokenizer(models.WordLevel({**letters, **special, "[UNK]": 70_000}, unk_token="[UNK]"))
    assert tokenizer.get_vocab_size() == 6 and vocab_size(tokenizer) == 70_001
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "gaps.json"))
    config = tiny.write_text(tmp_path, tiny.documents(60), tokenizer=f'path = "{tmp_path}/gaps.json"')
    store = prepare(str(config), tmp_path / "data")
    assert store.meta["dtype"] == "uint32" and store.vocab_size == 70_001
    assert store.tokens("train").max() == 70_000 and store.tokens("train")[0] == 1


def test_new_special_tokens_that_would_share_ids_are_refused(tmp_path: Path) -> None:
    """`tokenizers` numbers new tokens from the number of old ones on, whatever ids those have."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 4, "[UNK]": 9}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "gaps.json"))
    with pytest.raises(ValueError, match=r"gaps between its ids.*<\|bos\|>, <\|eos\|> would share ids"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "gaps.json")), iter(()), tmp_path)


def test_a_special_token_that_is_an_ordinary_one_of_the_vocabulary_becomes_special(
    trained: Path, tmp_path: Path
) -> None:
    folder = changed(trained, tmp_path / "plain", added_tokens=[])
    assert len(open_tokenizer(folder).encode("<|bos|>").ids) > 1, "its letters"
    config = tiny.write_text(tmp_path, tiny.documents(60), tokenizer=f'path = "{folder}"')
    store = prepare(str(config), tmp_path / "data")
    assert (store.tokens("train") == store.meta["bos"]).sum() == store.meta["documents"]["train"]


def test_a_special_token_of_a_package_that_is_written_as_text_is_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spelled_package").mkdir()
    (tmp_path / "spelled_package" / "__init__.py").touch()
    open_tokenizer(trained).model.save(str(tmp_path / "spelled_package"))
    monkeypatch.syspath_prepend(tmp_path)
    package = 'package = "spelled_package"\nvocabulary = "vocab.json"\nmerges = "merges.txt"'
    store = prepare(str(tiny.write_text(tmp_path, tiny.documents(60), tokenizer=package)), tmp_path / "data")
    assert [note[:20] for note in store.meta["notes"]] == ["<|bos|> in before is", "<|eos|> in after is "]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["x", "-x", " ", "\n", "x "]), st.integers(1, 3000)), max_size=5))
def test_long_runs_are_cut_without_loss(runs: list[tuple[str, int]]) -> None:
    text = "".join(piece * count for piece, count in runs)
    parts = short_runs(text)
    assert "".join(parts) == text
    for part in parts:
        words = part.split()
        assert all(len(word) <= LONGEST_RUN for word in words)
        spaces = "".join("x" if not letter.isspace() else " " for letter in part).split("x")
        assert all(len(blank) <= LONGEST_RUN for blank in spaces)
    assert len(parts) > 1 or len(text) <= LONGEST_RUN or all(len(word) <= LONGEST_RUN for word in text.split())


def test_the_training_of_a_tokenizer_sees_no_long_run_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    letters = "".join(rng.choice(list("abcd"), 5000))
    seen: list[str] = []
    monkeypatch.setattr(module, "_byte_level", lambda _: _Fake(seen))
    notes: list[str] = []
    module._train(300, ("<|bos|>",), iter(["short", letters]), notes)
    assert seen[0] == "short" and "".join(seen[1:]) == letters and max(map(len, seen)) == LONGEST_RUN
    assert notes and notes[0].startswith("1 training documents have more than 1,000 characters without white space")


class _Fake:
    """Stands for a tokenizer that only collects what it is trained on."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def train_from_iterator(self, texts: Any, _: Any) -> None:
        self.seen.extend(texts)
