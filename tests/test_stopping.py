"""Requests to stop: each reason alone, and none left over from before."""

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from campaigns import Campaign

from epochal import stopping
from epochal.campaign import worker
from epochal.stopping import EXIT_STOPPED, SIGNALS, Stopped, check_stop, listen, nothing_to_save, stop_reason


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Restore the handlers of this process, and forget the reason."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_requests_a_stop_until_listen_is_called_again(number: signal.Signals) -> None:
    listen()
    assert stop_reason() is None
    check_stop()
    os.kill(os.getpid(), number)
    assert stop_reason() == number.name
    with pytest.raises(Stopped, match=number.name):
        check_stop()
    listen()
    assert stop_reason() is None


def test_a_deadline_a_stop_file_and_an_exited_parent_request_a_stop(tmp_path: Path) -> None:
    listen(deadline=time.monotonic() - 0.001)
    assert stop_reason() == "time limit"
    listen(deadline=time.monotonic() + 1000, parent=os.getppid(), stop_file=tmp_path / "stop")
    assert stop_reason() is None
    (tmp_path / "stop").touch()
    assert stop_reason() == "stop requested by the worker"
    listen(parent=os.getpid())  # no process is its own parent
    assert stop_reason() == "parent process has exited"


def test_a_worker_without_its_parent_takes_no_job(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    config = campaign.worker_config("epoching", parent=os.getpid())
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(config))))
    monkeypatch.setattr(worker, "_events", lambda: pytest.fail)
    monkeypatch.setattr(worker, "_prepare_process", lambda config: None)
    assert worker.main() == EXIT_STOPPED == 75
    assert not campaign.workspace.records.exists()


class Process:
    """A process that takes `needs` seconds to save, on a clock that it moves itself."""

    pid = 2**22 + 1  # above the largest process id

    def __init__(self, needs: float, monkeypatch: pytest.MonkeyPatch, writes: Path | None = None) -> None:
        self.now, self.needs, self.ended_by = 0.0, needs, ""
        self.writes = writes
        monkeypatch.setattr(worker.time, "monotonic", lambda: self.now)

    def wait(self, seconds: float = 1e9) -> None:
        self.now += min(seconds, max(0.0, self.needs - self.now))
        if self.writes is not None:
            with self.writes.open("a") as file:
                file.write("x")
        if self.needs > self.now and not self.ended_by:
            raise subprocess.TimeoutExpired("run", seconds)
        self.ended_by = self.ended_by or "itself"

    def terminate(self) -> None:
        self.ended_by = f"the worker after {self.now:.0f} s"


@pytest.mark.parametrize(
    ("needs", "last_save", "writing", "ended_by"),
    [
        (5.0, None, False, "itself"),
        (20.0, None, False, "the worker after 8 s"),
        (20.0, 9.0, False, "itself"),
        (40.0, 9.0, False, "the worker after 27 s"),
        (40.0, None, True, "itself"),
        (20.0, "damaged", False, "the worker after 8 s"),
    ],
)
def test_a_launched_run_gets_a_stop_file_and_as_long_as_its_last_save_took(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    needs: float,
    last_save: float | str | None,
    writing: bool,
    ended_by: str,
) -> None:
    """Eight seconds, three times the last save, or as long as the files of a checkpoint grow."""
    if last_save is not None:
        (tmp_path / "save_seconds").write_text(str(last_save))
    growing = tmp_path / "checkpoints" / ".step-00000003.tmp" / "model.safetensors"
    growing.parent.mkdir(parents=True)
    process = Process(needs, monkeypatch, growing if writing else None)
    worker._stop_launched(process, tmp_path, 10.0)  # type: ignore[arg-type]
    monkeypatch.undo()
    listen(stop_file=tmp_path / worker.STOP_NOTE)
    assert stopping.stop_reason() is not None and process.ended_by == ended_by


def test_a_request_before_the_campaign_starts_is_kept_and_nohup_is_respected() -> None:
    listen()
    os.kill(os.getpid(), signal.SIGHUP)
    listen(forget=False)
    assert stop_reason() == "SIGHUP"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop_reason() is None, "a campaign under nohup outlives its terminal"


def test_a_signal_ends_what_leaves_nothing_to_save_where_it_is() -> None:
    """An import of seconds would go past a time limit."""
    listen()
    with pytest.raises(Stopped, match="SIGTERM"), nothing_to_save():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was only noted")
    listen()
    with pytest.raises(Stopped, match="SIGTERM"), nothing_to_save(), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)  # inside of a library that catches everything
    listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_reason() == "SIGTERM", "in a step it is only noted"
