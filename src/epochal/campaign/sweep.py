"""Delete what killed processes left in the folders of a campaign."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from epochal.campaign.worker import ERROR_FILE, STOP_NOTE, claim_name
from epochal.records import Record, Workspace, load_record

# In a job's folder: half-written files, models and checkpoints, and scratch files of ensembles. Not `.targets.tmp`, whose
# shards an interrupted job resumes.
LEFT_IN_A_FOLDER = (".*.tmp", ".hidden-*", "checkpoints/.*.tmp")
RESUMED = ".targets.tmp"

# Of a job with a record. A process that is killed after it wrote the record, or whose launcher is, leaves them.
LEFT_OF_A_FINISHED_JOB = ("checkpoints", "attempt.json", "failure.json", STOP_NOTE, ERROR_FILE)


# The scale, results folder and code of the last start in a work folder; written with the claim of this name.
LAST_START = "last_start.json"


def sweep(workspace: Workspace) -> int:
    """Delete temporary files whose writers are dead, and checkpoints of finished jobs; returns how many."""
    found: dict[str, list[Path]] = {}
    for name, path in _left(workspace):
        found.setdefault(name, []).append(path)
    deleted = 0
    for name, paths in found.items():
        # Everything of a job is written by the process that holds its claim: if it is free, the writer is dead.
        with claim_name(workspace, name) as claimed:
            for path in paths if claimed else ():
                deleted += _delete(path)
    return deleted


def _left(workspace: Workspace) -> Iterator[tuple[str, Path]]:
    """Yield the name of a job and what a killed process may have left."""
    for path in workspace.records.glob(".*.json.*.tmp"):
        yield path.name.removeprefix(".").rpartition(".json.")[0], path
    root = workspace.work / workspace.scale
    for path in root.glob(f".{LAST_START}.*.tmp"):
        yield LAST_START, path
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        for pattern in LEFT_IN_A_FOLDER:
            yield from ((folder.name, path) for path in folder.glob(pattern) if path.name != RESUMED)
        left = [path for name in LEFT_OF_A_FINISHED_JOB if (path := folder / name).exists()]
        record = load_record(workspace, folder.name) if left else None
        # Without its output a job is made again.
        if record is not None and _is_finished(record, workspace):
            yield from ((folder.name, path) for path in left)


def _is_finished(record: Record, workspace: Workspace) -> bool:
    output = workspace.output(record.job)
    return record.status == "diverged" or output is None or output.exists()


def _delete(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return int(not path.exists())
