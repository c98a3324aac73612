"""Text as documents: plain text, JSON lines, parquet, a file inside an installed package, or a hub data set.

`read_documents` yields strings in a fixed order and can be called again for a second pass; nothing is kept in memory.
"""

import glob
import gzip
import html
import importlib.util
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from epochal.config import nearest


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from: exactly one of `files` (paths or globs), `package` or `hub`.

    `text` names the column of JSON lines, parquet or hub rows. Neighbouring rows with equal values in the columns
    `group` are one document, joined by newlines. A .txt file is one document, or many between lines equal to `separator`.
    """

    files: tuple[str, ...] = ()
    package: str | None = None
    file: str | None = None
    install: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    text: str = "text"
    group: tuple[str, ...] = ()
    separator: str | None = None

    def __post_init__(self) -> None:
        if sum([bool(self.files), self.package is not None, self.hub is not None]) != 1:
            raise ValueError("a source needs exactly one of files, package and hub; write one of them.")
        if self.package is not None and self.file is None:
            raise ValueError(f"package {self.package!r} needs the key file: a path inside that package.")


def read_documents(source: Source) -> Iterator[str]:
    """Yield the documents of a source in their order.

    Raises ValueError for a missing file, package or column, invalid UTF-8 and broken JSON, naming file and line.
    """
    if source.hub is not None:
        yield from _join(_read_hub(source), source, source.hub)
        return
    said: set[str] = set()
    for path in source_paths(source):
        name = path.name.removesuffix(".gz").removesuffix(".zst")
        if name.endswith(".txt"):
            yield from _read_text(path, source.separator)
        elif name.endswith((".jsonl", ".ndjson")):
            yield from _join(_read_json_lines(path), source, str(path))
        elif name.endswith(".json"):
            yield from _read_api_text(path, source.text, said)
        elif name.endswith(".parquet"):
            yield from _join(_read_parquet(path, source), source, str(path))
        else:
            raise ValueError(
                f"{path} has an unknown ending; give .txt, .jsonl, .json (also .gz, .zst) or .parquet files."
            )


def source_paths(source: Source) -> list[Path]:
    """Return the files of a source that lies on disk, sorted; raises ValueError when there are none."""
    if source.package is not None:
        spec = importlib.util.find_spec(source.package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"package {source.package!r} is not installed; run pip install {source.install or source.package}."
            )
        patterns = [str(Path(spec.submodule_search_locations[0]) / str(source.file))]
    else:
        patterns = list(source.files)
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(
            Path(name)
            for name in glob.glob(pattern, recursive=True)  # noqa: PTH207  # patterns may be absolute
            if Path(name).is_file()
        )
        if not found:
            raise ValueError(f"{pattern} matches no file; check the path.")
        paths += found
    return paths


def _join(rows: Iterator[dict[str, Any]], source: Source, where: str) -> Iterator[str]:
    """Take the text column of each row; join neighbouring rows that agree in the group columns."""
    if not source.group:
        for row in rows:
            yield _column(row, source.text, where)
        return
    for _, group in groupby(rows, key=lambda row: tuple(str(_field(row, name, where)) for name in source.group)):
        yield "\n".join(_column(row, source.text, where) for row in group)


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where} has no column {name!r}{nearest(name, row)}; its columns are {', '.join(row)}.")
    return row[name]


def _column(row: dict[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {name!r} holds {type(value).__name__}, not text; name a text column.")
    return value


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a plain, gzip or zstandard file for reading bytes; damage found while it is read raises ValueError."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            try:
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]  # GzipFile reads like a BinaryIO
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is no whole gzip file ({error}); get it again.") from None
        elif path.suffix == ".zst":
            try:
                import zstandard
            except ModuleNotFoundError:
                raise ValueError(f"{path} needs the package zstandard; run pip install zstandard.") from None
            try:
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield io.BufferedReader(reader)
            except zstandard.ZstdError as error:
                raise ValueError(f"{path} is no whole zstandard file ({error}); get it again.") from None
        else:
            yield raw


def _read_text(path: Path, separator: str | None) -> Iterator[str]:
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from None
    if separator is None:
        yield text
    else:
        yield from text.split(f"\n{separator}\n")


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not UTF-8 text; convert the file to UTF-8.") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); correct that line.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object; write one object a line.")
            yield row


def _read_api_text(path: Path, key: str, said: set[str]) -> Iterator[str]:
    """Yield the strings under `key` at any depth of one JSON file as one document, markup removed.

    A string that an earlier file already held (API descriptions repeat themselves) is left out.
    """
    with _open(path) as file:
        try:
            tree = json.loads(file.read().decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); correct the file.") from None
    strings = []
    for text in _strings_under(tree, key):
        plain = html.unescape(re.sub(r"<[^>]*>", " ", text))
        plain = re.sub(r"\s+", " ", plain).strip()
        if plain and plain not in said:
            said.add(plain)
            strings.append(plain)
    if strings:
        yield "\n".join(strings)


def _strings_under(tree: Any, key: str) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _strings_under(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings_under(value, key)


def _read_parquet(path: Path, source: Source) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the package pyarrow; run pip install pyarrow.") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file ({error}); check the file.") from None
    columns = [source.text, *source.group]
    known = file.schema_arrow.names
    for name in columns:
        if name not in known:
            raise ValueError(
                f"{path} has no column {name!r}{nearest(name, known)}; its columns are {', '.join(known)}."
            )
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _read_hub(source: Source) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"hub data set {source.hub!r} needs the package datasets; run pip install datasets.") from None
    try:
        rows = datasets.load_dataset(
            source.hub, source.subset, revision=source.revision, split=source.split, streaming=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"hub data set {source.hub!r} cannot be read ({error}); check name and network.") from None
    yield from rows
