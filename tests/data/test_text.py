"""Text in every disguise is one text: byte order marks, line ends, surrogates, nulls, normal forms, white space."""

import gzip
import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer

from epochal.data.documents import Source, read_documents, source_paths
from epochal.data.prepare import prepare
from epochal.data.store import SPLITS, TokenStore
from epochal.data.text import Reading, clean, decode, normal_form

ANY_TEXT = st.text(st.characters(codec=None) | st.sampled_from("\ufeff\u200b\r\n\0\ud800\udc00é\u0301 "))
HALF = "\\ud83d"  # half of a character, as JSON spells it


def read(*paths: Path, **keys: object) -> tuple[list[str], dict[str, int]]:
    reading = Reading()
    source = Source(files=tuple(map(str, paths)), **keys)  # type: ignore[arg-type]
    return list(read_documents(source, reading)), dict(reading.counts)


# --- properties -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ANY_TEXT)
@example("\ud83d\ude00")  # two halves are one character
@example("\ufeff\ufeffa")
def test_a_cleaned_text_is_utf8_without_marks_returns_or_nulls(text: str) -> None:
    cleaned = clean(text, Reading(), "here")
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert "\r" not in cleaned and "\0" not in cleaned and not cleaned.startswith("\ufeff")
    assert clean(cleaned, Reading(), "here") == cleaned
    # What is counted is what changed.
    reading = Reading()
    assert (clean(text, reading, "here") != text) == bool(reading.counts)


@settings(deadline=None)
@given(ANY_TEXT, st.sampled_from(["NFC", "NFD"]), st.sampled_from([" ", "  ", "\n", "\r\n", "\t\u00a0"]))
def test_copies_of_a_text_have_one_normal_form(text: str, form: str, blank: str) -> None:
    text = clean(text, Reading(), "here")
    normal = normal_form(text)
    assert normal_form(normal) == normal
    copy = "\ufeff" + unicodedata.normalize(form, text).replace(" ", blank) + blank  # type: ignore[arg-type]
    assert normal_form(clean(copy, Reading(), "there")) == normal


def test_texts_that_differ_in_a_letter_have_different_normal_forms() -> None:
    assert len({normal_form(text) for text in ("a b", "ab", "a  b", "A b", "à b", "a b.")}) == 5


# --- the leak ---------------------------------------------------------------------------------------------------------------


def disguises(folder: Path, texts: list[str]) -> list[Path]:
    """The same documents in seven files of six types."""
    plain = "\n====\n".join(texts)
    files = {
        "a.txt": plain.encode(),
        "b.txt": b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(),
        "c.txt": plain.replace("\n", "\r").encode(),
        "d.jsonl": b"\xef\xbb\xbf" + "".join(json.dumps({"text": nfd(text)}) + "\r\n" for text in texts).encode(),
        "e.json": json.dumps([{"text": text.replace(" ", "\n  ")} for text in texts]).encode("utf-8-sig"),
        "f.jsonl.gz": gzip.compress(
            "".join(json.dumps({"text": f"\ufeff{text} \u200b\n"}) + "\n" for text in texts).encode()
        ),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    parquet.write_table(pa.table({"text": [text.replace(". ", ".\r\n\r\n") for text in texts]}), folder / "g.parquet")
    return [*(folder / name for name in files), folder / "g.parquet"]


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def oracle(text: str) -> str:
    """The normal form, written down once more."""
    text = "".join(letter for letter in text if letter not in "\ufeff\u200b")
    return " ".join(unicodedata.normalize("NFC", text).split())


def test_no_held_out_document_is_in_training_after_normalisation(tmp_path: Path) -> None:
    texts = [f"{text} Élan\nnaïve café." for text in tiny.documents(80)]
    folder = tmp_path / "texts"
    folder.mkdir()
    disguises(folder, texts)
    config = tiny.write_config(
        tmp_path, f'files = ["{folder}"]\nseparator = "===="', split="validation = 0.2\ntest = 0.2"
    )
    store = prepare(str(config), tmp_path / "data")
    tokenizer = Tokenizer.from_file(str(store.tokenizer_folder / "tokenizer.json"))
    found = {}
    for split in SPLITS:
        parts = np.split(store.tokens(split), np.cumsum(store.lengths(split))[:-1])
        found[split] = {oracle(tokenizer.decode(part[1:-1].tolist())) for part in parts}
    assert not found["train"] & (found["validation"] | found["test"]) and not found["validation"] & found["test"]
    assert set().union(*found.values()) == set(map(oracle, texts))
    assert store.meta["dropped"] == {"blank": 0, "duplicates": 6 * 80}
    assert store.meta["documents"]["validation"] > 5 and store.meta["documents"]["test"] > 5
    marks = "documents without their byte order mark"
    assert store.meta["changed"][marks] == 81 and store.meta["first"][marks] == f"{folder}/b.txt, document 1"


# --- files and rows -----------------------------------------------------------------------------------------------------


def test_an_array_of_objects_is_one_document_each_unchanged(tmp_path: Path) -> None:
    texts = ["if a < b and b > 0:\n    return 1\n", "second record", "second record"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts]))
    assert read(path) == (texts, {})
    path.write_text(json.dumps(texts))
    assert read(path) == (texts, {})


def test_api_descriptions_are_read_where_the_config_asks_for_them(tmp_path: Path) -> None:
    tree = {"shapes": {"A": {"documentation": "<p>One  <b>shape</b>.</p>"}, "B": {"documentation": "<p>Two</p>"}}}
    path = tmp_path / "service.json"
    path.write_text(json.dumps({**tree, "documentation": "Two"}))
    documents, counts = read(path, text="documentation", reader="api")
    assert documents == ["One shape .\nTwo"]
    assert list(counts.values()) == [1], "a repeated string is counted"
    with pytest.raises(ValueError, match=r'must hold an array of objects, got dict.*reader = "api"'):
        read(path, text="documentation")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r'a\.txt is not a \.json file, which reader = "api" needs'):
        read(tmp_path / "a.txt", reader="api")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_are_found_whatever_the_line_ends(tmp_path: Path, end: str, mark: str) -> None:
    path = tmp_path / "a.txt"
    lines = [mark + "====", "one", "====", "two", " ==== ", "====  ", "", "====", "====", "three ====", "===="]
    path.write_bytes(end.join(lines).encode())
    documents, _ = read(path, separator="====")
    assert documents == ["one", "two\n ==== ", "", "", "three ===="]


def test_a_separator_that_occurs_nowhere_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n----\ntwo")
    documents, counts = read(tmp_path / "a.txt", separator="====")
    assert len(documents) == 1 and counts == {"separators that occur nowhere": 1}
    assert read(tmp_path / "a.txt", separator="----")[1] == {}
    config = tiny.write_config(tmp_path, f'files = ["{tmp_path}/a.txt"]\nseparator = "===="')
    with pytest.raises(
        ValueError, match=r"has no documents, since the separator occurs nowhere in .*a\.txt \('===='\)"
    ):
        prepare(str(config), tmp_path / "data")
    with pytest.raises(ValueError, match="separator must be one line"):
        Source(files=("a",), separator="a\nb")


@pytest.mark.parametrize(
    ("row", "text", "kind"),
    [
        (f'{{"text": "half {HALF}."}}', "half \ufffd.", "lone surrogates replaced by U+FFFD"),
        ('{"text": "a\\u0000b"}', "a\ufffdb", "null characters replaced by U+FFFD"),
        ('{"text": "a\\r\\nb"}', "a\nb", "documents with line ends of Windows or old Macs, now \\n"),
        ('{"text": null}', "", "nulls instead of text"),
    ],
)
def test_what_is_no_text_is_replaced_and_counted_with_its_place(tmp_path: Path, row: str, text: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n' + row + "\n" + row + "\n")
    reading = Reading()
    documents = list(read_documents(Source(files=(str(path),)), reading))
    assert documents == ["first", text, text]
    assert reading.counts == {kind: 2} and reading.first == {kind: f"{path}, line 2"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16"), r"a\.txt is UTF-16 or UTF-32 text"),
        ("a.txt", "text without a mark".encode("utf-16-le"), r"a\.txt is full of null characters, as UTF-16 text is"),
        ("a.txt", b"one\ntwo \xff", r"a\.txt is not UTF-8 text \(byte 8 in line 2: 0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, line 2: column 'text' must hold text, got int"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, item 2: must be an object or a string, got int"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', r"a\.json holds several JSON values; rename it to \.jsonl"),
        ("a.json", b"[" * 100_000, r"a\.json: nested too deeply"),
        ("a.jsonl", b'{"a":' * 100_000, r"a\.jsonl, line 1: nested too deeply"),
    ],
)
def test_errors_name_file_row_and_byte(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_nested_columns_are_read_by_a_dotted_name(tmp_path: Path) -> None:
    rows = [{"data": {"content": "one"}, "id": 1}, {"data": {"content": None}, "id": 2}, {"data": None, "id": 3}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for path in (lines, tmp_path / "b.parquet"):
        assert read(path, text="data.content") == (["one", "", ""], {"nulls instead of text": 2})
    lines.write_text('{"data.content": "a column of this name", "data": {"content": "another"}}\n')
    assert read(lines, text="data.content")[0] == ["a column of this name"]
    lines.write_text('{"data": {"body": "x"}}\n')
    with pytest.raises(ValueError, match=r"line 1 has no column 'data\.content'"):
        read(lines, text="data.content")


# --- paths ----------------------------------------------------------------------------------------------------------------


def test_paths_are_taken_literally_first_then_as_folders_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("book [draft].txt", "b.TXT", "deep/er/c.jsonl", "deep/.hidden.txt", "deep/notes.pdf", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    monkeypatch.setenv("HOME", str(tmp_path))

    def names(*files: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in source_paths(Source(files=files))]

    assert names(f"{tmp_path}/book [draft].txt") == ["book [draft].txt"]
    assert names("~/d.txt") == ["d.txt"] and names("~/*.txt") == ["book [draft].txt", "d.txt"]
    assert names("~/deep") == ["deep/er/c.jsonl"]
    assert names("~/d.txt", "~/*.txt") == ["d.txt", "book [draft].txt"], "a file is read once"
    assert read(tmp_path / "deep")[1] == {"files of other types in a folder, not read": 1}
    assert len(read(tmp_path / "b.TXT")[0]) == 1
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.pdf").touch()
    for missing in ("only", "nowhere", "empty[0-9].txt"):
        with pytest.raises(ValueError, match=r"without a file that can be read|matches no file"):
            names(f"~/{missing}")


def test_what_reading_changed_is_on_the_screen_and_in_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from epochal.cli import data

    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in tiny.documents(60)]
    path.write_text("\n".join([*lines, '{"text": null}', f'{{"text": "{HALF}"}}', lines[0]]))
    config = tiny.write_config(tmp_path, f'files = ["{path}"]\nseparator = "=="')
    data(str(config), tmp_path)
    out = capsys.readouterr().out
    store = TokenStore.open(tmp_path / "data" / "tiny")
    assert store.meta["dropped"] == {"blank": 1, "duplicates": 1}
    assert "dropped: 1 blank, 1 duplicates" in out
    assert f"lone surrogates replaced by U+FFFD: 1 (the first in {path}, line 62)" in out
    assert f"nulls instead of text: 1 (the first in {path}, line 61)" in out
    assert "separators that occur nowhere: 1" in out


def test_decoding_names_the_byte() -> None:
    assert decode("naïve".encode(), "here") == "naïve"
    with pytest.raises(ValueError, match=r"^here is not UTF-8 text \(byte 2: 0xef\)"):
        decode("naïve".encode("latin-1"), "here")
