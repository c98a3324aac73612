"""A claim that one thing lies above another, from differences paired by seed."""

import statistics
from collections.abc import Sequence

from epochal.report.claims import Claim
from epochal.scaling import caveats, seed_interval


def difference_claim(text: str, differences: Sequence[float], *, paper: str = "", reasons: Sequence[str] = ()) -> Claim:
    """Return the claim that the mean of differences (nats, one for each seed) is above zero.

    `reasons` are what stands between it and a final word beside seeds and noise.
    """
    mean = statistics.fmean(differences)
    return Claim(
        text=text,
        value=f"{mean:+.4f} nats",
        interval=seed_interval(differences),
        seeds=len(differences),
        holds=mean > 0,
        paper=paper,
        provisional=tuple(dict.fromkeys((*reasons, *caveats(differences)))),
    )
