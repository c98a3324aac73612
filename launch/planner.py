"""The job that plans: what is ready and in no hands becomes an array, and the next planner waits for its first end.

`python -m launch.planner NOTE`, started by Slurm. The successor is there before anything else is done, so a planner may
be killed at any moment; every allocation that ends looks whether there is a planner left (`ensure_planner`).
"""

import fcntl
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from epochal.campaign.cluster import Submitted, load_submitted
from epochal.campaign.plan import campaign_jobs
from epochal.campaign.worker import claim, failed, urgency
from epochal.config import write_atomic
from epochal.records import load_records, needed
from epochal.run import Job, Run
from epochal.scale import load_scale
from launch import slurm

WAIT_SECONDS = 60
"""How long a planner waits when there is nothing to wait for: jobs in hands outside Slurm, or a failed attempt."""


def main(note: Path) -> int:
    """Plan one round; returns 0 when it goes on or all is done, 1 when jobs failed for good, 2 for wrong use."""
    campaign = load_submitted(note)
    if campaign is None:
        print(f"{note.name} is gone: the campaign is over or was stopped.")
        return 0
    with _alone(campaign):
        successor = _successor(campaign)
        try:
            return _round(campaign, successor)
        except ValueError as error:
            slurm.cancel(successor)
            print(f"epochal: {error}", file=sys.stderr)
            return 2
        except Exception:
            slurm.update(successor, Dependency="", StartTime=f"now+{WAIT_SECONDS}")
            raise


@contextmanager
def _alone(campaign: Submitted) -> Iterator[None]:
    """Hold the lock of the folder: one planner at a time, whoever submitted it."""
    campaign.folder.mkdir(parents=True, exist_ok=True)
    with (campaign.folder / "planner.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _successor(campaign: Submitted) -> str:
    """Return the planner that follows this one: the one that waits already, or a new one. Others are cancelled."""
    me = os.environ["SLURM_JOB_ID"]
    waiting = [
        task.job_id for task in slurm.queue(campaign.planner_name) if task.job_id != me and task.state == "PENDING"
    ]
    slurm.cancel(*waiting[1:])
    if waiting and slurm.update(waiting[0], Dependency=f"afterany:{me}", StartTime="now"):
        return waiting[0]
    return slurm.submit(slurm.planner_script(campaign), campaign.folder, dependency=f"afterany:{me}")


def _round(campaign: Submitted, successor: str) -> int:
    """Submit what is ready and set what the successor waits for; ends the campaign when nothing is left."""
    tasks = slurm.queue(campaign.runs_name)
    busy = {name for task in tasks for name in names_of(campaign, task)}
    ready, lost = _ready(campaign)
    free = [job for job in ready if job.name not in busy and not _in_hands(campaign, job)]
    alive = [task.job_id for task in tasks] + [task for group in _groups(campaign, free) for task in group]
    print(
        f"{time.strftime('%F %T')}: {len(ready)} ready, {len(busy)} in the queue, {len(free)} submitted, {len(lost)} failed"
    )
    if alive:
        _wait_for(campaign, successor, slurm.after_any(alive))
        return 0
    if ready:
        slurm.update(successor, Dependency="", StartTime=f"now+{WAIT_SECONDS}")
        return 0
    campaign.path.unlink(missing_ok=True)
    slurm.cancel(successor)
    print("nothing is left to do" + (f"; failed: {', '.join(lost)}" if lost else ""))
    return int(bool(lost))


def _ready(campaign: Submitted) -> tuple[list[Job], list[str]]:
    """Return the jobs to do, the most urgent first, and the names of those that failed for good."""
    orders = campaign.orders
    records = load_records(orders.workspace)
    jobs = needed(campaign_jobs(orders.recipes, records, load_scale(orders.scale)), records)
    lost = [job.name for job in jobs if failed(orders.workspace, job, orders)]
    return sorted((job for job in jobs if job.name not in lost), key=urgency, reverse=True), lost


def _in_hands(campaign: Submitted, job: Job) -> bool:
    """Whether somebody outside this queue works on the job: a worker on a login node, another user."""
    with claim(campaign.orders.workspace, job) as free:
        return not free


def _groups(campaign: Submitted, jobs: Sequence[Job]) -> Iterator[list[str]]:
    """Submit jobs as arrays, those on several nodes apart from those on one; yields the task ids of each array."""
    nodes = campaign.cluster.nodes
    runs = [job.name for job in jobs if nodes > 1 and isinstance(job, Run)]
    rest = [job.name for job in jobs if job.name not in runs]
    for names, width, pack in ((runs, nodes, 1), (rest, 1, campaign.cluster.pack)):
        packs = [names[i : i + pack] for i in range(0, len(names), pack)][: slurm.ARRAY_TASKS]
        if packs:
            batch = write_batch(campaign, packs, nodes=width)
            job_id = slurm.submit(slurm.array_script(campaign, batch, len(packs), nodes=width), campaign.folder)
            yield [f"{job_id}_{index}" for index in range(len(packs))]


def write_batch(campaign: Submitted, packs: Sequence[Sequence[str]], *, nodes: int) -> Path:
    """Write which task of an array does which jobs; return the file, whose name the array carries as its comment."""
    path = campaign.folder / "batches" / f"{uuid.uuid4().hex[:12]}.json"
    write_atomic(path, json.dumps({"campaign": str(campaign.path), "nodes": nodes, "tasks": packs}, indent=1))
    return path


def names_of(campaign: Submitted, task: slurm.Task) -> list[str]:
    """Return the jobs of a task in the queue."""
    table = json.loads((campaign.folder / "batches" / f"{task.comment}.json").read_text(encoding="utf-8"))
    names: list[str] = table["tasks"][task.index]
    return names


def _wait_for(campaign: Submitted, successor: str, dependency: str) -> None:
    """Let the successor wait; somebody may have cancelled it meanwhile, then there is a new one."""
    if not slurm.update(successor, Dependency=dependency):
        slurm.submit(slurm.planner_script(campaign), campaign.folder, dependency=dependency)


def ensure_planner(campaign: Submitted) -> None:
    """Submit a planner if the campaign goes on and none is left."""
    if campaign.path.exists() and not slurm.queue(campaign.planner_name):
        slurm.submit(slurm.planner_script(campaign), campaign.folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
