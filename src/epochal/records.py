"""Records: the small JSON a finished job leaves, and the only state a campaign has.

Heavy outputs are in the work folder and can be computed again.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epochal.config import from_table, to_table, write_atomic
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
        except FileNotFoundError:  # deleted by another process since the folder was listed
            continue
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path.name}: {error}")
    return Records(workspace, records, problems)


def load_record(workspace: Workspace, name: str) -> Record | None:
    """Read one record; None if it is missing or malformed."""
    try:
        return _read(workspace.records / f"{name}.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> Record:
    """Read a record; a file that has not been replaced since is not read again."""
    # Workers plan from all records after each job, and there may be thousands.
    stat = path.stat()
    return _read_version(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=100_000)
def _read_version(path: Path, inode: int, mtime_ns: int, size: int) -> Record:
    # NaN and Infinity are not JSON, though Python reads and writes them.
    table = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    if not isinstance(table, dict):
        raise ValueError("must be a JSON object")
    if table.get("version") != VERSION:
        raise ValueError(f"has version {table.get('version')!r}, not {VERSION}")
    if table.get("kind") not in KINDS or table.get("status") not in STATUSES:
        raise ValueError(f"has kind {table.get('kind')!r} and status {table.get('status')!r}, which are unknown")
    missing = [key for key in FIELDS if key not in table]
    if missing:
        raise ValueError(f"misses {' and '.join(missing)}")
    job = from_table(table["job"], KINDS[table["kind"]], where="job")
    if job.name != path.stem:
        raise ValueError(f"names the job {job.name!r}, whose record is {job.name}.json")
    for key in ("results", "inputs", "provenance"):
        if not isinstance(table[key], dict):
            raise ValueError(f"holds no table of {key}")
    if not isinstance(table["fingerprint"], str):
        raise ValueError(f"fingerprint must be a string, got {table['fingerprint']!r}")
    record = Record(job, table["fingerprint"], table["status"], table["results"], table["inputs"], table["provenance"])
    if record.status == "done" and not isinstance(job, Samples | Targets):
        _check_results(record)
    return record


def _no_number(constant: str) -> None:
    raise ValueError(f"must hold finite numbers, got {constant}")


def _check_results(record: Record) -> None:
    """Raise ValueError for results that no report can read: a loss that is not finite, or a malformed curve."""
    for key in ("loss", "test_loss", "parameters"):
        value = record.results.get(key)
        if value is not None and not _is_number(value):
            raise ValueError(f"{key} must be a number, got {value!r}")
    if not math.isfinite(record.loss):
        raise ValueError("is done but has no finite loss")
    curve = record.results.get("curve")
    if isinstance(record.job, Ensemble) and curve is not None:
        sound = isinstance(curve, dict) and all(isinstance(losses, list) and losses for losses in curve.values())
        if not sound or not all(k.isdecimal() and all(map(_is_number, losses)) for k, losses in curve.items()):
            raise ValueError("curve must be a table of losses by number of members")
    for task in record.job.tasks if isinstance(record.job, Ensemble) else ():
        answers = record.results.get("tasks", {}).get(task, {}).get("right")
        if not isinstance(answers, str) or not answers or set(answers) - {"0", "1"}:
            raise ValueError(f"has no answers, a 1 or a 0 each, to the task {task!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- writing, and errors ----------------------------------------------------------------------------------------------


def write_record(workspace: Workspace, record: Record) -> Path:
    """Write a record atomically and return its path."""
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
    write_atomic(path, json.dumps(table, indent=1, allow_nan=False) + "\n")
    return path


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
