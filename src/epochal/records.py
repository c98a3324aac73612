"""Records: the small JSON a finished job leaves, and the only state a campaign has.

Heavy outputs are in the work folder and can be computed again.
"""

import functools
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from epochal.config import from_table, parse_json, to_table, write_atomic
from epochal.ranges import Check, Items, Loss, Range, check_known, shown
from epochal.run import Ensemble, Job, Run, Samples, Targets, fingerprint, inputs

VERSION = 1
KINDS: dict[str, type[Job]] = {"Run": Run, "Ensemble": Ensemble, "Samples": Samples, "Targets": Targets}
STATUSES = ("done", "diverged")
FIELDS = ("job", "fingerprint", "results", "inputs", "provenance")
SEED_FIELDS = ("name", "init_seed", "order_seed")

# A file in a job's folder that says what its files were made from (`epochal.meaning`).
MEANING = "meaning.json"

# Characters that no folder of a campaign may have: they would end a line of a batch file.
CONTROL = {*map(chr, range(32)), "\x7f", "\x85", "\u2028", "\u2029"}


@dataclass(frozen=True)
class Record:
    """One finished job. `results["loss"]` is validation nats per token; None when the run diverged."""

    job: Job  # what ran
    fingerprint: str  # hash of the job with its model and data files
    status: str  # "done" or "diverged"
    results: dict[str, Any]  # what came out
    inputs: dict[str, str] = field(default_factory=dict)  # jobs that were read, by name, to their fingerprints
    provenance: dict[str, Any] = field(default_factory=dict)  # where, with what and how fast it ran

    @property
    def loss(self) -> float:
        """Final validation loss in nats per token; inf for a diverged run."""
        value = self.results.get("loss")
        return math.inf if value is None else float(value)

    @property
    def test_loss(self) -> float:
        """Final loss on the test split in nats per token, which claims judge.

        On validation text where the data has no test split; inf for a diverged run.
        """
        value = self.results.get("test_loss")
        return self.loss if value is None else float(value)


@dataclass(frozen=True)
class Workspace:
    """The two folders of a campaign: `results` holds records and reports (commit it), `work` everything heavy."""

    scale: str
    results: Path = Path("recipes/results")
    work: Path = Path("work")

    def __post_init__(self) -> None:
        for what, text in (("scale", self.scale), ("results", str(self.results)), ("work", str(self.work))):
            if set(text) & CONTROL:
                raise ValueError(f"{what} is {text!r}, which has a line break or control character; rename it.")
        # Slurm separates job names by commas, and its tables by bars.
        if not self.scale or set(self.scale) & set(",|/"):
            raise ValueError(f"scale is {self.scale!r}; a scale's name must have no ',', '|' or '/': rename its file.")

    @property
    def records(self) -> Path:
        """Folder of the records of this scale."""
        return self.results / self.scale / "records"

    @property
    def data(self) -> Path:
        """Folder of the token stores, shared by all scales."""
        return self.work / "data"

    def folder(self, name: str) -> Path:
        """Folder of one job: checkpoints, metrics, outputs."""
        return self.work / self.scale / name

    def output(self, job: Job) -> Path | None:
        """Return what other jobs read from this one: a folder, a token file, or nothing for an Ensemble."""
        match job:
            case Run():
                return self.folder(job.name) / "model"
            case Samples():
                return self.folder(job.name) / "samples.npy"
            case Targets():
                return self.folder(job.name) / "targets"
            case Ensemble():
                return None


class Records:
    """The records of one campaign, by name. Malformed files are left out and named in `problems`."""

    def __init__(self, workspace: Workspace, records: Iterable[Record] = (), problems: Iterable[str] = ()) -> None:
        self.workspace = workspace
        self._records = {record.job.name: record for record in records}
        self.problems = tuple(problems)
        # Fingerprints hash model and data files, so each job is checked once.
        self._checked: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def get(self, job: Job) -> Record | None:
        """Return the record of exactly this job, or None.

        Raises ValueError when a record of the same name was made by a job of another meaning.
        """
        record = self._records.get(job.name)
        if record is None or self._checked.get(job.name) == job:
            return record
        if record.fingerprint != fingerprint(job):
            raise ValueError(_mismatch(self.workspace, job, record))
        # The record is of this job; it must also come from the inputs as they are recorded now.
        self._check_inputs(record)
        self._checked[job.name] = job
        return record

    def named(self, name: str) -> Record | None:
        """Return the record of this name, whatever it means."""
        return self._records.get(name)

    def diverged(self, name: str) -> bool:
        """Whether the job of this name ended without a model."""
        record = self._records.get(name)
        return record is not None and record.status == "diverged"

    def has_output(self, job: Job) -> bool:
        """Whether a job's output is on this disk and was made by the recorded job."""
        output, record = self.workspace.output(job), self._records.get(job.name)
        if output is None:
            return True
        present = any(output.iterdir()) if output.is_dir() else output.is_file()
        return present and (record is None or self.made_output(record))

    def made_output(self, record: Record) -> bool:
        """Whether a job's folder was made by the job and inputs of this record."""
        made_from = read_table(self.workspace.folder(record.job.name) / MEANING)
        return (made_from.get("fingerprint"), made_from.get("inputs")) == (record.fingerprint, record.inputs)

    @functools.cached_property
    def settings(self) -> list[list[Record]]:
        """The records of Runs, those that differ in nothing but their seeds together."""
        groups: dict[tuple[object, ...], list[Record]] = {}
        for record in self:
            if isinstance(record.job, Run):
                key = tuple(value for field, value in vars(record.job).items() if field not in SEED_FIELDS)
                groups.setdefault(key, []).append(record)
        return list(groups.values())

    def _check_inputs(self, record: Record) -> None:
        for name, mark in record.inputs.items():
            source = self._records.get(name)
            if source is not None and source.fingerprint != mark:
                raise ValueError(
                    f"record {record.job.name!r} was made from another {name!r} than the one recorded now; "
                    f"delete {self.workspace.records / (record.job.name + '.json')} to make it again."
                )


# --- reading ----------------------------------------------------------------------------------------------------------


def load_records(workspace: Workspace) -> Records:
    """Read all records of a campaign; malformed files are listed in `problems`, not raised."""
    records, problems = [], []
    for path in sorted(workspace.records.glob("*.json")):
        try:
            records.append(_read(path))
        except FileNotFoundError:
            # A record may be deleted while others load; a link to nowhere stays.
            if path.is_symlink():
                problems.append(f"{path.name}: is a link to a file that does not exist")
        except (OSError, ValueError) as error:
            problems.append(f"{path.name}: {error.strerror if isinstance(error, OSError) else error}")
    return Records(workspace, records, problems)


def load_record(workspace: Workspace, name: str) -> Record | None:
    """Read one record; None if it is missing or malformed."""
    try:
        return _read(workspace.records / f"{name}.json")
    except (OSError, ValueError):
        return None


def _read(path: Path) -> Record:
    """Read a record; a file that has not been replaced since is not read again.

    Raises ValueError for a malformed file and OSError for one that cannot be opened.
    """
    # Workers plan from all records after each job, and there may be thousands.
    stat = path.stat()
    return _read_version(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=100_000)
def _read_version(path: Path, inode: int, mtime_ns: int, size: int) -> Record:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None
    table = parse_json(text)
    if table.get("version") != VERSION:
        raise ValueError(f"has version {shown(table.get('version'))}, not {VERSION}")
    kind, status = table.get("kind"), table.get("status")
    if not isinstance(kind, str) or kind not in KINDS or status not in STATUSES:
        raise ValueError(f"has kind {shown(kind)} and status {shown(status)}, which are unknown")
    missing = [key for key in FIELDS if key not in table]
    if missing:
        raise ValueError(f"misses {' and '.join(missing)}")
    job = from_table(table["job"], KINDS[kind], where="job")
    if job.name != path.stem:
        raise ValueError(f"names the job {job.name!r}, whose record is {job.name}.json")
    for key in ("results", "inputs", "provenance"):
        if not isinstance(table[key], dict):
            raise ValueError(f"holds no table of {key}")
    for what, mark in (("fingerprint", table["fingerprint"]), *table["inputs"].items()):
        if not isinstance(mark, str):
            raise ValueError(f"{shown(what)} must have a string, got {shown(mark)}")
    if "checksum" in table and table["checksum"] != _checksum(text):
        raise ValueError("was changed after it was written, so its checksum differs; delete it to make it again")
    record = Record(job, table["fingerprint"], status, table["results"], table["inputs"], table["provenance"])
    _check_results(record)
    return record


# --- what a record may hold -------------------------------------------------------------------------------------------


class ByMembers:
    """A table whose keys are numbers of members."""

    def checker(self, hint: Any) -> Check:
        """Return the check of a curve."""

        def check(table: Any, where: str) -> None:
            if not all(key.isascii() and key.isdecimal() and 0 < int(key[:9]) < 10_000 for key in table):
                raise ValueError(f"{where} must be a table of losses by number of members, got {shown(table)}")

        return check


class TextMark:
    """A text in place of any other type of JSON."""

    def checker(self, hint: Any) -> Check:
        """Return the check of a text."""

        def check(value: Any, where: str) -> None:
            if not isinstance(value, str):
                raise ValueError(f"{where} must be text, got {shown(value)}")

        return check


Count = Annotated[int, Range(0, 10**18)]
Measure = Annotated[float, Range(0.0, 1e30)]
Text = Annotated[str, TextMark()]
Pair = Annotated[tuple[Measure, ...], Items(2, 2, distinct=False)]
# An interval from few subsets may begin below 0, as may the divergence from sampled targets.
Finite = Annotated[float, Range(-1e9, 1e9)]
Losses = Annotated[tuple[Loss, ...], Items(distinct=False)]
Bounds = Annotated[dict[str, Annotated[tuple[Finite, ...], Items(2, 2, distinct=False)]], ByMembers()]
Curve = Annotated[dict[str, Losses], ByMembers()]


@dataclass(frozen=True)
class RunResults:
    """What is read from the results of a Run; others may stand next to it."""

    loss: Loss | None  # None for a diverged run
    parameters: Count | None = None  # of a finished run always
    test_loss: Loss | None = None
    best_loss: Loss | None = None
    train_loss: Finite | None = None
    non_embedding: Count | None = None
    steps: Count | None = None
    tokens: Count | None = None
    curve: tuple[Pair, ...] | None = None  # steps and losses
    spectral_norms: dict[str, Measure] | None = None


@dataclass(frozen=True)
class EnsembleResults:
    """What is read from the results of an Ensemble; others may stand next to it."""

    loss: Loss
    curve: Curve  # of subsets of K members
    members: Count
    parameters: Count  # of all members
    test_loss: Loss | None = None
    without: Curve | None = None  # without one member each
    interval: Bounds | None = None
    test_curve: Curve | None = None
    test_without: Curve | None = None
    test_interval: Bounds | None = None


@dataclass(frozen=True)
class DrawnResults:
    """What is read from the results of Samples and Targets; others may stand next to it."""

    tokens: Count | None = None
    texts: Count | None = None
    members: Count | None = None
    positions: Count | None = None
    kept_mass: Measure | None = None
    bytes: Count | None = None


@dataclass(frozen=True)
class Provenance:
    """What is read from the provenance of a record; others may stand next to it."""

    hours: Measure | None = None
    tokens_per_second: Measure | None = None
    mfu: Measure | None = None
    state_bytes: Count | None = None
    optimizer_share: Measure | None = None
    versions: dict[str, Text] | None = None
    like: dict[str, Text] | None = None


RESULTS: dict[str, Any] = {
    "Run": RunResults,
    "Ensemble": EnsembleResults,
    "Samples": DrawnResults,
    "Targets": DrawnResults,
}


def _check_results(record: Record) -> None:
    """Raise ValueError for results that no report can read."""
    job, results = record.job, record.results
    check_known(results, RESULTS[type(job).__name__])
    check_known(record.provenance, Provenance)
    for key in ("loss", "parameters") if record.status == "done" and isinstance(job, Run | Ensemble) else ():
        if results.get(key) is None:
            raise ValueError(f"is done but has no {key}")
    if record.status == "diverged" and results.get("loss") is not None:
        raise ValueError(f"diverged but has the loss {shown(results['loss'])}")
    like = record.provenance.get("like")
    if like is not None and not {"name", "changes"} <= set(like):
        raise ValueError("like must hold a name and changes")
    if isinstance(job, Ensemble):
        _check_members(job, results)


def _check_members(job: Ensemble, results: dict[str, Any]) -> None:
    """Raise ValueError unless the results are of this many members and of these tasks."""
    count = len(job.runs)
    if results["members"] != count or str(count) not in results["curve"]:
        raise ValueError(f"must have the results of {count} members, with their loss in the curve")
    tasks = results.get("tasks") or {}
    for task in job.tasks:
        answers = tasks.get(task) if isinstance(tasks, dict) else None
        right = answers.get("right") if isinstance(answers, dict) else None
        if not isinstance(right, str) or not right or set(right) - {"0", "1"}:
            raise ValueError(f"has no answers, a 1 or a 0 each, to the task {task!r}")


# --- losses of members ------------------------------------------------------------------------------------------------


def curves(record: Record) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Return the test losses of subsets of K members by K, twice.

    The second table is without one member each, and empty in a record without it. On validation text where the data has no
    test split.
    """
    prefix = "test_" if record.results.get("test_curve") else ""
    tables = (record.results.get(f"{prefix}{name}") or {} for name in ("curve", "without"))
    subsets, without = ({int(k): losses for k, losses in table.items()} for table in tables)
    return subsets, without


def mean_curve(record: Record) -> dict[int, float]:
    """Return the mean test loss over subsets of K members, by K."""
    return {k: statistics.fmean(losses) for k, losses in curves(record)[0].items()}


def validation_curve(record: Record) -> dict[int, float]:
    """Return the mean validation loss over subsets of K members by K, which searches read."""
    return {int(k): statistics.fmean(losses) for k, losses in record.results["curve"].items()}


# --- writing, and errors ----------------------------------------------------------------------------------------------


def write_record(workspace: Workspace, record: Record) -> Path:
    """Write a record atomically and return its path; raises ValueError for one that could not be read again."""
    _check_results(record)
    table = {
        "version": VERSION,
        "kind": type(record.job).__name__,
        "job": to_table(record.job),
        "fingerprint": record.fingerprint,
        "status": record.status,
        "results": record.results,
        "inputs": record.inputs,
        "provenance": record.provenance,
    }
    path = workspace.records / f"{record.job.name}.json"
    text = json.dumps(table, indent=1, allow_nan=False) + "\n"
    write_atomic(path, text.replace("{", f'{{\n "checksum": "{_checksum(text)}",', 1))
    return path


def _checksum(text: str) -> str:
    """Return the hash of a record's text, but for the line of its checksum."""
    # Of the text, because that costs less than to write the table again. A flipped digit leaves valid JSON.
    return hashlib.sha256(re.sub(r'\n "checksum": "[^"]*",', "", text, count=1).encode()).hexdigest()[:16]


def _mismatch(workspace: Workspace, job: Job, record: Record) -> str:
    """Describe how a job differs from the record under its name, and what to do."""
    ours, theirs = to_table(job), to_table(record.job)
    differing = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)] or ["a model or data file"]
    path = workspace.records / f"{job.name}.json"
    return (
        f"record {job.name!r} was made with another {' and '.join(differing)} (fingerprint {record.fingerprint}, "
        f"now {fingerprint(job)}); give the job a new name or delete {path}."
    )


def input_fingerprints(job: Job, records: Records) -> dict[str, str]:
    """Return the fingerprints of the finished jobs that a job reads, with members of ensembles.

    Raises ValueError if one has no record, or diverged and so has no weights.
    """
    fingerprints = {}
    # Text drawn from each member depends on the ensemble only through its weights, not through its average.
    source = records.named(job.source) if isinstance(job, Samples) and job.draw == "members" else None
    if source is not None and isinstance(source.job, Ensemble) and source.job.member_weights is None:
        return input_fingerprints(source.job, records)
    for name in inputs(job):
        record = records.named(name)
        if record is None:
            raise ValueError(f"{job.name!r} reads {name!r}, which has no record; run it first.")
        if record.status == "diverged":
            raise ValueError(f"{job.name!r} reads {name!r}, which diverged and left no weights; name another.")
        fingerprints[name] = record.fingerprint
        if isinstance(record.job, Ensemble):
            fingerprints |= input_fingerprints(record.job, records)
    return fingerprints


def read_table(path: Path) -> dict[str, Any]:
    """Read a small JSON object; empty if the file is missing or malformed."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
