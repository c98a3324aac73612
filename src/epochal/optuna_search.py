"""Optuna as another way to search the same grid over the same records (pip install optuna).

Trials are asked for in rounds from a seeded sampler and told in the order they were asked, so the same records always give
the same questions: nothing is stored but the records. The best trial starts a coordinate descent, because a sampler
gives no certificate.
"""

import warnings

from epochal.tuner import Descent, Grid, LossOf, Point, descend

ROUND = 4
"""Trials asked for together; a sampler learns only between rounds."""

DIVERGED = 1e3
"""What a sampler is told for a diverged run (nats): it needs a number, and none is so high."""


def sample(loss_of: LossOf, start: Point, grid: Grid, *, trials: int, seed: int = 0) -> Descent:
    """Let Optuna's TPE sampler choose `trials` points, the start first, then certify from the best of them.

    Raises ValueError when optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("search is 'optuna', which is not installed; run pip install optuna.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=2 * ROUND))
    # places on the grid and not values: its steps are equal in the logarithm, which is what the losses follow
    axes = {field: optuna.distributions.IntDistribution(0, len(values) - 1) for field, values in grid.items()}
    study.enqueue_trial({field: values.index(start.get(field)) for field, values in grid.items()})
    asked: dict[Point, float] = {}
    visited: dict[Point, None] = {}
    for first in range(0, trials, ROUND):
        batch = [study.ask(axes) for _ in range(min(ROUND, trials - first))]
        points = [_point(start, trial.params, grid) for trial in batch]
        visited.update(dict.fromkeys(points))
        losses = {point: loss_of(point) for point in points}
        wanted = tuple(point for point, loss in losses.items() if loss is None)
        known = asked | {point: loss for point, loss in losses.items() if loss is not None}
        if wanted:
            best = min(known, key=lambda point: (known[point], point), default=None)
            return Descent(best, wanted, tuple(visited), ())
        asked = known
        for trial, point in zip(batch, points, strict=True):
            study.tell(trial, min(asked[point], DIVERGED))
    best = min(asked, key=lambda point: (asked[point], point))
    end = descend(loss_of, best, grid)
    return Descent(end.best, end.wanted, tuple(visited | dict.fromkeys(end.visited)), end.edges)


def _point(start: Point, places: dict[str, int], grid: Grid) -> Point:
    point = start
    for field, values in grid.items():
        point = point.at(field, values[places[field]])
    return point
