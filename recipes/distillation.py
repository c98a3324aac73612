"""How much of an ensemble's gain can one small student keep? (Spec section 9.)

Claim: a fresh model that learns from the real text and from text sampled from the members of an ensemble (or from one
model of its own size) beats the best single model of its size, and keeps most of the ensemble's gain. Beside it, at equal
student cost: text of the averaged model, soft targets online and cached; and students of several sizes.
Command: epochal run distillation --scale demo
Found: recipes/results/<scale>/report.md
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_bars
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job, Run, Samples
from epochal.scale import Scale
from epochal.scaling import seed_interval
from epochal.search.searches import Search
from recipes import _students, ensembling, epoching, heavy_weight_decay

TEACHERS = ("ensemble", "self")


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the ensembles, text sampled from them and from one member, and students."""
    found = ensembling.jobs(records, scale)
    for teacher in TEACHERS:
        for seed in range(scale.seeds):
            found += student(records, scale, teacher, seed)
    return list({job.name: job for job in found}.values()) + _students.jobs(records, scale)


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return the searches that this recipe waits for: what `epochal plan` shows."""
    return ensembling.searches(records, scale)


def student(records: Records, scale: Scale, teacher: str, seed: int = 0) -> list[Job]:
    """Return the Samples of a teacher and a student that learns from them; nothing before the teacher is known.

    "ensemble": the members of the best ensemble one by one; "self": the first member of the student's own size alone.
    Students of all seeds read the same sampled text.
    """
    tokens, settings = scale.unique_tokens[0], scale.students
    if teacher == "ensemble":
        teachers = ensembling.best_ensembles(records, scale, tokens)
    else:
        teachers = ensembling.ensembles(records, scale, settings.model, tokens)
    if not teachers:
        return []
    source = teachers[0].name if teacher == "ensemble" else teachers[0].runs[0]
    samples = Samples(
        name=f"text-{teacher}-{source}", source=source, tokens=settings.pool_tokens, max_length=settings.max_length
    )
    name = f"student-{teacher}-{settings.model}" + (f"-s{seed}" if seed else "")
    return [samples, scale.student(settings.model, tokens, samples.name, name=name, seed=seed)]


def student_records(records: Records, scale: Scale, teacher: str) -> list[Record]:
    """Return the finite records of one teacher's students, one for each seed that has run."""
    runs = [
        job for seed in range(scale.seeds) for job in student(records, scale, teacher, seed) if isinstance(job, Run)
    ]
    return [record for run in runs if (record := records.get(run)) is not None and math.isfinite(record.loss)]


def report(records: Records, scale: Scale) -> Section:
    """Compare students with the best single model of their size and with their teachers."""
    tokens, size = scale.unique_tokens[0], scale.students.model
    own = heavy_weight_decay.best_records(records, scale, size, tokens)
    single = sum(record.loss for record in own) / len(own) if own else math.inf
    ensemble = ensembling.best_ensemble(records, scale, tokens)
    claims: list[Claim] = []
    missing = heavy_weight_decay.missing(records, scale, tokens)
    for teacher in TEACHERS:
        losses = [record.loss for record in student_records(records, scale, teacher)]
        if not losses or not math.isfinite(single):
            continue
        loss, ends, reasons = statistics.fmean(losses), seed_interval(losses), _reasons(missing, losses)
        claims.append(
            Claim(
                text=f"a {size} student of {'the ensemble' if teacher == 'ensemble' else 'one member of its own size'} "
                f"beats the best single {size}",
                value=f"{single - loss:.4f} nats ({single:.4f} to {loss:.4f})",
                interval=None if ends is None else (single - ends[1], single - ends[0]),
                seeds=len(losses),
                paper="0.21 nats (3.57 to 3.36), section 9"
                if teacher == "ensemble"
                else "0.14 nats (3.57 to 3.43), section 9",
                holds=loss < single,
                provisional=reasons,
            )
        )
        if teacher == "ensemble" and ensemble is not None and single > ensemble.loss:
            share = (single - loss) / (single - ensemble.loss)
            claims.append(
                Claim(
                    text="the student keeps more than half of the ensemble's gain",
                    value=f"{100 * share:.0f}%",
                    seeds=len(losses),
                    paper="83%, section 9",
                    holds=share > 0.5,
                    provisional=reasons,
                )
            )
    claims += _teacher_claim(records, scale, missing)
    if scale.soft is not None:
        claims += _students.claims(records, scale, missing)
    steps = _chain(records, scale)
    return Section(
        title="Distillation",
        question="How much of an ensemble's gain can one small student keep?",
        claims=tuple(claims),
        tables=(*([_table(steps, tokens)] if steps else []), *_students.tables(records, scale)),
        figures=(_figure(steps, tokens),) if steps else (),
        notes=tuple(_students.notes(records, scale)),
    )


def _reasons(missing: tuple[str, ...], losses: list[float]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*missing, *(("one seed",) if len(losses) < 2 else ()))))


def _teacher_claim(records: Records, scale: Scale, missing: tuple[str, ...]) -> list[Claim]:
    """Say whether students of one member beat that member."""
    jobs = student(records, scale, "self")
    losses = [record.loss for record in student_records(records, scale, "self")]
    teacher = records.named(next(job.source for job in jobs if isinstance(job, Samples))) if jobs else None
    if teacher is None or not losses:
        return []
    loss, ends = statistics.fmean(losses), seed_interval(losses)
    return [
        Claim(
            text="a self-distilled student beats its teacher",
            value=f"{teacher.loss - loss:+.4f} nats ({teacher.loss:.4f} to {loss:.4f})",
            interval=None if ends is None else (teacher.loss - ends[1], teacher.loss - ends[0]),
            seeds=len(losses),
            paper="3.71 to 3.43, section 9",
            holds=loss < teacher.loss,
            provisional=_reasons(missing, losses),
        )
    ]


@dataclass(frozen=True)
class Step:
    """One step of the chain: what, the models kept in memory to use it, and its records, one for each seed."""

    what: str
    models: int
    records: list[Record]

    def mean(self, field: str) -> float | None:
        """Return the mean over seeds of one result; None where a record lacks it."""
        values = [value for record in self.records if (value := record.results.get(field)) is not None]
        return statistics.fmean(values) if len(values) == len(self.records) else None


def _chain(records: Records, scale: Scale) -> list[Step]:
    """Return the steps of the whole chain that have results."""
    tokens = scale.unique_tokens[0]
    steps = []
    _, base, _ = epoching.best_standard(records, scale, tokens)
    if base is not None:
        standard = epoching.best_records(records, scale, tokens)
        steps.append(Step(f"standard, best single ({base.model})", 1, standard))
    _, model = heavy_weight_decay.best_single(records, scale, tokens)
    if model:
        tuned = heavy_weight_decay.best_records(records, scale, model, tokens)
        steps.append(Step(f"tuned decay, best single ({model})", 1, tuned))
    ensemble = ensembling.best_ensemble(records, scale, tokens)
    if ensemble is not None:
        steps.append(Step(f"ensemble of {ensemble.results['members']}", ensemble.results["members"], [ensemble]))
    for teacher in TEACHERS:
        found = student_records(records, scale, teacher)
        if found:
            steps.append(Step(f"student of {'the ensemble' if teacher == 'ensemble' else 'itself'}", 1, found))
    return steps


def _table(steps: list[Step], tokens: int) -> Table:
    return Table(
        title=f"The whole chain, D = {tokens:,} tokens, means over seeds",
        columns=("step", "models", "parameters", "loss", "test loss", "seeds"),
        rows=tuple(
            (
                step.what,
                step.models,
                step.records[0].results.get("parameters"),
                step.mean("loss"),
                step.mean("test_loss"),
                len(step.records),
            )
            for step in steps
        ),
    )


def _figure(steps: list[Step], tokens: int) -> Figure:
    def draw(axes: Any) -> None:
        draw_bars(axes, [step.what for step in steps], [step.mean("loss") for step in steps])
        axes.set_ylabel("validation loss (nats per token)")

    return Figure(name="whole-chain", caption=f"The whole chain at D = {tokens:,}, one bar a step.", draw=draw)
