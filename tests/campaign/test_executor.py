"""Whole campaigns in worker processes: shared, stopped, killed, failed, resumed, always with the same results."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign, make_campaign

from epochal.campaign.executor import KEEP_FREED_MEMORY
from epochal.campaign.plan import campaign_jobs, ready_jobs
from epochal.campaign.worker import work
from epochal.run import Job, Run

PATIENCE = 240.0
Losses = dict[str, tuple[Any, ...]]


class Start:
    """One `epochal run` in its own process group, its output in a file."""

    def __init__(self, campaign: Campaign, number: int, *arguments: str, recipe: str = "distillation") -> None:
        self.output = campaign.folder / f"output-{number}.txt"
        command = [sys.executable, "-m", "epochal.cli", "run", recipe, *campaign.options, "--tracker", "none"]
        cores = os.sched_getaffinity(0)
        # Each start gets one core, so its workers compute with one thread whatever the machine.
        os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
        try:
            with self.output.open("w") as file:
                self.process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    cwd=campaign.folder,
                )
        finally:
            os.sched_setaffinity(0, cores)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def done(self) -> list[str]:
        """Names of the jobs that this start reports as done."""
        return re.findall(r"^ *\d+ of about \d+ done  (\S+)", self.text, flags=re.MULTILINE)

    def alive(self) -> list[int]:
        """Ids of the processes of this start that still run: the parent and its workers."""
        running = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.process.pid and state != "Z":
                running.append(int(path.parent.name))
        return running

    def kill(self) -> None:
        """Kill every process of this start."""
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


@pytest.fixture
def start(campaign: Campaign) -> Iterator[Callable[..., Start]]:
    """Start `epochal run` on the campaign; processes that still run when the test ends are killed."""
    starts: list[Start] = []

    def begin(*arguments: str, **options: str) -> Start:
        starts.append(Start(campaign, len(starts), *arguments, **options))
        return starts[-1]

    yield begin
    for each in starts:
        each.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Losses:
    """The results of a campaign that ran from beginning to end, in this process."""
    campaign = make_campaign(tmp_path_factory.mktemp("undisturbed"), prepared)
    assert finish(campaign)
    assert missing_jobs(campaign) == []
    results = results_of(campaign)
    assert any(isinstance(job, Run) and job.distill for job, *_ in results.values())
    return results


def finish(campaign: Campaign) -> list[str]:
    """Run the remaining jobs of a campaign in this process; returns their names."""
    events: list[dict[str, Any]] = []
    assert work(campaign.worker_config("distillation", session="last"), events.append) == 0
    return [event["name"] for event in events if event["event"] == "done"]


def results_of(campaign: Campaign) -> Losses:
    """What must not depend on how a campaign was interrupted: everything in the records but the provenance."""
    assert campaign.records.problems == ()
    return {
        record.job.name: (record.job, record.fingerprint, record.status, record.results, record.inputs)
        for record in campaign.records
    }


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.02)


def has_records(campaign: Campaign, count: int) -> Callable[[], bool]:
    return lambda: len(list(campaign.workspace.records.glob("[!.]*.json"))) >= count


def test_two_starts_share_the_work(campaign: Campaign, start: Callable[..., Start], undisturbed: Losses) -> None:
    both = [start(), start()]
    assert [each.wait() for each in both] == [0, 0], [each.text for each in both]
    assert results_of(campaign) == undisturbed
    assert sorted(both[0].done + both[1].done) == sorted(undisturbed), "a job ran twice, or was not reported"


def test_sigterm_stops_a_campaign_and_a_failing_job_is_reported_and_tried_again(
    campaign: Campaign, start: Callable[..., Start], undisturbed: Losses
) -> None:
    first = start("--checkpoint-every", "0.01s")
    until(has_records(campaign, 2), "two records")
    asked = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text
    assert time.monotonic() - asked < 60, "saving takes seconds, also beside other work"
    until(lambda: not first.alive(), "the processes to end")
    assert "run the same command again" in first.text and "stopping (SIGTERM): saving" in first.text
    before = results_of(campaign)
    assert len(before) < len(undisturbed)

    victim = next(job.name for job in missing_jobs(campaign) if isinstance(job, Run))
    obstacle = campaign.workspace.folder(victim) / "meaning.json"
    # Nothing else: with a checkpoint of the stopped run next to it, all would be moved aside and the job start afresh.
    shutil.rmtree(obstacle.parent, ignore_errors=True)
    obstacle.mkdir(parents=True)
    second = start()
    assert second.wait() == 1, second.text
    assert f"FAILED {victim}: " in second.text
    assert victim not in results_of(campaign)
    assert not set(second.done) & set(before), "a finished job ran again"

    obstacle.rmdir()
    assert victim in finish(campaign)
    assert results_of(campaign) == undisturbed
    assert not (campaign.workspace.folder(victim) / "failure.json").exists()


def missing_jobs(campaign: Campaign) -> list[Job]:
    return ready_jobs(campaign_jobs(["distillation"], campaign.records, campaign.scale), campaign.records)


def test_a_campaign_killed_at_a_random_moment_reaches_the_same_results(
    campaign: Campaign, start: Callable[..., Start], undisturbed: Losses
) -> None:
    moment = random.randrange(1, len(undisturbed) - 2)
    first = start("--checkpoint-every", "0.01s")
    until(has_records(campaign, moment), f"{moment} records")
    first.kill()
    until(lambda: not first.alive(), "the killed processes to be gone")

    # Only the parent of the next one is killed: its worker notices and stops.
    second = start("--checkpoint-every", "0.01s")
    until(has_records(campaign, moment + 1), "one more record")
    second.process.kill()
    second.process.wait()
    until(lambda: not second.alive(), "the worker without a parent to stop")

    finish(campaign)
    assert results_of(campaign) == undisturbed


def test_a_time_limit_stops_with_75(campaign: Campaign, start: Callable[..., Start]) -> None:
    first = start("--time-limit", "0.3s", recipe="epoching")
    assert first.wait() == 75, first.text
    assert "run the same command again" in first.text
    until(lambda: not first.alive(), "the killed processes to be gone")


def test_workers_keep_the_memory_that_they_free() -> None:
    """Counted by the kernel: pages that a process faults in while it makes and drops 2 MiB a hundred times."""
    code = (
        "import numpy, resource; numpy.ones(2**18)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(100): numpy.ones(2**18)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    plain = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}

    def faults(environment: dict[str, str]) -> int:
        return int(subprocess.check_output([sys.executable, "-c", code], env=environment))

    assert faults(plain) >= 100
    assert faults({**plain, **KEEP_FREED_MEMORY}) < 20
