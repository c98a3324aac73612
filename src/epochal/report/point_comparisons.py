"""Recipes compared at shared places, and by laws in size and data."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epochal.report.claims import Claim
from epochal.report.points import LossPoint
from epochal.report.sections import Section, Table
from epochal.scaling import Interval, SurfaceLaw, fit_surface, gain_interval, interval_text, named_form, seed_interval

Place = tuple[float | None, ...]  # N, D, K, T
MIN_SIDES = 3  # distinct N, and distinct D, of a law in both
SPARE = 2  # places beyond the constants of a law
DRAWS = 100  # of the bootstrap of a surface
OUTLIER = 8.0  # robust standard deviations of log residuals
VOCABULARY = 50_257  # GPT-2's, for the loss of a model that has seen nothing


def decided(interval: Interval | None) -> bool | None:
    """Return whether a difference is negative, None while its interval contains zero or is unknown."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return interval[1] < 0


# --- at shared places -------------------------------------------------------------------------------------------------


def paired_section(points: Sequence[LossPoint], references: Mapping[str, str]) -> Section | None:
    """Compare every recipe with its reference at the places where both have losses; None without any."""
    means: dict[str, dict[Place, list[float]]] = {}
    for point in points:
        place = (point.N, point.D, point.K, point.T)
        means.setdefault(point.recipe, {}).setdefault(place, []).append(point.loss)
    claims = []
    for recipe, base in references.items():
        shared = _one_count_each([place for place in means.get(recipe, {}) if place in means.get(base, {})])
        if shared:
            claims.append(_paired_claim(recipe, base, [(means[recipe][p], means[base][p]) for p in shared]))
    if not claims:
        return None
    return Section(
        title="Shared places",
        question="Which recipe has the lower loss where both were measured?",
        claims=tuple(claims),
        notes=(
            "The mean over places with equal N, D and K of the difference of mean losses; its interval is over places.",
        ),
    )


def _one_count_each(places: Sequence[Place]) -> list[Place]:
    """Keep the largest K at each N and D: ensembles of fewer of the same models are no further measurement."""
    largest: dict[Place, Place] = {}
    for place in places:
        N, D, K, T = place
        known = largest.get((N, D, T))
        if known is None or (K or 0) > (known[2] or 0):
            largest[N, D, T] = place
    return list(largest.values())


def _paired_claim(recipe: str, base: str, losses: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Claim:
    differences = [statistics.fmean(own) - statistics.fmean(other) for own, other in losses]
    if len(losses) == 1:
        own, other = losses[0]
        interval = gain_interval(other, own)  # baseline minus losses, with the sides exchanged
    else:
        interval = seed_interval(differences)
    missing = f"{len(losses)} shared place{'s' * (len(losses) > 1)} with too few seeds"
    return Claim(
        text=f"{recipe} has a lower loss than {base} at {len(losses)} shared place{'s' * (len(losses) > 1)}",
        value=f"{statistics.fmean(differences):+.4f} nats",
        interval=interval,
        seeds=min(min(len(own), len(other)) for own, other in losses),
        holds=decided(interval),
        provisional=() if interval else (missing,),
    )


# --- one law in N and D -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointFit:
    """One recipe's law in N and D, by both objectives, without the outliers."""

    recipe: str
    K: float | None
    laws: Mapping[str, SurfaceLaw]  # objective to law
    points: int
    outliers: tuple[LossPoint, ...]


def joint_section(points: Sequence[LossPoint], references: Mapping[str, str], form: str) -> Section | None:
    """Compare the limits of laws in N and D fitted to each recipe; None without one."""
    groups: dict[tuple[str, float | None], list[LossPoint]] = {}
    for point in points:
        if point.N is not None and point.D is not None and math.isfinite(point.N) and math.isfinite(point.D):
            groups.setdefault((point.recipe, point.K), []).append(point)
    fits = [fit for (recipe, K), group in groups.items() if (fit := _joint_fit(recipe, K, group, form)) is not None]
    if not fits:
        return None
    rows, notes = [], []
    for fit in fits:
        for objective, law in fit.laws.items():
            constants = ", ".join(f"{name} {value:.4g}" for name, value in law.constants.items() if name != "E")
            interval = interval_text((law.interval or {}).get("E"))
            rows.append((_label(fit), objective, fit.points, law.E, interval, constants))
        if fit.outliers:
            named = "; ".join(f"{p.loss:g} at N = {p.N:g}, D = {p.D:g}" for p in fit.outliers[:8])
            notes.append(
                f"{_label(fit)}: {len(fit.outliers)} of {fit.points + len(fit.outliers)} points lie more than {OUTLIER:g} "
                f"robust standard deviations off and are left out: {named}."
            )
    if form == "bryant-liu":
        notes.append(
            f"The loss of a model that has seen nothing is taken as log {VOCABULARY:,} = {math.log(VOCABULARY):.2f}."
        )
    notes.append(f"Intervals are from {DRAWS} refits of resampled places.")
    columns = ("recipe", "objective", "points", "limit E", "90% interval", "other constants")
    name = next(iter(fits[0].laws.values())).form.name
    return Section(
        title="Size and data",
        question="Where does each recipe end as models and data grow together?",
        claims=tuple(_joint_claims(fits, references)),
        tables=(Table(title=f"Laws {name}", columns=columns, rows=tuple(rows)),),
        notes=tuple(notes),
    )


def _label(fit: JointFit) -> str:
    return fit.recipe if fit.K is None else f"{fit.recipe} (K = {fit.K:g})"


def _joint_fit(recipe: str, K: float | None, points: Sequence[LossPoint], form_name: str) -> JointFit | None:
    at = {
        field: math.exp(statistics.fmean(math.log(getattr(p, field) or p.D or 1.0) for p in points)) for field in "NDT"
    }
    form = named_form(form_name, at, uninformed=math.log(VOCABULARY))
    places = {(point.N, point.D, point.T) for point in points}
    if min(len({p.N for p in points}), len({p.D for p in points})) < MIN_SIDES:
        return None
    if len(places) < len(form.coefficients) + len(form.shapes) + SPARE:
        return None
    y = np.array([point.loss for point in points])

    def fit(objective: str, kept: npt.NDArray[np.bool_], draws: int = 0) -> SurfaceLaw:
        sizes: dict[str, Any] = {name: values[kept] for name, values in data.items()}
        return fit_surface(form, y[kept], objective=objective, draws=draws, **sizes)

    # Tokens seen are one pass where they are not given.
    columns = {"N": [p.N for p in points], "D": [p.D for p in points], "T": [p.T or p.D for p in points]}
    data = {name: np.array(columns[name], dtype=float) for name in form.sizes}
    kept = np.ones(len(y), dtype=bool)
    for _ in range(5):
        law = fit("huber", kept)
        errors = np.abs(np.log(y / law.predict(**data)))
        inside = errors <= OUTLIER * 1.4826 * max(float(np.median(errors[kept])), 1e-9)
        if np.array_equal(inside, kept):
            break
        kept = inside
    laws = {objective: fit(objective, kept, DRAWS) for objective in ("huber", "squares")}
    outliers = tuple(point for point, fine in zip(points, kept.tolist(), strict=True) if not fine)
    return JointFit(recipe, K, laws, int(np.sum(kept)), outliers)


def _joint_claims(fits: Sequence[JointFit], references: Mapping[str, str]) -> Iterator[Claim]:
    by_place = {(fit.recipe, fit.K): fit for fit in fits}
    for fit in fits:
        base = by_place.get((references.get(fit.recipe, ""), fit.K))
        if base is None:
            continue
        verdicts, shown = [], []
        intervals = {}
        for objective, law in fit.laws.items():
            other = base.laws[objective]
            # E is the first constant of every form here; the two bootstraps are independent.
            draws = law.replicates[:, :1] - other.replicates[None, :, 0]
            low, high = np.quantile(draws, (0.05, 0.95)).tolist()
            difference = law.E - other.E
            intervals[objective] = min(low, difference), max(high, difference)
            verdicts.append(decided(intervals[objective]))
            shown.append(f"{objective} {difference:+.4f}")
        yield Claim(
            text=f"{_label(fit)} ends below {base.recipe} as N and D grow",
            value=f"{fit.laws['squares'].E - base.laws['squares'].E:+.4f} nats ({', '.join(shown)})",
            interval=intervals["squares"],
            holds=verdicts[0] if verdicts[0] == verdicts[1] else None,
        )
