"""Which mutated configs and records end in anything but one sentence?

Reads mutated scales, data configs, clusters, model files, presets and records in this process until the time is over, and
prints for each kind how many were refused and accepted, the slowest, and every fault with the seed that gives it again.
Run: `python benchmarks/fuzz.py --seconds 3600`.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]

from fuzzing import KINDS, judge  # noqa: E402

HANG_SECONDS = 5
MEMORY_BYTES = 3 * 2**30  # of this process; a file that needs more is a fault


class HangError(Exception):
    """A file took longer than HANG_SECONDS."""


def stop(*_: object) -> None:
    raise HangError(f"more than {HANG_SECONDS} s of processor time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    counts, slowest, faults = Counter[tuple[str, str]](), dict.fromkeys(options.kinds, 0.0), 0
    signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        for seed, kind in ((seed, kind) for seed in itertools.count(options.first) for kind in options.kinds):
            if time.monotonic() > end:
                break
            start = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
                outcome = "refused" if judge(kind, seed, Path(folder)) else "accepted"
            except Exception:
                outcome, faults = "fault", faults + 1
                print(f"{kind} {seed}:\n{traceback.format_exc()}", flush=True)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            counts[kind, outcome] += 1
            slowest[kind] = max(slowest[kind], time.process_time() - start)
    for kind in options.kinds:
        figures = ", ".join(f"{counts[kind, outcome]} {outcome}" for outcome in ("refused", "accepted", "fault"))
        print(f"{kind}: {figures}; slowest {slowest[kind]:.2f} s")
    print(f"{counts.total()} mutations, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
