"""Cluster settings: one TOML file says how a campaign is mapped onto a scheduler; nothing in it changes a result.

Submission itself is in `launch/`.
"""

import fcntl
import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from epochal.campaign.worker import Nodes, Retries, WorkerConfig
from epochal.config import find_config, from_table, load_toml, read_json, seconds, to_table, write_atomic
from epochal.ranges import Batch, Range, Ranged, is_name, shown

# Options of sbatch that follow from the campaign or from other keys of the file.
ELSEWHERE = {
    "setup": "stands at the top of the file, in front of [slurm]",
    "array_parallelism": "is parallel at the top of the file",
    "command": "is the campaign's",
    "folder": "is the campaign's",
    "job_name": "is the campaign's",
    "map_count": "is the campaign's",
    "teardown": "would never run, because a task replaces its shell",
    "stderr_to_stdout": "is the campaign's",
    "use_srun": "is the campaign's",
}


@dataclass(frozen=True, kw_only=True)
class Cluster(Ranged):
    """Settings of one cluster."""

    name: str = ""
    preset: str | None = None  # parallelism preset (configs/accelerate) of one node; without it a Run is one process
    nodes: Nodes = 1  # machines per Run
    pack: Annotated[int, Range(1, 1000)] = 1  # jobs in parallel in one allocation (above 1 only with nodes = 1)
    parallel: Annotated[int, Range(1, 100_000)] = 64  # allocations running at the same time
    time_limit: str = "4h"  # of one allocation
    grace: str = "2m"  # a run gets a request to save a checkpoint this long before the limit
    retries: Retries = 2  # of a failed job
    rank_timeout: str = "30m"  # with a preset: a run ends when a process has not answered for this time
    micro_batch: Batch | None = None  # sequences per forward pass and process
    setup: tuple[str, ...] = ()  # shell lines that run first
    slurm: dict[str, Any] = field(default_factory=dict)  # sbatch options, by submitit's names
    planner: dict[str, Any] = field(default_factory=dict)  # those that differ for the planner job

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes > 1 and self.pack > 1:
            raise ValueError(
                f"nodes is {self.nodes} and pack is {self.pack}, but jobs are packed on one node: use nodes = 1."
            )
        if self.nodes > 1 and self.preset is None:
            raise ValueError(f"nodes is {self.nodes} without a preset; name one from configs/accelerate.")
        seconds(self.rank_timeout)
        if not seconds(self.grace) < seconds(self.time_limit):
            raise ValueError(f"grace must be shorter than time_limit {self.time_limit}, got {self.grace}.")
        for table in ("slurm", "planner"):
            _check_options(getattr(self, table), table)


def _check_options(options: dict[str, Any], where: str) -> None:
    """Raise ValueError for sbatch options that cannot be set, or are set elsewhere."""
    for key, value in options.items():
        if not is_name(key):
            raise ValueError(f"[{where}] sets {shown(key)}, which cannot name an option; correct it.")
        if key in ELSEWHERE:
            raise ValueError(f"[{where}] sets {key}, which {ELSEWHERE[key]}; take it out.")
        if key == "additional_parameters":
            if not isinstance(value, dict):
                raise ValueError(f"{key} in [{where}] must be a table of sbatch options, got {shown(value)}.")
            _check_options(value, f"{where}.{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            Range(0, 10**9).check(value, f"{key} in [{where}]", float)
        elif not isinstance(value, bool | str) or not str(value).isprintable():
            raise ValueError(
                f"{key} in [{where}] must be a text in one line, a number, true or false, got {shown(value)}."
            )


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
        table = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from None
    return from_table(table, ClusterCampaign, where=str(path))


def check_locks(folder: Path, mounts: str | None = None) -> None:
    """Raise ValueError if file locks in `folder` fail or hold on one machine only.

    `mounts` is the text of /proc/mounts. Claims are locks: if other machines do not see them, a job could run twice.
    """
    text = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace") if mounts is None else mounts
    path, point, file_system, options = folder.resolve(), "", "", set[str]()
    for line in text.splitlines():
        fields = [_unescaped(field) for field in line.split(" ")]
        # The deepest mount point above the folder counts; of several at one place the last.
        if len(fields) >= 4 and path.is_relative_to(fields[1]) and len(fields[1]) >= len(point):
            point, file_system, options = fields[1], fields[2], set(fields[3].split(","))
    if file_system == "nfs4":
        options.discard("nolock")  # NFS 4 has locks in the protocol and ignores this option
    local = options & LOCAL_LOCKS.get(file_system, LOCAL_LOCKS["nfs"])
    if local or file_system in WITHOUT_SHARED_LOCKS:
        raise ValueError(
            f"{folder} is on {file_system} mounted at {point}{f' with {min(local)}' if local else ''}: locks hold on one "
            "machine only and a job could run twice; mount it with shared locks (Lustre: flock) or choose another --work."
        )
    if mounts is None:
        _try_lock(folder)


# Mount options by file system (any other: those of nfs) with which locks hold on one machine only.
LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"},
    "cifs": {"nobrl", "forcemandatorylock"},
    "smb3": {"nobrl", "forcemandatorylock"},
}
# File systems that keep locks to the machine, or have none. In a virtual machine, 9p and virtiofs share a folder of its
# host, with locks that the host does not see.
WITHOUT_SHARED_LOCKS = {
    "9p",
    "virtiofs",
    "fuse.sshfs",
    "fuse.s3fs",
    "fuse.goofys",
    "fuse.mount-s3",
    "fuse.mountpoint-s3",
    "fuse.gcsfuse",
    "fuse.rclone",
    "fuse.blobfuse",
    "fuse.blobfuse2",
}


def _unescaped(field: str) -> str:
    """Return a field of /proc/mounts, in which a blank is written as its octal number."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _try_lock(folder: Path) -> None:
    """Raise ValueError if the file system of `folder` refuses a lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{folder} is on a file system without locks ({error.strerror}), so a job could run twice; choose a "
                "--work on another."
            ) from None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
