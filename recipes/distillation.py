"""How much of an ensemble's gain can one small student keep? (Spec section 9.)

Claim: a fresh model that learns from the real text and from text sampled from the members of an ensemble (or from one
model of its own size) beats the best single model of its size, and keeps most of the ensemble's gain. Beside it, at equal
student cost: text of the averaged model, soft targets online and cached; and students of several sizes.
Command: epochal run distillation --scale demo
Found: recipes/results/<scale>/report.md
"""

import math
from typing import Any

from epochal.records import Record, Records, needed
from epochal.report import Claim, Figure, Section, Table, draw_bars
from epochal.run import Job, Run, Samples
from epochal.scale import Scale
from epochal.search import Search
from recipes import _students, ensembling, epoching, heavy_weight_decay

TEACHERS = ("ensemble", "self")


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return needed(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the ensembles, text sampled from them and from one member, and students."""
    found = ensembling.jobs(records, scale)
    for teacher in TEACHERS:
        found += student(records, scale, teacher)
    return found + _students.jobs(records, scale)


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return the searches that this recipe waits for: what `epochal plan` shows."""
    return ensembling.searches(records, scale)


def student(records: Records, scale: Scale, teacher: str) -> list[Job]:
    """Return the Samples of a teacher and the student that learns from them; nothing before the teacher is known.

    "ensemble": the members of the largest ensembled size one by one; "self": the first member alone.
    """
    tokens, settings = scale.unique_tokens[0], scale.students
    source_model = scale.ensemble.models[-1] if teacher == "ensemble" else settings.model
    teachers = ensembling.ensembles(records, scale, source_model, tokens)
    if not teachers:
        return []
    source = teachers[0].name if teacher == "ensemble" else teachers[0].runs[0]
    samples = Samples(
        name=f"text-{teacher}-{source}", source=source, tokens=settings.pool_tokens, max_length=settings.max_length
    )
    return [samples, scale.student(settings.model, tokens, samples.name, name=f"student-{teacher}-{settings.model}")]


def student_record(records: Records, scale: Scale, teacher: str) -> Record | None:
    """Return the record of one student, if it has run."""
    runs = [job for job in student(records, scale, teacher) if isinstance(job, Run)]
    return records.get(runs[0]) if runs else None


def report(records: Records, scale: Scale) -> Section:
    """Compare students with the best single model of their size and with their teachers."""
    tokens, size = scale.unique_tokens[0], scale.students.model
    own = heavy_weight_decay.best_records(records, scale, size, tokens)
    single = sum(record.loss for record in own) / len(own) if own else math.inf
    ensemble = ensembling.best_ensemble(records, scale, tokens)
    claims: list[Claim] = []
    missing = heavy_weight_decay.missing(records, scale, tokens)
    reasons = tuple(dict.fromkeys((*missing, "one seed")))  # of each student there is one, whatever the scale's seeds
    for teacher in TEACHERS:
        record = student_record(records, scale, teacher)
        if record is None or not math.isfinite(single):
            continue
        claims.append(
            Claim(
                text=f"a {size} student of {'the ensemble' if teacher == 'ensemble' else 'one member of its own size'} "
                f"beats the best single {size}",
                value=f"{single - record.loss:.4f} nats ({single:.4f} to {record.loss:.4f})",
                paper="0.21 nats (3.57 to 3.36), section 9"
                if teacher == "ensemble"
                else "0.14 nats (3.57 to 3.43), section 9",
                holds=record.loss < single,
                provisional=reasons,
            )
        )
        if teacher == "ensemble" and ensemble is not None and single > ensemble.loss:
            share = (single - record.loss) / (single - ensemble.loss)
            claims.append(
                Claim(
                    text="the student keeps more than half of the ensemble's gain",
                    value=f"{100 * share:.0f}%",
                    paper="83%, section 9",
                    holds=share > 0.5,
                    provisional=reasons,
                )
            )
    claims += _teacher_claim(records, scale, reasons)
    if scale.soft is not None:
        claims += _students.claims(records, scale, missing)
    steps = _chain(records, scale)
    return Section(
        title="Distillation",
        question="How much of an ensemble's gain can one small student keep?",
        claims=tuple(claims),
        tables=(*([_table(steps, tokens)] if steps else []), *_students.tables(records, scale)),
        figures=(_figure(steps, tokens),) if steps else (),
    )


def _teacher_claim(records: Records, scale: Scale, reasons: tuple[str, ...]) -> list[Claim]:
    """Say whether a student of one member beats that member."""
    jobs = student(records, scale, "self")
    record = student_record(records, scale, "self")
    teacher = records.named(next(job.source for job in jobs if isinstance(job, Samples))) if jobs else None
    if record is None or teacher is None or not math.isfinite(record.loss):
        return []
    return [
        Claim(
            text="a self-distilled student beats its teacher",
            value=f"{teacher.loss - record.loss:+.4f} nats ({teacher.loss:.4f} to {record.loss:.4f})",
            paper="3.71 to 3.43, section 9",
            holds=record.loss < teacher.loss,
            provisional=reasons,
        )
    ]


Chain = list[tuple[str, int | None, Record]]


def _chain(records: Records, scale: Scale) -> Chain:
    """Return the steps of the whole chain that have results: what, models kept in memory to use it, record."""
    tokens = scale.unique_tokens[0]
    steps: Chain = []
    _, base, _ = epoching.best_standard(records, scale, tokens)
    if base is not None and (record := records.get(base)) is not None:
        steps.append((f"standard, best single ({base.model})", 1, record))
    _, model = heavy_weight_decay.best_single(records, scale, tokens)
    if model:
        steps.append(
            (
                f"tuned decay, best single ({model})",
                1,
                heavy_weight_decay.best_records(records, scale, model, tokens)[0],
            )
        )
    ensemble = ensembling.best_ensemble(records, scale, tokens)
    if ensemble is not None:
        steps.append((f"ensemble of {ensemble.results['members']}", ensemble.results["members"], ensemble))
    for teacher in TEACHERS:
        record = student_record(records, scale, teacher)
        if record is not None and math.isfinite(record.loss):
            steps.append((f"student of {'the ensemble' if teacher == 'ensemble' else 'itself'}", 1, record))
    return steps


def _table(steps: Chain, tokens: int) -> Table:
    return Table(
        title=f"The whole chain, D = {tokens:,} tokens",
        columns=("step", "models", "parameters", "loss", "test loss"),
        rows=tuple(
            (what, models, record.results.get("parameters"), record.loss, record.results.get("test_loss"))
            for what, models, record in steps
        ),
    )


def _figure(steps: Chain, tokens: int) -> Figure:
    def draw(axes: Any) -> None:
        draw_bars(axes, [what for what, _, _ in steps], [record.loss for _, _, record in steps])
        axes.set_ylabel("validation loss (nats per token)")

    return Figure(name="whole-chain", caption=f"The whole chain at D = {tokens:,}, one bar a step.", draw=draw)
