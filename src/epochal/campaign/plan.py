"""Planning a campaign: which recipes, which jobs, what they cost. Pure functions of the records; no torch.

`Hypothetical` answers every question with an equal loss, so every search ends where it starts: that prices a whole
campaign before anything has run.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from epochal.config import REPOSITORY, nearest
from epochal.models.config import parameter_counts
from epochal.records import Record, Records, Split, Workspace, split
from epochal.run import Ensemble, Job, Run, Samples, Targets
from epochal.scale import Scale
from epochal.search.searches import Search, seed_noise
from epochal.study import Study

BYTES_PER_WEIGHT = 4
"""Model folders hold float32 weights."""


def recipe_folders() -> list[Path]:
    """Return the folders of recipes: the working folder's own, which come first, and the built-in ones."""
    built_in = REPOSITORY / "recipes"
    own = Path.cwd() / "recipes"
    return [own, built_in] if own.is_dir() and own.resolve() != built_in.resolve() else [built_in]


def recipe_names(scale: Scale | None = None) -> list[str]:
    """Return the recipes of a scale, all of them where it names none, in the order of a report."""
    files = [path.stem for folder in recipe_folders() for path in sorted(folder.glob("*.py"))]
    known = list(dict.fromkeys(name for name in files if not name.startswith("_")))
    order: tuple[str, ...] = _built_in("recipes").ORDER
    known.sort(key=lambda name: order.index(name) if name in order else len(order))
    if scale is None:
        return known
    for name in (*scale.recipes, *scale.tables):
        if name not in known:
            raise ValueError(
                f"scale {scale.name!r} names {name!r}, which is not a recipe{nearest(name, known)}; correct it."
            )
    return list(scale.recipes) or known


def load_recipe(name: str) -> ModuleType:
    """Import one recipe; raises ValueError with the nearest name when there is none."""
    folder = next((folder for folder in recipe_folders() if (folder / f"{name}.py").is_file()), None)
    if folder is None or name.startswith("_"):
        known = recipe_names()
        raise ValueError(f"there is no recipe {name!r}{nearest(name, known)}; known: {', '.join(known)}.")
    if folder == REPOSITORY / "recipes":
        return _built_in(f"recipes.{name}")
    return _load_file(folder / f"{name}.py")


def _built_in(module: str) -> ModuleType:
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    return importlib.import_module(module)


@functools.cache
def _load_file(path: Path) -> ModuleType:
    """Import a recipe of the working folder under a name that cannot collide with a built-in one."""
    spec = importlib.util.spec_from_file_location(f"own_recipes.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    _built_in("recipes")  # so that it can import the built-in ones
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def campaign_jobs(recipes: Sequence[str], records: Records, scale: Scale) -> list[Job]:
    """Return every job that the recipes can name from these records, each once.

    Raises ValueError when one name stands for two different jobs.
    """
    jobs: dict[str, Job] = {}
    study = Study(records, scale)
    for name in recipes:
        for job in load_recipe(name).plan(study):
            if jobs.setdefault(job.name, job) != job:
                raise ValueError(
                    f"recipe {name!r} plans {job.name!r} with another meaning than before; rename one of them."
                )
    return list(jobs.values())


class Hypothetical(Records):
    """Records in which every job has run: the real ones, and an equal loss for all others."""

    def __init__(self, records: Records) -> None:
        super().__init__(records.workspace, records)
        self.assumed: dict[str, Job] = {}

    def get(self, job: Job) -> Record | None:
        """Return the real record of a job, or an assumed one."""
        record = super().get(job)
        if record is None:
            self.assumed[job.name] = job
            record = Record(job, "", "done", {"loss": 1.0, "parameters": 1})
        return record

    def has_output(self, job: Job) -> bool:
        """Say yes: everything has run."""
        return True


@dataclass(frozen=True)
class Price:
    """What jobs cost: device-hours at the scale's measured speed, training FLOPs, and bytes kept on disk."""

    jobs: int
    flops: float
    hours: float
    disk: int


def flops_of(job: Job, vocab_size: int | None = None, jobs: Mapping[str, Job] | None = None) -> float:
    """Return the training FLOPs of a Run, 6 N tokens; 0 for evaluation and sampling, which cost little beside it.

    Masked inputs are a second pass over the same tokens. Each model of an online teacher reads them too, forward alone:
    2 N of its own. `jobs` by name say which models those are; a teacher that is not there is not counted.
    """
    if not isinstance(job, Run):
        return 0.0
    passes = 2 if job.input_mask_prob else 1
    per_token = 6.0 * passes * _weights(job.model, vocab_size, Path.cwd())
    if job.teach is not None and job.teach.mode == "online":
        models = _models_of(job.teach.source, jobs or {})
        per_token += sum(2.0 * _weights(model, vocab_size, Path.cwd()) for model in models)
    return per_token * job.tokens


def _models_of(source: str, jobs: Mapping[str, Job]) -> list[str]:
    """Return the model of a Run, or those of an Ensemble's members."""
    job = jobs.get(source)
    if isinstance(job, Ensemble):
        return [model for name in job.runs for model in _models_of(name, jobs)]
    return [job.model] if isinstance(job, Run) else []


@functools.cache
def _weights(model: str, vocab_size: int | None, folder: Path) -> int:
    """Count the weights of a model, seen from a working folder: for prices and for the order of jobs."""
    return parameter_counts(model, vocab_size=vocab_size).total


def price(
    jobs: Iterable[Job], scale: Scale, vocab_size: int | None = None, among: Mapping[str, Job] | None = None
) -> Price:
    """Add up the cost of jobs on the hardware of their scale; `among` are the jobs by name that they may read."""
    flops, disk, count = 0.0, 0, 0
    for job in jobs:
        count += 1
        flops += flops_of(job, vocab_size, among)
        match job:
            case Run():
                disk += BYTES_PER_WEIGHT * parameter_counts(job.model, vocab_size=vocab_size).total
            case Samples():
                disk += 4 * job.tokens
            case Targets():
                disk += job.bytes(vocab_size)
            case Ensemble():
                pass
    return Price(jobs=count, flops=flops, hours=flops / scale.hardware.flops / 3600, disk=disk)


@dataclass(frozen=True)
class SearchState:
    """Where one search stands in words, what its next round costs, and a bound on what that can gain (nats, or None).

    `finer` is what a finer grid around the best point could gain, by the quadratic through its star (nats, or None).
    """

    what: str
    state: str
    begun: bool
    certified: bool
    next_round: Price
    gain: float | None
    finer: float | None


@dataclass(frozen=True)
class Outlook:
    """The state of a campaign: jobs by state today, and what is still to come if every search ends where it stands."""

    split: Split
    today: Price
    later: Price
    searches: tuple[SearchState, ...]


def outlook(recipes: Sequence[str], records: Records, scale: Scale, vocab_size: int | None = None) -> Outlook:
    """Say what is done, ready and waiting, and what the rest of the campaign costs at least."""
    jobs = campaign_jobs(recipes, records, scale)
    state = split(jobs, records)
    by_name = {job.name: job for job in jobs}
    unfinished = [*state.ready, *(by_name[name] for name in state.waiting)]
    hypothetical = Hypothetical(records)
    future = campaign_jobs(recipes, hypothetical, scale)
    known = {job.name for job in jobs}
    later = [job for job in future if job.name not in known and records.named(job.name) is None]
    searches = search_states(recipes, records, scale, vocab_size)
    among = {job.name: job for job in future} | by_name
    today, coming = (price(these, scale, vocab_size, among) for these in (unfinished, later))
    return Outlook(state, today, coming, searches)


def search_states(
    recipes: Sequence[str], records: Records, scale: Scale, vocab_size: int | None = None
) -> tuple[SearchState, ...]:
    """Return the state of every search of the recipes, each once; a recipe without searches has none."""
    study = Study(records, scale)
    modules = [module for module in map(load_recipe, recipes) if hasattr(module, "searches")]
    found = {search.what: search for module in modules for search in module.searches(study)}
    return tuple(_state(search, records, scale, vocab_size) for search in found.values())


def _state(search: Search, records: Records, scale: Scale, vocab_size: int | None) -> SearchState:
    certificate = search.certificate(seed_noise(records, search.model, search.tokens))
    waiting = "no result yet" if search.descent.visited else "waits for the search it starts from"
    unfinished = [job for job in search.wanted_jobs if records.get(job) is None]
    return SearchState(
        what=search.what,
        state=str(certificate) if certificate else waiting,
        begun=search.descent.best is not None,
        certified=search.descent.certified,
        next_round=price(unfinished, scale, vocab_size),
        gain=search.gain,
        finer=search.finer,
    )


def store_vocab_size(workspace: Workspace, scale: Scale) -> int | None:
    """Return the vocabulary of a prepared token store, or None: then the model files' own is priced."""
    import json

    from epochal.config import find_config

    path = workspace.data / find_config("data", scale.data, ".toml").stem / "meta.json"
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return int(meta["vocab_size"])
    except (OSError, ValueError, KeyError):
        return None
