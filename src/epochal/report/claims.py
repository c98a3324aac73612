"""Claims: what the records say about a sentence, in words for people and as claims.json for other tables.

A claim with a number of the paper is reproduced or not; a claim of our own holds or does not. No torch, no matplotlib.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epochal.config import from_table

CLAIM_COLUMNS = ("Claim", "Paper", "Here", "90% interval", "Seeds", "Verdict")
ID = r"[a-z0-9]+([.-][a-z0-9]+)*"
OPEN, NOT_HERE = "open", "not testable at this scale"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence that the records support or not.

    `id` names the claim in tables and tests, whatever its wording: lower-case words joined by dashes and dots, such as
    "optimizers.one-pass.fira-galore". `value` is the measured number with its unit ("0.27 nats"), `interval` its 90%
    interval or None, `seeds` the number of independent seeds behind it, `holds` None while it cannot be judged.
    `provisional` lists what is missing (neighbors, seeds, points). `paper` is what the paper reports for the same
    sentence, with its place ("0.27 nats, section 5"), empty for a claim that no paper makes. `untestable` says why this
    scale cannot test the sentence. `command` produces the records behind it.
    """

    id: str = ""
    text: str
    value: str
    interval: tuple[float, float] | None = None
    seeds: int = 1
    holds: bool | None = None
    provisional: tuple[str, ...] = ()
    paper: str = ""
    untestable: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        if self.id and not re.fullmatch(ID, self.id):
            raise ValueError(f"claim id {self.id!r} must be lower-case words joined by dashes and dots; rename it.")
        if self.untestable and self.holds is not None:
            raise ValueError(f"claim {self.text!r} is judged and called untestable; leave one of the two out.")


def verdict(claim: Claim) -> str:
    """Say in words whether a claim holds, or whether the paper's finding was reproduced."""
    if claim.untestable:
        return NOT_HERE
    if claim.holds is None:
        return OPEN
    if claim.paper:
        return "reproduced" if claim.holds else "not reproduced"
    return "holds" if claim.holds else "does not hold"


def verdict_line(claim: Claim) -> str:
    """Return the verdict with what it lacks in brackets."""
    reasons = (claim.untestable,) if claim.untestable else claim.provisional
    word = "" if claim.untestable else "provisional: "
    return verdict(claim) + (f" ({word}{'; '.join(reasons)})" if reasons else "")


def tally(claims: Iterable[Claim]) -> str:
    """One line over all claims: how many have each verdict, how many are provisional."""
    claims = list(claims)
    if not claims:
        return "No claims yet: no records that could carry one."
    words = [verdict(claim) for claim in claims]
    order = ("reproduced", "not reproduced", "holds", "does not hold", NOT_HERE, OPEN)
    plural = {"holds": "hold", "does not hold": "do not hold"}
    counts = {word: words.count(word) for word in order if word in words}
    parts = [f"{n} {plural.get(word, word) if n > 1 else word}" for word, n in counts.items()]
    provisional = sum(bool(claim.provisional) for claim in claims)
    end = f"; {provisional} provisional" if provisional else ""
    return f"{len(claims)} claim{'s' * (len(claims) > 1)}: {', '.join(parts)}{end}."


# --- claims.json: what a table over several scales reads ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClaimRow(Claim):
    """A claim with where it was found: the scale (or the title of a report), the section, its verdict in words."""

    scale: str
    section: str
    verdict: str


def render_claims(rows: Iterable[ClaimRow]) -> str:
    """Render claims.json; raises ValueError when two claims share an id."""
    tables = [asdict(row) for row in rows]
    ids = Counter(table["id"] for table in tables if table["id"])
    repeated = [name for name, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(f"several claims of this report have the id {repeated[0]!r}; give each its own.")
    for table in tables:
        if table["interval"] is not None:  # JSON knows no infinity: null is an end that is open
            table["interval"] = [end if math.isfinite(end) else None for end in table["interval"]]
    return json.dumps(tables, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def placed(claim: Claim, *, scale: str, section: str, command: str) -> ClaimRow:
    """Return a claim with its place; `command` stands unless the claim names its own."""
    fields = {name: getattr(claim, name) for name in Claim.__dataclass_fields__}
    return ClaimRow(
        **fields | {"command": claim.command or command}, scale=scale, section=section, verdict=verdict(claim)
    )


def read_claims(path: Path) -> list[ClaimRow]:
    """Read the claims.json that a report left; raises ValueError when it is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run epochal report to write it again.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list of claims; run epochal report to write it again.")
    return [from_table(_closed(row), ClaimRow, where=f"{path}: claim {number}") for number, row in enumerate(rows, 1)]


def _closed(row: Any) -> Any:
    """Return a row of claims.json whose open ends are infinite again; anything else as it is."""
    ends = row.get("interval") if isinstance(row, dict) else None
    if not isinstance(ends, list) or len(ends) != 2:
        return row
    return row | {
        "interval": [far if end is None else end for end, far in zip(ends, (-math.inf, math.inf), strict=True)]
    }
