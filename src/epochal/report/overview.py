"""What the owner of a campaign wants first: its best models, what they cost, how sure that is, what to do next."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from epochal.records import Record, Records
from epochal.report.claims import reservations
from epochal.report.sections import DASH, Section, Table, all_claims, format_number
from epochal.run import Run, Samples, inputs
from epochal.scaling import interval_text, seed_interval

# Roles of `epochal export`, in the order of the page, and what they are called there. Others follow under their own name.
NAMES = {
    "best": "Best of all",
    "control": "One pass over the text",
    "single": "Best single model",
    "ensemble": "Best ensemble",
    "student": "Best student",
}
SAMPLED = 160  # tokens of a sample on the first screen
CHAIN = "whole-chain"  # the figure that stands on the first screen


@dataclass(frozen=True, kw_only=True)
class Model:
    """One result that a name of `epochal export` stands for."""

    what: str
    job: str
    loss: float  # validation nats per token
    bits_per_byte: float | None  # None where the record lacks the bytes per token
    parameters: int | None  # of all members together
    hours: float | None  # of the job and of all that it is made from; None where a record lacks its hours
    sure: str  # how much other seeds differ
    command: str


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The first screen of a report."""

    models: tuple[Model, ...]
    regime: str = ""  # how much of the text is used, where records say so
    sure: str = ""
    next_step: str = ""
    sample: str = ""  # text that a model of this campaign wrote
    sample_command: str = ""  # writes some


def overview(
    records: Records, roles: Mapping[str, Record], sections: Sequence[Section], *, scale: str, sample: str = ""
) -> Overview:
    """Return the first screen of the report of a campaign; `roles` are those of `epochal.campaign.plan.named_roles`."""
    # "best" is one of the others, unless it is something else than they are.
    others = {record.job.name for name, record in roles.items() if name != "best"}
    roles = {name: record for name, record in roles.items() if name != "best" or record.job.name not in others}
    order = [*(name for name in NAMES if name in roles), *(name for name in roles if name not in NAMES)]
    models = tuple(_model(name, roles[name], records, scale) for name in order)
    chosen = next((name for name in ("student", "best", "single", *order) if name in roles), "")
    return Overview(
        models=models,
        # The control may read more of the text than the campaign does.
        regime=_regime(record for name, record in roles.items() if name != "control"),
        sure=_how_sure(sections),
        next_step=_next_step(roles, sections, scale),
        sample=sample,
        sample_command=f"epochal generate {chosen} --scale {scale}" if chosen else "",
    )


def sampled_text(records: Records, data: str) -> str:
    """Return the beginning of what a model of the campaign wrote.

    "" where its tokens are not in the work folder.
    """
    import numpy as np

    space = records.workspace
    vocabulary = space.data / data / "tokenizer" / "tokenizer.json"
    for record in records:
        path = space.output(record.job) if isinstance(record.job, Samples) else None
        if path is not None and vocabulary.is_file() and records.has_output(record.job):
            from tokenizers import Tokenizer

            tokens = np.load(path, allow_pickle=False).reshape(-1)[:SAMPLED]
            return str(Tokenizer.from_file(str(vocabulary)).decode(tokens.tolist())).strip()
    return ""


def overview_table(models: Iterable[Model]) -> Table:
    """Return the best models as a table."""
    return Table(
        title="The best models",
        columns=("what", "loss", "bits per byte", "parameters", "hours", "how sure", "export"),
        rows=tuple(
            (m.what, m.loss, m.bits_per_byte, m.parameters, hours_text(m.hours), m.sure, f"`{m.command}`")
            for m in models
        ),
    )


def hours_text(hours: float | None) -> str:
    """Show hours as minutes below one hour."""
    if hours is None:
        return DASH
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _model(role: str, record: Record, records: Records, scale: str) -> Model:
    runs = [record] if isinstance(record.job, Run) else [r for n in inputs(record.job) if (r := records.named(n))]
    sizes = [run.results.get("parameters") for run in runs]
    known = [int(size) for size in sizes if size]
    counted = record.results.get("parameters") or (sum(known) if known and len(known) == len(sizes) else None)
    per_token = next((b for run in runs if (b := run.results.get("text", {}).get("bytes_per_token"))), None)
    return Model(
        what=NAMES.get(role, role),
        job=record.job.name,
        loss=record.loss,
        bits_per_byte=record.loss / math.log(2) / per_token if per_token else None,
        parameters=counted,
        hours=_hours(record, records),
        sure=_seeds(record, records),
        command=f"epochal export {role} exported --scale {scale}",
    )


def _hours(record: Record, records: Records) -> float | None:
    """Hours of a job and of every job that it reads, each counted once."""
    known, todo = {record.job.name: record}, list(inputs(record.job))
    while todo:
        source = records.named(todo.pop())
        if source is None:
            return None
        if source.job.name not in known:
            known[source.job.name] = source
            todo += inputs(source.job)
    hours = [one.provenance.get("hours") for one in known.values() if isinstance(one.job, Run)]
    return None if not hours or None in hours else math.fsum(float(h) for h in hours if h is not None)


def _seeds(record: Record, records: Records) -> str:
    """Say what the same run reached with other seeds."""
    if not isinstance(record.job, Run):
        return "one ensemble; not repeated with other members"
    group = next((group for group in records.settings if record in group), [record])
    finite = [other.loss for other in group if math.isfinite(other.loss)]
    if len(finite) < 2:
        return "one seed"
    interval = seed_interval(finite)
    around = f", 90% {interval_text(interval)}" if interval else ""
    return f"{len(finite)} seeds: mean {math.fsum(finite) / len(finite):.4f}{around}"


def _regime(found: Iterable[Record]) -> str:
    """Say which share of the text the models read, where a record has it."""
    for record in found:
        text = record.results.get("text")
        if isinstance(record.job, Run) and text and text.get("tokens"):
            share = record.job.unique_tokens / text["tokens"]
            documents = f" of {text['documents']:,} documents" if text.get("documents") else ""
            unigram = f" Unigram loss: {text['unigram_loss']:.4f} nats." if text.get("unigram_loss") else ""
            return (
                f"D = {record.job.unique_tokens:,} tokens, {share:.1%} of the text's {text['tokens']:,} tokens"
                f"{documents}.{unigram}"
            )
    return ""


def _how_sure(sections: Sequence[Section]) -> str:
    claims = all_claims(sections)
    judged = [claim for claim in claims if claim.holds is not None]
    settled = [claim for claim in judged if not reservations(claim)]
    if not judged:
        return "No claim has a verdict yet."
    return f"{len(settled)} of {len(judged)} verdicts are settled; the others are provisional and shown in gray."


def _next_step(roles: Mapping[str, Record], sections: Sequence[Section], scale: str) -> str:
    if "control" in roles and roles["control"].loss <= min(record.loss for record in roles.values()):
        return "One pass over the text is the best model here: export it, or give the campaign more text or a larger D."
    lacking = [NAMES[name].lower() for name in ("single", "ensemble", "student") if name not in roles]
    if lacking:
        return f"There is no {' and no '.join(lacking)} yet: `epochal run --scale {scale}`."
    missing = Counter(reason for claim in all_claims(sections) for reason in reservations(claim))
    if missing:
        reason, count = missing.most_common(1)[0]
        claims = f"{count} claims" if count > 1 else "one claim"
        return (
            f"Most common reservation ({claims}): {reason}. `epochal plan --scale {scale} --searches` shows what the "
            "searches lack."
        )
    return f"Nothing is missing: `epochal export student exported --scale {scale}`."


def losses_in_words(models: Sequence[Model]) -> str:
    """Say in one sentence which model is best, and by how much."""
    finite = [model for model in models if math.isfinite(model.loss)]
    if not finite:
        return "No model is finished yet."
    best = min(finite, key=lambda model: model.loss)
    return f"Lowest loss: {best.what[0].lower()}{best.what[1:]}, {format_number(best.loss)} nats per token."
