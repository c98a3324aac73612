"""Do SPECTRA, Fira and Muon move the limits of the data-constrained recipe?

Claim: none in the papers; nobody has published these optimizers with many epochs, heavy decay and ensembles.
Command: epochal run limits --scale micro
Found: recipes/results/<scale>/report.md

Every optimizer is tuned alike (the grid of the recipe `optimizers`) at every size; its members take the rule of twice
the epochs and half the decay. "Spectral clipping of members" is that of their updates in training.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import AVERAGES, Ensemble, Job, Run
from epochal.scale import Kinds, Limits, Scale, Setting, member_point
from epochal.scaling import PowerLaw, compare_limits, fit_power_law, seed_interval, unsettled
from recipes import _kinds, optimizers
from recipes._differences import difference_claim
from recipes.ensembling import members_law

BASE = "AdamW"
KINDS = ("chain", "snapshot")
"""The kinds of members that are compared with independent ones of the same optimizer."""
FEWEST_SIZES = 4
"""Sizes below which a law in N, with its three constants, says nothing."""


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: each optimizer's grid at each size, its seeds, its members of every kind."""
    if scale.limits is None:
        return []
    found: list[Job] = []
    for name in scale.limits.optimizers:
        for model in scale.limits.models:
            found += optimizers.entry_jobs(records, at(scale, model), setting_of(scale), optimizers.entry_of(name))
        member = independent(records, scale, name)
        if member is None:
            continue
        found += [member(seed) for seed in range(scale.limits.members)]
        found += ensembles(records, scale, name)
        for kind in KINDS:
            for seed in repetitions(scale.limits):
                found += _kinds.members(as_kinds(scale), member, kind, seed)
        found += [
            grouped(member, scale, kind, seed) for kind in ("independent", *KINDS) for seed in repetitions(scale.limits)
        ]
    return found


def setting_of(scale: Scale) -> Setting:
    """Return the setting that repeats its text."""
    return next(setting for setting in optimizers.settings(scale) if setting.epochs > 1)


def at(scale: Scale, model: str) -> Scale:
    """Return the scale with its comparison of optimizers at another size."""
    return replace(scale, optimizers=replace(optimizers.comparison(scale), model=model))


def repetitions(limits: Limits) -> range:
    """Return the repetitions of a group of members, each of other seeds."""
    return range(limits.members // limits.group)


def as_kinds(scale: Scale) -> Kinds:
    """Return the settings of chained members and snapshots: those of the other recipes, in groups of this one."""
    assert scale.limits is not None
    model = optimizers.comparison(scale).model
    kinds = scale.kinds or Kinds(model=model, count=scale.limits.group, seeds=1, holdout_tokens=0)
    return replace(kinds, model=model, count=scale.limits.group)


def independent(records: Records, scale: Scale, name: str) -> Callable[[int], Run] | None:
    """Return what makes an optimizer's member out of its seed; None before its grid is complete."""
    setting, entry = setting_of(scale), optimizers.entry_of(name)
    best = optimizers.tuned(records, scale, setting, entry)
    if best is None:
        return None
    point = member_point(best)
    return lambda seed: optimizers.run_at(scale, setting, entry, point, seed)


def ensembles(records: Records, scale: Scale, name: str) -> list[Ensemble]:
    """Return the ensembles of all independent members of one optimizer, one for each average."""
    member = independent(records, scale, name)
    if member is None or scale.limits is None:
        return []
    names = tuple(member(seed).name for seed in range(scale.limits.members))
    stem = f"limits-{name.lower()}-{names[0]}"
    return [Ensemble(name=f"{stem}-k{len(names)}-{average}", runs=names, average=average) for average in AVERAGES]


def grouped(member: Callable[[int], Run], scale: Scale, kind: str, seed: int) -> Ensemble:
    """Return the mean of probabilities of one group of members."""
    group = _kinds.group(_kinds.members(as_kinds(scale), member, kind, seed), seed, "probs")
    return replace(group, name=f"limits-{group.name}")


def report(records: Records, scale: Scale) -> Section:
    """Compare every optimizer with AdamW: tuned, in the limits, and as members."""
    title, question = "Limits", "Do SPECTRA, Fira and Muon move the limits when text is repeated?"
    if scale.limits is None:
        return Section(title=title, question=question, notes=("This scale has no table [limits].",))
    others = [name for name in scale.limits.optimizers if name != BASE]
    claims = [claim for name in others for claim in _tuned_claims(records, scale, name)]
    claims += [claim for name in others for claim in _member_claims(records, scale, name)]
    claims += [claim for name in scale.limits.optimizers for claim in _average_claims(records, scale, name)]
    claims += [
        claim
        for name in scale.limits.optimizers
        for kind in KINDS
        for claim in _kind_claims(records, scale, name, kind)
    ]
    return Section(
        title=title,
        question=question,
        claims=tuple(claims),
        tables=(_tuned_table(records, scale), _member_table(records, scale), _kind_table(records, scale)),
        figures=_figures(records, scale),
        notes=_notes(records, scale, others),
    )


# --- tuned, at every size ---------------------------------------------------------------------------------------------


def records_at(records: Records, scale: Scale, name: str, model: str) -> dict[int, Record]:
    """Return the records of one optimizer at its best point for one size, by seed."""
    return optimizers.best_records(records, at(scale, model), setting_of(scale), optimizers.entry_of(name))


def losses_at(records: Records, scale: Scale, name: str, model: str) -> dict[int, float]:
    """Return the losses of one optimizer at its best point for one size, by seed."""
    return {seed: record.loss for seed, record in records_at(records, scale, name, model).items()}


def gains_at(records: Records, scale: Scale, name: str, model: str) -> dict[int, float]:
    """Return how far one optimizer is below AdamW at one size, by seed, in nats."""
    ours, theirs = (losses_at(records, scale, which, model) for which in (name, BASE))
    return {seed: theirs[seed] - loss for seed, loss in ours.items() if seed in theirs}


def size_law(records: Records, scale: Scale, name: str) -> PowerLaw | None:
    """Fit the law in N of one optimizer; None with too few sizes for it to say anything."""
    assert scale.limits is not None
    points: list[tuple[float, float]] = []
    for model in scale.limits.models:
        found = records_at(records, scale, name, model)
        points += [(float(record.results["parameters"]), record.loss) for record in found.values()]
    if len({size for size, _ in points}) < FEWEST_SIZES:
        return None
    return fit_power_law([size for size, _ in points], [loss for _, loss in points])


def best_decay(records: Records, scale: Scale, name: str, model: str) -> float | None:
    """Return the best decay of one optimizer at one size, in AdamW's terms (times its factor)."""
    entry = optimizers.entry_of(name)
    best = optimizers.tuned(records, at(scale, model), setting_of(scale), entry)
    return None if best is None else float(f"{best.wd * entry.factor:.6g}")


def _tuned_claims(records: Records, scale: Scale, name: str) -> list[Claim]:
    """Is it lower at every size, does that last with size, and does it want the same decay?"""
    assert scale.limits is not None
    models = scale.limits.models
    gains = {model: gains_at(records, scale, name, model) for model in models}
    if not all(gains.values()):
        return []
    means = {model: statistics.fmean(values.values()) for model, values in gains.items()}
    shown = ", ".join(f"{model} {mean:+.4f}" for model, mean in means.items())
    small, large = gains[models[0]], gains[models[-1]]
    change = [large[seed] - small[seed] for seed in large if seed in small]
    if not change:
        return []
    decays = {
        model: (best_decay(records, scale, name, model), best_decay(records, scale, BASE, model)) for model in models
    }
    seeds = min(len(values) for values in gains.values())
    edges = tuple(
        reason
        for model in models
        for reason in optimizers.missing(records, at(scale, model), setting_of(scale), (name, BASE))
    )
    reasons = tuple(dict.fromkeys(edges))
    return [
        Claim(
            text=f"{name} is lower than {BASE} at every size ({', '.join(models)}), tuned alike on repeated text",
            value=f"{shown} nats",
            interval=seed_interval(list(large.values())),
            seeds=seeds,
            holds=all(mean > 0 for mean in means.values()),
            provisional=tuple(dict.fromkeys((*reasons, *unsettled(list(large.values()))))),
        ),
        Claim(
            text=f"what {name} gains over {BASE} does not shrink from {models[0]} to {models[-1]}",
            value=f"{statistics.fmean(change):+.4f} nats",
            interval=seed_interval(change),
            seeds=len(change),
            holds=statistics.fmean(change) >= 0,
            provisional=tuple(dict.fromkeys((*reasons, *unsettled(change)))),
        ),
        Claim(
            text=f"{name} has its lowest loss at the decay at which {BASE} has it",
            value=", ".join(f"{model} {ours:g} ({theirs:g})" for model, (ours, theirs) in decays.items()),
            holds=all(ours == theirs for ours, theirs in decays.values()),
            provisional=(*reasons, "one seed chose the decay"),
        ),
    ]


def _tuned_table(records: Records, scale: Scale) -> Table:
    assert scale.limits is not None
    rows: list[tuple[Any, ...]] = []
    for model in scale.limits.models:
        for name in scale.limits.optimizers:
            entry = optimizers.entry_of(name)
            point = optimizers.tuned(records, at(scale, model), setting_of(scale), entry)
            values = list(losses_at(records, scale, name, model).values())
            if point is None or not values:
                continue
            gains = list(gains_at(records, scale, name, model).values())
            low, high = (seed_interval(gains) if name != BASE else None) or (None, None)
            tried = len(optimizers.grid(at(scale, model), setting_of(scale), entry))
            gain = statistics.fmean(gains) if name != BASE and gains else None
            rows.append(
                (model, name, point.lr, point.wd, statistics.fmean(values), gain, low, high, len(values), tried)
            )
    return Table(
        title=f"Tuned at every size, {optimizers.words(setting_of(scale))}",
        columns=(
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
        ),
        rows=tuple(rows),
    )


def _figures(records: Records, scale: Scale) -> tuple[Figure, ...]:
    assert scale.limits is not None
    series: dict[str, list[tuple[float, float]]] = {}
    for name in scale.limits.optimizers:
        for model in scale.limits.models:
            found = records_at(records, scale, name, model)
            if found:
                size = float(found[min(found)].results["parameters"])
                mean = statistics.fmean(record.loss for record in found.values())
                series.setdefault(name, []).append((size, mean))
    if not series:
        return ()

    def draw(axes: Any) -> None:
        for name, points in series.items():
            draw_series(axes, [size for size, _ in points], [loss for _, loss in points], label=name)
        axes.set_xscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend()

    caption = f"Loss against N, {optimizers.words(setting_of(scale))}: each optimizer at its own optimum."
    return (Figure(name="limits-against-size", caption=caption, draw=draw),)


def _notes(records: Records, scale: Scale, others: list[str]) -> tuple[str, ...]:
    """Say what the laws in N and in K support, and what they cannot."""
    assert scale.limits is not None
    notes = []
    base = size_law(records, scale, BASE)
    if base is None:
        notes.append(
            f"{len(scale.limits.models)} sizes cannot bear a law in N with three constants, so whether the limit in N "
            "moves is open; the gain at each size is what there is."
        )
    for name in others:
        law = size_law(records, scale, name)
        if base is not None and law is not None:
            notes.append(compare_limits(base, law, names=(f"the limit in N of {BASE}", f"that of {name}")).sentence)
        ours, theirs = (_law(records, scale, which, "probs") for which in (name, BASE))
        if ours is not None and theirs is not None:
            names = (f"the limit in K of {BASE} members (probs)", f"the limit of {name} members")
            notes.append(compare_limits(theirs, ours, names=names).sentence)
    return tuple(notes)


# --- as members -------------------------------------------------------------------------------------------------------


def ensemble_record(records: Records, scale: Scale, name: str, average: str) -> Record | None:
    """Return the record of all independent members of one optimizer for one average."""
    for job in ensembles(records, scale, name):
        record = records.get(job)
        if job.average == average and record is not None and math.isfinite(record.loss):
            return record
    return None


def _law(records: Records, scale: Scale, name: str, average: str) -> Any:
    record = ensemble_record(records, scale, name, average)
    return None if record is None else members_law(record)


def _member_claims(records: Records, scale: Scale, name: str) -> list[Claim]:
    ours, theirs = (ensemble_record(records, scale, which, "probs") for which in (name, BASE))
    if ours is None or theirs is None:
        return []
    count, model = ours.results["members"], optimizers.comparison(scale).model
    below, limit = members_law(ours), members_law(theirs)
    reach = _limit_reach(below, limit)
    difference = limit.E - below.E
    return [
        Claim(
            text=f"the limit K to infinity of {model} members with {name} (probs) lies under that with {BASE}",
            value=f"{difference:+.4f} nats ({limit.E:.4f} to {below.E:.4f}; {count} members {theirs.loss:.4f} to {ours.loss:.4f})",
            interval=None if reach is None else (difference - reach, difference + reach),
            seeds=count,
            holds=difference > 0,
            provisional=("within noise",) if reach is None or abs(difference) <= reach else (),
        )
    ]


def _limit_reach(*laws: Any) -> float | None:
    """Half of the 90% interval of a difference of limits whose errors are independent; None without their errors."""
    halves = [(law.interval["E"][1] - law.interval["E"][0]) / 2 for law in laws if law.interval]
    return math.hypot(*halves) if len(halves) == len(laws) else None


def _average_claims(records: Records, scale: Scale, name: str) -> list[Claim]:
    """Does the gap between the two averages grow with K?"""
    logits, probs = (ensemble_record(records, scale, name, average) for average in ("logits", "probs"))
    if logits is None or probs is None:
        return []
    gaps = average_gaps(logits, probs)
    counts = [k for k in gaps if k > 1]
    if len(counts) < 2:
        return []
    first, last = counts[0], counts[-1]
    model = optimizers.comparison(scale).model
    return [
        Claim(
            text=f"{model} members with {name}: the mean of probabilities gains on the mean of logits as K grows",
            value=f"{gaps[first]:+.4f} nats at K = {first}, {gaps[last]:+.4f} at K = {last}",
            seeds=last,
            holds=gaps[last] > gaps[first],
            provisional=("one set of members",),
        )
    ]


def average_gaps(logits: Record, probs: Record) -> dict[int, float]:
    """Return how far the mean of probabilities lies under that of logits for every K, means over the same subsets."""
    curves = ({int(k): statistics.fmean(v) for k, v in record.results["curve"].items()} for record in (logits, probs))
    above, below = curves
    return {k: above[k] - below[k] for k in sorted(above) if k in below}


def _member_table(records: Records, scale: Scale) -> Table:
    assert scale.limits is not None
    counts = range(1, scale.limits.members + 1)
    rows: list[tuple[Any, ...]] = []
    for name in scale.limits.optimizers:
        for average in AVERAGES:
            record = ensemble_record(records, scale, name, average)
            if record is None:
                continue
            curve = {int(k): statistics.fmean(losses) for k, losses in record.results["curve"].items()}
            law = members_law(record)
            low, high = law.interval["E"] if law.interval else (None, None)
            rows.append((name, average, *(curve.get(k) for k in counts), law.E, low, high))
    return Table(
        title=f"Members of {optimizers.comparison(scale).model} at twice the epochs and half the decay: loss for every K, limit",
        columns=("optimizer", "average", *(f"loss, K = {k}" for k in counts), "limit", "low", "high"),
        rows=tuple(rows),
    )


def kind_gains(records: Records, scale: Scale, name: str, kind: str) -> list[float]:
    """Return how far groups of one kind are below independent ones with the same optimizer, one for each repetition."""
    member = independent(records, scale, name)
    if member is None or scale.limits is None:
        return []
    values = []
    for seed in repetitions(scale.limits):
        ours, theirs = (records.get(grouped(member, scale, which, seed)) for which in (kind, "independent"))
        if ours is not None and theirs is not None:
            values.append(theirs.loss - ours.loss)
    return values


def _kind_claims(records: Records, scale: Scale, name: str, kind: str) -> list[Claim]:
    values = kind_gains(records, scale, name, kind)
    if not values:
        return []
    text = f"members with {name} at equal training cost, {_kinds.KINDS[kind]}: better than independent ones (probs)"
    return [difference_claim(text, values)]


def _kind_table(records: Records, scale: Scale) -> Table:
    assert scale.limits is not None
    rows: list[tuple[Any, ...]] = []
    for name in scale.limits.optimizers:
        member = independent(records, scale, name)
        for kind in ("independent", *KINDS) if member is not None else ():
            assert member is not None
            found = [records.get(grouped(member, scale, kind, seed)) for seed in repetitions(scale.limits)]
            values = [record.loss for record in found if record is not None]
            if values:
                gains = kind_gains(records, scale, name, kind) if kind != "independent" else []
                gain = statistics.fmean(gains) if gains else None
                rows.append((name, _kinds.KINDS[kind], statistics.fmean(values), gain, len(values)))
    return Table(
        title=f"Kinds of members with each optimizer, {scale.limits.group} at equal training cost (probs)",
        columns=("optimizer", "kind", "loss", "gain over independent (nats)", "repetitions"),
        rows=tuple(rows),
    )
