"""A cluster: one TOML file that says how a campaign is laid onto a scheduler. How fast, never what.

Submission itself lives in `launch/`; this file knows the settings and where a submitted campaign keeps its notes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from epochal.campaign.worker import Orders
from epochal.config import find_config, from_table, load_toml, seconds, to_table, write_atomic


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """What the exports for SkyPilot and Kubernetes need beyond a scheduler's settings.

    `image` holds this repository and its packages at `folder`, `volume` is shared by all workers (ReadWriteMany, with
    `flock`) and mounted at `mount`; `gpu` is a SkyPilot accelerator such as "H100:8", `memory` counts GB.
    """

    image: str
    volume: str
    mount: str = "/shared"
    folder: str = "/epochal"
    gpu: str = ""
    cpus: int = 8
    memory: int = 32

    @property
    def gpus(self) -> int:
        """GPUs of one worker."""
        name, _, count = self.gpu.partition(":")
        return int(count or 1) if name else 0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster.

    An allocation of `nodes` machines does one Run through the accelerate `profile` (what one node does); with `pack`
    above 1 it does that many jobs side by side. At most `parallel` allocations run at once. `grace` before the end of
    `time_limit` a run is told to save itself. `slurm` holds sbatch options by submitit's names, `planner` those that
    differ for the small job that plans, `setup` shell lines that come first.
    """

    name: str = ""
    profile: str | None = None
    nodes: int = 1
    pack: int = 1
    parallel: int = 64
    time_limit: str = "4h"
    grace: str = "2m"
    retries: int = 2
    micro_batch: int | None = None
    setup: tuple[str, ...] = ()
    slurm: dict[str, Any] = field(default_factory=dict)
    planner: dict[str, Any] = field(default_factory=dict)
    cloud: Cloud | None = None

    def __post_init__(self) -> None:
        for what in ("nodes", "pack", "parallel"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} is {getattr(self, what)}; give at least 1.")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; give 0 or more.")
        if self.nodes > 1 and self.pack > 1:
            raise ValueError(
                f"nodes is {self.nodes} and pack {self.pack}; jobs are packed on one node, so use nodes = 1."
            )
        if self.nodes > 1 and self.profile is None:
            raise ValueError(f"nodes is {self.nodes} without a profile; name one from configs/accelerate.")
        if not seconds(self.grace) < seconds(self.time_limit):
            raise ValueError(f"grace {self.grace} is no shorter than time_limit {self.time_limit}; shorten it.")


def load_cluster(name: str) -> Cluster:
    """Read `configs/cluster/<name>.toml`; raises ValueError for anything unknown or inconsistent."""
    path = find_config("cluster", name, ".toml")
    return replace(load_toml(path, Cluster), name=path.stem)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A campaign that was handed to a cluster: what planner and allocations read from the shared disk."""

    orders: Orders
    cluster: Cluster

    @property
    def folder(self) -> Path:
        """Where its notes, batches and logs lie."""
        return self.orders.workspace.work / self.orders.workspace.scale / "cluster"

    @property
    def path(self) -> Path:
        """The note of this campaign: there while it goes on; without it nothing more is submitted."""
        return self.folder / f"campaign-{_digest(*sorted(self.orders.recipes))}.json"

    @property
    def planner_name(self) -> str:
        """The scheduler's name for the planners of this campaign."""
        return f"epochal-plan-{self._place}-{_digest(*sorted(self.orders.recipes))}"

    @property
    def runs_name(self) -> str:
        """The scheduler's name for everything that works in this folder, whichever recipes asked for it."""
        return f"epochal-run-{self._place}"

    @property
    def _place(self) -> str:
        space = self.orders.workspace
        return f"{space.scale}-{_digest(str(space.results), str(space.work))}"

    def save(self) -> None:
        """Write the note."""
        write_atomic(
            self.path, json.dumps({"orders": asdict(self.orders), "cluster": to_table(self.cluster)}, indent=1)
        )


def submission(orders: Orders, cluster: Cluster) -> Submitted:
    """Return a campaign as a cluster will see it: absolute paths, and the cluster's pace where the orders name none."""
    profile = orders.profile or (cluster.profile and str(find_config("accelerate", cluster.profile, ".yaml")))
    return Submitted(
        orders=replace(
            orders,
            scale=str(find_config("scales", orders.scale, ".toml").resolve()),
            results=str(Path(orders.results).resolve()),
            work=str(Path(orders.work).resolve()),
            profile=None if profile is None else str(Path(profile).resolve()),
            micro_batch=orders.micro_batch or cluster.micro_batch,
            retries=cluster.retries,
            grace_seconds=seconds(cluster.grace),
        ),
        cluster=cluster,
    )


def load_submitted(path: Path) -> Submitted | None:
    """Read the note of a campaign; None when it is over or was stopped."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return from_table(table, Submitted, where=str(path))


def check_locks(folder: Path, mounts: str | None = None) -> None:
    """Raise ValueError where file locks are known not to hold between machines (`mounts`: text of /proc/mounts).

    A claim is a lock: where only one machine sees it, a job could run twice.
    """
    text = Path("/proc/mounts").read_text(encoding="utf-8") if mounts is None else mounts
    place, point, kind, options = folder.resolve(), "", "", set[str]()
    for line in text.splitlines():
        words = line.split()
        if place.is_relative_to(words[1]) and len(words[1]) >= len(point):
            point, kind, options = words[1], words[2], set(words[3].split(","))
    if kind == "nfs4":
        options.discard("nolock")  # version 4 has its locks inside and does not read this option
    bad = options & {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"}
    if bad:
        raise ValueError(
            f"{folder} is on {kind} mounted at {point} with {min(bad)}: locks hold on one machine only and a job could "
            f"run twice; mount it with shared locks (Lustre: flock) or choose another --work."
        )


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
