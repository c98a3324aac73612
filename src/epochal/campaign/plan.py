"""Plan a campaign: its recipes, its jobs, which of them are ready, and what they cost.

Pure functions of the records, without torch.
"""

import functools
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from epochal.config import REPOSITORY, find_config, nearest
from epochal.models.config import check_run, head_parameters, parameter_counts
from epochal.records import Record, Records, Workspace
from epochal.run import Ensemble, Job, Run, Samples, Targets, inputs
from epochal.scale import Scale
from epochal.search.searches import Search, seed_noise
from epochal.study import Study

# Model folders hold float32 weights.
BYTES_PER_WEIGHT = 4
# Documents of a budget at and below which two seeds may well draw the same order.
FEW_DOCUMENTS = 6


def recipe_folders() -> list[Path]:
    """Return the folders of recipes: the working folder's own, which come first, and the built-in ones."""
    built_in = REPOSITORY / "recipes"
    own = Path.cwd() / "recipes"
    return [own, built_in] if own.is_dir() and own.resolve() != built_in.resolve() else [built_in]


def recipe_names(scale: Scale | None = None) -> list[str]:
    """Return the recipes of a scale, in the order of a report.

    A scale that names none has all recipes. Raises ValueError for a name that is not a recipe.
    """
    files = [path.stem for folder in recipe_folders() for path in sorted(folder.glob("*.py"))]
    # A recipe of the working folder replaces the built-in one of the same name.
    known = list(dict.fromkeys(name for name in files if not name.startswith("_")))
    order: tuple[str, ...] = _built_in("recipes").ORDER
    # Recipes that are not in ORDER, such as your own, come last.
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
    """Import one recipe; raises ValueError with the nearest name if there is none."""
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
    """Import a recipe from a file of the working folder."""
    # Under a name that cannot collide with a built-in recipe.
    spec = importlib.util.spec_from_file_location(f"own_recipes.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    _built_in("recipes")  # so that it can import the built-in ones
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def campaign_jobs(recipes: Sequence[str], records: Records, scale: Scale) -> list[Job]:
    """Return every job that the recipes can name from these records, each once.

    Raises ValueError when one name stands for two different jobs, and for a Run that its model does not allow.
    """
    jobs: dict[str, Job] = {}
    study = Study(records, scale)
    for name in recipes:
        for job in load_recipe(name).plan(study):
            # Recipes may share jobs, for example the same baseline: equal jobs are trained once.
            if jobs.setdefault(job.name, job) != job:
                raise ValueError(
                    f"recipe {name!r} plans {job.name!r} with another meaning than before; rename one of them."
                )
            if isinstance(job, Run):
                check_run(job)
    return list(jobs.values())


def named_roles(records: Records, scale: Scale) -> dict[str, Record]:
    """Return the results that recipes give a short name, such as "student".

    "best" is the single model of lowest validation loss among them.
    """
    study = Study(records, scale)
    roles = {role: record for module in naming_recipes(scale) for role, record in module.roles(study).items()}
    models = [record for record in roles.values() if isinstance(record.job, Run)]
    return roles | ({"best": min(models, key=lambda record: record.loss)} if models else {})


def naming_recipes(scale: Scale) -> list[Any]:
    """Return the recipes of a scale that give results a short name."""
    return [module for module in map(load_recipe, recipe_names(scale)) if hasattr(module, "roles")]


@dataclass(frozen=True)
class JobStatus:
    """Jobs by status: `done`, `ready` (all inputs exist), `waiting` (job name to the inputs it lacks)."""

    done: tuple[Job, ...]
    ready: tuple[Job, ...]
    waiting: dict[str, tuple[str, ...]]


def partition_jobs(jobs: Iterable[Job], records: Records) -> JobStatus:
    """Partition jobs into done, ready and waiting; raises ValueError if a job reads an unplanned one.

    A job that reads a diverged run stays waiting.
    """
    by_name = {job.name: job for job in jobs}
    # Start from the jobs without a record, and add finished jobs whose output must be recomputed for them.
    unfinished = {name for name, job in by_name.items() if records.get(job) is None}
    stack = list(unfinished)
    while stack:
        for name in _reads(by_name[stack.pop()], by_name):
            # The case of a fresh clone with committed records: weights are needed only if an unfinished job reads
            # them.
            if name not in unfinished and not records.has_output(by_name[name]) and not records.diverged(name):
                unfinished.add(name)
                stack.append(name)
    lacking = {
        name: tuple(
            source for source in _reads(by_name[name], by_name) if source in unfinished or records.diverged(source)
        )
        for name in unfinished
    }
    return JobStatus(
        done=tuple(job for name, job in by_name.items() if name not in unfinished),
        ready=tuple(job for name, job in by_name.items() if name in unfinished and not lacking[name]),
        waiting={name: lacking[name] for name in by_name if name in unfinished and lacking[name]},
    )


def ready_jobs(jobs: Iterable[Job], records: Records) -> list[Job]:
    """Return the jobs that have no result yet and whose inputs exist."""
    return list(partition_jobs(jobs, records).ready)


def _reads(job: Job, by_name: Mapping[str, Job]) -> tuple[str, ...]:
    """Names of all jobs that a job reads, including the members of an ensemble."""
    names = inputs(job)
    for name in inputs(job):
        source = by_name.get(name)
        names += inputs(source) if isinstance(source, Ensemble) else ()
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"job {job.name!r} reads {unknown[0]!r}, which no recipe plans; plan both.")
    return names


class AssumeAllDone(Records):
    """Records in which every job has run: the real ones, and a loss above all of theirs for the others."""

    # With equal losses every search stops at its first point, or at the best real one, so the jobs planned from these
    # records are a lower bound on what a campaign takes, known before anything has run.

    def __init__(self, records: Records) -> None:
        super().__init__(records.workspace, records)
        self.assumed: dict[str, Job] = {}

    def get(self, job: Job) -> Record | None:
        """Return the real record of a job, or an assumed one."""
        record = super().get(job)
        if record is None:
            self.assumed[job.name] = job
            record = Record(job, "", "done", {"loss": 1e3, "parameters": 1})
        return record

    def has_output(self, job: Job) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class Cost:
    """Cost of jobs: training FLOPs, hours, bytes kept on disk."""

    jobs: int
    flops: float  # of training
    hours: float  # on all devices of the scale, at the speeds of its records, else at the speed it states
    disk: int  # bytes of models, samples and targets


def flops_of(job: Job, vocab_size: int | None = None, jobs: Mapping[str, Job] | None = None) -> float:
    """Return the training FLOPs of a Run: 6 N per token, plus the forward passes of an online teacher.

    0 for other jobs: evaluation and sampling are cheap by comparison. `jobs` by name are those that may be the teacher;
    without them its passes are not counted.
    """
    if not isinstance(job, Run):
        return 0.0
    per_token = 6.0 * job.passes * _weights(job.model, vocab_size, Path.cwd())
    if job.more_heads:
        per_token += 6.0 * job.more_heads * head_parameters(job.model, vocab_size=vocab_size)
    if job.teach is not None and job.teach.mode == "online":
        # A teacher has a forward pass only, 2 N per token.
        models = _models_of(job.teach.source, jobs or {})
        per_token += sum(2.0 * _weights(model, vocab_size, Path.cwd()) for model in models)
    return per_token * job.tokens


def _models_of(source: str, jobs: Mapping[str, Job]) -> list[str]:
    """Model of a Run, or those of an Ensemble's members."""
    job = jobs.get(source)
    if isinstance(job, Ensemble):
        return [model for name in job.runs for model in _models_of(name, jobs)]
    return [job.model] if isinstance(job, Run) else []


@functools.cache
def _weights(model: str, vocab_size: int | None, folder: Path) -> int:
    # `folder` is part of the cache key: a model name is looked up in the current folder first.
    return parameter_counts(model, vocab_size=vocab_size).total


def measured_speeds(records: Records, vocab_size: int | None = None) -> dict[str, float]:
    """Return measured training FLOP/s of one device by model.

    Medians over the runs on the device of the newest record.
    """
    runs = [
        record
        for record in records
        if isinstance(record.job, Run) and record.provenance.get("tokens_per_second") and record.provenance.get("date")
    ]
    newest = max((record.provenance["date"] for record in runs), default="")
    devices = {record.provenance.get("device") for record in runs if record.provenance["date"] == newest}
    jobs = {record.job.name: record.job for record in records}
    speeds: dict[str, list[float]] = {}
    for record in runs:
        # The speed of a resumed run is that of its last part, which may be a few steps.
        if record.provenance.get("device") in devices and not record.provenance.get("resumed_at"):
            assert isinstance(record.job, Run)
            per_token = flops_of(record.job, vocab_size, jobs) / record.job.tokens
            speed = per_token * record.provenance["tokens_per_second"] / (record.provenance.get("world_size") or 1)
            speeds.setdefault(record.job.model, []).append(speed)
    return {model: statistics.median(values) for model, values in speeds.items()}


def cost_of(
    jobs: Iterable[Job],
    scale: Scale,
    vocab_size: int | None = None,
    jobs_by_name: Mapping[str, Job] | None = None,
    speeds: Mapping[str, float] | None = None,
) -> Cost:
    """Add up the cost of jobs on the hardware of their scale; `jobs_by_name` may contain their teachers.

    `speeds` are measured FLOP/s of one device by model; other models run at the speed that the scale states.
    """
    flops, seconds, disk, count = 0.0, 0.0, 0, 0
    for job in jobs:
        count += 1
        more = flops_of(job, vocab_size, jobs_by_name)
        flops += more
        stated = scale.hardware.flops / scale.hardware.devices
        speed = (speeds or {}).get(job.model, stated) if isinstance(job, Run) else stated
        seconds += more / speed / scale.hardware.devices
        match job:
            case Run():
                disk += BYTES_PER_WEIGHT * _weights(job.model, vocab_size, Path.cwd())
            case Samples():
                disk += 4 * job.tokens
            case Targets():
                disk += job.bytes(vocab_size)
            case Ensemble():
                pass
    return Cost(jobs=count, flops=flops, hours=seconds / 3600, disk=disk)


@dataclass(frozen=True)
class SearchState:
    """State of one search as text, and the cost and gain of its next round.

    gain: upper bound on the gain in nats, None if unknown.
    finer: gain of a finer grid around the optimum, by a quadratic fit to its neighbors (nats, or None).
    """

    what: str  # title of the search
    state: str
    begun: bool  # some point has a result
    certified: bool  # every neighbor of the best point was run and is not better
    next_round: Cost
    gain: float | None
    finer: float | None


@dataclass(frozen=True)
class CostEstimate:
    """Status and cost of a campaign."""

    status: JobStatus
    today: Cost  # unfinished jobs that are planned now
    later: Cost  # jobs still to be planned, if each search is already at its optimum
    searches: tuple[SearchState, ...]
    largest: tuple[Run, ...]  # the run with the most text on each data set, planned now or later


def cost_estimate(
    recipes: Sequence[str], records: Records, scale: Scale, vocab_size: int | None = None
) -> CostEstimate:
    """Return the status of a campaign and a lower bound on its remaining cost."""
    jobs = campaign_jobs(recipes, records, scale)
    status = partition_jobs(jobs, records)
    by_name = {job.name: job for job in jobs}
    unfinished = [*status.ready, *(by_name[name] for name in status.waiting)]
    future = campaign_jobs(recipes, AssumeAllDone(records), scale)
    later = [job for job in future if job.name not in by_name and records.named(job.name) is None]
    by_name = {job.name: job for job in future} | by_name
    # Ascending, so that the last run of each data set, the largest, remains in the dict.
    runs = sorted((job for job in by_name.values() if isinstance(job, Run)), key=lambda run: run.unique_tokens)
    largest = {run.data: run for run in runs}
    speeds = measured_speeds(records, vocab_size)
    return CostEstimate(
        status=status,
        today=cost_of(unfinished, scale, vocab_size, by_name, speeds),
        later=cost_of(later, scale, vocab_size, by_name, speeds),
        searches=search_states(recipes, records, scale, vocab_size),
        largest=tuple(largest.values()),
    )


def search_states(
    recipes: Sequence[str], records: Records, scale: Scale, vocab_size: int | None = None
) -> tuple[SearchState, ...]:
    """Return the state of every search of the recipes, each once."""
    study = Study(records, scale)
    modules = [module for module in map(load_recipe, recipes) if hasattr(module, "searches")]
    searches = {search.what: search for module in modules for search in module.searches(study)}
    return tuple(_state(search, records, scale, vocab_size) for search in searches.values())


def _state(search: Search, records: Records, scale: Scale, vocab_size: int | None) -> SearchState:
    certificate = search.certificate(seed_noise(records, search.model, search.tokens))
    waiting = "no result yet" if search.descent.visited else "waits for the search it starts from"
    unfinished = [job for job in search.wanted_jobs if records.get(job) is None]
    return SearchState(
        what=search.what,
        state=str(certificate) if certificate else waiting,
        begun=search.descent.best is not None,
        certified=search.descent.certified,
        next_round=cost_of(unfinished, scale, vocab_size),
        gain=search.gain,
        finer=search.finer,
    )


def few_documents(jobs: Iterable[Job], workspace: Workspace) -> list[str]:
    """Return a sentence for every budget whose order by documents hardly varies.

    Budgets of stores that are not prepared are left out.
    """
    budgets = {
        (job.data, job.unique_tokens - job.holdout_tokens): None
        for job in jobs
        if isinstance(job, Run) and job.data_order == "documents"
    }
    lines = []
    for data, tokens in sorted(budgets):
        path = workspace.data / find_config("data", data, ".toml").stem / "train.lengths.npy"
        if not path.exists():
            continue
        # Imported here: a plan without a store needs no numpy.
        import numpy as np

        count = int(np.searchsorted(np.cumsum(np.load(path)), tokens)) + 1
        if count <= FEW_DOCUMENTS:
            lines.append(
                f"{data}: the first {tokens:,} tokens hold {count} documents, so orders of documents hardly differ between "
                'seeds; data_order "sequences" has more orders.'
            )
    return lines


def store_vocab_size(workspace: Workspace, scale: Scale) -> int | None:
    """Return the vocabulary size of the prepared token store, or None without a store.

    Raises ValueError if the store's meta.json is damaged, edited or of another version.
    """
    meta = store_meta(workspace, scale)
    return None if meta is None else int(meta["vocab_size"])


def store_meta(workspace: Workspace, scale: Scale) -> dict[str, Any] | None:
    """Return the meta.json of a scale's token store, or None without a store.

    Raises ValueError if it is damaged, edited or of another version.
    """
    from epochal.data.store import read_meta

    folder = workspace.data / find_config("data", scale.data, ".toml").stem
    return read_meta(folder) if folder.is_dir() else None
