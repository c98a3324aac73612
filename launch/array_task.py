"""One task of an array: runs the jobs of its batch with the same workers as `epochal run`.

`python -m launch.array_task BATCH`, started by Slurm. SIGUSR1 (the time limit is near) and SIGTERM (preemption, requeue,
scancel) make the runs save a checkpoint and end with exit code 75.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from epochal.campaign.cluster import load_cluster_campaign
from epochal.campaign.display import Display
from epochal.campaign.executor import run_campaign
from epochal.stopping import stop_reason
from launch.planner import ensure_planner


def main(batch: Path) -> int:
    """Run the jobs of this task; returns the exit code of `run_campaign`."""
    table = json.loads(batch.read_text(encoding="utf-8"))
    campaign = load_cluster_campaign(Path(table["campaign"]))
    if campaign is None:
        print("the campaign is over or was stopped.")
        return 0
    task = int(os.environ["SLURM_ARRAY_TASK_ID"])
    names = tuple(table["tasks"][task])
    # One worker for each packed job; each may take any job of this task.
    config = replace(campaign.config, only=names, nodes=table["nodes"], threads=_threads(len(names)))
    prefix = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}-"
    with Display(Console(width=200), config.workspace, done=0, flops_to_do=0.0) as display:
        code = run_campaign(config, jobs=len(names), progress=display, log_prefix=prefix)
    if stop_reason() != "SIGTERM":  # after a SIGTERM Slurm or the user decides whether to continue
        ensure_planner(campaign)
    return code


def _threads(workers: int) -> int:
    """Threads per worker, from the cores of the allocation."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or "1"
    return max(1, int(cores) // workers)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
