"""`accelerate launch` that forwards signals to its processes and keeps their exit codes.

    python -m epochal.distributed.launcher --config_file configs/accelerate/ddp8.yaml -m epochal.cli train run.json

On SIGTERM, SIGINT or SIGUSR1 (which Slurm sends before a time limit) each process saves at a step boundary and exits with
75, and so does the launcher. If a process dies, torch still ends the others.
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

    # torch's own handler of SIGTERM would kill the processes after 30 seconds, too early for a large checkpoint.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    for number in STOP_SIGNALS:
        signal.signal(number, _forward)
    try:
        launch()
    except ChildFailedError as error:
        # accelerate would exit with 1 whatever the processes' codes.
        sys.exit(exit_code([failure.exitcode for failure in error.failures.values()]))


def exit_code(codes: list[int]) -> int:
    """Return the exit code of a launch: 75 or 2 if all processes agree on it, else 1."""
    for code in (EXIT_STOPPED, 2):
        # torch kills the others as soon as one has exited; their codes are negative.
        if code in codes and all(other == code or other < 0 for other in codes):
            return code
    return 1


def _forward(number: int, frame: object) -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.send_signal(number)


if __name__ == "__main__":
    main()
