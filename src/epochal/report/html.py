"""report.html: one page that contains its style, its figures and the scripts that draw them."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from epochal.report.claims import effect, reservations, tally, verdict
from epochal.report.figures import Key, page_scripts
from epochal.report.overview import CHAIN, Overview, hours_text, losses_in_words
from epochal.report.sections import (
    Section,
    all_claims,
    format_interval,
    format_number,
    numeric_columns,
    records_note,
    table_cells,
)

SHOWN = 2  # figures of a section that are not folded
TEMPLATE = "page.html.j2"


def render_html(
    sections: Sequence[Section],
    figures: Mapping[str, tuple[str, list[Key]]],
    *,
    title: str,
    summary: Sequence[str] = (),
    overview: Overview | None = None,
) -> str:
    """Render the page; `figures` holds what `render_interactive` returned for every figure of the sections by name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _with_code
    environment.filters["number"] = format_number
    environment.filters["hours"] = hours_text
    first = next((f for s in sections for f in s.figures if f.name == CHAIN), None) if overview else None
    page: str = environment.get_template(TEMPLATE).render(
        title=title,
        summary=summary,
        overview=overview,
        best=losses_in_words(overview.models) if overview else "",
        chain=first,
        tally=tally(all_claims(sections)),
        sections=[_section(number, section, moved=first) for number, section in enumerate(sections, 1)],
        figures=figures,
        scripts=page_scripts() if figures else [],
    )
    return page


def _section(number: int, section: Section, moved: Any) -> dict[str, Any]:
    """Return what the template shows of a section: figures first, then what is folded."""
    figures = [figure for figure in section.figures if figure is not moved]
    claims = [
        {
            "verdict": verdict(claim) + (f" ({effect(claim)})" if effect(claim) else ""),
            "text": claim.text,
            "evidence": [*_evidence(claim)],
            "provisional": bool(reservations(claim)) or claim.holds is None,
            "holds": claim.holds,
        }
        for claim in section.claims
    ]
    tables = [
        {"title": t.title, "columns": t.columns, "rows": table_cells(t), "numeric": numeric_columns(t)}
        for t in section.tables
    ]
    return {
        "id": f"q{number}",
        "title": section.title,
        "question": section.question,
        "tally": tally(section.claims) if section.claims else "",
        "claims": claims,
        "tables": tables,
        "figures": figures[:SHOWN],
        "more_figures": figures[SHOWN:],
        "notes": [*section.notes, *records_note(section)],
    }


def _evidence(claim: Any) -> list[str]:
    parts = [claim.value] if claim.value else []
    parts += [f"90%: {format_interval(claim)}"] if claim.interval else []
    parts += [f"{claim.seeds} seed{'s' * (claim.seeds > 1)}"]
    parts += [claim.untestable] if claim.untestable else []
    parts += [f"provisional: {'; '.join(reservations(claim))}"] if reservations(claim) else []
    return [*parts, f"paper: {claim.paper}"] if claim.paper else parts


def _with_code(text: str) -> Any:
    """Escape a text and set `code` between backticks as code, the only markup in reports."""
    from markupsafe import Markup

    def code(found: re.Match[str]) -> str:
        # A browser would end a line after the dashes of --scale.
        return "<code>" + re.sub(r"[^ ]*-[^ ]*", r"<span>\g<0></span>", found[1]) + "</code>"

    return Markup(re.sub(r"`([^`]+)`", code, escape(" ".join(text.split()))))
