"""Why a process stops: each reason alone, and none that is left over from before."""

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
from epochal.stopping import EXIT_STOPPED, Stopped, check_stop, listen, stop_reason

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Leave the handlers of this process as they were, and no reason behind."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_until_somebody_listens_anew(number: signal.Signals) -> None:
    listen()
    assert stop_reason() is None
    check_stop()
    os.kill(os.getpid(), number)
    assert stop_reason() == number.name
    with pytest.raises(Stopped, match=number.name):
        check_stop()
    listen()
    assert stop_reason() is None


def test_a_deadline_a_note_and_a_parent_that_is_gone_ask_too(tmp_path: Path) -> None:
    listen(deadline=time.monotonic() - 0.001)
    assert stop_reason() == "time limit"
    listen(deadline=time.monotonic() + 1000, parent=os.getppid(), note=tmp_path / "stop")
    assert stop_reason() is None
    (tmp_path / "stop").touch()
    assert stop_reason() == "the worker asks"
    listen(parent=os.getpid())  # no process is its own parent
    assert stop_reason() == "parent process is gone"


def test_a_worker_without_its_parent_takes_no_job(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    config = campaign.worker_config("epoching", parent=os.getpid())
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(config))))
    monkeypatch.setattr(worker, "_events", lambda: pytest.fail)
    monkeypatch.setattr(worker, "_prepare_process", lambda config: None)
    assert worker.main() == EXIT_STOPPED == 75
    assert not campaign.workspace.records.exists()


def test_a_launched_run_is_asked_by_a_note_and_ended_when_it_does_not_answer(tmp_path: Path) -> None:
    class Process:
        """One that takes `needs` seconds to save itself."""

        def __init__(self, needs: float) -> None:
            self.needs, self.asked = needs, list[object]()

        def wait(self, seconds: float = 1e9) -> None:
            self.asked.append(seconds)
            if self.needs > seconds:
                raise subprocess.TimeoutExpired("run", seconds)

        def terminate(self) -> None:
            self.asked.append("terminate")

    for needs, asked in ((5.0, [8.0]), (20.0, [8.0, "terminate", 1e9])):
        note = tmp_path / f"stop-{needs}"
        process = Process(needs)
        worker._stop_launched(process, note, 10.0)  # type: ignore[arg-type]
        listen(note=note)
        assert stopping.stop_reason() is not None and process.asked == asked
