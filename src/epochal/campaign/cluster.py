"""Cluster settings: one TOML file says how a campaign is mapped onto a scheduler; nothing in it changes a result.

Submission itself is in `launch/`.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from epochal.campaign.worker import WorkerConfig
from epochal.config import find_config, from_table, load_toml, seconds, to_table, write_atomic


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Settings of one cluster."""

    name: str = ""
    preset: str | None = None  # parallelism preset (configs/accelerate) of one node; without it a Run is one process
    nodes: int = 1  # machines per Run
    pack: int = 1  # jobs in parallel in one allocation (above 1 only with nodes = 1)
    parallel: int = 64  # allocations running at the same time
    time_limit: str = "4h"  # of one allocation
    grace: str = "2m"  # a run gets a request to save a checkpoint this long before the limit
    retries: int = 2  # of a failed job
    rank_timeout: str = "30m"  # with a preset: a run ends when a process has not answered for this time
    micro_batch: int | None = None  # sequences per forward pass and process
    setup: tuple[str, ...] = ()  # shell lines that run first
    slurm: dict[str, Any] = field(default_factory=dict)  # sbatch options, by submitit's names
    planner: dict[str, Any] = field(default_factory=dict)  # those that differ for the planner job

    def __post_init__(self) -> None:
        for key in ("nodes", "pack", "parallel"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}.")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}.")
        if self.nodes > 1 and self.pack > 1:
            raise ValueError(
                f"nodes is {self.nodes} and pack is {self.pack}, but jobs are packed on one node: use nodes = 1."
            )
        if self.nodes > 1 and self.preset is None:
            raise ValueError(f"nodes is {self.nodes} without a preset; name one from configs/accelerate.")
        seconds(self.rank_timeout)
        if not seconds(self.grace) < seconds(self.time_limit):
            raise ValueError(f"grace must be shorter than time_limit {self.time_limit}, got {self.grace}.")


def load_cluster(name: str) -> Cluster:
    """Read `configs/cluster/<name>.toml`; raises ValueError for anything unknown or inconsistent."""
    path = find_config("cluster", name, ".toml")
    return replace(load_toml(path, Cluster), name=path.stem)


@dataclass(frozen=True, kw_only=True)
class ClusterCampaign:
    """A campaign submitted to a cluster: what the planner and the array tasks read from the shared disk."""

    config: WorkerConfig
    cluster: Cluster

    @property
    def folder(self) -> Path:
        """Folder of the campaign file, the batches and the logs."""
        return self.config.workspace.work / self.config.workspace.scale / "cluster"

    @property
    def path(self) -> Path:
        """Campaign file; exists while the campaign is active, delete it to stop submitting."""
        return self.folder / f"campaign-{_digest(*sorted(self.config.recipes))}.json"

    @property
    def planner_name(self) -> str:
        """Slurm job name of the planners of this campaign."""
        # The digest of the folders keeps two checkouts of one user apart.
        return f"epochal-plan-{self._suffix}-{_digest(*sorted(self.config.recipes))}"

    @property
    def runs_name(self) -> str:
        """Slurm job name of all tasks that work in this folder, for any recipe."""
        # Not specific to the recipes: campaigns that share a folder must see each other's jobs.
        return f"epochal-run-{self._suffix}"

    @property
    def _suffix(self) -> str:
        workspace = self.config.workspace
        return f"{workspace.scale}-{_digest(str(workspace.results), str(workspace.work))}"

    def save(self) -> None:
        """Write the campaign file."""
        table = {"config": asdict(self.config), "cluster": to_table(self.cluster)}
        write_atomic(self.path, json.dumps(table, indent=1))


def cluster_campaign(config: WorkerConfig, cluster: Cluster) -> ClusterCampaign:
    """Return a campaign with absolute paths, and the cluster's settings where `config` has none."""
    preset = config.preset or (cluster.preset and str(find_config("accelerate", cluster.preset, ".yaml")))
    return ClusterCampaign(
        config=replace(
            config,
            scale=str(find_config("scales", config.scale, ".toml").resolve()),
            results=str(Path(config.results).resolve()),
            work=str(Path(config.work).resolve()),
            preset=None if preset is None else str(Path(preset).resolve()),
            micro_batch=config.micro_batch or cluster.micro_batch,
            retries=cluster.retries,
            grace_seconds=seconds(cluster.grace),
            rank_timeout=seconds(cluster.rank_timeout),
        ),
        cluster=cluster,
    )


def load_cluster_campaign(path: Path) -> ClusterCampaign | None:
    """Read a campaign file; None if the campaign is over or was stopped."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return from_table(table, ClusterCampaign, where=str(path))


# File systems whose locks never reach another machine.
LOCKS_OF_ONE_MACHINE = ("fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.mount-s3")


def check_locks(folder: Path, mounts: str | None = None) -> None:
    """Raise ValueError if file locks in `folder` hold on one machine only.

    `mounts` is the text of /proc/mounts. Claims are locks: if other machines do not see them, a job could run twice.
    """
    text = Path("/proc/mounts").read_text(encoding="utf-8") if mounts is None else mounts
    path, point, file_system, options = folder.resolve(), "", "", set[str]()
    for line in text.splitlines():
        # Blanks in a path are written as \040.
        fields = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in line.split()]
        # The deepest mount point above the folder counts.
        if path.is_relative_to(fields[1]) and len(fields[1]) >= len(point):
            point, file_system, options = fields[1], fields[2], set(fields[3].split(","))
    if file_system == "nfs4":
        options.discard("nolock")  # NFS 4 has locks in the protocol and ignores this option
    local = options & {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock", "nobrl"}
    if file_system.startswith("9p") or file_system in LOCKS_OF_ONE_MACHINE:
        local = {"no locks between machines"}
    if local:
        raise ValueError(
            f"{folder} is on {file_system} mounted at {point} with {min(local)}: locks hold on one machine only and a job "
            f"could run twice; mount it with shared locks (Lustre: flock) or choose another --work."
        )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
