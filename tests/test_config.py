"""TOML into dataclasses and back, names of configs, and interrupted writes."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from epochal.config import find_config, from_table, load_toml, nearest, replaced_folder, to_table, write_atomic
from epochal.run import AdamW, Ensemble, Run, Samples, SequenceDistillation


@dataclass(frozen=True)
class Inner:
    size: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner
    maybe: str | None = None
    many: tuple[Inner, ...] = ()
    flag: bool = False
    table: dict[str, float] = field(default_factory=dict)


GOOD = {"rate": 1, "inner": {"size": 2}}


def test_a_table_becomes_a_dataclass_and_back() -> None:
    outer = from_table(
        {
            **GOOD,
            "maybe": "x",
            "many": [{"size": 1}, {"size": 2, "names": ["a"]}],
            "flag": True,
            "table": {"a": 1},
        },
        Outer,
        where="x.toml",
    )
    assert outer == Outer(1.0, Inner(2), "x", (Inner(1), Inner(2, ("a",))), True, {"a": 1.0})
    assert isinstance(outer.rate, float)
    assert from_table(to_table(outer), Outer, where="x.toml") == outer


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({"rat": 1}, ("unknown key 'rat'", "did you mean 'rate'")),
        ({"inner": {"size": 2, "nmes": []}}, ("x.toml: inner", "unknown key 'nmes'", "did you mean 'names'")),
        ({"zzzzzz": 1}, ("unknown key 'zzzzzz'",)),
        ({"inner": {}}, ("x.toml: inner", "missing key 'size'")),
        ({"rate": "fast"}, ("x.toml: rate", "'fast'", "float")),
        ({"rate": True}, ("x.toml: rate", "True", "float")),
        ({"inner": {"size": 2.5}}, ("size", "2.5", "int")),
        ({"inner": {"size": True}}, ("size", "True", "int")),
        ({"inner": 3}, ("inner", "must be a table")),
        ({"many": {"size": 1}}, ("many", "must be a list")),
        ({"many": [1]}, ("many", "must be a table")),
        ({"maybe": 3}, ("maybe", "3", "str")),
        ({"flag": 1}, ("flag", "bool")),
        ({"table": 1}, ("table", "must be a table")),
        ({"inner": {"size": 1, "names": "abc"}}, ("names", "must be a list")),
    ],
)
def test_a_bad_table_is_refused_in_one_line(changes: dict[str, object], phrases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        from_table({**GOOD, **changes}, Outer, where="x.toml")
    message = str(caught.value)
    assert message.startswith("x.toml")
    assert all(phrase in message for phrase in phrases), message
    assert message.endswith(".")
    assert "\n" not in message


def test_a_missing_key_is_reported() -> None:
    with pytest.raises(ValueError, match=r"x.toml: missing key 'inner'"):
        from_table({"rate": 1}, Outer, where="x.toml")


def test_an_error_of_a_dataclass_names_its_file() -> None:
    with pytest.raises(ValueError, match=r"x.toml: lr must be a number from 0 to 100, got -1"):
        from_table({"lr": -1}, AdamW, where="x.toml")


@pytest.mark.parametrize(
    "job",
    [
        Run(
            name="a",
            model="w16",
            data="kjv",
            unique_tokens=256,
            epochs=1,
            batch_size=4,
            sequence_length=32,
            optimizer=AdamW(lr=0.01),
            distill=SequenceDistillation(samples="s", fraction=0.5),
        ),
        Ensemble(name="e", runs=("a", "b"), average="logits", member_weights=(0.25, 0.75)),
        Samples(name="s", source="e", tokens=10, max_length=5, temperature=0.5),
    ],
)
def test_jobs_survive_a_round_trip_through_tables(job: Run | Ensemble | Samples) -> None:
    assert from_table(to_table(job), type(job), where="job") == job


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"rate = \xff", "is not UTF-8 text"),
        (b"rate = = 1", "is not valid TOML"),
        (b"", "missing key 'rate'"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_toml(path, Outer)
    assert str(path) in str(caught.value)


def test_the_working_folder_is_searched_before_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("scales", "demo", ".toml").is_absolute()
    mine = tmp_path / "configs" / "scales" / "demo.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text("")
    assert find_config("scales", "demo", ".toml").resolve() == mine.resolve()
    assert find_config("scales", str(mine), ".toml") == mine
    with pytest.raises(ValueError, match=r"no 'dmo' \(did you mean 'demo'\?\)"):
        find_config("scales", "dmo", ".toml")
    with pytest.raises(ValueError, match=r"a/b.toml does not exist"):
        find_config("scales", "a/b.toml", ".toml")


def test_no_name_is_suggested_if_none_is_similar() -> None:
    assert nearest("zzz", ["abc"]) == ""
    assert nearest("abd", ["abc"]) == " (did you mean 'abc'?)"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "file"
    write_atomic(path, "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "sub" / "folder"

    def write(name: str) -> None:
        with replaced_folder(folder) as temporary:
            (temporary / name).write_text("")
            if name == "broken":
                raise OSError("disk full")

    write("old")
    (folder.with_name(".folder.tmp")).mkdir()
    (folder.with_name(".folder.tmp") / "left by a killed process").write_text("")
    with pytest.raises(OSError, match="disk full"):
        write("broken")
    assert [str(item.relative_to(folder.parent)) for item in folder.parent.rglob("*")] == ["folder", "folder/old"]
    write("new")
    assert [str(item.relative_to(folder.parent)) for item in folder.parent.rglob("*")] == ["folder", "folder/new"]
