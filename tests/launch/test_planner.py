"""Planner rounds and array tasks on a simulated queue: what is submitted, what depends on what, when it ends.

test_slurm.py uses a real Slurm; here a fake answers its commands.
"""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign

from epochal.campaign.cluster import Cluster, ClusterCampaign, cluster_campaign
from epochal.campaign.plan import campaign_jobs
from epochal.campaign.worker import WorkerConfig, claim
from epochal.config import write_atomic
from epochal.records import Record, write_record
from epochal.run import Ensemble, Job, Run, fingerprint
from launch import array_task, planner, slurm, submit


@dataclass
class Queue:
    """A fake of squeue, sbatch, scontrol and scancel; `jobs` are the tasks in the queue by id."""

    jobs: dict[str, dict[str, str]] = field(default_factory=dict)
    scripts: list[dict[str, str]] = field(default_factory=list)
    busy: int = 0
    environments: list[dict[str, str]] = field(default_factory=list)

    def run(self, command: list[str], *, env: dict[str, str], input: str | None = None, **_: Any) -> Any:
        self.environments.append(env)
        if self.busy:
            self.busy -= 1
            return subprocess.CompletedProcess(
                command, 1, "", "slurm_load_jobs error: Unable to contact slurm controller"
            )
        code, text = getattr(self, command[0])(command[1:], input)
        return subprocess.CompletedProcess(command, code, text, "no such job" if code else "")

    def squeue(self, command: list[str], _: str | None) -> tuple[int, str]:
        options = dict(word.removeprefix("--").partition("=")[::2] for word in command)
        assert "array" in options and "noheader" in options
        rows = [job for job in self.jobs.values() if job["name"] in options["name"].split(",")]
        letters = {"%i": "id", "%j": "name", "%T": "state", "%N": "node", "%M": "elapsed", "%k": "comment"}
        columns = [letters[column] for column in options["format"].split("|")]
        return 0, "".join("|".join(row[column] for column in columns) + "\n" for row in rows)

    def sbatch(self, command: list[str], script: str | None) -> tuple[int, str]:
        assert script is not None and ("--parsable" in command or command == ["--test-only"])
        lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
        options = dict(line.partition("=")[::2] for line in lines)
        waits = [word.removeprefix("--dependency=") for word in command if word.startswith("--dependency=")]
        number = str(100 + len(self.scripts))
        self.scripts.append({**options, "test-only": "yes" * (command == ["--test-only"])})
        if command == ["--test-only"]:
            return 0, ""
        first, last = map(int, re.match(r"(\d+)-(\d+)", options.get("array", "0-0")).groups())  # type: ignore[union-attr]
        for index in range(first, last + 1):
            self.add(f"{number}_{index}" if "array" in options else number, options["job-name"], *waits)
            self.jobs[list(self.jobs)[-1]]["comment"] = options.get("comment", "")
        return 0, f"{number};cluster\n"

    def scontrol(self, command: list[str], _: str | None) -> tuple[int, str]:
        action, *values = command
        changes = dict(value.partition("=")[::2] for value in values)
        job = self.jobs.get(changes.pop("JobId"), {"state": "gone"})
        if action != "update" or job["state"] != "PENDING":
            return 1, ""
        job.update(changes)
        return 0, ""

    def scancel(self, command: list[str], _: str | None) -> tuple[int, str]:
        for number in command:
            self.jobs.pop(number, None)
        return 0, ""

    def add(self, number: str, name: str, dependency: str = "", state: str = "PENDING") -> None:
        row = {"id": number, "name": name, "state": state, "node": "n1", "elapsed": "0:01", "comment": ""}
        self.jobs[number] = {**row, "Dependency": dependency, "StartTime": ""}

    def named(self, kind: str) -> list[str]:
        return [number for number, job in self.jobs.items() if job["name"].startswith(f"epochal-{kind}-")]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    simulated = Queue()
    monkeypatch.setattr(slurm.subprocess, "run", simulated.run)  # type: ignore[attr-defined]
    return simulated


Make = Callable[..., tuple[ClusterCampaign, list[Job]]]


@pytest.fixture
def make(campaign: Campaign, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Submit five runs of different length and an ensemble of the first two, with some cluster settings."""
    one = campaign_jobs(["epoching"], campaign.records, campaign.scale)[0]
    assert isinstance(one, Run)
    jobs: list[Job] = [replace(one, name=f"r{epochs}", epochs=epochs) for epochs in (1, 2, 3, 4, 5)]
    jobs.append(Ensemble(name="both", runs=("r1", "r2"), average="logits"))

    def begin(**settings: Any) -> tuple[ClusterCampaign, list[Job]]:
        config = campaign.worker_config("epoching", "limits", session="s")
        submitted = cluster_campaign(config, Cluster(name="c", **settings))
        submitted.save()
        monkeypatch.setattr(planner, "campaign_jobs", lambda *_: jobs)
        return submitted, jobs

    return begin


def plan(campaign: ClusterCampaign, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the pending planner, or the first one, as Slurm would; it leaves the queue when it ends."""
    waiting = queue.named("plan")
    own_id = waiting[0] if waiting else "99"
    queue.add(own_id, campaign.planner_name, state="RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", own_id)
    try:
        return planner.main(campaign.path)
    finally:
        del queue.jobs[own_id]


def done(campaign: ClusterCampaign, *jobs: Job) -> None:
    for job in jobs:
        folder = campaign.config.workspace.folder(job.name)
        write_atomic(folder / "model" / "model.safetensors", b"")
        write_atomic(folder / "meaning.json", json.dumps({"fingerprint": fingerprint(job), "inputs": {}}))
        results: dict[str, Any] = {"loss": 1.0, "parameters": 1}
        if isinstance(job, Ensemble):
            results |= {"curve": {"1": [1.0], str(len(job.runs)): [1.0]}, "members": len(job.runs)}
        record = Record(job, fingerprint(job), "done", results)
        write_record(campaign.config.workspace, record)


def fail(campaign: ClusterCampaign, name: str, attempts: int) -> None:
    failure = {"session": "s", "attempts": attempts}
    write_atomic(campaign.config.workspace.folder(name) / "failure.json", json.dumps(failure))


def tasks(campaign: ClusterCampaign, queue: Queue) -> dict[str, list[str]]:
    """The job names of each task in the queue, from its batch file."""
    names = {}
    for number in queue.named("run"):
        batch = json.loads((campaign.folder / "batches" / f"{queue.jobs[number]['comment']}.json").read_text())
        assert batch["campaign"] == str(campaign.path)
        names[number] = batch["tasks"][int(number.partition("_")[2])]
    return names


def test_a_campaign_from_the_first_round_to_the_last(make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign, jobs = make(pack=2, parallel=2)
    assert plan(campaign, queue, monkeypatch) == 0
    first = tasks(campaign, queue)
    assert list(first.values()) == [["r5", "r4"], ["r3", "r2"], ["r1"]], "the longest first, two to a task"
    assert queue.scripts[-1]["array"] == "0-2%2" and queue.scripts[-1]["nodes"] == "1"
    (successor,) = queue.named("plan")
    assert queue.jobs[successor]["Dependency"] == "?".join(f"afterany:{number}" for number in first)

    # The first task ends; the others keep their jobs.
    done(campaign, *jobs[3:5])
    del queue.jobs[next(iter(first))]
    assert plan(campaign, queue, monkeypatch) == 0
    assert tasks(campaign, queue) == dict(list(first.items())[1:]), "nothing is submitted twice"
    (third,) = queue.named("plan")
    assert third != successor
    assert queue.jobs[third]["Dependency"] == "?".join(f"afterany:{number}" for number in list(first)[1:])

    # Two are done, one was killed: it is submitted again, together with the job that has become ready.
    done(campaign, *jobs[:2])
    for number in list(first)[1:]:
        del queue.jobs[number]
    assert plan(campaign, queue, monkeypatch) == 0
    assert list(tasks(campaign, queue).values()) == [["both", "r3"]]
    assert campaign.path.exists()

    done(campaign, jobs[2], jobs[5])
    for number in queue.named("run"):
        del queue.jobs[number]
    assert plan(campaign, queue, monkeypatch) == 0
    assert queue.jobs == {} and not campaign.path.exists(), "no planner is left when the campaign is over"
    assert plan(campaign, queue, monkeypatch) == 0 and queue.jobs == {}


def test_multi_node_runs_are_submitted_apart_from_single_node_jobs(
    make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, jobs = make(nodes=2, preset="ddp2")
    done(campaign, *jobs[:3])
    assert plan(campaign, queue, monkeypatch) == 0
    wide, narrow = queue.scripts[-2:]
    assert [(script["array"].split("%")[0], script["nodes"]) for script in (wide, narrow)] == [
        ("0-1", "2"),
        ("0-0", "1"),
    ]
    assert list(tasks(campaign, queue).values()) == [["r5"], ["r4"], ["both"]]
    widths = [
        json.loads((campaign.folder / "batches" / f"{s['comment']}.json").read_text())["nodes"] for s in (wide, narrow)
    ]
    assert widths == [2, 1]
    assert len(queue.jobs[queue.named("plan")[0]]["Dependency"].split("?")) == 3


def test_an_array_has_no_more_tasks_than_slurm_allows(
    make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, _ = make(pack=1)
    monkeypatch.setattr(slurm, "ARRAY_TASKS", 3)
    assert plan(campaign, queue, monkeypatch) == 0
    assert list(tasks(campaign, queue).values()) == [["r5"], ["r4"], ["r3"]]
    assert plan(campaign, queue, monkeypatch) == 0
    assert sorted(name for names in tasks(campaign, queue).values() for name in names) == ["r1", "r2", "r3", "r4", "r5"]


def test_claimed_jobs_and_jobs_out_of_retries_are_not_submitted(
    make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, jobs = make(retries=1)
    done(campaign, *jobs[1:5])
    with claim(campaign.config.workspace, jobs[0]) as mine:
        assert mine
        assert plan(campaign, queue, monkeypatch) == 0
        assert tasks(campaign, queue) == {}
        (successor,) = queue.named("plan")
        assert queue.jobs[successor]["Dependency"] == "" and queue.jobs[successor]["StartTime"] == "now+60"
    fail(campaign, "r1", 1)
    assert plan(campaign, queue, monkeypatch) == 0
    assert list(tasks(campaign, queue).values()) == [["r1"]], "one retry is left"
    fail(campaign, "r1", 2)
    for number in queue.named("run"):
        del queue.jobs[number]
    assert plan(campaign, queue, monkeypatch) == 1
    assert queue.jobs == {} and not campaign.path.exists()


def test_extra_pending_planners_are_cancelled(make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign, _ = make()
    monkeypatch.setenv("SLURM_JOB_ID", "50")
    for number, state in (("50", "RUNNING"), ("51", "PENDING"), ("52", "PENDING"), ("53", "RUNNING")):
        queue.add(number, campaign.planner_name, "afterany:1", state)
    assert planner.main(campaign.path) == 0
    assert queue.named("plan") == ["50", "51", "53"], "running planners are kept"
    assert queue.jobs["51"]["Dependency"].startswith("afterany:100_0?afterany:100_1")
    assert queue.jobs["51"]["StartTime"] == "now"


def test_a_cancelled_successor_is_replaced(make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign, _ = make()
    really = slurm.submit

    def cancelling(script: str, folder: Path, **options: Any) -> str:
        if "--array" in script:
            slurm.cancel(*queue.named("plan"))
        return really(script, folder, **options)

    monkeypatch.setattr(slurm, "submit", cancelling)
    monkeypatch.setenv("SLURM_JOB_ID", "50")
    assert planner.main(campaign.path) == 0
    (successor,) = queue.named("plan")
    assert queue.jobs[successor]["Dependency"].split("?") == [f"afterany:{number}" for number in queue.named("run")]


@pytest.mark.parametrize(
    ("error", "code", "starts"),
    [(ValueError("no such recipe"), 2, []), (OSError("the disk is gone"), None, ["now+60"])],
)
def test_a_failed_round_is_tried_again_unless_it_is_wrong_use(
    make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int | None, starts: list[str]
) -> None:
    campaign, _ = make()

    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(planner, "load_records", failing)
    if code is None:
        with pytest.raises(type(error)):
            plan(campaign, queue, monkeypatch)
    else:
        assert plan(campaign, queue, monkeypatch) == code
    assert [(job["StartTime"], job["Dependency"]) for job in queue.jobs.values()] == [(start, "") for start in starts]


def test_a_campaign_is_submitted_once_and_stopped_completely(
    make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, jobs = make(pack=2)
    campaign.path.unlink()
    arrays = [text for text in submit.preview(campaign, jobs[:5]) if "--array" in text]
    assert len(arrays) == 1 and "--array=0-2%" in arrays[0] and arrays[0].startswith("# 5 jobs, 2 to a task: r1, ")
    assert submit.submit(campaign).startswith("submitted planner 101 ") and campaign.path.exists()
    assert queue.scripts[0]["test-only"] and queue.named("run") == []
    again = cluster_campaign(replace(campaign.config, recipes=campaign.config.recipes[::-1]), campaign.cluster)
    assert submit.submit(again).startswith("already submitted (planner 101)")

    assert plan(campaign, queue, monkeypatch) == 0
    assert len(queue.named("run")) == 3
    assert submit.stop(campaign).startswith("stopped: 4 jobs cancelled")
    assert queue.jobs == {} and not campaign.path.exists()
    campaign.save()
    assert submit.submit(campaign).startswith("submitted planner "), "its planners were cancelled by hand"
    assert len(queue.named("plan")) == 1


@pytest.mark.parametrize(
    ("reason", "over", "waiting", "planners"),
    [(None, False, 0, 1), ("SIGUSR1", False, 0, 1), ("SIGTERM", False, 0, 0), (None, True, 0, 0), (None, False, 1, 1)],
)
def test_a_task_runs_its_own_jobs_and_ensures_a_planner(
    make: Make, queue: Queue, monkeypatch: pytest.MonkeyPatch,
    reason: str | None, over: bool, waiting: int, planners: int,
) -> None:  # fmt: skip
    campaign, _ = make(pack=2)
    for number in range(waiting):
        queue.add(str(number), campaign.planner_name)
    batch = planner.write_batch(campaign, [["r5", "r4"], ["r3"], ["r2", "r1"]], nodes=3)
    calls: list[tuple[WorkerConfig, dict[str, Any]]] = []

    def run_campaign(config: WorkerConfig, **options: Any) -> int:
        calls.append((config, options))
        if over:
            campaign.path.unlink()
        return 75

    monkeypatch.setattr(array_task, "run_campaign", run_campaign)
    monkeypatch.setattr(array_task, "stop_reason", lambda: reason)
    environment = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_CPUS_PER_TASK": "8"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert array_task.main(batch) == 75
    ((config, options),) = calls
    assert (config.only, config.nodes, config.threads) == (("r2", "r1"), 3, 4)
    assert (options["jobs"], options["log_prefix"]) == (2, "7_2-")
    assert len(queue.named("plan")) == planners
    if over:
        assert array_task.main(batch) == 0 and len(calls) == 1, "a late task of a finished campaign runs nothing"


def test_commands_are_retried_while_the_controller_is_busy_and_do_not_inherit_an_allocation(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(slurm.time, "sleep", waits.append)  # type: ignore[attr-defined]
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    queue.add("7_3", "mine")
    queue.jobs["7_3"]["comment"] = "a|b"
    queue.busy = slurm.TRIES - 1
    (task,) = slurm.queue("other", "mine")
    assert task == slurm.Task("7_3", "mine", "PENDING", "n1", "a|b", "0:01") and task.index == 3
    assert len(waits) == slurm.TRIES - 1
    assert {env.get("SLURM_CONF") for env in queue.environments} == {"/etc/other.conf"}
    assert not any("SLURM_NTASKS" in env for env in queue.environments)
    queue.busy = slurm.TRIES
    with pytest.raises(slurm.SlurmError, match="Unable to contact"):
        slurm.queue("mine")
    assert len(waits) == 2 * (slurm.TRIES - 1), "no wait after the last attempt"


def test_a_dependency_lists_at_most_a_hundred_tasks() -> None:
    assert slurm.after_any([str(number) for number in range(150)]).split("?") == [f"afterany:{n}" for n in range(100)]
