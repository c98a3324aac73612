"""Kinds of members at equal training cost: the rows that `ensembling` shows beside independent members.

Cost is counted in passes of one member over its text: a chained member also reads its teacher (a third of a pass more)
and trains for three quarters of the epochs instead, masked inputs are a second pass, so half of the epochs. Held-out
tokens count as bought, and are not trained on.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.sections import Table
from epochal.run import AVERAGES, Ensemble, Job, Run, SoftTargetDistillation, without_seed
from epochal.scale import Kinds, Point, Scale
from epochal.scaling import caveats, seed_interval

KINDS = {
    "independent": "independent: other weights and order",
    "init": "other weights, same order",
    "order": "same weights, other order",
    "snapshot": "snapshots: one run in cycles, decay in antiphase",
    "chain": "chain: each learns from the one before",
    "ema": "EMA of the weights",
    "swa": "SWA of the weights",
    "dropout": "dropout",
    "masked": "masked inputs beside plain ones",
    "holdout": "a slice held out, equal weights",
    "learned": "a slice held out, weights learned on it",
    "selected": "a slice held out, members chosen on it",
}
TRAINED = tuple(kind for kind in KINDS if kind not in ("learned", "selected"))
"""The kinds that train members of their own; the other two weight those of "holdout"."""


def jobs(records: Records, scale: Scale, point: Point | None) -> list[Job]:
    """Every job of the comparison that can be named today; `point` is the members' optimum, None while unknown."""
    if scale.kinds is None or point is None:
        return []
    found: list[Job] = []
    for seed in range(scale.kinds.seeds):
        for kind in TRAINED:
            found += members(scale.kinds, plain(scale, point), kind, seed)
        for kind in KINDS:
            found += [job for average in AVERAGES if (job := ensemble(records, scale, point, kind, seed, average))]
    return found


def plain(scale: Scale, point: Point) -> Callable[[int], Run]:
    """Return what makes an independent member out of its seed: the Run that the other recipes know."""
    assert scale.kinds is not None
    model, tokens = scale.kinds.model, scale.unique_tokens[0]
    return lambda seed: scale.run(model, tokens, point, seed=seed)


def members(kinds: Kinds, independent: Callable[[int], Run], kind: str, seed: int) -> list[Run]:
    """Return the members of one kind for one repetition, each a change of the independent one of its seed."""
    runs: list[Run] = []
    for k in range(kinds.count):
        first = seed * kinds.count
        base = independent(first + k)
        run = replace(base, name=f"{without_seed(base.name)}-{kind}-s{base.init_seed}")
        previous = runs[-1].name if runs else None
        match kind:
            case "independent":
                run = base
            case "init":
                run = replace(run, order_seed=independent(first).order_seed)
            case "order":
                run = replace(run, init_seed=independent(first).init_seed)
            case "snapshot":
                run = replace(run, init_seed=independent(first).init_seed, init_from=previous, wd_schedule="antiphase")
            case "chain" if previous is not None:
                teach = SoftTargetDistillation(
                    source=previous, kd_weight=kinds.chain_weight, temperature=kinds.chain_temperature
                )
                run = replace(run, teach=teach, epochs=max(1, round(0.75 * base.epochs)))
            case "ema" | "swa":
                run = replace(run, weight_averaging=kind)
            case "dropout":
                run = replace(run, dropout=kinds.dropout)
            case "masked":
                run = replace(run, input_mask_prob=kinds.input_mask_prob, epochs=max(1, base.epochs // 2))
            case "holdout":
                run = replace(run, holdout_tokens=kinds.holdout_tokens)
        runs.append(run)
    return runs


def cost(runs: list[Run]) -> float:
    """Return the training cost of runs of one size in tokens of plain training."""
    extra = [1.0 + (1.0 if run.input_mask_prob else 0.0) + (1.0 / 3.0 if run.teach else 0.0) for run in runs]
    return math.fsum(run.tokens * factor for run, factor in zip(runs, extra, strict=True))


def ensemble(records: Records, scale: Scale, point: Point, kind: str, seed: int, average: str) -> Ensemble | None:
    """Return the ensemble of one kind, repetition and average; None while what it should weigh is not known."""
    assert scale.kinds is not None
    trained = kind if kind in TRAINED else "holdout"
    equal = group(members(scale.kinds, plain(scale, point), trained, seed), seed, average)
    if kind in TRAINED:
        return equal
    record = records.get(equal)
    found = record.results.get("holdout") if record is not None else None
    if found is None:
        return None
    name = equal.name.replace("-holdout-", f"-{kind}-")
    if kind == "learned":
        return replace(equal, name=name, member_weights=tuple(found["weights"]))
    return replace(equal, name=name, runs=tuple(equal.runs[k] for k in found["selected"]))


def group(runs: list[Run], seed: int, average: str) -> Ensemble:
    """Return the equally weighted ensemble of the members of one repetition."""
    names = tuple(run.name for run in runs)
    return Ensemble(name=f"{without_seed(names[0])}-r{seed}-k{len(runs)}-{average}", runs=names, average=average)


@dataclass(frozen=True)
class Row:
    """What one kind reached with one average: losses by repetition, and its members' mean loss."""

    losses: dict[int, float]
    member: float
    cost: float


def rows(records: Records, scale: Scale, point: Point | None) -> dict[tuple[str, str], Row]:
    """Return what has run, by kind and average."""
    if scale.kinds is None or point is None:
        return {}
    base = cost(members(scale.kinds, plain(scale, point), "independent", 0))
    found = {}
    for kind in KINDS:
        runs = [
            members(scale.kinds, plain(scale, point), kind if kind in TRAINED else "holdout", seed)
            for seed in range(scale.kinds.seeds)
        ]
        alone = [record.loss for group in runs for run in group if (record := records.get(run)) is not None]
        for average in AVERAGES:
            losses = {
                seed: record.loss
                for seed in range(scale.kinds.seeds)
                if (record := _record(records, scale, point, kind, seed, average)) is not None
            }
            if losses and alone:
                found[kind, average] = Row(losses, statistics.fmean(alone), cost(runs[0]) / base)
    return found


def _record(records: Records, scale: Scale, point: Point, kind: str, seed: int, average: str) -> Record | None:
    job = ensemble(records, scale, point, kind, seed, average)
    return None if job is None else records.get(job)


def gains(found: dict[tuple[str, str], Row], kind: str, average: str) -> list[float]:
    """Return the gains over independent members of the same average, one for each repetition that has both."""
    ours, theirs = found.get((kind, average)), found.get(("independent", average))
    if ours is None or theirs is None:
        return []
    return [theirs.losses[seed] - loss for seed, loss in ours.losses.items() if seed in theirs.losses]


def claims(found: dict[tuple[str, str], Row], scale: Scale, reasons: tuple[str, ...]) -> list[Claim]:
    """One claim for each kind: its mean of probabilities against that of independent members, paired by repetition."""
    assert scale.kinds is not None
    made = []
    for kind, words in KINDS.items():
        values = gains(found, kind, "probs")
        if kind == "independent" or not values:
            continue
        made.append(
            Claim(
                text=f"{scale.kinds.count} {scale.kinds.model} members at equal training cost, {words}: "
                "better than independent ones (probs)",
                value=f"{statistics.fmean(values):.4f} nats",
                interval=seed_interval(values),
                seeds=len(values),
                holds=statistics.fmean(values) > 0,
                provisional=(*reasons, *caveats(values)),
            )
        )
    return made


def table(found: dict[tuple[str, str], Row], scale: Scale) -> Table:
    """One row for each kind and average, the best first."""
    assert scale.kinds is not None
    cells = []
    for (kind, average), row in sorted(found.items(), key=lambda item: statistics.fmean(item[1].losses.values())):
        losses, values = list(row.losses.values()), gains(found, kind, average)
        gain = statistics.fmean(values) if values and kind != "independent" else None
        spread = seed_interval(losses)
        half = None if spread is None else (spread[1] - spread[0]) / 2
        cells.append(
            (KINDS[kind], average, round(row.cost, 3), row.member, statistics.fmean(losses), half, gain, len(losses))
        )
    return Table(
        title=f"Kinds of members, D = {scale.unique_tokens[0]:,} tokens, {scale.kinds.count} of {scale.kinds.model}, "
        "training cost as a multiple of independent members",
        columns=("kind", "average", "cost", "one member", "loss", "+-90%", "gain", "seeds"),
        rows=tuple(cells),
    )
