"""Records to a report: values that a recipe returns, rendered as report.md, report.html and figures.

Recipes say what they found as plain values (Section, Claim, Table, Figure); nothing here knows a recipe. Texts may mark
`code` with backticks; everything else in them is shown as it is written. `report_figures.py` draws, `report_html.py`
makes the page.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from epochal.report.claims import CLAIM_COLUMNS, Claim, tally, verdict, verdict_line
from epochal.report.figures import draw_bars, draw_law, draw_series, figure_style

if TYPE_CHECKING:
    from rich.console import Console

DASH = "–"
Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: rows of str, float, int or None (missing)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure: `draw(axes)` draws on one matplotlib Axes; `name` becomes the file name."""

    name: str
    caption: str
    draw: Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one recipe reports; `question` is the sentence the recipe answers, `command` makes its records."""

    title: str
    question: str
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


# --- numbers and words ------------------------------------------------------------------------------------------------


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
        # a difference of 0.0012 nats keeps the four decimals of its column; a learning rate of 3e-5 would lose itself
        return f"{value:.{decimals}f}" if abs(value) >= 10.0 ** (2 - decimals) else f"{value:.3g}"
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


MEASURED = re.compile(r"loss|nats|limit|asymptote|gain|excess|low|high|interval", re.IGNORECASE)


def format_column(name: str, cells: Sequence[Cell]) -> list[str]:
    """Show the cells of one column alike: settings (0.1, 0.4, 1.6) as they were written, measurements with 4 decimals.

    A column is one of settings if three digits hold each of its numbers exactly and its name is of nothing measured.
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
    """Show the interval of a claim with as many decimals as its number has, and at least two."""
    if claim.interval is None:
        return DASH
    shown = re.search(r"\d\.(\d+)", claim.value)
    decimals = max(2, len(shown[1])) if shown else 4
    low, high = (format_number(float(end), decimals=decimals) for end in claim.interval)
    return f"{low} to {high}"


# --- the terminal -----------------------------------------------------------------------------------------------------


def all_claims(sections: Sequence[Section]) -> list[Claim]:
    """Return the claims of all sections in order."""
    return [claim for section in sections for claim in section.claims]


def summary_table(sections: Sequence[Section]) -> list[tuple[str, ...]]:
    """Rows of CLAIM_COLUMNS for every claim, as text."""
    return [
        (claim.text, claim.paper or DASH, claim.value, format_interval(claim), str(claim.seeds), verdict_line(claim))
        for claim in all_claims(sections)
    ]


def print_summary(sections: Sequence[Section], console: "Console") -> None:
    """Print every claim with its verdict, number and what it lacks: a few indented lines each, on any width."""
    from rich.padding import Padding
    from rich.text import Text

    colors = {True: "green", False: "red", None: "yellow"}
    for section in sections:
        if section.claims:
            console.print(Text(f"\n{section.title}", style="bold"))
        for claim in section.claims:
            # Text, because brackets in a claim are no markup
            line = Text.assemble((verdict(claim), colors[claim.holds]), "  ", claim.text)
            console.print(Padding(line, (0, 0, 0, 2)))
            console.print(Padding(Text(_evidence(claim)), (0, 0, 0, 6)))
    console.print(Text(f"\n{tally(all_claims(sections))}"))


def _evidence(claim: Claim) -> str:
    """Return what stands behind a verdict: number, interval, seeds, the paper's number, and what is missing."""
    parts = [claim.value] if claim.value else []
    parts += [f"90% {format_interval(claim)}"] if claim.interval else []
    parts += [f"{claim.seeds} seed{'s' * (claim.seeds > 1)}"]
    parts += [f"paper: {claim.paper}"] if claim.paper else []
    parts += [claim.untestable] if claim.untestable else []
    parts += [f"provisional: {', '.join(claim.provisional)}"] if claim.provisional else []
    return "; ".join(parts)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def render_markdown(sections: Sequence[Section], *, title: str, summary: Sequence[str] = ()) -> str:
    """Render report.md: all claims first, then a section per recipe, figures as relative links."""
    lines = [f"# {_md(title)}", *(_md(line) for line in summary), "## All claims", tally(all_claims(sections))]
    claims = all_claims(sections)
    if claims:
        rows = [
            [*map(_md, row[:-1]), verdict(claim) + _md_reasons(claim)]
            for claim, row in zip(claims, summary_table(sections), strict=True)
        ]
        lines.append(_md_table(CLAIM_COLUMNS, rows, right={4}))
    for section in sections:
        lines += _md_section(section)
    return "\n\n".join(lines) + "\n"


def _md_section(section: Section) -> list[str]:
    lines = [f"## {_md(section.title)}", f"*{_md(section.question)}*"]
    for table in section.tables:
        lines += [f"**{_md(table.title)}**", markdown_table(table)]
    for figure in section.figures:
        caption = _md(figure.caption)
        # a bracket inside the alternative text would end it
        alt = re.sub(r"[\[\]]", "", caption)
        lines += [f"![{alt}](figures/{figure.name}.svg)", caption]
    notes = "\n".join(f"- {_md(note)}" for note in (*section.notes, *made_by(section)))
    return [*lines, notes] if notes else lines


def markdown_table(table: Table) -> str:
    """Render a table without its title; numbers stand to the right."""
    columns = [format_column(name, [row[i] for row in _checked(table)]) for i, name in enumerate(table.columns)]
    rows = [[_md(cell) for cell in row] for row in zip(*columns, strict=True)]
    return _md_table(table.columns, rows, right=numeric_columns(table))


def made_by(section: Section) -> tuple[str, ...]:
    """Return a note on the command that makes a section's records, if it is known."""
    return (f"Records made by `{section.command}`.",) if section.command else ()


def _md_reasons(claim: Claim) -> str:
    if claim.untestable:
        return f": {_md(claim.untestable)}"
    return f"; *provisional*: {_md('; '.join(claim.provisional))}" if claim.provisional else ""


def _md_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int]) -> str:
    rule = ["--:" if i in right else "---" for i in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([_md(name) for name in columns], rule, *rows))


def _md(text: str) -> str:
    """Escape what Markdown would read as markup, except inside `code`; a table cell ends at any bare |."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    plain = [part if i % 2 else re.sub(r"([\\*_\[\]`~])", r"\\\1", part) for i, part in enumerate(parts)]
    plain = [part if i % 2 else part.replace("&", "&amp;").replace("<", "&lt;") for i, part in enumerate(plain)]
    return "".join(plain).replace("|", r"\|")


def numeric_columns(table: Table) -> set[int]:
    """Columns that hold numbers, which stand to the right: no text, and one number at least."""
    columns = range(len(table.columns))
    texts = {i for row in _checked(table) for i in columns if isinstance(row[i], str)}
    return {i for row in table.rows for i in columns if isinstance(row[i], int | float)} - texts


def _checked(table: Table) -> tuple[tuple[Cell, ...], ...]:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title!r}: a row has {len(row)} cells for {len(table.columns)} columns.")
    return table.rows


__all__ = [
    "Claim",
    "Figure",
    "Section",
    "Table",
    "draw_bars",
    "draw_law",
    "draw_series",
    "figure_style",
    "format_interval",
    "format_number",
    "print_summary",
    "render_markdown",
    "summary_table",
]
