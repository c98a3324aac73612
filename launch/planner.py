"""The planner job: submits all jobs that are ready and unclaimed as an array, then waits for the first task to end.

`python -m launch.planner CAMPAIGN_FILE`, started by Slurm. A planner submits its successor before anything else, so it may be
killed at any moment; each array task that ends submits a planner if none is in the queue (`ensure_planner`).
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

from epochal.campaign.cluster import ClusterCampaign, load_cluster_campaign
from epochal.campaign.plan import campaign_jobs, ready_jobs
from epochal.campaign.worker import claim, has_failed, urgency
from epochal.config import write_atomic
from epochal.records import load_records
from epochal.run import Job, Run
from epochal.scale import load_scale
from launch import slurm

# Delay of the next planner if there is no task to wait for: jobs run outside Slurm, or this round failed.
WAIT_SECONDS = 60


def main(path: Path) -> int:
    """Plan one round; returns 0 if the campaign continues or all is done, 1 if jobs failed, 2 for wrong use."""
    campaign = load_cluster_campaign(path)
    if campaign is None:
        print(f"{path.name} is gone: the campaign is over or was stopped.")
        return 0
    with _planner_lock(campaign):
        # Before anything else: if this planner is killed, the next one is already in the queue.
        successor = _successor(campaign)
        try:
            return _round(campaign, successor)
        except ValueError as error:  # would fail in every round
            slurm.cancel(successor)
            print(f"epochal: {error}", file=sys.stderr)
            return 2
        except Exception:
            slurm.update(successor, Dependency="", StartTime=f"now+{WAIT_SECONDS}")
            raise


@contextmanager
def _planner_lock(campaign: ClusterCampaign) -> Iterator[None]:
    """Lock the folder: two users may have submitted planners, but only one works at a time."""
    campaign.folder.mkdir(parents=True, exist_ok=True)
    with (campaign.folder / "planner.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _successor(campaign: ClusterCampaign) -> str:
    """Return the job id of the next planner: one that is already pending, or a new one; cancel all others."""
    own_id = os.environ["SLURM_JOB_ID"]
    pending = [
        task.job_id for task in slurm.queue(campaign.planner_name) if task.job_id != own_id and task.state == "PENDING"
    ]
    slurm.cancel(*pending[1:])
    if pending and slurm.update(pending[0], Dependency=f"afterany:{own_id}", StartTime="now"):
        return pending[0]
    return slurm.submit(slurm.planner_script(campaign), campaign.folder, dependency=f"afterany:{own_id}")


def _round(campaign: ClusterCampaign, successor: str) -> int:
    """Submit the ready jobs and set the successor's dependency; end the campaign if no job is left."""
    tasks = slurm.queue(campaign.runs_name)
    queued = {name for task in tasks for name in names_of(campaign, task)}
    ready, failed = _ready_and_failed(campaign)
    free = [job for job in ready if job.name not in queued and not _is_claimed(campaign, job)]
    task_ids = [task.job_id for task in tasks] + _submit_arrays(campaign, free)
    print(
        f"{time.strftime('%F %T')}: {len(ready)} ready, {len(queued)} in the queue, {len(free)} submitted, "
        f"{len(failed)} failed"
    )
    if task_ids:
        _set_dependency(campaign, successor, slurm.after_any(task_ids))
        return 0
    if ready:  # all claimed outside this queue: look again later
        slurm.update(successor, Dependency="", StartTime=f"now+{WAIT_SECONDS}")
        return 0
    # Tells planners and tasks that the campaign is over; see `ensure_planner`.
    campaign.path.unlink(missing_ok=True)
    slurm.cancel(successor)
    print("the campaign is complete" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _ready_and_failed(campaign: ClusterCampaign) -> tuple[list[Job], list[str]]:
    """Return the ready jobs, most urgent first, and the names of those without retries."""
    config = campaign.config
    records = load_records(config.workspace)
    jobs = ready_jobs(campaign_jobs(config.recipes, records, load_scale(config.scale)), records)
    failed = [job.name for job in jobs if has_failed(config.workspace, job, config)]
    return sorted((job for job in jobs if job.name not in failed), key=urgency, reverse=True), failed


def _is_claimed(campaign: ClusterCampaign, job: Job) -> bool:
    """Whether a process outside this queue runs the job."""
    # Such as a worker on a login node. The claim is released immediately: only the task will hold it.
    with claim(campaign.config.workspace, job) as claimed:
        return not claimed


def arrays(campaign: ClusterCampaign, jobs: Sequence[Job]) -> Iterator[tuple[list[list[str]], int]]:
    """Yield arrays: the job names of each task, and the nodes of a task."""
    # Tasks of one array have equal resources, so multi-node runs get an array separate from the rest.
    nodes, pack = campaign.cluster.nodes, campaign.cluster.pack
    wide = [job.name for job in jobs if nodes > 1 and isinstance(job, Run)]
    narrow = [job.name for job in jobs if job.name not in wide]
    for names, per_task, width in ((wide, 1, nodes), (narrow, pack, 1)):
        if names:
            yield [names[i : i + per_task] for i in range(0, len(names), per_task)], width


def _submit_arrays(campaign: ClusterCampaign, jobs: Sequence[Job]) -> list[str]:
    """Submit jobs as arrays; returns the ids of all tasks."""
    task_ids = []
    for tasks, nodes in arrays(campaign, jobs):
        # The rest is submitted by a later planner.
        tasks = tasks[: slurm.ARRAY_TASKS]
        batch = write_batch(campaign, tasks, nodes=nodes)
        job_id = slurm.submit(slurm.array_script(campaign, batch, len(tasks), nodes=nodes), campaign.folder)
        task_ids += [f"{job_id}_{index}" for index in range(len(tasks))]
    return task_ids


def write_batch(campaign: ClusterCampaign, tasks: Sequence[Sequence[str]], *, nodes: int) -> Path:
    """Write which task of an array runs which jobs; returns the file, whose name is the array's comment."""
    path = campaign.folder / "batches" / f"{uuid.uuid4().hex[:12]}.json"
    write_atomic(path, json.dumps({"campaign": str(campaign.path), "nodes": nodes, "tasks": tasks}, indent=1))
    return path


def names_of(campaign: ClusterCampaign, task: slurm.Task) -> list[str]:
    """Return the job names of a task in the queue."""
    table = json.loads((campaign.folder / "batches" / f"{task.comment}.json").read_text(encoding="utf-8"))
    names: list[str] = table["tasks"][task.index]
    return names


def _set_dependency(campaign: ClusterCampaign, successor: str, dependency: str) -> None:
    # Submit another planner if the successor was cancelled in the meantime.
    if not slurm.update(successor, Dependency=dependency):
        slurm.submit(slurm.planner_script(campaign), campaign.folder, dependency=dependency)


def ensure_planner(campaign: ClusterCampaign) -> None:
    """Submit a planner if the campaign is active and none is in the queue."""
    if campaign.path.exists() and not slurm.queue(campaign.planner_name):
        slurm.submit(slurm.planner_script(campaign), campaign.folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
