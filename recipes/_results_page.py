"""The committed results as two generated texts: recipes/results/README.md, and the results part of README.md.

`python -m recipes._results_page SCALE ...` reads the claims.json that `epochal report --scale SCALE` left, and the records
beside it. Nothing in either text is typed by hand, so a number there is a number in a record.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from epochal.campaign.plan import load_recipe
from epochal.config import REPOSITORY, write_atomic
from epochal.records import Workspace, load_records
from epochal.report.claims import CLAIM_COLUMNS, ClaimRow, read_claims, tally, verdict_line
from epochal.report.sections import Table, format_interval, markdown_table
from epochal.scale import load_scale
from epochal.study import Study

RESULTS = Path("recipes/results")
BEGIN, END = "<!-- results: written by make report -->", "<!-- end of results -->"
AGAIN = "-again"
"""How the name of a scale ends that repeats rows of another one on other seeds."""
FIGURES = ("loss-against-epochs", "loss-against-size-{tokens}", "loss-against-members-{tokens}")


def main(scales: Sequence[str]) -> None:
    """Write both texts for the scales named; raises ValueError when one has no report."""
    if not scales:
        raise ValueError("name at least one scale that has a report, e.g. python -m recipes._results_page micro.")
    scales = longest_first(scales)
    rows = {scale: read_claims(RESULTS / scale / "claims.json") for scale in scales}
    readme = REPOSITORY / "README.md"
    text = spliced(readme.read_text(encoding="utf-8"), headline(scales[0]))
    write_atomic(RESULTS / "README.md", claims_page(rows))
    write_atomic(readme, text)


def longest_first(scales: Sequence[str]) -> list[str]:
    """Put the campaigns with most records first: the first one's chain stands in the README."""
    return sorted(scales, key=lambda scale: -sum(1 for _ in (RESULTS / scale / "records").glob("*.json")))


def claims_page(rows: dict[str, list[ClaimRow]]) -> str:
    """Render every claim of every scale: the paper's number, ours, its interval and seeds, the verdict, the command."""
    lines = [
        "# Claims, and what the records say",
        "",
        "Written by `make report` from the records of each scale; intervals are 90%, losses nats per token on validation text.",
    ]
    for scale, found in rows.items():
        lines += ["", f"## {scale}", "", f"{tally(found)} Report: [{scale}/report.md]({scale}/report.md)."]
        for section in dict.fromkeys(row.section for row in found):
            chosen = [row for row in found if row.section == section]
            lines += ["", f"### {section}", "", markdown_table(_claims_table(chosen))]
        first = repeated(scale, rows)
        if first is not None:
            lines += ["", *_again(first, scale, rows[first], found)]
    return "\n".join(lines) + "\n"


def repeated(scale: str, scales: Iterable[str]) -> str | None:
    """Return the campaign that a scale repeats rows of: `micro-again` and `micro-drawn-again` those of `micro`."""
    found = [other for other in scales if scale.endswith(AGAIN) and scale.startswith(f"{other}-")]
    return max(found, key=len, default=None)


def _again(name: str, again: str, first: list[ClaimRow], second: list[ClaimRow]) -> list[str]:
    """Compare the numbers of a campaign and of its repetition on other seeds, where both have an interval."""
    by_text = {row.text: row for row in first}
    cells = []
    for row in second:
        before = by_text.get(row.text)
        if before is not None and before.interval is not None and row.interval is not None:
            meet = before.interval[0] <= row.interval[1] and row.interval[0] <= before.interval[1]
            shown = (before.value, format_interval(before), row.value, format_interval(row))
            cells.append((row.text, *shown, "yes" if meet else "no"))
    agree = sum(cell[-1] == "yes" for cell in cells)
    columns = ("Claim", "First", "90% interval", "Again", "90% interval again", "Intervals meet")
    return [
        f"### {name}, and {again} on other seeds",
        "",
        f"{agree} of {len(cells)} intervals meet. Searches were made again too, as wide as the scale's grid, so that a row may "
        "rest on another setting; an interval is over seeds or members, not over what a search may choose.",
        "",
        markdown_table(Table(title="", columns=columns, rows=tuple(cells))),
    ]


def _claims_table(rows: list[ClaimRow]) -> Table:
    cells = [
        (row.text, row.paper or None, row.value, format_interval(row), row.seeds, verdict_line(row), f"`{row.command}`")
        for row in rows
    ]
    return Table(title="", columns=(*CLAIM_COLUMNS, "Command"), rows=tuple(cells))


def headline(scale_name: str) -> str:
    """Render the whole chain of one scale as a table with three figures, for the README."""
    scale = load_scale(scale_name)
    records = load_records(Workspace(scale_name, RESULTS, Path("work")))
    tables: tuple[Table, ...] = load_recipe("distillation").report(Study(records, scale)).tables
    if not tables:
        raise ValueError(
            f"{records.workspace.records} does not hold the whole chain yet; run epochal run --scale {scale_name}."
        )
    chain, folder = tables[0], RESULTS / scale_name / "figures"
    names = [name.format(tokens=scale.unique_tokens[0]) for name in FIGURES]
    figures = [f"![{name}]({folder / name}.svg)" for name in names if (folder / f"{name}.svg").exists()]
    parts = [
        f"{chain.title}, scale `{scale_name}` (nats per token; {len(records)} records):",
        markdown_table(chain),
        "\n".join(figures),
        f"Every claim with its verdict: [{RESULTS}/README.md]({RESULTS}/README.md).",
    ]
    return "\n\n".join(part for part in parts if part)


def spliced(readme: str, results: str) -> str:
    """Return the README with the text between its two marks replaced; raises ValueError when a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}; put them where the results belong.")
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


if __name__ == "__main__":
    main(sys.argv[1:])
