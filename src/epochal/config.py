"""Read TOML and JSON into checked frozen dataclasses, and write files safely.

Names of configs follow one rule: `kjv` means `configs/data/kjv.toml`; anything with a slash or a suffix is a path.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import platform
import re
import secrets
import shutil
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from epochal.ranges import LONGEST_NAME, is_name, shown

T = TypeVar("T")

# The folder with configs/, recipes/ and launch/: the checkout, or a folder of the installed package (pyproject.toml).
_INSTALLED = Path(__file__).resolve().parent / "built_in"
REPOSITORY = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2]

# A model of the Hugging Face hub, and the files of one that are read.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]

LONGEST_SECONDS = 366 * 24 * 3600


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name[:LONGEST_NAME], list(known), n=1, cutoff=0.5)  # its time is quadratic
    return f" (did you mean {close[0]!r}?)" if close else ""


def find_config(kind: str, name: str, suffix: str) -> Path:
    """Return the file of a config given by path or by name.

    The name is looked up as `configs/<kind>/<name><suffix>`, first in the working folder and then in the repository.
    Raises ValueError with the nearest existing name, and for a file whose name cannot name jobs, folders and tables.
    """
    stem = name.rpartition("/")[2].removesuffix(suffix)
    if not is_name(stem):
        raise ValueError(
            f"{shown(name)} cannot name a file of configs/{kind}; use letters, digits, '.', '_' and '-', not starting with "
            f"a dot or dash, at most {LONGEST_NAME} characters."
        )
    if "/" in name or name.endswith(suffix):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"{name} does not exist; give the path of a {suffix} file or a name from configs/{kind}.")
        return path
    folders = [Path("configs") / kind, REPOSITORY / "configs" / kind]
    for folder in folders:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    known = sorted({path.stem for folder in folders for path in folder.glob(f"*{suffix}")})
    raise ValueError(f"configs/{kind} has no {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}.")


def load_toml(path: Path, cls: type[T]) -> T:
    """Read a TOML file into the dataclass `cls`; unknown keys, wrong types and unreadable files raise ValueError."""
    return from_table(read_toml(path), cls, where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a missing or malformed one raises ValueError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the path.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except RecursionError:
        raise ValueError(f"{path} nests brackets too deeply; correct it.") from None
    except ValueError as error:  # of TOML, or a number of thousands of digits
        raise ValueError(f"{path} is not valid TOML: {error}; correct that line.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file with one object of finite numbers.

    Raises ValueError for anything else, with a message that goes behind the file's name, and OSError for a file that
    cannot be opened.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def parse_json(text: str) -> dict[str, Any]:
    """Read one JSON object of finite numbers; raises ValueError as `read_json`."""
    try:
        table = json.loads(text, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("nests brackets too deeply; correct it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error}; correct it") from None
    if not isinstance(table, dict):
        raise ValueError(f"must be a JSON object, got {shown(table)}")
    return table


def _not_finite(constant: str) -> None:
    # NaN and Infinity are not JSON, though Python reads and writes them.
    raise ValueError(f"must hold finite numbers, got {constant}")


def from_table(table: Mapping[str, Any], cls: type[T], *, where: str) -> T:
    """Build the dataclass `cls` from nested tables; raises ValueError, with messages that start with `where`."""
    hints, plain, required = _shape(typing.cast(Any, cls))
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table, got {shown(table)}.")
    for key in table.keys() - hints.keys():
        raise ValueError(f"{where}: unknown key {shown(key)}{nearest(key, hints)}; remove or correct it.")
    for key in required:
        if key not in table:
            raise ValueError(f"{where}: missing key {key!r}; add it.")
    values = {
        # Most fields of a record are as they should be, so the place for an error is not written.
        key: value if type(value) in plain[key] else _convert(value, hints[key], f"{where}: {key}")
        for key, value in table.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@functools.cache
def _shape(cls: Any) -> tuple[dict[str, Any], dict[str, set[Any]], tuple[str, ...]]:
    """Return a dataclass's type hints, what each field takes unchanged, and the required fields."""
    assert dataclasses.is_dataclass(cls)
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    missing = dataclasses.MISSING
    required = tuple(field.name for field in fields if field.default is missing and field.default_factory is missing)
    hints = {field.name: hints[field.name] for field in fields}
    plain = {name: {hint, *_choices(hint)} & {bool, int, float, str, type(None)} for name, hint in hints.items()}
    return hints, plain, required


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else ()


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against a type hint; tables become dataclasses, lists tuples, and integers floats where needed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, arguments, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list in brackets, got {shown(value)}.")
        return tuple(_convert(item, arguments[0], where) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table of key = value lines, got {shown(value)}.")
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, written as [{where.split()[-1]}], got {shown(value)}.")
        return from_table(value, hint, where=where)
    # TOML writes 1 for 1.0; a bool is an int in Python, but not a number in a config.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        # Beyond a float's largest value the integer stays, for the field's range to refuse.
        return float(value) if abs(value) < 2**1000 else value
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ValueError(f"{where} must be of type {hint.__name__}, got {shown(value)}.")


def _convert_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    """Convert to the first choice that fits; a table chooses among several dataclasses by its `kind`."""
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    if isinstance(value, Mapping) and len(choices) > 1:
        kinds: dict[str, Any] = {choice.__name__: choice for choice in choices if isinstance(choice, type)}
        kind = value.get("kind", next(iter(kinds)))  # without one, the first: older records had only that class
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(
                f"{where}: kind {shown(kind)} is unknown{nearest(str(kind), kinds)}; choose from {', '.join(kinds)}."
            )
        return from_table({k: v for k, v in value.items() if k != "kind"}, kinds[kind], where=where)
    # The last choice is tried outside of the loop, so that its error is raised.
    for choice in choices[:-1]:
        try:
            return _convert(value, choice, where)
        except ValueError:
            continue
    return _convert(value, choices[-1], where)


def to_table(value: Any) -> Any:
    """Turn a dataclass into plain JSON types; a nested dataclass of a union gets its `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints, _, _ = _shape(type(value))
        table = {}
        for field in dataclasses.fields(value):
            item = to_table(getattr(value, field.name))
            if isinstance(item, dict) and _is_union_of_dataclasses(hints[field.name]):
                item = {"kind": type(getattr(value, field.name)).__name__, **item}
            table[field.name] = item
        return table
    if isinstance(value, tuple | list):
        return [to_table(item) for item in value]
    if isinstance(value, dict):
        return {key: to_table(item) for key, item in value.items()}
    return value


def _is_union_of_dataclasses(hint: Any) -> bool:
    return sum(dataclasses.is_dataclass(choice) for choice in typing.get_args(hint)) > 1


def flat_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables, and lists of tables by index, to dotted keys, without unset values."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat |= flat_table(value, f"{prefix}{key}.")
        elif value not in (None, []):
            flat[f"{prefix}{key}"] = value
    return flat


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ between two nested tables, as dotted name to (old, new)."""
    before, after = flat_table(old), flat_table(new)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {name: (before.get(name), after.get(name)) for name in names}


def seconds(text: str) -> float:
    """Parse a duration such as 90s, 9m, 2h or plain seconds, at most a year; raises ValueError for anything else."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        value = 0.0
    if not 0 < value <= LONGEST_SECONDS:
        raise ValueError(f"A duration must be written like 90s, 9m or 2h, at most a year, got {shown(text)}.")
    return value


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to the file `path`; on success it is flushed to disk and renamed to `path`.

    Readers see the old file or the new one, never half of it. After an error the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write the same file, and containers that share a folder may have equal process ids.
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            # Otherwise a crash of the machine may leave the new name with an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to the folder `path`; on success it replaces `path`, after an error it is removed.

    Only one process may replace a folder at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # without the process id: a killed process's folder is removed
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # A folder cannot be replaced in one step: for a moment neither exists.
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file; readers see the old content or the new, never half of it."""
    with replaced(path) as temporary:
        temporary.write_bytes(data if isinstance(data, bytes) else data.encode())


def model_folder(name: str) -> Path:
    """Return the folder of a model from elsewhere: a path, or the name of a model on the Hugging Face hub.

    A model of the hub is taken from its cache, or downloaded if HF_HUB_OFFLINE is not set; weights only as safetensors.
    Raises ValueError if there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{name} is no folder; give the folder of a model, or its name on the Hugging Face hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} is neither a folder nor a model that can be had from the Hugging Face hub ({type(error).__name__}); check "
            "the name, or download the model and give its folder."
        ) from None


def model_path(name_or_path: str | Path) -> Path:
    """Return the JSON file of a model.

    The model is given by name, by `.json` file or by a folder with a `config.json`. Raises ValueError with the nearest
    existing name.
    """
    given = str(name_or_path)
    if (isinstance(name_or_path, Path) or "/" in given) and Path(given).is_dir():
        given = str(Path(given) / "config.json")
    return find_config("models", given, ".json")
