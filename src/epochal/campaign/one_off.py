"""Runs outside of any recipe: a planned or finished run with other fields, and other seeds."""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from epochal.config import flat_table, from_table, to_table
from epochal.names import named_run
from epochal.run import Run
from epochal.scale import Scale

NOT_MEANING = ("name", "init_seed", "order_seed")


def runs_like(like: Run, assignments: Sequence[str], seeds: int, scale: Scale) -> list[Run]:
    """Return `seeds` runs with other fields than `like`, given as `optimizer.clip=5`; one keeps the seed of `like`.

    Raises ValueError for an unknown field, a value of the wrong type, or no difference at all.
    """
    table = to_table(like)
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if not text:
            raise ValueError(f"{assignment!r} is not an assignment; write field=value, for example optimizer.clip=5.")
        _assign(table, name.split("."), _value(text))
    # Through the table types are checked, and 5 becomes 5.0 where the field is a float.
    run = from_table(table, Run, where=f"--like {like.name}")
    if not differences(run, like):
        raise ValueError(f"nothing differs from {like.name!r}; change a field, for example optimizer.clip=5.")
    # One run keeps the seed of `like`, so the two can be compared as a pair.
    if seeds == 1:
        return [named_run(run, scale.base)]
    numbers = range(scale.first_seed, scale.first_seed + seeds)
    return [named_run(replace(run, init_seed=seed, order_seed=seed), scale.base) for seed in numbers]


def described(run: Run, like: Run) -> str:
    """Return what differs as one line: optimizer.clip 5.0 (was 2.0)."""
    return ", ".join(f"{name} {new} (was {old})" for name, (old, new) in differences(run, like).items())


def differences(run: Run, like: Run) -> dict[str, tuple[Any, Any]]:
    """Return the fields whose values differ, as dotted name to (old, new); seeds apart.

    The old value is that of `like`, the new that of `run`.
    """
    values, old = flat_table(to_table(run)), flat_table(to_table(like))
    names = [name for name in {**old, **values} if name not in NOT_MEANING]
    return {name: (old.get(name), values.get(name)) for name in names if old.get(name) != values.get(name)}


def _assign(table: dict[str, Any], path: list[str], value: Any) -> None:
    first, *rest = path
    if rest == ["kind"]:
        # Another optimizer keeps the rates; SPECTRA goes around the one before.
        old = table.get(first)
        if not isinstance(old, dict) or "kind" not in old:
            raise ValueError(f"{'.'.join(path)!r} reaches into {first!r}, which has no kinds; correct the name.")
        rates = {name: old.get("base", old)[name] for name in ("lr", "wd")}
        table[first] = {"kind": value, "base": old} if value == "Spectra" else {"kind": value, **rates}
    elif rest:
        if not isinstance(table.get(first), dict):
            raise ValueError(f"{'.'.join(path)!r} reaches into {first!r}, which has no fields here; correct the name.")
        _assign(table[first], rest, value)
    else:
        table[first] = value


def _value(text: str) -> Any:
    """Read a value as TOML does; anything else is a string, so that names need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, a number of thousands of digits, or brackets without end
        return text
