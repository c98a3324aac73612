"""`accelerate launch` with the exit codes of the command line, and signals that reach the processes it starts.

    python -m epochal.distributed.launcher --config_file configs/accelerate/ddp8.yaml -m epochal.cli train run.json

accelerate turns every end of a process but 0 into 1, and torch kills what has not saved itself 30 seconds after SIGTERM.
Here SIGTERM, SIGINT and SIGUSR1 (what Slurm is asked to send before a time limit) only travel on: each process saves
at a step boundary and leaves with 75, and so does the launcher. A process that dies still ends the others at once.
"""

import os
import signal
import sys

from epochal.stopping import EXIT_STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main() -> None:
    """Run `accelerate launch` with the arguments of this process; exits with 0, 1, 2 or 75."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
    try:
        launch()
    except ChildFailedError as error:
        sys.exit(exit_code([failure.exitcode for failure in error.failures.values()]))


def exit_code(codes: list[int]) -> int:
    """Return the exit code of a launch: 75 or 2 if that is what its processes say, else 1."""
    for code in (EXIT_STOPPED, 2):
        # The first to leave makes torch end the others, which then count as killed.
        if code in codes and all(other == code or other < 0 for other in codes):
            return code
    return 1


def _pass_on(number: int, frame: object) -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.send_signal(number)


if __name__ == "__main__":
    main()
