"""Claims: sentences that the records support or not, and the claims.json that lists them."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from epochal.config import from_table

CLAIM_COLUMNS = ("Claim", "Paper", "Measured", "90% interval", "Seeds", "Verdict")
ID = r"[a-z0-9]+([.-][a-z0-9]+)*"
FEWEST_SEEDS = 3  # of a verdict without an interval
SIMILAR = 2.0  # an effect within this factor of the paper's has a similar size
OPEN, UNTESTABLE = "open", "not testable at this scale"


@dataclass(frozen=True)
class Case:
    """One size, budget or optimizer of a sentence that is claimed of several."""

    name: str  # such as "w16.24576"
    value: float
    interval: tuple[float, float] | None = None  # 90%, of `value`
    t: float | None = None  # how many standard errors the sentence is from false; negative where it is false
    dof: float = 2.0  # degrees of freedom of the standard error


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence that the records support or not."""

    # Names the claim in tables and tests, whatever its wording: lower-case words joined by dashes and dots, such as
    # "optimizers.one-pass.fira-galore".
    id: str = ""
    text: str
    value: str  # the measured number with its unit ("0.27 nats")
    interval: tuple[float, float] | None = None  # 90%, of `value`
    seeds: int = 1  # independent seeds behind the number
    holds: bool | None = None  # None while it cannot be judged
    provisional: tuple[str, ...] = ()  # what is missing (neighbors, seeds, points)
    # What the paper reports for the same sentence, with its place ("0.27 nats, section 5"); empty for a claim that
    # no paper makes.
    paper: str = ""
    # Size of the measured effect and of the paper's, in one unit; "reproduced" carries their ratio.
    sizes: tuple[float, float] | None = None
    untestable: str = ""  # why this scale cannot test the sentence
    cases: tuple[Case, ...] = ()  # of a sentence that is claimed of several
    command: str = ""  # produces the records behind it

    def __post_init__(self) -> None:
        if self.id and not re.fullmatch(ID, self.id):
            raise ValueError(f"claim id {self.id!r} must be lower-case words joined by dashes and dots; rename it.")
        if self.untestable and self.holds is not None:
            raise ValueError(f"claim {self.text!r} has a verdict and is untestable; leave one of the two out.")


def verdict(claim: Claim) -> str:
    """Return whether a claim holds, or whether the finding of the paper was reproduced."""
    if claim.untestable:
        return UNTESTABLE
    if claim.holds is None:
        return OPEN
    if claim.paper:
        return "reproduced" if claim.holds else "not reproduced"
    return "holds" if claim.holds else "does not hold"


def reservations(claim: Claim) -> tuple[str, ...]:
    """Return why a verdict is provisional: what the claim says, and too few seeds for a verdict without an interval."""
    few = claim.interval is None and claim.seeds < FEWEST_SEEDS and not claim.cases
    counted = ("one seed" if claim.seeds < 2 else "two seeds",) if few and claim.holds is not None else ()
    return tuple(dict.fromkeys((*claim.provisional, *counted)))


def effect(claim: Claim) -> str:
    """Return how large a reproduced effect is next to the paper's: "sign; 12x larger"; "" where that is not known."""
    if claim.sizes is None or not claim.holds or min(claim.sizes) <= 0:
        return ""
    ratio = claim.sizes[0] / claim.sizes[1]
    if 1 / SIMILAR < ratio < SIMILAR:
        return "similar size"
    times = max(ratio, 1 / ratio)
    return f"sign; {times:.{0 if times >= 10 else 1}f}x {'larger' if ratio > 1 else 'smaller'}"


def verdict_line(claim: Claim) -> str:
    """Return the verdict, the size of the effect, and why it is provisional or untestable."""
    if claim.untestable:
        return f"{verdict(claim)} ({claim.untestable})"
    size, reasons = effect(claim), reservations(claim)
    line = verdict(claim) + (f" ({size})" if size else "")
    return line + (f" (provisional: {'; '.join(reasons)})" if reasons else "")


def tally(claims: Iterable[Claim]) -> str:
    """Return one line that counts the claims by verdict, and the provisional ones."""
    claims = list(claims)
    if not claims:
        return "No claims yet: no records support or refute one."
    counts = Counter(verdict(claim) for claim in claims)
    order = ("reproduced", "not reproduced", "holds", "does not hold", UNTESTABLE, OPEN)
    plural = {"holds": "hold", "does not hold": "do not hold"}
    parts = [
        f"{counts[name]} {plural.get(name, name) if counts[name] > 1 else name}" for name in order if name in counts
    ]
    provisional = sum(bool(reservations(claim)) for claim in claims)
    end = f"; {provisional} provisional" if provisional else ""
    return f"{len(claims)} claim{'s' * (len(claims) > 1)}: {', '.join(parts)}{end}."


def without_paper(claim: Claim) -> Claim:
    """Return a claim of a campaign that replicates no paper."""
    return replace(claim, paper="", sizes=None)


# --- claims.json --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClaimRow(Claim):
    """A claim in claims.json, with its verdict and its place.

    `scale` is the scale, or the title of a report without one.
    """

    scale: str
    section: str
    verdict: str


def placed(claim: Claim, *, scale: str, section: str, command: str) -> ClaimRow:
    """Return a claim with its place; `command` is used for a claim without one."""
    fields = {name: getattr(claim, name) for name in Claim.__dataclass_fields__}
    fields |= {"command": claim.command or command, "provisional": reservations(claim)}
    return ClaimRow(**fields, scale=scale, section=section, verdict=verdict(claim))


def render_claims(rows: Iterable[ClaimRow]) -> str:
    """Render claims.json; raises ValueError when two claims have one id."""
    tables = [asdict(row) for row in rows]
    ids = Counter(table["id"] for table in tables if table["id"])
    repeated = [name for name, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(f"several claims of this report have the id {repeated[0]!r}; give each claim its own id.")
    for table in tables:
        for place in (table, *table["cases"]):
            if place["interval"] is not None:
                # JSON has no infinity, so an open end becomes null.
                place["interval"] = [end if math.isfinite(end) else None for end in place["interval"]]
    return json.dumps(tables, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_claims(path: Path) -> list[ClaimRow]:
    """Read the claims.json of a report; raises ValueError when it is missing or malformed."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run epochal report to write it again.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must contain a list of claims; run epochal report to write it again.")
    return [from_table(_with_infinity(row), ClaimRow, where=f"{path}: claim {n}") for n, row in enumerate(rows, 1)]


def _with_infinity(row: Any) -> Any:
    """Replace null ends of intervals by infinity; malformed rows are left for from_table to refuse."""
    if not isinstance(row, dict):
        return row
    if isinstance(cases := row.get("cases"), list):
        row = row | {"cases": [_with_infinity(case) for case in cases]}
    ends = row.get("interval")
    if not isinstance(ends, list) or len(ends) != 2:
        return row
    infinite = (-math.inf, math.inf)
    return row | {"interval": [bound if end is None else end for end, bound in zip(ends, infinite, strict=True)]}
