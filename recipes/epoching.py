"""How far do repeated text and bigger models go at ordinary weight decay? (Spec section 4.)

Claim: at the usual decay of 0.1 the loss falls with epochs and with size, then rises: text, not compute, is the limit.
Command: epochal run epoching --scale demo
Found: recipes/results/<scale>/report.md
"""

import math
from dataclasses import dataclass, replace

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job, Run
from epochal.scale import Point, Scale
from epochal.search.descent import Descent
from epochal.search.searches import Search, seed_noise, single_search
from recipes._differences import difference_claim


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the searches so far, and one sweep of epochs at the standard decay."""
    found: list[Job] = [job for search in searches(records, scale) for job in search.jobs]
    return list({job.name: job for job in (*found, *sweep(scale), *repeats(records, scale))}.values())


def standard(records: Records, scale: Scale, model: str, tokens: int) -> Descent:
    """Return where the search of lr and epochs at the standard decay stands for one size and budget."""
    return search(records, scale, model, tokens).descent


def search(records: Records, scale: Scale, model: str, tokens: int) -> Search:
    """Return the search of lr and epochs at the standard decay for one size and budget."""
    start = scale.standard_start(scale.rung(model))
    if start is None:
        below = standard(records, scale, scale.smaller(model), tokens)
        start = below.best if below.certified else None
    what = f"{model} at wd {scale.standard_wd:g}, D = {tokens:,}"
    grid = {"lr": scale.grid.lr, "epochs": scale.grid.epochs}
    return single_search(records, scale, model, tokens, start, grid, what)


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return every search of this recipe: what `epochal plan` shows."""
    return [
        search(records, scale, model, tokens) for tokens in scale.budgets for model in scale.standard_models(tokens)
    ]


def sweep(scale: Scale) -> list[Run]:
    """Return the runs over all epochs of the grid, all else at the standard start of one size."""
    if not scale.epoching:
        return []
    start = scale.standard_start(scale.rung(scale.epoching))
    assert start is not None, "Scale refuses an epoching size without a start"
    points = [Point(lr=start.lr, epochs=epochs, wd=start.wd) for epochs in scale.grid.epochs]
    return [scale.run(scale.epoching, scale.unique_tokens[0], point) for point in points]


def repeats(records: Records, scale: Scale) -> list[Run]:
    """Return the runs that both claims compare, with every seed; none before searches and sweep have shown which."""
    tokens = scale.unique_tokens[0]
    searched = all(standard(records, scale, rung.model, tokens).certified for rung in scale.ladder)
    if not searched or len(_curve(records, sweep(scale))) < len(sweep(scale)):
        return []
    compared = (_sweep_ends(records, scale), _size_ends(records, scale, tokens))
    return [run for pair in compared if pair is not None for run in (*pair.before, *pair.after)]


@dataclass(frozen=True)
class Pair:
    """Two settings to compare, each with every seed."""

    before: list[Run]
    after: list[Run]

    def rises(self, records: Records) -> list[float]:
        """Return how far the second is above the first, in nats, for each seed that has run both."""
        found = [(records.get(one), records.get(other)) for one, other in zip(self.before, self.after, strict=True)]
        rises = [other.loss - one.loss for one, other in found if one is not None and other is not None]
        return [rise for rise in rises if math.isfinite(rise)]


def best_runs(records: Records, scale: Scale, tokens: int) -> list[Run]:
    """Return the best standard run of one budget with every seed; none before any has run."""
    _, best, _ = best_standard(records, scale, tokens)
    point = standard(records, scale, best.model, tokens).best if best is not None else None
    return [] if best is None or point is None else _seeds(scale, best.model, tokens, point)


def best_records(records: Records, scale: Scale, tokens: int) -> list[Record]:
    """Return the finite records of the best standard run of one budget, one for each seed that has run."""
    found = [records.get(run) for run in best_runs(records, scale, tokens)]
    return [record for record in found if record is not None and math.isfinite(record.loss)]


def _seeds(scale: Scale, model: str, tokens: int, point: Point) -> list[Run]:
    return [scale.run(model, tokens, point, seed=seed) for seed in range(scale.seeds)]


def best_standard(records: Records, scale: Scale, tokens: int) -> tuple[float, Run | None, tuple[str, ...]]:
    """Return the best standard loss over all sizes, its Run, and what is missing for calling it an optimum."""
    best, run, missing = math.inf, None, list[str]()
    for model in scale.standard_models(tokens):
        here = standard(records, scale, model, tokens)
        if not here.certified:
            missing.append(f"neighbours of {model} at wd {scale.standard_wd:g}")
        if here.best is None:
            continue
        candidate = scale.run(model, tokens, here.best)
        record = records.get(candidate)
        if record is not None and record.loss < best:
            best, run = record.loss, candidate
    return best, run, tuple(missing)


def report(records: Records, scale: Scale) -> Section:
    """Say whether more epochs and bigger models overfit at the standard decay."""
    tokens = scale.unique_tokens[0]
    return Section(
        title="Epoching",
        question=f"How far do repeated text and bigger models go at a weight decay of {scale.standard_wd:g}?",
        claims=(*_epochs_claim(records, scale), *_size_claim(records, scale, tokens)),
        tables=tuple(_table(records, scale, budget) for budget in scale.budgets),
        figures=_figures(records, scale),
    )


def _curve(records: Records, runs: list[Run]) -> list[tuple[int, float]]:
    pairs = [(run.epochs, record.loss) for run in runs if (record := records.get(run)) is not None]
    return [(epochs, loss) for epochs, loss in sorted(pairs) if math.isfinite(loss)]


def _sweep_ends(records: Records, scale: Scale) -> Pair | None:
    """Return the best number of epochs of the sweep and the last one; None with fewer than two results."""
    curve = _curve(records, sweep(scale))
    if len(curve) < 2:
        return None
    best, last = min(curve, key=lambda pair: pair[1])[0], curve[-1][0]
    start = scale.standard_start(scale.rung(scale.epoching))
    assert start is not None, "Scale refuses an epoching size without a start"
    points = (replace(start, epochs=epochs) for epochs in (best, last))
    return Pair(*(_seeds(scale, scale.epoching, scale.unique_tokens[0], point) for point in points))


def _epochs_claim(records: Records, scale: Scale) -> tuple[Claim, ...]:
    pair = _sweep_ends(records, scale)
    if pair is None:
        return ()
    best, last = pair.before[0].epochs, pair.after[0].epochs
    missing = () if len(_curve(records, sweep(scale))) == len(sweep(scale)) else ("epochs of the sweep",)
    return (
        difference_claim(
            f"{scale.epoching}, wd {scale.standard_wd:g}: more epochs than {best} raise the loss again "
            f"({last} epochs against {best})",
            pair.rises(records),
            paper="falls, then rises (figure only), section 4",
            reasons=missing,
        ),
    )


def _size_ends(records: Records, scale: Scale, tokens: int) -> Pair | None:
    """Return the smallest and the largest size at the most epochs that every size was run for."""
    complete = [
        epochs for epochs in scale.grid.epochs if len(_losses_at(records, scale, tokens, epochs)) == len(scale.ladder)
    ]
    if not complete or len(scale.ladder) < 2:
        return None
    ends = []
    for rung in (scale.ladder[0], scale.ladder[-1]):
        start = scale.standard_start(rung)
        assert start is not None, "a size without a start has no loss above"
        ends.append(_seeds(scale, rung.model, tokens, replace(start, epochs=max(complete))))
    return Pair(*ends)


def _size_claim(records: Records, scale: Scale, tokens: int) -> tuple[Claim, ...]:
    """Say whether the loss rises with size, at the most epochs that every size was run for."""
    pair = _size_ends(records, scale, tokens)
    if pair is None:
        return ()
    smallest, largest = pair.before[0], pair.after[0]
    return (
        difference_claim(
            f"wd {scale.standard_wd:g}, {smallest.epochs} epochs: the largest model ({largest.model}) overfits past the "
            f"smallest ({smallest.model})",
            pair.rises(records),
            paper="1.4B above 600M by 0.0146 nats, section 4",
        ),
    )


def _losses_at(records: Records, scale: Scale, tokens: int, epochs: int) -> dict[str, float]:
    """Return the finite losses of all sizes at one number of epochs, each at the lr its search starts from."""
    losses = {}
    for rung in scale.ladder:
        start = scale.standard_start(rung)
        if start is None:
            continue
        record = records.get(scale.run(rung.model, tokens, Point(lr=start.lr, epochs=epochs, wd=start.wd)))
        if record is not None and math.isfinite(record.loss):
            losses[rung.model] = record.loss
    return losses


def _table(records: Records, scale: Scale, tokens: int) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for model in scale.standard_models(tokens):
        here = search(records, scale, model, tokens)
        point, certificate = here.descent.best, here.certificate(seed_noise(records, model, tokens))
        record = records.get(scale.run(model, tokens, point)) if point else None
        if point is None or record is None:
            rows.append((model, None, None, None, None, here.descent.tried, "no result yet"))
            continue
        size, tried = record.results["parameters"], here.descent.tried
        rows.append((model, size, point.lr, point.epochs, record.loss, tried, str(certificate)))
    return Table(
        title=f"Best standard runs, D = {tokens:,} tokens, wd {scale.standard_wd:g}",
        columns=("model", "N", "lr", "epochs", "loss", "runs tried", "search"),
        rows=tuple(rows),
    )


def _figures(records: Records, scale: Scale) -> tuple[Figure, ...]:
    tokens = scale.unique_tokens[0]
    by_epochs = {epochs: _losses_at(records, scale, tokens, epochs) for epochs in scale.grid.epochs}
    if not any(by_epochs.values()):
        return ()

    def draw(axes: object) -> None:
        for rung in scale.ladder:
            curve = [(epochs, losses[rung.model]) for epochs, losses in by_epochs.items() if rung.model in losses]
            if curve:
                draw_series(axes, [e for e, _ in curve], [loss for _, loss in curve], label=rung.model)
        axes.set_xscale("log", base=2)  # type: ignore[attr-defined]
        axes.set_xlabel("epochs")  # type: ignore[attr-defined]
        axes.set_ylabel("validation loss (nats per token)")  # type: ignore[attr-defined]
        axes.legend()  # type: ignore[attr-defined]

    caption = f"Loss against epochs at wd {scale.standard_wd:g}, D = {tokens:,} tokens."
    return (Figure(name="loss-against-epochs", caption=caption, draw=draw),)
