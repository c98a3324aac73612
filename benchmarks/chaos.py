"""Kill the processes of a campaign at random and compare its records with an undisturbed run.

    python benchmarks/chaos.py --presets one,ddp,zero2,zero3,fsdp2 --kills 25

Parents, workers, launchers and ranks are killed by SIGKILL. All of them are forked from this process, which has imported
everything, so that a start takes a second; the launcher is a short one that does what torchrun does. Everything from there on
is the code of `epochal run`. A row of chaos.csv for each preset: kills by role, and records lost, written twice or changed,
processes that outlive their campaign, and files left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch

from epochal import cli
from epochal.campaign import executor, worker
from epochal.distributed import launcher
from epochal.records import Record, Workspace, load_records
from epochal.run import Ensemble, Job
from epochal.stopping import Stopped, listen

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "distributed")]
campaigns, ranks, tiny, toy = (importlib.import_module(name) for name in ("campaigns", "ranks", "tiny", "toy"))

PATIENCE = 60.0  # seconds after which a process that outlives its campaign is an orphan
ROLES = ("parent", "worker", "launcher", "rank")


class Forked:
    """A forked process with the methods of subprocess.Popen that are used."""

    def __init__(self, role: str, body: Callable[[], int | None], pids: Path) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                with pids.open("a") as file:
                    file.write(f"{role} {os.getpid()}\n")
                code = body() or 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException as error:
                code = getattr(error, "exit_code", 1)  # typer.Exit
                if not hasattr(error, "exit_code"):
                    print(f"{role}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or None."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait for the end."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    class reader:  # noqa: N801  # the thread that reads a worker's events
        """Nothing to wait for."""

        @staticmethod
        def join(seconds: float) -> None:
            """Return."""


# --- the processes ----------------------------------------------------------------------------------------------------------


def run_parent(config: worker.WorkerConfig, jobs: int, world: int, pids: Path) -> int:
    """Do what `epochal run --jobs` does, with forked workers."""
    os.setsid()

    def start(config: worker.WorkerConfig, number: int, *_: Any) -> Forked:
        return Forked("worker", functools.partial(run_worker, config, world, pids), pids)

    executor._start = start  # type: ignore[assignment]
    listen()
    return executor.run_campaign(config, jobs=jobs, progress=lambda *_: None)


def run_worker(config: worker.WorkerConfig, world: int, pids: Path) -> int:
    """Do what a worker's `main` does, with a forked launcher."""
    listen(parent=config.parent)

    def launch(command: list[str], env: dict[str, str], **_: Any) -> Forked:
        return Forked(
            "launcher", functools.partial(run_launcher, command[-1], env, world, config.preset or "", pids), pids
        )

    # The name in that module only: others start git.
    places = {"Popen": launch, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    worker.subprocess = types.SimpleNamespace(**places)  # type: ignore[assignment]
    worker.launch_command = lambda config: []
    try:
        return worker.work(config, _print_failure)
    except Stopped:
        return 75


def _print_failure(event: dict[str, Any]) -> None:
    if event["event"] in ("failed", "error", "note"):
        print(event["message"], file=sys.stderr, flush=True)


def run_launcher(path: str, env: dict[str, str], world: int, preset: str, pids: Path) -> int:
    """Start the ranks, and end all when one ends with an error, as torchrun does."""
    os.environ |= env
    launcher.watch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = [
        Forked("rank", functools.partial(run_rank, path, rank, world, port, preset), pids) for rank in range(world)
    ]
    while any(rank.poll() is None for rank in forked) and not any(rank.poll() for rank in forked):
        time.sleep(0.02)
    for act in (Forked.terminate, lambda rank: os.kill(rank.pid, signal.SIGKILL)):
        for rank in forked:
            if rank.poll() is None:
                act(rank)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for rank in forked:
                rank.wait(10.0)
    codes = [rank.wait() for rank in forked]
    return launcher.exit_code(codes) if any(codes) else 0


def run_rank(path: str, rank: int, world: int, port: int, preset: str) -> None:
    """Do what `epochal train run.json` does in one process of a launch."""
    # A launcher starts its ranks without the files that it inherited.
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if descriptor.readlink().name.endswith(".lock"):
                os.close(int(descriptor.name))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    for number in launcher.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    toy.choose(preset)
    cli.train([path])


# --- a campaign under fire --------------------------------------------------------------------------------------------------


def make_jobs(config: Path) -> list[Job]:
    """Two runs and their ensemble."""
    runs = [tiny.run(config, name=f"m{seed}", epochs=6, init_seed=seed, order_seed=seed) for seed in range(2)]
    return [*runs, Ensemble(name="all", runs=tuple(run.name for run in runs), average="logits")]


def results_of(workspace: Workspace) -> dict[str, tuple[Any, ...]]:
    """Everything in the records but where and how fast they were made."""
    return {r.job.name: (r.job, r.fingerprint, r.status, r.results, r.inputs) for r in load_records(workspace)}


def alive(pids: Path) -> list[tuple[str, int]]:
    """Return role and id of the processes that still run."""
    found = []
    for line in pids.read_text().splitlines() if pids.exists() else ():
        role, _, pid = line.partition(" ")
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append((role, int(pid)))
    return found


def leftovers(workspace: Workspace) -> list[Path]:
    """Files that only a killed process leaves."""
    patterns = (
        "**/.*.tmp",
        "**/.hidden-*",
        "**/checkpoints",
        "**/attempt.json",
        "**/failure.json",
        "**/stop",
        "**/error.txt",
        "**/*.damaged",
        "**/aside",
    )
    return [path for root in (workspace.work / "tiny", workspace.results) for p in patterns for path in root.glob(p)]


def campaign(
    place: tuple[Workspace, Path],
    preset: str | None,
    world: int,
    kills: int,
    until: float,
    rng: random.Random,
    count: Counter[str],
) -> dict[str, tuple[Any, ...]]:
    """Run a campaign to its end with up to `kills` kills before `until`; returns its records and counts what went wrong."""
    workspace, scale = place
    pids, writes, killed = workspace.work / "pids", workspace.work / "writes", 0
    settings = {"recipes": ("none",), "threads": 1, "checkpoint_seconds": 0.2, "retries": 1, "micro_batch": 1}
    places = {"scale": str(scale), "results": str(workspace.results), "work": str(workspace.work)}
    write_record = worker.write_record

    def counted(workspace: Workspace, record: Record) -> Path:
        with writes.open("a") as file:
            file.write(f"{record.job.name}\n")
        return write_record(workspace, record)

    worker.write_record = counted
    try:
        while True:
            pids.unlink(missing_ok=True)
            config = worker.WorkerConfig(session=uuid.uuid4().hex, preset=preset, **settings, **places)
            parent = Forked("parent", functools.partial(run_parent, config, 1 if preset else 2, world, pids), pids)
            while parent.poll() is None and killed < kills and time.monotonic() < until:
                time.sleep(rng.uniform(0.2, 2.0))
                running = alive(pids)
                roles = sorted({role for role, _ in running})
                if parent.poll() is not None or not roles:
                    break
                role = rng.choice(roles)
                pid = rng.choice([pid for other, pid in running if other == role])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    count[f"kills_{role}"] += 1
                    killed += 1
            code, deadline = parent.wait(), time.monotonic() + PATIENCE
            while alive(pids) and time.monotonic() < deadline:
                time.sleep(0.05)
            for role, pid in alive(pids):
                print(f"orphan: {role} {pid}", flush=True)
                count["orphans"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            print(
                f"{workspace.results.name}: exit code {code}, {killed} killed, {len(results_of(workspace))} records",
                flush=True,
            )
            if code == 0:
                break
    finally:
        worker.write_record = write_record
    executor.sweep(workspace)  # what the next start does first
    count["doubled"] += sum(number > 1 for number in Counter(writes.read_text().split()).values())
    left = leftovers(workspace)
    for path in left:
        print(f"left: {path}", flush=True)
    count["leftovers"] += len(left)
    return results_of(workspace)


def main() -> None:
    """Append one row for each preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="one,ddp,zero2,zero3,fsdp2")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="of each preset, after which nothing is killed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= ranks.ENVIRONMENT
    for name in ranks.IMPORTED:  # once, before the forks: it takes seconds
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        space, _, config = tiny.workspace(Path(folder) / "text")
        scale = Path(folder) / "tiny.toml"
        scale.write_text(campaigns.SCALE.format(data=config))
        jobs = make_jobs(config)
        worker.campaign_jobs = executor.campaign_jobs = lambda *_: jobs
        for preset in options.presets.split(","):
            rng, count, until = random.Random(options.seed), Counter[str](), time.monotonic() + options.seconds
            world = 1 if preset == "one" else options.world

            def place(number: int, preset: str = preset) -> tuple[Workspace, Path]:
                workspace = replace(
                    space, results=Path(folder) / f"{preset}-{number}", work=Path(folder) / f"{preset}-{number}w"
                )
                workspace.work.mkdir()
                (workspace.work / "data").symlink_to(space.data)
                return workspace, scale

            fire = functools.partial(
                campaign, preset=None if preset == "one" else preset, world=world, until=until, rng=rng
            )
            undisturbed = fire(place(0), kills=0, count=Counter[str]())
            for number in range(1, 10**6):
                done = sum(count[f"kills_{role}"] for role in ROLES)
                if done >= options.kills or time.monotonic() > until:
                    break
                found = fire(place(number), kills=min(15, options.kills - done), count=count)
                count["campaigns"] += 1
                count["records"] += len(found)
                count["lost"] += len(undisturbed.keys() - found.keys())
                differing = [name for name in undisturbed if name in found and found[name] != undisturbed[name]]
                for name in differing:
                    print(f"changed: {name}: {found[name][3]} instead of {undisturbed[name][3]}", flush=True)
                count["changed"] += len(differing)
            row: dict[str, object] = {"preset": preset, "processes": world, "seed": options.seed}
            columns = [*(f"kills_{role}" for role in ROLES), "campaigns", "records"]
            row |= {
                column: count[column] for column in (*columns, "lost", "doubled", "changed", "orphans", "leftovers")
            }
            measure.append(measure.HERE / "chaos.csv", {**row, **measure.environment("cpu")})


if __name__ == "__main__":
    main()
