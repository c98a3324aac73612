"""`accelerate launch` that forwards signals to its processes and keeps their exit codes.

    python -m epochal.distributed.launcher --config_file configs/accelerate/ddp8.yaml -m epochal.cli train run.json

On SIGTERM, SIGINT, SIGHUP or SIGUSR1 (which Slurm sends before a time limit) each process saves at a step boundary and
exits with 75, and so does the launcher; also when the process that started the launcher ends. If a process dies, torch ends
the others, and the launcher says which one it was.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epochal.stopping import EXIT_STOPPED, SIGNALS

# Names the file for the error of a run; set by the worker.
ERROR_FILE_VARIABLE = "EPOCHAL_ERROR_FILE"

# Holds the id of the process that started this one: the worker for a launcher, the launcher for a rank. A process that
# looked at its parent only after its imports could miss that it has lost it.
PARENT_VARIABLE = "EPOCHAL_PARENT"

WATCH_SECONDS = 0.5


def main() -> None:
    """Run `accelerate launch` with the arguments of this process; exits with 0, 1, 2 or 75."""
    # torch's own handler of SIGTERM would kill the processes after 30 seconds, too early for a large checkpoint.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGQUIT")
    watch()
    # After the handlers: importing takes seconds.
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch()
    except ChildFailedError as error:
        _name_killed_rank(error.failures)
        # accelerate would exit with 1 whatever the processes' codes.
        sys.exit(exit_code([failure.exitcode for failure in error.failures.values()]))


def watch() -> None:
    """Forward signals to the ranks, and stop them when the worker ends; the ranks then watch this process."""
    for number in SIGNALS:
        signal.signal(number, _forward)
    # A killed worker sends no signal, and its ranks would train on without it.
    threading.Thread(target=_watch_parent, args=(parent_of(os.environ),), daemon=True).start()
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def parent_of(environment: Mapping[str, str]) -> int:
    """Return the id of the process that started this one.

    Across nodes, where srun stands between, it is that of the parent.
    """
    return int(environment.get(PARENT_VARIABLE) or os.getppid())


def exit_code(codes: list[int]) -> int:
    """Return the exit code of a launch: 75 or 2 if all processes agree on it, else 1."""
    for code in (EXIT_STOPPED, 2):
        # torch kills the others as soon as one has exited; their codes are negative.
        if code in codes and all(other == code or other < 0 for other in codes):
            return code
    return 1


def _name_killed_rank(failures: Mapping[int, Any]) -> None:
    """Write which rank was killed into the error file, before what the others said."""
    # torch ends the others by SIGTERM.
    killed = [(rank, -f.exitcode) for rank, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not killed or path is None:
        return
    others = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    named = ", ".join(f"rank {rank} was killed by {signal.Signals(number).name}" for rank, number in killed)
    Path(path).write_text(f"{named}" + (f"; the others ended with: {others}" if others else ""), encoding="utf-8")


def _watch_parent(parent: int) -> None:
    """Ask the processes to stop, repeatedly, when the launcher has lost its parent."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    # More than once: a rank may not have started yet. The thread ends with the launcher.
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(WATCH_SECONDS)


def _forward(number: int, frame: object) -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    if not children:
        sys.exit(EXIT_STOPPED)  # before the ranks have started, or after they have ended
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


if __name__ == "__main__":
    main()
