"""Time of a training step with each arm of the recipe `regularizers`, over that of a plain step.

    python benchmarks/regularizers.py       w32 on one CPU thread (minutes), into regularizers.csv

Each arm trains a short run of the scale `regularizers`, its knob in the middle of its values; the time is the training loop's,
without evaluations. Arms alternate, and ratios are to the plain run of the same round, so that load on the machine cancels.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measure import HERE, append, environment

from epochal.data.prepare import prepare
from epochal.records import Records, Workspace
from epochal.run import Run
from epochal.scale import Point, load_scale
from epochal.study import Study
from epochal.training.loop import train
from recipes.regularizers import PLAIN, ROWS, Row

TOKENS, EPOCHS = 8192, 16


def short_run(study: Study, model: str, row: Row) -> Run:
    """Return a short run of an arm, evaluated once."""
    middle = tuple((name, values[len(values) // 2]) for name, values in row.arm.grids.items())
    return replace(study.run(row.arm, model, TOKENS, Point(lr=0.01, epochs=EPOCHS, wd=1.6, more=middle)), num_evals=1)


def step_milliseconds(run: Run, data: Path) -> float:
    """Train a run in a folder of its own and return the time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace("times", Path(folder, "results"), Path(folder, "work"))
        space.work.mkdir()
        (space.work / "data").symlink_to(data.resolve())
        record = train(run, space)
    assert record is not None
    return 1e3 * run.batch_size * run.sequence_length / float(record.provenance["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="w32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work"), help="where the token store is, or will be built")
    parser.add_argument("--csv", type=Path, default=HERE / "regularizers.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale = load_scale("regularizers")
    prepare(scale.data, options.work / "data")
    study = Study(Records(Workspace(scale.name, Path("results"), options.work)), scale)
    runs = {row.arm.label: short_run(study, options.model, row) for row in ROWS}
    step_milliseconds(runs[PLAIN], options.work / "data")  # what is done once in a process
    rounds = [
        {label: step_milliseconds(run, options.work / "data") for label, run in runs.items()}
        for _ in range(options.rounds)
    ]
    for label, run in runs.items():
        times, ratios = [one[label] for one in rounds], [one[label] / one[PLAIN] for one in rounds]
        measured = {"milliseconds": f"{min(times):.4g}", "against_plain": f"{statistics.median(ratios):.3f}"}
        spread = {"lowest": f"{min(ratios):.3f}", "highest": f"{max(ratios):.3f}"}
        keys = {"model": options.model, "arm": label, "passes": run.passes, "rounds": options.rounds}
        append(options.csv, {**keys, **measured, **spread, **environment("cpu")})


if __name__ == "__main__":
    main()
