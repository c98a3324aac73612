"""Searches of a campaign: coordinate descent over jobs, and how certain its optimum is.

Everything here is a pure function of the records; no torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epochal.records import Records
from epochal.run import Job, Run
from epochal.scale import Point
from epochal.search.descent import (
    Certificate,
    Descent,
    Grid,
    LossOf,
    Noise,
    between_points,
    certify,
    pooled_noise,
    possible_gain,
)

# Below so many degrees of freedom the noise of one size and budget is replaced by that of the whole campaign.
FEWEST_FREEDOM = 4


@dataclass(frozen=True)
class Search:
    """One search of one size and budget: its title, its descent, and how a point becomes a loss and jobs."""

    what: str  # title
    model: str
    tokens: int  # D
    grid: Grid
    loss_of: LossOf  # the loss of a point, from the records
    jobs_of: Callable[[Point], tuple[Job, ...]]  # the jobs of a point
    descent: Descent

    @property
    def jobs(self) -> list[Job]:
        """Every job the search has asked for so far, done or not."""
        return [job for point in self.descent.visited for job in self.jobs_of(point)]

    @property
    def wanted_jobs(self) -> list[Job]:
        """The jobs of the next round."""
        return [job for point in self.descent.wanted for job in self.jobs_of(point)]

    @property
    def gain(self) -> float | None:
        """A bound on what the next round can gain (nats); None where nothing bounds it."""
        return possible_gain(self.loss_of, self.descent, self.grid)

    @property
    def finer(self) -> float | None:
        """What a finer grid around the best point could gain, by a quadratic fit (nats)."""
        return between_points(self.loss_of, self.descent, self.grid)

    def certificate(self, noise: Noise | None = None) -> Certificate | None:
        """Return what is known about the neighbors of the best point."""
        return certify(self.loss_of, self.descent, self.grid, noise)


# --- noise between seeds ------------------------------------------------------------------------------------------------


def seed_noise(records: Records, model: str, tokens: int) -> Noise | None:
    """Pool the spread of the loss between seeds, of one size and budget.

    With fewer than FEWEST_FREEDOM degrees of freedom there, of all sizes and budgets.
    """
    here, everywhere = [], []
    for setting in records.settings:
        losses, run = [record.loss for record in setting], setting[0].job
        everywhere.append(losses)
        if isinstance(run, Run) and (run.model, run.unique_tokens) == (model, tokens):
            here.append(losses)
    # Noise differs between sizes, but an estimate from two or three runs is worse than one from other sizes.
    own = pooled_noise(here)
    return own if own is not None and own.freedom >= FEWEST_FREEDOM else pooled_noise(everywhere)


# --- would stopping early have chosen the same? --------------------------------------------------------------------------


@dataclass(frozen=True)
class EarlyStop:
    """What comparing runs at a share of their steps would have chosen.

    A star is the best point of a finished search with its neighbors. `same` of `stars` would have kept the same best
    point; `worst` is the most it would have cost (nats).
    """

    share: float  # of the steps
    stars: int
    same: int  # stars that would have kept the same best point
    worst: float  # the most that it would have cost, in nats


def early_stops(records: Records, searches: Sequence[Search]) -> list[EarlyStop]:
    """Judge early stopping on real curves.

    In each certified star, compare the leader at a share of the steps with that in the end. Heavy decay keeps the loss
    high until the schedule ends (spec section 5), so a leader half-way says little.
    """
    stars = [
        curves for search in searches if search.descent.certified for curves in [_curves(records, search)] if curves
    ]
    found = []
    for share in (0.25, 0.5, 0.75):
        costs = [_cost_of_stopping(curves, share) for curves in stars]
        known = [cost for cost in costs if cost is not None]
        if known:
            found.append(EarlyStop(share, len(known), sum(cost == 0 for cost in known), max(known)))
    return found


Curve = list[tuple[float, float]]  # share of the run's steps, loss


def _curves(records: Records, search: Search) -> list[Curve]:
    """Return the loss curves of the best point and its neighbors that finished."""
    best = search.descent.best
    certificate = search.certificate()
    if best is None or certificate is None:
        return []
    curves = []
    for point in (best, *certificate.margins):
        record = records.get(search.jobs_of(point)[0])
        points = record.results.get("curve") if record is not None and math.isfinite(record.loss) else None
        if isinstance(points, list) and points:
            curves.append([(step / points[-1][0], loss) for step, loss in points])
    return curves


def _cost_of_stopping(curves: list[Curve], share: float) -> float | None:
    """Return what keeping only the leader at a share of the steps costs.

    None if a curve has no evaluation near that share.
    """
    pairs = []
    for curve in curves:
        there = [loss for at, loss in curve if abs(at - share) < 0.02]
        if not there:
            return None
        pairs.append((there[0], curve[-1][1]))
    return min(pairs)[1] - min(final for _, final in pairs)
