"""Faults of disks, files and clocks: they are reported, and the campaign still reaches the same results."""

import datetime
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign, make_campaign

from epochal.campaign.plan import campaign_jobs, ready_jobs
from epochal.campaign.worker import MAX_SILENT_CRASHES, work


def results_of(campaign: Campaign) -> dict[str, Any]:
    return {record.job.name: (record.fingerprint, record.status, record.results) for record in campaign.records}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> dict[str, Any]:
    campaign = make_campaign(tmp_path_factory.mktemp("undisturbed"), prepared)
    assert work(campaign.worker_config("ensembling"), lambda event: None) == 0
    return results_of(campaign)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    campaign: Campaign, small_disk: Path, undisturbed: dict[str, Any]
) -> None:
    """Each job that cannot save is reported and no file is half-written; with free space again the rest runs."""
    checkpoints = campaign.workspace.work / "tiny-scale"
    checkpoints.symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 150_000))  # a model of 50 kB and its optimizer state do not fit twice
    events: list[dict[str, Any]] = []
    try:
        code = work(campaign.worker_config("ensembling", checkpoint_seconds=0.0), events.append)
        assert code == 1
        failures = [event["message"] for event in events if event["event"] == "failed"]
        assert failures and all("No space left" in message or "os error 28" in message for message in failures)
    except OSError as error:  # so full that not even failure.json could be written
        assert "No space left" in str(error)
    assert campaign.records.problems == ()
    assert not list(small_disk.glob("*/checkpoints/.*")), "a half-written checkpoint was left"

    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert work(campaign.worker_config("ensembling", session="second"), events.append) == 0
    assert results_of(campaign) == undisturbed


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_corrupt_weights_are_detected_before_they_are_read_and_recomputed(
    campaign: Campaign, undisturbed: dict[str, Any]
) -> None:
    assert work(campaign.worker_config("ensembling"), lambda event: None) == 0
    ensemble = next(name for name in undisturbed if name.endswith("-logits"))
    member = next(record.job for record in campaign.records if record.job.name == ensemble).runs[0]  # type: ignore[union-attr]
    weights = campaign.workspace.folder(member) / "model" / "model.safetensors"
    original = weights.read_bytes()
    for damage in (flip, cut, Path.unlink):
        (campaign.workspace.records / f"{ensemble}.json").unlink()
        damage(weights)
        events: list[dict[str, Any]] = []
        assert work(campaign.worker_config("ensembling"), events.append) == 0
        notes = [event["message"] for event in events if event["event"] == "note"]
        assert len(notes) == 1 and member in notes[0] and "will be recomputed" in notes[0]
        assert [event["name"] for event in events if event["event"] == "done"] == [member, ensemble]
        assert weights.read_bytes() == original
        assert results_of(campaign) == undisturbed


def test_a_cut_or_flipped_token_store_is_refused_by_name(campaign: Campaign) -> None:
    for damage in (flip, cut):
        path = campaign.workspace.data / "tiny" / "train.bin"
        whole = path.read_bytes()
        damage(path)
        events: list[dict[str, Any]] = []
        assert work(campaign.worker_config("epoching", session=damage.__name__), events.append) == 1
        assert "train.bin" in events[-1]["message"] and "damaged" in events[-1]["message"]
        path.write_bytes(whole)


def test_a_clock_that_jumps_changes_nothing(
    campaign: Campaign, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of day goes back a year at each call, file times too. Only the date in the provenance may differ."""
    jumps = iter(range(10**9))

    def jumping() -> float:
        return 1.8e9 - 3.15e7 * next(jumps)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromtimestamp(jumping() % 2e9, tz)

    monkeypatch.setattr(datetime, "datetime", Jumping)

    def backwards(event: dict[str, Any]) -> None:
        for path in campaign.workspace.work.rglob("*"):
            if path.is_file():
                os.utime(path, (next(jumps), 1_000_000 - next(jumps)))

    assert work(campaign.worker_config("ensembling", checkpoint_seconds=0.01), backwards) == 0
    assert results_of(campaign) == undisturbed


class Killed(BaseException):
    """Stands for SIGKILL: no cleanup runs."""


def test_a_job_that_kills_its_worker_three_times_has_failed(campaign: Campaign) -> None:
    name = ready_jobs(campaign_jobs(["epoching"], campaign.records, campaign.scale), campaign.records)[0].name
    events: list[dict[str, Any]] = []

    def killed_at_the_start(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "started":
            raise Killed

    config = campaign.worker_config("epoching", only=(name,))
    for _ in range(MAX_SILENT_CRASHES):
        with pytest.raises(Killed):
            work(config, killed_at_the_start)
    assert work(config, killed_at_the_start) == 1
    assert events[-1]["event"] == "failed" and "without an error message" in events[-1]["message"]
    assert work(campaign.worker_config("epoching", only=(name,), session="second"), lambda event: None) == 0
    assert campaign.records.named(name) is not None


def test_a_failed_job_is_tried_again_as_often_as_retries_says(campaign: Campaign) -> None:
    name = ready_jobs(campaign_jobs(["epoching"], campaign.records, campaign.scale), campaign.records)[0].name
    obstacle = campaign.workspace.folder(name) / "meaning.json"
    obstacle.mkdir(parents=True)
    events: list[dict[str, Any]] = []
    assert work(campaign.worker_config("epoching", only=(name,), retries=2), events.append) == 1
    assert [event["event"] for event in events] == ["started", "failed"] * 3
