"""report.html: one static page that contains its style and its figures."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from epochal.report.claims import CLAIM_COLUMNS, tally
from epochal.report.sections import Section, all_claims, claim_cells, numeric_columns, records_note, table_cells

CSS = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1f2328; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .875rem; }
caption { text-align: left; font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #d5d9de; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; max-width: 37rem; }
svg { width: 100%; height: auto; }
"""


def render_html(
    sections: Sequence[Section], figures: Mapping[str, str], *, title: str, summary: Sequence[str] = ()
) -> str:
    """Render the page; `figures` holds the SVG of every figure of the sections by name."""
    claims = all_claims(sections)
    parts = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(line)}</p>" for line in summary)]
    parts += ["<h2>All claims</h2>", f"<p>{_text(tally(claims))}</p>"]
    if claims:
        # Column 4 is the number of seeds.
        parts.append(_table("", CLAIM_COLUMNS, [claim_cells(claim) for claim in claims], numeric={4}))
    for section in sections:
        parts += _section(section, figures)
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _section(section: Section, figures: Mapping[str, str]) -> list[str]:
    parts = [f"<h2>{_text(section.title)}</h2>", f"<p><em>{_text(section.question)}</em></p>"]
    for table in section.tables:
        parts.append(_table(table.title, table.columns, table_cells(table), numeric_columns(table)))
    for figure in section.figures:
        svg = figures[figure.name]
        # HTML takes the svg element without its XML header. matplotlib derives the ids that are referred to from their
        # content, so equal ids of two figures mean the same.
        svg = svg[svg.index("<svg") :]
        parts.append(f"<figure>\n{svg}<figcaption>{_text(figure.caption)}</figcaption>\n</figure>")
    notes = (*section.notes, *records_note(section))
    return [*parts, "<ul>", *(f"<li>{_text(note)}</li>" for note in notes), "</ul>"] if notes else parts


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: set[int]) -> str:
    lines = [_row("th", columns, numeric), *(_row("td", row, numeric) for row in rows)]
    caption = f"<caption>{_text(title)}</caption>\n" if title else ""
    return f"<div><table>\n{caption}" + "\n".join(lines) + "\n</table></div>"


def _row(tag: str, cells: Sequence[str], numeric: set[int]) -> str:
    classes = (' class="number"' if i in numeric else "" for i in range(len(cells)))
    return (
        "<tr>" + "".join(f"<{tag}{c}>{_text(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True)) + "</tr>"
    )


def _text(text: str) -> str:
    """Escape a text and set `code` between backticks as code, the only markup in reports."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(text.split())))
