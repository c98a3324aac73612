"""Seals of what jobs leave for others: a flipped bit or a cut file is found before anybody learns from it.

`work/<scale>/<job>/seal.json` holds the hash of every file that other jobs read from this one. Weights made before there
were seals, or copied in by hand, have none and are taken as they are.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from epochal.config import write_atomic
from epochal.records import Records, Workspace, file_hash
from epochal.run import Ensemble, Job, inputs


def seal(workspace: Workspace, job: Job) -> None:
    """Write the hashes of what a job has just left."""
    output = workspace.output(job)
    if output is not None and output.exists():
        files = {str(path.relative_to(output.parent)): file_hash(path) for path in _files(output)}
        write_atomic(workspace.folder(job.name) / "seal.json", json.dumps(files, indent=1))


def set_aside_damaged_inputs(job: Job, records: Records) -> list[str]:
    """Check all that a job reads; what is damaged is moved aside, so that it is made again. Returns what to say."""
    said = []
    for name in sorted(_reads(job, records)):
        damage = _damage(records.workspace.folder(name))
        record = records.named(name)
        output = None if record is None else records.workspace.output(record.job)
        if damage is None or output is None:
            continue
        aside = output.with_name(f"{output.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        output.rename(aside)
        said.append(f"{output} is damaged ({damage}): kept as {aside.name} and made again.")
    return said


def _reads(job: Job, records: Records) -> set[str]:
    """Names of the jobs whose files a job reads: an Ensemble stands for its members."""
    names: set[str] = set()
    for name in inputs(job):
        record = records.named(name)
        names |= set(record.job.runs) if record is not None and isinstance(record.job, Ensemble) else {name}
    return names


def _damage(folder: Path) -> str | None:
    """Say which sealed file of a job is not what it was; None when all are, or there is no seal or no output."""
    try:
        files = json.loads((folder / "seal.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    present = [name for name in files if (folder / name).exists()]
    if not present:
        return None  # deleted to save space: known to the plan already
    for name, expected in files.items():
        if name not in present:
            return f"{name} is missing"
        if file_hash(folder / name) != expected:
            return f"{name} does not match its hash"
    return None


def _files(output: Path) -> Iterator[Path]:
    if output.is_file():
        yield output
    else:
        yield from sorted(path for path in output.rglob("*") if path.is_file())
