"""Slurm commands: write sbatch files, submit them, read the queue.

submitit only renders the sbatch file. Its executor is not used because it passes pickled functions; a task here reads its
jobs from a JSON file by its array index.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.campaign.cluster import ClusterCampaign
from epochal.config import REPOSITORY, nearest, seconds

# Most tasks in one array: Slurm's default MaxArraySize of 1,001 allows indices 0 to 1,000.
ARRAY_TASKS = 1000

# Attempts, and seconds between them, while the Slurm controller does not answer (restarting or busy).
TRIES, TRY_SECONDS = 6, 10.0


class SlurmError(RuntimeError):
    """A Slurm command failed or is not installed; the message is its error output."""


@dataclass(frozen=True)
class Task:
    """One line of squeue; the job id of an array task is `job_index`."""

    job_id: str
    name: str
    state: str
    node: str
    comment: str
    elapsed: str

    @property
    def index(self) -> int:
        """Index in its array."""
        return int(self.job_id.partition("_")[2] or 0)


def render(
    campaign: ClusterCampaign, command: list[str], *, name: str, tasks: int = 0, comment: str = "", nodes: int = 1
) -> str:
    """Return the sbatch file of the planner (tasks = 0) or an array; raises ValueError for an unknown option."""
    from submitit.slurm import slurm

    cluster = campaign.cluster
    minutes = max(1, round(seconds(cluster.time_limit) / 60))
    options: dict[str, Any] = {"time": minutes, "nodes": nodes, "ntasks_per_node": 1, **cluster.slurm}
    if not tasks:
        options = {**_for_planner(options), "time": 30, **cluster.planner}
    known = slurm._get_default_parameters()
    for key in (*cluster.slurm, *cluster.planner):
        if key not in known:
            raise ValueError(
                f"cluster {cluster.name!r}: Slurm option {key!r} is unknown to submitit{nearest(key, known)}; "
                "correct it, or put sbatch's own name for it under additional_parameters."
            )
    # requeue: a task whose node fails starts again, from its checkpoint.
    extra = dict(options.pop("additional_parameters", {}))
    extra |= {"requeue": True, **({"comment": comment} if comment else {})}
    if tasks:
        # B: the signal goes to the batch shell, which is the task itself after `exec`.
        extra["signal"] = f"B:USR1@{round(seconds(cluster.grace))}"
    text: str = slurm._make_sbatch_string(
        command="exec " + shlex.join(command),
        folder=campaign.folder / "logs",
        **{**options, "job_name": name, "stderr_to_stdout": True, "use_srun": False},
        setup=[*_environment(), *cluster.setup],
        map_count=tasks or None,
        **({"array_parallelism": cluster.parallel} if tasks else {}),
        additional_parameters=extra,
    )
    return text + "\n"


def _for_planner(options: dict[str, Any]) -> dict[str, Any]:
    """Options that the planner shares with training jobs: where to run and who pays, not the resources."""
    kept = ("partition", "account", "qos", "constraint", "exclude", "wckey", "additional_parameters")
    return {"nodes": 1, "ntasks_per_node": 1, **{key: options[key] for key in kept if key in options}}


def _environment() -> list[str]:
    """Shell lines that give a job the submitter's folder and Python path."""
    paths = shlex.quote(f"{REPOSITORY / 'src'}:{REPOSITORY}")
    # Without the safe path, `python -m` would import a file such as numpy.py of the working folder.
    return [
        "export PYTHONSAFEPATH=1",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f'export PYTHONPATH={paths}"${{PYTHONPATH:+:$PYTHONPATH}}"',
    ]


def planner_script(campaign: ClusterCampaign) -> str:
    """Return the sbatch file of the planner."""
    command = [sys.executable, "-m", "launch.planner", str(campaign.path)]
    return render(campaign, command, name=campaign.planner_name)


def array_script(campaign: ClusterCampaign, batch: Path, tasks: int, *, nodes: int) -> str:
    """Return the sbatch file of the array that runs a batch."""
    command = [sys.executable, "-m", "launch.array_task", str(batch)]
    return render(campaign, command, name=campaign.runs_name, tasks=tasks, comment=batch.stem, nodes=nodes)


def submit(script: str, folder: Path, *, dependency: str | None = None) -> str:
    """Submit an sbatch file and return the job id."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--parsable", *([f"--dependency={dependency}"] if dependency else [])]
    return call(command, script).strip().partition(";")[0]


def check(script: str) -> None:
    """Raise SlurmError if Slurm would refuse an sbatch file."""
    call(["sbatch", "--test-only"], script)


def queue(*names: str) -> list[Task]:
    """Return the pending, running and completing tasks with these job names."""
    command = ["squeue", "--noheader", "--array", f"--name={','.join(names)}", "--format=%i|%j|%T|%N|%M|%k"]
    lines = [line.split("|", 5) for line in call(command).splitlines() if line]
    return [Task(job, name, state, node, comment, elapsed) for job, name, state, node, elapsed, comment in lines]


def update(job_id: str, **values: str) -> bool:
    """Change a pending job; returns False if it is no longer pending."""
    command = ["scontrol", "update", f"JobId={job_id}", *(f"{key}={value}" for key, value in values.items())]
    return subprocess.run(command, env=_clean_environment(), capture_output=True, check=False).returncode == 0


def cancel(*job_ids: str) -> None:
    """Cancel jobs; errors are ignored because a job may have ended in the meantime."""
    if job_ids:
        subprocess.run(["scancel", *job_ids], env=_clean_environment(), capture_output=True, check=False)


def after_any(tasks: list[str]) -> str:
    """Return a dependency that is satisfied when the first of these tasks ends."""
    # "?" is Slurm's "or"; afterany does not ask for success.
    # The first hundred are enough: they were submitted first, and the next planner sees all that ended.
    return "?".join(f"afterany:{task}" for task in tasks[:100])


def call(command: list[str], text: str | None = None) -> str:
    """Run a Slurm command, retrying while the controller does not answer; raises SlurmError if it fails."""
    for attempt in range(TRIES):
        try:
            result = subprocess.run(
                command, input=text, env=_clean_environment(), capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise SlurmError(f"{command[0]} is not installed") from None
        if result.returncode == 0:
            return result.stdout
        unanswered = any(
            reason in result.stderr for reason in ("Unable to contact", "timed out", "Zero Bytes", "try again")
        )
        if not unanswered or attempt + 1 == TRIES:
            break
        time.sleep(TRY_SECONDS)
    raise SlurmError(f"{command[0]}: {result.stderr.strip() or f'exit code {result.returncode}'}")


def _clean_environment() -> dict[str, str]:
    """Return the environment without the SLURM_* variables of the current allocation."""
    # sbatch would read them as options. SLURM_CONF names the configuration of the cluster.
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
