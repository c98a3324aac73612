"""One task of an array: the jobs that its batch gives it, by the same workers as on a laptop.

`python -m launch.element BATCH`, started by Slurm. SIGUSR1 (the time limit is near) and SIGTERM (pre-emption,
requeue, scancel) save the runs and end with exit code 75.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from epochal.campaign.cluster import load_submitted
from epochal.campaign.display import Display
from epochal.campaign.executor import run_campaign
from epochal.stopping import stop_reason
from launch.planner import ensure_planner


def main(batch: Path) -> int:
    """Do the jobs of this task; returns the exit code of `run_campaign`."""
    table = json.loads(batch.read_text(encoding="utf-8"))
    campaign = load_submitted(Path(table["campaign"]))
    if campaign is None:
        print("the campaign is over or was stopped.")
        return 0
    names = tuple(table["tasks"][int(os.environ["SLURM_ARRAY_TASK_ID"])])
    orders = replace(campaign.orders, only=names, nodes=table["nodes"], threads=_threads(len(names)))
    with Display(Console(width=200), orders.workspace, done=0, flops_to_do=0.0) as display:
        code = run_campaign(orders, jobs=len(names), progress=display, log_prefix=_task())
    if stop_reason() != "SIGTERM":  # whoever sent that decides what happens next
        ensure_planner(campaign)
    return code


def _task() -> str:
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}-"


def _threads(workers: int) -> int:
    """Cores for each worker: the allocation's, not the machine's."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or "1"
    return max(1, int(cores) // workers)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
