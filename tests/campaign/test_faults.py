"""What goes wrong with disks, files and clocks: it is said, and the campaign goes on to the same results."""

import datetime
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign, make_campaign

from epochal.campaign.plan import campaign_jobs
from epochal.campaign.worker import SILENT_ENDS, Orders, work
from epochal.records import needed


def orders_for(campaign: Campaign, recipe: str = "ensembling", **changes: Any) -> Orders:
    space = campaign.workspace
    return Orders(
        session=changes.pop("session", "first"), scale=str(campaign.scale_path), recipes=(recipe,),
        results=str(space.results), work=str(space.work), threads=1, **changes,
    )  # fmt: skip


def results_of(campaign: Campaign) -> dict[str, Any]:
    return {record.job.name: (record.fingerprint, record.status, record.results) for record in campaign.records}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> dict[str, Any]:
    campaign = make_campaign(tmp_path_factory.mktemp("undisturbed"), prepared)
    assert work(orders_for(campaign), lambda event: None) == 0
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
    """Every job that cannot save is named; nothing is left half-written; with room again the rest is done."""
    checkpoints = campaign.workspace.work / "tiny-scale"
    checkpoints.symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 150_000))  # a model of 50 kB and its optimizer state do not fit twice
    said: list[dict[str, Any]] = []
    try:
        code = work(orders_for(campaign, checkpoint_seconds=0.0), said.append)
        assert code == 1
        failures = [event["message"] for event in said if event["event"] == "failed"]
        assert failures and all("No space left" in message or "os error 28" in message for message in failures)
    except OSError as error:  # so full that not even the failure could be written: a worker says so and ends
        assert "No space left" in str(error)
    assert campaign.records.problems == ()
    assert not list(small_disk.glob("*/checkpoints/.*")), "a half-written checkpoint was left"

    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert work(orders_for(campaign, session="second"), said.append) == 0
    assert results_of(campaign) == undisturbed


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_weights_are_found_before_anybody_reads_them_and_made_again(
    campaign: Campaign, undisturbed: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    assert work(orders_for(campaign), lambda event: None) == 0
    ensemble = next(name for name in undisturbed if name.endswith("-logits"))
    member = next(record.job for record in campaign.records if record.job.name == ensemble).runs[0]  # type: ignore[union-attr]
    (campaign.workspace.records / f"{ensemble}.json").unlink()
    weights = campaign.workspace.folder(member) / "model" / "model.safetensors"
    before = weights.read_bytes()
    damage(weights)

    said: list[dict[str, Any]] = []
    assert work(orders_for(campaign, session="second"), said.append) == 0
    notes = [event["message"] for event in said if event["event"] == "note"]
    assert len(notes) == 1 and member in notes[0] and "made again" in notes[0]
    assert [event["name"] for event in said if event["event"] == "done"] == [member, ensemble]
    assert weights.read_bytes() == before
    assert results_of(campaign) == undisturbed


def test_a_cut_or_flipped_token_store_is_refused_by_name(campaign: Campaign) -> None:
    for damage in (flip, cut):
        path = campaign.workspace.data / "tiny" / "train.bin"
        whole = path.read_bytes()
        damage(path)
        said: list[dict[str, Any]] = []
        assert work(orders_for(campaign, "epoching", session=damage.__name__), said.append) == 1
        assert "train.bin" in said[-1]["message"] and "damaged" in said[-1]["message"]
        path.write_bytes(whole)


def test_a_clock_that_jumps_changes_nothing(
    campaign: Campaign, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time of day goes back a year at every look; file times too. Only the date in the provenance shows it."""
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

    assert work(orders_for(campaign, checkpoint_seconds=0.01), backwards) == 0
    assert results_of(campaign) == undisturbed


class Killed(BaseException):
    """What a killed process does: nothing more."""


def test_a_job_that_kills_its_worker_is_given_up_after_some_tries(campaign: Campaign) -> None:
    """A start that ends in no good order leaves its note; three of those without a new checkpoint are enough."""
    name = needed(campaign_jobs(["epoching"], campaign.records, campaign.scale), campaign.records)[0].name
    said: list[dict[str, Any]] = []

    def say(event: dict[str, Any]) -> None:
        said.append(event)
        if event["event"] == "started":
            raise Killed

    orders = orders_for(campaign, "epoching", only=(name,))
    for _ in range(SILENT_ENDS):
        with pytest.raises(Killed):
            work(orders, say)
    assert work(orders, say) == 1
    assert said[-1]["event"] == "failed" and "without a word" in said[-1]["message"]
    assert work(orders_for(campaign, "epoching", only=(name,), session="second"), lambda event: None) == 0
    assert campaign.records.named(name) is not None


def test_a_failed_job_is_tried_again_as_often_as_ordered(campaign: Campaign) -> None:
    name = needed(campaign_jobs(["epoching"], campaign.records, campaign.scale), campaign.records)[0].name
    obstacle = campaign.workspace.folder(name) / "metrics.jsonl"
    obstacle.mkdir(parents=True)
    said: list[dict[str, Any]] = []
    assert work(orders_for(campaign, "epoching", only=(name,), retries=2), said.append) == 1
    assert [event["event"] for event in said] == ["started", "failed"] * 3
