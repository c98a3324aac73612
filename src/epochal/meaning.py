"""What the files in a job's folder were made from.

`work/<scale>/<job>/meaning.json` holds the fields and the fingerprint of the job, the fingerprints of the jobs it reads, and
hashes of the files it reads. A job whose meaning differs moves what it finds to the folder `aside` and starts afresh.
"""

import functools
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from epochal.config import flat_table, model_folder, to_table, write_atomic
from epochal.records import MEANING, Records, Workspace, file_hash, input_fingerprints, read_table
from epochal.run import Ensemble, Job, Run, config_files, config_hash, fingerprint, inputs

log = logging.getLogger(__name__)

ASIDE = "aside"

# Files of the running attempt, which are no results.
OF_THE_ATTEMPT = ("attempt.json", "failure.json", "run.json", "stop", "error.txt")


def take_folder(job: Job, workspace: Workspace, records: Records) -> tuple[dict[str, Any], str | None]:
    """Make a job's folder belong to the job as it is now; call it with the job claimed.

    Returns the meaning as a JSON object, and a sentence on what was set aside (None: nothing), which is logged too.
    """
    meaning = meaning_of(job, workspace, records)
    folder = workspace.folder(job.name)
    before = read_table(folder / MEANING)
    if before == meaning:
        return meaning, None
    message = None
    if _state(folder):
        aside = set_aside(folder)
        message = (
            f"{job.name}: files in {folder} were made {describe(before, meaning)}; moved to {aside}, starting afresh."
        )
        log.warning(message)
    write_atomic(folder / MEANING, json.dumps(meaning, indent=1))
    return meaning, message


def meaning_of(job: Job, workspace: Workspace, records: Records) -> dict[str, Any]:
    """Return what a job's files are made from, as a JSON object.

    Raises ValueError if a job that it reads has no record, or diverged.
    """
    files = {f"{kind} file": config_hash(path)[:16] for kind, path in config_files(job).items()}
    if isinstance(job, Run):
        files["text"] = _store_mark(workspace, job)
        if job.init_from is not None and "/" in job.init_from:
            files["weights to start from"] = _folder_mark(model_folder(job.init_from))
    for name in files_read(job, records):
        files[f"output of {name}"] = _output_mark(workspace.folder(name))
    known = made_from(job, fingerprint(job), input_fingerprints(job, records))
    # Through JSON, so that it equals what is read back: tuples become lists.
    table: dict[str, Any] = json.loads(json.dumps({**known, "files": files}))
    return table


def made_from(job: Job, fingerprint: str, inputs: dict[str, str]) -> dict[str, Any]:
    """Return the part of a job's meaning that its record holds too."""
    fields = flat_table(to_table(job))
    del fields["name"]
    return {"fingerprint": fingerprint, "inputs": inputs, "job": fields}


def describe(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return how two meanings differ: "with batch_size 4 instead of 8"."""
    if not before:
        return "by an unknown job"
    old, new = _flat(before), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    differing = [f"{name} {old.get(name, 'unset')} instead of {new.get(name, 'unset')}" for name in names]
    return f"with {', '.join(differing)}" if differing else "by another version of the job"


def set_aside(folder: Path) -> Path:
    """Move the state in a job's folder to its folder `aside`; one earlier state is kept."""
    aside = folder / ASIDE
    # The meaning is moved last: if it is there, what is in `aside` is complete and older. Otherwise a killed process
    # has begun to move this state.
    if (aside / MEANING).exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    for path in _state(folder):
        shutil.rmtree(aside / path.name, ignore_errors=True)
        path.replace(aside / path.name)
    if (folder / MEANING).exists():
        (folder / MEANING).replace(aside / MEANING)
    else:
        (aside / MEANING).write_text("{}", encoding="utf-8")
    return aside


def _state(folder: Path) -> list[Path]:
    """Return what a job left in its folder; files of the running attempt are left out."""
    kept = {*OF_THE_ATTEMPT, ASIDE, MEANING}
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    # Temporary files of killed writers are deleted with the claim (`epochal.campaign.sweep`), and are not state.
    return [path for path in found if path.name not in kept and not (path.is_file() and path.suffix == ".tmp")]


def _flat(meaning: dict[str, Any]) -> dict[str, Any]:
    parts = {**meaning.get("job", {}), **{f"input {k}": v for k, v in meaning.get("inputs", {}).items()}}
    return {**parts, **meaning.get("files", {})}


def files_read(job: Job, records: Records) -> list[str]:
    """Names of the jobs whose output files a job reads; an Ensemble has none, so its members instead."""
    names = []
    for name in inputs(job):
        record = records.named(name)
        names += files_read(record.job, records) if record and isinstance(record.job, Ensemble) else [name]
    return names


def _output_mark(folder: Path) -> str:
    """Return a hash of the checksums of a job's output."""
    path = folder / "checksums.json"
    return file_hash(path)[:16] if path.is_file() else "without checksums"


def _store_mark(workspace: Workspace, run: Run) -> str:
    """Return a hash of the checksums of a run's token store: the same config may have been built from other text."""
    meta = read_table(workspace.data / config_files(run)["data"].stem / "meta.json")
    return hashlib.sha256(json.dumps(meta.get("files"), sort_keys=True).encode()).hexdigest()[:16]


def _folder_mark(folder: Path) -> str:
    """Return a hash of the weights in a model folder from elsewhere."""
    files = sorted(folder.glob("*.safetensors"))
    marks = [_file_mark(path, (stat := path.stat()).st_mtime_ns, stat.st_size, stat.st_ino) for path in files]
    return hashlib.sha256("".join(marks).encode()).hexdigest()[:16]


@functools.cache
def _file_mark(path: Path, mtime_ns: int, size: int, inode: int) -> str:
    return file_hash(path)
