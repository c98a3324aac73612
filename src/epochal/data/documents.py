"""Read documents from files, from an installed package, or from a hub data set.

Files are text, JSON lines, JSON or parquet. `read_documents` streams them in a fixed order and can be called again for
a second pass.
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
    """Source of documents: exactly one of `files` (paths or globs), `package` or `hub`.

    A .txt file is one document, or is split at lines equal to `separator`.
    """

    files: tuple[str, ...] = ()  # paths or globs
    package: str | None = None
    file: str | None = None  # path inside the package
    install: str | None = None  # pip requirement of the package, for error messages
    hub: str | None = None  # name of a data set on the hub
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    text: str = "text"  # column of JSON lines, parquet or hub rows
    # Adjacent rows with equal values in these columns are joined by newlines into one document.
    group: tuple[str, ...] = ()
    separator: str | None = None

    def __post_init__(self) -> None:
        if sum([bool(self.files), self.package is not None, self.hub is not None]) != 1:
            raise ValueError("a source needs exactly one of files, package and hub; set one of them.")
        if self.package is not None and self.file is None:
            raise ValueError(f"package {self.package!r} needs the key file, a path inside the package.")


def read_documents(source: Source) -> Iterator[str]:
    """Yield the documents of a source in order.

    Raises ValueError for a missing file, package or column, and for invalid UTF-8 or JSON, with file and line.
    """
    if source.hub is not None:
        yield from _join(_read_hub(source), source, source.hub)
        return
    seen: set[str] = set()  # strings of earlier .json files
    for path in source_paths(source):
        name = path.name.removesuffix(".gz").removesuffix(".zst")
        if name.endswith(".txt"):
            yield from _read_text(path, source.separator)
        elif name.endswith((".jsonl", ".ndjson")):
            yield from _join(_read_json_lines(path), source, str(path))
        elif name.endswith(".json"):
            yield from _read_api_text(path, source.text, seen)
        elif name.endswith(".parquet"):
            yield from _join(_read_parquet(path, source), source, str(path))
        else:
            raise ValueError(f"{path} has an unknown file type; use .txt, .jsonl, .json (also .gz, .zst) or .parquet.")


def source_paths(source: Source) -> list[Path]:
    """Return the sorted files of a local source; raises ValueError if a pattern matches none."""
    if source.package is not None:
        patterns = [str(package_folder(source.package, source.install) / str(source.file))]
    else:
        patterns = list(source.files)
    paths: list[Path] = []
    for pattern in patterns:
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207  # patterns may be absolute
        matches = sorted(path for path in map(Path, names) if path.is_file())
        if not matches:
            raise ValueError(f"{pattern} matches no file; check the path.")
        paths += matches
    return paths


def package_folder(package: str, install: str | None) -> Path:
    """Return the folder of an installed package without importing it; raises ValueError if it is not installed."""
    # Not imported: only the files of the package are needed, and importing runs its code.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package!r} is not installed; run pip install {install or package}.")
    return Path(spec.submodule_search_locations[0])


def _join(rows: Iterator[dict[str, Any]], source: Source, where: str) -> Iterator[str]:
    """Yield the text of each row, or of each group of adjacent rows."""
    # The rows of a group are the lines of one document, such as the verses of a chapter.
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
        raise ValueError(f"{where}: column {name!r} must hold text, got {type(value).__name__}; name a text column.")
    return value


# --- one reader for each file type ------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a plain, gzip or zstandard file for reading bytes; damaged data raises ValueError, also while reading."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            try:
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]  # GzipFile reads like a BinaryIO
            # Also raised while the caller reads, since the `yield` is inside of the try.
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is not a complete gzip file ({error}); download it again.") from None
        elif path.suffix == ".zst":
            try:
                import zstandard
            except ModuleNotFoundError:
                raise ValueError(f"{path} needs the package zstandard; run pip install zstandard.") from None
            try:
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield io.BufferedReader(reader)
            except zstandard.ZstdError as error:
                raise ValueError(f"{path} is not a complete zstandard file ({error}); download it again.") from None
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
        # Split at whole lines, so that the separator may occur inside of a line.
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
                raise ValueError(f"{path}, line {number}: not a JSON object; write one object per line.")
            yield row


def _read_api_text(path: Path, key: str, seen: set[str]) -> Iterator[str]:
    """Yield the strings under `key` in a JSON file as one document, without markup."""
    # At any depth: such files are trees of API descriptions.
    with _open(path) as file:
        try:
            tree = json.loads(file.read().decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); correct the file.") from None
    strings = []
    for text in _strings_under(tree, key):
        plain = html.unescape(re.sub(r"<[^>]*>", " ", text))
        plain = re.sub(r"\s+", " ", plain).strip()
        if plain and plain not in seen:  # API descriptions are repeated from file to file
            seen.add(plain)
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
        raise ValueError(f"{path} is not a parquet file ({error}); check the file.") from None
    columns = [source.text, *source.group]
    known = file.schema_arrow.names
    for name in columns:
        if name not in known:
            raise ValueError(
                f"{path} has no column {name!r}{nearest(name, known)}; its columns are {', '.join(known)}."
            )
    # Row groups one after another, so a large file is never in memory whole.
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
        raise ValueError(
            f"hub data set {source.hub!r} cannot be read ({error}); check its name and the network."
        ) from None
    yield from rows
