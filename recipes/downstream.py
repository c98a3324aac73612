"""Does a lower loss answer more questions? (Spec section 10.)

Claim: zero-shot accuracy on multiple-choice tasks follows the loss over single models, ensembles and students; the best
ensemble and its student answer more than the best standard model.
Command: epochal run downstream --scale micro
Found: recipes/results/<scale>/report.md

Accuracy is raw, not divided by the length of a choice, and the headline is the mean over tasks; ensembles answer with
averaged logits. Models are chosen by their validation loss, never by their answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Ensemble, Job, Run
from epochal.scale import Scale
from epochal.search.searches import Search
from recipes import distillation, ensembling, epoching, heavy_weight_decay

KINDS = {"standard": "standard decay", "tuned": "tuned decay", "members": "members together", "student": "students"}
RESAMPLES = 2000
"""Draws of the questions behind an interval."""
FEWEST = 4
"""Models below which an order says nothing."""

Floats = npt.NDArray[np.float64]


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: what the other recipes run, and the answers of what they left."""
    if not scale.tasks:
        return []
    return [*distillation.jobs(records, scale), *(entry.job for entry in entries(records, scale))]


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return the searches that this recipe waits for: what `epochal plan` shows."""
    return distillation.searches(records, scale) if scale.tasks else []


@dataclass(frozen=True)
class Entry:
    """Models that answer as one: of which kind, in words, and the job."""

    kind: str
    what: str
    job: Ensemble


def entries(records: Records, scale: Scale) -> list[Entry]:
    """Return what answers, at the first budget: single models of every size, K members for every K, students."""
    tokens = scale.unique_tokens[0]
    found: list[Entry] = []
    for rung in scale.ladder:
        usual = epoching.standard(records, scale, rung.model, tokens)
        if usual.certified and usual.best is not None:
            found.append(_entry("standard", rung.model, [scale.run(rung.model, tokens, usual.best)], scale))
        tuned = heavy_weight_decay.tuned(records, scale, rung.model, tokens)
        if tuned.certified and tuned.best is not None:
            runs = [scale.run(rung.model, tokens, tuned.best, seed=seed) for seed in range(scale.seeds)]
            found += [_entry("tuned", f"{rung.model}, seed {run.init_seed}", [run], scale) for run in runs]
    for model in scale.ensemble.models:
        members = ensembling.members(records, scale, model, tokens)
        found += [_entry("members", f"{k} x {model}", members[:k], scale) for k in range(1, len(members) + 1)]
    for teacher, words in (("ensemble", "the ensemble"), ("self", "one member")):
        for seed in range(scale.seeds):
            for student in distillation.student(records, scale, teacher, seed):
                if isinstance(student, Run):
                    found.append(_entry("student", f"{student.model} of {words}, seed {seed}", [student], scale))
    unique = {entry.job.name: entry for entry in reversed(found)}  # a tuned run may be the standard one: once, as that
    return [entry for entry in found if unique[entry.job.name] is entry]


def _entry(kind: str, what: str, runs: Sequence[Run], scale: Scale) -> Entry:
    """Return the job that asks the scale's tasks of runs together."""
    names = tuple(run.name for run in runs)
    name = names[0] if len(names) == 1 else f"{names[0]}-k{len(names)}"
    return Entry(kind, what, Ensemble(name=f"tasks-{name}", runs=names, average="logits", tasks=scale.tasks))


@dataclass(frozen=True)
class Answered:
    """An entry that has answered: its record, and for each task a 1 or 0 a question."""

    entry: Entry
    record: Record
    right: dict[str, Floats]

    @property
    def accuracy(self) -> float:
        """The mean over tasks of the share answered right."""
        return float(np.mean([answers.mean() for answers in self.right.values()]))

    @property
    def error(self) -> float:
        """The standard error of `accuracy` over questions."""
        shares = [(answers.mean(), len(answers)) for answers in self.right.values()]
        return math.sqrt(sum(share * (1 - share) / count for share, count in shares)) / len(shares)


def answered(records: Records, scale: Scale) -> list[Answered]:
    """Return every entry that has answered, the lowest loss first."""
    found = []
    for entry in entries(records, scale):
        record = records.get(entry.job)
        if record is not None and math.isfinite(record.loss):
            tables = record.results["tasks"]
            right = {task: np.array([float(one) for one in tables[task]["right"]]) for task in scale.tasks}
            found.append(Answered(entry, record, right))
    return sorted(found, key=lambda one: one.record.loss)


def resampled(found: Sequence[Answered]) -> dict[str, Floats]:
    """Return the accuracies by task, (RESAMPLES + 1, models): measured in row 0, then on questions drawn anew.

    All models answer the same questions, so a draw is one for all: differences keep what they share.
    """
    rng, tables = np.random.default_rng(0), dict[str, Floats]()
    for task in found[0].right:
        answers = np.stack([one.right[task] for one in found])
        count = answers.shape[1]
        # Counts are summed before they are divided: every sum is exact, so that equal accuracies are equal everywhere.
        draws = np.vstack([np.ones(count), rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)])
        tables[task] = draws @ answers.T / count
    return tables | {"mean": np.mean(list(tables.values()), axis=0)}


def rank_correlations(losses: Floats, accuracies: Floats) -> Floats:
    """Return Spearman's correlation of accuracy with minus the loss: losses (models,), accuracies (draws, models).

    Equal values share their mean rank; nan where all are equal.
    """
    from scipy.stats import rankdata

    ours, theirs = rankdata(-losses), rankdata(accuracies, axis=1)
    ours, theirs = ours - ours.mean(), theirs - theirs.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found: Floats = theirs @ ours / np.sqrt((theirs**2).sum(axis=1) * (ours**2).sum())
    return found


def _interval(draws: Floats) -> tuple[float, float] | None:
    if not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [0.05, 0.95])
    return float(low), float(high)


def report(records: Records, scale: Scale) -> Section:
    """Rank what has answered by its loss and by its answers."""
    title, question = "Downstream", "Does a lower loss answer more questions?"
    if not scale.tasks:
        note = 'This scale names no tasks; tasks = ["cloze", "next_passage"] in its file need no network.'
        return Section(title=title, question=question, notes=(note,))
    found = answered(records, scale)
    if len(found) < FEWEST:
        return Section(title=title, question=question, notes=(f"{len(found)} models have answered so far.",))
    reasons = heavy_weight_decay.missing(records, scale, scale.unique_tokens[0])
    draws = resampled(found)
    orders = _orders(found, draws)
    return Section(
        title=title,
        question=question,
        claims=(*_order_claims(orders, scale, reasons), *_gain_claims(found, draws["mean"], scale)),
        tables=(_order_table(orders), _table(found, scale)),
        figures=(_figure(found, scale),),
        notes=(
            "Intervals are over questions drawn anew, the same for all models; the models stay as they are. Chance is a "
            "quarter for questions of four choices.",
        ),
    )


@dataclass(frozen=True)
class Order:
    """How the answers of some models to one task (or the mean of all) follow their losses."""

    models: str
    number: int
    task: str
    correlation: float | None
    interval: tuple[float, float] | None


def _orders(found: list[Answered], draws: dict[str, Floats]) -> list[Order]:
    """Rank all models, those of tuned decay with members, and each kind, where there are enough for an order."""
    groups = {"all": tuple(KINDS), "tuned decay and members": ("tuned", "members")}
    groups |= {words: (kind,) for kind, words in KINDS.items()}
    losses = np.array([one.record.loss for one in found])
    orders = []
    for models, kinds in groups.items():
        chosen = [number for number, one in enumerate(found) if one.entry.kind in kinds]
        for task, accuracies in draws.items() if len(chosen) >= FEWEST else ():
            ranks = rank_correlations(losses[chosen], accuracies[:, chosen])
            measured = float(ranks[0]) if math.isfinite(ranks[0]) else None
            orders.append(Order(models, len(chosen), task, measured, _interval(ranks)))
    return orders


def _order_claims(orders: list[Order], scale: Scale, reasons: tuple[str, ...]) -> list[Claim]:
    return [
        Claim(
            text=f"D = {scale.unique_tokens[0]:,}: downstream accuracy follows the order of the loss over {order.number} "
            f"models and ensembles ({order.models})",
            value=f"rank correlation {order.correlation:.2f}",
            interval=order.interval,
            seeds=scale.seeds,
            holds=None if order.interval is None else order.interval[0] > 0,
            provisional=reasons,
        )
        for order in orders
        if order.task == "mean" and order.models in ("all", "tuned decay and members") and order.correlation is not None
    ]


GAINS = {
    "members": ("the ensemble with the lowest loss", "9.05 points (55.34 to 64.39%), section 10"),
    "student": ("the student with the lowest loss", "6.85 points (55.34 to 62.19%), section 10"),
}


def _gain_claims(found: list[Answered], draws: Floats, scale: Scale) -> list[Claim]:
    """The paper's two gains over the best standard model, in points of accuracy; paired over questions."""
    best: dict[str, int] = {}
    for number, one in enumerate(found):  # the lowest loss of its kind comes first
        best.setdefault(one.entry.kind, number)
    claims = []
    for kind, (words, paper) in GAINS.items():
        if "standard" not in best or kind not in best:
            continue
        base, ours = (100 * draws[:, best[which]] for which in ("standard", kind))
        interval = _interval(ours[1:] - base[1:])
        claims.append(
            Claim(
                text=f"D = {scale.unique_tokens[0]:,}: {words} ({found[best[kind]].entry.what}) answers more than the best "
                f"standard model ({found[best['standard']].entry.what})",
                value=f"{ours[0] - base[0]:+.2f} points ({base[0]:.2f} to {ours[0]:.2f}%)",
                interval=interval,
                paper=paper,
                holds=None if interval is None else interval[0] > 0,
                provisional=("one seed",),
            )
        )
    return claims


def _order_table(orders: list[Order]) -> Table:
    return Table(
        title="Rank correlation of accuracy with the loss (1: the lower the loss, the more answers are right)",
        columns=("models", "number", "task", "rank correlation", "low", "high"),
        rows=tuple(
            (order.models, order.number, order.task, order.correlation, *(order.interval or (None, None)))
            for order in orders
        ),
    )


def _table(found: list[Answered], scale: Scale) -> Table:
    asked = ", ".join(f"{len(answers):,} of {task}" for task, answers in found[0].right.items())
    return Table(
        title=f"Zero-shot accuracy in %, D = {scale.unique_tokens[0]:,} tokens, the lowest loss first (+-: standard "
        f"error over questions; {asked})",
        columns=("kind", "model", "loss", *scale.tasks, "mean"),
        rows=tuple(
            (
                KINDS[one.entry.kind],
                one.entry.what,
                one.record.loss,
                *(f"{100 * answers.mean():.1f}" for answers in one.right.values()),
                f"{100 * one.accuracy:.2f} +- {100 * one.error:.2f}",
            )
            for one in found
        ),
    )


def _figure(found: list[Answered], scale: Scale) -> Figure:
    def draw(axes: Any) -> None:
        for kind, words in KINDS.items():
            group = [one for one in found if one.entry.kind == kind]
            if group:
                low, high = ([100 * (one.accuracy + sign * one.error) for one in group] for sign in (-1, 1))
                losses, shares = [one.record.loss for one in group], [100 * one.accuracy for one in group]
                draw_series(axes, losses, shares, label=words, low=low, high=high, join=False)
        axes.set_xlabel("validation loss (nats per token)")
        axes.set_ylabel("accuracy, mean of tasks (%)")
        axes.legend()

    caption = f"Accuracy against loss at D = {scale.unique_tokens[0]:,}; bars are one standard error over questions."
    return Figure(name="accuracy-against-loss", caption=caption, draw=draw)
