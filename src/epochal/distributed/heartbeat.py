"""Notice a rank that no longer answers, and name it.

Collectives only time out, and do not say for which rank they waited. Here a thread of each rank counts up in the store of the
process group, and looks at the counts of the others.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from epochal.distributed.launcher import ERROR_FILE_VARIABLE


class Store(Protocol):
    """The methods of a torch.distributed store that are used."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Return the value of a key that is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""


class Heartbeat:
    """Counts of all ranks; `silent` names a rank whose count has not changed for `timeout` seconds."""

    def __init__(self, store: Store, rank: int, world: int, timeout: float) -> None:
        self.store, self.rank, self.timeout, self._count = store, rank, timeout, 0
        self._last = {other: ("", time.monotonic()) for other in range(world) if other != rank}
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Count up."""
        self._count += 1
        self.store.set(str(self.rank), str(self._count))

    def silent(self) -> int | None:
        """Return a rank that has not counted for `timeout` seconds, or None."""
        now = time.monotonic()
        for rank, (value, since) in self._last.items():
            count = self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else ""
            if count != value:
                self._last[rank] = (count, now)
            elif now - since > self.timeout:
                return rank
        return None

    def run(self, end: Callable[[str], None]) -> None:
        """Beat until stopped; call `end` with a sentence when a rank is silent."""
        # A store that is gone took its processes with it: the launcher's end is noticed elsewhere.
        with contextlib.suppress(RuntimeError):
            while not self._stopped.wait(min(5.0, self.timeout / 10)):
                self.beat()
                rank = self.silent()
                if rank is not None:
                    end(
                        f"rank {rank} has not answered for {self.timeout:.0f} s (stopped, hung, or its machine is gone)"
                    )
                    return

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()


_started = 0


def start_heartbeat(rank: int, world: int, timeout: float) -> Heartbeat:
    """Start the thread of this rank; all ranks must call this the same number of times."""
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    global _started
    _started += 1  # a process may train several runs
    heartbeat = Heartbeat(PrefixStore(f"heartbeat-{_started}", _get_default_store()), rank, world, timeout)
    threading.Thread(target=heartbeat.run, args=(end_process,), daemon=True).start()
    return heartbeat


def end_process(message: str) -> None:
    """Leave a sentence for the worker, unless another rank has, and end this process."""
    print(f"epochal: {message}", file=sys.stderr, flush=True)
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is not None:
        with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
            file.write(message)
    os._exit(1)  # the main thread is blocked in a collective
