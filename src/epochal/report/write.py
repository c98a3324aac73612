"""Write a report: report.md, report.html, claims.json and the figures of all sections."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from epochal.config import write_atomic
from epochal.report.claims import placed, render_claims
from epochal.report.figures import Drawing, render, require_matplotlib
from epochal.report.html import render_html
from epochal.report.sections import Figure, Section, render_markdown


def write_report(
    sections: Sequence[Section], folder: Path, *, title: str, summary: Sequence[str] = (), scale: str = ""
) -> Path:
    """Write report.md, report.html, claims.json and figures/<name>.svg and .png under `folder`.

    Returns the path of report.html. `scale` names the campaign in claims.json; the title does where it is empty.

    Everything is rendered before the first file is touched, so a failing figure leaves an older report as it was.
    The bytes depend on the arguments and the version of matplotlib alone.
    """
    drawings = _draw_all(sections)
    markdown = render_markdown(sections, title=title, summary=summary)
    page = render_html(sections, drawings, title=title, summary=summary)
    claims = render_claims(
        placed(claim, scale=scale or title, section=section.title, command=section.command)
        for section in sections
        for claim in section.claims
    )
    for name, drawing in drawings.items():
        write_atomic(folder / "figures" / f"{name}.svg", drawing.svg)
        write_atomic(folder / "figures" / f"{name}.png", drawing.png)
    write_atomic(folder / "claims.json", claims)
    write_atomic(folder / "report.md", markdown)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _draw_all(sections: Sequence[Section]) -> Mapping[str, Drawing]:
    drawings: dict[str, Drawing] = {}
    if any(section.figures for section in sections):
        require_matplotlib()
    for section in sections:
        for figure in section.figures:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", figure.name):
                raise ValueError(f"figure name {figure.name!r} is no file name; use letters, digits, - and _ only.")
            if figure.name in drawings:
                raise ValueError(f"two figures are called {figure.name!r}; rename the one of {section.title!r}.")
            drawings[figure.name] = _draw_one(figure)
    return drawings


def _draw_one(figure: Figure) -> Drawing:
    try:
        return render(figure.name, figure.draw)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"figure {figure.name!r} could not be drawn ({what}); correct its draw function.") from error
