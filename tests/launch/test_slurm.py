"""Campaigns on a real Slurm of two nodes: one run over both nodes, and many runs with failures of all kinds."""

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

from epochal.campaign.worker import work
from epochal.config import REPOSITORY
from epochal.records import Workspace
from launch.watch import state

PATIENCE = 900.0
MEMBERS = 12
pytestmark = pytest.mark.timeout(1800)  # on a busy machine; less than a minute each on an idle one


class OnSlurm:
    """A campaign that is submitted to a Slurm with `epochal run --cluster`."""

    def __init__(self, slurm: Slurm, campaign: Campaign, recipe: str, cluster: str) -> None:
        self.slurm, self.campaign, self.recipe = slurm, campaign, recipe
        self.work = campaign.workspace.work / "tiny-scale"
        (campaign.folder / "cluster.toml").write_text(cluster)
        self.environment = {
            **slurm.environment,
            "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "epochal.cli", "run", self.recipe, *self.campaign.options]
        command += ["--cluster", str(self.campaign.folder / "cluster.toml"), "--tracker", "none", *options]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def submit(self, *options: str, code: int = 0) -> str:
        process = self.start(*options)
        text, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, text
        return text

    @property
    def active(self) -> bool:
        """Whether the campaign file exists."""
        return any((self.work / "cluster").glob("campaign-*.json"))

    def queue(self, kind: str, *states: str) -> list[str]:
        """Job ids in the queue: `kind` is run or plan."""
        rows = [line.split("|") for line in self.slurm.run("squeue", "-h", "-r", "-o", "%i|%j|%T").stdout.split()]
        return [
            job for job, name, state in rows if name.startswith(f"epochal-{kind}-") and state in (states or (state,))
        ]

    def attempts(self) -> list[dict[str, Any]]:
        """The attempt.json of each job whose process is alive."""
        attempts = []
        for path in self.work.glob("*/attempt.json"):
            try:
                attempts.append({"name": path.parent.name, **json.loads(path.read_text())})
            except FileNotFoundError:
                continue
        return [attempt for attempt in attempts if Path(f"/proc/{attempt['pid']}").exists()]

    def steps(self) -> int:
        """Lines of training loss that the current run has logged."""
        return max((path.read_text().count("train_loss") for path in self.work.glob("*/metrics.jsonl")), default=0)

    def watch(self) -> str:
        """What `epochal plan --watch` shows now."""
        with mock.patch.dict(os.environ, self.environment):
            lines, _ = state([self.recipe], self.campaign.workspace, self.campaign.scale)
        return "\n".join(lines)

    def log(self) -> str:
        """The output of all planners, tasks and workers."""
        files = [*sorted((self.work / "cluster" / "logs").glob("*")), *sorted((self.work / "logs").glob("*"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in files)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for a condition and return its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            if time.monotonic() > deadline:
                queue = self.slurm.run("squeue").stdout
                raise AssertionError(f"timed out waiting for {what}\n{queue}\n{self.log()}\n{self.slurm.logs()}")
            time.sleep(0.05)
        return value

    def finish(self) -> None:
        self.until(lambda: not (self.active or self.queue("run") or self.queue("plan")), "the end of the campaign")


def in_this_process(campaign: Campaign, recipe: str) -> Campaign:
    """Run a campaign to its end without Slurm: the reference."""
    assert work(campaign.worker_config(recipe), lambda event: None) == 0
    return campaign


def results_of(campaign: Campaign) -> dict[str, Any]:
    assert campaign.records.problems == ()
    return {
        record.job.name: (record.job, record.fingerprint, record.status, record.results, record.inputs)
        for record in campaign.records
    }


# --- one run over two nodes ------------------------------------------------------------------------------------------

PRESET = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 1
machine_rank: 0
mixed_precision: "no"
"""


def one_long_run(folder: Path, prepared: Path) -> Campaign:
    campaign = make_campaign(folder, prepared)
    campaign.rewrite("epochs = [1, 2]", "epochs = [6]")
    campaign.rewrite("lr = 0.01\nepochs = 1\nwd = 0.8\n\n[epoching]", "lr = 0.01\nepochs = 6\nwd = 0.8\n\n[epoching]")
    return campaign


def ranks(workspace: Workspace) -> list[int]:
    """Process ids of the ranks of a run that has taken a step."""
    if not any(path.read_text() for path in (workspace.work / "tiny-scale").glob("*/metrics.jsonl")):
        return []
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        launcher = "epochal.distributed.launcher" in command
        if "epochal.cli" in command and str(workspace.work) in "".join(command) and not launcher:
            processes.append(int(path.parent.name))
    return sorted(processes)


def test_two_nodes_equal_one_process_after_a_killed_rank_and_a_time_limit(
    slurm: Slurm, tmp_path: Path, prepared: Path
) -> None:
    expected = results_of(in_this_process(one_long_run(tmp_path / "alone", prepared), "epoching"))
    campaign = one_long_run(tmp_path / "slurm", prepared)
    (campaign.folder / "node.yaml").write_text(PRESET)
    cluster = f"""
        preset = "{campaign.folder / "node.yaml"}"
        nodes = 2
        time_limit = "10m"
        grace = "1m"
        [slurm]
        cpus_per_task = 2
    """
    on_slurm = OnSlurm(slurm, campaign, "epoching", cluster)
    on_slurm.submit("--checkpoint-every", "0.3s")
    os.kill(on_slurm.until(lambda: ranks(campaign.workspace), "a rank that trains")[-1], signal.SIGKILL)
    on_slurm.until(lambda: "ended with exit code" in on_slurm.log(), "the failure to be logged")
    steps = on_slurm.steps()
    on_slurm.until(lambda: on_slurm.steps() > steps, "a rank that trains again")
    # What Slurm sends before a time limit.
    slurm.run("scancel", "--signal=USR1", "--batch", on_slurm.queue("run", "RUNNING")[0])
    on_slurm.finish()

    results = results_of(campaign)
    assert results.keys() == expected.keys() and expected
    for name, (job, fingerprint, status, numbers, inputs) in results.items():
        assert (job, fingerprint, status, inputs) == (*expected[name][:3], expected[name][4])
        for key in ("loss", "train_loss", "test_loss"):
            assert numbers[key] == pytest.approx(expected[name][3][key], abs=1e-5), name
    assert {record.provenance["world_size"] for record in campaign.records} == {2}
    assert all(record.provenance["resumed_at"] for record in campaign.records), "no checkpoint was saved on SIGUSR1"
    failures = re.findall(r"^     FAILED ", on_slurm.log(), flags=re.MULTILINE)
    assert len(failures) == 1, "only the killed rank is a failure"


# --- many runs, and failures while they run --------------------------------------------------------------------------

CLUSTER = """
pack = 2
parallel = 3
time_limit = "10m"
grace = "1m"
[slurm]
cpus_per_task = 2
"""


def many_runs(folder: Path, prepared: Path) -> Campaign:
    campaign = make_campaign(folder, prepared)
    campaign.rewrite("count = 2", f"count = {MEMBERS}")
    return campaign


def test_an_option_that_slurm_refuses_is_wrong_use_and_nothing_is_submitted(
    slurm: Slurm, tmp_path: Path, prepared: Path
) -> None:
    cluster = CLUSTER.replace("[slurm]", '[slurm]\npartition = "gpu"')
    on_slurm = OnSlurm(slurm, many_runs(tmp_path, prepared), "ensembling", cluster)
    assert "invalid partition" in on_slurm.submit(code=2)
    assert not on_slurm.active


def test_stop_empties_the_queue(slurm: Slurm, tmp_path: Path, prepared: Path) -> None:
    on_slurm = OnSlurm(slurm, many_runs(tmp_path, prepared), "ensembling", CLUSTER)
    on_slurm.submit()
    assert "stopped" in on_slurm.submit("--stop")
    on_slurm.until(lambda: not on_slurm.queue("plan") and not on_slurm.queue("run"), "an empty queue")
    assert not on_slurm.active


@pytest.fixture(scope="module")
def running(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> OnSlurm:
    """A campaign of many runs that two users submitted at the same time. The tests below disturb it while it runs."""
    on_slurm = OnSlurm(slurm, many_runs(tmp_path_factory.mktemp("many"), prepared), "ensembling", CLUSTER)
    submitters = [on_slurm.start("--checkpoint-every", "0.01s") for _ in range(2)]
    texts = [process.communicate(timeout=PATIENCE)[0] for process in submitters]
    assert [process.returncode for process in submitters] == [0, 0], texts
    assert "already submitted" in on_slurm.submit()
    return on_slurm


def test_watch_shows_running_jobs_and_the_pending_planner(running: OnSlurm) -> None:
    pattern = r"^  planner  \d+ pending$.*^  running  w16-\S+  .*\d+_\d+ on n[12]$"
    running.until(lambda: re.search(pattern, running.watch(), flags=re.MULTILINE | re.DOTALL), "a running job")


def test_a_planner_follows_a_requeued_task_and_a_cancelled_planner(running: OnSlurm) -> None:
    running.slurm.run("scontrol", "requeue", running.until(lambda: running.queue("run", "RUNNING"), "a task")[0])
    pending = running.until(lambda: running.queue("plan", "PENDING"), "a pending planner")
    running.slurm.run("scancel", *pending)
    running.until(lambda: set(running.queue("plan")) - set(pending) or not running.active, "another planner")


def test_a_job_continues_after_its_worker_is_killed(running: OnSlurm) -> None:
    killed = running.until(running.attempts, "a running job")[0]
    os.kill(killed["pid"], signal.SIGKILL)
    records = running.campaign.workspace.records
    running.until((records / f"{killed['name']}.json").exists, f"the record of {killed['name']}")


def test_jobs_finish_while_a_node_is_down(running: OnSlurm) -> None:
    count = len(running.campaign.records)
    running.slurm.stop_node("n1")
    try:
        running.until(lambda: len(running.campaign.records) > count or not running.active, "a record")
    finally:
        running.slurm.start_node("n1")
    running.until(lambda: running.queue("run", "RUNNING") or not running.active, "a task that runs")
    running.slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    # Refused if the node has already registered again by itself.
    running.slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)


def test_the_disturbed_campaign_has_the_results_of_an_undisturbed_one(
    running: OnSlurm, tmp_path: Path, prepared: Path
) -> None:
    running.finish()
    assert results_of(running.campaign) == results_of(in_this_process(many_runs(tmp_path, prepared), "ensembling"))
    assert len(running.campaign.records) > MEMBERS


def test_no_job_of_the_disturbed_campaign_ran_twice_or_failed(running: OnSlurm) -> None:
    running.finish()
    done = Counter(re.findall(r"^ *\d+ done  (\S+)", running.log(), flags=re.MULTILINE))
    assert done and max(done.values()) == 1, f"a job ran twice: {done}"
    assert "     FAILED " not in running.log()
    assert not list(running.work.glob("*/attempt.json")), "a finished job still looks like a running one"
