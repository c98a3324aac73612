"""What recipes ask of a campaign: arms, their tuned points, and the records there.

An `Arm` is one row of a comparison: a label, what it changes in the scale's base run, and what is tuned with it. A `Study`
answers questions about arms from the records: where an arm was tuned to, which runs are its seeds, what they reached.
Answers are memoized, because a plan asks the same ones many times. A missing result is one value, `NOTHING`.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from epochal.config import from_table
from epochal.records import Record, Records
from epochal.run import Job, Optimizer, Run
from epochal.scale import Point, Scale, Value
from epochal.search.descent import NOT_STARTED, Descent, Noise, descend, pooled_noise
from epochal.search.searches import Search, seed_noise

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# Seeds other than the first from which a result leaves the first one out: fewer have no interval.
FEWEST_FRESH = 3


@dataclass(frozen=True)
class Arm:
    """One row of a comparison.

    It has a label, what it changes in the scale's base run, and what is tuned with it.
    """

    label: str
    optimizer: Optimizer | None = None  # replaces the scale's; its lr and wd are tuned
    # Learning rates are those of the grid times this, and decays divided by it, so that lr * wd is the same for all
    # arms.
    lr_factor: float = 1.0
    # further fields of the Run that differ; dotted names reach into the optimizer
    run: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tune: tuple[str, ...] = ("wd", "epochs", "lr")  # the fields that a descent tunes, in this order
    # Values of tuned fields other than lr, epochs and wd; the first value is the start.
    grids: Mapping[str, tuple[Value, ...]] = field(default_factory=dict, hash=False)
    wd: float | None = None  # fixes the decay


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A full grid for one size and budget: every lr with every wd at a fixed number of epochs, then seeds at the best."""

    model: str
    tokens: int  # D
    epochs: int
    lr: tuple[float, ...]  # every one is run with every wd
    wd: tuple[float, ...]
    seeds: int = 3  # at the best point

    @property
    def title(self) -> str:
        """The text of this sweep, as claims name it."""
        passes = "one pass" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{passes} over {self.tokens:,} tokens"


@dataclass(frozen=True)
class Result:
    """The best known point of an arm, with its runs; falsy while there is no finite record."""

    point: Point | None = None
    runs: tuple[Run, ...] = ()  # all seeds at the point
    # Finite ones by seed, without the first seed once `FEWEST_FRESH` others have run.
    records: Mapping[int, Record] = field(default_factory=dict)
    settled: bool = False  # The grid is complete, or every neighbor of the point was run and is not better.
    edges: tuple[str, ...] = ()  # tuned fields whose grid ends at the point
    tried: int = 0  # runs of the first seed that the search cost
    tied: tuple[float, ...] = ()  # first-seed losses of the point and of the neighbors within noise of it

    def __bool__(self) -> bool:
        return bool(self.records)

    @property
    def losses(self) -> dict[int, float]:
        """Test losses in nats by seed."""
        return {seed: record.test_loss for seed, record in self.records.items()}

    @property
    def mean(self) -> float:
        """Mean test loss over seeds in nats; inf without any."""
        return statistics.fmean(self.losses.values()) if self.records else math.inf

    @property
    def validation(self) -> float:
        """Mean validation loss over seeds in nats, by which models are chosen; inf without any."""
        return statistics.fmean(record.loss for record in self.records.values()) if self.records else math.inf

    @property
    def parameters(self) -> int:
        """Parameters of the model; raises StopIteration without a record."""
        return int(next(iter(self.records.values())).results["parameters"])


NOTHING = Result()


def memoized(method: F) -> F:
    """Keep the answers of a Study's method."""
    # They depend on its arguments and on records that do not change. Not functools.cache, which would keep every Study.

    @functools.wraps(method)
    def ask(self: "Study", *args: Any) -> Any:
        key = (method.__name__, *args)
        if key not in self._answers:
            self._answers[key] = method(self, *args)
        return self._answers[key]

    return cast(F, ask)


class Study:
    """The records and the scale of one campaign, with memoized answers about arms."""

    def __init__(self, records: Records, scale: Scale) -> None:
        self.records = records
        self.scale = scale
        self._answers: dict[tuple[Any, ...], Any] = {}

    def settings(self, cls: type[T]) -> T | None:
        """Return the settings of the recipe that defines `cls`, from its table in the scale; None without a table.

        Raises ValueError for unknown keys and wrong types, and what `cls.check(scale)` raises if it has that method.
        """
        recipe = cls.__module__.rpartition(".")[2].lstrip("_")
        return cast("T | None", self._settings(recipe, cls))

    @memoized
    def _settings(self, recipe: str, cls: Any) -> Any:
        table = self.scale.tables.get(recipe)
        if table is None:
            return None
        where = f"scale {self.scale.name!r}, [{recipe}]"
        settings = from_table(table, cls, where=where)
        if hasattr(settings, "check"):
            try:
                settings.check(self.scale)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return settings

    # --- one run -----------------------------------------------------------------------------------------------------

    @memoized
    def run(self, arm: Arm, model: str, tokens: int, point: Point, seed: int = 0) -> Run:
        """Return the run of an arm at a point."""
        # The point is in the arm's own lr and wd, after its `lr_factor`.
        changes = dict(arm.run)
        inner = {name: changes.pop(name) for name in arm.run if "." in name}
        if arm.optimizer is not None:
            changes["optimizer"] = arm.optimizer
        run = self.scale.run(model, tokens, point, seed=seed, **changes)
        return self.scale.changed(run, inner) if inner else run

    def loss(self, job: Job) -> float | None:
        """Return the validation loss of a job in nats: inf if it diverged, None before it has run."""
        record = self.records.get(job)
        return None if record is None else record.loss

    def test_loss(self, job: Job) -> float | None:
        """Return the test loss of a job in nats: inf if it diverged, None before it has run."""
        record = self.records.get(job)
        return None if record is None else record.test_loss

    @property
    def judged_seeds(self) -> int:
        """How many seeds of a tuned setting claims judge once all have run."""
        return judged_of(self.scale.seeds)

    def finite(self, jobs: Mapping[int, Job]) -> dict[int, Record]:
        """Return the records of the jobs that did not diverge, under the same keys."""
        records = {key: self.records.get(job) for key, job in jobs.items()}
        return {key: record for key, record in records.items() if record is not None and math.isfinite(record.loss)}

    # --- tuned by coordinate descent, from the start that the ladder gives --------------------------------------------

    @memoized
    def search(self, arm: Arm, model: str, tokens: int) -> Search:
        """Return the search of one size and budget; it starts at the smaller size's optimum if the rung gives no start."""
        start = self.scale.start(self.scale.rung(model), tokens, wd=arm.wd)
        if start is None:
            smaller = self.tuned(arm, self.scale.smaller(model, tokens), tokens)
            # Only from a certified optimum: a start that moves later would change every run of this search.
            start = smaller.best if smaller.certified else None
        elif arm.grids:
            start = Point(start.lr, start.epochs, start.wd, tuple((name, g[0]) for name, g in arm.grids.items()))
        grid = {name: getattr(self.scale.grid, name) for name in arm.tune} | dict(arm.grids)

        def loss_of(point: Point) -> float | None:
            return self.loss(self.run(arm, model, tokens, point))

        def jobs_of(point: Point) -> tuple[Job, ...]:
            return (self.run(arm, model, tokens, point),)

        known = self.known_points(arm, model, tokens)
        return self.descend(f"{model} {arm.label}, D = {tokens:,}", model, tokens, start, grid, loss_of, jobs_of, known)

    @memoized
    def known_points(self, arm: Arm, model: str, tokens: int) -> tuple[Point, ...]:
        """Return every point at which the arm's first seed has a record.

        On its grid or not, and from any recipe.
        """
        more = [tuple(zip(arm.grids, values, strict=True)) for values in itertools.product(*arm.grids.values())]
        runs = self._runs.get((model, tokens), ())
        settings = dict.fromkeys((run.optimizer.lr, run.epochs, run.optimizer.wd) for run in runs)
        points = [Point(*setting, extra) for setting in settings for extra in more if arm.wd in (None, setting[2])]
        # By name: `AssumeAllDone` has a made-up loss for every job, but names real records only.
        return tuple(p for p in points if self.records.named(self.run(arm, model, tokens, p).name) is not None)

    @functools.cached_property
    def _runs(self) -> dict[tuple[str, int], list[Run]]:
        runs: dict[tuple[str, int], list[Run]] = {}
        for record in self.records:
            if isinstance(record.job, Run):
                runs.setdefault((record.job.model, record.job.unique_tokens), []).append(record.job)
        return runs

    def better_off_grid(self, arm: Arm, model: str, tokens: int) -> Point | None:
        """Return the best known point if no search can reach it; None otherwise."""
        search = self.search(arm, model, tokens)
        losses = {
            point: loss
            for point in (*self.known_points(arm, model, tokens), *search.descent.visited)
            if (loss := search.loss_of(point)) is not None
        }
        best = min(losses, key=lambda point: (losses[point], point), default=None)
        found = search.descent.best
        return best if found is not None and best is not None and losses[best] < losses[found] else None

    def descend(
        self,
        title: str,
        model: str,
        tokens: int,
        start: Point | None,
        grid: Mapping[str, tuple[Value, ...]],
        loss_of: Callable[[Point], float | None],
        jobs_of: Callable[[Point], tuple[Job, ...]],
        known: Iterable[Point] = (),
    ) -> Search:
        """Return a search over `grid` as far as the records lead it; a start of None waits."""
        descent = NOT_STARTED if start is None else descend(loss_of, start, grid, self.scale.search_mode, known)
        return Search(title, model, tokens, grid, loss_of, jobs_of, descent)

    def tuned(self, arm: Arm, model: str, tokens: int) -> Descent:
        """Return where the search of one size and budget stands."""
        return self.search(arm, model, tokens).descent

    @memoized
    def best(self, arm: Arm, model: str, tokens: int) -> Result:
        """Return the best known point of a descent, with the records of all seeds there."""
        search = self.search(arm, model, tokens)
        point, certificate = search.descent.best, search.certificate(self._noise(arm, model, tokens))
        if point is None or certificate is None:
            return NOTHING
        known = (search.descent.certified, certificate.edges, search.descent.tried)
        result = self._result(arm, model, tokens, point, self.scale.seeds, *known)
        losses = (search.loss_of(tie) for tie in (point, *certificate.ties))
        return replace(result, tied=tuple(loss for loss in losses if loss is not None and math.isfinite(loss)))

    def caveats(self, arm: Arm, budgets: Mapping[int, tuple[str, ...]]) -> tuple[str, ...]:
        """Name what the tuned losses of these sizes and budgets lack for a final verdict.

        Neighbors that have not run, optima at the end of their grid, and better runs that the grid cannot reach.
        """
        cells = [(model, tokens) for tokens, models in budgets.items() for model in models]
        fixed = f" {arm.label}" if arm.wd is not None else ""
        waiting = [f"neighbors of {cell[0]}{fixed}" for cell in cells if not self.tuned(arm, *cell).certified]
        ends = [(model, edges) for model, tokens in cells if (edges := self.best(arm, model, tokens).edges)]
        off = [model for model, tokens in cells if self.better_off_grid(arm, model, tokens) is not None]
        words = []
        if ends and len(budgets) == 1:
            words.append(f"at the end of the grid{fixed}: {_listed(ends)}")
        elif ends:
            words.append(f"{len(ends)} of {len(cells)} optima{fixed} at the end of their grid")
        words += [f"a run off the grid is better: {', '.join(off)}"] if off else []
        return (*dict.fromkeys(waiting), *words, *(("one seed",) if self.scale.seeds < 2 else ()))

    @memoized
    def _noise(self, arm: Arm, model: str, tokens: int) -> Noise | None:
        """Return the noise between seeds at the optima of all sizes of one budget; that of all runs without such seeds."""
        # Not of all settings of the size: overfitted runs scatter far more than those that compete for the optimum.
        points = [(other, self.tuned(arm, other, tokens).best) for other in self.scale.models_at(tokens)]
        runs = [self.seeds(arm, other, tokens, point, self.scale.seeds) for other, point in points if point is not None]
        own = pooled_noise([record.loss for record in self.finite(dict(enumerate(group))).values()] for group in runs)
        return own or seed_noise(self.records, model, tokens)

    # --- tuned on a full grid -------------------------------------------------------------------------------------------

    def points(self, arm: Arm, sweep: Sweep) -> list[Point]:
        """Return every point of a sweep in the arm's own lr and wd."""
        return [
            Point(lr=_rounded(lr * arm.lr_factor), epochs=sweep.epochs, wd=_rounded(wd / arm.lr_factor))
            for lr in sweep.lr
            for wd in sweep.wd
        ]

    @memoized
    def swept(self, arm: Arm, sweep: Sweep) -> Result:
        """Return the best point of a complete grid with the records of all seeds there; `NOTHING` before it is complete."""
        points = self.points(arm, sweep)
        losses = {point: self.loss(self.run(arm, sweep.model, sweep.tokens, point)) for point in points}
        known = {point: loss for point, loss in losses.items() if loss is not None}
        # Ties are broken by the point, so that a plan does not depend on the order of records.
        best = min(known, key=lambda point: (known[point], point), default=None)
        if best is None or len(known) < len(points) or not math.isfinite(known[best]):
            return NOTHING
        values = {name: sorted({point.get(name) for point in points}) for name in ("lr", "wd")}
        # An optimum at the end of a grid may be outside of it; claims mention this.
        edges = tuple(n for n, v in values.items() if len(v) > 1 and best.get(n) in (v[0], v[-1]))
        return self._result(arm, sweep.model, sweep.tokens, best, sweep.seeds, True, edges, len(points))

    def sweep_jobs(self, arm: Arm, sweep: Sweep) -> list[Job]:
        """Return the runs of a sweep: the whole grid, then seeds at the best point once the grid is complete."""
        grid: list[Job] = [self.run(arm, sweep.model, sweep.tokens, point) for point in self.points(arm, sweep)]
        # The first seed at the best point is in the grid already.
        return [*grid, *self.swept(arm, sweep).runs[1:]]

    def seeds(self, arm: Arm, model: str, tokens: int, point: Point, count: int) -> tuple[Run, ...]:
        """Return the runs of `count` seeds at one point."""
        return tuple(self.run(arm, model, tokens, point, seed) for seed in range(count))

    def _result(
        self,
        arm: Arm,
        model: str,
        tokens: int,
        point: Point,
        seeds: int,
        settled: bool,
        edges: tuple[str, ...],
        tried: int,
    ) -> Result:
        runs = self.seeds(arm, model, tokens, point, seeds)
        return Result(point, runs, judged(self.finite(dict(enumerate(runs)))), settled, edges, tried)


def judged(records: Mapping[int, T]) -> Mapping[int, T]:
    """Return the seeds of a tuned setting that claims judge.

    Those that did not choose it where enough have run, and all before.
    """
    # The first seed chose the setting, so its loss is low by a selection effect.
    fresh = {seed: record for seed, record in records.items() if seed}
    return fresh if len(fresh) >= FEWEST_FRESH else records


def judged_of(seeds: int) -> int:
    """Return how many of so many seeds claims judge."""
    return len(judged(dict.fromkeys(range(seeds))))


def _listed(ends: Iterable[tuple[str, tuple[str, ...]]]) -> str:
    return ", ".join(f"{model} ({', '.join(edges)})" for model, edges in ends)


def _rounded(value: float) -> float:
    """Drop the rounding error of a product, which would show in names."""
    return float(f"{value:.6g}")
