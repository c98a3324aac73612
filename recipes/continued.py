"""Which of the recipes still pay when a model continues on a second text? (Spec section 11: continued pre-training on math.)

Claim: a small batch, then repeated text, then an ensemble each lower the loss on the new text; members that start from the
same weights can be averaged in their weights as well as in their logits; forgetting of the first text is measured.
Command: epochal run continued --scale micro
Results: recipes/results/<scale>/report.md
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from epochal.names import named_ensemble
from epochal.ranges import Batch, Decay, Epochs, Items, Ranged, Rate, Repeats, Tokens
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.sections import Section, Table
from epochal.run import Ensemble, Job, Run
from epochal.scale import Point, Scale
from epochal.study import Study
from recipes import heavy_weight_decay

STEPS = ("large batch, one pass", "small batch, one pass", "small batch, repeated")
AVERAGES = ("logits", "probs", "parameters")


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """Continued pre-training of the size `model` on a second data set.

    It starts from the tuned run of that size on the first budget, or from the model folder `base`.
    """

    data: str  # the second data set
    model: str
    unique_tokens: Tokens
    batch_sizes: Annotated[tuple[Batch, ...], Items(2, 2)]  # the default and the small one, in sequences
    epochs: Epochs  # of the repeated text
    lr: Rate
    wd: Decay
    members: Repeats
    # Budgets for further single passes of the default.
    more_tokens: Annotated[tuple[Tokens, ...], Items(least=0)] = ()
    base: str = ""  # path of a model folder

    def check(self, scale: Scale) -> None:
        """Refuse a base that is not a path, and a model outside of the ladder."""
        if self.base and "/" not in self.base:
            raise ValueError(f"base is {self.base!r}; give the path of a model folder, with a slash in it.")
        scale.check_models("model", self.model)


@dataclass(frozen=True)
class Continuation:
    """The runs of one campaign that continue from `base`, and how they are judged."""

    study: Study
    settings: Settings
    base: str

    def run(self, tokens: int, batch: int, epochs: int, seed: int = 0) -> Run:
        """Return one run that continues from the base; `seed` orders the data."""
        here = self.settings
        point = Point(lr=here.lr, epochs=epochs, wd=here.wd)
        changes = {"data": here.data, "batch_size": batch, "init_from": self.base}
        return self.study.scale.run(here.model, tokens, point, seed=seed, **changes)

    def steps(self) -> list[Run]:
        """Return the single models of `STEPS`."""
        (large, small), here = self.settings.batch_sizes, self.settings
        return [self.run(here.unique_tokens, *step) for step in ((large, 1), (small, 1), (small, here.epochs))]

    def members(self) -> list[Run]:
        """Return the members: the last step with other orders of the data, since all start from the same weights."""
        here = self.settings
        return [self.run(here.unique_tokens, here.batch_sizes[1], here.epochs, seed) for seed in range(here.members)]

    def full_passes(self) -> list[Run]:
        """Return the default recipe, one pass with the large batch, over more tokens: what the gain is worth in text."""
        return [self.run(tokens, self.settings.batch_sizes[0], 1) for tokens in self.settings.more_tokens]

    def ensembles(self, data: str | None = None) -> list[Ensemble]:
        """Return the ensembles of all members, one for each average; `data` names another text to judge them on."""
        names = tuple(run.name for run in self.members())
        return [named_ensemble(names, average, data=data) for average in AVERAGES]

    def on_first_text(self) -> list[Ensemble]:
        """Return the steps, as ensembles of one, and the ensembles, judged on the first text; none for another's base."""
        if self.settings.base:
            return []
        first = self.study.scale.data
        return [*(named_ensemble((run.name,), "logits", data=first) for run in self.steps()), *self.ensembles(first)]


# --- the runs ---------------------------------------------------------------------------------------------------------


def continuation(study: Study) -> Continuation | None:
    """Return the runs that continue; None without a table, or before the base is tuned."""
    settings = study.settings(Settings)
    if settings is None:
        return None
    if settings.base:
        return Continuation(study, settings, settings.base)
    tuned = heavy_weight_decay.best(study, settings.model, study.scale.unique_tokens[0])
    # Only once tuned: another base would change every run.
    return Continuation(study, settings, tuned.runs[0].name) if tuned.settled else None


def plan(study: Study) -> list[Job]:
    """Return the search of the base, then all runs, and the ensembles on both texts."""
    settings, here = study.settings(Settings), continuation(study)
    if settings is None:
        return []
    jobs: list[Job] = [] if settings.base else heavy_weight_decay.plan(study)
    if here is not None:
        jobs += [*here.steps(), *here.members(), *here.full_passes(), *here.ensembles(), *here.on_first_text()]
    return jobs


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Report what each step gains on the second text and costs on the first."""
    title, question = "Continued pre-training", "Which recipes still pay when a model continues on a second text?"
    here = continuation(study)
    if here is None:
        why = "Waits for the tuned base." if study.settings(Settings) else "This scale has no table [continued]."
        return Section(title=title, question=question, notes=(why,))
    rows = _rows(here)
    return Section(
        title=title,
        question=question,
        claims=(*_step_claims(here), *_ensemble_claims(here)),
        tables=(_table(here, rows),) if rows else (),
    )


Row = tuple[str, Record, Record | None]


def _rows(here: Continuation) -> list[Row]:
    """Return every finished step: its name, its record on the second text, its record on the first."""
    jobs: list[Run | Ensemble] = [*here.steps(), *here.ensembles()]
    names = (*STEPS, *(f"{here.settings.members} members, mean {average}" for average in AVERAGES))
    get = here.study.records.get
    # A base from elsewhere was trained on another text, so forgetting cannot be measured.
    back = [get(job) for job in here.on_first_text()] or [None] * len(jobs)
    rows = [(what, get(job), first) for what, job, first in zip(names, jobs, back, strict=True)]
    return [(what, record, first) for what, record, first in rows if record is not None]


def _table(here: Continuation, rows: list[Row]) -> Table:
    first = here.study.scale.data
    return Table(
        title=f"Continued on {here.settings.data} with {here.settings.unique_tokens:,} tokens (loss on {first}: forgetting)",
        columns=("step", "loss", "test loss", f"loss on {first}"),
        rows=tuple((what, r.loss, r.results.get("test_loss"), back.loss if back else None) for what, r, back in rows),
    )


STEP_CLAIMS = {
    "small-batch": "30.59 to 34.48% accuracy, section 11",
    "repeated": "34.48 to 35.82% accuracy, section 11",
}


def _step_claims(here: Continuation) -> list[Claim]:
    losses = [math.inf if (loss := here.study.loss(run)) is None else loss for run in here.steps()]
    return [
        Claim(
            id=f"continued.{key}",
            text=f"continued: {later} beats {earlier}",
            value=f"{before - after:+.4f} nats",
            holds=after < before,
            paper=paper,
            provisional=("one seed",),
        )
        for (earlier, later), (before, after), (key, paper) in zip(
            pairwise(STEPS), pairwise(losses), STEP_CLAIMS.items(), strict=True
        )
        if math.isfinite(before) and math.isfinite(after)
    ]


def _ensemble_claims(here: Continuation) -> list[Claim]:
    count = here.settings.members
    single = [loss for run in here.members() if (loss := here.study.loss(run)) is not None]
    losses = {job.average: loss for job in here.ensembles() if (loss := here.study.loss(job)) is not None}
    if len(single) < count or len(losses) < len(AVERAGES):
        return []
    mean, logits, soup = sum(single) / len(single), losses["logits"], losses["parameters"]
    claims = [
        Claim(
            id="continued.ensemble",
            text=f"continued: {count} members (logits) beat one of them",
            value=f"{mean - logits:+.4f} nats",
            seeds=count,
            holds=logits < mean,
            paper="35.82 to 40.58% accuracy with 8, section 11",
        ),
        Claim(
            id="continued.soup",
            text="continued: members from the same weights average as well in their weights as in their logits",
            value=f"{logits - soup:+.4f} nats",
            seeds=count,
            holds=soup <= logits,
            paper="weights slightly better, section 11",
            provisional=("one set of members",),
        ),
    ]
    return [*claims, *_worth_claim(here, logits)]


def _worth_claim(here: Continuation, reached: float) -> list[Claim]:
    """Report how much text the default recipe needs for the ensemble's loss."""
    # A lower bound, as the paper's 17.5x: the largest budget whose single pass is still worse.
    passes, tokens = here.full_passes(), here.settings.unique_tokens
    losses = {run.unique_tokens: loss for run in passes if (loss := here.study.loss(run)) is not None}
    if not losses or len(losses) < len(passes):
        return []
    most = max((budget for budget, loss in losses.items() if loss > reached), default=tokens)
    return [
        Claim(
            id="continued.worth",
            text=f"continued: {here.settings.members} members on {tokens:,} tokens beat one pass of the default over {most:,}",
            value=f"{most / tokens:.1f}x",
            holds=most > tokens,
            paper="17.5x, section 11",
            provisional=("one seed", *(("the largest pass that was run",) if most == max(losses) else ())),
        )
    ]
