"""Checksums of job outputs, checked before another job reads them.

`work/<scale>/<job>/checksums.json` holds the SHA-256 of every output file. Outputs without one (made by an older version, or
copied in by hand) are not checked.
"""

import json
import shutil
from pathlib import Path

from epochal.config import write_atomic
from epochal.meaning import describe, files_read, made_from, set_aside
from epochal.records import MEANING, Records, Workspace, file_hash, load_records, read_table
from epochal.run import Ensemble, Job


def write_checksums(workspace: Workspace, job: Job) -> None:
    """Write the hashes of the files that a job has just produced."""
    output = workspace.output(job)
    if output is not None and output.exists():
        # An output is a file or a folder.
        paths = sorted(path for path in [output, *output.rglob("*")] if path.is_file())
        hashes = {str(path.relative_to(output.parent)): file_hash(path) for path in paths}
        write_atomic(workspace.folder(job.name) / "checksums.json", json.dumps(hashes, indent=1))


def quarantine_corrupt_inputs(job: Job, records: Records) -> list[str]:
    """Move the corrupt inputs of a job aside, so that they are recomputed; returns one message for each."""
    messages = []
    for name in sorted(set(files_read(job, records))):
        record, folder = records.named(name), records.workspace.folder(name)
        output = None if record is None else records.workspace.output(record.job)
        if record is None or output is None:
            continue
        if output.exists() and not records.made_output(record):
            difference = describe(
                read_table(folder / MEANING), made_from(record.job, record.fingerprint, record.inputs)
            )
            aside = set_aside(folder)
            messages.append(f"{output} was made {difference}: moved to {aside}, it will be recomputed.")
            continue
        damage = _damage(folder)
        if damage is None or not output.exists():
            continue
        aside = output.with_name(f"{output.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        # Renamed, not deleted: the file may show what went wrong. The plan sees that the output is missing.
        output.rename(aside)
        messages.append(f"{output} is damaged ({damage}): moved to {aside.name}, it will be recomputed.")
    return messages


def check_inputs_unchanged(job: Job, before: Records) -> None:
    """Raise ValueError if an input of a job was replaced since `before` was read."""
    now = load_records(before.workspace)
    for name in sorted(set(files_read(job, before))):
        old, new = before.named(name), now.named(name)
        if old is None or new is None or new.fingerprint != old.fingerprint or not now.made_output(new):
            raise ValueError(
                f"{name!r} was replaced while {job.name!r} read it; run again to make {job.name!r} from it."
            )


def refuse_damaged(job: Job, records: Records) -> None:
    """Raise ValueError if weights of a finished job or of its members are damaged; nothing is moved or changed.

    For commands that read models outside of a campaign: eval, generate, export.
    """
    names = set(files_read(job, records)) if isinstance(job, Ensemble) else {job.name}
    for name in sorted(names):
        folder = records.workspace.folder(name)
        damage = _damage(folder)
        if damage is not None:
            raise ValueError(f"{folder} is damaged: {damage}; run its campaign again, which makes {name!r} again.")


def _damage(folder: Path) -> str | None:
    """Describe the first output file that does not match its checksum; None if all match, or there are no checksums."""
    path = folder / "checksums.json"
    try:
        hashes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return f"{path.name} cannot be read"
    if not isinstance(hashes, dict) or not all(isinstance(expected, str) for expected in hashes.values()):
        return f"{path.name} is not a table of hashes"
    present = [name for name in hashes if (folder / name).exists()]
    if not present:
        return None  # deleted to save space: the plan already sees that the output is missing
    for name, expected in hashes.items():
        if name not in present:
            return f"{name} is missing"
        if not (folder / name).is_file():
            return f"{name} is not a file"
        if file_hash(folder / name) != expected:
            return f"{name} does not match its checksum"
    return None
