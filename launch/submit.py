"""`epochal run --cluster`: hand a campaign to Slurm, show what would be handed over, or take it back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epochal.campaign.cluster import Submitted, check_locks
from epochal.run import Job, Run
from launch import slurm


def submit(campaign: Submitted) -> str:
    """Submit the first planner and return what to tell the user; a campaign that is in flight is left alone.

    Raises ValueError where locks do not hold between machines, an option is unknown, or Slurm refuses the jobs.
    """
    check_locks(campaign.orders.workspace.work)
    script, nodes = slurm.planner_script(campaign), campaign.cluster.nodes
    with _one_sentence(campaign):
        waiting = slurm.queue(campaign.planner_name)
        if waiting and campaign.path.exists():
            return f"already in flight (planner {waiting[0].job_id}); to change it, stop it first (--stop)."
        slurm.check(slurm.array_script(campaign, Path("batch.json"), 1, nodes=nodes))
        campaign.save()
        job_id = slurm.submit(script, campaign.folder)
    logs = campaign.folder / "logs"
    return f"submitted planner {job_id} as {campaign.planner_name}; epochal plan --watch shows it, logs are in {logs}"


def stop(campaign: Submitted) -> str:
    """Take a campaign back: nothing more is submitted, what runs saves itself."""
    campaign.path.unlink(missing_ok=True)
    with _one_sentence(campaign):
        tasks = slurm.queue(campaign.planner_name, campaign.runs_name)
    slurm.cancel(*(task.job_id for task in tasks))
    return f"stopped: {len(tasks)} jobs cancelled; runs save themselves and continue when it is submitted again."


@contextmanager
def _one_sentence(campaign: Submitted) -> Iterator[None]:
    """Turn what a Slurm command says into a sentence for the user."""
    try:
        yield
    except slurm.SlurmError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"cluster {campaign.cluster.name!r}: {said}; correct the cluster file or try later.") from None


def preview(campaign: Submitted, ready: list[Job]) -> Iterator[str]:
    """Yield the sbatch files that would be submitted now: the planner, and the arrays it would submit."""
    cluster = campaign.cluster
    yield slurm.planner_script(campaign)
    wide = [job for job in ready if cluster.nodes > 1 and isinstance(job, Run)]
    for jobs, nodes, pack in ((wide, cluster.nodes, 1), ([job for job in ready if job not in wide], 1, cluster.pack)):
        if jobs:
            names = ", ".join(job.name for job in jobs[:5]) + (", ..." if len(jobs) > 5 else "")
            text = slurm.array_script(
                campaign, campaign.folder / "batches" / "BATCH.json", -(-len(jobs) // pack), nodes=nodes
            )
            yield f"# {len(jobs)} jobs, {pack} to a task: {names}\n{text}"
