"""Write recipes/results/README.md, and the results part of README.md, from the committed reports.

`python -m recipes._results_page SCALE ...` reads the claims.json and the records of each scale. No number is typed by hand.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epochal.campaign.plan import load_recipe
from epochal.config import REPOSITORY, write_atomic
from epochal.records import Workspace, load_records
from epochal.report.claims import CLAIM_COLUMNS, ClaimRow, read_claims, tally
from epochal.report.markdown import markdown_table
from epochal.report.sections import Table, claim_cells, format_interval
from epochal.scale import load_scale
from epochal.scaling import interval_text
from epochal.study import Study

RESULTS = Path("recipes/results")
BEGIN, END = "<!-- results: written by make report -->", "<!-- end of results -->"
REPLICATION_SUFFIX = "-again"  # micro-again and micro-drawn-again replicate claims of micro on other seeds


@dataclass(frozen=True)
class Shown:
    """A question of README.md, the claims that answer it by id, and a figure."""

    question: str
    claims: tuple[str, ...]
    figure: str


SHOWN = (
    Shown(
        "Are members tuned for their limit worse alone and better together, and do few members predict many?",
        ("ensembling.tuned-alone", "ensembling.tuned-together", "ensembling.predicted"),
        "members-tuned",
    ),
    Shown(
        "Is the limit in members below the limit in size, and are several small models better than one large one?",
        ("ensembling.limit-below-size", "ensembling.equal-parameters"),
        "loss-against-parameters",
    ),
    Shown("Does tuned decay beat the standard one?", ("heavy-decay.beats-standard",), "loss-against-data"),
    Shown(
        "Does loss fall with every step of size once decay is tuned, and is the next size predicted?",
        ("heavy-decay.monotone", "heavy-decay.predicted-size"),
        "loss-against-size-{tokens}",
    ),
    Shown(
        "How much more text would the standard recipe need, and does that last as text grows?",
        (
            "data-efficiency.tuned",
            "data-efficiency.limit-k",
            "data-efficiency.lasts.tuned",
            "data-efficiency.lasts.limit-k",
        ),
        "multiples-against-data",
    ),
    Shown(
        "How much of an ensemble's gain does one student keep?",
        (
            "distillation.share",
            "distillation.student-of-ensemble",
            "distillation.student-of-self",
            "distillation.synthetic-only",
        ),
        "whole-chain",
    ),
)


def main(scales: Sequence[str]) -> None:
    """Write both texts for the given scales; raises ValueError for none, and for one without a report."""
    if not scales:
        raise ValueError("name at least one scale that has a report, e.g. python -m recipes._results_page micro.")
    rows = most_answers_first({scale: read_claims(RESULTS / scale / "claims.json") for scale in scales})
    flagship = next(iter(rows))
    readme = REPOSITORY / "README.md"
    readme_text = replace_results(readme.read_text(encoding="utf-8"), main_results(flagship, rows[flagship]))
    write_atomic(RESULTS / "README.md", claims_page(rows))
    write_atomic(readme, readme_text)


def most_answers_first(rows: dict[str, list[ClaimRow]]) -> dict[str, list[ClaimRow]]:
    """Sort scales by how many claims of SHOWN they have, then by claims; README.md shows the first."""
    shown = {name for one in SHOWN for name in one.claims}
    order = sorted(rows, key=lambda scale: (-len(shown & {row.id for row in rows[scale]}), -len(rows[scale]), scale))
    return {scale: rows[scale] for scale in order}


def claims_page(rows: dict[str, list[ClaimRow]]) -> str:
    """Render every claim of every scale, and how the replications compare."""
    lines = [
        "# Claims and verdicts",
        "",
        "Written by `make report` from the records of each scale. Intervals are 90%; losses are nats per token on the test "
        "split, or on validation text where a data set has no test split.",
    ]
    for scale, claims in rows.items():
        lines += ["", f"## {scale}", "", f"{tally(claims)} Report: [{scale}/report.md]({scale}/report.md)."]
        for section in dict.fromkeys(row.section for row in claims):
            cells = tuple((*claim_cells(row), f"`{row.command}`") for row in claims if row.section == section)
            table = Table(title="", columns=(*CLAIM_COLUMNS, "Command"), rows=cells)
            lines += ["", f"### {section}", "", markdown_table(table)]
        original = replicated_scale(scale, rows)
        if original is not None:
            lines += ["", f"### {original}, and {scale} on other seeds", "", *_replication(rows[original], claims)]
    return "\n".join(lines) + "\n"


def replicated_scale(scale: str, scales: Iterable[str]) -> str | None:
    """Return the scale that `scale` replicates on other seeds; None when its name is not that of a replication."""
    originals = [other for other in scales if scale.endswith(REPLICATION_SUFFIX) and scale.startswith(f"{other}-")]
    return max(originals, key=len, default=None)


Measured = dict[str, tuple[str, str, tuple[float, float]]]


def measured(rows: Iterable[ClaimRow]) -> Measured:
    """Return every measured number with an interval, by the id of its claim and case: text, value, interval."""
    found: Measured = {}
    for row in rows:
        if row.interval is not None and len(row.cases) < 2:
            name = f"{row.id}.{row.cases[0].name}" if row.cases else row.id
            found[name] = (row.text, row.value, row.interval)
        for case in row.cases:
            if case.interval is not None:
                found[f"{row.id}.{case.name}"] = (f"{row.text}: {case.name}", f"{case.value:.4f}", case.interval)
    return found


def meeting(original: Iterable[ClaimRow], replication: Iterable[ClaimRow]) -> dict[str, bool]:
    """Return whether the two intervals meet, for every number that both campaigns measured with one."""
    first, again = measured(original), measured(replication)
    ends = {name: (first[name][2], again[name][2]) for name in again if name in first}
    return {name: one[0] <= other[1] and other[0] <= one[1] for name, (one, other) in ends.items()}


def _replication(original: list[ClaimRow], replication: list[ClaimRow]) -> list[str]:
    """Compare the intervals of the numbers that both campaigns have, matched by id."""
    first, again, meets = measured(original), measured(replication), meeting(original, replication)
    cells = []
    for name, overlap in meets.items():
        (_, value, ends), (text, new_value, new_ends) = first[name], again[name]
        shown = (value, interval_text(ends), new_value, interval_text(new_ends))
        cells.append((text, *shown, "yes" if overlap else "no"))
    columns = ("Claim", "First", "90% interval", "Again", "90% interval again", "Overlap")
    return [
        f"{sum(meets.values())} of {len(meets)} intervals overlap. The searches were repeated too, so a claim may rest on "
        "another setting; an interval covers the choice of seeds or members, and among single models that of settings "
        "within noise.",
        "",
        markdown_table(Table(title="", columns=columns, rows=tuple(cells))),
    ]


def main_results(scale_name: str, claims: Sequence[ClaimRow]) -> str:
    """Render the whole chain of one scale and the six questions of SHOWN for README.md."""
    scale = load_scale(scale_name)
    records = load_records(Workspace(scale_name, RESULTS, Path("work")))
    tables: tuple[Table, ...] = load_recipe("distillation").report(Study(records, scale)).tables
    if not tables:
        raise ValueError(f"{records.workspace.records} lacks runs of the chain; run epochal run --scale {scale_name}.")
    chain, by_id = tables[0], {row.id: row for row in claims}
    folder = RESULTS / scale_name / "figures"
    parts = [
        f"{chain.title}, scale `{scale_name}` (nats per token; {len(records)} records):",
        markdown_table(chain),
        f"Six questions, what `{scale_name}` answers and what the paper found ([all claims]({RESULTS}/README.md)):",
    ]
    for number, shown in enumerate(SHOWN, start=1):
        rows = [by_id[name] for name in shown.claims if name in by_id]
        if rows:
            cells = tuple((row.text, row.paper, row.value, format_interval(row), _short_verdict(row)) for row in rows)
            table = Table(title="", columns=("claim", "paper", "measured", "90% interval", "verdict"), rows=cells)
            figure = folder / f"{shown.figure.format(tokens=scale.unique_tokens[0])}.svg"
            parts += [f"**{number}. {shown.question}**", markdown_table(table)]
            parts += [f"![{figure.stem}]({figure})"] if figure.exists() else []
    return "\n\n".join(parts)


def _short_verdict(row: ClaimRow) -> str:
    return f"{row.verdict} (provisional)" if row.provisional else row.verdict


def replace_results(readme: str, results: str) -> str:
    """Replace the text between the two marks of README.md; raises ValueError when a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}; put them where the results belong.")
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


if __name__ == "__main__":
    main(sys.argv[1:])
