"""Slurm: sbatch files, submission, and what is alive in the queue.

submitit renders the sbatch file and reads node lists. Its executor would pickle a function for every task; pickles are
never loaded here, and a campaign needs none: a task reads its jobs from a JSON file by its array index.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.campaign.cluster import Submitted
from epochal.config import REPOSITORY, nearest, seconds

ARRAY_TASKS = 1000
"""Tasks of one array at most: Slurm's own limit is 1,001 unless the site raised it."""

TRIES, TRY_SECONDS = 6, 10.0
"""How often a command is tried while the controller does not answer (it restarts, it is busy)."""


class SlurmError(RuntimeError):
    """A Slurm command failed, or is not there; the message is what it said."""


@dataclass(frozen=True)
class Task:
    """One line of the queue: job id (`array_index` for a task), name, state, node, and the comment it was given."""

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
    campaign: Submitted, command: list[str], *, name: str, tasks: int = 0, comment: str = "", nodes: int = 1
) -> str:
    """Return the sbatch file of the planner (`tasks` 0) or of an array; raises ValueError for an unknown option."""
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
                "correct it, or put it under additional_parameters by sbatch's own name."
            )
    extra = dict(options.pop("additional_parameters", {}))
    extra |= {"requeue": True, **({"comment": comment} if comment else {})}
    if tasks:
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
    """The options that a small job shares with a training job: where it may run and who pays, not what it takes."""
    kept = ("partition", "account", "qos", "constraint", "exclude", "wckey", "additional_parameters")
    return {"nodes": 1, "ntasks_per_node": 1, **{key: options[key] for key in kept if key in options}}


def _environment() -> list[str]:
    """Shell lines that make a job see what its submitter saw."""
    paths = shlex.quote(f"{REPOSITORY / 'src'}:{REPOSITORY}")
    return [f"cd {shlex.quote(str(Path.cwd()))}", f'export PYTHONPATH={paths}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def planner_script(campaign: Submitted) -> str:
    """Return the sbatch file of the job that plans."""
    command = [sys.executable, "-m", "launch.planner", str(campaign.path)]
    return render(campaign, command, name=campaign.planner_name)


def array_script(campaign: Submitted, batch: Path, tasks: int, *, nodes: int) -> str:
    """Return the sbatch file of an array that works off a batch."""
    command = [sys.executable, "-m", "launch.element", str(batch)]
    return render(campaign, command, name=campaign.runs_name, tasks=tasks, comment=batch.stem, nodes=nodes)


def submit(script: str, folder: Path, *, dependency: str | None = None) -> str:
    """Submit an sbatch file and return the job id."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    words = ["sbatch", "--parsable", *([f"--dependency={dependency}"] if dependency else [])]
    return call(words, script).strip().partition(";")[0]


def check(script: str) -> None:
    """Ask Slurm whether it would take an sbatch file; raises SlurmError when not."""
    call(["sbatch", "--test-only"], script)


def queue(*names: str) -> list[Task]:
    """Return what is alive under these names: pending, running or completing."""
    words = ["squeue", "--noheader", "--array", f"--name={','.join(names)}", "--format=%i|%j|%T|%N|%M|%k"]
    lines = [line.split("|", 5) for line in call(words).splitlines() if line]
    return [Task(job, name, state, node, comment, elapsed) for job, name, state, node, elapsed, comment in lines]


def update(job_id: str, **values: str) -> bool:
    """Change a pending job; False when it is pending no more."""
    words = ["scontrol", "update", f"JobId={job_id}", *(f"{key}={value}" for key, value in values.items())]
    return subprocess.run(words, env=_outside(), capture_output=True, check=False).returncode == 0


def cancel(*job_ids: str) -> None:
    """Cancel jobs; those that have ended meanwhile are no matter."""
    if job_ids:
        subprocess.run(["scancel", *job_ids], env=_outside(), capture_output=True, check=False)


def after_any(tasks: list[str]) -> str:
    """A dependency that is fulfilled when the first of these ends, however it ends.

    Of a long list the first hundred will do: they were submitted first, and all that ended is seen at the next plan.
    """
    return "?".join(f"afterany:{task}" for task in tasks[:100])


def call(words: list[str], text: str | None = None) -> str:
    """Run a Slurm command, again while the controller does not answer; raises SlurmError when it says no."""
    for attempt in range(TRIES):
        try:
            done = subprocess.run(words, input=text, env=_outside(), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise SlurmError(f"{words[0]} is not installed here") from None
        if done.returncode == 0:
            return done.stdout
        silent = any(sign in done.stderr for sign in ("Unable to contact", "timed out", "Zero Bytes", "try again"))
        if not silent or attempt + 1 == TRIES:
            break
        time.sleep(TRY_SECONDS)
    raise SlurmError(f"{words[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _outside() -> dict[str, str]:
    """The environment without the settings of an allocation we are in: sbatch would take them as wishes."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
