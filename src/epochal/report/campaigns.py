"""Two campaigns side by side: the claims of both, and the laws through the best points of both."""

from collections.abc import Sequence
from dataclasses import dataclass

from epochal.records import Records
from epochal.report.claims import Claim, verdict
from epochal.report.point_laws import referenced_sections
from epochal.report.points import SERIES, campaign_points
from epochal.report.sections import Section, Table


@dataclass(frozen=True)
class CampaignReport:
    """One side of the comparison: a name, the data it trained on, its records and the sections of its report."""

    name: str
    data: str
    records: Records
    sections: Sequence[Section]


def compare_campaigns(first: CampaignReport, second: CampaignReport) -> list[Section]:
    """Return the claims of both campaigns side by side, then laws that compare them.

    Raises ValueError when both have one name.
    """
    if first.name == second.name:
        raise ValueError(f"both campaigns are called {first.name!r}; rename the folder of one.")
    points = [*campaign_points(first.records, first.name), *campaign_points(second.records, second.name)]
    references = {f"{second.name}, {series}": f"{first.name}, {series}" for series in SERIES}
    return [_claims_section(first, second), *(referenced_sections(points, references) if points else [])]


def _claims_section(first: CampaignReport, second: CampaignReport) -> Section:
    # By section and text, not by id: claims of an older report have none.
    by_place: list[dict[tuple[str, str], Claim]] = [
        {(section.title, claim.text): claim for section in side.sections for claim in section.claims}
        for side in (first, second)
    ]
    first_claims, second_claims = by_place
    names = first.name, second.name
    both = [
        (*place, _cell(claim), _cell(second_claims[place]))
        for place, claim in first_claims.items()
        if place in second_claims
    ]
    tables = [Table(title=_count(len(both), "both"), columns=("section", "claim", *names), rows=tuple(both))]
    for name, claims, others in zip(names, by_place, reversed(by_place), strict=True):
        rows = tuple((*place, _cell(claim)) for place, claim in claims.items() if place not in others)
        if rows:
            title = _count(len(rows), f"{name} alone")
            tables.append(Table(title=title, columns=("section", "claim", name), rows=rows))
    other_text = (
        f"{first.name} is measured on {first.data!r}, {second.name} on {second.data!r}. Losses on different texts are not "
        "comparable; verdicts and the shapes of laws are."
    )
    return Section(
        title="Claims side by side",
        question=f"Do {first.name} and {second.name} agree?",
        tables=tuple(tables),
        notes=(other_text,) if first.data != second.data else (),
    )


def _count(claims: int, owner: str) -> str:
    return f"{claims} claim{'s' * (claims != 1)} of {owner}"


def _cell(claim: Claim) -> str:
    shown = verdict(claim) + (" (provisional)" if claim.provisional else "")
    return f"{shown}: {claim.value}" if claim.value else shown
