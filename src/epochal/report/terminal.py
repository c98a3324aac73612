"""The claims of a report in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from epochal.report.claims import Claim, effect, reservations, tally, verdict
from epochal.report.sections import Section, all_claims, format_interval

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(sections: Sequence[Section], console: "Console") -> None:
    """Print every claim with its verdict, then its evidence indented below."""
    from rich.padding import Padding
    from rich.text import Text

    colors = {True: "green", False: "red", None: "yellow"}
    for section in sections:
        if section.claims:
            console.print(Text(f"\n{section.title}", style="bold"))
        for claim in section.claims:
            # No green without an interval or enough seeds.
            color = colors[None if claim.holds and reservations(claim) else claim.holds]
            # Text, because rich would read brackets in a plain string as markup.
            line = Text.assemble((verdict(claim), color), "  ", claim.text)
            console.print(Padding(line, (0, 0, 0, 2)))
            console.print(Padding(Text(_evidence(claim)), (0, 0, 0, 6)))
    console.print(Text(f"\n{tally(all_claims(sections))}"))


def _evidence(claim: Claim) -> str:
    parts = [claim.value] if claim.value else []
    parts += [f"90% {format_interval(claim)}"] if claim.interval else []
    parts += [f"{claim.seeds} seed{'s' * (claim.seeds > 1)}"]
    parts += [f"paper: {claim.paper}"] if claim.paper else []
    parts += [claim.untestable] if claim.untestable else []
    parts += [effect(claim)] if effect(claim) else []
    parts += [f"provisional: {', '.join(reservations(claim))}"] if reservations(claim) else []
    return "; ".join(parts)
