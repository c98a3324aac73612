"""Does lower loss improve zero-shot accuracy? (Spec section 10.)

Claim: zero-shot accuracy on multiple-choice tasks follows the loss over single models, ensembles and students; the best
ensemble and its student answer more than the best standard model.
Command: epochal run downstream --scale micro
Results: recipes/results/<scale>/report.md

Accuracy is raw, not divided by the length of a choice, and the headline is the mean over tasks; ensembles answer with
averaged logits. Models are chosen by their validation loss, never by their answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from epochal.names import named_ensemble
from epochal.ranges import Items, Ranged
from epochal.records import Record
from epochal.report.claims import Case, Claim
from epochal.report.comparison import family_claim
from epochal.report.figures import draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Ensemble, Job, Run
from epochal.search.searches import Search
from epochal.study import Study
from recipes import distillation, ensembling, epoching, heavy_weight_decay

KINDS = {"standard": "standard decay", "tuned": "tuned decay", "members": "members together", "student": "students"}
# Draws of the questions behind an interval.
RESAMPLES = 2000
# Degrees of freedom of a mean over thousands of questions, which is normal.
LARGE = 1e6
# Models below which an order says nothing.
FEWEST = 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """`tasks` are names of lm-eval's tasks; cloze and next_passage are made from the test split and need no network."""

    tasks: Annotated[tuple[str, ...], Items(least=0)]


def tasks(study: Study) -> tuple[str, ...]:
    """Return the tasks of the scale; none without a table."""
    settings = study.settings(Settings)
    return settings.tasks if settings else ()


def plan(study: Study) -> list[Job]:
    """Return what the other recipes run, and the answers of their models."""
    if not tasks(study):
        return []
    return [*distillation.plan(study), *(entry.job for entry in entries(study))]


def searches(study: Study) -> list[Search]:
    """Return the searches that this recipe waits for."""
    return distillation.searches(study) if tasks(study) else []


@dataclass(frozen=True)
class Entry:
    """Models that answer as one: of which kind and size, in words, and the job."""

    kind: str
    what: str
    job: Ensemble
    model: str


def entries(study: Study) -> list[Entry]:
    """Return what answers: single models, K members for every K, students."""
    tokens, found = study.scale.unique_tokens[0], list[Entry]()
    for model in study.scale.models:
        standard = study.best(epoching.standard(study), model, tokens)
        if standard.settled:
            found.append(_entry(study, "standard", model, standard.runs[:1]))
        tuned = heavy_weight_decay.best(study, model, tokens)
        for run in tuned.runs if tuned.settled else ():
            found.append(_entry(study, "tuned", f"{model}, seed {run.init_seed}", (run,)))
    for model in ensembling.settings(study).models:
        members = ensembling.members(study, model, tokens)
        found += [_entry(study, "members", f"{k} x {model}", members[:k]) for k in range(1, len(members) + 1)]
    for teacher, what in (("ensemble", "the ensemble"), ("self", "one member")):
        # Before every decay is tried the best one may change, and no recipe plans the seeds of the others.
        seeds = distillation.students(study, teacher) if distillation.tuned(study, teacher) else {}
        for seed, run in seeds.items():
            found.append(_entry(study, "student", f"{run.model} of {what}, seed {seed}", (run,)))
    # A tuned run may also be the standard one; it is listed once, under its first kind.
    unique = {entry.job.name: entry for entry in reversed(found)}
    return [entry for entry in found if unique[entry.job.name] is entry]


def _entry(study: Study, kind: str, what: str, runs: tuple[Run, ...]) -> Entry:
    """Return the ensemble of `runs` that answers the scale's tasks; one run is an ensemble of one."""
    job = named_ensemble(tuple(run.name for run in runs), "logits", tasks=tasks(study))
    return Entry(kind, what, job, runs[0].model)


# --- answers, and resampled questions ---------------------------------------------------------------------------------


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


def answered(study: Study) -> list[Answered]:
    """Return every entry that has answered, the lowest loss first."""
    found = []
    for entry in entries(study):
        record = study.records.get(entry.job)
        if record is not None and math.isfinite(record.loss):
            tables = record.results["tasks"]
            right = {task: np.array([float(one) for one in tables[task]["right"]]) for task in tasks(study)}
            found.append(Answered(entry, record, right))
    return sorted(found, key=lambda one: one.record.loss)


def resampled(found: Sequence[Answered]) -> dict[str, Floats]:
    """Return the accuracies by task, (RESAMPLES + 1, models): measured in row 0, then on resampled questions.

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


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Rank what has answered by its loss and by its answers."""
    title, question = "Downstream", "Does lower loss improve zero-shot accuracy?"
    if not tasks(study):
        note = 'This scale has no table [downstream]; tasks = ["cloze", "next_passage"] need no network.'
        return Section(title=title, question=question, notes=(note,))
    found, tokens = answered(study), study.scale.unique_tokens[0]
    if len(found) < FEWEST:
        return Section(title=title, question=question, notes=(f"{len(found)} models have answered so far.",))
    caveats = heavy_weight_decay.missing(study, tokens)
    draws = resampled(found)
    orders, gains = _orders(found, draws), _gain_claims(found, draws["mean"], tokens, caveats)
    return Section(
        title=title,
        question=question,
        claims=(*_order_claims(orders, study, caveats), *_size_claim(study, found, draws["mean"]), *gains),
        tables=(_order_table(orders), _table(found, tokens)),
        figures=(_figure(found, tokens),),
        notes=(
            "Intervals are over resampled questions, the same for all models; the models stay as they are. Chance is a "
            "quarter for questions of four choices.",
            *_chance_notes(found),
        ),
    )


@dataclass(frozen=True)
class Order:
    """How well the answers of some models to one task follow their losses."""

    models: str  # which
    number: int  # how many
    task: str  # or "mean"
    correlation: float | None  # rank correlation of accuracy with minus the loss
    interval: tuple[float, float] | None


def _orders(found: list[Answered], draws: dict[str, Floats]) -> list[Order]:
    """Rank all models, the single ones that learned from text alone, and each kind."""
    # Groups of fewer than FEWEST models are left out. Members of one size are nested, so they are no independent models.
    groups = {"all": tuple(KINDS), SINGLE: ("standard", "tuned")}
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


SINGLE = "single models, no students"
ORDER_IDS = {"all": "all", SINGLE: "single"}


def _order_claims(orders: list[Order], study: Study, caveats: tuple[str, ...]) -> list[Claim]:
    return [
        Claim(
            id=f"downstream.order.{ORDER_IDS[order.models]}",
            text=f"D = {study.scale.unique_tokens[0]:,}: downstream accuracy follows the order of the loss over {order.number} "
            f"models and ensembles ({order.models})",
            value=f"rank correlation {order.correlation:.2f}",
            interval=order.interval,
            seeds=study.scale.seeds,
            holds=None if order.interval is None else order.interval[0] > 0,
            provisional=(*caveats, *(("members of one size are nested",) if order.models == "all" else ())),
        )
        for order in orders
        if order.task == "mean" and order.models in ORDER_IDS and order.correlation is not None
    ]


GAINS = {
    "members": ("the ensemble with the lowest loss", 9.05, "9.05 points (55.34 to 64.39%), section 10"),
    "student": ("the student with the lowest loss", 6.85, "6.85 points (55.34 to 62.19%), section 10"),
}


def _gain_claims(found: list[Answered], draws: Floats, tokens: int, caveats: tuple[str, ...]) -> list[Claim]:
    """The paper's two gains over the best standard model, in points of accuracy; paired over questions."""
    best: dict[str, int] = {}
    for number, one in enumerate(found):  # the lowest loss of its kind comes first
        best.setdefault(one.entry.kind, number)
    standard = [number for number, one in enumerate(found) if one.entry.kind == "standard"]
    if not standard:
        return []
    # The baseline is the standard model with the most right answers, as the paper's: the comparison is against it.
    base = max(standard, key=lambda number: found[number].accuracy)
    claims = []
    for kind, (words, effect, paper) in GAINS.items():
        if kind not in best:
            continue
        before, after = (100 * draws[:, which] for which in (base, best[kind]))
        interval = _interval(after[1:] - before[1:])
        claims.append(
            Claim(
                id=f"downstream.gain.{kind}",
                text=f"D = {tokens:,}: {words} ({found[best[kind]].entry.what}) answers more than the standard model with the "
                f"most right answers ({found[base].entry.what})",
                value=f"{after[0] - before[0]:+.2f} points ({before[0]:.2f} to {after[0]:.2f}%)",
                interval=interval,
                paper=paper,
                sizes=(float(after[0] - before[0]), effect),
                holds=None if interval is None else interval[0] > 0,
                provisional=(*caveats, "one seed"),
            )
        )
    return claims


def _size_claim(study: Study, found: list[Answered], draws: Floats) -> list[Claim]:
    """Does tuned decay answer more than standard decay at every size? Paired over questions."""
    cases = list[Case]()
    for model in study.scale.models:
        groups = {
            kind: [n for n, one in enumerate(found) if one.entry.kind == kind and one.entry.model == model]
            for kind in ("standard", "tuned")
        }
        if all(groups.values()):
            before, after = (100 * draws[:, numbers].mean(axis=1) for numbers in groups.values())
            gain, spread = float(after[0] - before[0]), float(np.std(after[1:] - before[1:]))
            interval = _interval(after[1:] - before[1:])
            cases.append(Case(model, gain, interval, gain / spread if spread else None, dof=LARGE))
    if not cases:
        return []
    return [
        family_claim(
            "tuned decay answers more than standard decay at every size",
            cases,
            [case.value > 0 for case in cases],
            id="downstream.tuned",
            unit="points",
            paper="3.05 points (55.34 to 58.39%), section 10",
            sizes=(cases[-1].value, 3.05),
            seeds=1,  # of standard decay
            provisional=("one seed of standard decay",),
        )
    ]


def _chance_notes(found: list[Answered]) -> list[str]:
    """Name the tasks that no model answers better than by chance."""
    notes = []
    for task, answers in found[0].right.items():
        mean, error = float(np.mean([one.right[task].mean() for one in found])), math.sqrt(3 / 16 / len(answers))
        if abs(mean - 0.25) < 2 * error:
            notes.append(
                f"{task}: {100 * mean:.1f}% right on average is chance, so half of the mean over tasks is noise."
            )
    return notes


def _order_table(orders: list[Order]) -> Table:
    return Table(
        title="Rank correlation of accuracy with the loss (1: the lower the loss, the more answers are right)",
        columns=("models", "number", "task", "rank correlation", "low", "high"),
        rows=tuple(
            (order.models, order.number, order.task, order.correlation, *(order.interval or (None, None)))
            for order in orders
        ),
    )


def _table(found: list[Answered], tokens: int) -> Table:
    asked = ", ".join(f"{len(answers):,} of {task}" for task, answers in found[0].right.items())
    return Table(
        title=f"Zero-shot accuracy in %, D = {tokens:,} tokens, the lowest loss first (+-: standard "
        f"error over questions; {asked})",
        columns=("kind", "model", "loss", *found[0].right, "mean"),
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


def _figure(found: list[Answered], tokens: int) -> Figure:
    def draw(axes: Any) -> None:
        for kind, words in KINDS.items():
            group = [one for one in found if one.entry.kind == kind]
            if group:
                low, high = ([100 * (one.accuracy + sign * one.error) for one in group] for sign in (-1, 1))
                losses, shares = [one.record.loss for one in group], [100 * one.accuracy for one in group]
                draw_series(axes, losses, shares, label=words, low=low, high=high, join=False)
        axes.set_xlabel("validation loss (nats per token)")
        axes.set_ylabel("accuracy, mean of tasks (%)")

    caption = f"Accuracy against loss at D = {tokens:,}; bars are one standard error over questions."
    return Figure(name="accuracy-against-loss", caption=caption, draw=draw)
