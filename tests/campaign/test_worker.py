"""One worker: what it claims, in which order it works, and what it keeps of starts that ended."""

import fcntl
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign

from epochal.campaign import worker
from epochal.campaign.plan import campaign_jobs
from epochal.campaign.worker import SILENT_ENDS, Orders, claim
from epochal.records import Record, load_records, write_record
from epochal.run import Ensemble, Job, Run, fingerprint
from epochal.stopping import Stopped


def orders_for(campaign: Campaign, **changes: Any) -> Orders:
    space = campaign.workspace
    return Orders(
        session=changes.pop("session", "first"), scale=str(campaign.scale_path), recipes=("ensembling",),
        results=str(space.results), work=str(space.work), threads=1, **changes,
    )  # fmt: skip


def job_of(campaign: Campaign) -> Job:
    return campaign_jobs(["epoching"], campaign.records, campaign.scale)[0]


def test_who_waits_for_the_lock_of_a_job_and_who_comes_later_see_the_same_lock(campaign: Campaign) -> None:
    """A lock file that goes with its lock lets both in: one holds a file that has no name any more."""
    job, space = job_of(campaign), campaign.workspace
    with claim(space, job) as mine:
        assert mine
        with claim(space, job) as other:
            assert not other
        waiting = next((space.work / space.scale / "locks").iterdir()).open("a")
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with claim(space, job) as later:
            assert not later
    with claim(space, job) as later:
        assert later


def test_a_job_is_taken_while_a_process_started_for_it_lives(campaign: Campaign) -> None:
    job, space = job_of(campaign), campaign.workspace
    with claim(space, job) as mine:
        assert mine
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    with claim(space, job) as other:
        assert not other, "the worker is gone, its run is not"
    process.communicate(timeout=60)
    with claim(space, job) as other:
        assert other


def test_what_unlocks_others_comes_first_then_the_longest(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(job: Job, orders: Orders) -> Record:
        campaign.workspace.folder(job.name).mkdir(parents=True, exist_ok=True)
        (campaign.workspace.folder(job.name) / "model").mkdir()
        return Record(job, fingerprint(job), "done", {"loss": 1.0, "parameters": 1})

    one = job_of(campaign)
    assert isinstance(one, Run)
    runs = [replace(one, name=f"of-{epochs}", epochs=epochs) for epochs in (2, 4, 1, 3)]
    both = Ensemble(name="both", runs=("of-4", "of-3"), average="logits")
    monkeypatch.setattr(worker, "campaign_jobs", lambda *_: [*runs, both])
    monkeypatch.setattr(worker, "execute", done)
    said: list[dict[str, Any]] = []
    assert worker.work(orders_for(campaign), said.append) == 0
    started = [event["name"] for event in said if event["event"] == "started"]
    assert started == ["of-4", "of-3", "both", "of-2", "of-1"]
    left = [file.name for file in Path(campaign.workspace.work).rglob("attempt.json")]
    assert not left, "a job that ended in good order is not being worked on"


def finished(job: Job, status: str = "done") -> Record:
    return Record(job, fingerprint(job), status, {"loss": 1.0, "parameters": 1} if status == "done" else {})


def test_what_others_finished_meanwhile_is_not_done_again(campaign: Campaign) -> None:
    job, space = job_of(campaign), campaign.workspace
    seen = load_records(space)
    assert worker._still_needed(job, seen)
    write_record(space, finished(job))
    assert not worker._still_needed(job, seen), "the record came after the look"
    seen = load_records(space)
    assert worker._still_needed(job, seen), "a record without the weights, as in a clean clone"
    output = space.output(job)
    assert output is not None
    output.mkdir(parents=True)
    assert not worker._still_needed(job, seen), "the weights came after the look"


def test_a_failed_job_counts_though_nothing_is_ready_and_only_for_whom_it_was_meant(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, space = job_of(campaign), campaign.workspace
    assert isinstance(one, Run)
    runs = [replace(one, name=name) for name in ("lost", "kept")]
    both = Ensemble(name="both", runs=("lost", "kept"), average="logits")
    monkeypatch.setattr(worker, "campaign_jobs", lambda *_: [*runs, both])
    write_record(space, finished(runs[0], "diverged"))  # so that the ensemble waits for ever
    write_record(space, finished(runs[1]))
    (space.folder("kept") / "model").mkdir(parents=True)
    said: list[dict[str, Any]] = []
    assert worker.work(orders_for(campaign), said.append) == 0
    worker._write_failure(both, orders_for(campaign), "no disk", "")
    assert worker.work(orders_for(campaign), said.append) == 1
    assert worker.work(orders_for(campaign, only=("kept",)), said.append) == 0
    assert worker.work(orders_for(campaign, session="second"), said.append) == 0
    assert not said, "nothing was started"


def test_starts_without_a_word_count_until_there_is_a_new_checkpoint_or_session(campaign: Campaign) -> None:
    job, orders = job_of(campaign), orders_for(campaign)
    checkpoints = campaign.workspace.folder(job.name) / "checkpoints"
    for step in range(2 * SILENT_ENDS):  # each gets a little further
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
        worker._begin_attempt(job, orders)
    for _ in range(SILENT_ENDS - 1):
        worker._begin_attempt(job, orders)
    with pytest.raises(RuntimeError, match=rf"ended {SILENT_ENDS} times without a word or a new checkpoint"):
        worker._begin_attempt(job, orders)
    worker._begin_attempt(job, orders_for(campaign, session="second"))


def test_a_job_that_is_stopped_in_good_order_may_be_stopped_for_ever(campaign: Campaign) -> None:
    job, orders = job_of(campaign), orders_for(campaign)

    def stopped(event: dict[str, Any]) -> None:
        assert event["event"] == "started", event
        raise Stopped("time limit")

    for _ in range(SILENT_ENDS + 1):
        with pytest.raises(Stopped):
            worker.run_job(job, orders, stopped, {})
    assert not list(campaign.workspace.folder(job.name).iterdir())
