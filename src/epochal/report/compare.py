"""Two campaigns side by side: what each claims, and whose laws end lower. A pure function of both reports and records."""

from collections.abc import Sequence
from dataclasses import dataclass

from epochal.records import Records
from epochal.report.claims import Claim, verdict
from epochal.report.points import KINDS, compared_sections, points_of
from epochal.report.sections import Section, Table


@dataclass(frozen=True)
class Campaign:
    """One side of a comparison: a name, its records and the sections of its report."""

    name: str
    data: str
    records: Records
    sections: Sequence[Section]


def compare_campaigns(first: Campaign, second: Campaign) -> list[Section]:
    """Return the claims of two campaigns side by side, then the laws through the best points of both.

    Raises ValueError when both have one name.
    """
    if first.name == second.name:
        raise ValueError(f"both campaigns are called {first.name!r}; rename the folder of one.")
    points = [*points_of(first.records, first.name), *points_of(second.records, second.name)]
    like = {f"{second.name}, {kind}": f"{first.name}, {kind}" for kind in KINDS}
    notes = () if first.data == second.data else (_other_text(first, second),)
    return [_claims_section(first, second, notes), *(compared_sections(points, like) if points else [])]


def _other_text(first: Campaign, second: Campaign) -> str:
    return (
        f"{first.name} is measured on {first.data!r}, {second.name} on {second.data!r}: losses on different text differ "
        "for that alone, so only verdicts and shapes compare."
    )


def _claims_section(first: Campaign, second: Campaign, notes: tuple[str, ...]) -> Section:
    ours, theirs = (
        {(section.title, claim.text): claim for section in side.sections for claim in section.claims}
        for side in (first, second)
    )
    names = first.name, second.name
    both = [(*place, _cell(claim), _cell(theirs[place])) for place, claim in ours.items() if place in theirs]
    tables = [Table(title=_count(len(both), "both"), columns=("section", "claim", *names), rows=tuple(both))]
    for name, mine, others in ((first.name, ours, theirs), (second.name, theirs, ours)):
        rows = tuple((*place, _cell(claim)) for place, claim in mine.items() if place not in others)
        if rows:
            table = Table(title=_count(len(rows), f"{name} alone"), columns=("section", "claim", name), rows=rows)
            tables.append(table)
    return Section(
        title="Claims side by side",
        question=f"Do {first.name} and {second.name} agree?",
        tables=tuple(tables),
        notes=notes,
    )


def _count(claims: int, whose: str) -> str:
    return f"{claims} claim{'s' * (claims != 1)} of {whose}"


def _cell(claim: Claim) -> str:
    word = verdict(claim) + (" (provisional)" if claim.provisional else "")
    return f"{word}: {claim.value}" if claim.value else word
