"""How far do repeated text and bigger models go at ordinary weight decay? (Spec section 4.)

Claim: at the usual decay of 0.1 the loss falls with epochs and with size, then rises: text, not compute, is the limit.
Command: epochal run epoching --scale demo
Found: recipes/results/<scale>/report.md
"""

import math

from epochal.records import Records, needed
from epochal.report import Claim, Figure, Section, Table, draw_series
from epochal.run import Job, Run
from epochal.scale import Scale
from epochal.search import Search, seed_noise, single_search
from epochal.tuner import Descent, Point


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return needed(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the searches so far, and one sweep of epochs at the standard decay."""
    return [*(job for search in searches(records, scale) for job in search.jobs), *sweep(scale)]


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


def _epochs_claim(records: Records, scale: Scale) -> tuple[Claim, ...]:
    curve = _curve(records, sweep(scale))
    if len(curve) < 2:
        return ()
    epochs, low = min(curve, key=lambda pair: pair[1])
    last, high = curve[-1]
    missing = () if len(curve) == len(sweep(scale)) else ("epochs of the sweep",)
    return (
        Claim(
            text=f"{scale.epoching}, wd {scale.standard_wd:g}: more epochs than {epochs} raise the loss again "
            f"({last} epochs against {epochs})",
            value=f"{high - low:+.4f} nats",
            paper="falls, then rises (figure only), section 4",
            holds=high > low,
            provisional=(*missing, *_few_seeds(1)),
        ),
    )


def _size_claim(records: Records, scale: Scale, tokens: int) -> tuple[Claim, ...]:
    """Say whether the loss rises with size, at the most epochs that every size was run for."""
    by_epochs = {epochs: _losses_at(records, scale, tokens, epochs) for epochs in scale.grid.epochs}
    complete = [epochs for epochs, losses in by_epochs.items() if len(losses) == len(scale.ladder)]
    if not complete or len(scale.ladder) < 2:
        return ()
    epochs = max(complete)
    losses = by_epochs[epochs]
    smallest, largest = scale.ladder[0].model, scale.ladder[-1].model
    return (
        Claim(
            text=f"wd {scale.standard_wd:g}, {epochs} epochs: the largest model ({largest}) overfits past the smallest "
            f"({smallest})",
            value=f"{losses[largest] - losses[smallest]:+.4f} nats",
            paper="1.4B above 600M by 0.0146 nats, section 4",
            holds=losses[largest] > losses[smallest],
            provisional=_few_seeds(1),
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


def _few_seeds(seeds: int) -> tuple[str, ...]:
    return ("one seed",) if seeds < 2 else ()


def _table(records: Records, scale: Scale, tokens: int) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for model in scale.standard_models(tokens):
        here = search(records, scale, model, tokens)
        point, certificate = here.descent.best, here.certificate(seed_noise(records, model, tokens))
        record = records.get(scale.run(model, tokens, point)) if point else None
        if point is None or record is None:
            rows.append((model, None, None, None, None, "no result yet"))
            continue
        rows.append((model, record.results["parameters"], point.lr, point.epochs, record.loss, str(certificate)))
    return Table(
        title=f"Best standard runs, D = {tokens:,} tokens, wd {scale.standard_wd:g}",
        columns=("model", "N", "lr", "epochs", "loss", "search"),
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
