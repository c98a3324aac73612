"""Does heavy weight decay make loss fall with size again, and to which limit? (Spec section 5.)

Claim: with lr, epochs and decay tuned together for every size, loss falls monotonically in N and follows a power law.
Command: epochal run heavy_weight_decay --scale demo
Results: recipes/results/<scale>/report.md
"""

import math
from itertools import pairwise
from typing import Any

from epochal.report.claims import Claim
from epochal.report.figures import draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job
from epochal.scaling import PowerLaw, fit_power_law
from epochal.search.searches import EarlyStop, Search, early_stops, seed_noise
from epochal.study import Arm, Result, Study
from recipes import epoching

# lr, epochs and decay tuned together, decay first because it matters most, then epochs (spec section 12).
TUNED = Arm("tuned")

# A three-constant law in N needs at least three sizes.
FEWEST_SIZES = 3


def plan(study: Study) -> list[Job]:
    """Return every job that can be named: the standard searches to compare with, the joint searches, and their seeds."""
    jobs: list[Job] = [*epoching.plan(study), *(job for search in joint_searches(study) for job in search.jobs)]
    for result in (best(study, model, tokens) for tokens in study.scale.unique_tokens for model in study.scale.models):
        # Seeds only at certified points, which do not move any more.
        jobs += result.runs if result.settled else ()
    return jobs


def joint_searches(study: Study) -> list[Search]:
    """Return the joint search of every budget and size."""
    scale = study.scale
    return [study.search(TUNED, model, tokens) for tokens in scale.unique_tokens for model in scale.models]


def searches(study: Study) -> list[Search]:
    """Return the searches that `epochal plan` shows, those of the baseline first."""
    return epoching.searches(study) + joint_searches(study)


def best(study: Study, model: str, tokens: int) -> Result:
    """Return the best known point of the joint search of one size and budget."""
    return study.best(TUNED, model, tokens)


def best_single(study: Study, tokens: int) -> tuple[Result, str]:
    """Return the tuned result with the lowest seed mean, and its size.

    The size is "" before any result.
    """
    model = min(study.scale.models, key=lambda m: best(study, m, tokens).mean)
    result = best(study, model, tokens)
    return result, model if result else ""


def size_law(study: Study, tokens: int) -> PowerLaw | None:
    """Fit E + A / N**alpha to the tuned losses (N in parameters); None with fewer than three sizes."""
    results = [best(study, model, tokens) for model in study.scale.models]
    points = [(float(r.results["parameters"]), r.loss) for result in results for r in result.records.values()]
    if len({size for size, _ in points}) < FEWEST_SIZES:
        return None
    return fit_power_law([size for size, _ in points], [loss for _, loss in points])


def missing(study: Study, tokens: int) -> tuple[str, ...]:
    """Name what the tuned losses of one budget lack for a final verdict: neighbors that have not run, and seeds."""
    models = [model for model in study.scale.models if not study.tuned(TUNED, model, tokens).certified]
    return (*(f"neighbors of {model}" for model in models), *(("one seed",) if study.scale.seeds < 2 else ()))


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Compare tuned with standard, and extrapolate in N."""
    claims: list[Claim] = []
    tables, figures, notes = [], [], []
    for tokens in study.scale.unique_tokens:
        law = size_law(study, tokens)
        claims += _claims(study, tokens, law)
        tables.append(_table(study, tokens))
        figures += _figures(study, tokens, law)
        notes += [f"Law in N at D = {tokens:,}: {law.note}"] if law is not None and law.note else []
    stops = early_stops(study.records, searches(study))
    if stops:
        tables.append(_early_table(stops))
        notes.append(_early_note(stops))
    return Section(
        title="Heavy weight decay",
        question="With lr, epochs and weight decay tuned together, does loss fall with size again, and to which limit?",
        claims=tuple(claims),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=tuple(notes),
    )


def _claims(study: Study, tokens: int, law: PowerLaw | None) -> list[Claim]:
    single, model = best_single(study, tokens)
    base = epoching.first_loss(study, epoching.best_standard(study, tokens))
    if not single or single.point is None or not math.isfinite(base):
        return []
    at, usual, seeds = f"D = {tokens:,}: ", study.scale.standard_wd, len(single.records)
    caveats = tuple(dict.fromkeys((*epoching.missing(study, tokens), *missing(study, tokens))))
    losses = [best(study, m, tokens).mean for m in study.scale.models]
    falls = all(later < earlier for earlier, later in pairwise(losses))
    shown = [f"{loss:.4f}" if math.isfinite(loss) else "none yet" for loss in losses]
    claims = [
        Claim(
            id=f"heavy-decay.beats-standard.{tokens}",
            text=f"{at}the best tuned single model ({model}) beats the best standard one",
            value=f"{base - single.mean:.4f} nats ({base:.4f} to {single.mean:.4f})",
            paper="0.29 nats at 200M tokens (3.75 to 3.46), sections 4 and 5",
            seeds=seeds,
            holds=single.mean < base,
            provisional=caveats,
        ),
        Claim(
            id=f"heavy-decay.higher-decay.{tokens}",
            text=f"{at}the best decay of {model} is higher than the usual {usual:g}",
            value=f"{single.point.wd / usual:.0f}x",
            paper="32 times (3.2 against 0.1), section 5",
            seeds=seeds,
            holds=single.point.wd > usual,
            provisional=caveats,
        ),
    ]
    if len(losses) > 1:
        claims.append(
            Claim(
                id=f"heavy-decay.monotone.{tokens}",
                text=f"{at}tuned loss falls monotonically with N over {len(losses)} sizes",
                value=(" > " if falls else ", ").join(shown),
                paper="monotone over four sizes, section 5",
                seeds=seeds,
                # Open until every size has a result.
                holds=falls if all(math.isfinite(loss) for loss in losses) else None,
                provisional=caveats,
            )
        )
    if law is not None:
        interval = law.interval["E"] if law.interval else None
        claims.append(
            Claim(
                id=f"heavy-decay.limit.{tokens}",
                text=f"{at}the N to infinity limit of tuned single models is below the best standard loss",
                value=f"{law.E:.4f} nats (alpha {law.alpha:.2f})",
                paper="3.43 at 200M tokens, alpha 1.02 (best standard 3.75), section 5",
                interval=interval,
                seeds=seeds,
                # Not the fitted value alone: the whole interval must be below the best standard loss.
                holds=None if interval is None else interval[1] < base,
                provisional=caveats if law.interval else (*caveats, law.note.rstrip(".")),
            )
        )
    return claims


def _table(study: Study, tokens: int) -> Table:
    rows: list[tuple[Any, ...]] = []
    for model in study.scale.models:
        search, result = study.search(TUNED, model, tokens), best(study, model, tokens)
        point, tried = result.point, search.descent.tried
        if point is None or not result:
            rows.append((model, *(None,) * 6, 0, tried, "no result yet"))
            continue
        tau, noise = round(result.runs[0].tau, 3), seed_noise(study.records, model, tokens)
        outcome = (result.mean, len(result.records), tried, str(search.certificate(noise)))
        rows.append((model, result.parameters, point.lr, point.epochs, point.wd, tau, *outcome))
    return Table(
        title=f"Tuned single models, D = {tokens:,} tokens (tau: averaging window in epochs)",
        columns=("model", "N", "lr", "epochs", "wd", "tau", "loss", "seeds", "runs tried", "search"),
        rows=tuple(rows),
    )


def _early_table(stops: list[EarlyStop]) -> Table:
    return Table(
        title="Early stopping: would the best run so far at a share of the steps have won?",
        columns=("share of steps", "stars", "same winner", "worst loss (nats)"),
        rows=tuple((stop.share, stop.stars, stop.same, stop.worst) for stop in stops),
    )


def _early_note(stops: list[EarlyStop]) -> str:
    misled = [stop for stop in stops if stop.same < stop.stars]
    rule = "Runs are stopped early only when they diverge."
    if not misled:
        return (
            f"Early stopping would have kept every winner here, but heavy decay can mislead it (spec section 5). {rule}"
        )
    worst = max(misled, key=lambda stop: stop.worst)
    return (
        f"At {worst.share:.0%} of the steps {worst.stars - worst.same} of {worst.stars} searches have another leader than at "
        f"the end, which would cost up to {worst.worst:.4f} nats. {rule}"
    )


def _figures(study: Study, tokens: int, law: PowerLaw | None) -> list[Figure]:
    tuned = [(r.parameters, r.mean) for m in study.scale.models if (r := best(study, m, tokens))]
    baseline = [study.best(epoching.standard(study), model, tokens) for model in study.scale.models]
    standard = [(r.parameters, r.losses[0]) for r in baseline if 0 in r.losses]
    if not tuned:
        return []

    def draw(axes: Any) -> None:
        if standard:
            label = f"standard, wd {study.scale.standard_wd:g}"
            draw_series(axes, [n for n, _ in standard], [y for _, y in standard], label=label)
        sizes, losses = [n for n, _ in tuned], [y for _, y in tuned]
        line = draw_series(axes, sizes, losses, label="tuned decay", join=law is None)
        if law is not None:
            draw_law(axes, law, sizes[0], 4 * sizes[-1], label="E + A / N^alpha", color=line.get_color())
        axes.set_xscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend()

    caption = f"Loss against N at D = {tokens:,}: best standard and best tuned runs, and the law in N."
    return [Figure(name=f"loss-against-size-{tokens}", caption=caption, draw=draw)]
