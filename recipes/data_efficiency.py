"""How much more text would the standard recipe need for the same loss? (Spec section 8.)

Claim: measured against the law of the standard recipe over budgets D, tuned decay and ensembles multiply the data.
Command: epochal run data_efficiency --scale micro
Found: recipes/results/<scale>/report.md
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_bars, draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job, Run
from epochal.scale import Scale
from epochal.scaling import DataEfficiency, PowerLaw, data_efficiency, fit_power_law, seed_interval, slowrun_multiple
from epochal.search.searches import Search
from recipes import distillation, ensembling, epoching, heavy_weight_decay

FEWEST_BUDGETS = 3
"""A law of three constants over fewer budgets says nothing."""

SLOWRUN_DATA = "fineweb"
"""The data set on whose validation tokens the Slowrun's table holds."""


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: what the other recipes run, and seeds of the best standard run per budget.

    The law of the standard recipe has a point per budget; its seeds are what tells its noise.
    """
    return distillation.jobs(records, scale) + [
        run for tokens in scale.budgets for run in seeds(records, scale, tokens)
    ]


def seeds(records: Records, scale: Scale, tokens: int) -> list[Run]:
    """Return the best standard run of one budget with every seed; nothing before its searches have certificates."""
    _, _, missing = epoching.best_standard(records, scale, tokens)
    return [] if missing else epoching.best_runs(records, scale, tokens)


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return the searches that this recipe waits for: what `epochal plan` shows."""
    return distillation.searches(records, scale)


def standard_losses(records: Records, scale: Scale, tokens: int) -> list[float]:
    """Return the best standard loss of one budget: of every seed that has run, or of the one search."""
    found = [record.loss for run in seeds(records, scale, tokens) if (record := records.get(run)) is not None]
    losses = found or [epoching.best_standard(records, scale, tokens)[0]]
    return [loss for loss in losses if math.isfinite(loss)]


def standard_law(records: Records, scale: Scale) -> PowerLaw | None:
    """Fit E + A / D**alpha to the best standard losses (D in tokens, all seeds); None with fewer than three budgets."""
    points = [(tokens, loss) for tokens in scale.budgets for loss in standard_losses(records, scale, tokens)]
    if len({tokens for tokens, _ in points}) < FEWEST_BUDGETS:
        return None
    return fit_power_law([tokens for tokens, _ in points], [loss for _, loss in points])


@dataclass(frozen=True)
class Reached:
    """A loss in nats per token, its 90% interval (over seeds or members; None for one seed), and whether it was trained."""

    loss: float
    interval: tuple[float, float] | None = None
    limit: bool = False


def reached(records: Records, scale: Scale, tokens: int) -> dict[str, Reached]:
    """Return what was reached at one budget: best single, best ensemble, the limits, and the student at the first."""
    found: dict[str, Reached] = {}
    loss, model = heavy_weight_decay.best_single(records, scale, tokens)
    if model:
        own = heavy_weight_decay.best_records(records, scale, model, tokens)
        found["tuned decay"] = Reached(loss, seed_interval([record.loss for record in own]))
    ensemble = ensembling.best_ensemble(records, scale, tokens)
    if ensemble is not None:
        count, law = ensemble.results["members"], ensembling.members_law(ensemble)
        around = law.predict_interval([float(count)]) if law.interval else None
        reach = float(around[1][0] - around[0][0]) / 2 if around else None
        interval = None if reach is None else (ensemble.loss - reach, ensemble.loss + reach)
        found[f"ensemble of {count}"] = Reached(ensemble.loss, interval)
        found["its limit in K"] = Reached(law.E, law.interval["E"] if law.interval else None, limit=True)
    joint = ensembling.joint_law(ensembling.finished(records, scale, tokens))
    if joint is not None:
        found["the limit in K and N"] = Reached(joint.E, joint.interval["E"] if joint.interval else None, limit=True)
    students = [record.loss for record in distillation.student_records(records, scale, "ensemble")]
    if students and tokens == scale.unique_tokens[0]:
        found["student of the ensemble"] = Reached(statistics.fmean(students), seed_interval(students))
    return {what: value for what, value in found.items() if math.isfinite(value.loss) and value.loss > 0}


def report(records: Records, scale: Scale) -> Section:
    """Invert the standard law at every loss reached."""
    question = "How much more text would the standard recipe need for the same loss?"
    law = standard_law(records, scale)
    if law is None:
        note = f"Needs the standard recipe at {FEWEST_BUDGETS} budgets or more; see a larger scale."
        return Section(title="Data efficiency", question=question, notes=(note,))
    tokens = scale.unique_tokens[0]
    losses = {budget: reached(records, scale, budget) for budget in scale.unique_tokens}
    found = {
        budget: {
            what: data_efficiency(value.loss, budget, law, loss_interval=value.interval)
            for what, value in values.items()
        }
        for budget, values in losses.items()
    }
    slowrun = (_slowrun_table(losses),) if scale.data == SLOWRUN_DATA else ()
    return Section(
        title="Data efficiency",
        question=question,
        claims=tuple(_claim(what, value, losses[tokens][what], tokens, scale) for what, value in found[tokens].items()),
        tables=(_law_table(law), _table(found, losses), *slowrun),
        figures=(_law_figure(records, scale, law), _bar_figure(found[tokens], tokens)),
        notes=tuple(note for note in (law.note,) if note),
    )


Multiples = dict[str, DataEfficiency]


PAPER = {
    "tuned decay": "2.09x at 200M tokens, section 8",
    "its limit in K": "3.03x at 200M tokens, section 8",
    "the limit in K and N": "5.17x at 200M tokens, section 8",
}


def _claim(what: str, value: DataEfficiency, loss: Reached, tokens: int, scale: Scale) -> Claim:
    reasons = ("one seed",) if scale.seeds < 2 else ()
    if value.extrapolated:
        reasons = (*reasons, "beyond the budgets of the law")
    if value.interval is None:
        reasons = (*reasons, "no interval: the law has too few points")
    elif loss.interval is None:
        reasons = (*reasons, "the interval is that of the law alone")
    return Claim(
        text=f"D = {tokens:,}: {what} is worth more than its data",
        value=f"{value.multiple:.2f}x",
        paper=PAPER.get(what, ""),
        interval=value.interval,
        seeds=scale.seeds,
        holds=value.multiple > 1,
        provisional=reasons,
    )


def _law_table(law: PowerLaw) -> Table:
    ends = law.interval or {}
    rows = [(name, getattr(law, name), *ends.get(name, (None, None))) for name in ("E", "A", "alpha")]
    smallest, largest = float(law.x.min()), float(law.x.max())
    return Table(
        title=f"The standard law E + A / D^alpha, {len(law.y)} points from D = {smallest:,.0f} to {largest:,.0f}",
        columns=("constant", "measured", "low", "high"),
        rows=tuple(rows),
    )


def _table(found: dict[int, Multiples], losses: dict[int, dict[str, Reached]]) -> Table:
    rows = []
    for budget, multiples in found.items():
        for what, value in multiples.items():
            loss = losses[budget][what]
            low, high = value.interval or (None, None)
            kind = "limit" if loss.limit else "trained"
            where = "beyond the law's range" if value.extrapolated else "in range"
            rows.append((budget, what, kind, loss.loss, value.multiple, low, high, value.equivalent, where))
    return Table(
        title="Data efficiency against the standard law (low, high: 90% interval of the multiple)",
        columns=("D", "what", "kind", "loss", "multiple", "low", "high", "equivalent tokens", "range"),
        rows=tuple(rows),
    )


def _slowrun_table(losses: dict[int, dict[str, Reached]]) -> Table:
    """The Slowrun's own count beside ours, in a table of its own: it is measured against one-pass runs, not a law."""
    rows = [
        (budget, what, value.loss, slowrun_multiple(value.loss))
        for budget, values in losses.items()
        for what, value in values.items()
        if not value.limit
    ]
    return Table(
        title="NanoGPT Slowrun's multiple: one-pass nanochat, best of three sizes, over 100M tokens",
        columns=("D", "what", "loss", "Slowrun multiple"),
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
