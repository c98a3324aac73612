"""How far do repeated text and larger models go at ordinary weight decay? (Spec section 4.)

Claim: at the usual decay of 0.1 the loss falls with epochs and with size, then rises: text, not compute, is the limit.
Command: epochal run epoching --scale demo
Results: recipes/results/<scale>/report.md
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from epochal.ranges import Items, Ranged, Tokens
from epochal.report.claims import FEWEST_SEEDS, Claim
from epochal.report.comparison import difference_claim
from epochal.report.figures import draw_series, size_color
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job, Run
from epochal.scale import Scale
from epochal.search.searches import Search, seed_noise
from epochal.study import NOTHING, Arm, Result, Study


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """What runs in addition to the searches."""

    sweep_model: str = ""  # a size that also runs every number of epochs of the grid
    # Budgets at which only the standard recipe runs: further points for its law in D at a fraction of the cost of a
    # whole budget.
    data_scaling_tokens: Annotated[tuple[Tokens, ...], Items(least=0)] = ()
    data_scaling_models: Annotated[
        tuple[str, ...], Items(least=0)
    ] = ()  # sizes of the standard recipe at these budgets

    def check(self, scale: Scale) -> None:
        """Refuse models without a start and budgets that the batch does not divide."""
        if bool(self.data_scaling_tokens) != bool(self.data_scaling_models):
            raise ValueError("data_scaling_tokens and data_scaling_models must be given together.")
        models = (*self.data_scaling_models, *([self.sweep_model] if self.sweep_model else []))
        scale.check_models("sweep_model and data_scaling_models", *models, started=True)
        for tokens in self.data_scaling_tokens:
            scale.check_budget(tokens)


def settings(study: Study) -> Settings:
    """Return the settings of this recipe."""
    return study.settings(Settings) or Settings()


def standard(study: Study) -> Arm:
    """Return the baseline: lr and epochs tuned at the usual weight decay."""
    wd = study.scale.standard_wd
    return Arm(f"at wd {wd:g}", tune=("lr", "epochs"), wd=wd)


def budgets(study: Study) -> dict[int, tuple[str, ...]]:
    """Return the sizes of the standard recipe at every budget D, ascending."""
    here, scale = settings(study), study.scale
    models = dict.fromkeys(here.data_scaling_tokens, here.data_scaling_models)
    models |= {tokens: scale.models_at(tokens) for tokens in scale.unique_tokens}
    return dict(sorted(models.items()))


def plan(study: Study) -> list[Job]:
    """Return every job that can be named: the searches so far, the sweep over epochs, and seeds of what claims compare."""
    return [*(job for search in searches(study) for job in search.jobs), *sweep(study), *repeats(study)]


def searches(study: Study) -> list[Search]:
    """Return the search of every budget and size."""
    arm = standard(study)
    return [study.search(arm, model, tokens) for tokens, models in budgets(study).items() for model in models]


def sweep(study: Study) -> list[Run]:
    """Return one size at every number of epochs of the grid, at its standard start."""
    model, tokens = settings(study).sweep_model, study.scale.unique_tokens[0]
    if not model:
        return []
    return [_at_epochs(study, model, tokens, epochs)[0] for epochs in study.scale.grid.epochs]


def _at_epochs(study: Study, model: str, tokens: int, epochs: int) -> tuple[Run, ...]:
    """Return the seeds of one size at its standard start, with another number of epochs; none if it has no start."""
    arm = standard(study)
    start = study.scale.start(study.scale.rung(model), tokens, wd=arm.wd)
    # No more seeds than an interval takes: overfitting is far above their noise, and the longest runs cost the most.
    seeds = min(study.scale.seeds, FEWEST_SEEDS)
    return () if start is None else study.seeds(arm, model, tokens, replace(start, epochs=epochs), seeds)


def repeats(study: Study) -> list[Run]:
    """Return all seeds of the runs that the two claims compare."""
    # Not before the searches and the sweep have ended: until then other runs may be the ones to compare.
    tokens, arm, swept = study.scale.unique_tokens[0], standard(study), sweep(study)
    searched = all(study.tuned(arm, model, tokens).certified for model in study.scale.models)
    if not searched or len(_curve(study, swept)) < len(swept):
        return []
    return [run for pair in (_sweep_ends(study), _size_ends(study)) for runs in pair for run in runs]


# Two settings to compare, each with every seed; two empty tuples before both are known.
Pair = tuple[tuple[Run, ...], tuple[Run, ...]]


def rises(study: Study, pair: Pair) -> list[float]:
    """Return how far the second setting is above the first, in nats, by seed."""
    before, after = (study.finite(dict(enumerate(runs))) for runs in pair)
    return [after[seed].test_loss - before[seed].test_loss for seed in before if seed in after]


def best_standard(study: Study, tokens: int) -> Result:
    """Return the best standard result of one budget over all sizes."""
    # By the loss of the first seed, which every size has; further seeds are run for the best size only.
    arm, best = standard(study), NOTHING
    for model in budgets(study)[tokens]:
        result = study.best(arm, model, tokens)
        if first_loss(study, result) < first_loss(study, best):
            best = result
    return best


def first_loss(study: Study, result: Result) -> float:
    """Return the loss of a result's first seed, which the search saw; inf without one."""
    loss = study.loss(result.runs[0]) if result.runs else None
    return math.inf if loss is None else loss


def missing(study: Study, tokens: int) -> tuple[str, ...]:
    """Name the standard searches of one budget that have no certificate yet."""
    arm = standard(study)
    return tuple(
        f"neighbors of {m} {arm.label}" for m in budgets(study)[tokens] if not study.tuned(arm, m, tokens).certified
    )


def caveats(study: Study, *tokens: int) -> tuple[str, ...]:
    """Name what the standard losses of these budgets lack for a final verdict."""
    return study.caveats(standard(study), {d: budgets(study)[d] for d in tokens})


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Report whether more epochs and larger models overfit at the standard decay."""
    return Section(
        title="Epoching",
        question=f"How far do repeated text and bigger models go at a weight decay of {study.scale.standard_wd:g}?",
        claims=(*_epochs_claim(study), *_size_claim(study)),
        tables=tuple(_table(study, tokens) for tokens in budgets(study)),
        figures=_figures(study),
    )


def _curve(study: Study, runs: list[Run]) -> list[tuple[int, float]]:
    return [(record.job.epochs, record.loss) for _, record in sorted(study.finite({r.epochs: r for r in runs}).items())]  # type: ignore[union-attr]


def _sweep_ends(study: Study) -> Pair:
    """Return the best number of epochs of the sweep and the last one."""
    curve, here = _curve(study, sweep(study)), settings(study)
    if len(curve) < 2:
        return (), ()
    best, last = min(curve, key=lambda pair: pair[1])[0], curve[-1][0]
    tokens = study.scale.unique_tokens[0]
    return _at_epochs(study, here.sweep_model, tokens, best), _at_epochs(study, here.sweep_model, tokens, last)


def _epochs_claim(study: Study) -> tuple[Claim, ...]:
    pair = _sweep_ends(study)
    if not pair[0]:
        return ()
    best, last, swept = pair[0][0].epochs, pair[1][0].epochs, sweep(study)
    return (
        difference_claim(
            f"{settings(study).sweep_model}, wd {study.scale.standard_wd:g}: more epochs than {best} raise the loss again "
            f"({last} epochs against {best})",
            rises(study, pair),
            id="epoching.epochs",
            paper="falls, then rises (figure only), section 4",
            caveats=() if len(_curve(study, swept)) == len(swept) else ("epochs of the sweep",),
        ),
    )


def _size_ends(study: Study) -> Pair:
    """Return the smallest and largest size at the most epochs that all sizes have."""
    tokens, models = study.scale.unique_tokens[0], study.scale.models
    complete = [epochs for epochs in study.scale.grid.epochs if len(_losses_at(study, tokens, epochs)) == len(models)]
    if not complete or len(models) < 2:
        return (), ()
    return _at_epochs(study, models[0], tokens, max(complete)), _at_epochs(study, models[-1], tokens, max(complete))


def _size_claim(study: Study) -> tuple[Claim, ...]:
    pair = _size_ends(study)
    if not pair[0]:
        return ()
    smallest, largest = pair[0][0], pair[1][0]
    return (
        difference_claim(
            f"wd {study.scale.standard_wd:g}, {smallest.epochs} epochs: the largest model ({largest.model}) overfits past the "
            f"smallest ({smallest.model})",
            rises(study, pair),
            id="epoching.size",
            paper="1.4B above 600M by 0.0146 nats, section 4",
            size=0.0146,
        ),
    )


def _losses_at(study: Study, tokens: int, epochs: int) -> dict[str, float]:
    """Return the finite losses of all sizes at one number of epochs."""
    # Each at the lr that its search starts from.
    runs = {model: run for model in study.scale.models for run in _at_epochs(study, model, tokens, epochs)[:1]}
    # By name, because `AssumeAllDone` has a loss for every other run too.
    losses = {model: study.loss(run) for model, run in runs.items() if study.records.named(run.name) is not None}
    return {model: loss for model, loss in losses.items() if loss is not None and math.isfinite(loss)}


def _table(study: Study, tokens: int) -> Table:
    rows: list[tuple[Any, ...]] = []
    for model in budgets(study)[tokens]:
        search = study.search(standard(study), model, tokens)
        result, tried = study.best(standard(study), model, tokens), search.descent.tried
        if result.point is None or not result:
            rows.append((model, *(None,) * 5, 0, tried, "no result yet"))
            continue
        certificate = search.certificate(seed_noise(study.records, model, tokens))
        setting = (model, result.parameters, result.point.lr, result.point.epochs)
        rows.append((*setting, result.validation, result.mean, len(result.records), tried, str(certificate)))
    return Table(
        title=f"Best standard runs, D = {tokens:,} tokens, wd {study.scale.standard_wd:g}",
        columns=("model", "N", "lr", "epochs", "validation loss", "test loss", "seeds", "runs tried", "search"),
        rows=tuple(rows),
    )


def _figures(study: Study) -> tuple[Figure, ...]:
    tokens = study.scale.unique_tokens[0]
    by_epochs = {epochs: _losses_at(study, tokens, epochs) for epochs in study.scale.grid.epochs}
    if not any(by_epochs.values()):
        return ()

    def draw(axes: Any) -> None:
        for model in study.scale.models:
            curve = [(epochs, losses[model]) for epochs, losses in by_epochs.items() if model in losses]
            if curve:
                draw_series(
                    axes,
                    [e for e, _ in curve],
                    [loss for _, loss in curve],
                    label=model,
                    color=size_color(study.scale.models, model),
                )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("epochs")
        axes.set_ylabel("validation loss (nats per token)")

    caption = f"Loss against epochs at wd {study.scale.standard_wd:g}, D = {tokens:,} tokens."
    return (Figure(name="loss-against-epochs", caption=caption, draw=draw),)
