"""How much more text would the standard recipe need for the same loss? (Spec section 8.)

Claim: measured against the law of the standard recipe over budgets D, tuned decay and ensembles multiply the data.
Command: epochal run data_efficiency --scale micro
Results: recipes/results/<scale>/report.md
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from epochal.report.claims import Claim
from epochal.report.comparison import beyond_noise, within_noise
from epochal.report.figures import LOSS_AXIS, draw_law, draw_ranking, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job, Run
from epochal.scaling import DataEfficiency, PowerLaw, data_efficiency, fit_power_law, seed_interval, slowrun_multiple
from epochal.search.searches import Search
from epochal.study import Study
from recipes import distillation, ensembling, epoching, heavy_weight_decay

# A law of three constants over fewer budgets says nothing.
FEWEST_BUDGETS = 3

# The data set on whose validation tokens the Slowrun's table holds.
SLOWRUN_DATA = "fineweb"


def plan(study: Study) -> list[Job]:
    """Return what the other recipes run, and seeds of the best standard run per budget."""
    # The seeds show the noise of the reference, which the interval of its law needs.
    return [*distillation.plan(study), *(run for tokens in epoching.budgets(study) for run in seeds(study, tokens))]


def seeds(study: Study, tokens: int) -> tuple[Run, ...]:
    """Return the best standard run of one budget with every seed; none before its searches have certificates."""
    return () if epoching.missing(study, tokens) else epoching.best_standard(study, tokens).runs


def searches(study: Study) -> list[Search]:
    """Return the searches that this recipe waits for."""
    return distillation.searches(study)


def standard_losses(study: Study, tokens: int) -> list[float]:
    """Return the best standard test losses of one budget by seed.

    The search's seed alone before others have run.
    """
    # Before the seeds are planned, the search has the first seed.
    return list(epoching.best_standard(study, tokens).losses.values())


def standard_law(study: Study) -> PowerLaw | None:
    """Fit E + A / D**alpha to the best standard losses of all seeds.

    D is in tokens. None with fewer than three budgets.
    """
    points = [(tokens, loss) for tokens in epoching.budgets(study) for loss in standard_losses(study, tokens)]
    if len({tokens for tokens, _ in points}) < FEWEST_BUDGETS:
        return None
    return fit_power_law([tokens for tokens, _ in points], [loss for _, loss in points])


# --- what was reached -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """A loss in nats per token, its 90% interval (over seeds or members; None for one seed), and whether it was trained."""

    loss: float
    interval: tuple[float, float] | None = None
    limit: bool = False


def reached(study: Study, tokens: int) -> dict[str, Reached]:
    """Return what was reached at one budget: best single, best ensemble, the limits, and the student at the first."""
    found: dict[str, Reached] = {}
    single, _ = heavy_weight_decay.best_single(study, tokens)
    if single:
        search = heavy_weight_decay.choice(single)
        found["tuned decay"] = Reached(single.mean, seed_interval(list(single.losses.values()), search=search))
    ensemble = ensembling.best_ensemble(study, tokens)
    if ensemble is not None:
        count, law = ensemble.results["members"], ensembling.members_law(ensemble)
        around = law.predict_interval([float(count)]) if law.interval else None
        half = float(around[1][0] - around[0][0]) / 2 if around else None
        interval = None if half is None else (ensemble.test_loss - half, ensemble.test_loss + half)
        found[f"ensemble of {count}"] = Reached(ensemble.test_loss, interval)
        found["its limit in K"] = Reached(law.E, law.interval["E"] if law.interval else None, limit=True)
    joint = ensembling.joint_law(ensembling.finished(study, tokens))
    if joint is not None:
        found["the limit in K and N"] = Reached(joint.E, joint.interval["E"] if joint.interval else None, limit=True)
    students = [record.test_loss for record in distillation.student_records(study, "ensemble")]
    if students and tokens == study.scale.unique_tokens[0]:
        found["student of the ensemble"] = Reached(statistics.fmean(students), seed_interval(students))
    return {what: value for what, value in found.items() if math.isfinite(value.loss) and value.loss > 0}


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Invert the standard law at every loss reached."""
    question = "How much more text would the standard recipe need for the same loss?"
    law = standard_law(study)
    if law is None:
        note = f"Needs the standard recipe at {FEWEST_BUDGETS} budgets or more; see a larger scale."
        return Section(title="Data efficiency", question=question, notes=(note,))
    scale, tokens = study.scale, study.scale.unique_tokens[0]
    losses = {budget: reached(study, budget) for budget in scale.unique_tokens}
    found = {
        budget: {
            what: data_efficiency(value.loss, budget, law, loss_interval=value.interval)
            for what, value in values.items()
        }
        for budget, values in losses.items()
    }
    # Losses on another validation text cannot be looked up in the Slowrun's table.
    slowrun = (_slowrun_table(losses),) if scale.data == SLOWRUN_DATA else ()
    caveats = (*_reference_caveats(study), *heavy_weight_decay.missing(study, tokens))
    claims = [
        _claim(what, value, losses[tokens][what], tokens, study.judged_seeds, caveats)
        for what, value in found[tokens].items()
    ]
    return Section(
        title="Data efficiency",
        question=question,
        claims=(*claims, *lasting_claims(study, found)),
        tables=(_law_table(law), _table(found, losses), *_recipe_laws(losses), *slowrun),
        figures=(_law_figure(study, law), _bar_figure(found[tokens], tokens), *_lasting_figure(found)),
        notes=tuple(note for note in (law.note,) if note),
    )


def _reference_caveats(study: Study) -> tuple[str, ...]:
    """Name what the standard law lacks, at every budget that it is fitted to."""
    budgets = epoching.budgets(study)
    mixed = ("the standard law has other sizes at some budgets",) if len(set(budgets.values())) > 1 else ()
    return (*epoching.caveats(study, *budgets), *mixed)


Multiples = dict[str, DataEfficiency]


CLAIM_IDS = {
    "tuned decay": "tuned",
    "its limit in K": "limit-k",
    "the limit in K and N": "double-limit",
    "student of the ensemble": "student",
}
# The paper's multiple, and its place.
PAPER = {
    "tuned decay": (2.09, "2.09x at 200M tokens, section 8"),
    "its limit in K": (3.03, "3.03x at 200M tokens, section 8"),
    "the limit in K and N": (5.17, "5.17x at 200M tokens, section 8"),
}
LASTING = ("tuned decay", "its limit in K")
FALLS = 0.1  # doublings of a multiple for each doubling of D; the paper's tuned multiples fall by 0.06


def _claim(what: str, value: DataEfficiency, loss: Reached, tokens: int, seeds: int, caveats: tuple[str, ...]) -> Claim:
    reasons = caveats
    if value.extrapolated:
        reasons = (*reasons, "beyond the budgets of the law")
    if value.interval is None:
        reasons = (*reasons, "no interval: the law has too few points")
    elif loss.interval is None:
        reasons = (*reasons, "the interval is that of the law alone")
    paper, text = PAPER.get(what, (None, ""))
    # A limit without an interval is not known well enough for a verdict.
    known, noise = not loss.limit or loss.interval is not None, within_noise(value.interval, 1.0)
    finite = math.isfinite(value.multiple)
    return Claim(
        id=f"data-efficiency.{CLAIM_IDS.get(what, 'ensemble')}",
        text=f"D = {tokens:,}: {what}: the standard recipe needs more data for the same loss",
        value=f"{value.multiple:.2f}x" if finite else "below the standard law's limit",
        paper=text,
        interval=value.interval,
        seeds=seeds,
        holds=beyond_noise(value.multiple > 1, noise) if known else None,
        # Multiples are compared as logarithms: once means no effect.
        sizes=None if paper is None or not finite else (math.log(value.multiple), math.log(paper)),
        provisional=(*reasons, *noise),
    )


def _lasting(found: dict[int, Multiples]) -> dict[str, dict[int, DataEfficiency]]:
    """Return the finite multiples of LASTING by budget, where enough budgets have them."""
    series = {
        what: {
            d: values[what]
            for d, values in sorted(found.items())
            if what in values and math.isfinite(values[what].multiple)
        }
        for what in LASTING
    }
    return {what: values for what, values in series.items() if len(values) >= FEWEST_BUDGETS}


def lasting_claims(study: Study, found: dict[int, Multiples]) -> list[Claim]:
    """Does the multiple persist where there is more text? The slope of its logarithm over that of D."""
    from scipy.special import stdtrit
    from scipy.stats import linregress

    claims = []
    for what, values in _lasting(found).items():
        multiples = {budget: value.multiple for budget, value in values.items()}
        fit = linregress(
            [math.log2(budget) for budget in multiples], [math.log2(value) for value in multiples.values()]
        )
        half = max(float(stdtrit(len(multiples) - 2, 0.95)) * float(fit.stderr), _own_error(values))
        slope, interval = float(fit.slope), (float(fit.slope) - half, float(fit.slope) + half)
        shown = ", ".join(f"{value:.2f}x" for _, value in sorted(multiples.items()))
        claims.append(
            Claim(
                id=f"data-efficiency.lasts.{CLAIM_IDS[what]}",
                text=f"{what}: the multiple of the data falls by less than {FALLS:g} doublings for each doubling of D from "
                f"{min(multiples):,} to {max(multiples):,}",
                value=f"{slope:+.2f} doublings ({shown})",
                interval=interval,
                seeds=study.judged_seeds,
                paper="about constant over four budgets (2.25 to 2.00 tuned, 4.93 to 5.28 joint), section 8",
                holds=True if interval[0] > -FALLS else False if interval[1] < -FALLS else None,
                provisional=(*_reference_caveats(study), *heavy_weight_decay.missing(study, *multiples)),
            )
        )
    return claims


def _own_error(values: dict[int, DataEfficiency]) -> float:
    """Return the half-width of the slope that the multiples' own intervals give.

    They are taken as independent; 0 without them.
    """
    # The scatter of four points about a line is a poor estimate of their errors.
    x = np.log2(list(values))
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    halves = [
        math.log2(value.interval[1] / value.interval[0]) / 2
        if value.interval and value.interval[0] > 0 and math.isfinite(value.interval[1])
        else 0.0
        for value in values.values()
    ]
    return float(np.sqrt(np.sum((weights * halves) ** 2)))


def _recipe_laws(losses: dict[int, dict[str, Reached]]) -> tuple[Table, ...]:
    """Return the law in D of every recipe that has run at enough budgets."""
    rows = list[tuple[Any, ...]]()
    for what in dict.fromkeys(what for values in losses.values() for what in values):
        points = {budget: values[what].loss for budget, values in losses.items() if what in values}
        if len(points) >= FEWEST_BUDGETS:
            law = fit_power_law(list(points), list(points.values()))
            low, high = law.interval["E"] if law.interval else (None, None)
            rows.append((what, len(points), law.E, low, high, law.A, law.alpha))
    columns = ("recipe", "budgets", "limit in D", "90% low", "90% high", "A", "alpha")
    return (Table(title="Laws in D of the other recipes", columns=columns, rows=tuple(rows)),) if rows else ()


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
    """Return the Slowrun's own multiple of each loss."""
    # Measured against one-pass runs and not against a law, so a limit, which no run reached, has none.
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


def _law_figure(study: Study, law: PowerLaw) -> Figure:
    budgets, standard = sorted(study.scale.unique_tokens), list(epoching.budgets(study))

    def draw(axes: Any) -> None:
        points = [statistics.fmean(losses) if (losses := standard_losses(study, d)) else None for d in standard]
        line = draw_series(axes, standard, points, label="standard", join=False)
        draw_law(
            axes,
            law,
            standard[0],
            8 * standard[-1],
            label="E + A / D^alpha",
            color=line.get_color(),
            limit=False,
        )
        draw_series(
            axes,
            budgets,
            [_finite(heavy_weight_decay.best_single(study, d)[0].mean) for d in budgets],
            label="tuned",
        )
        ensembles = [ensembling.best_ensemble(study, d) for d in budgets]
        if any(ensembles):
            draw_series(axes, budgets, [record.test_loss if record else None for record in ensembles], label="ensemble")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("unique tokens D")
        axes.set_ylabel(LOSS_AXIS)

    return Figure(
        name="loss-against-data", caption="Best losses against D, and the law of the standard recipe.", draw=draw
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lasting_figure(found: dict[int, Multiples]) -> list[Figure]:
    """Draw the multiples against D; none before enough budgets have them."""
    series = _lasting(found)

    def draw(axes: Any) -> None:
        for what, values in series.items():
            points = [value.multiple for value in values.values()]
            low, high = (
                [None if value.interval is None else _finite(value.interval[end]) for value in values.values()]
                for end in (0, 1)
            )
            draw_series(axes, list(values), points, label=what, low=low, high=high)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("unique tokens D")
        axes.set_ylabel("multiple of the data")

    caption = "Multiples of the data against D: how much more text the standard recipe needs for the same loss."
    return [Figure(name="multiples-against-data", caption=caption, draw=draw)] if series else []


def _bar_figure(multiples: Multiples, tokens: int) -> Figure:
    def draw(axes: Any) -> None:
        finite = {what: value.multiple for what, value in multiples.items() if math.isfinite(value.multiple)}
        draw_ranking(axes, ["standard", *finite], [1.0, *finite.values()])
        axes.set_xlabel("multiple of the data")

    return Figure(name="data-efficiency", caption=f"Data efficiency at D = {tokens:,}.", draw=draw)
