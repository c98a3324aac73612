"""report.html: one page that carries its style, its script and its figures, and asks the network for nothing.

Without the script everything is readable; the script sorts tables and shows the numbers of points. Colours of the
figures are replaced by CSS variables, so that one drawing serves light, dark and print.
"""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from epochal.report.claims import Claim, tally, verdict
from epochal.report.figures import GRID, INK, PALETTE, PAPER, Drawing, Point
from epochal.report.sections import (
    DASH,
    Figure,
    Section,
    Table,
    all_claims,
    format_column,
    format_interval,
    format_number,
    made_by,
    numeric_columns,
)

COLORS = {
    **{color: f"var(--c{i})" for i, color in enumerate(PALETTE)},
    INK: "var(--ink)",
    "#000000": "var(--ink)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
}

CSS = """
:root {
  color-scheme: light;
  --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d5d9de; --grid: #e3e5e8; --tint: #f5f6f8; --link: #00518a;
  --good: #136c2e; --bad: #b3261e; --open: #7a5600;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; --c6: #7f7f7f;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Palatino, "Source Serif 4", "DejaVu Serif", Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --paper: #14171b; --ink: #e4e7eb; --soft: #9aa4af; --line: #363c44; --grid: #2a2f36; --tint: #1c2026;
    --link: #7cc0f5;    --good: #6fcf8a; --bad: #ff9089; --open: #e6bd5c;
    --c0: #4fa8e8; --c1: #ff8c4d; --c2: #36c79b; --c3: #e6a3c9; --c4: #f0b840; --c5: #8ed0f7; --c6: #a5a5a5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1.0625rem/1.6 var(--serif); }
.page { max-width: 47rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1, h2, h3 { font-family: var(--sans); line-height: 1.25; text-wrap: balance; overflow-wrap: break-word; }
h1 { font-size: 2rem; letter-spacing: -0.015em; margin: 0 0 1rem; }
h2 { font-size: 1.4rem; letter-spacing: -0.01em; margin: 3.5rem 0 .5rem; }
p { margin: 0 0 .9rem; overflow-wrap: break-word; }
a { color: var(--link); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 2px; }
code { font: .88em var(--mono); background: var(--tint); padding: .1em .3em; border-radius: 3px; }
.lead { font-size: 1.2rem; line-height: 1.5; }
.question { font-style: italic; color: var(--soft); font-size: 1.1rem; margin-bottom: 1.5rem; }
.soft { color: var(--soft); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--paper); padding: .5rem 1rem; z-index: 3; }
nav { font: .92rem/1.5 var(--sans); border-block: 1px solid var(--line); padding: .8rem 0; margin: 2rem 0; }
nav h2 { font-size: .78rem; text-transform: uppercase; letter-spacing: .07em; color: var(--soft); margin: 0 0 .3rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav a { text-decoration: none; display: inline-block; padding: .12rem 0; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: 1.25rem 0 2rem; }
table { border-collapse: collapse; width: 100%; font: .875rem/1.45 var(--sans); font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; padding-block: 0; }
.num { text-align: right; }
.num, .short { white-space: nowrap; }
.long { min-width: 14rem; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: .45rem 0; margin: 0;
  cursor: pointer; text-align: inherit; }
th button::after { content: "\\2195"; opacity: .3; margin-left: .3em; font-size: .85em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
th button:hover::after { opacity: 1; }
.claims td { padding-block: .65rem; }
.claims td:nth-child(2) { min-width: 17rem; }
.claims td:nth-child(3) { min-width: 9rem; }
.value { font-weight: 600; }
.verdict { font-weight: 600; display: inline-block; min-width: 7.5rem; max-width: 9rem; }
.holds { color: var(--good); } .fails { color: var(--bad); } .open { color: var(--open); }
.away { color: var(--soft); }
.aside { display: block; color: var(--soft); font-size: .93em; margin-top: .15rem; }
figure { margin: 1.75rem 0 2.25rem; }
.plot { display: block; width: 100%; max-width: 37rem; height: auto; margin: 0 auto; fill: var(--ink); }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.hit { fill: transparent; stroke: none; cursor: crosshair; }
.hit.on { stroke: var(--ink); stroke-width: 1.1; }
figcaption { font-size: .95rem; line-height: 1.5; color: var(--soft); max-width: 37rem; margin: .6rem auto 0; }
details { font: .875rem/1.45 var(--sans); max-width: 37rem; margin: .5rem auto 0; }
summary { cursor: pointer; color: var(--link); padding: .2rem 0; width: fit-content; }
details .scroll { max-height: 24rem; overflow: auto; margin: .5rem 0; }
.notes { padding-left: 1.1rem; font-size: .98rem; }
.notes li { margin: .3rem 0; overflow-wrap: break-word; }
#tip { position: absolute; z-index: 2; pointer-events: none; max-width: 20rem; padding: .4rem .65rem;
  background: var(--ink); color: var(--paper); font: .8125rem/1.45 var(--sans); font-variant-numeric: tabular-nums;
  border-radius: 4px; white-space: pre-line; }
#tip:empty { display: none; }
@media (min-width: 76rem) {
  .page { max-width: 66rem; display: grid; grid-template-columns: 13rem minmax(0, 47rem); column-gap: 4rem; }
  .page > * { grid-column: 2; }
  .page > nav { grid-column: 1; grid-row: 1 / span 99; border: 0; margin: .4rem 0 0; padding: 0; position: sticky;
    top: 2.5rem; align-self: start; max-height: calc(100vh - 4rem); overflow-y: auto; }
  nav a { padding: .25rem 0; line-height: 1.35; }
}
@media screen and (max-width: 40rem) {
  body { font-size: 1rem; }
  .page { padding-top: 1.5rem; }
  h1 { font-size: 1.6rem; }
  .claims thead { position: absolute; left: -99rem; }
  .claims tr { display: block; padding: .8rem 0; border-bottom: 1px solid var(--line); }
  .claims td, .claims td:nth-child(n) { display: block; border: 0; padding: .1rem 0; min-width: 0; text-align: left; }
  .claims td.num::before { content: attr(data-label) ": "; color: var(--soft); }
  .verdict { max-width: none; }
}
@media print {
  body { font-size: 10.5pt; }
  .page { max-width: none; padding: 0; }
  nav, .skip, details, th button::after { display: none; }
  figure, tr, .claims { break-inside: avoid; }
  h2 { break-after: avoid; }
  .plot { max-width: 13cm; }
  .scroll { overflow: visible; }
}
"""

JS = """
"use strict";
const key = cell => cell.dataset.value ?? cell.textContent.trim();
const compare = (a, b) => {
  const x = Number(a), y = Number(b);
  return a !== "" && b !== "" && !isNaN(x) && !isNaN(y) ? x - y : a.localeCompare(b, "en", { numeric: true });
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [key(row.cells[column]), row]);
    // missing values stay last, whichever way the rest is sorted
    rows.sort(([a], [b]) => (a === "") - (b === "") || sign * compare(a, b));
    body.append(...rows.map(pair => pair[1]));
  });
}
const tip = document.getElementById("tip");
let shown = null;
const hide = () => { if (shown) shown.classList.remove("on"); shown = null; tip.textContent = ""; };
const show = hit => {
  hide();
  shown = hit;
  hit.classList.add("on");
  tip.textContent = hit.dataset.text;
  const box = hit.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = Math.max(8, Math.min(room, box.left + box.width / 2 - tip.offsetWidth / 2)) + scrollX + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 6) + scrollY + "px";
};
for (const plot of document.querySelectorAll(".plot")) {
  const hits = [...plot.querySelectorAll(".hit")];
  for (const hit of hits) {
    const title = hit.querySelector("title");
    hit.dataset.text = title.textContent;
    title.remove();  // or the browser would show it a second time
  }
  if (!hits.length) continue;
  plot.setAttribute("tabindex", "0");
  plot.addEventListener("pointerover", event => { const hit = event.target.closest(".hit"); if (hit) show(hit); });
  plot.addEventListener("pointerout", event => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const at = hits.indexOf(shown);
    show(hits[at < 0 ? (step > 0 ? 0 : hits.length - 1) : (at + step + hits.length) % hits.length]);
  });
}
document.addEventListener("pointerdown", event => { if (!event.target.closest(".hit")) hide(); });
"""


def render_html(
    sections: Sequence[Section], drawings: Mapping[str, Drawing], *, title: str, summary: Sequence[str] = ()
) -> str:
    """Render the page; `drawings` holds every figure of the sections by name."""
    parts = [f"<h1>{_text(title)}</h1>"]
    parts += [f'<p class="lead">{_text(line)}</p>' for line in summary[:1]]
    parts += [f"<p>{_text(line)}</p>" for line in summary[1:]]
    head = "\n".join(parts)
    body = "\n".join(_section(i, section, drawings) for i, section in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{_plain(title)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#claims">Skip to the claims</a>
<div class="page">
<header>
{head}
</header>
{_contents(sections)}
<main>
<section id="claims">
<h2>All claims</h2>
<p class="soft">{_text(tally(all_claims(sections)))}</p>
{_claims(all_claims(sections))}
</section>
{body}
</main>
</div>
<div id="tip" role="status"></div>
<script>{JS}</script>
</body>
</html>
"""


def _plain(text: str) -> str:
    return escape(" ".join(text.split()), quote=True)


def _text(text: str) -> str:
    """Escaped text in which `code` between backticks is set as code: the only markup that reports know."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _plain(text))


def _contents(sections: Sequence[Section]) -> str:
    items = "".join(f'\n<li><a href="#s{i}">{_text(section.title)}</a></li>' for i, section in enumerate(sections))
    return f"""<nav aria-label="Contents">
<h2>Contents</h2>
<ol>
<li><a href="#claims">All claims</a></li>{items}
</ol>
</nav>"""


def _section(index: int, section: Section, drawings: Mapping[str, Drawing]) -> str:
    parts = [f'<h2 id="h{index}">{_text(section.title)}</h2>', f'<p class="question">{_text(section.question)}</p>']
    parts += [_table(table) for table in section.tables]
    parts += [_figure(figure, drawings[figure.name]) for figure in section.figures]
    if section.notes or section.command:
        notes = "\n".join(f"<li>{_text(note)}</li>" for note in (*section.notes, *made_by(section)))
        parts.append(f'<ul class="notes">\n{notes}\n</ul>')
    return f'<section id="s{index}" aria-labelledby="h{index}">\n' + "\n".join(parts) + "\n</section>"


# --- tables -----------------------------------------------------------------------------------------------------------


def _heads(columns: Sequence[str], right: set[int]) -> str:
    cells = (
        f'<th scope="col" aria-sort="none"{_right(i, right)}><button type="button">{_text(name)}</button></th>'
        for i, name in enumerate(columns)
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _right(column: int, right: set[int]) -> str:
    return ' class="num"' if column in right else ""


def _short(text: str) -> str:
    """Keep names such as width-64 on one line, and sentences from being squeezed: a narrow screen scrolls instead."""
    return ' class="short"' if len(text) <= 24 else ' class="long"' if len(text) > 60 else ""


def _key(value: str | float | int | None) -> str:
    """Give what a cell sorts by: the number at full precision, nothing for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ' data-value=""'
    if isinstance(value, float) and math.isinf(value):
        return f' data-value="{"-" if value < 0 else ""}Infinity"'
    if isinstance(value, str):
        return ""
    return f' data-value="{value:d}"' if isinstance(value, int) else f' data-value="{value!r}"'


def _table(table: Table) -> str:
    right = numeric_columns(table)
    columns = [format_column(name, [row[i] for row in table.rows]) for i, name in enumerate(table.columns)]
    rows = []
    for row, shown in zip(table.rows, zip(*columns, strict=True), strict=True):
        cells = (
            f"<td{_right(i, right) or _short(text)}{_key(value)}>{_text(text)}</td>"
            for i, (value, text) in enumerate(zip(row, shown, strict=True))
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(rows)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{_plain(table.title)}"><table>
<caption>{_text(table.title)}</caption>
{_heads(table.columns, right)}
<tbody>
{body}
</tbody></table></div>"""


CLAIM_HEADS = ("Verdict", "Claim", "Here", "Seeds")
"""Fewer columns than CLAIM_COLUMNS: the paper's number stands under the claim, the interval under the number."""


def _claims(claims: Sequence[Claim]) -> str:
    if not claims:
        return ""
    body = "\n".join(_claim(claim) for claim in claims)
    return f"""<div class="scroll"><table class="claims">
{_heads(CLAIM_HEADS, {3})}
<tbody>
{body}
</tbody></table></div>"""


def _claim(claim: Claim) -> str:
    kind, sign = {True: ("holds", "✓"), False: ("fails", "✗"), None: ("open", "?")}[claim.holds]
    if claim.untestable:
        kind, sign = "away", "–"
    number = re.search(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", claim.value)
    sort = number[0].replace(",", "") if number else ""
    below = f"90%: {format_interval(claim)}" if claim.interval else ""
    cells = (
        ("", f'<span class="verdict {kind}"><span aria-hidden="true">{sign}</span> {verdict(claim)}</span>'),
        ("", _text(claim.text) + _asides(claim)),
        (f' data-value="{sort}"', f'<span class="value">{_text(claim.value or DASH)}</span>' + _aside(below)),
        (f' class="num"{_key(claim.seeds)}', format_number(claim.seeds)),
    )
    tds = (
        f'<td data-label="{label}"{attributes}>{shown}</td>'
        for label, (attributes, shown) in zip(CLAIM_HEADS, cells, strict=True)
    )
    return f"<tr>{''.join(tds)}</tr>"


def _asides(claim: Claim) -> str:
    """Say under a claim what the paper found, and what stands between the records and a verdict."""
    paper = f"Paper: {claim.paper}." if claim.paper else ""
    reasons = f"Provisional: {'; '.join(claim.provisional)}." if claim.provisional else ""
    return _aside(paper) + _aside(claim.untestable or reasons)


def _aside(text: str) -> str:
    return f' <span class="aside">{_text(text)}</span>' if text else ""


# --- figures ----------------------------------------------------------------------------------------------------------


def _figure(figure: Figure, drawing: Drawing) -> str:
    return f"""<figure id="fig-{figure.name}">
{_inline(drawing, figure.caption)}
<figcaption>{_text(figure.caption)}</figcaption>
{_numbers(drawing)}
</figure>"""


def _inline(drawing: Drawing, caption: str) -> str:
    """Make the drawing part of the page: own identifiers, CSS colours, and a target over every point."""
    box = re.search(r'viewBox="([^"]+)"', drawing.svg)
    assert box is not None
    inner = drawing.svg[drawing.svg.index(">", drawing.svg.index("<svg")) + 1 : drawing.svg.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", inner, flags=re.DOTALL)
    # every matplotlib figure calls its parts by the same names, and one page holds many figures
    inner = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", inner).replace("xlink:href", "href")
    inner = re.sub(r"(?<=[: ])#[0-9a-f]{6}\b", lambda color: COLORS.get(color[0], color[0]), inner)
    inner = re.sub(r"\s*\n\s*", "\n", inner).strip()
    hits = "\n".join(_hit(point, drawing) for point in drawing.points)
    label = _plain(caption)
    return f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{label}">\n{inner}\n<g>{hits}</g>\n</svg>'


def _hit(point: Point, drawing: Drawing) -> str:
    title = f"<title>{escape(_describe(point, drawing))}</title>"
    if point.box:
        left, top, width, height = point.box
        place = f'<rect class="hit" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}">'
        return f"{place}{title}</rect>"
    return f'<circle class="hit" cx="{point.at[0]:.1f}" cy="{point.at[1]:.1f}" r="6.5">{title}</circle>'


def _describe(point: Point, drawing: Drawing) -> str:
    lines = [point.series] if point.series else []
    if isinstance(point.x, str):
        lines.append(" ".join(point.x.split()))
    elif math.isfinite(point.x):
        lines.append(f"{drawing.x_label}: {_coordinate(point.x)}")
    lines.append(f"{drawing.y_label}: {format_number(point.y)}")
    if point.low is not None and point.high is not None:
        lines.append(f"90%: {format_number(point.low)} to {format_number(point.high)}")
    return "\n".join(lines)


def _coordinate(value: float) -> str:
    """Show a position on the x axis, which is a setting and no measurement."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def _numbers(drawing: Drawing) -> str:
    """List the points in a table to open: for those who cannot point, and for those who copy numbers."""
    if not drawing.points:
        return ""
    columns = ["Series", drawing.x_label, drawing.y_label, "90% low", "90% high"]
    rows = []
    for point in drawing.points:
        where = point.x if isinstance(point.x, str) else _coordinate(point.x) if math.isfinite(point.x) else "∞"
        cells = [f"<td>{_plain(point.series)}</td>", f'<td class="num"{_key(point.x)}>{_plain(where)}</td>']
        cells += [
            f'<td class="num"{_key(value)}>{format_number(value)}</td>' for value in (point.y, point.low, point.high)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(rows)
    return f"""<details><summary>The numbers of this figure</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Numbers of the figure {drawing.name}"><table>
{_heads(columns, {1, 2, 3, 4})}
<tbody>
{body}
</tbody></table></div></details>"""
