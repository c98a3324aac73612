"""Read documents from files, from an installed package, or from a hub data set.

Files are text, Markdown, HTML, JSON lines, JSON, CSV or parquet. `read_documents` streams them in a fixed order and can be
called again for a second pass.
"""

import csv
import glob
import gzip
import html
import html.parser
import importlib.util
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from epochal.config import nearest
from epochal.data.text import BYTE_ORDER_MARK, Reading, clean, decode
from epochal.ranges import Characters, Ranged, shown

READERS = ("records", "api")

# Endings of files that can be read; all but parquet also compressed.
TEXT, HTML, LINES, TREE, TABLE, PARQUET = (
    (".txt", ".md", ".rst"),
    (".html", ".htm"),
    (".jsonl", ".ndjson"),
    ".json",
    ".csv",
    ".parquet",
)
KNOWN = (*TEXT, *HTML, *LINES, TREE, TABLE, PARQUET)
ENDINGS = ".txt, .md, .rst, .html, .jsonl, .json, .csv (also .gz, .zst) or .parquet"

# A row of a file: where it is, for messages, and its columns.
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Source(Ranged):
    """Source of documents: exactly one of `files` (paths, folders or globs), `package` or `hub`.

    A file of text or HTML is one document, or is split at lines equal to `separator`. In others each row is a document.
    """

    files: tuple[str, ...] = ()  # paths, folders or globs
    package: str | None = None
    file: str | None = None  # path inside the package
    install: str | None = None  # pip requirement of the package, for error messages
    hub: str | None = None  # name of a data set on the hub
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    text: str = "text"  # column of JSON lines, parquet or hub rows; data.content is a column of a column
    # Adjacent rows with equal values in these columns are joined by newlines into one document.
    group: tuple[str, ...] = ()
    separator: str | None = None
    cut: Characters = 0  # files of text are cut into documents of at most so many characters; 0: they are not
    # Of .json files. "records": an array of objects, each a document. "api": a tree of API descriptions, whose strings
    # under the key `text` become one document for each file, without markup, line breaks, and strings of earlier files.
    reader: str = "records"

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum([bool(self.files), self.package is not None, self.hub is not None]) != 1:
            raise ValueError("a source needs exactly one of files, package and hub; set one of them.")
        if self.package is not None and self.file is None:
            raise ValueError(f"package {shown(self.package)} needs the key file, a path inside the package.")
        if self.reader not in READERS:
            raise ValueError(f"reader must be {' or '.join(READERS)}, got {shown(self.reader)}.")
        if self.separator is not None and len(self.separator.splitlines()) > 1:
            raise ValueError(
                f"separator must be one line, got {shown(self.separator)}; an empty one stands for a blank line."
            )
        if self.separator is not None and self.cut:
            raise ValueError("a source is split at separators or cut by length; remove the key separator or cut.")


def read_documents(source: Source, reading: Reading | None = None) -> Iterator[str]:
    """Yield the documents of a source in order; what is changed or left out is counted in `reading`.

    A null in the text column is an empty document. Raises ValueError for a missing file, package or column, and for
    invalid UTF-8 or JSON, with file and row.
    """
    reading = Reading() if reading is None else reading
    if source.hub is not None:
        yield from _documents(_read_hub(source), source, reading)
        return
    seen: set[str] = set()  # strings of earlier .json files
    separators = 0
    for path in source_paths(source, reading):
        ending = _ending(path)
        if ending in (*TEXT, *HTML) and source.reader == "records":
            for text, separated in _read_text(path, source.separator, reading):
                separators += separated
                yield from pieces(text, source.cut) if source.cut else (text,)
        elif source.reader == "api":
            if ending != TREE:
                raise ValueError(f'{path} is not a .json file, which reader = "api" needs; remove the key or the file.')
            yield from _read_api_text(path, source.text, seen, reading)
        elif ending in LINES:
            yield from _documents(_read_json_lines(path), source, reading)
        elif ending == TREE:
            yield from _documents(_read_json(path, source.text), source, reading)
        elif ending == TABLE:
            yield from _documents(_read_csv(path), source, reading)
        elif ending == PARQUET:
            yield from _documents(_read_parquet(path, source), source, reading)
        else:
            raise ValueError(f"{path} has an unknown file type; use {ENDINGS}.")
    if source.separator is not None and not separators:
        # The files are then one document each, which is hardly what was meant.
        reading.note("separators that occur nowhere", f"{', '.join(_patterns(source))} ({source.separator!r})")


def source_paths(source: Source, reading: Reading | None = None) -> list[Path]:
    """Return the files of a local source, each once; raises ValueError if an entry matches none.

    An entry is a file, else a folder, whose files are taken at any depth, else a pattern; each gives its files sorted.
    """
    paths: dict[Path, None] = {}
    for pattern in _patterns(source):
        found = _matches(pattern, reading)
        if not found:
            raise ValueError(f"{pattern} matches no file; check the path.")
        paths |= dict.fromkeys(found)
    return list(paths)


def _patterns(source: Source) -> list[str]:
    if source.package is not None:
        return [str(package_folder(source.package, source.install) / str(source.file))]
    return list(source.files)


def _matches(pattern: str, reading: Reading | None) -> list[Path]:
    path = Path(pattern).expanduser()
    # Literally first: a file may be called "book [draft].txt".
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item.relative_to(path)))
        known = [item for item in files if _ending(item) in KNOWN]
        if reading is not None and len(known) < len(files):
            other = next(item for item in files if item not in known)
            reading.note("files of other types in a folder, not read", str(other), len(files) - len(known))
        if files and not known:
            raise ValueError(f"{pattern} is a folder without a file that can be read; use {ENDINGS}.")
        return known
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # patterns may be absolute
    return sorted(match for match in map(Path, names) if match.is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _ending(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def package_folder(package: str, install: str | None) -> Path:
    """Return the folder of an installed package without importing it; raises ValueError if it is not installed."""
    # Not imported: only the files of the package are needed, and importing runs its code.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package!r} is not installed; run pip install {install or package}.")
    return Path(spec.submodule_search_locations[0])


# --- from rows to documents -------------------------------------------------------------------------------------------


def _documents(rows: Iterator[Row], source: Source, reading: Reading) -> Iterator[str]:
    """Yield the text of each row, or of each group of adjacent rows."""
    # The rows of a group are the lines of one document, such as the verses of a chapter.
    if not source.group:
        for where, row in rows:
            yield _text(row, source.text, where, reading)
        return
    for _, group in groupby(rows, key=lambda row: tuple(str(_field(row[1], name, row[0])) for name in source.group)):
        yield "\n".join(_text(row, source.text, where, reading) for where, row in group)


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    """Return a column; a dotted name that is not a column itself is a path into nested columns."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if value is None:  # a null on the way: the row has no text
            return None
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where} has no column {name!r}{nearest(name, row)}; its columns are {', '.join(row)}.")
        value = value[part]
    return value


def _text(row: dict[str, Any], name: str, where: str, reading: Reading) -> str:
    value = _field(row, name, where)
    if value is None:
        reading.note("nulls instead of text", where)
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {name!r} must hold text, got {type(value).__name__}; name a text column.")
    return clean(value, reading, where)


# --- one reader for each file type ------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a plain, gzip or zstandard file for reading bytes; damaged data raises ValueError, also while reading."""
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            try:
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]  # GzipFile reads like a BinaryIO
            # Also raised while the caller reads, since the `yield` is inside of the try.
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is not a complete gzip file ({error}); download it again.") from None
        elif path.suffix.lower() == ".zst":
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


def _read_text(path: Path, separator: str | None, reading: Reading) -> Iterator[tuple[str, bool]]:
    """Yield each document of a text file, and whether its file holds the separator."""
    with _open(path) as file:
        text = decode(file.read(), str(path))
    if _ending(path) in HTML:
        text = html_text(text)
    if separator is None:
        yield clean(text, reading, str(path)), False
        return
    document: list[str] = []
    number, separated = 1, False
    # Split at whole lines, whatever their ends are, so that the separator may occur inside of a line.
    for line in io.StringIO(text, newline=""):
        if line.removeprefix(BYTE_ORDER_MARK).rstrip() != separator.rstrip():
            document.append(line)
            continue
        # A file may begin with a separator: no document stands before it.
        if document or separated:
            # The line end before a separator belongs to the separator.
            yield clean("".join(document), reading, f"{path}, document {number}").removesuffix("\n"), True
            number += 1
        document, separated = [], True
    if document or not separated:
        yield clean("".join(document), reading, f"{path}, document {number}"), separated


def pieces(text: str, characters: int) -> Iterator[str]:
    """Yield a text in pieces of at most so many characters.

    Joined they are the text. A piece ends after the last full line of its second half, else after the last white space
    there, else at its length.
    """
    start = 0
    while len(text) - start > characters:
        end, middle = start + characters, start + characters // 2
        line = text.rfind("\n", middle, end)
        if line < 0:
            line = max((place for place in range(middle, end) if text[place].isspace()), default=end - 1)
        yield text[start : line + 1]
        start = line + 1
    yield text[start:]


class _Text(html.parser.HTMLParser):
    """Collects the text of a page: what scripts, styles and templates hold is left out."""

    HIDDEN = ("script", "style", "template", "head")
    BLOCKS = (
        "p",
        "div",
        "br",
        "li",
        "tr",
        "pre",
        "section",
        "article",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "blockquote",
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in self.HIDDEN
        self.parts += ["\n"] if tag in self.BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        self.parts += ["\n"] if tag in self.BLOCKS else []

    def handle_data(self, data: str) -> None:
        self.parts += [] if self.hidden else [data]


def html_text(page: str) -> str:
    """Return the text of an HTML page, a line for each block."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip()


def _read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a table whose first line has the names of its columns."""
    with _open(path) as file:
        text = decode(file.read(), str(path)).lstrip(BYTE_ORDER_MARK)
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the usual 128 kB
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: has another number of fields than the first line; correct it.")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error}); correct it.") from None


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = decode(line, where).lstrip(BYTE_ORDER_MARK)  # joined files have a mark at each start
            if not text.strip():
                continue
            row = _parse(text, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object; write one object per line.")
            yield where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" * (error.lineno > 1)
        raise ValueError(f"{where}: not JSON ({error.msg}{place}, column {error.colno}); correct it.") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be read; correct it.") from None


def _load_json(path: Path) -> Any:
    with _open(path) as file:
        text = decode(file.read(), str(path)).lstrip(BYTE_ORDER_MARK)
    try:
        return _parse(text, str(path))
    except ValueError as error:
        if "Extra data" in str(error):
            raise ValueError(f"{path} holds several JSON values; rename it to .jsonl if each line is one.") from None
        raise


def _read_json(path: Path, column: str) -> Iterator[Row]:
    """Yield the objects of a JSON array; strings count as objects with one column."""
    rows = _load_json(path)
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} must hold an array of objects, got {type(rows).__name__}; write one, one object per line (.jsonl), or "
            'set reader = "api" for trees of API descriptions.'
        )
    for number, row in enumerate(rows, start=1):
        where = f"{path}, item {number}"
        if isinstance(row, str):
            row = {column: row}
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object or a string, got {type(row).__name__}; correct it.")
        yield where, row


def _read_api_text(path: Path, key: str, seen: set[str], reading: Reading) -> Iterator[str]:
    """Yield the strings under `key` in a JSON file as one document, without markup."""
    # At any depth: such files are trees of API descriptions.
    strings = []
    for text in _strings_under(_load_json(path), key):
        plain = html.unescape(re.sub(r"<[^>]*>", " ", text))
        plain = re.sub(r"\s+", " ", plain).strip()
        if plain in seen:  # API descriptions are repeated from file to file
            reading.note("strings of API descriptions that an earlier file or line has too, left out", str(path))
        elif plain:
            seen.add(plain)
            strings.append(plain)
    if strings:
        yield clean("\n".join(strings), reading, str(path))


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


def _read_parquet(path: Path, source: Source) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the package pyarrow; run pip install pyarrow.") from None
    try:
        file = parquet.ParquetFile(path)
        known = file.schema_arrow.names
        for name in (source.text, *source.group):
            if name not in known and name.split(".")[0] not in known:
                raise ValueError(
                    f"{path} has no column {name!r}{nearest(name, known)}; its columns are {', '.join(known)}."
                )
        number = 0
        # Row groups one after another, so a large file is never in memory whole.
        for batch in file.iter_batches(columns=[source.text, *source.group]):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read ({error}); check the file.") from None


def _read_hub(source: Source) -> Iterator[Row]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"hub data set {source.hub!r} needs the package datasets; run pip install datasets.") from None
    try:
        rows = datasets.load_dataset(
            source.hub, source.subset, revision=source.revision, split=source.split, streaming=True
        )
    # RuntimeError: a data set that comes as a script, which `datasets` does not run.
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"hub data set {source.hub!r} cannot be read ({error}); check its name and the network."
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{source.hub}, row {number}", row
