"""Whole campaigns in worker processes: shared, stopped, killed, failed, continued, always with the same results."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign, make_campaign

from epochal.campaign.plan import campaign_jobs, ready_jobs

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
        """Names of the jobs that this start says it has done."""
        return re.findall(r"^ *\d+ done  (\S+)", self.text, flags=re.MULTILINE)

    def alive(self) -> list[int]:
        """Processes of this start that still run: the parent and its workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        """End every process of this start at once."""
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


@pytest.fixture
def start(campaign: Campaign) -> Iterator[Callable[..., Start]]:
    """Start `epochal run` on the campaign; whatever still runs when the test ends is killed."""
    starts: list[Start] = []

    def begin(*arguments: str, **options: str) -> Start:
        starts.append(Start(campaign, len(starts), *arguments, **options))
        return starts[-1]

    yield begin
    for each in starts:
        each.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Losses:
    """The results of a campaign that ran from beginning to end."""
    campaign = make_campaign(tmp_path_factory.mktemp("undisturbed"), prepared)
    first = Start(campaign, 0)
    try:
        assert first.wait() == 0, first.text
    finally:
        first.kill()
    found = results_of(campaign)
    assert sorted(first.done) == sorted(found)
    assert ready_jobs(campaign_jobs(["distillation"], campaign.records, campaign.scale), campaign.records) == []
    assert any(name.startswith("student-ensemble") for name in found)
    return found


def results_of(campaign: Campaign) -> Losses:
    """Everything in the records that must not depend on how a campaign went."""
    assert campaign.records.problems == ()
    return {
        record.job.name: (record.job, record.fingerprint, record.status, record.results, record.inputs)
        for record in campaign.records
    }


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def has_records(campaign: Campaign, count: int) -> Callable[[], bool]:
    return lambda: len(list(campaign.workspace.records.glob("[!.]*.json"))) >= count


def test_two_starts_share_the_work(campaign: Campaign, start: Callable[..., Start], undisturbed: Losses) -> None:
    both = [start(), start()]
    assert [each.wait() for each in both] == [0, 0], [each.text for each in both]
    assert results_of(campaign) == undisturbed
    assert sorted(both[0].done + both[1].done) == sorted(undisturbed), "a job ran twice, or went unseen"


def test_a_finished_campaign_has_nothing_to_do_and_sigterm_stops_one_in_flight(
    campaign: Campaign, start: Callable[..., Start], undisturbed: Losses
) -> None:
    first = start("--checkpoint-every", "0.01s")
    until(has_records(campaign, 2), "two records")
    asked = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, first.text
    assert time.monotonic() - asked < 10
    until(lambda: not first.alive(), "the killed processes to be gone")
    assert "run the same command again" in first.text
    before = results_of(campaign)
    assert len(before) < len(undisturbed)

    second = start()
    assert second.wait() == 0, second.text
    assert results_of(campaign) == undisturbed
    assert sorted(second.done) == sorted(set(undisturbed) - set(before))

    third = start()
    assert third.wait() == 0
    assert third.done == []


def test_killed_at_a_random_moment_it_continues(
    campaign: Campaign, start: Callable[..., Start], undisturbed: Losses
) -> None:
    moment = random.randrange(1, len(undisturbed) - 2)
    first = start("--checkpoint-every", "0.01s")
    until(has_records(campaign, moment), f"{moment} records")
    first.kill()
    until(lambda: not first.alive(), "the killed processes to be gone")

    # The next one loses its parent only: the worker notices and stops by itself.
    second = start("--checkpoint-every", "0.01s")
    until(has_records(campaign, moment + 1), "one more record")
    second.process.kill()
    second.process.wait()
    until(lambda: not second.alive(), "the worker without a parent to stop")

    third = start()
    assert third.wait() == 0, third.text
    assert results_of(campaign) == undisturbed


def test_a_failing_job_is_named_and_can_be_tried_again(campaign: Campaign, start: Callable[..., Start]) -> None:
    jobs = campaign_jobs(["epoching"], campaign.records, campaign.scale)
    assert len(jobs) > 1
    victim = jobs[0].name
    obstacle = campaign.workspace.folder(victim) / "metrics.jsonl"
    obstacle.mkdir(parents=True)
    first = start(recipe="epoching")
    assert first.wait() == 1, first.text
    assert f"FAILED {victim}: " in first.text
    assert set(results_of(campaign)) == {job.name for job in jobs} - {victim}

    obstacle.rmdir()
    second = start(recipe="epoching")
    assert second.wait() == 0, second.text
    assert second.done == [victim]
    assert not (campaign.workspace.folder(victim) / "failure.json").exists()


def test_a_time_limit_stops_with_75(campaign: Campaign, start: Callable[..., Start]) -> None:
    first = start("--time-limit", "0.3s", recipe="epoching")
    assert first.wait() == 75, first.text
    assert "run the same command again" in first.text
    until(lambda: not first.alive(), "the killed processes to be gone")
