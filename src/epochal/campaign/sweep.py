"""Delete what killed processes left in the folders of a campaign."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from epochal.campaign.worker import claim_name
from epochal.records import Workspace, load_record

# In a job's folder: half-written files, models and checkpoints, and scratch files of ensembles. Not `.targets.tmp`, whose
# shards an interrupted job resumes.
LEFT_IN_A_FOLDER = (".*.tmp", ".hidden-*", "checkpoints/.*.tmp")
RESUMED = ".targets.tmp"


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
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        for pattern in LEFT_IN_A_FOLDER:
            yield from ((folder.name, path) for path in folder.glob(pattern) if path.name != RESUMED)
        # A process that is killed after it wrote the record has not deleted them. Without a model they are of a run that
        # is made again.
        checkpoints, record = folder / "checkpoints", None
        if checkpoints.is_dir():
            record = load_record(workspace, folder.name)
        if record is not None and (record.status == "diverged" or (folder / "model").is_dir()):
            yield folder.name, checkpoints


def _delete(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return int(not path.exists())
