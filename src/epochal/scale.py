"""A scale: one TOML file with the data, budgets, ladder, grid, batch, seeds, optimizer and hardware of a campaign.

Its other tables are the settings of recipes. A recipe reads its own table (`Study.settings`), so this file names none.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from epochal.config import find_config, from_table, nearest, read_toml
from epochal.names import named_run
from epochal.ranges import (
    Batch,
    Decay,
    Epochs,
    Evaluations,
    Items,
    LessThanAll,
    OneOf,
    Range,
    Ranged,
    Rate,
    Repeats,
    SequenceTokens,
    Tokens,
    shown,
)
from epochal.run import ORDERS, PRECISIONS, AdamW, Optimizer, Run, Spectra

# sequential: one neighbor at a time, fewest runs; parallel: all neighbors at once, fewest rounds (`search.descent`).
SEARCH_MODES = ("sequential", "parallel")

Value = float | int


@dataclass(frozen=True, order=True)
class Point:
    """One setting of the tuned fields; `more` holds further fields of a Run or of its optimizer, by name."""

    lr: float  # peak learning rate
    epochs: int
    wd: float  # decoupled weight decay
    more: tuple[tuple[str, Value], ...] = ()  # further fields of a Run or of its optimizer, by name

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


@dataclass(frozen=True, kw_only=True)
class Rung(Ranged):
    """One model of the ladder, and where its searches start.

    Without `lr` and `epochs` a search waits for the optimum of the next smaller size and starts there.
    """

    model: str
    lr: Rate | None = None
    epochs: Epochs | None = None
    wd: Decay | None = None  # without it, the decay whose averaging window is `Scale.tau` epochs
    standard_lr: Rate | None = None  # this and the next: the start at the standard decay, where it differs
    standard_epochs: Epochs | None = None
    # Its budgets, the scale's first among them; empty for all.
    unique_tokens: Annotated[tuple[Tokens, ...], Items(least=0)] = ()


@dataclass(frozen=True, kw_only=True)
class Grid(Ranged):
    """The values that searches may take."""

    lr: Annotated[tuple[Rate, ...], Items(ascending=True)]
    epochs: Annotated[tuple[Epochs, ...], Items(ascending=True)]
    wd: Annotated[tuple[Decay, ...], Items(ascending=True)]


@dataclass(frozen=True, kw_only=True)
class Hardware(Ranged):
    """What `plan` prices with: the device by name, the training FLOP/s of all of it, and the number of devices."""

    device: str
    flops: Annotated[float, Range(1e3, 1e25)]  # training FLOP/s of all devices together
    devices: Annotated[int, Range(1, 10**6)] = 1


# --- the scale --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scale(Ranged):
    """One campaign."""

    name: str = ""
    data: str
    unique_tokens: Annotated[tuple[Tokens, ...], Items()]  # budgets D; recipes that need one budget use the first
    sequence_length: SequenceTokens
    batch_size: Batch  # sequences
    ladder: Annotated[tuple[Rung, ...], Items()]  # smallest size first
    grid: Grid
    hardware: Hardware
    # Of every run that no recipe gives another one; its lr and wd come from searches.
    optimizer: Optimizer = field(default_factory=AdamW)
    recipes: tuple[str, ...] = ()  # of the campaign; empty for all
    replicates: bool = False  # the report says what the papers found
    precision: Annotated[str, OneOf(PRECISIONS)] = "bf16"
    data_order: Annotated[str, OneOf(ORDERS)] = "documents"
    warmup: LessThanAll = 0.01
    num_evals: Evaluations = 20  # per run
    # Averaging window of AdamW in epochs, for starts without wd.
    tau: Annotated[float, Range(1e-6, 1e6)] = 0.35
    standard_wd: Decay = 0.1  # of the baseline
    seeds: Repeats = 1  # of every optimum
    # Seeds count from here: a campaign with another one repeats everything, searches included, on independent
    # draws.
    first_seed: Annotated[int, Range(0, 2**31)] = 0
    search_mode: Annotated[str, OneOf(SEARCH_MODES)] = "sequential"
    tables: Mapping[str, Any] = field(default_factory=dict)  # settings of recipes, by recipe

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"ladder names a model twice, {', '.join(self.models)}; give each one table.")
        if self.ladder[0].lr is None or self.ladder[0].epochs is None:
            raise ValueError(
                f"the smallest size {self.ladder[0].model!r} needs lr and epochs, because its search starts there."
            )
        if self.standard_wd not in self.grid.wd:
            raise ValueError(f"standard_wd {self.standard_wd} is not in grid.wd; add it there.")
        # Spectra wraps a base optimizer, which has the rates.
        inner = self.optimizer.base if isinstance(self.optimizer, Spectra) else self.optimizer
        if (inner.lr, inner.wd) != (type(inner)().lr, type(inner)().wd):
            raise ValueError(
                "[optimizer] must not set lr or wd, which are tuned; set [grid] and the starts of [[ladder]]."
            )
        for tokens in self.unique_tokens:
            self.check_budget(tokens)
        for rung in self.ladder:
            own = set(rung.unique_tokens)
            if own and not {self.unique_tokens[0]} <= own <= set(self.unique_tokens):
                raise ValueError(
                    f"ladder: {rung.model!r} has the budgets {list(rung.unique_tokens)}; give it some of the scale's "
                    f"{list(self.unique_tokens)}, and the first of them, at which all sizes are compared."
                )

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the ladder, smallest first."""
        return tuple(rung.model for rung in self.ladder)

    def models_at(self, unique_tokens: int) -> tuple[str, ...]:
        """Return the models that are trained at one budget, smallest first."""
        return tuple(rung.model for rung in self.ladder if unique_tokens in (rung.unique_tokens or self.unique_tokens))

    @functools.cached_property
    def base(self) -> Run:
        """The run whose fields all others of this campaign have, unless their name differs."""
        return Run(
            name="base",
            model=self.ladder[0].model,
            data=self.data,
            unique_tokens=self.batch_size * self.sequence_length,
            epochs=1,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            optimizer=self.optimizer,
            warmup=self.warmup,
            data_order=self.data_order,
            precision=self.precision,
            num_evals=self.num_evals,
        )

    def check_budget(self, tokens: int) -> None:
        """Raise ValueError for a budget that is not a multiple of the batch."""
        # Run checks it.
        replace(self.base, unique_tokens=tokens)

    def check_models(self, where: str, *models: str, started: bool = False) -> None:
        """Raise ValueError for a model that is not on the ladder.

        With `started` it must also have lr and epochs there.
        """
        for model in models:
            if model not in self.models:
                raise ValueError(
                    f"{where}: model {shown(model)} is not on the ladder {shown(list(self.models))}; add it there."
                )
            if started and self.start(self.rung(model), self.unique_tokens[0], wd=self.standard_wd) is None:
                raise ValueError(f"{where}: model {model!r} needs lr and epochs in its [[ladder]] table.")

    def rung(self, model: str) -> Rung:
        """Return the rung of a model."""
        return next(rung for rung in self.ladder if rung.model == model)

    def smaller(self, model: str, unique_tokens: int) -> str:
        """Return the model one rung below at a budget; raises ValueError for the smallest."""
        models = self.models_at(unique_tokens)
        if model == models[0]:
            raise ValueError(f"there is no size below {model!r} at D = {unique_tokens:,}; give it lr and epochs.")
        return models[models.index(model) - 1]

    def run(self, model: str, unique_tokens: int, point: Point, *, seed: int = 0, **changes: Any) -> Run:
        """Return the Run of one size, budget and point; `changes` are further fields, and the name follows from all.

        `seed`, counted from `first_seed`, draws the weights and orders the data.
        """
        seed += self.first_seed
        optimizer = changes.pop("optimizer", self.optimizer)
        fields_of_run = {
            "model": model,
            "unique_tokens": unique_tokens,
            "epochs": point.epochs,
            "optimizer": with_rates(optimizer, point.lr, point.wd),
            "init_seed": seed,
            "order_seed": seed,
        }
        run = replace(self.base, **{**fields_of_run, **changes})
        # Last: a tuned field may be inside a value that is changed.
        for name, value in point.more:
            run = with_field(run, name, value)
        return named_run(run, self.base)

    def changed(self, run: Run, changes: Mapping[str, Any]) -> Run:
        """Return a run with other fields, under the name that follows; dotted names reach into the optimizer."""
        for name, value in changes.items():
            run = with_field(run, name, value)
        return named_run(run, self.base)

    def start(self, rung: Rung, unique_tokens: int, wd: float | None = None) -> Point | None:
        """Return where the search of one size starts; None if it waits for the optimum of the next smaller size.

        With `wd` the decay stays there, and the size may name other starts for that (`standard_lr`, `standard_epochs`).
        """
        lr, epochs = rung.lr, rung.epochs
        if wd is not None:
            lr, epochs = rung.standard_lr or lr, rung.standard_epochs or epochs
        if lr is None or epochs is None:
            return None
        if wd is None:
            steps = unique_tokens // (self.batch_size * self.sequence_length)
            wd = rung.wd or decay_for_window(self.tau, lr=lr, steps_per_epoch=steps, grid=self.grid.wd)
        return Point(lr=lr, epochs=epochs, wd=wd)


def load_scale(name: str) -> Scale:
    """Read `configs/scales/<name>.toml`; raises ValueError for an unknown key or inconsistent values."""
    path = find_config("scales", name, ".toml")
    table = read_toml(path)
    own = {item.name for item in fields(Scale)} - {"name", "tables"}
    settings = {key: value for key, value in table.items() if key not in own and isinstance(value, dict)}
    scale = from_table({key: value for key, value in table.items() if key not in settings}, Scale, where=str(path))
    return replace(scale, name=path.stem, tables=settings)


# --- points and runs with other values --------------------------------------------------------------------------------


def member_point(point: Point) -> Point:
    """Return the paper's rule for ensemble members: same lr, twice the epochs, half the decay (spec section 6)."""
    return replace(point, epochs=2 * point.epochs, wd=point.wd / 2)


def ideal_decay(tau: float, *, lr: float, steps_per_epoch: int) -> float:
    """Return the weight decay whose averaging window is tau epochs."""
    # AdamW averages its updates over about 1 / (lr wd) steps; the window is that, in epochs.
    return 1.0 / (tau * lr * steps_per_epoch)


def decay_for_window(tau: float, *, lr: float, steps_per_epoch: int, grid: tuple[float, ...]) -> float:
    """Return the grid's weight decay whose averaging window is nearest to tau epochs."""
    ideal = ideal_decay(tau, lr=lr, steps_per_epoch=steps_per_epoch)
    return min(grid, key=lambda wd: abs(math.log(wd) - math.log(ideal)) if wd > 0 else math.inf)


def with_rates(optimizer: Optimizer, lr: float, wd: float) -> Optimizer:
    """Return an optimizer with another peak learning rate and weight decay; those of SPECTRA are its base's."""
    if isinstance(optimizer, Spectra):
        return replace(optimizer, base=replace(optimizer.base, lr=lr, wd=wd))
    return replace(optimizer, lr=lr, wd=wd)


def with_field(run: Run, name: str, value: Any) -> Run:
    """Return a Run with another value of one field, its own or its optimizer's.

    A dotted name reaches inside: `optimizer.clip`, `optimizer.base.beta2`. Raises ValueError for an unknown field.
    """
    changed: Run = _with_path(run, name.split("."), value, name)
    return changed


def _with_path(target: Any, path: list[str], value: Any, name: str) -> Any:
    names = [item.name for item in fields(target)]
    first, *rest = path
    if first not in names and isinstance(target, Run) and not rest:
        return replace(target, optimizer=_with_path(target.optimizer, path, value, name))
    if first not in names:
        raise ValueError(f"{name!r} is not a field of {type(target).__name__}{nearest(first, names)}; correct it.")
    return replace(target, **{first: _with_path(getattr(target, first), rest, value, name) if rest else value})
