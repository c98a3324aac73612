"""Does heavy weight decay make loss fall with size again, and to which limit? (Spec section 5.)

Claim: with lr, epochs and decay tuned together for every size, loss falls monotonically in N and follows a power law.
Command: epochal run heavy_weight_decay --scale demo
Found: recipes/results/<scale>/report.md
"""

import math
from itertools import pairwise
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job
from epochal.scale import Scale
from epochal.scaling import PowerLaw, fit_power_law
from epochal.search.descent import Descent
from epochal.search.searches import EarlyStop, Search, early_stops, seed_noise, single_search
from recipes import epoching


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the standard searches to compare with, the joint searches, their seeds."""
    found: list[Job] = epoching.jobs(records, scale)
    for tokens in scale.unique_tokens:
        for rung in scale.ladder:
            here = search(records, scale, rung.model, tokens)
            found += here.jobs
            if here.descent.certified and here.descent.best is not None:
                found += [scale.run(rung.model, tokens, here.descent.best, seed=seed) for seed in range(1, scale.seeds)]
    return found


def tuned(records: Records, scale: Scale, model: str, tokens: int) -> Descent:
    """Return where the joint search of lr, epochs and decay stands for one size and budget."""
    return search(records, scale, model, tokens).descent


def search(records: Records, scale: Scale, model: str, tokens: int) -> Search:
    """Return the joint search of lr, epochs, decay and what else the grid names, for one size and budget."""
    start = scale.regularized_start(scale.rung(model), tokens)
    if start is None:
        below = tuned(records, scale, scale.smaller(model), tokens)
        start = below.best if below.certified else None
    # decay matters most, then epochs (spec section 12)
    grid = scale.grid.values("wd", "epochs", "lr")
    return single_search(records, scale, model, tokens, start, grid, f"{model} tuned, D = {tokens:,}")


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return every search of this recipe, those it is compared with first: what `epochal plan` shows."""
    own = [search(records, scale, rung.model, tokens) for tokens in scale.unique_tokens for rung in scale.ladder]
    return epoching.searches(records, scale) + own


def best_records(records: Records, scale: Scale, model: str, tokens: int) -> list[Record]:
    """Return the records of the best point of one size, one for each seed that has run."""
    point = tuned(records, scale, model, tokens).best
    if point is None:
        return []
    found = [records.get(scale.run(model, tokens, point, seed=seed)) for seed in range(scale.seeds)]
    return [record for record in found if record is not None and math.isfinite(record.loss)]


def best_single(records: Records, scale: Scale, tokens: int) -> tuple[float, str]:
    """Return the lowest seed-mean loss of any tuned single model and its size; (inf, "") before any result."""
    means = {rung.model: _mean(best_records(records, scale, rung.model, tokens)) for rung in scale.ladder}
    best = min(means, key=lambda model: means[model])
    return (means[best], best) if math.isfinite(means[best]) else (math.inf, "")


def size_law(records: Records, scale: Scale, tokens: int) -> PowerLaw | None:
    """Fit E + A / N**alpha to the tuned losses (N in parameters); None with fewer than three sizes."""
    points = [
        (float(record.results["parameters"]), record.loss)
        for rung in scale.ladder
        for record in best_records(records, scale, rung.model, tokens)
    ]
    if len({size for size, _ in points}) < 3:
        return None
    return fit_power_law([size for size, _ in points], [loss for _, loss in points])


def missing(records: Records, scale: Scale, tokens: int) -> tuple[str, ...]:
    """Name what stands between the tuned losses and a final word: neighbours that have not run, and seeds."""
    open_searches = [
        f"neighbours of {rung.model}"
        for rung in scale.ladder
        if not tuned(records, scale, rung.model, tokens).certified
    ]
    return (*open_searches, *(("one seed",) if scale.seeds < 2 else ()))


def report(records: Records, scale: Scale) -> Section:
    """Compare tuned with standard, and extrapolate in N."""
    claims: list[Claim] = []
    tables, figures, notes = [], [], []
    for tokens in scale.unique_tokens:
        law = size_law(records, scale, tokens)
        claims += _claims(records, scale, tokens, law)
        tables.append(_table(records, scale, tokens))
        figures += _figures(records, scale, tokens, law)
        if law is not None and law.note:
            notes.append(f"Law in N at D = {tokens:,}: {law.note}")
    stops = early_stops(records, searches(records, scale))
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


def _mean(records: list[Record]) -> float:
    return sum(record.loss for record in records) / len(records) if records else math.inf


def _claims(records: Records, scale: Scale, tokens: int, law: PowerLaw | None) -> list[Claim]:
    single, model = best_single(records, scale, tokens)
    base, _, missing_standard = epoching.best_standard(records, scale, tokens)
    if not math.isfinite(single) or not math.isfinite(base):
        return []
    seeds = len(best_records(records, scale, model, tokens))
    open_ends = tuple(dict.fromkeys((*missing_standard, *missing(records, scale, tokens))))
    losses = [_mean(best_records(records, scale, rung.model, tokens)) for rung in scale.ladder]
    falls = all(later < earlier for earlier, later in pairwise(losses))
    shown = [f"{loss:.4f}" if math.isfinite(loss) else "none yet" for loss in losses]
    point = tuned(records, scale, model, tokens).best
    assert point is not None
    claims = [
        Claim(
            text=f"D = {tokens:,}: the best tuned single model ({model}) beats the best standard one",
            value=f"{base - single:.4f} nats ({base:.4f} to {single:.4f})",
            paper="0.29 nats at 200M tokens (3.75 to 3.46), sections 4 and 5",
            seeds=seeds,
            holds=single < base,
            provisional=open_ends,
        ),
        Claim(
            text=f"D = {tokens:,}: the best decay of {model} against the usual {scale.standard_wd:g}",
            value=f"{point.wd / scale.standard_wd:.0f} times",
            paper="32 times (3.2 against 0.1), section 5",
            seeds=seeds,
            holds=point.wd > scale.standard_wd,
            provisional=open_ends,
        ),
    ]
    if len(losses) > 1:
        claims.append(
            Claim(
                text=f"D = {tokens:,}: tuned loss falls monotonically with N over {len(losses)} sizes",
                value=(" > " if falls else ", ").join(shown),
                paper="monotone over four sizes, section 5",
                seeds=seeds,
                holds=falls if all(math.isfinite(loss) for loss in losses) else None,
                provisional=open_ends,
            )
        )
    if law is not None:
        interval = law.interval["E"] if law.interval else None
        reasons = open_ends if law.interval else (*open_ends, law.note.rstrip("."))
        claims.append(
            Claim(
                text=f"D = {tokens:,}: the limit N to infinity of tuned single models lies under the best standard loss",
                value=f"{law.E:.4f} nats (alpha {law.alpha:.2f})",
                paper="3.43 at 200M tokens, alpha 1.02 (best standard 3.75), section 5",
                interval=interval,
                seeds=seeds,
                holds=None if interval is None else interval[1] < base,
                provisional=reasons,
            )
        )
    return claims


def _table(records: Records, scale: Scale, tokens: int) -> Table:
    rows: list[tuple[Any, ...]] = []
    for rung in scale.ladder:
        here = search(records, scale, rung.model, tokens)
        found, point = best_records(records, scale, rung.model, tokens), here.descent.best
        if point is None or not found:
            rows.append((rung.model, *(None,) * 6, 0, here.descent.tried, "no result yet"))
            continue
        run = scale.run(rung.model, tokens, point)
        size = found[0].results["parameters"]
        rows.append(
            (
                rung.model,
                size,
                point.lr,
                point.epochs,
                point.wd,
                round(run.tau, 3),
                _mean(found),
                len(found),
                here.descent.tried,
                str(here.certificate(seed_noise(records, rung.model, tokens))),
            )
        )
    return Table(
        title=f"Tuned single models, D = {tokens:,} tokens (tau: averaging window in epochs)",
        columns=("model", "N", "lr", "epochs", "wd", "tau", "loss", "seeds", "runs tried", "search"),
        rows=tuple(rows),
    )


def _early_table(stops: list[EarlyStop]) -> Table:
    return Table(
        title="If only the leader of each star had been kept at a share of its steps",
        columns=("share of steps", "stars", "same winner", "worst loss (nats)"),
        rows=tuple((stop.share, stop.stars, stop.same, stop.worst) for stop in stops),
    )


def _early_note(stops: list[EarlyStop]) -> str:
    misled = [stop for stop in stops if stop.same < stop.stars]
    rule = "runs are stopped early only when they diverge."
    if not misled:
        return f"No star here would have changed its winner, but heavy decay can make it so (spec section 5): {rule}"
    worst = max(misled, key=lambda stop: stop.worst)
    return (
        f"At {worst.share:.0%} of the steps {worst.stars - worst.same} of {worst.stars} stars have another leader than in "
        f"the end, which would cost up to {worst.worst:.4f} nats: {rule}"
    )


def _figures(records: Records, scale: Scale, tokens: int, law: PowerLaw | None) -> list[Figure]:
    standard, regular = [], []
    for rung in scale.ladder:
        found = best_records(records, scale, rung.model, tokens)
        if found:
            regular.append((found[0].results["parameters"], _mean(found)))
        point = epoching.standard(records, scale, rung.model, tokens).best
        record = records.get(scale.run(rung.model, tokens, point)) if point else None
        if record is not None and math.isfinite(record.loss):
            standard.append((record.results["parameters"], record.loss))
    if not regular:
        return []

    def draw(axes: Any) -> None:
        if standard:
            draw_series(
                axes, [n for n, _ in standard], [y for _, y in standard], label=f"standard, wd {scale.standard_wd:g}"
            )
        sizes, losses = [n for n, _ in regular], [y for _, y in regular]
        line = draw_series(axes, sizes, losses, label="tuned decay", join=law is None)
        if law is not None:
            draw_law(axes, law, sizes[0], 4 * sizes[-1], label="E + A / N^alpha", color=line.get_color())
        axes.set_xscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend()

    caption = f"Loss against N at D = {tokens:,}: best standard and best tuned runs, and the law in N."
    return [Figure(name=f"loss-against-size-{tokens}", caption=caption, draw=draw)]
