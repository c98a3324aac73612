"""Requests to stop: SIGINT, SIGTERM, SIGHUP, SIGUSR1, a time limit, a stop file, or a parent that has exited.

Long loops call `check_stop()` between steps; it raises `Stopped` once a stop was requested. The program then saves and exits
with code 75 ("run again to continue").
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

EXIT_STOPPED = 75

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# A file in a run's folder with the seconds that its last checkpoint took: the time to wait for one after a request.
SAVE_SECONDS = "save_seconds"


class Stopped(Exception):  # noqa: N818  # not an error
    """Raised between two steps when a stop was requested; the message is the reason."""


_reason: str | None = None
_deadline = float("inf")
_parent: int | None = None
_stop_file: Path | None = None
_raises = False


def listen(
    *, deadline: float = float("inf"), parent: int | None = None, stop_file: Path | None = None, forget: bool = True
) -> None:
    """Install the signal handlers; `forget` earlier requests.

    deadline: in `time.monotonic()` seconds. parent: stop when this process id is no longer the parent. stop_file: stop when
    it exists.
    """
    # Module state, because a signal handler is global to the process too.
    global _reason, _deadline, _parent, _stop_file
    _reason = None if forget else _reason
    _deadline, _parent, _stop_file = deadline, parent, stop_file
    for number in SIGNALS:
        # nohup ignores SIGHUP, so that a campaign outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: object) -> None:
    global _reason
    # Otherwise only noted: a handler may run in the middle of a step or of a write.
    _reason = signal.Signals(number).name
    if _raises:
        raise Stopped(_reason)


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """Raise Stopped where a signal arrives in this block, which leaves nothing to save: imports take seconds."""
    global _raises
    check_stop()
    _raises = True
    try:
        yield
    finally:
        _raises = False
    check_stop()  # a library may have caught it


def stop_reason() -> str | None:
    """Return why this process should stop, or None."""
    if _reason is None and time.monotonic() > _deadline:
        return "time limit"
    if _reason is None and _parent is not None and os.getppid() != _parent:
        return "parent process has exited"
    if _reason is None and _stop_file is not None and _stop_file.exists():
        return "stop requested by the worker"
    return _reason


def check_stop() -> None:
    """Raise Stopped if a stop was requested."""
    reason = stop_reason()
    if reason is not None:
        raise Stopped(reason)
