"""`epochal plan --watch`: what runs now, on this machine or in the queue, read from the campaign's folder."""

import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from epochal.campaign.cluster import ClusterCampaign, load_cluster_campaign
from epochal.campaign.display import last_metrics
from epochal.campaign.plan import campaign_jobs, partition_jobs
from epochal.records import Workspace, load_records, read_table
from epochal.scale import Scale
from launch import slurm
from launch.planner import names_of

# Running, queued and failed jobs that are listed by name.
MAX_LISTED = 30


def watch(recipes: Sequence[str], workspace: Workspace, scale: Scale, *, every: float) -> None:
    """Show the state every few seconds until no job is left; off a terminal, print it when it changes."""
    console, before = Console(highlight=False, markup=False, soft_wrap=True), ""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            lines, remaining = state(recipes, workspace, scale)
            text = "\n".join(lines)
            if console.is_terminal:
                live.update(text, refresh=True)
            elif text != before:
                console.print(f"{time.strftime('%F %T')} {text}")
            before = text
            if not remaining:
                return
            time.sleep(every)


def state(recipes: Sequence[str], workspace: Workspace, scale: Scale) -> tuple[list[str], int]:
    """Return the lines to show and the number of jobs that are not done."""
    records = load_records(workspace)
    status = partition_jobs(campaign_jobs(recipes, records, scale), records)
    tasks, planners = _queued(workspace)
    running, queued, failed = [], [], []
    for name in (job.name for job in status.ready):
        if attempt := _attempt(workspace, name):
            place = f"{tasks[name].job_id} on {tasks[name].node}" if name in tasks else f"on {attempt['host']}"
            running.append("  ".join(["  running", name, *last_metrics(workspace, name), place]))
            continue
        if name in tasks:
            queued.append(f"  queued   {name}  {tasks[name].job_id} {tasks[name].state.lower()}")
        if failure := read_table(workspace.folder(name) / "failure.json"):
            error, attempts = failure.get("error", ""), failure.get("attempts", 1)
            failed.append(f"  failed   {name}: {error} (failed {attempts} times)")
    counts = (
        f"{workspace.scale}: {len(status.done)} done, {len(running)} running, {len(queued)} in the queue, "
        f"{len(status.ready)} ready in all, {len(status.waiting)} waiting"
    )
    lines = [counts, *planners, *running[:MAX_LISTED], *queued[:MAX_LISTED], *failed[:MAX_LISTED]]
    return lines, len(status.ready) + len(status.waiting)


def _queued(workspace: Workspace) -> tuple[dict[str, slurm.Task], list[str]]:
    """Return the queued task of each job, and one line per campaign about its planner."""
    tasks_by_job: dict[str, slurm.Task] = {}
    lines = []
    for campaign in _active_campaigns(workspace):
        try:
            tasks = slurm.queue(campaign.planner_name, campaign.runs_name)
        except slurm.SlurmError as error:
            # The controller may be busy; the rest of the state comes from files.
            lines.append(f"  planner  unknown: {error}")
            continue
        planners = ", ".join(
            f"{task.job_id} {task.state.lower()}" for task in tasks if task.name == campaign.planner_name
        )
        lines.append(f"  planner  {planners or 'none: the next task to end submits one, or submit again'}")
        for task in tasks:
            if task.name == campaign.runs_name:
                tasks_by_job |= dict.fromkeys(names_of(campaign, task), task)
    return tasks_by_job, lines


def _active_campaigns(workspace: Workspace) -> Iterator[ClusterCampaign]:
    if shutil.which("squeue") is None:
        return
    for path in sorted((workspace.work / workspace.scale / "cluster").glob("campaign-*.json")):
        campaign = load_cluster_campaign(path)
        if campaign is not None:
            yield campaign


def _attempt(workspace: Workspace, name: str) -> dict[str, Any]:
    """Return the attempt.json of a running job; empty if no process runs it."""
    table = read_table(workspace.folder(name) / "attempt.json")
    # Only on this machine can we tell that the process was killed.
    on_this_machine = table.get("host") == platform.node()
    return {} if on_this_machine and not Path(f"/proc/{table['pid']}").exists() else table
