"""Do SPECTRA, Fira and Muon move the limits of the data-constrained recipe?

Claim: none in the papers; these optimizers have not been published with many epochs, heavy decay and ensembles.
Command: epochal run optimizers_at_scale --scale micro
Results: recipes/results/<scale>/report.md

Every optimizer is tuned alike (the grid of the recipe `optimizers`) at every size. Members take the rule of twice the
epochs and half the decay; with SPECTRA, the updates of the members are clipped in training.
"""

import functools
import math
import statistics
from dataclasses import dataclass, replace
from typing import Annotated, Any

from epochal.names import named_ensemble
from epochal.ranges import Items, Range, Ranged, Repeats
from epochal.records import Record, mean_curve
from epochal.report.claims import Case, Claim
from epochal.report.comparison import (
    FEWEST_REPETITIONS,
    difference_claim,
    family_claim,
    gains_by_seed,
    measured_case,
)
from epochal.report.figures import LOSS_AXIS, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import AVERAGES, Ensemble, Job
from epochal.scale import Scale, member_point
from epochal.scaling import PowerLaw, compare_limits, fit_power_law, seed_interval
from epochal.study import Result, Study, Sweep
from recipes import _member_variants, optimizers
from recipes._member_variants import VARIANTS, MakeMember
from recipes.ensembling import limit_case, members_law

BASE = "AdamW"
# The variants that are compared with independent members of the same optimizer.
COMPARED = ("chain", "snapshot")
# Sizes below which a three-constant law in N has no interval.
FEWEST_SIZES = 4


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """Arms of the recipe `optimizers`, in its setting `setting`, tuned at every size.

    `optimizers` are labels of arms, `models` the sizes. At the comparison's own size `members` of each are ensembled,
    and chained members and snapshots in groups of `group`.
    """

    setting: str  # of the recipe `optimizers`
    optimizers: Annotated[tuple[str, ...], Items()]  # labels of its arms
    models: Annotated[tuple[str, ...], Items()]  # sizes at which they are tuned
    members: Repeats  # of each optimizer, at the comparison's own size
    group: Annotated[int, Range(2, 1000)] = 3  # chained members and snapshots are compared in groups of this size

    def check(self, scale: Scale) -> None:
        """Refuse groups that are larger than the number of members."""
        if not 2 <= self.group <= self.members:
            raise ValueError(f"group is {self.group}; give 2 to members ({self.members}).")

    @property
    def repetitions(self) -> range:
        """The repetitions of a group of members, each of other seeds."""
        return range(self.members // self.group)

    @property
    def variants(self) -> _member_variants.Settings:
        """The groups of chained members and snapshots; none holds text out."""
        repetitions = len(self.repetitions)
        return _member_variants.Settings(model=self.models[0], count=self.group, seeds=repetitions, holdout_tokens=0)


@dataclass(frozen=True)
class Comparison:
    """The optimizers of one campaign at every size."""

    study: Study
    settings: Settings
    sweep: Sweep

    def tuned(self, label: str, model: str) -> Result:
        """Return what one optimizer reached at its best point for one size."""
        return self.study.swept(optimizers.arm(label), replace(self.sweep, model=model))

    def gains(self, label: str, model: str) -> dict[int, float]:
        """Return how far one optimizer is below AdamW at one size, by seed, in nats."""
        return gains_by_seed(self.tuned(label, model).losses, self.tuned(BASE, model).losses)

    def member(self, label: str) -> MakeMember | None:
        """Return what makes an optimizer's independent member of a seed; None before its grid is complete."""
        point = self.tuned(label, self.sweep.model).point
        if point is None:
            return None
        arm = optimizers.arm(label)
        return functools.partial(self.study.run, arm, self.sweep.model, self.sweep.tokens, member_point(point))

    def ensembles(self, member: MakeMember) -> dict[str, Ensemble]:
        """Return the ensembles of all independent members of one optimizer by their average."""
        names = tuple(member(seed).name for seed in range(self.settings.members))
        return {average: named_ensemble(names, average) for average in AVERAGES}

    def group(self, member: MakeMember, variant: str, repetition: int) -> Ensemble:
        """Return the mean of probabilities of one group of members."""
        runs = _member_variants.members(self.study, self.settings.variants, member, VARIANTS[variant], repetition)
        return named_ensemble(tuple(run.name for run in runs), "probs")

    def group_losses(self, label: str, variant: str) -> dict[int, float]:
        """Return the losses of one optimizer's groups of one variant by repetition."""
        member = self.member(label)
        if member is None:
            return {}
        jobs = {repetition: self.group(member, variant, repetition) for repetition in self.settings.repetitions}
        return {repetition: loss for repetition, job in jobs.items() if (loss := self.study.test_loss(job)) is not None}

    def ensemble_record(self, label: str, average: str) -> Record | None:
        """Return the record of all independent members of one optimizer."""
        member = self.member(label)
        record = self.study.records.get(self.ensembles(member)[average]) if member else None
        return record if record is not None and math.isfinite(record.loss) else None


def comparison(study: Study) -> Comparison | None:
    """Return the comparison of this scale; None without a table."""
    settings = study.settings(Settings)
    return None if settings is None else Comparison(study, settings, optimizers.sweep(study, settings.setting))


def plan(study: Study) -> list[Job]:
    """Return each optimizer's grid and seeds at each size, its members and ensembles."""
    here, jobs = comparison(study), list[Job]()
    for label in here.settings.optimizers if here else ():
        assert here is not None
        for model in here.settings.models:
            jobs += study.sweep_jobs(optimizers.arm(label), replace(here.sweep, model=model))
        member = here.member(label)
        if member is None:
            continue
        jobs += [*(member(seed) for seed in range(here.settings.members)), *here.ensembles(member).values()]
        for variant in ("independent", *COMPARED):
            for repetition in here.settings.repetitions:
                jobs += _member_variants.members(study, here.settings.variants, member, VARIANTS[variant], repetition)
                jobs.append(here.group(member, variant, repetition))
    return jobs


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Compare every optimizer with AdamW: tuned, in the limits, and as members."""
    title, question = "Optimizers at scale", "Do SPECTRA, Fira and Muon move the limits when text is repeated?"
    here = comparison(study)
    if here is None:
        return Section(title=title, question=question, notes=("This scale has no table [optimizers_at_scale].",))
    labels = here.settings.optimizers
    others = [label for label in labels if label != BASE]
    claims = [claim for label in others for claim in _tuned_claims(here, label)]
    claims += [*_decay_claim(here, others), *_member_claim(here, others), *_average_claim(here)]
    # Those of AdamW are the variants of the recipe `ensembling`.
    claims += [claim for variant in COMPARED for claim in _variant_claim(here, others, variant)]
    return Section(
        title=title,
        question=question,
        claims=tuple(claims),
        tables=(_tuned_table(here), _member_table(here), _variant_table(here)),
        figures=_figures(here),
        notes=_notes(here, others),
    )


# --- tuned, at every size ---------------------------------------------------------------------------------------------


def size_law(here: Comparison, label: str) -> PowerLaw | None:
    """Fit the law in N of one optimizer; None with fewer sizes than `FEWEST_SIZES`."""
    records = [record for model in here.settings.models for record in here.tuned(label, model).records.values()]
    points = [(float(record.results["parameters"]), record.test_loss) for record in records]
    if len({size for size, _ in points}) < FEWEST_SIZES:
        return None
    return fit_power_law([size for size, _ in points], [loss for _, loss in points])


def best_decay(here: Comparison, label: str, model: str) -> float | None:
    """Return the best decay of one optimizer at one size, in AdamW's terms."""
    # Times its factor, since an arm's decays are those of the grid divided by it.
    point = here.tuned(label, model).point
    return None if point is None else float(f"{point.wd * optimizers.arm(label).lr_factor:.6g}")


def _tuned_claims(here: Comparison, label: str) -> list[Claim]:
    """Claim that it is lower at every size, lastingly, and at the same decay."""
    models, key = here.settings.models, label.lower()
    gains = {model: here.gains(label, model) for model in models}
    # Paired by seed at both sizes, so the change has an interval too.
    small, large = gains[models[0]], gains[models[-1]]
    change = [large[seed] - small[seed] for seed in large if seed in small]
    if not all(gains.values()) or not change:
        return []
    caveats = _caveats(here, label)
    cases = [
        measured_case(
            model, statistics.fmean(values.values()), seed_interval(list(values.values())), dof=len(values) - 1
        )
        for model, values in gains.items()
    ]
    claims = [
        family_claim(
            f"{label} is lower than {BASE} at every size ({', '.join(models)}), tuned alike on repeated text",
            cases,
            [case.value > 0 for case in cases],
            id=f"optimizers-at-scale.{key}.every-size",
            seeds=min(len(values) for values in gains.values()),
            provisional=caveats,
        )
    ]
    if len(models) > 1:
        lasts = difference_claim(
            f"{label} gains more over {BASE} at {models[-1]} than at {models[0]}",
            change,
            id=f"optimizers-at-scale.{key}.lasts",
            caveats=caveats,
        )
        claims.append(lasts)
    return claims


def _caveats(here: Comparison, *labels: str) -> tuple[str, ...]:
    cells = [(model, which) for model in here.settings.models for which in (*labels, BASE)]
    found = [optimizers.caveats(here.tuned(which, model), which, here.sweep) for model, which in cells]
    return tuple(dict.fromkeys(caveat for caveats in found for caveat in caveats))


def _decay_claim(here: Comparison, others: list[str]) -> list[Claim]:
    """Claim that every optimizer has its lowest loss at the decay of AdamW."""
    decays = {
        (label, m): (best_decay(here, label, m), best_decay(here, BASE, m))
        for label in others
        for m in here.settings.models
    }
    if not decays or not all(all(pair) for pair in decays.values()):
        return []
    equal = [own == base for own, base in decays.values()]
    other = [f"{label} {m} {own:g} ({base:g})" for (label, m), (own, base) in decays.items() if own != base]
    return [
        Claim(
            id="optimizers-at-scale.same-decay",
            text=f"{', '.join(others)} {'have their' if len(others) > 1 else 'has its'} lowest loss at the same decay as {BASE}, "
            "at every size",
            value=f"in {sum(equal)} of {len(equal)}{': ' * bool(other)}{', '.join(other)}",
            holds=all(equal),
            provisional=(*_caveats(here, *others), "one seed chose the decay"),
        )
    ]


def _tuned_table(here: Comparison) -> Table:
    rows: list[tuple[Any, ...]] = []
    for model in here.settings.models:
        for label in here.settings.optimizers:
            result = here.tuned(label, model)
            if result.point is None or not result:
                continue
            gains = list(here.gains(label, model).values()) if label != BASE else []
            low, high = seed_interval(gains) or (None, None)
            gain = statistics.fmean(gains) if gains else None
            at = (model, label, result.point.lr, result.point.wd)
            rows.append((*at, result.mean, gain, low, high, len(result.records), result.tried))
    columns = (
        "model",
        "optimizer",
        "lr",
        "wd",
        "loss",
        f"gain over {BASE} (nats)",
        "low",
        "high",
        "seeds",
        "runs tried",
    )
    return Table(title=f"Tuned at every size, {here.sweep.title}", columns=columns, rows=tuple(rows))


def _figures(here: Comparison) -> tuple[Figure, ...]:
    series = {
        label: [(float(r.parameters), r.mean) for model in here.settings.models if (r := here.tuned(label, model))]
        for label in here.settings.optimizers
    }
    if not any(series.values()):
        return ()

    def draw(axes: Any) -> None:
        for label, points in series.items():
            if points:
                draw_series(axes, [size for size, _ in points], [loss for _, loss in points], label=label)
        axes.set_xscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel(LOSS_AXIS)

    caption = f"Loss against N, {here.sweep.title}: each optimizer at its own optimum."
    return (Figure(name="optimizers-against-size", caption=caption, draw=draw),)


def _notes(here: Comparison, others: list[str]) -> tuple[str, ...]:
    """Report what the laws in N and in K support, and what they cannot."""
    base, notes = size_law(here, BASE), list[str]()
    if base is None:
        notes.append(
            f"A three-constant law in N needs at least {FEWEST_SIZES} sizes for an interval (have "
            f"{len(here.settings.models)}), so only the gain at each size is reported."
        )
    for label in others:
        law = size_law(here, label)
        if base is not None and law is not None:
            notes.append(compare_limits(base, law, names=(f"the limit in N of {BASE}", f"that of {label}")).sentence)
        record, reference = (here.ensemble_record(which, "probs") for which in (label, BASE))
        if record is not None and reference is not None:
            names = (f"the limit in K of {BASE} members (probs)", f"the limit of {label} members")
            notes.append(compare_limits(members_law(reference), members_law(record), names=names).sentence)
    return tuple(notes)


# --- as members -------------------------------------------------------------------------------------------------------


def _member_claim(here: Comparison, others: list[str]) -> list[Claim]:
    """Compare the limits in K of members trained with each optimizer with AdamW's."""
    cases, reference = list[Case](), here.ensemble_record(BASE, "probs")
    for label in others:
        record = here.ensemble_record(label, "probs")
        if record is not None and reference is not None:
            cases.append(limit_case(label.lower(), record, reference, dof=here.settings.members - 1))
    if not cases:
        return []
    return [
        family_claim(
            f"the K to infinity limit of {here.sweep.model} members with every other optimizer (probs) is below that with {BASE}",
            cases,
            [case.value > 0 for case in cases],
            id="optimizers-at-scale.members-limit",
            seeds=here.settings.members,
        )
    ]


def _average_claim(here: Comparison) -> list[Claim]:
    """Does the gap between the two averages grow with K?"""
    cases = []
    for label in here.settings.optimizers:
        logits, probs = (here.ensemble_record(label, average) for average in ("logits", "probs"))
        if logits is None or probs is None:
            continue
        above, below = mean_curve(logits), mean_curve(probs)
        # At K = 1 both averages are the same model.
        gaps = {k: above[k] - below[k] for k in sorted(above) if k in below and k > 1}
        if len(gaps) > 1:
            cases.append(Case(label.lower(), gaps[max(gaps)] - gaps[min(gaps)]))
    if not cases:
        return []
    grow, shown = [case.value > 0 for case in cases], [f"{case.name} {case.value:+.4f}" for case in cases]
    return [
        Claim(
            id="optimizers-at-scale.averages",
            text=f"{here.sweep.model} members: the mean of probabilities gains on the mean of logits as K grows from 2 to "
            f"{here.settings.members}, with every optimizer",
            value=f"in {sum(grow)} of {len(grow)}: {', '.join(shown)} nats",
            seeds=here.settings.members,
            holds=all(grow),
            cases=tuple(cases),
            provisional=("one set of members of each",),
        )
    ]


def _member_table(here: Comparison) -> Table:
    counts, rows = range(1, here.settings.members + 1), list[tuple[Any, ...]]()
    for label in here.settings.optimizers:
        for average in AVERAGES:
            record = here.ensemble_record(label, average)
            if record is not None:
                curve, law = mean_curve(record), members_law(record)
                low, high = law.interval["E"] if law.interval else (None, None)
                rows.append((label, average, *(curve.get(k) for k in counts), law.E, low, high))
    return Table(
        title=f"Members of {here.sweep.model} at twice the epochs and half the decay: loss for every K, limit",
        columns=("optimizer", "average", *(f"loss, K = {k}" for k in counts), "limit", "low", "high"),
        rows=tuple(rows),
    )


def variant_gains(here: Comparison, label: str, variant: str) -> list[float]:
    """Return how far groups of one variant are below independent ones, by repetition."""
    return list(gains_by_seed(here.group_losses(label, variant), here.group_losses(label, "independent")).values())


def _variant_claim(here: Comparison, others: list[str], variant: str) -> list[Claim]:
    """Compare one variant of members with independent ones, with every optimizer but AdamW."""
    gains = {label: values for label in others if (values := variant_gains(here, label, variant))}
    if not gains:
        return []
    cases = [
        measured_case(label.lower(), statistics.fmean(values), seed_interval(values), dof=len(values) - 1)
        for label, values in gains.items()
    ]
    return [
        family_claim(
            f"members ({VARIANTS[variant].title}) have a lower loss than independent ones at equal training cost (probs), with "
            f"{', '.join(gains)}",
            cases,
            [case.value > 0 for case in cases],
            id=f"optimizers-at-scale.{variant}",
            seeds=min(map(len, gains.values())),
            provisional=() if min(map(len, gains.values())) >= FEWEST_REPETITIONS else ("two repetitions",),
        )
    ]


def _variant_table(here: Comparison) -> Table:
    rows: list[tuple[Any, ...]] = []
    for label in here.settings.optimizers:
        for variant in ("independent", *COMPARED):
            losses = list(here.group_losses(label, variant).values())
            gains = variant_gains(here, label, variant) if variant != "independent" else []
            if losses:
                gain = statistics.fmean(gains) if gains else None
                rows.append((label, VARIANTS[variant].title, statistics.fmean(losses), gain, len(losses)))
    return Table(
        title=f"Variants of members with each optimizer, {here.settings.group} at equal training cost (probs)",
        columns=("optimizer", "variant", "loss", "gain over independent (nats)", "repetitions"),
        rows=tuple(rows),
    )
