"""How much more text would the standard recipe need for the same loss? (Spec section 8.)

Claim: measured against the law of the standard recipe over budgets D, tuned decay and ensembles multiply the data.
Command: epochal run data_efficiency --scale micro
Found: recipes/results/<scale>/report.md
"""

import math
from typing import Any

from epochal.records import Records, needed
from epochal.report import Claim, Figure, Section, Table, draw_bars, draw_law, draw_series
from epochal.run import Job
from epochal.scale import Scale
from epochal.scaling import DataEfficiency, PowerLaw, data_efficiency, fit_power_law
from epochal.search import Search
from recipes import distillation, ensembling, epoching, heavy_weight_decay

FEWEST_BUDGETS = 3
"""A law of three constants over fewer budgets says nothing."""


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return needed(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: this recipe only reads what the others run, at every budget."""
    return distillation.jobs(records, scale)


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return the searches that this recipe waits for: what `epochal plan` shows."""
    return distillation.searches(records, scale)


def standard_law(records: Records, scale: Scale) -> PowerLaw | None:
    """Fit E + A / D**alpha to the best standard losses (D in tokens); None with fewer than three budgets."""
    pairs = [(tokens, epoching.best_standard(records, scale, tokens)[0]) for tokens in scale.budgets]
    pairs = [(tokens, loss) for tokens, loss in pairs if math.isfinite(loss)]
    if len(pairs) < FEWEST_BUDGETS:
        return None
    return fit_power_law([tokens for tokens, _ in pairs], [loss for _, loss in pairs])


def reached(records: Records, scale: Scale, tokens: int) -> dict[str, float]:
    """Return the losses reached at one budget: best single, best ensemble, and the student at the first budget."""
    found = {"tuned decay": heavy_weight_decay.best_single(records, scale, tokens)[0]}
    ensemble = ensembling.best_ensemble(records, scale, tokens)
    if ensemble is not None:
        found[f"ensemble of {ensemble.results['members']}"] = ensemble.loss
    student = distillation.student_record(records, scale, "ensemble")
    if student is not None and tokens == scale.unique_tokens[0]:
        found["student of the ensemble"] = student.loss
    return {what: loss for what, loss in found.items() if math.isfinite(loss)}


def report(records: Records, scale: Scale) -> Section:
    """Invert the standard law at every loss reached."""
    question = "How much more text would the standard recipe need for the same loss?"
    law = standard_law(records, scale)
    if law is None:
        note = f"Needs the standard recipe at {FEWEST_BUDGETS} budgets or more; see a larger scale."
        return Section(title="Data efficiency", question=question, notes=(note,))
    tokens = scale.unique_tokens[0]
    found = {
        budget: {what: data_efficiency(loss, budget, law) for what, loss in reached(records, scale, budget).items()}
        for budget in scale.unique_tokens
    }
    return Section(
        title="Data efficiency",
        question=question,
        claims=tuple(_claim(what, value, tokens, scale) for what, value in found[tokens].items()),
        tables=(_table(found),),
        figures=(_law_figure(records, scale, law), _bar_figure(found[tokens], tokens)),
        notes=tuple(note for note in (law.note,) if note),
    )


Multiples = dict[str, DataEfficiency]


def _claim(what: str, value: DataEfficiency, tokens: int, scale: Scale) -> Claim:
    reasons = ("one seed",) if scale.seeds < 2 else ()
    if value.extrapolated:
        reasons = (*reasons, "beyond the largest budget of the law")
    return Claim(
        text=f"D = {tokens:,}: {what} is worth this multiple of the data",
        value=f"{value.multiple:.2f}x",
        interval=value.interval,
        seeds=scale.seeds,
        holds=value.multiple > 1,
        provisional=reasons,
    )


def _table(found: dict[int, Multiples]) -> Table:
    rows = [
        (budget, what, value.multiple, value.equivalent, "beyond the law's range" if value.extrapolated else "in range")
        for budget, multiples in found.items()
        for what, value in multiples.items()
    ]
    return Table(
        title="Data efficiency against the standard law",
        columns=("D", "what", "multiple", "equivalent tokens", "range"),
        rows=tuple(rows),
    )


def _law_figure(records: Records, scale: Scale, law: PowerLaw) -> Figure:
    budgets = sorted(scale.unique_tokens)

    def draw(axes: Any) -> None:
        points = [epoching.best_standard(records, scale, tokens)[0] for tokens in scale.budgets]
        line = draw_series(axes, scale.budgets, points, label="standard", join=False)
        draw_law(
            axes,
            law,
            scale.budgets[0],
            8 * scale.budgets[-1],
            label="E + A / D^alpha",
            color=line.get_color(),
            limit=False,
        )
        draw_series(
            axes,
            budgets,
            [_finite(heavy_weight_decay.best_single(records, scale, d)[0]) for d in budgets],
            label="tuned",
        )
        ensembles = [ensembling.best_ensemble(records, scale, d) for d in budgets]
        if any(ensembles):
            draw_series(axes, budgets, [record.loss if record else None for record in ensembles], label="ensemble")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("unique tokens D")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend()

    return Figure(
        name="loss-against-data", caption="Best losses against D, and the law of the standard recipe.", draw=draw
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bar_figure(multiples: Multiples, tokens: int) -> Figure:
    def draw(axes: Any) -> None:
        draw_bars(axes, ["standard", *multiples], [1.0, *(value.multiple for value in multiples.values())])
        axes.set_ylabel("multiple of the data")

    return Figure(name="data-efficiency", caption=f"Data efficiency at D = {tokens:,}.", draw=draw)
