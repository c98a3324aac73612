"""One worker: which job it claims next, what it leaves on disk, and when it gives up."""

import fcntl
import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from campaigns import Campaign

from epochal.campaign import worker
from epochal.campaign.plan import campaign_jobs
from epochal.campaign.worker import MAX_SILENT_CRASHES, WorkerConfig, claim, claim_next
from epochal.records import Record, load_records, write_record
from epochal.run import Ensemble, Job, Run, fingerprint
from epochal.stopping import Stopped


def one_run(campaign: Campaign) -> Run:
    job = campaign_jobs(["epoching"], campaign.records, campaign.scale)[0]
    assert isinstance(job, Run)
    return job


def record_of(job: Job, status: str = "done") -> Record:
    results: dict[str, Any] = {"loss": 1.0, "parameters": 1} if status == "done" else {"loss": None}
    if isinstance(job, Ensemble):
        results |= {"members": len(job.runs), "curve": {str(len(job.runs)): [1.0]}}
    return Record(job, fingerprint(job), status, results)


def leave_model(campaign: Campaign, job: Job) -> None:
    """Leave what a finished run leaves: a model and what it was made from."""
    folder = campaign.workspace.folder(job.name)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").touch()
    (folder / "meaning.json").write_text(json.dumps({"fingerprint": fingerprint(job), "inputs": {}}))


def test_a_process_that_waits_for_a_lock_and_a_later_one_see_the_same_lock(campaign: Campaign) -> None:
    """If the lock file were deleted with its lock, both could hold a claim: one of them on a file without a name."""
    job, workspace = one_run(campaign), campaign.workspace
    with claim(workspace, job) as claimed:
        assert claimed
        with claim(workspace, job) as claimed_again:
            assert not claimed_again
        waiting = next((workspace.work / workspace.scale / "locks").glob("*.lock")).open("a")
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with claim(workspace, job) as claimed:
            assert not claimed
    with claim(workspace, job) as claimed:
        assert claimed


def test_a_job_stays_claimed_while_a_process_started_for_it_lives(campaign: Campaign) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    with claim(workspace, job) as claimed:
        assert claimed
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    with claim(workspace, job) as claimed:
        assert not claimed, "the worker is gone, but its run is not"
    process.communicate(timeout=60)
    with claim(workspace, job) as claimed:
        assert claimed


def test_jobs_that_unlock_others_come_first_then_the_longest(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(job: Job, config: WorkerConfig) -> Record:
        if isinstance(job, Run):
            (campaign.workspace.folder(job.name) / "model").mkdir()
            (campaign.workspace.folder(job.name) / "model" / "model.safetensors").touch()
        return record_of(job)

    runs = [replace(one_run(campaign), name=f"of-{epochs}", epochs=epochs) for epochs in (2, 4, 1, 3)]
    both = Ensemble(name="both", runs=("of-4", "of-3"), average="logits")
    monkeypatch.setattr(worker, "campaign_jobs", lambda *_: [*runs, both])
    monkeypatch.setattr(worker, "execute", execute)
    events: list[dict[str, Any]] = []
    assert worker.work(campaign.worker_config("ensembling"), events.append) == 0
    started = [event["name"] for event in events if event["event"] == "started"]
    assert started == ["of-4", "of-3", "both", "of-2", "of-1"]
    assert not list(campaign.workspace.work.rglob("attempt.json")), "a finished job still looks like a running one"


def test_the_next_claim_skips_jobs_of_other_workers_and_finished_ones(campaign: Campaign) -> None:
    longest, job = (replace(one_run(campaign), name=name, epochs=n) for name, n in (("longest", 4), ("job", 2)))
    workspace = campaign.workspace

    def next_name(records: Any) -> str | None:
        with claim_next([job, longest], records) as claimed:
            return claimed.name if claimed else None

    records = load_records(workspace)
    assert next_name(records) == "longest"
    with claim(workspace, longest):
        assert next_name(records) == "job"
        write_record(workspace, record_of(job))
        assert next_name(records) is None, "another worker wrote a record after the records were read"
        records = load_records(workspace)
        assert next_name(records) == "job", "a record without its weights, as in a fresh clone"
        leave_model(campaign, job)
        assert next_name(records) is None, "another worker made the weights after the records were read"


def test_a_failed_job_decides_the_exit_code_only_of_workers_that_could_take_it(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, config = campaign.workspace, campaign.worker_config("ensembling")
    runs = [replace(one_run(campaign), name=name) for name in ("lost", "kept")]
    both = Ensemble(name="both", runs=("lost", "kept"), average="logits")
    monkeypatch.setattr(worker, "campaign_jobs", lambda *_: [*runs, both])
    write_record(workspace, record_of(runs[0], "diverged"))  # the ensemble is never ready
    write_record(workspace, record_of(runs[1]))
    leave_model(campaign, runs[1])
    events: list[dict[str, Any]] = []
    assert worker.work(config, events.append) == 0
    worker._write_failure(both, config, "no disk", "")
    assert worker.work(config, events.append) == 1
    assert worker.work(replace(config, only=("kept",)), events.append) == 0
    assert worker.work(replace(config, session="second"), events.append) == 0
    assert not events, "nothing was started"


def test_silent_crashes_are_counted_until_a_new_checkpoint_or_session(campaign: Campaign) -> None:
    job, config = one_run(campaign), campaign.worker_config("ensembling")
    checkpoints = campaign.workspace.folder(job.name) / "checkpoints"
    for step in range(2 * MAX_SILENT_CRASHES):  # each attempt gets a little further
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
        worker._begin_attempt(job, config)
    for _ in range(MAX_SILENT_CRASHES - 1):
        worker._begin_attempt(job, config)
    with pytest.raises(RuntimeError, match=rf"crashed {MAX_SILENT_CRASHES} times without an error message or a new"):
        worker._begin_attempt(job, config)
    worker._begin_attempt(job, replace(config, session="second"))


def test_a_stopped_job_may_be_stopped_any_number_of_times(campaign: Campaign) -> None:
    job, config = one_run(campaign), campaign.worker_config("ensembling")

    def stop(event: dict[str, Any]) -> None:
        assert event["event"] == "started", event
        raise Stopped("time limit")

    for _ in range(MAX_SILENT_CRASHES + 1):
        with pytest.raises(Stopped):
            worker.run_job(job, config, stop, {})
    assert not list(campaign.workspace.folder(job.name).iterdir())
