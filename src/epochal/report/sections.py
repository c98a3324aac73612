"""What a recipe reports, as plain values, and how their numbers are shown.

Texts may mark `code` with backticks; everything else in them is shown as written.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from epochal.report.claims import Claim, verdict_line

DASH = "–"
Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose cells are str, float, int or None (missing)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that `draw(axes)` draws on one matplotlib Axes; its file is figures/<name>.svg."""

    name: str
    caption: str
    draw: Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one recipe reports: the question it answers, the results, and the command that produces its records."""

    title: str
    question: str
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


# --- how numbers are shown --------------------------------------------------------------------------------------------


def format_number(value: Cell, *, decimals: int = 4) -> str:
    """Show one cell: losses with 4 decimals, counts with separators, tiny numbers with 3 digits, None as a dash."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.{decimals}f}"
    if abs(value) < 0.01:
        # 0.0012 nats keep the four decimals of their column; a learning rate of 3e-5 would become 0.0000.
        return f"{value:.{decimals}f}" if abs(value) >= 10.0 ** (2 - decimals) else f"{value:.3g}"
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


MEASURED = re.compile(r"loss|nats|limit|asymptote|gain|excess|low|high|interval", re.IGNORECASE)


def format_column(name: str, cells: Sequence[Cell]) -> list[str]:
    """Show the cells of one column alike: settings (0.1, 0.4, 1.6) as written, measurements with 4 decimals.

    A column holds settings if three digits show each of its numbers exactly and its name is not of a measurement.
    """
    floats = [cell for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    if MEASURED.search(name) or not all(float(f"{cell:.3g}") == cell for cell in floats):
        return [format_number(cell) for cell in cells]
    return [
        _setting(cell) if isinstance(cell, float) and math.isfinite(cell) else format_number(cell) for cell in cells
    ]


def _setting(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def format_interval(claim: Claim) -> str:
    """Show the interval of a claim with the decimals of its value, at least two."""
    if claim.interval is None:
        return DASH

    shown = re.search(r"\d\.(\d+)", claim.value)
    decimals = max(2, len(shown[1])) if shown else 4
    low, high = (format_number(float(end), decimals=decimals) for end in claim.interval)
    return f"unbounded below, to {high}" if claim.interval[0] == -math.inf else f"{low} to {high}"


def claim_cells(claim: Claim) -> tuple[str, ...]:
    """Show a claim as one row of CLAIM_COLUMNS."""
    shown = format_interval(claim), str(claim.seeds), verdict_line(claim)
    return (claim.text, claim.paper or DASH, claim.value, *shown)


def table_cells(table: Table) -> list[tuple[str, ...]]:
    """Show all rows of a table; raises ValueError for a row of another length than `columns`."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title!r}: a row has {len(row)} cells for {len(table.columns)} columns.")
    columns = [format_column(name, [row[i] for row in table.rows]) for i, name in enumerate(table.columns)]
    return list(zip(*columns, strict=True))


def numeric_columns(table: Table) -> set[int]:
    """Return the indices of columns with at least one number and no text."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    return {
        i
        for i, cells in enumerate(columns)
        if any(isinstance(cell, int | float) for cell in cells) and not any(isinstance(cell, str) for cell in cells)
    }


# --- parts of sections --------------------------------------------------------------------------------------------------


def all_claims(sections: Sequence[Section]) -> list[Claim]:
    """Return the claims of all sections in order."""
    return [claim for section in sections for claim in section.claims]


def records_note(section: Section) -> tuple[str, ...]:
    """Return a note with the command that produces a section's records, if it has one."""
    return (f"Records made by `{section.command}`.",) if section.command else ()
