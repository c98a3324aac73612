"""Write a report: report.md, report.html, claims.json and the figures of all sections."""

import re
from collections.abc import Sequence
from pathlib import Path

from epochal.config import write_atomic
from epochal.report.claims import placed, render_claims
from epochal.report.figures import Key, render_interactive, render_svg, require_matplotlib
from epochal.report.html import render_html
from epochal.report.markdown import render_markdown
from epochal.report.overview import Overview
from epochal.report.sections import Figure, Section

Drawn = tuple[str, tuple[str, list[Key]]]  # as SVG, and for the page


def write_report(
    sections: Sequence[Section],
    folder: Path,
    *,
    title: str,
    summary: Sequence[str] = (),
    scale: str = "",
    overview: Overview | None = None,
) -> Path:
    """Write report.md, report.html, claims.json and figures/<name>.svg under `folder`.

    `scale` names the campaign in claims.json, by default the title does. Returns the path of report.html. The bytes
    depend on the arguments and the versions of the plotting libraries alone. Raises ValueError for a figure that cannot be
    drawn, two figures of one name and two claims of one id.
    """
    # Everything is rendered before the first file is touched, so a failing figure leaves an older report as it was.
    figures = _render_figures(sections)
    claims = render_claims(
        placed(claim, scale=scale or title, section=section.title, command=section.command)
        for section in sections
        for claim in section.claims
    )
    pages = {name: page for name, (_, page) in figures.items()}
    files = {
        **{f"figures/{name}.svg": svg for name, (svg, _) in figures.items()},
        "claims.json": claims,
        "report.md": render_markdown(sections, title=title, summary=summary, overview=overview),
        "report.html": render_html(sections, pages, title=title, summary=summary, overview=overview),
    }
    for name, text in files.items():
        write_atomic(folder / name, text)
    return folder / "report.html"


def _render_figures(sections: Sequence[Section]) -> dict[str, Drawn]:
    figures: dict[str, Drawn] = {}
    if any(section.figures for section in sections):
        require_matplotlib()
    for section in sections:
        for figure in section.figures:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", figure.name):
                raise ValueError(f"figure name {figure.name!r} must be letters, digits, - and _; rename the figure.")
            if figure.name in figures:
                raise ValueError(f"two figures are called {figure.name!r}; rename the one of {section.title!r}.")
            figures[figure.name] = _render_figure(figure)
    return figures


def _render_figure(figure: Figure) -> Drawn:
    try:
        return render_svg(figure.draw), render_interactive(figure.draw)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"figure {figure.name!r} could not be drawn ({what}); correct its draw function.") from error
