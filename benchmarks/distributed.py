"""Bytes sent and time of an optimizer step under each profile, on 1 to 4 gloo processes, beside AdamW.

    python benchmarks/distributed.py [--depth 8] [--rounds 10]       writes benchmarks/distributed.csv

Processes of one machine share its cores, so times say what the exchange costs beside the mathematics, not how a cluster
scales; compare them within one number of processes. `sent` counts what the matrices' exchange sends from the busiest
process, not what gradients and weights take (see `epochal.sharded_cost`). One model serves all, and the profiles take turns.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests" / "distributed"), str(HERE.parent / "tests"), str(HERE)]

PROFILES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
KINDS = ("adamw", "fira", "adamw-spectra", "muon")
WIDTH = 128


def timed(profile: str, kind: str, depth: int, rounds: int) -> dict[str, Any]:
    """Run in every process: median seconds of a step (backward excluded) and bytes sent in one."""
    import toy

    toy.WIDTH = WIDTH
    processes = toy.start(profile)
    processes.prepare(toy.Objective(depth), toy.MakeOptimizer(kind))
    seconds, step = [], processes.step

    def clocked() -> Any:
        processes.wait()
        begin = time.perf_counter()
        norm = step()
        seconds.append(time.perf_counter() - begin)
        return norm

    processes.step = clocked  # type: ignore[method-assign]
    toy.take_step(processes, 0)
    processes.optimizer.bytes_sent = 0
    for number in range(1, rounds + 1):
        toy.take_step(processes, number)
    matrices = sum(entry.shape.numel() for entry in processes.optimizer.matrices)
    sent = processes.optimizer.bytes_sent // rounds
    return {"seconds": statistics.median(seconds[1:]), "sent": sent, "elements": matrices}


def main() -> None:
    from measure import environment
    from ranks import group

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 3, 4])
    options = parser.parse_args()
    rows = []
    for world in options.processes:
        with group(world) as processes:
            for profile in PROFILES:
                base = None
                for kind in KINDS:
                    results = processes.run("distributed:timed", profile, kind, options.depth, options.rounds)
                    seconds = max(result["seconds"] for result in results)
                    base = base or seconds
                    row = {"processes": world, "profile": profile, "optimizer": kind, "step_ms": f"{1e3 * seconds:.2f}"}
                    row |= {"ratio_to_adamw": f"{seconds / base:.2f}", "matrix_elements": results[0]["elements"]}
                    row |= {"sent_bytes": max(result["sent"] for result in results)}
                    rows.append(row)
                    print(*row.values(), sep="\t", flush=True)
    facts = environment("cpu")
    with (HERE / "distributed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    main()
