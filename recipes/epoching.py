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
from epochal.tuner import Descent, Point, descend


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return needed(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the searches so far, and one sweep of epochs at the standard decay."""
    found: list[Job] = []
    for tokens in scale.budgets:
        for model in scale.standard_models(tokens):
            search = standard(records, scale, model, tokens)
            found += [scale.run(model, tokens, point) for point in search.visited]
    return found + list(sweep(scale))


def standard(records: Records, scale: Scale, model: str, tokens: int) -> Descent:
    """Return the search of lr and epochs at the standard decay for one size and budget."""
    grid = {"lr": scale.grid.lr, "epochs": scale.grid.epochs}

    def loss_of(point: Point) -> float | None:
        record = records.get(scale.run(model, tokens, point))
        return None if record is None else record.loss

    return descend(loss_of, scale.standard_start(scale.rung(model)), grid)


def sweep(scale: Scale) -> list[Run]:
    """Return the runs over all epochs of the grid, all else at the standard start of one size."""
    if not scale.epoching:
        return []
    start = scale.standard_start(scale.rung(scale.epoching))
    points = [Point(lr=start.lr, epochs=epochs, wd=start.wd) for epochs in scale.grid.epochs]
    return [scale.run(scale.epoching, scale.unique_tokens[0], point) for point in points]


def best_standard(records: Records, scale: Scale, tokens: int) -> tuple[float, Run | None, tuple[str, ...]]:
    """Return the best standard loss over all sizes, its Run, and what is missing for calling it an optimum."""
    best, run, missing = math.inf, None, list[str]()
    for model in scale.standard_models(tokens):
        search = standard(records, scale, model, tokens)
        if not search.certified:
            missing.append(f"neighbours of {model} at wd {scale.standard_wd:g}")
        if search.best is None:
            continue
        candidate = scale.run(model, tokens, search.best)
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
        record = records.get(scale.run(rung.model, tokens, Point(lr=start.lr, epochs=epochs, wd=start.wd)))
        if record is not None and math.isfinite(record.loss):
            losses[rung.model] = record.loss
    return losses


def _few_seeds(seeds: int) -> tuple[str, ...]:
    return ("one seed",) if seeds < 2 else ()


def _table(records: Records, scale: Scale, tokens: int) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for model in scale.standard_models(tokens):
        search = standard(records, scale, model, tokens)
        point = search.best
        record = records.get(scale.run(model, tokens, point)) if point else None
        if point is None or record is None:
            rows.append((model, None, None, None, None, "no result yet"))
            continue
        state = "all neighbours run" if search.certified else f"{len(search.wanted)} neighbours missing"
        edge = f"; {', '.join(search.edges)} at the end of the grid" if search.edges else ""
        rows.append((model, record.results["parameters"], point.lr, point.epochs, record.loss, f"{state}{edge}"))
    return Table(
        title=f"Best standard runs, D = {tokens:,} tokens, wd {scale.standard_wd:g}",
        columns=("model", "N", "lr", "epochs", "loss", "search"),
        rows=tuple(rows),
    )


def _figures(records: Records, scale: Scale) -> tuple[Figure, ...]:
    by_model: dict[str, dict[int, float]] = {}
    for record in records:
        run = record.job
        rung = next((rung for rung in scale.ladder if isinstance(run, Run) and rung.model == run.model), None)
        if rung is None or not isinstance(run, Run) or not math.isfinite(record.loss):
            continue
        start = scale.standard_start(rung)
        point = Point(lr=start.lr, epochs=run.epochs, wd=start.wd)
        if run == scale.run(run.model, scale.unique_tokens[0], point):
            by_model.setdefault(run.model, {})[run.epochs] = record.loss
    if not by_model:
        return ()

    def draw(axes: object) -> None:
        for rung in scale.ladder:
            curve = sorted(by_model.get(rung.model, {}).items())
            if curve:
                draw_series(axes, [e for e, _ in curve], [loss for _, loss in curve], label=rung.model)
        axes.set_xscale("log", base=2)  # type: ignore[attr-defined]
        axes.set_xlabel("epochs")  # type: ignore[attr-defined]
        axes.set_ylabel("validation loss (nats per token)")  # type: ignore[attr-defined]
        axes.legend()  # type: ignore[attr-defined]

    caption = f"Loss against epochs at wd {scale.standard_wd:g}, D = {scale.unique_tokens[0]:,} tokens."
    return (Figure(name="loss-against-epochs", caption=caption, draw=draw),)
