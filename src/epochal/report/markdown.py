"""report.md: all claims first, then one part for each section."""

import re
from collections.abc import Sequence

from epochal.report.claims import CLAIM_COLUMNS, tally
from epochal.report.overview import Overview, losses_in_words, overview_table
from epochal.report.sections import (
    Section,
    Table,
    all_claims,
    claim_cells,
    numeric_columns,
    records_note,
    table_cells,
)


def render_markdown(
    sections: Sequence[Section], *, title: str, summary: Sequence[str] = (), overview: Overview | None = None
) -> str:
    """Render report.md; figures are links relative to it."""
    claims = all_claims(sections)
    lines = [f"# {_escape(title)}", *_first(overview), *map(_escape, summary), "## All claims", tally(claims)]
    if claims:
        lines.append(_table(CLAIM_COLUMNS, [claim_cells(claim) for claim in claims], numeric={4}))
    for section in sections:
        lines += _section(section)
    return "\n\n".join(lines) + "\n"


def _first(overview: Overview | None) -> list[str]:
    if overview is None:
        return []
    parts = [losses_in_words(overview.models), _escape(overview.regime)]
    parts += [markdown_table(overview_table(overview.models))] if overview.models else []
    parts += [f"**How sure.** {_escape(overview.sure)}", f"**Next step.** {_escape(overview.next_step)}"]
    return [part for part in parts if part]


def _section(section: Section) -> list[str]:
    lines = [f"## {_escape(section.title)}", f"*{_escape(section.question)}*"]
    for figure in section.figures:
        caption = _escape(figure.caption)
        # A bracket would end the alternative text.
        alt = re.sub(r"[\[\]]", "", caption)
        lines += [f"![{alt}](figures/{figure.name}.svg)", caption]
    for table in section.tables:
        lines += [f"**{_escape(table.title)}**", markdown_table(table)]
    notes = "\n".join(f"- {_escape(note)}" for note in (*section.notes, *records_note(section)))
    return [*lines, notes] if notes else lines


def markdown_table(table: Table) -> str:
    """Render a table without its title; columns of numbers are aligned to the right."""
    return _table(table.columns, table_cells(table), numeric_columns(table))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: set[int]) -> str:
    rule = ["--:" if i in numeric else "---" for i in range(len(columns))]
    escaped = [[_escape(cell) for cell in row] for row in (columns, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:]))


def _escape(text: str) -> str:
    """Escape Markdown and HTML except inside `code`; a bare | ends a table cell even in code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    for i in range(0, len(parts), 2):  # the odd parts are code
        plain = re.sub(r"([\\*_\[\]`~])", r"\\\1", parts[i])
        parts[i] = plain.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(parts).replace("|", r"\|")
