"""`epochal run --cluster`: submit a campaign to Slurm, print its batch files, or stop it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from epochal.campaign.cluster import ClusterCampaign, check_locks
from epochal.run import Job
from launch import slurm
from launch.planner import arrays


def submit(campaign: ClusterCampaign) -> str:
    """Submit the first planner and return a message for the user; does nothing if the campaign is active.

    Raises ValueError if locks do not hold between machines, an option is unknown, or Slurm refuses the jobs.
    """
    check_locks(campaign.config.workspace.work)
    script, nodes = slurm.planner_script(campaign), campaign.cluster.nodes
    with _slurm_errors(campaign):
        planners = slurm.queue(campaign.planner_name)
        if planners and campaign.path.exists():
            return f"already submitted (planner {planners[0].job_id}); to change it, stop it first (--stop)."
        # Slurm also checks the array now: otherwise only the planner's log would say that it is refused.
        slurm.check(slurm.array_script(campaign, Path("batch.json"), 1, nodes=nodes))
        # Only now, so that a refused campaign leaves no file behind.
        campaign.save()
        job_id = slurm.submit(script, campaign.folder)
    logs = campaign.folder / "logs"
    return f"submitted planner {job_id} as {campaign.planner_name}; epochal plan --watch shows it, logs are in {logs}"


def stop(campaign: ClusterCampaign) -> str:
    """Stop a campaign: cancel its jobs, which save checkpoints, and submit nothing more."""
    # First: a planner that starts in the meantime sees that the campaign is over.
    campaign.path.unlink(missing_ok=True)
    with _slurm_errors(campaign):
        tasks = slurm.queue(campaign.planner_name, campaign.runs_name)
    slurm.cancel(*(task.job_id for task in tasks))
    return f"stopped: {len(tasks)} jobs cancelled; runs save checkpoints and resume when it is submitted again."


@contextmanager
def _slurm_errors(campaign: ClusterCampaign) -> Iterator[None]:
    """Turn the error of a Slurm command into one sentence for the user."""
    try:
        yield
    except slurm.SlurmError as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"cluster {campaign.cluster.name!r}: {message}; correct the cluster file or try later."
        ) from None


def preview(campaign: ClusterCampaign, ready: Sequence[Job]) -> Iterator[str]:
    """Yield the sbatch files that would be submitted now: the planner's and those of its arrays."""
    yield slurm.planner_script(campaign)
    for tasks, nodes in arrays(campaign, ready):
        names = [name for task in tasks for name in task]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        script = slurm.array_script(campaign, campaign.folder / "batches" / "BATCH.json", len(tasks), nodes=nodes)
        yield f"# {len(names)} jobs, {len(tasks[0])} to a task: {shown}\n{script}"
