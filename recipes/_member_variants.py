"""Variants of ensemble members at equal training cost, compared with independent members by `ensembling`.

Cost is counted in passes of one member over its text. Held-out tokens count as bought but are not trained on.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from epochal.names import named_ensemble
from epochal.ranges import Range, Ranged, Repeats, TokensOrNone
from epochal.report.claims import Claim
from epochal.report.comparison import difference_claim, gains_by_seed
from epochal.report.sections import Table
from epochal.run import AVERAGES, Ensemble, Job, Run, SoftTargetDistillation
from epochal.scale import Scale
from epochal.scaling import seed_interval
from epochal.study import Study

# From a seed to the independent member of that seed.
MakeMember = Callable[[int], Run]


@dataclass(frozen=True)
class Variant:
    """How members differ from independent ones."""

    label: str
    title: str
    run: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of the Run that differ
    shared: tuple[str, ...] = ()  # seeds that all members take from the first
    epochs: float = 1.0  # factor that keeps the training cost equal
    continues: bool = False  # each member starts from the weights of the previous one
    # each member learns from the previous one, with these settings
    teach: Mapping[str, Any] | None = field(default=None, hash=False)
    # The members are those of "holdout", with weights learned on the held-out slice, or only those that were
    # selected there.
    weighs: str = ""


VARIANTS = {
    variant.label: variant
    for variant in (
        Variant("independent", "independent: other weights and order"),
        Variant("init", "other weights, same order", shared=("order_seed",)),
        # Sharing one of the two seeds shows which of them makes members differ.
        Variant("order", "same weights, other order", shared=("init_seed",)),
        Variant(
            "snapshot",
            "snapshots: one run in cycles, decay in antiphase",
            shared=("init_seed",),
            continues=True,
            run={"wd_schedule": "antiphase"},
        ),
        # Reading the teacher costs a third of a pass more, so a chained member trains for three quarters of the
        # epochs.
        # Weight and temperature are NanoGPT Slowrun's.
        Variant(
            "chain", "chain: each learns from the one before", teach={"kd_weight": 0.5, "temperature": 1.0}, epochs=0.75
        ),
        Variant("ema", "EMA of the weights", run={"weight_averaging": "ema"}),
        Variant("swa", "SWA of the weights", run={"weight_averaging": "swa"}),
        Variant("dropout", "dropout", run={"dropout": 0.1}),
        # Masked inputs add a second pass, so the member trains for half of the epochs.
        # arXiv 2606.06888
        Variant("masked", "masked inputs and plain ones", run={"input_mask_prob": 0.5}, epochs=0.5),
        Variant("holdout", "a slice held out, equal weights"),
        Variant("learned", "a slice held out, weights learned on it", weighs="weights"),
        Variant("selected", "a slice held out, members chosen on it", weighs="selected"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """`count` members of one size, in `seeds` repetitions, on the first budget; `holdout_tokens` for "holdout"."""

    model: str
    count: Annotated[int, Range(2, 1000)]  # members of an ensemble
    seeds: Repeats  # repetitions
    holdout_tokens: TokensOrNone  # of the variants that hold text out

    def check(self, scale: Scale) -> None:
        """Refuse a model that is not on the ladder."""
        scale.check_models("member_variants", self.model)


def plan(study: Study, settings: Settings | None, independent: MakeMember | None) -> list[Job]:
    """Return every job of the comparison; none before the members' point is known."""
    if settings is None or independent is None:
        return []
    jobs: list[Job] = []
    for repetition in range(settings.seeds):
        for variant in VARIANTS.values():
            jobs += [] if variant.weighs else members(study, settings, independent, variant, repetition)
        for variant in VARIANTS.values():
            found = [ensemble(study, settings, independent, variant, repetition, average) for average in AVERAGES]
            jobs += [job for job in found if job is not None]
    return jobs


def members(study: Study, settings: Settings, independent: MakeMember, variant: Variant, repetition: int) -> list[Run]:
    """Return the members of one variant and repetition."""
    # Each is a change of the independent member of its seed, so variants can be compared by seed.
    runs: list[Run] = []
    first = repetition * settings.count
    for seed in range(first, first + settings.count):
        base = independent(seed)
        changes: dict[str, Any] = dict(variant.run)
        changes |= {name: getattr(independent(first), name) for name in variant.shared}
        if variant.label == "holdout" or variant.weighs:
            changes["holdout_tokens"] = settings.holdout_tokens
        if variant.continues and runs:
            changes["init_from"] = runs[-1].name
        if variant.teach is not None and runs:
            changes["teach"] = SoftTargetDistillation(source=runs[-1].name, **variant.teach)
        # The first member of a chain has no teacher, so it trains for all epochs.
        if variant.teach is None or runs:
            changes["epochs"] = max(1, round(variant.epochs * base.epochs))
        runs.append(study.scale.changed(base, changes))
    return runs


def cost(runs: list[Run]) -> float:
    """Return the training cost of runs of one size in tokens of plain training."""
    # A forward pass of the teacher is a third of a forward and backward pass.
    extra = [1.0 + (1.0 if run.input_mask_prob else 0.0) + (1.0 / 3.0 if run.teach else 0.0) for run in runs]
    return math.fsum(run.tokens * factor for run, factor in zip(runs, extra, strict=True))


def ensemble(
    study: Study, settings: Settings, independent: MakeMember, variant: Variant, repetition: int, average: str
) -> Ensemble | None:
    """Return the ensemble of one variant, repetition and average; None before its weights are known."""
    runs = tuple(run.name for run in members(study, settings, independent, variant, repetition))
    equal = named_ensemble(runs, average)
    if not variant.weighs:
        return equal
    # The ensemble of equal weights learns them on the held-out slice; its record has both.
    record = study.records.get(equal)
    learned = record.results.get("holdout") if record is not None else None
    if learned is None:
        return None
    if variant.weighs == "weights":
        return named_ensemble(runs, average, member_weights=tuple(learned["weights"]))
    return named_ensemble(tuple(runs[k] for k in learned["selected"]), average)


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one variant reached with one average: losses by repetition, its members' mean loss, its relative cost."""

    losses: dict[int, float]  # of the ensembles, by repetition
    member: float  # mean loss of one member
    cost: float  # of training, relative to independent members


Rows = dict[tuple[str, str], Row]


def rows(study: Study, settings: Settings | None, independent: MakeMember | None) -> Rows:
    """Return what has run, by variant and average."""
    if settings is None or independent is None:
        return {}
    base = cost(members(study, settings, independent, VARIANTS["independent"], 0))
    found = {}
    for label, variant in VARIANTS.items():
        groups = [members(study, settings, independent, variant, repetition) for repetition in range(settings.seeds)]
        alone = [loss for group in groups for run in group if (loss := study.test_loss(run)) is not None]
        for average in AVERAGES:
            jobs = {r: ensemble(study, settings, independent, variant, r, average) for r in range(settings.seeds)}
            losses = {r: loss for r, job in jobs.items() if job and (loss := study.test_loss(job)) is not None}
            if losses and alone:
                found[label, average] = Row(losses, statistics.fmean(alone), cost(groups[0]) / base)
    return found


def gains(rows: Rows, label: str, average: str) -> list[float]:
    """Return the gains over independent members of the same average, by repetition."""
    row, baseline = rows.get((label, average)), rows.get(("independent", average))
    return [] if row is None or baseline is None else list(gains_by_seed(row.losses, baseline.losses).values())


def claims(rows: Rows, settings: Settings, caveats: tuple[str, ...]) -> list[Claim]:
    """Return one claim per variant: its mean of probabilities against independent members, paired by repetition."""
    found = [
        difference_claim(
            f"{settings.count} {settings.model} members ({variant.title}) have a lower loss than independent ones at equal "
            "training cost (probs)",
            values,
            id=f"ensembling.variant.{label}",
            caveats=caveats,
        )
        for label, variant in VARIANTS.items()
        if label != "independent" and (values := gains(rows, label, "probs"))
    ]
    init, order = rows.get(("init", "probs")), rows.get(("order", "probs"))
    values = list(gains_by_seed(order.losses, init.losses).values()) if init and order else []
    if values:
        text = "members that differ in the order of the data alone have a lower loss than members that differ in the weights alone"
        paper = "order matters more than initialization (figure only), section 7"
        found.append(difference_claim(text, values, id="ensembling.order-init", paper=paper, caveats=caveats))
    return found


def table(rows: Rows, settings: Settings, tokens: int) -> Table:
    """Return one row for each variant and average, the best first."""
    cells = []
    for (label, average), row in sorted(rows.items(), key=lambda item: statistics.fmean(item[1].losses.values())):
        losses, values = list(row.losses.values()), gains(rows, label, average)
        gain = statistics.fmean(values) if values and label != "independent" else None
        spread = seed_interval(losses)
        half = None if spread is None else (spread[1] - spread[0]) / 2
        title = VARIANTS[label].title
        cells.append(
            (title, average, round(row.cost, 3), row.member, statistics.fmean(losses), half, gain, len(losses))
        )
    return Table(
        title=f"Variants of members, D = {tokens:,} tokens, {settings.count} of {settings.model}, training cost as a "
        "multiple of independent members",
        columns=("variant", "average", "cost", "one member", "loss", "+-90%", "gain", "seeds"),
        rows=tuple(cells),
    )
