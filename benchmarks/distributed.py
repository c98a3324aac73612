"""Bytes sent and time of an optimizer step under each preset, on 1 to 4 gloo processes, relative to AdamW.

    python benchmarks/distributed.py [--depth 8] [--rounds 8] [--turns 3]       writes benchmarks/distributed.csv

All processes share the cores of one machine, so times show the cost of the exchange relative to the update, not how a
cluster scales; compare them within one number of processes. Optimizers alternate and the fastest step counts, since other
programs may use the machine. `sent` counts the bytes that the exchange of matrices sends from the busiest process, without
those of gradients and weights.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
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
    """Run in every process: seconds of the fastest step (without backward), and bytes sent in one."""
    import toy

    toy.WIDTH = WIDTH
    processes = toy.start(profile)
    processes.prepare(toy.ModelWithLoss(depth), toy.MakeOptimizer(kind))
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
    return {"seconds": min(seconds[1:]), "sent": sent, "elements": matrices}


def main() -> None:
    from measure import environment
    from ranks import group

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 3, 4])
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"  # for the started processes: torch warns that it renames its collectives
    rows = []
    for world in options.processes:
        with group(world) as processes:
            for profile in PROFILES:
                best, results = dict.fromkeys(KINDS, float("inf")), dict[str, Any]()
                for kind in KINDS * options.turns:
                    results[kind] = processes.run("distributed:timed", profile, kind, options.depth, options.rounds)
                    best[kind] = min(best[kind], max(result["seconds"] for result in results[kind]))
                for kind in KINDS:
                    row = {
                        "processes": world,
                        "profile": profile,
                        "optimizer": kind,
                        "step_ms": f"{1e3 * best[kind]:.2f}",
                    }
                    row |= {"ratio_to_adamw": f"{best[kind] / best[KINDS[0]]:.2f}"}
                    row |= {"matrix_elements": results[kind][0]["elements"]}
                    row |= {"sent_bytes": max(result["sent"] for result in results[kind])}
                    rows.append(row)
                    print(*row.values(), sep="\t", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("accelerate", "deepspeed")}
    facts = {**environment("cpu"), **versions, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    with (HERE / "distributed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    main()
