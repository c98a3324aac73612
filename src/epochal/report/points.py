"""Losses as points over model size, data and members, from a CSV or from records.

The CSV has one row for each measurement, with commas, semicolons or tabs between cells. The columns `recipe` (a name) and
`loss` (nats per token) are required; `N_params`, `D_tokens`, `K` and `T_tokens` (parameters, distinct training tokens,
members, tokens seen in all passes) are optional; NAMES lists other names that are understood. Their cells may be written
150M, 2.7b or 1e8, be empty, `inf` for a limit, or `best` for the best over sizes. Rows that are equal in all columns but
`loss` are seeds of one setting. Other columns are ignored.
"""

import csv
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.records import Record, Records
from epochal.run import Ensemble, Run, inputs

COLUMNS = ("N_params", "D_tokens", "K", "T_tokens")
# Names of columns in lower case, without blanks, dashes and underscores.
NAMES = {
    "recipe": ("recipe", "name", "method", "arm"),
    "loss": ("loss", "valloss", "validationloss", "evalloss", "testloss"),
    "N": ("n", "nparams", "params", "parameters", "numparams", "modelsize", "size"),
    "D": ("d", "dtokens", "uniquetokens", "distincttokens", "unique", "tokens", "datasize"),
    "K": ("k", "members", "ensemblesize"),
    "T": ("t", "ttokens", "tokensseen", "totaltokens", "traintokens"),
}
OTHER_UNITS = ("ppl", "perplexity", "accuracy", "bpb", "bitsperbyte")
SERIES = ("single", "ensembles")  # the recipes of a campaign called NAME are "NAME, single" and "NAME, ensembles"
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
HIGHEST_LOSS = math.log(1e6)  # of a model that has learned nothing, with a vocabulary of a million
WIDEST = 1e5  # factor between the sizes of one column


@dataclass(frozen=True)
class LossPoint:
    """One loss of one recipe in nats per token; N, D, K and T are None where unknown, inf for a limit."""

    recipe: str
    loss: float
    N: float | None = None
    D: float | None = None
    K: float | None = None
    T: float | None = None


def read_points(path: Path) -> tuple[list[LossPoint], tuple[str, ...]]:
    """Read a CSV of points; returns them with one sentence for each row that cannot be used.

    Raises ValueError for a file that cannot be read as CSV, lacks a required column, or has no usable row.
    """
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front of the first column name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            table = csv.DictReader(file, delimiter=separator)
            columns = _columns(path, table.fieldnames or ())
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}); give a table in UTF-8.") from None
    points, problems = [], []
    # Line 1 has the names.
    for number, row in enumerate(rows, start=2):
        try:
            points.append(_point(row, columns, decimal_comma=separator == ";"))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not points:
        raise ValueError(f"{path} has no row with a loss; give at least one ({'; '.join(problems[:3])}).")
    return points, tuple(problems)


def _columns(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Find the columns by field of LossPoint; raises ValueError without recipe or loss."""
    plain = {name: re.sub(r"[\s_-]", "", name).lower() for name in names if name}
    found: dict[str, str] = {}
    for field, known in NAMES.items():
        candidates = sorted((known.index(short), name) for name, short in plain.items() if short in known)
        if candidates:
            found[field] = candidates[0][1]
    # `tokens` next to a column of distinct tokens are the tokens seen.
    others = [name for name, short in plain.items() if short == "tokens" and name != found.get("D")]
    if others and "T" not in found:
        found["T"] = others[0]
    missing = [name for name in ("recipe", "loss") if name not in found]
    if missing:
        units = [name for name, short in plain.items() if short in OTHER_UNITS]
        unit = "".join(f" {u!r} is not a loss in nats: convert it, a perplexity by its logarithm." for u in units[:1])
        raise ValueError(
            f"{path} has no column {' and no '.join(missing)}; found: {', '.join(plain) or 'none'}. Its first line must "
            f"name recipe, loss and any of {', '.join(COLUMNS)}.{unit}"
        )
    return found


def _point(row: Mapping[str, Any], columns: Mapping[str, str], *, decimal_comma: bool) -> LossPoint:
    if None in row or any(value is None for value in row.values()):  # how csv marks surplus and missing cells
        raise ValueError("the number of cells differs from that of the first line")
    cells = {field: row[name].strip() for field, name in columns.items()}
    if decimal_comma:
        cells |= {field: cell.replace(",", ".") for field, cell in cells.items() if field != "recipe"}
    if cells["loss"].endswith("%"):
        raise ValueError(f"loss is a percentage, got {cells['loss']!r}; give nats per token")
    loss = _number(cells["loss"], columns["loss"])
    if loss is None or not math.isfinite(loss):
        raise ValueError(f"loss must be a finite number, got {cells['loss']!r}")
    if not cells["recipe"]:
        raise ValueError("recipe is empty")
    places = {field: _number(cells[field], columns[field], suffixes=True) for field in "NDKT" if field in cells}
    return LossPoint(cells["recipe"], loss, **places)


def _number(text: str, name: str, *, suffixes: bool = False) -> float | None:
    if text.lower() in ("", "best"):
        return None
    unit = SUFFIXES.get(text[-1].lower(), 1.0) if suffixes else 1.0
    try:
        value = float(text if unit == 1.0 else text[:-1]) * unit
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {text!r}")
    # Places are compared as numbers: 0.1M and 100000 are one place, whatever the last bit says.
    return float(f"{value:.12g}") if math.isfinite(value) else value


def question_points(points: Sequence[LossPoint]) -> list[str]:
    """Return one question for each unit that looks wrong: perplexities, percentages, mixed units."""
    questions = []
    losses = [point.loss for point in points]
    if max(losses) > HIGHEST_LOSS:
        high = sum(loss > HIGHEST_LOSS for loss in losses)
        questions.append(
            f"{high} of {len(losses)} losses are above {HIGHEST_LOSS:.1f} nats, up to {max(losses):g}: are they "
            "perplexities or percentages? Give the logarithm of a perplexity."
        )
    if max(losses) < 1:
        questions.append(
            f"All losses are below 1 (highest {max(losses):g}): are they accuracies or bits per byte? Nats per token are "
            "expected."
        )
    for field in "NDT":
        values = [value for point in points if (value := getattr(point, field)) is not None and math.isfinite(value)]
        if values and max(values) > WIDEST * min(values):
            questions.append(f"{field} runs from {min(values):g} to {max(values):g}: are two units mixed?")
    return questions


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
