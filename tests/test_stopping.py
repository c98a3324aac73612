"""Requests to stop: each reason alone, and none left over from before."""

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


def test_a_launched_run_gets_a_stop_file_and_is_terminated_if_it_takes_too_long(tmp_path: Path) -> None:
    class Process:
        """A process that takes `needs` seconds to save."""

        def __init__(self, needs: float) -> None:
            self.needs, self.calls = needs, list[object]()

        def wait(self, seconds: float = 1e9) -> None:
            self.calls.append(seconds)
            if self.needs > seconds:
                raise subprocess.TimeoutExpired("run", seconds)

        def terminate(self) -> None:
            self.calls.append("terminate")

    for needs, calls in ((5.0, [8.0]), (20.0, [8.0, "terminate", 1e9])):
        stop_file = tmp_path / f"stop-{needs}"
        process = Process(needs)
        worker._stop_launched(process, stop_file, 10.0)  # type: ignore[arg-type]
        listen(stop_file=stop_file)
        assert stopping.stop_reason() is not None and process.calls == calls
