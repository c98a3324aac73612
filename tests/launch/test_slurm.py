"""Campaigns on a real Slurm of two nodes: one run over both, and twenty runs that everything happens to."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from campaigns import Campaign, make_campaign
from slurm import Slurm

from epochal.campaign.worker import Orders, work
from epochal.config import REPOSITORY
from epochal.records import Workspace
from launch.watch import state

PATIENCE = 400.0
pytestmark = pytest.mark.timeout(900)  # on a busy machine; about half a minute each on an idle one
PROFILE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 1
machine_rank: 0
mixed_precision: "no"
"""


class OnSlurm:
    """A campaign that is submitted to a Slurm with `epochal run --cluster`."""

    def __init__(self, slurm: Slurm, campaign: Campaign, recipe: str, cluster: str) -> None:
        self.slurm, self.campaign = slurm, campaign
        (campaign.folder / "cluster.toml").write_text(cluster)
        self.arguments = ["run", recipe, *campaign.options, "--cluster", str(campaign.folder / "cluster.toml")]
        self.environment = {
            **slurm.environment,
            "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "epochal.cli", *self.arguments, "--tracker", "none", *options]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def submit(self, *options: str) -> str:
        process = self.start(*options)
        text, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, text
        return text

    @property
    def notes(self) -> list[Path]:
        """The notes of campaigns that go on."""
        return list((self.campaign.workspace.work / "tiny-scale" / "cluster").glob("campaign-*.json"))

    def queue(self, kind: str, *states: str) -> list[str]:
        """Job ids in the queue: `kind` is run or plan."""
        words = ["squeue", "-h", "-r", "-o", "%i|%j|%T"]
        lines = [line.split("|") for line in self.slurm.run(*words).stdout.split()]
        return [
            job for job, name, state in lines if name.startswith(f"epochal-{kind}-") and state in (states or (state,))
        ]

    def attempts(self) -> list[dict[str, Any]]:
        """What is being worked on: the notes of jobs whose process is alive."""
        found = []
        for path in (self.campaign.workspace.work / "tiny-scale").glob("*/attempt.json"):
            try:
                found.append({"name": path.parent.name, **json.loads(path.read_text())})
            except FileNotFoundError:
                continue
        return [table for table in found if Path(f"/proc/{table['pid']}").exists()]

    def steps(self) -> int:
        """Lines of training loss that the run in flight has logged."""
        paths = (self.campaign.workspace.work / "tiny-scale").glob("*/metrics.jsonl")
        return max((path.read_text().count("train_loss") for path in paths), default=0)

    def watch(self) -> str:
        """What `epochal plan --watch` shows now."""
        with mock.patch.dict(os.environ, self.environment):
            lines, _ = state([self.arguments[1]], self.campaign.workspace, self.campaign.scale)
        return "\n".join(lines)

    def log(self) -> str:
        """All that planners and tasks said."""
        files = sorted((self.campaign.workspace.work / "tiny-scale" / "cluster" / "logs").glob("*"))
        files += sorted((self.campaign.workspace.work / "tiny-scale" / "logs").glob("*"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in files)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            if time.monotonic() > deadline:
                queue = self.slurm.run("squeue").stdout
                raise AssertionError(f"waited in vain for {what}\n{queue}\n{self.log()}\n{self.slurm.logs()}")
            time.sleep(0.05)
        return found

    def finish(self) -> None:
        self.until(
            lambda: not self.notes and not self.queue("run") and not self.queue("plan"), "the end of the campaign"
        )


def here(folder: Path, prepared: Path, recipe: str, **changes: int) -> Campaign:
    """The same campaign, run in this process."""
    campaign = make(folder, prepared, **changes)
    space = campaign.workspace
    orders = Orders(
        session="here", scale=str(campaign.scale_path), recipes=(recipe,), results=str(space.results),
        work=str(space.work), threads=1,
    )  # fmt: skip
    assert work(orders, lambda event: None) == 0
    return campaign


def make(folder: Path, prepared: Path, *, epochs: int | None = None, members: int = 2) -> Campaign:
    campaign = make_campaign(folder, prepared)
    campaign.rewrite("count = 2", f"count = {members}")
    if epochs is not None:
        campaign.rewrite("epochs = [1, 2]", f"epochs = [{epochs}]")
        campaign.rewrite(
            "lr = 0.01\nepochs = 1\nwd = 0.8\n\n[ensemble]", f"lr = 0.01\nepochs = {epochs}\nwd = 0.8\n\n[ensemble]"
        )
    return campaign


def results_of(campaign: Campaign) -> dict[str, Any]:
    assert campaign.records.problems == ()
    return {
        record.job.name: (record.job, record.fingerprint, record.status, record.results, record.inputs)
        for record in campaign.records
    }


def test_two_nodes_equal_one_process_though_a_rank_is_killed_and_the_time_is_up(
    slurm: Slurm, tmp_path: Path, prepared: Path
) -> None:
    alone = here(tmp_path / "alone", prepared, "epoching", epochs=6)
    campaign = make(tmp_path / "slurm", prepared, epochs=6)
    (campaign.folder / "node.yaml").write_text(PROFILE)
    cluster = f"""
        profile = "{campaign.folder / "node.yaml"}"
        nodes = 2
        time_limit = "10m"
        grace = "1m"
        [slurm]
        cpus_per_task = 2
    """
    there = OnSlurm(slurm, campaign, "epoching", cluster)
    there.submit("--checkpoint-every", "0.3s")
    victim = there.until(lambda: ranks(campaign.workspace), "a rank that trains")
    os.kill(victim[-1], signal.SIGKILL)
    there.until(lambda: "ended with exit code" in there.log(), "somebody to notice")
    steps = there.steps()
    there.until(lambda: there.steps() > steps, "a rank that trains again")
    slurm.run(
        "scancel", "--signal=USR1", "--batch", there.queue("run", "RUNNING")[0]
    )  # as Slurm does near a time limit
    there.finish()

    theirs, ours = results_of(campaign), results_of(alone)
    assert theirs.keys() == ours.keys() and ours
    for name, (job, mark, status, results, inputs) in theirs.items():
        assert (job, mark, status, inputs) == (*ours[name][:3], ours[name][4])
        for key in ("loss", "train_loss", "test_loss"):
            assert results[key] == pytest.approx(ours[name][3][key], abs=1e-5), name
    worlds = {record.provenance["world_size"] for record in campaign.records}
    assert worlds == {2}
    assert all(record.provenance["resumed_at"] for record in campaign.records), "nothing was saved when time was up"
    failures = re.findall(r"^     FAILED ", there.log(), flags=re.MULTILINE)
    assert len(failures) == 1, "only the killed rank is a failure"


def ranks(space: Workspace) -> list[int]:
    """Ranks that have taken a step of a run of this workspace."""
    if not any(path.read_text() for path in (space.work / "tiny-scale").glob("*/metrics.jsonl")):
        return []
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "epochal.cli" in words and str(space.work) in "".join(words) and "epochal.distributed.launcher" not in words:
            found.append(int(path.parent.name))
    return sorted(found)


CLUSTER = """
pack = 2
parallel = 3
time_limit = "10m"
grace = "1m"
[slurm]
cpus_per_task = 2
"""


def test_twenty_runs_and_everything_that_happens_to_them(slurm: Slurm, tmp_path: Path, prepared: Path) -> None:
    undisturbed = here(tmp_path / "alone", prepared, "ensembling", members=16)
    campaign = make(tmp_path / "slurm", prepared, members=16)
    there = OnSlurm(slurm, campaign, "ensembling", CLUSTER)

    # What Slurm would refuse is said at once, and nothing is submitted.
    wrong = OnSlurm(slurm, campaign, "ensembling", CLUSTER.replace("[slurm]", '[slurm]\npartition = "gpu"'))
    process = wrong.start()
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "invalid partition" in text and not there.notes, text
    there = OnSlurm(slurm, campaign, "ensembling", CLUSTER)

    # Taken back at once: nothing stays in the queue, nothing comes back.
    there.submit()
    assert "stopped" in there.submit("--stop")
    there.until(lambda: not there.queue("plan") and not there.queue("run"), "an empty queue")
    assert not there.notes

    # Two submitters at once: one campaign.
    both = [there.start("--checkpoint-every", "0.01s") for _ in range(2)]
    texts = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert "already in flight" in there.submit()

    there.until(lambda: there.attempts(), "a job that runs")
    requeued = there.queue("run", "RUNNING")[0]
    shown = there.watch()
    assert re.search(r"^  running  w16-\S+  .*\d+_\d+ on n[12]$", shown, flags=re.MULTILINE), shown
    assert re.search(r"^  planner  \d+ pending$", shown, flags=re.MULTILINE), shown
    slurm.run("scontrol", "requeue", requeued)

    planners = there.until(lambda: there.queue("plan", "PENDING"), "a planner that waits")
    slurm.run("scancel", *planners)

    victim = there.until(lambda: there.attempts(), "another job that runs")[0]
    os.kill(victim["pid"], signal.SIGKILL)

    there.until(lambda: len(campaign.records) > 4, "five records")
    slurm.stop_node("n1")
    there.until(lambda: len(campaign.records) > 6, "two more records while a slurmd is down")
    slurm.start_node("n1")

    there.until(lambda: there.queue("run", "RUNNING"), "a task that runs")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    there.finish()

    assert results_of(campaign) == results_of(undisturbed)
    assert len(campaign.records) >= 20
    done = Counter(re.findall(r"^ *\d+ done  (\S+)", there.log(), flags=re.MULTILINE))
    assert max(done.values()) == 1, f"a job ran twice: {done}"
    assert "     FAILED " not in there.log()
    assert not list((campaign.workspace.work / "tiny-scale").glob("*/attempt.json")), "a job ended in no good order"
