"""Stopping on purpose: SIGINT, SIGTERM, SIGUSR1, a time limit, a note, or a parent that is gone.

Long loops call `check_stop()` between steps; it raises `Stopped` once a stop was asked for, and what was running saves
itself and ends with exit code 75 ("run again to continue").
"""

import os
import signal
import time
from pathlib import Path

EXIT_STOPPED = 75


class Stopped(Exception):  # noqa: N818  # it is no error
    """Raised between two steps when a stop was asked for; the message says why."""


_reason: str | None = None
_deadline = float("inf")
_parent: int | None = None
_note: Path | None = None


def listen(*, deadline: float = float("inf"), parent: int | None = None, note: Path | None = None) -> None:
    """Install the handlers in this process. `deadline` is in `time.monotonic()` seconds, `note` a file that asks too."""
    global _reason, _deadline, _parent, _note
    _reason, _deadline, _parent, _note = None, deadline, parent, note
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: object) -> None:
    global _reason
    _reason = signal.Signals(number).name


def stop_reason() -> str | None:
    """Return why this process should stop, or None."""
    if _reason is None and time.monotonic() > _deadline:
        return "time limit"
    if _reason is None and _parent is not None and os.getppid() != _parent:
        return "parent process is gone"
    if _reason is None and _note is not None and _note.exists():
        return "the worker asks"
    return _reason


def check_stop() -> None:
    """Raise Stopped if a stop was asked for."""
    reason = stop_reason()
    if reason is not None:
        raise Stopped(reason)
