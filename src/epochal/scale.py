"""A scale: one TOML file that says on which data, sizes and grids the recipes run; and the Runs it stands for."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from epochal.config import find_config, load_toml, nearest
from epochal.run import AdamW, Run, SequenceDistillation

SEARCH_MODES = ("sequential", "parallel")
"""How a search asks for runs. sequential: one neighbor at a time; parallel: all neighbors (`search/descent.py`)."""


Value = float | int


@dataclass(frozen=True, order=True)
class Point:
    """One setting of what is tuned; `more` holds further fields of a Run or of its optimizer, by name."""

    lr: float
    epochs: int
    wd: float
    more: tuple[tuple[str, Value], ...] = ()

    def get(self, field: str) -> Value:
        """Return the value of one field."""
        return dict(self.more)[field] if field in dict(self.more) else getattr(self, field)

    def at(self, field: str, value: Value) -> "Point":
        """Return this point with another value of one field."""
        more = dict(self.more)
        if field in more:
            return replace(self, more=tuple((more | {field: value}).items()))
        change: dict[str, Any] = {field: value}
        return replace(self, **change)


def decay_for_window(tau: float, *, lr: float, steps_per_epoch: int, grid: tuple[float, ...]) -> float:
    """Return the grid's weight decay whose averaging window 1 / (lr wd steps_per_epoch) is nearest to tau epochs."""
    ideal = 1.0 / (tau * lr * steps_per_epoch)
    return min(grid, key=lambda wd: abs(math.log(wd / ideal)) if wd > 0 else math.inf)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One model of the ladder, and where its searches start.

    Without `wd` the search starts from the decay whose averaging window is `Scale.tau` epochs. Without `lr` and `epochs`
    it waits for the optimum of the next smaller size and starts there.
    """

    model: str
    lr: float | None = None
    epochs: int | None = None
    wd: float | None = None
    standard_lr: float | None = None
    standard_epochs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that searches may take.

    `more` tunes further fields of a Run or of its optimizer, by name (`dropout = [0.0, 0.1]`); the first is the start.
    """

    lr: tuple[float, ...]
    epochs: tuple[int, ...]
    wd: tuple[float, ...]
    more: dict[str, tuple[int | float, ...]] = field(default_factory=dict)

    def values(self, *fields: str) -> dict[str, tuple[int | float, ...]]:
        """Return the grid of the named fields in their order, and of all further ones."""
        return {field: getattr(self, field) for field in fields} | self.more

    @property
    def first(self) -> tuple[tuple[str, int | float], ...]:
        """Where further fields start."""
        return tuple((field, values[0]) for field, values in self.more.items())


@dataclass(frozen=True, kw_only=True)
class Members:
    """Which sizes get ensembles and how many members.

    With `search_members` (2 or more) epochs and decay of members are tuned for the limit of infinitely many, fitted from
    so many a point; 0 takes the rule of twice the epochs and half the decay.
    """

    models: tuple[str, ...]
    count: int
    search_members: int = 0

    def __post_init__(self) -> None:
        if self.search_members and not 2 <= self.search_members <= self.count:
            raise ValueError(
                f"search_members is {self.search_members}; give 2 to count ({self.count}), or 0 for the rule."
            )


@dataclass(frozen=True, kw_only=True)
class Students:
    """How a student of the size `model` learns: share of sampled text, its pool, and its own epochs, lr and wd."""

    model: str
    fraction: float
    pool_tokens: int
    epochs: int
    lr: float
    wd: float
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The comparison of kinds of members: `count` members of one size, `seeds` times, on the first budget.

    `holdout_tokens` of the budget are kept back where weights of members are learned; the others are the settings of
    the kinds that have one (see `Run`): the values of NanoGPT Slowrun and of arXiv 2606.06888.
    """

    model: str
    count: int
    seeds: int
    holdout_tokens: int
    chain_weight: float = 0.5
    chain_temperature: float = 1.0
    dropout: float = 0.1
    input_mask_prob: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 2 or self.seeds < 1:
            raise ValueError(f"kinds has count {self.count} and seeds {self.seeds}; give at least 2 and 1.")


@dataclass(frozen=True, kw_only=True)
class Soft:
    """Ways to teach a student of the size `model`, from the ensemble of that size: `seeds` of each, all of equal cost.

    Of soft targets: `weight` of the teacher beside the text, `wd` of their own, `keep` as in `Targets`. `sizes` are
    further sizes of student, taught by the cache.
    """

    model: str
    weight: float
    wd: float
    keep: int = 64
    seeds: int = 1
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to feed the compared optimizers: how much text, how often, and the rates and decays AdamW is tried with."""

    name: str
    tokens: int
    epochs: int
    lr: tuple[float, ...]
    wd: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of optimizers on one size: its settings, seeds at the optimum, SPECTRA's threshold.

    The paper's threshold of 10 is for widths from 768; the norm of a random update goes with the root of the width.
    """

    model: str
    settings: tuple[Setting, ...]
    seeds: int = 3
    clip: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Ablations:
    """Other values of SPECTRA's threshold and steps and of Fira's rank, at the optimum of the first setting."""

    clips: tuple[float, ...] = ()
    iterations: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Optimizers of the comparison inside the data-constrained recipe, in its first setting of more than one epoch.

    Each is tuned at every size of `models`; at the comparison's own size `members` of each are ensembled, and so are
    chained members and snapshots in groups of `group`.
    """

    optimizers: tuple[str, ...]
    models: tuple[str, ...]
    members: int
    group: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.group <= self.members:
            raise ValueError(f"group is {self.group}; give 2 to members ({self.members}).")


@dataclass(frozen=True, kw_only=True)
class Continued:
    """Continued pre-training of the size `model` on a second data set (spec section 11).

    It goes on from the tuned run of that size on the first budget, or from the model folder `base`. `batch_sizes` are the
    default and the small one, in sequences; `more_tokens` budgets for further single passes of the default.
    """

    data: str
    model: str
    unique_tokens: int
    batch_sizes: tuple[int, ...]
    epochs: int
    lr: float
    wd: float
    members: int
    more_tokens: tuple[int, ...] = ()
    base: str = ""

    def __post_init__(self) -> None:
        if len(self.batch_sizes) != 2:
            raise ValueError(f"batch_sizes is {self.batch_sizes}; give two, the default and the small one.")
        if self.base and "/" not in self.base:
            raise ValueError(f"base is {self.base!r}; give the path of a model folder, with a slash in it.")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What `plan` prices with: hardware by name, the training FLOP/s that all of it reaches, and how many devices it is."""

    device: str
    flops: float
    devices: int = 1


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One campaign. `unique_tokens` lists the budgets D; recipes that need one budget use the first.

    At the budgets `law_tokens` only the standard recipe runs, with the sizes `law_models`: further points for its data
    law, at a fraction of the cost of a whole budget. Seeds count from `first_seed`: a campaign with another one repeats
    the claims, searches and all, on draws that share nothing with the first. `tasks` are those of lm-eval that the recipe
    `downstream` asks, by name; cloze and next_passage need no network.
    """

    name: str = ""
    data: str
    unique_tokens: tuple[int, ...]
    sequence_length: int
    batch_size: int
    ladder: tuple[Rung, ...]
    grid: Grid
    ensemble: Members
    students: Students
    hardware: Hardware
    precision: str = "bf16"
    data_order: str = "documents"
    warmup: float = 0.01
    num_evals: int = 20
    tau: float = 0.35
    standard_wd: float = 0.1
    seeds: int = 1
    first_seed: int = 0
    epoching: str = ""
    law_tokens: tuple[int, ...] = ()
    law_models: tuple[str, ...] = ()
    optimizers: Comparison | None = None
    ablations: Ablations | None = None
    limits: Limits | None = None
    search_mode: str = "sequential"
    continued: Continued | None = None
    kinds: Kinds | None = None
    soft: Soft | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, values in (
            ("ladder", self.ladder),
            ("unique_tokens", self.unique_tokens),
            ("grid.lr", self.grid.lr),
            ("grid.epochs", self.grid.epochs),
            ("ensemble.models", self.ensemble.models),
        ):
            if not values:
                raise ValueError(f"{what} is empty; give at least one.")
        if self.search_mode not in SEARCH_MODES:
            raise ValueError(f"search_mode must be one of {', '.join(SEARCH_MODES)}, got {self.search_mode!r}.")
        if self.ladder[0].lr is None or self.ladder[0].epochs is None:
            raise ValueError(
                f"the smallest size {self.ladder[0].model!r} needs lr and epochs: its search starts there."
            )
        self._check_models()
        self._check_budgets()

    def _check_models(self) -> None:
        models = [rung.model for rung in self.ladder]
        named = (*self.ensemble.models, self.students.model, *self.law_models)
        named += (self.kinds.model,) if self.kinds else ()
        if self.soft and self.soft.model not in self.ensemble.models:
            raise ValueError(f"soft.model {self.soft.model!r} has no ensemble; use one of {self.ensemble.models}.")
        for model in (*named, *([self.epoching] if self.epoching else [])):
            if model not in models:
                raise ValueError(f"model {model!r} is not on the ladder {models}; use one of those or add it.")
        for model in (*self.law_models, *([self.epoching] if self.epoching else [])):
            if self.standard_start(self.rung(model)) is None:
                raise ValueError(f"model {model!r} is in law_models or epoching, so it needs lr and epochs of its own.")

    def _check_budgets(self) -> None:
        """Build a run at every budget: it refuses one that no batch divides."""
        model = self.ladder[0].model
        if self.standard_wd not in self.grid.wd:
            raise ValueError(f"standard_wd {self.standard_wd} is not in grid.wd; add it there.")
        if bool(self.law_tokens) != bool(self.law_models):
            raise ValueError("law_tokens and law_models go together; give both or neither.")
        for tokens in self.budgets:
            self.run(model, tokens, Point(lr=self.grid.lr[0], epochs=1, wd=0.0))
        if (self.ablations or self.limits) and self.optimizers is None:
            raise ValueError("[ablations] and [limits] vary optimizers of [optimizers]; add that table.")
        for setting in self.optimizers.settings if self.optimizers else ():
            self.run(model, setting.tokens, Point(lr=self.grid.lr[0], epochs=setting.epochs, wd=0.0))

    @property
    def budgets(self) -> tuple[int, ...]:
        """Every budget D at which the standard recipe runs, ascending."""
        return tuple(sorted({*self.unique_tokens, *self.law_tokens}))

    def standard_models(self, tokens: int) -> tuple[str, ...]:
        """The sizes of the standard recipe at one budget."""
        return tuple(rung.model for rung in self.ladder) if tokens in self.unique_tokens else self.law_models

    def rung(self, model: str) -> Rung:
        """Return the rung of a model."""
        return next(rung for rung in self.ladder if rung.model == model)

    def run(self, model: str, unique_tokens: int, point: Point, *, seed: int = 0) -> Run:
        """Return the Run of one size, budget and point; `seed`, from `first_seed`, draws the weights and orders the data."""
        seed += self.first_seed
        stem = f"{Path(model).stem}-{_short(unique_tokens)}-lr{point.lr:g}-ep{point.epochs}-wd{point.wd:g}"
        run = Run(
            name=f"{stem}-s{seed}",
            model=model,
            data=self.data,
            unique_tokens=unique_tokens,
            epochs=point.epochs,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            optimizer=AdamW(lr=point.lr, wd=point.wd),
            warmup=self.warmup,
            data_order=self.data_order,
            init_seed=seed,
            order_seed=seed,
            precision=self.precision,
            num_evals=self.num_evals,
        )
        for name, value in point.more:
            changed = _with_field(run, name, value)
            if changed != run:  # a default is not named: the run is the same as without the field
                stem = f"{stem}-{name}{value:g}"
                run = replace(changed, name=f"{stem}-s{seed}")
        return run

    def student(self, model: str, unique_tokens: int, samples: str, *, name: str, seed: int = 0) -> Run:
        """Return the Run of a student that learns from real text and the named Samples."""
        settings = self.students
        run = self.run(model, unique_tokens, Point(lr=settings.lr, epochs=settings.epochs, wd=settings.wd), seed=seed)
        return replace(run, name=name, distill=SequenceDistillation(samples=samples, fraction=settings.fraction))

    def smaller(self, model: str) -> str:
        """Return the model one rung below; raises ValueError for the smallest."""
        models = [rung.model for rung in self.ladder]
        if model == models[0]:
            raise ValueError(f"there is no size below {model!r}; give it lr and epochs.")
        return models[models.index(model) - 1]

    def regularized_start(self, rung: Rung, unique_tokens: int) -> Point | None:
        """Where the joint search of lr, epochs and wd starts for one size; None: at the optimum of the next smaller."""
        if rung.lr is None or rung.epochs is None:
            return None
        steps = unique_tokens // (self.batch_size * self.sequence_length)
        wd = rung.wd or decay_for_window(self.tau, lr=rung.lr, steps_per_epoch=steps, grid=self.grid.wd)
        return Point(lr=rung.lr, epochs=rung.epochs, wd=wd, more=self.grid.first)

    def standard_start(self, rung: Rung) -> Point | None:
        """Where the search of lr and epochs at the standard decay starts for one size; None: at the next smaller's."""
        lr, epochs = rung.standard_lr or rung.lr, rung.standard_epochs or rung.epochs
        return None if lr is None or epochs is None else Point(lr=lr, epochs=epochs, wd=self.standard_wd)


def load_scale(name: str) -> Scale:
    """Read `configs/scales/<name>.toml`; raises ValueError for anything unknown or inconsistent."""
    path = find_config("scales", name, ".toml")
    return replace(load_toml(path, Scale), name=path.stem)


def member_point(point: Point) -> Point:
    """Return the rule for ensemble members: the same lr, twice the epochs, half the decay (spec section 6)."""
    return replace(point, epochs=2 * point.epochs, wd=point.wd / 2)


def _with_field(run: Run, name: str, value: int | float) -> Run:
    """Return a Run with another value of one field of its own or of its optimizer."""
    own, inner = ([item.name for item in fields(table)] for table in (run, run.optimizer))
    change: dict[str, Any] = {name: value}
    if name in own:
        return replace(run, **change)
    if name in inner:
        return replace(run, optimizer=replace(run.optimizer, **change))
    raise ValueError(f"grid.more tunes {name!r}, which no Run has{nearest(name, [*own, *inner])}; correct the name.")


def _short(tokens: int) -> str:
    """24576 -> 25k, 200000000 -> 200m: for names only; facts are fields."""
    for size, letter in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return str(tokens)
