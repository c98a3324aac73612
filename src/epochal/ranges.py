"""What a field may hold, declared once next to its type.

It is checked whenever a value is made:

    @dataclass(frozen=True)
    class Plan(Ranged):
        seeds: Annotated[int, Range(1, 1000)]
        lr: tuple[Rate, ...]

Every number has a lowest and a highest value, so NaN, infinities and counts that no machine finishes are refused.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

LONGEST_SHOWN = 80  # characters of a refused value in an error
LONGEST_NAME = 200  # characters; a file name ends at 255

Check = Callable[[Any, str], None]


def shown(value: Any) -> str:
    """Write a refused value for an error, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python does not write integers of more than 4,300 digits, nor deep nesting
        text = f"a {type(value).__name__} that is too long to write"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


NAME = re.compile(r"\w[\w.-]*")  # of any script
ASCII_NAME = re.compile(NAME.pattern, re.ASCII)


def is_name(text: str) -> bool:
    """Whether a text can name files and tables: letters, digits, '.', '_' and '-', no dot or dash first."""
    return len(text) <= LONGEST_NAME and NAME.fullmatch(text) is not None


# --- marks, for `Annotated` ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`; with `above` or `below` without that end."""

    low: float
    high: float
    above: bool = False  # the lowest value is not allowed
    below: bool = False  # the highest value is not allowed

    def checker(self, hint: Any) -> Check:
        """Return the check of an int or a float; a float field may hold 1 for 1.0."""
        kinds = (int,) if hint is int else (int, float)
        low = math.nextafter(self.low, math.inf) if self.above else self.low
        high = math.nextafter(self.high, -math.inf) if self.below else self.high
        sentence = f"must be {'an integer' if hint is int else 'a number'} {self}"

        def check(value: Any, where: str) -> None:
            # NaN is in no range. Integers compare exactly with floats, however large. The type of True is bool.
            if type(value) in kinds and low <= value <= high:
                return
            is_number = isinstance(value, kinds) and not isinstance(value, bool)  # such as numpy's float
            if not is_number or not low <= value <= high:
                raise ValueError(f"{where} {sentence}, got {shown(value)}.")

        return check

    def check(self, value: float, where: str, hint: Any = int) -> None:
        """Raise ValueError unless a number of the type `hint` is in this range."""
        self.checker(hint)(value, where)

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        if self.low == self.high:
            return f"equal to {low}"
        if self.above:
            return f"above {low} and {'below' if self.below else 'at most'} {high}"
        return f"from {low} to {'below ' if self.below else ''}{high}"


@dataclass(frozen=True)
class OneOf:
    """One of a few texts."""

    choices: tuple[str, ...]

    def checker(self, hint: Any = str) -> Check:
        """Return the check of a text."""

        def check(value: Any, where: str) -> None:
            if value not in self.choices:
                raise ValueError(f"{where} is {shown(value)}; choose from {', '.join(self.choices)}.")

        return check


@dataclass(frozen=True)
class Items:
    """The number and order of a tuple's values."""

    least: int = 1
    most: int = 10_000
    distinct: bool = True
    ascending: bool = False

    def checker(self, hint: Any) -> Check:
        """Return the check of a tuple or list."""

        def check(value: Any, where: str) -> None:
            if len(value) < self.least:
                raise ValueError(f"{where} is {shown(list(value)) if value else 'empty'}; give at least {self.least}.")
            if len(value) > self.most:
                raise ValueError(f"{where} holds {len(value):,} values; give at most {self.most:,}.")
            if self.distinct and len(set(value)) < len(value):
                raise ValueError(f"{where} holds a value twice, {shown(list(value))}; give each once.")
            if self.ascending and list(value) != sorted(value):
                raise ValueError(f"{where} must ascend, got {shown(list(value))}; sort its values.")

        return check


@dataclass(frozen=True)
class Named:
    """The name of a job, which is also that of its files."""

    def checker(self, hint: Any) -> Check:
        """Return the check of a name in ASCII."""

        def check(value: Any, where: str) -> None:
            if not isinstance(value, str) or len(value) > LONGEST_NAME or not ASCII_NAME.fullmatch(value):
                raise ValueError(
                    f"{where} is {shown(value)}; use letters, digits, '.', '_' and '-', not starting with a dot or dash, "
                    f"at most {LONGEST_NAME} characters."
                )

        return check


# --- ranges that several fields share ---------------------------------------------------------------------------------

Tokens = Annotated[int, Range(1, 10**14)]
TokensOrNone = Annotated[int, Range(0, 10**14)]  # 0 for none
Characters = Annotated[int, Range(0, 10**9)]  # 0 for none
SequenceTokens = Annotated[int, Range(2, 2**24)]  # the shortest sequence has one prediction
Batch = Annotated[int, Range(1, 10**7)]  # sequences
Epochs = Annotated[int, Range(1, 10**5)]
Evaluations = Annotated[int, Range(1, 10_000)]
Repeats = Annotated[int, Range(1, 1000)]  # seeds, members, repetitions
Seed = Annotated[int, Range(0, 2**32 - 1)]
Kept = Annotated[int, Range(1, 2**24)]  # tokens of a distribution
Rate = Annotated[float, Range(1e-12, 100.0)]  # a learning rate
Decay = Annotated[float, Range(0.0, 10_000.0)]  # 0 for no decay
Share = Annotated[float, Range(0.0, 1.0)]
SomeShare = Annotated[float, Range(0.0, 1.0, above=True)]
LessThanAll = Annotated[float, Range(0.0, 1.0, below=True)]
Positive = Annotated[float, Range(1e-12, 1e9)]
Temperature = Annotated[float, Range(1e-3, 1e3)]
Loss = Annotated[float, Range(0.0, 1e9)]  # nats per token


# --- checks -----------------------------------------------------------------------------------------------------------


class Ranged:
    """Base of dataclasses whose fields have ranges; a class with further checks calls this one first."""

    def __post_init__(self) -> None:
        """Raise ValueError for the first field that is outside of its range."""
        cls: Any = type(self)
        for name, check in _checks(cls):
            check(getattr(self, name), name)


@functools.cache
def _checks(cls: Any) -> tuple[tuple[str, Check], ...]:
    """Return the checks of a dataclass by field."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = ((field.name, checker(hints[field.name])) for field in dataclasses.fields(cls))
    return tuple((name, check) for name, check in found if check is not None)


def check_known(table: Mapping[str, Any], cls: Any) -> None:
    """Check the keys of a table that are fields of a dataclass; others are ignored.

    Raises ValueError for the first that is missing or not as declared.
    """
    for name, check in _checks(cls):
        if name in table:
            check(table[name], name)
        elif name in _required(cls):
            raise ValueError(f"misses {name}")


@functools.cache
def _required(cls: Any) -> set[str]:
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}


def checker(hint: Any) -> Check | None:
    """Return the check of a value of this type hint, for which it raises ValueError; None without any mark."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, *marks = arguments
        inner = checker(base)
        return _all_of([*([inner] if inner else []), *(mark.checker(base) for mark in marks)])
    if origin in (types.UnionType, typing.Union):
        # At most one choice has a range: `int | None`.
        found = [check for choice in arguments if (check := checker(choice)) is not None]
        return _unless_none(found[0]) if found else None
    if origin is tuple or origin is dict:
        each = checker(arguments[0 if origin is tuple else 1])
        return None if each is None else (_each_of if origin is tuple else _each_in)(each)
    return None


def _all_of(checks: list[Check]) -> Check:
    def check(value: Any, where: str) -> None:
        for one in checks:
            one(value, where)

    return checks[0] if len(checks) == 1 else check


def _unless_none(one: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if value is not None:
            one(value, where)

    return check


def _each_of(one: Check) -> Check:
    def check(values: Any, where: str) -> None:
        if not isinstance(values, tuple | list):
            raise ValueError(f"{where} must be a list, got {shown(values)}.")
        place = f"each of {where.removeprefix('each of ')}"
        for value in values:
            one(value, place)

    return check


def _each_in(one: Check) -> Check:
    def check(values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be a table, got {shown(values)}.")
        place = f"each of {where.removeprefix('each of ')}"
        for value in values.values():
            one(value, place)

    return check
