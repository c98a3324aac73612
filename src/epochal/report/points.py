"""Losses as points over model size, data and members, from a CSV or from records.

The CSV has one row for each measurement. The columns `recipe` (a name) and `loss` (nats per token) are required;
`N_params`, `D_tokens` and `K` (parameters, distinct training tokens, members) are optional. Their cells may be written
150M or 2.7B, be empty, `inf` for a limit, or `best` for the best over sizes. Rows that are equal in all columns but `loss`
are seeds of one setting. Other columns are ignored.
"""

import csv
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.records import Record, Records
from epochal.run import Ensemble, Run, inputs

COLUMNS = {"N_params": "N", "D_tokens": "D", "K": "K"}
SERIES = ("single", "ensembles")  # the recipes of a campaign called NAME are "NAME, single" and "NAME, ensembles"
SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class LossPoint:
    """One loss of one recipe in nats per token; N, D and K are None where unknown, inf for a limit."""

    recipe: str
    loss: float
    N: float | None = None
    D: float | None = None
    K: float | None = None


def read_points(path: Path) -> tuple[list[LossPoint], tuple[str, ...]]:
    """Read a CSV of points; returns them with one sentence for each row that cannot be used.

    Raises ValueError for a file that cannot be read as CSV, lacks a required column, or has no usable row.
    """
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front of the first column name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            missing = [name for name in ("recipe", "loss") if name not in (table.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} has no column {' and no '.join(missing)}; its first line must name recipe, loss and any of "
                    f"{', '.join(COLUMNS)}."
                )
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}); give a table with commas in UTF-8.") from None
    points, problems = [], []
    # Line 1 has the names.
    for number, row in enumerate(rows, start=2):
        try:
            points.append(_point(row))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not points:
        raise ValueError(f"{path} has no row with a loss; give at least one.")
    return points, tuple(problems)


def _point(row: Mapping[str, Any]) -> LossPoint:
    if None in row or any(value is None for value in row.values()):  # how csv marks surplus and missing cells
        raise ValueError("the number of cells differs from that of the first line")
    loss = _number(row, "loss")
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"loss must be a finite number, got {row['loss']!r}")
    if not row["recipe"].strip():
        raise ValueError("recipe is empty")
    places = {field: _number(row, name) for name, field in COLUMNS.items() if name in row}
    return LossPoint(row["recipe"].strip(), loss, **places)


def _number(row: Mapping[str, str], name: str) -> float | None:
    text = row[name].strip()
    if text in ("", "best"):
        return None
    unit = SUFFIXES.get(text[-1], 1.0) if name in COLUMNS else 1.0
    try:
        value = float(text if unit == 1.0 else text[:-1]) * unit
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {text!r}")
    return value


def campaign_points(records: Records, name: str) -> list[LossPoint]:
    """Return the best points of a campaign, single models and ensembles.

    For each model size and data budget these are all seeds of the best single setting, and the curve over K of the best
    ensemble. Runs that read another job (students, continued training) are left out, because they had more than their text.
    """
    single, ensembles = (f"{name}, {series}" for series in SERIES)
    return [*_single_points(records, single), *_ensemble_points(records, ensembles)]


def _single_points(records: Records, recipe: str) -> list[LossPoint]:
    best: dict[tuple[float, int], list[float]] = {}
    for setting in records.settings:
        run, size = setting[0].job, setting[0].results.get("parameters")
        losses = [record.loss for record in setting]
        if isinstance(run, Run) and not inputs(run) and size and all(map(math.isfinite, losses)):
            place = (float(size), run.unique_tokens)
            # All seeds of the best setting, not the best seed, whose loss is too low by selection.
            best[place] = min(best.get(place, [math.inf]), losses, key=statistics.fmean)
    return [LossPoint(recipe, loss, N, D, 1) for (N, D), losses in best.items() for loss in losses]


def _ensemble_points(records: Records, recipe: str) -> list[LossPoint]:
    best: dict[tuple[float, int], Record] = {}
    for record in records:
        place = _ensemble_place(records, record)
        if place is not None and (place not in best or record.loss < best[place].loss):
            best[place] = record
    return [
        LossPoint(recipe, statistics.fmean(losses), N, D, int(k))
        for (N, D), record in best.items()
        for k, losses in record.results["curve"].items()
    ]


def _ensemble_place(records: Records, record: Record) -> tuple[float, int] | None:
    """Return the size and budget of an ensemble's members; None for other jobs and ensembles without a curve."""
    if not isinstance(record.job, Ensemble) or not record.results.get("curve"):
        return None
    member = records.named(record.job.runs[0])
    if member is None or not isinstance(member.job, Run):
        return None
    size = member.results.get("parameters")
    return (float(size), member.job.unique_tokens) if size else None
