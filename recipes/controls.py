"""What does the same text give without any of this? (Controls of a campaign.)

Claim: the best model beats one ordinary pass over the text. `epochal init` chooses the largest model for that pass that
takes no longer than the final one.
Command: epochal run controls --scale demo
Results: recipes/results/<scale>/report.md
"""

import math
from dataclasses import dataclass
from typing import Any

from epochal.campaign.plan import named_roles
from epochal.ranges import Ranged, Rate, Tokens
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.sections import Section, Table
from epochal.run import Job, Run
from epochal.scale import Point, Scale
from epochal.study import Study


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """One pass over the text at the usual decay."""

    model: str
    lr: Rate
    tokens: Tokens  # of the pass; the whole text where D is a part of it

    def check(self, scale: Scale) -> None:
        """Refuse a model outside of the ladder and tokens that do not fit."""
        scale.check_models("model", self.model)
        scale.check_budget(self.tokens)


def one_pass(study: Study) -> Run | None:
    """Return the control, or None without a table [controls]."""
    settings = study.settings(Settings)
    if settings is None:
        return None
    point = Point(lr=settings.lr, epochs=1, wd=study.scale.standard_wd)
    return study.scale.run(settings.model, settings.tokens, point)


def plan(study: Study) -> list[Job]:
    """Return the control."""
    run = one_pass(study)
    return [] if run is None else [run]


def roles(study: Study) -> dict[str, Record]:
    """Return the control under its name."""
    run = one_pass(study)
    record = None if run is None else study.records.get(run)
    return {} if record is None or math.isinf(record.loss) else {"control": record}


def report(study: Study) -> Section | None:
    """Compare the results with one pass over the text and with frequencies."""
    named = named_roles(study.records, study.scale)
    text = next((record.results["text"] for record in named.values() if "text" in record.results), None)
    if study.settings(Settings) is None or text is None:
        return None
    return Section(
        title="Where this campaign stands",
        question="Is text or compute the limit, and does the effort beat one ordinary pass over the text?",
        claims=_claims(study, named),
        tables=(_table(named, text),),
        notes=(_share(study, text),),
    )


def _claims(study: Study, named: dict[str, Record]) -> tuple[Claim, ...]:
    run = one_pass(study)
    control, others = named.get("control"), [named[role] for role in ("single", "student") if role in named]
    if run is None or control is None or not others:
        return ()
    best = min(others, key=lambda record: record.loss)
    return (
        Claim(
            id="controls.one-pass",
            text=f"the best single model or student beats one ordinary pass over {run.unique_tokens:,} tokens",
            value=f"{control.test_loss - best.test_loss:+.4f} nats ({control.test_loss:.4f} to {best.test_loss:.4f})",
            holds=best.test_loss < control.test_loss,
            provisional=("one seed",),
        ),
    )


def _table(named: dict[str, Record], text: dict[str, Any]) -> Table:
    per_byte = text["bytes_per_token"]

    def row(what: str, loss: float, record: Record | None = None) -> tuple[Any, ...]:
        bits = loss / math.log(2) / per_byte if per_byte else None
        results = {} if record is None else record.results
        return (what, results.get("parameters"), loss, bits, results.get("test_loss"))

    order = ("control", "single", "ensemble", "student")
    titles = {"control": "one pass over the text", "single": "best single model", "ensemble": "ensemble"}
    rows = [row("all tokens equally likely", math.log(text["vocab_size"])), row("frequencies", text["unigram_loss"])]
    rows += [row(titles.get(role, role), named[role].loss, named[role]) for role in order if role in named]
    return Table(
        title="Results and controls",
        columns=("model", "parameters", "validation loss", "bits per byte", "test loss"),
        rows=tuple(rows),
    )


def _share(study: Study, text: dict[str, Any]) -> str:
    used = study.scale.unique_tokens[0]
    return (
        f"D = {used:,} of {text['tokens']:,} training tokens ({used / text['tokens']:.1%}), {text['documents']:,} documents in "
        "all."
    )
