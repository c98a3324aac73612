"""Which of the recipes still pay when a model goes on with a second text? (Spec section 11: continued pre-training on math.)

Claim: a small batch, then repeated text, then an ensemble each lower the loss on the new text; members that start from the
same weights can be averaged in their weights as well as in their logits; what is forgotten of the first text is measured.
Command: epochal run continued --scale micro
Found: recipes/results/<scale>/report.md
"""

import math
from dataclasses import replace
from itertools import pairwise

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.sections import Section, Table
from epochal.run import Ensemble, Job, Run
from epochal.scale import Continued, Point, Scale
from recipes import heavy_weight_decay

STEPS = ("large batch, one pass", "small batch, one pass", "small batch, repeated")
AVERAGES = ("logits", "probs", "parameters")


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: nothing before the base is known, then all steps, ensembles and looks back."""
    settings = scale.continued
    if settings is None:
        return []
    found: list[Job] = [] if settings.base else list(heavy_weight_decay.jobs(records, scale))
    base = base_of(records, scale, settings)
    if base is None:
        return found
    runs = [*steps(scale, settings, base), *members(scale, settings, base)]
    unique = list({run.name: run for run in [*runs, *full_passes(scale, settings, base)]}.values())
    return [*found, *unique, *ensembles(scale, settings, base), *looks_back(scale, settings, base)]


def base_of(records: Records, scale: Scale, settings: Continued) -> str | None:
    """Return what the runs start from: the folder that the scale names, or the tuned run of the size; None before it is tuned."""
    if settings.base:
        return settings.base
    search = heavy_weight_decay.tuned(records, scale, settings.model, scale.unique_tokens[0])
    if not search.certified or search.best is None:
        return None
    return scale.run(settings.model, scale.unique_tokens[0], search.best).name


def continued_run(
    scale: Scale, settings: Continued, base: str, *, tokens: int, batch: int, epochs: int, seed: int = 0
) -> Run:
    """Return one run that goes on from the base; `seed` orders the data."""
    run = scale.run(settings.model, tokens, Point(lr=settings.lr, epochs=epochs, wd=settings.wd), seed=seed)
    name = f"continued-{settings.model}-{tokens}-b{batch}-ep{epochs}-s{seed}"
    return replace(run, name=name, data=settings.data, batch_size=batch, init_from=base)


def steps(scale: Scale, settings: Continued, base: str) -> list[Run]:
    """Return the single models of the ladder `STEPS`."""
    large, small = settings.batch_sizes
    settled = ((large, 1), (small, 1), (small, settings.epochs))
    return [
        continued_run(scale, settings, base, tokens=settings.unique_tokens, batch=batch, epochs=epochs)
        for batch, epochs in settled
    ]


def members(scale: Scale, settings: Continued, base: str) -> list[Run]:
    """Return the members: the last step with other orders of the data, as all start from the same weights."""
    small = settings.batch_sizes[1]
    return [
        continued_run(
            scale, settings, base, tokens=settings.unique_tokens, batch=small, epochs=settings.epochs, seed=seed
        )
        for seed in range(settings.members)
    ]


def full_passes(scale: Scale, settings: Continued, base: str) -> list[Run]:
    """Return the default recipe, one pass with the large batch, over more tokens: what the gain is worth in text."""
    large = settings.batch_sizes[0]
    return [
        continued_run(scale, settings, base, tokens=tokens, batch=large, epochs=1) for tokens in settings.more_tokens
    ]


def ensembles(scale: Scale, settings: Continued, base: str) -> list[Ensemble]:
    """Return the ensembles of all members, one for each average."""
    runs = members(scale, settings, base)
    names = tuple(run.name for run in runs)
    return [
        Ensemble(name=f"continued-{settings.model}-k{len(runs)}-{average}", runs=names, average=average)
        for average in AVERAGES
    ]


def looks_back(scale: Scale, settings: Continued, base: str) -> list[Ensemble]:
    """Return the same models judged on the first text: single models as ensembles of one. None for a base from elsewhere."""
    if settings.base:
        return []
    first = [
        Ensemble(name=f"{run.name}-on-{scale.data}", runs=(run.name,), average="logits", data=scale.data)
        for run in steps(scale, settings, base)
    ]
    together = [
        replace(ensemble, name=f"{ensemble.name}-on-{scale.data}", data=scale.data)
        for ensemble in ensembles(scale, settings, base)
    ]
    return [*first, *together]


def report(records: Records, scale: Scale) -> Section:
    """Say what each step gains on the second text, and what it costs on the first."""
    title, question = "Continued pre-training", "Which recipes still pay when a model goes on with a second text?"
    settings = scale.continued
    base = base_of(records, scale, settings) if settings else None
    if settings is None or base is None:
        why = "This scale has no second text." if settings is None else "Waits for the tuned base."
        return Section(title=title, question=question, notes=(why,))
    rows = _rows(records, scale, settings, base)
    return Section(
        title=title,
        question=question,
        claims=(*_step_claims(records, scale, settings, base), *_ensemble_claims(records, scale, settings, base)),
        tables=(_table(scale, settings, rows),) if rows else (),
    )


Row = tuple[str, Record, Record | None]


def _rows(records: Records, scale: Scale, settings: Continued, base: str) -> list[Row]:
    """Every finished step: what, its record on the second text, its record on the first."""
    planned: list[Run | Ensemble] = [*steps(scale, settings, base), *ensembles(scale, settings, base)]
    names = (*STEPS, *(f"{settings.members} members, mean {average}" for average in AVERAGES))
    back = {look.name: records.get(look) for look in looks_back(scale, settings, base)}
    found = [
        (what, records.get(job), back.get(f"{job.name}-on-{scale.data}"))
        for what, job in zip(names, planned, strict=True)
    ]
    return [(what, record, look) for what, record, look in found if record is not None]


def _table(scale: Scale, settings: Continued, rows: list[Row]) -> Table:
    return Table(
        title=f"Continued on {settings.data} with {settings.unique_tokens:,} tokens (loss on {scale.data}: what is forgotten)",
        columns=("step", "loss", "test loss", f"loss on {scale.data}"),
        rows=tuple(
            (what, record.loss, record.results.get("test_loss"), look.loss if look else None)
            for what, record, look in rows
        ),
    )


def _step_claims(records: Records, scale: Scale, settings: Continued, base: str) -> list[Claim]:
    losses = [record.loss if (record := records.get(run)) else math.inf for run in steps(scale, settings, base)]
    papers = ("30.59 to 34.48% accuracy, section 11", "34.48 to 35.82% accuracy, section 11")
    return [
        Claim(
            text=f"continued: {later} beats {earlier}",
            value=f"{before - after:+.4f} nats",
            holds=after < before,
            paper=paper,
            provisional=("one seed",),
        )
        for (earlier, later), (before, after), paper in zip(pairwise(STEPS), pairwise(losses), papers, strict=True)
        if math.isfinite(before) and math.isfinite(after)
    ]


def _ensemble_claims(records: Records, scale: Scale, settings: Continued, base: str) -> list[Claim]:
    single = [record.loss for run in members(scale, settings, base) if (record := records.get(run)) is not None]
    found = {job.average: record for job in ensembles(scale, settings, base) if (record := records.get(job))}
    if len(single) < settings.members or len(found) < len(AVERAGES):
        return []
    mean, logits, soup = sum(single) / len(single), found["logits"].loss, found["parameters"].loss
    claims = [
        Claim(
            text=f"continued: {settings.members} members (logits) beat one of them",
            value=f"{mean - logits:+.4f} nats",
            seeds=settings.members,
            holds=logits < mean,
            paper="35.82 to 40.58% accuracy with 8, section 11",
        ),
        Claim(
            text="continued: members from the same weights average as well in their weights as in their logits",
            value=f"{logits - soup:+.4f} nats",
            seeds=settings.members,
            holds=soup <= logits,
            paper="weights slightly better, section 11",
            provisional=("one set of members",),
        ),
    ]
    return [*claims, *_worth_claim(records, scale, settings, base, logits)]


def _worth_claim(records: Records, scale: Scale, settings: Continued, base: str, reached: float) -> list[Claim]:
    """Say how much text the default recipe needs for the ensemble's loss, as the paper's 17.5x: a lower bound."""
    passes = [(run.unique_tokens, records.get(run)) for run in full_passes(scale, settings, base)]
    losses = {tokens: record.loss for tokens, record in passes if record is not None}
    if not losses or len(losses) < len(passes):
        return []
    beaten = [tokens for tokens, loss in losses.items() if loss > reached]
    most = max(beaten, default=settings.unique_tokens)
    return [
        Claim(
            text=f"continued: {settings.members} members on {settings.unique_tokens:,} tokens beat one pass of the default over",
            value=f"{most:,} tokens ({most / settings.unique_tokens:.1f}x)",
            holds=most > settings.unique_tokens,
            paper="17.5x, section 11",
            provisional=("one seed", *(("the largest pass that was run",) if most == max(losses) else ())),
        )
    ]
