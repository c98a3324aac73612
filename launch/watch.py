"""`epochal plan --watch`: what a campaign does now, here or in a queue, from what lies in its folder. Changes nothing."""

import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from epochal.campaign.cluster import Submitted, load_submitted
from epochal.campaign.display import last_metrics
from epochal.campaign.plan import campaign_jobs
from epochal.records import Workspace, load_records, split
from epochal.scale import Scale
from launch import slurm
from launch.planner import names_of

SHOWN = 30
"""Jobs of each kind that are listed by name."""


def watch(recipes: Sequence[str], workspace: Workspace, scale: Scale, *, every: float) -> None:
    """Show the state again and again until nothing is left to do; elsewhere than on a terminal, when it changes."""
    console, before = Console(highlight=False, markup=False, soft_wrap=True), ""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            lines, left = state(recipes, workspace, scale)
            text = "\n".join(lines)
            if console.is_terminal:
                live.update(text, refresh=True)
            elif text != before:
                console.print(f"{time.strftime('%F %T')} {text}")
            before = text
            if not left:
                return
            time.sleep(every)


def state(recipes: Sequence[str], workspace: Workspace, scale: Scale) -> tuple[list[str], int]:
    """Return what to show, line by line, and how many jobs are not done."""
    records = load_records(workspace)
    parts = split(campaign_jobs(recipes, records, scale), records)
    working = {job.name: _attempt(workspace, job.name) for job in parts.ready}
    running = {name: table for name, table in working.items() if table}
    tasks, planners = _queued(workspace)
    queued = {job.name: tasks[job.name] for job in parts.ready if job.name in tasks and job.name not in running}
    lost = {
        job.name: text for job in parts.ready if (text := _failure(workspace, job.name)) and job.name not in running
    }
    counts = f"{len(parts.done)} done, {len(running)} running, {len(queued)} in the queue, {len(parts.ready)} ready"
    lines = [f"{workspace.scale}: {counts} in all, {len(parts.waiting)} waiting", *planners]
    for name, table in list(running.items())[:SHOWN]:
        place = f"{tasks[name].job_id} on {tasks[name].node}" if name in tasks else f"on {table['host']}"
        lines.append("  ".join(["  running", name, *last_metrics(workspace, name), place]))
    lines += [f"  queued   {name}  {task.job_id} {task.state.lower()}" for name, task in list(queued.items())[:SHOWN]]
    lines += [f"  failed   {name}: {text}" for name, text in list(lost.items())[:SHOWN]]
    return lines, len(parts.ready) + len(parts.waiting)


def _queued(workspace: Workspace) -> tuple[dict[str, slurm.Task], list[str]]:
    """Return the task of every job in Slurm's queue, and a line for each campaign that was submitted."""
    tasks: dict[str, slurm.Task] = {}
    lines = []
    for campaign in _submitted(workspace):
        try:
            found = slurm.queue(campaign.planner_name, campaign.runs_name)
        except slurm.SlurmError as error:
            lines.append(f"  planner  unknown: {error}")
            continue
        planners = [f"{task.job_id} {task.state.lower()}" for task in found if task.name == campaign.planner_name]
        lines.append(
            f"  planner  {', '.join(planners) or 'none: the next task that ends submits one, or run it again'}"
        )
        for task in found:
            if task.name == campaign.runs_name:
                tasks |= dict.fromkeys(names_of(campaign, task), task)
    return tasks, lines


def _submitted(workspace: Workspace) -> Iterator[Submitted]:
    if shutil.which("squeue") is None:
        return
    for path in sorted((workspace.work / workspace.scale / "cluster").glob("campaign-*.json")):
        campaign = load_submitted(path)
        if campaign is not None:
            yield campaign


def _attempt(workspace: Workspace, name: str) -> dict[str, Any]:
    """Return the note of the process that works on a job; empty when there is none, or it died on this machine."""
    table = _read(workspace.folder(name) / "attempt.json")
    here = table.get("host") == platform.node()
    return {} if here and not Path(f"/proc/{table['pid']}").exists() else table


def _failure(workspace: Workspace, name: str) -> str:
    table = _read(workspace.folder(name) / "failure.json")
    return f"{table.get('error', '')} (failed {table.get('attempts', 1)} times)" if table else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table
