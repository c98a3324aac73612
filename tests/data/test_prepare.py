"""Building a token store: deduplication, splits, tokenizers, damage and interruptions."""

import errno
import fcntl
import json
import queue
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from campaigns import Campaign
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from epochal.campaign.plan import store_vocab_size
from epochal.data import prepare as module
from epochal.data.prepare import prepare
from epochal.data.store import SPLITS, TokenStore, open_samples, write_meta
from epochal.data.text import content_hash, normal_form
from epochal.data.tokenizer import TokenizerConfig, load_tokenizer

CODE_WORD = "QZXJQZXJ"


def share(text: str) -> float:
    return content_hash(text) / 2**64


def texts_of(store: TokenStore, split: str) -> list[str]:
    """The decoded documents of a split, without start and end tokens."""
    tokenizer = Tokenizer.from_file(str(store.tokenizer_folder / "tokenizer.json"))
    tokens, ends = store.tokens(split), np.cumsum(store.lengths(split))
    pieces = [tokens[end - length : end] for end, length in zip(ends, store.lengths(split), strict=True)]
    for piece in pieces:
        assert piece[0] == store.meta["bos"] and piece[-1] == store.meta["eos"]
    return [tokenizer.decode(piece[1:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_documents_are_split_by_their_hash(tmp_path: Path) -> None:
    texts = tiny.documents()
    store = prepare(str(tiny.write_text(tmp_path, texts)), tmp_path / "data")
    expected = {
        "test": [text for text in texts if share(text) < 0.1],
        "validation": [text for text in texts if 0.1 <= share(text) < 0.2],
        "train": [text for text in texts if share(text) >= 0.2],
    }
    texts_by_split = {split: texts_of(store, split) for split in SPLITS}
    assert texts_by_split["validation"] == expected["validation"], "held-out text must keep the order of the source"
    assert texts_by_split["test"] == expected["test"]
    assert sorted(texts_by_split["train"]) == sorted(expected["train"])
    assert texts_by_split["train"] != expected["train"], "training documents must be shuffled"
    hashes = {split: np.load(store.folder / f"{split}.hashes.npy") for split in SPLITS}
    for split in SPLITS:
        assert hashes[split].tolist() == [content_hash(normal_form(text)) for text in texts_by_split[split]]
        assert store.meta["documents"][split] == len(texts_by_split[split])
        assert store.meta["tokens"][split] == len(store.tokens(split)) == store.lengths(split).sum()
    assert not np.intersect1d(hashes["train"], np.concatenate([hashes["validation"], hashes["test"]])).size


def test_duplicates_and_blank_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    texts = tiny.documents(60)
    plain = prepare(str(tiny.write_text(tmp_path / "plain", texts)), tmp_path / "plain" / "data")
    again = [*texts, texts[3], "  \n ", texts[3], texts[10]]
    store = prepare(str(tiny.write_text(tmp_path / "again", again)), tmp_path / "again" / "data")
    assert store.meta["dropped"] == {"blank": 1, "duplicates": 3}
    assert plain.meta["dropped"] == {"blank": 0, "duplicates": 0}
    for split in SPLITS:
        assert np.array_equal(plain.tokens(split), store.tokens(split))


def test_a_stream_split_holds_out_the_first_whole_documents(tmp_path: Path) -> None:
    texts = tiny.documents(80)
    split = 'by = "stream"\nvalidation_tokens = 300\ntest_tokens = 200'
    config = tiny.write_text(tmp_path, texts, split=split, top="shuffle = false")
    store = prepare(str(config), tmp_path / "data")
    assert [text for name in ("validation", "test", "train") for text in texts_of(store, name)] == texts
    for name, wanted in (("validation", 300), ("test", 200)):
        lengths = store.lengths(name)
        assert lengths.sum() >= wanted > lengths[:-1].sum()


def test_reading_stops_at_train_tokens(tmp_path: Path) -> None:
    config = tiny.write_text(tmp_path, tiny.documents(1500), top="train_tokens = 5000")
    store = prepare(str(config), tmp_path / "data")
    assert store.meta["tokens"]["train"] >= 5000
    assert sum(store.meta["documents"].values()) < 1500


@pytest.mark.parametrize("held_out", [True, False])
def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path: Path, held_out: bool) -> None:
    candidates = (f"{CODE_WORD} " * 20 + str(number) for number in range(1000))
    carriers = [text for text in candidates if (share(text) < 0.2) == held_out][:20]
    store = prepare(str(tiny.write_text(tmp_path, tiny.documents(60) + carriers)), tmp_path / "data")
    vocabulary = Tokenizer.from_file(str(store.tokenizer_folder / "tokenizer.json")).get_vocab()
    merged = [token for token in vocabulary if len(token) > 1 and set(token) & set(CODE_WORD)]
    assert (merged == []) == held_out, f"merged from the code word: {merged}"


def test_special_tokens_in_a_text_are_encoded_as_plain_text(tmp_path: Path) -> None:
    spelled = [f"{text} <|eos|> and <|bos|> again" for text in tiny.documents(60)]
    store = prepare(str(tiny.write_text(tmp_path, spelled)), tmp_path / "data")
    for split in SPLITS:
        tokens, documents = store.tokens(split), store.meta["documents"][split]
        assert (tokens == store.meta["bos"]).sum() == documents
        assert (tokens == store.meta["eos"]).sum() == documents
    assert sorted(text for split in SPLITS for text in texts_of(store, split)) == sorted(spelled)


def test_the_tokenizer_folder_loads_with_transformers(tmp_path: Path) -> None:
    _, store, _ = tiny.workspace(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_folder)
    assert tokenizer.bos_token_id == store.meta["bos"]
    assert tokenizer.eos_token_id == store.meta["eos"]
    assert len(tokenizer) == store.vocab_size == 300
    text = "And the king, naïve 日本\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_an_existing_store_is_opened_and_not_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.write_text(tmp_path, tiny.documents(60))
    store = prepare(str(config), tmp_path / "data")
    monkeypatch.setattr(module, "_build", None)
    again = prepare(str(config), tmp_path / "data")
    assert again.meta == store.meta
    assert np.array_equal(again.tokens("train"), store.tokens("train"))


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    config = tiny.write_text(tmp_path, tiny.documents(60))
    one, other = (prepare(str(config), tmp_path / name) for name in ("one", "other"))
    assert files_of(one.folder) == files_of(other.folder)


def test_a_store_of_another_config_is_refused(tmp_path: Path) -> None:
    prepare(str(tiny.write_text(tmp_path, tiny.documents(60))), tmp_path / "data")
    config = tiny.write_text(tmp_path, tiny.documents(60), top="shuffle_seed = 1")
    with pytest.raises(ValueError, match="built from another version of its config"):
        prepare(str(config), tmp_path / "data")


def test_a_damaged_or_missing_file_is_reported(tmp_path: Path) -> None:
    sound = prepare(str(tiny.write_text(tmp_path, tiny.documents(60))), tmp_path / "data").folder
    for number, name in enumerate(sorted(files_of(sound))):
        folder = tmp_path / f"copy{number}" / sound.name
        shutil.copytree(sound, folder)
        path = folder / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if name != "meta.json" else data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged; delete"):
            TokenStore.open(folder)
        path.unlink()
        with pytest.raises(ValueError, match="is not a token store" if name == "meta.json" else f"{name} is missing"):
            TokenStore.open(folder)


def test_a_document_in_two_splits_is_refused(tmp_path: Path) -> None:
    folder = prepare(str(tiny.write_text(tmp_path, tiny.documents(60))), tmp_path / "data").folder
    hashes = np.load(folder / "validation.hashes.npy")
    hashes[0] = np.load(folder / "train.hashes.npy")[0]
    np.save(folder / "validation.hashes.npy", hashes)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["validation.hashes.npy"] = module.file_hash(folder / "validation.hashes.npy")
    write_meta(folder, meta)
    with pytest.raises(ValueError, match="1 documents are in both train and validation"):
        TokenStore.open(folder)


def test_a_data_set_can_use_the_tokenizer_of_another(tmp_path: Path) -> None:
    second = tiny.write_text(tmp_path / "b", tiny.documents(60, seed=1), tokenizer='store = "tiny"')
    second = second.rename(second.with_name("second.toml"))
    with pytest.raises(ValueError, match="'tiny' does not exist yet; run epochal data tiny first"):
        prepare(str(second), tmp_path / "data")
    first = prepare(str(tiny.write_text(tmp_path / "a", tiny.documents(60))), tmp_path / "data")
    other = prepare(str(second), tmp_path / "data")
    files = [store.tokenizer_folder / "tokenizer.json" for store in (first, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert other.meta["tokens"]["train"] > 0


def test_a_tokenizer_from_package_files_equals_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_tokenizer(TokenizerConfig(train=300), iter(tiny.documents(60)), tmp_path)
    (tmp_path / "vocabulary_package").mkdir()
    (tmp_path / "vocabulary_package" / "__init__.py").touch()
    trained.model.save(str(tmp_path / "vocabulary_package"))
    monkeypatch.syspath_prepend(tmp_path)
    files = {"package": "vocabulary_package", "vocabulary": "vocab.json", "merges": "merges.txt"}
    loaded = load_tokenizer(TokenizerConfig(**files), iter(()), tmp_path)  # type: ignore[arg-type]
    for text in ("And the king", " and\n", "é ü"):
        assert loaded.encode(text).ids == trained.encode(text).ids
        assert loaded.decode(loaded.encode(text).ids) == text


def test_missing_special_tokens_are_appended_to_the_vocabulary(tmp_path: Path) -> None:
    original = load_tokenizer(TokenizerConfig(train=300), iter(tiny.documents(60)), tmp_path)
    original.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(path=str(tmp_path / "tokenizer.json"), specials=("<|eos|>", "<|pad|>"))
    loaded = load_tokenizer(config, iter(()), tmp_path)
    size = original.get_vocab_size()
    assert loaded.token_to_id("<|eos|>") == original.token_to_id("<|eos|>") and loaded.get_vocab_size() == size + 1
    assert loaded.encode("<|pad|><|eos|>").ids == [size, original.token_to_id("<|eos|>")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_prepare_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    config = tiny.write_text(tmp_path, tiny.documents(60))
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_tokenizer", interrupted)
        with pytest.raises(error):
            prepare(str(config), tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".locks"]
    assert prepare(str(config), tmp_path / "data").vocab_size == 300


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "no documents"),
        (["one"], {}, "no documents"),
        (["one"], {"tokenizer": "train = 100"}, "train must be an integer from 256"),
        (["one"], {"split": "validation = 1.5"}, "validation must be a number from 0 to 1, got 1.5"),
        (["one"], {"split": "validaton = 0.5"}, r"unknown key 'validaton' \(did you mean 'validation'\?\)"),
        (["one"], {"top": 'sha256 = "0"'}, "no documents"),
        (tiny.documents(60), {"top": 'sha256 = "0"'}, "differs from the published one"),
    ],
)
def test_a_bad_config_is_refused_and_leaves_nothing(
    tmp_path: Path, texts: list[str], changes: dict[str, str], message: str
) -> None:
    config = tiny.write_text(tmp_path, texts, **changes)
    with pytest.raises(ValueError, match=message):
        prepare(str(config), tmp_path / "data")
    assert not (tmp_path / "data").exists() or [path.name for path in (tmp_path / "data").iterdir()] == [".locks"]


# --- several starts, other sources, edited files -------------------------------------------------------------------------


def test_an_interrupted_a_waiting_and_a_new_start_build_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start fails while the second waits; the third comes while the second builds."""
    config = tiny.write_text(tmp_path, tiny.documents(60))
    alone = prepare(str(config), tmp_path / "alone").meta["files"]
    building, waiting, orders = queue.Queue[str](), queue.Queue[str](), queue.Queue[str]()
    real_build, real_lock, inside = module._build, fcntl.flock, threading.Semaphore(1)
    ends: dict[str, object] = {}

    def build(*arguments: Any) -> None:
        assert inside.acquire(blocking=False), "two processes build one store at the same time"
        building.put(threading.current_thread().name)
        order = orders.get(timeout=60)
        inside.release()
        if order == "fail":
            raise OSError("interrupted")
        real_build(*arguments)

    def lock(file: Any, how: int) -> None:
        try:
            real_lock(file, how)
        except BlockingIOError:
            waiting.put(threading.current_thread().name)
            raise

    def start() -> None:
        try:
            ends[threading.current_thread().name] = prepare(str(config), tmp_path / "data").meta["files"]
        except OSError as error:
            ends[threading.current_thread().name] = str(error)

    monkeypatch.setattr(module, "_build", build)
    monkeypatch.setattr(module.fcntl, "flock", lock)
    threads = [threading.Thread(target=start, name=name) for name in ("first", "second", "third")]
    threads[0].start()
    assert building.get(timeout=60) == "first"
    threads[1].start()
    assert waiting.get(timeout=60) == "second"
    orders.put("fail")
    assert building.get(timeout=60) == "second"
    threads[2].start()
    assert waiting.get(timeout=60) == "third"
    orders.put("build")
    for thread in threads:
        thread.join(timeout=60)
    assert ends == {"first": "interrupted", "second": alone, "third": alone}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".locks", "tiny"]


def test_a_folder_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    config = tiny.write_text(tmp_path, tiny.documents(60))
    with pytest.raises(ValueError, match=r"cannot be locked \(No locks available\).*on a local disk, then copy it"):
        prepare(str(config), tmp_path / "data")


def test_a_store_of_other_text_files_is_refused(tmp_path: Path) -> None:
    tiny.write_text(tmp_path, tiny.documents(60))
    config = tiny.write_config(tmp_path, f'files = ["{tmp_path}/*.txt"]\nseparator = "===="')
    store = prepare(str(config), tmp_path / "data")
    (tmp_path / "more.txt").write_text("one more")
    with pytest.raises(ValueError, match=r"built from other files: .*more\.txt is new; delete"):
        prepare(str(config), tmp_path / "data")
    (tmp_path / "more.txt").unlink()
    assert prepare(str(config), tmp_path / "data").meta == store.meta
    with (tmp_path / "corpus.txt").open("a") as file:
        file.write("!")
    with pytest.raises(ValueError, match=r"corpus\.txt has another size"):
        prepare(str(config), tmp_path / "data")
    (tmp_path / "corpus.txt").unlink()  # a machine may have the store without its text
    assert prepare(str(config), tmp_path / "data").meta == store.meta


def test_text_that_changes_between_the_two_passes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.write_text(tmp_path, tiny.documents(60))
    real = module.load_tokenizer

    def changing(*arguments: Any) -> Any:
        tokenizer = real(*arguments)
        tiny.write_text(tmp_path, tiny.documents(61))
        return tokenizer

    monkeypatch.setattr(module, "load_tokenizer", changing)
    with pytest.raises(ValueError, match="its files changed while they were read"):
        prepare(str(config), tmp_path / "data")
    assert not (tmp_path / "data" / "tiny").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "uint32"), ("vocab_size", 600), ("bos", 5), ("tokens", {}), ("files", {}), ("self", None)],
)
def test_an_edited_meta_file_is_noticed(campaign: Campaign, key: str, value: object) -> None:
    folder = campaign.workspace.data / "tiny"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta[key] != value
    (folder / "meta.json").write_text(json.dumps({**meta, key: value}))
    with pytest.raises(ValueError, match=r"meta\.json was edited or damaged: it does not match its own hash; delete"):
        TokenStore.open(folder)
    with pytest.raises(ValueError, match="was edited or damaged"):
        store_vocab_size(campaign.workspace, campaign.scale)
    (folder / "meta.json").write_text(json.dumps(meta))  # another layout of the same values
    assert TokenStore.open(folder).vocab_size == store_vocab_size(campaign.workspace, campaign.scale) == 300


@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 100_000, '{"version": 1}'])
def test_a_meta_file_of_another_type_is_one_sentence(campaign: Campaign, content: str) -> None:
    folder = campaign.workspace.data / "tiny"
    (folder / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"delete .*tiny and build it again"):
        TokenStore.open(folder)


def test_a_folder_in_place_of_a_file_is_named(campaign: Campaign) -> None:
    folder = campaign.workspace.data / "tiny"
    (folder / "train.bin").unlink()
    (folder / "train.bin").mkdir()
    with pytest.raises(ValueError, match=r"train\.bin is a folder; delete"):
        TokenStore.open(folder)
    (folder / "meta.json").unlink()
    (folder / "meta.json").mkdir()
    with pytest.raises(ValueError, match=r"meta\.json is damaged; delete"):
        TokenStore.open(folder)


# --- sampled text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros(9, np.float32), "must hold one dimension of uint16, got 1 dimensions of float32"),
        (np.zeros(9, np.int64), "must hold one dimension of uint16, got 1 dimensions of int64"),
        (np.zeros((3, 3), np.uint16), "must hold one dimension of uint16, got 2 dimensions"),
        (np.full(9, 300, np.uint16), "holds token 300, but the vocabulary of .* ends at 299"),
        (np.array([{}], dtype=object), "cannot be read as sampled tokens"),
        (None, "cannot be read as sampled tokens"),
    ],
    ids=["float", "wide", "square", "beyond", "pickle", "missing"],
)
def test_samples_of_another_type_are_refused(prepared: Path, tmp_path: Path, tokens: Any, message: str) -> None:
    store, path = TokenStore.open(prepared / "work" / "data" / "tiny"), tmp_path / "samples.npy"
    if tokens is not None:
        np.save(path, tokens, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"samples\.npy {message}"):
        open_samples(path, store)


def test_samples_of_the_store_are_read(prepared: Path, tmp_path: Path) -> None:
    store = TokenStore.open(prepared / "work" / "data" / "tiny")
    np.save(tmp_path / "samples.npy", np.arange(300, dtype=np.uint16))
    assert open_samples(tmp_path / "samples.npy", store).tolist() == list(range(300))
