"""Which of the recipes still pay when a model continues on a second text? (Spec section 11: continued pre-training on math.)

Claim: a small batch, then repeated text, then an ensemble each lower the loss on the new text; members that start from the
same weights can be averaged in their weights as well as in their logits; forgetting of the first text is measured.
Command: epochal run continued --scale micro
Results: recipes/results/<scale>/report.md
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from epochal.names import named_ensemble
from epochal.ranges import Batch, Decay, Epochs, Items, LessThanAll, Ranged, Rate, Repeats, SomeShare, Tokens
from epochal.report.claims import Claim
from epochal.report.comparison import (
    ArmLosses,
    Pair,
    difference_claim,
    gains_by_seed,
    long_enough,
    members_gain,
    pair_claims,
)
from epochal.report.sections import Section, Table
from epochal.run import SOUP, Anchor, Ensemble, Job, Run, SoftTargetDistillation, Strength
from epochal.scale import Point, Scale
from epochal.study import Study
from recipes import heavy_weight_decay

STEPS = ("large batch, one pass", "small batch, one pass", "small batch, repeated")
AVERAGES = ("logits", "probs", SOUP)
# Arms against forgetting, by their field of the settings.
AGAINST = {"l2": "L2 to the start", "ewc": "EWC", "prediction": "distillation from the base", "replay": "replay"}


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
    # Every step takes the one with the lowest loss, found with its first seed.
    lr: Annotated[tuple[Rate, ...], Items()]
    wd: Decay
    members: Repeats
    # Budgets for further single passes of the default.
    more_tokens: Annotated[tuple[Tokens, ...], Items(least=0)] = ()
    base: str = ""  # path of a model folder
    # Against forgetting, next to the last of `STEPS`: an arm for each that has values for its knob. Each takes the value with
    # the lowest sum of the losses on both texts, found with its first seed.
    l2: Annotated[tuple[Strength, ...], Items(least=0)] = ()  # strengths of the pull to the start
    ewc: Annotated[tuple[Strength, ...], Items(least=0)] = ()  # the same in proportion to the Fisher information
    prediction: Annotated[
        tuple[SomeShare, ...], Items(least=0)
    ] = ()  # weights of the base's soft targets on the new text
    replay: Annotated[tuple[LessThanAll, ...], Items(least=0)] = ()  # shares of the first text

    def check(self, scale: Scale) -> None:
        """Refuse a base that cannot be used, and a model outside of the ladder."""
        if self.base and "/" not in self.base:
            raise ValueError(f"base is {self.base!r}; give the path of a model folder, with a slash in it.")
        if self.base and self.knobs:
            raise ValueError(
                f"{', '.join(self.knobs)} work against forgetting of the first text, which base {self.base!r} comes without; "
                "leave them out, or leave out base."
            )
        scale.check_models("model", self.model)

    @property
    def knobs(self) -> dict[str, tuple[float, ...]]:
        """The arms against forgetting, and the values of their knobs."""
        return {kind: values for kind in AGAINST if (values := getattr(self, kind))}


@dataclass(frozen=True)
class Continuation:
    """The runs of one campaign that continue from `base`, and how they are judged."""

    study: Study
    settings: Settings
    base: str

    def run(self, tokens: int, batch: int, epochs: int, lr: float, seed: int = 0, **more: Any) -> Run:
        """Return one run that continues from the base; `seed` orders the data, `more` are fields of the Run."""
        here = self.settings
        point = Point(lr=lr, epochs=epochs, wd=here.wd)
        # Sequences, not documents: few long documents have few orders, and members must see different ones.
        changes = {"data": here.data, "batch_size": batch, "init_from": self.base, "data_order": "sequences", **more}
        return self.study.scale.run(here.model, tokens, point, seed=seed, **changes)

    def tries(self, step: str) -> list[Run]:
        """Return the first seed of one of `STEPS` at every learning rate."""
        (large, small), here = self.settings.batch_sizes, self.settings
        batch, epochs = {STEPS[0]: (large, 1), STEPS[1]: (small, 1), STEPS[2]: (small, here.epochs)}[step]
        return [self.run(here.unique_tokens, batch, epochs, lr) for lr in here.lr]

    def seeds(self, step: str, count: int) -> list[Run]:
        """Return `count` orders of the data at the best learning rate of one step; none before all have been tried."""
        tries = self.tries(step)
        losses = {run: loss for run in tries if (loss := self.study.loss(run)) is not None}
        if len(tries) > 1 and len(losses) < len(tries):
            return []
        best = min(tries, key=lambda run: (losses.get(run, math.inf), run.optimizer.lr))
        setting = (best.unique_tokens, best.batch_size, best.epochs, best.optimizer.lr)
        return [self.run(*setting, seed) for seed in range(count)]

    def steps(self) -> dict[str, list[Run]]:
        """Return the single models of `STEPS`, one for each seed of the scale."""
        return {step: self.seeds(step, self.study.scale.seeds) for step in STEPS}

    def members(self) -> list[Run]:
        """Return the members: the last step with other orders of the data, since all start from the same weights."""
        return self.seeds(STEPS[-1], self.settings.members)

    def full_passes(self) -> list[Run]:
        """Return the default recipe, one pass with the large batch, over more tokens: what the gain is worth in text."""
        first = self.seeds(STEPS[0], 1)
        return [self.run(d, run.batch_size, 1, run.optimizer.lr) for d in self.settings.more_tokens for run in first]

    def ensembles(self, data: str | None = None) -> list[Ensemble]:
        """Return the ensembles of all members, one for each average; `data` names another text to judge them on."""
        names = tuple(run.name for run in self.members())
        return [named_ensemble(names, average, data=data) for average in AVERAGES] if names else []

    def on_first_text(self, step: str) -> list[Ensemble]:
        """Return the models of one step, to judge them on the first text; none for a base from elsewhere."""
        return [] if self.settings.base else [self.again(run) for run in self.steps()[step]]

    def again(self, run: Run) -> Ensemble:
        """Return a run as an ensemble of one, to judge it on the first text."""
        return named_ensemble((run.name,), "logits", data=self.study.scale.data)

    # --- against forgetting ---

    def change(self, kind: str, value: float) -> dict[str, Any]:
        """Return the fields of the Run that one value of a knob sets."""
        match kind:
            case "replay":
                return {"replay": value}
            case "prediction":
                return {"teach": SoftTargetDistillation(source=self.base, kd_weight=value)}
            case _:
                return {"anchor": Anchor(strength=value, fisher=kind == "ewc")}

    def protected(self, kind: str, value: float, count: int) -> list[Run]:
        """Return `count` seeds of the last step with an arm against forgetting; none before its learning rate is known."""
        change = self.change(kind, value)
        return [
            self.run(run.unique_tokens, run.batch_size, run.epochs, run.optimizer.lr, seed, **change)
            for seed, run in enumerate(self.seeds(STEPS[-1], count))
        ]

    def both_losses(self, run: Run) -> float | None:
        """Return the sum of a run's losses on both texts; None before both are known."""
        one, other = self.study.loss(run), self.study.loss(self.again(run))
        return None if one is None or other is None else one + other

    def knob(self, kind: str) -> float | None:
        """Return the value of a knob with the lowest sum of both losses; None before all were tried."""
        sums = {
            value: total
            for value in self.settings.knobs[kind]
            for run in self.protected(kind, value, 1)
            if (total := self.both_losses(run)) is not None
        }
        return min(sums, key=lambda value: sums[value]) if len(sums) == len(self.settings.knobs[kind]) else None

    def best_protected(self, kind: str) -> list[Run]:
        """Return all seeds of an arm at the best value of its knob; none before that is known."""
        value = self.knob(kind)
        return [] if value is None else self.protected(kind, value, self.study.scale.seeds)

    def against_forgetting(self) -> list[Run]:
        """Return the runs of all arms against forgetting: every value of a knob, then the seeds of the best."""
        tried = [
            run for kind, values in self.settings.knobs.items() for v in values for run in self.protected(kind, v, 1)
        ]
        return [*tried, *(run for kind in self.settings.knobs for run in self.best_protected(kind))]


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
        jobs += [run for step in STEPS for run in (*here.tries(step), *here.steps()[step])]
        jobs += [*here.members(), *here.full_passes(), *here.ensembles()]
        jobs += [] if settings.base else here.ensembles(study.scale.data)
        jobs += [job for step in STEPS for job in here.on_first_text(step)]
        jobs += [job for run in here.against_forgetting() for job in (run, here.again(run))]
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
        claims=(*_step_claims(here), *_forgetting_claim(here), *_against_claims(here), *_ensemble_claims(here)),
        tables=(*((_table(here, rows),) if rows else ()), *_against_table(here)),
    )


# A step or an average: what, optimizer steps, learning rate, losses on the second text, on its test split, on the first text.
Row = tuple[str, int | None, float | None, list[float], list[float], list[float]]


def _rows(here: Continuation) -> list[Row]:
    get, first = here.study.records.get, here.study.scale.data
    found = list[Row]()
    for step in STEPS:
        runs = here.steps()[step]
        records = [record for run in runs if (record := get(run)) is not None and math.isfinite(record.loss)]
        # A base from elsewhere was trained on another text, so forgetting cannot be measured.
        back = [record.test_loss for job in here.on_first_text(step) if (record := get(job)) is not None]
        if records:
            tests = [record.results["test_loss"] for record in records if "test_loss" in record.results]
            setting = (runs[0].steps, runs[0].optimizer.lr)
            found.append((step, *setting, [record.loss for record in records], tests, back))
    for job, again in zip(here.ensembles(), [] if here.settings.base else here.ensembles(first), strict=False):
        record, back_record = get(job), get(again)
        if record is not None:
            what = f"{here.settings.members} members, mean {job.average}"
            tests = [record.results["test_loss"]] if "test_loss" in record.results else []
            found.append((what, None, None, [record.loss], tests, [back_record.test_loss] if back_record else []))
    return found


def _table(here: Continuation, rows: list[Row]) -> Table:
    first = here.study.scale.data
    return Table(
        title=f"Continued on {here.settings.data} with {here.settings.unique_tokens:,} tokens (test loss on {first}: forgetting; "
        "means over seeds)",
        columns=("step", "steps", "lr", "validation loss", "test loss", f"test loss on {first}", "seeds"),
        rows=tuple(
            (what, steps, lr, *(statistics.fmean(one) if one else None for one in losses), len(losses[0]))
            for what, steps, lr, *losses in rows
        ),
    )


STEP_CLAIMS = {
    "small-batch": "30.59 to 34.48% accuracy, section 11",
    "repeated": "34.48 to 35.82% accuracy, section 11",
}


def _losses(here: Continuation, step: str) -> dict[int, float]:
    return {seed: r.test_loss for seed, r in here.study.finite(dict(enumerate(here.steps()[step]))).items()}


def _step_claims(here: Continuation) -> list[Claim]:
    claims = []
    for (earlier, later), (key, paper) in zip(pairwise(STEPS), STEP_CLAIMS.items(), strict=True):
        # Paired by seed: runs of one seed start from the same weights.
        gains = list(gains_by_seed(_losses(here, later), _losses(here, earlier)).values())
        if gains:
            text, runs = f"continued: {later} beats {earlier}", [*here.steps()[earlier], *here.steps()[later]]
            claims.append(long_enough(difference_claim(text, gains, id=f"continued.{key}", paper=paper), runs))
    return claims


def _forgetting_claim(here: Continuation) -> list[Claim]:
    """Report what the last step costs on the first text."""
    base, get = here.study.records.named(here.base), here.study.records.get
    rises = [
        record.test_loss - base.test_loss for job in here.on_first_text(STEPS[-1]) if base and (record := get(job))
    ]
    text = f"continued: {STEPS[-1]} raises the loss on {here.study.scale.data}, the first text"
    return [difference_claim(text, rises, id="continued.forgetting")] if rises else []


def _arms_against(here: Continuation) -> dict[str, tuple[float | None, list[Run]]]:
    """Return the value of the knob and the seeds of each arm by label.

    The last of `STEPS` without an arm comes first.
    """
    arms: dict[str, tuple[float | None, list[Run]]] = {STEPS[-1]: (None, here.steps()[STEPS[-1]])}
    arms |= {AGAINST[kind]: (here.knob(kind), here.best_protected(kind)) for kind in here.settings.knobs}
    return arms


def _on_both(here: Continuation, runs: list[Run]) -> tuple[Mapping[int, float], Mapping[int, float]]:
    """Return the losses by seed on the second and on the first text.

    Seeds without both are left out.
    """
    new = here.study.finite(dict(enumerate(runs)))
    old = here.study.finite({seed: here.again(run) for seed, run in enumerate(runs)})
    both = sorted(new.keys() & old.keys())
    return {seed: new[seed].test_loss for seed in both}, {seed: old[seed].test_loss for seed in both}


def _against_table(here: Continuation) -> list[Table]:
    first, rows = here.study.scale.data, []
    for label, (value, runs) in _arms_against(here).items() if here.settings.knobs else ():
        new, old = _on_both(here, runs)
        if new:
            means = statistics.fmean(new.values()), statistics.fmean(old.values())
            rows.append((label, value, runs[0].steps, *means, sum(means), len(new)))
    columns = ("arm", "knob", "steps", f"loss on {here.settings.data}", f"loss on {first}", "sum", "seeds")
    title = f"Against forgetting of {first} (means over seeds; replay has more steps, so that it sees as much new text)"
    return [Table(title=title, columns=columns, rows=tuple(rows))] if rows else []


def _against_claims(here: Continuation) -> list[Claim]:
    """Claim that each arm forgets less, and that both losses together are lower."""
    arms, claims = _arms_against(here), list[Claim]()
    both = {label: _on_both(here, runs) for label, (_, runs) in arms.items()}
    first = [ArmLosses(label=label, losses=old) for label, (_, old) in both.items()]
    sums = [
        ArmLosses(label=label, losses={seed: new[seed] + old[seed] for seed in new})
        for label, (new, old) in both.items()
    ]
    for kind in here.settings.knobs:
        label, plain = AGAINST[kind], STEPS[-1]
        kept = f"{label} has a lower loss on {here.study.scale.data}, the first text, than {plain} alone"
        worth = f"{label} lowers the sum of the losses on both texts"
        pairs = [(first, kept, "keeps"), (sums, worth, "both")]
        for losses, text, what in pairs:
            pair = Pair(better=label, worse=plain, id=f"continued.{kind}-{what}", text=text)
            runs = [*arms[plain][1], *arms[label][1]]
            claims += [
                long_enough(claim, runs) for claim in pair_claims(losses, [pair], condition="continued", selecting=0)
            ]
    return claims


def _ensemble_claims(here: Continuation) -> list[Claim]:
    count = here.settings.members
    single = [loss for run in here.members() if (loss := here.study.loss(run)) is not None]
    records = {job.average: record for job in here.ensembles() if (record := here.study.records.get(job)) is not None}
    if len(single) < count or len(records) < len(AVERAGES):
        return []
    logits, soup = records["logits"], records[SOUP]
    return [
        members_gain(
            f"continued: {count} members (logits) beat one of them",
            logits,
            id="continued.ensemble",
            paper="35.82 to 40.58% accuracy with 8, section 11",
        ),
        Claim(
            id="continued.soup",
            text="continued: members from the same weights average as well in their weights as in their logits",
            value=f"{logits.test_loss - soup.test_loss:+.4f} nats",
            seeds=count,
            holds=soup.test_loss <= logits.test_loss,
            paper="weights slightly better, section 11",
            provisional=("one set of members",),
        ),
        *_worth_claim(here, logits.test_loss),
    ]


def _worth_claim(here: Continuation, reached: float) -> list[Claim]:
    """Report how much text the default recipe needs for the ensemble's loss."""
    # A lower bound, as the paper's 17.5x: the largest budget whose single pass is still worse.
    passes, tokens = here.full_passes(), here.settings.unique_tokens
    losses = {run.unique_tokens: loss for run in passes if (loss := here.study.test_loss(run)) is not None}
    if not losses or len(losses) < len(passes):
        return []
    most = max((budget for budget, loss in losses.items() if loss > reached), default=tokens)
    claim = Claim(
        id="continued.worth",
        text=f"continued: {here.settings.members} members on {tokens:,} tokens beat one pass of the default over {most:,}",
        value=f"{most / tokens:.1f}x",
        holds=most > tokens,
        sizes=(most / tokens, 17.5),
        paper="17.5x, section 11",
        provisional=("the largest pass that was run",) if most == max(losses) else (),
    )
    return [long_enough(claim, [*here.steps()[STEPS[0]], *passes])]
