"""How long do `epochal plan` and `epochal report` take on a campaign of many records?

Writes made-up records of the micro scale into a temporary folder: a whole campaign as it would end, then a cloud of other
settings and seeds. Times fresh processes (processor seconds, start of Python included). Goals: 10,000 records planned in
2 s and reported in 20 s, 1,000 planned in 1 s. Run: `python benchmarks/records.py` (about two minutes).
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import append, environment

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]

from made_up import made_up_record, simulate  # noqa: E402

from epochal.records import Records, Workspace, write_record  # noqa: E402
from epochal.run import Run  # noqa: E402
from epochal.scale import (  # noqa: E402
    Point,
    Scale,
    load_scale,
)

CHAIN = ("epoching", "heavy_weight_decay", "ensembling")


def cloud(scale: Scale) -> Iterator[Run]:
    """Every size, budget, seed and grid point there is."""
    axes = (range(99), scale.unique_tokens, scale.ladder, scale.grid.lr, scale.grid.epochs, scale.grid.wd)
    for seed, tokens, rung, lr, epochs, wd in itertools.product(*axes):
        yield scale.run(rung.model, tokens, Point(lr=lr, epochs=epochs, wd=wd), seed=seed)


def processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "epochal.cli", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    scale = load_scale("micro")
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace("micro", Path(folder) / "results", Path(folder) / "work")
        campaign = simulate(scale, *CHAIN)
        campaign.write(space)
        runs = (run for run in cloud(scale) if campaign.records.named(run.name) is None)
        where = ("--scale", "micro", "--results", str(space.results), "--work", str(space.work))
        for count in options.records:
            for run in itertools.islice(runs, count - len(list(space.records.iterdir()))):
                write_record(space, made_up_record(run, Records(space)))
            row = {"records": count, "plan_seconds": round(min(processor_seconds("plan", *where) for _ in range(3)), 2)}
            row["report_seconds"] = round(processor_seconds("report", *where), 2)
            append(options.out, row | environment("cpu"))


if __name__ == "__main__":
    main()
