"""Mutations of configs and records, and the judgement on each: accepted and meaningful, or refused in one sentence.

`tests/test_fuzz.py` tries some in each run of the tests, `benchmarks/fuzz.py` as many as you like.
"""

import copy
import json
import math
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from epochal.campaign.cluster import cluster_campaign, load_cluster
from epochal.campaign.plan import cost_estimate, flops_of, recipe_names
from epochal.campaign.worker import WorkerConfig
from epochal.config import REPOSITORY, load_toml, read_json
from epochal.data.prepare import DataConfig
from epochal.distributed.presets import check_deepspeed, read_launch_file
from epochal.models.config import parameter_counts
from epochal.records import Records, Workspace, load_records
from epochal.scale import load_scale
from launch import slurm

NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**63, 10**12, 10**30, 10**400, 0.0, -0.5, 0.5, 1.5, 1e-45, 1e300, math.inf, math.nan)
TEXTS = ("", "w16", "kjv", "inf", "1", "$$", "a,b|c", "../x", "/etc/passwd", "x\ny", "\x00", "\u202e", "x" * 5000, "-x")
OTHERS = (True, False, None, [], {}, [[]], [1, 1], [0.1, 0.01], ["a", 3], {"kind": "Muon"}, {"kind": 3})


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside nested tables and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def mutated(table: dict[str, Any], source: random.Random) -> dict[str, Any]:
    """Return a table with one or two values replaced, removed, repeated, scaled or put elsewhere."""
    table = copy.deepcopy(table)
    for _ in range(1 + (source.random() < 0.3)):
        path = source.choice([place for place in places(table) if place])
        holder = table
        for key in path[:-1]:
            holder = holder[key]
        value = holder[path[-1]]
        match source.randrange(9):
            case 0 if isinstance(holder, dict):
                del holder[path[-1]]
            case 1 if isinstance(holder, dict):
                holder[source.choice(["seeds", "kind", "lr", "x", "", "a.b", "x\ny"])] = value
            case 2 if isinstance(value, list):
                holder[path[-1]] = source.choice([value[::-1], value * 2, [*value, value], []])
            case 3 if isinstance(value, int | float) and not isinstance(value, bool):
                holder[path[-1]] = value * source.choice([-1, 1000, 10**6, 10**9, 0.5])
            case 4:
                holder[path[-1]] = deep(source.choice([3, 150, 1500]))
                return table
            case 5:
                holder[path[-1]] = source.choice(TEXTS)
            case 6:
                holder[path[-1]] = copy.deepcopy(source.choice(OTHERS))
            case _:
                holder[path[-1]] = source.choice(NUMBERS)
    return table


def damaged(text: str, source: random.Random) -> str:
    """Return text with a piece cut out, repeated, swapped or overwritten."""
    start = source.randrange(len(text))
    end = min(len(text), start + source.choice([1, 1, 3, 40]))
    piece = source.choice(["", text[start:end] * 2, "9", "-", "[", "{", '"', "e9", "\n", "\ufeff", "=", "[" * 2000])
    return text[:start] + piece + text[end:]


def to_toml(value: Any) -> str:
    """Write a value of TOML in one line; TOML has no null, so that becomes a text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        text, levels = "", 0
        while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value, levels = value[0], levels + 1
        text = "[" + ", ".join(to_toml(item) for item in value) + "]"
        return "[" * levels + text + "]" * levels
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value))


def toml_text(table: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(key)} = {to_toml(value)}\n" for key, value in table.items())


def json_text(table: Any) -> str:
    try:
        return json.dumps(table)
    except RecursionError:
        return '{"deep": ' + "[" * 5000 + "]" * 5000 + "}"


def finite(value: Any) -> bool:
    """Whether every number inside dataclasses, tables and lists is finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return all(finite(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


# --- the kinds of files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file: good ones, its suffix, how it is written, and a function that reads and uses one."""

    good: tuple[Path, ...]
    suffix: str
    write: Callable[[Any], str]
    read: Callable[[str], Any]
    use: Callable[[Path], Any]

    def text(self, source: random.Random) -> str:
        """Return the text of a mutated file."""
        text = source.choice(self.good).read_text(encoding="utf-8")
        return damaged(text, source) if source.random() < 0.3 else self.write(mutated(self.read(text), source))


def use_scale(path: Path) -> Any:
    """Read a scale, plan all its recipes without records, and price them."""
    scale = load_scale(str(path))
    names, nothing = recipe_names(scale), Records(Workspace(scale.name, path.parent / "none", path.parent / "none"))
    estimate = cost_estimate(names, nothing, scale)
    jobs = (*estimate.status.done, *estimate.status.ready)
    assert len(jobs) < 100_000
    # The tables of recipes are read by recipes; a number that no recipe reads may be anything.
    return [scale.base, scale.grid, scale.ladder, scale.hardware, jobs, [flops_of(job) for job in jobs], estimate.today]


def use_cluster(path: Path) -> Any:
    cluster = load_cluster(str(path))
    config = WorkerConfig(session="s", scale="demo", recipes=("epoching",), results="results", work="work", threads=1)
    campaign = cluster_campaign(config, cluster)
    slurm.planner_script(campaign)
    slurm.array_script(campaign, Path("b.json"), 2, nodes=cluster.nodes)
    return cluster


def use_model(path: Path) -> Any:
    counts = parameter_counts(path)
    assert counts.total > 0
    return counts, read_json(path)


def use_deepspeed(path: Path) -> Any:
    try:
        table = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from None
    check_deepspeed(table, str(path))
    return table


def use_record(path: Path) -> Any:
    """Read a folder of one record; a problem of the file is a refusal."""
    # As <folder>/results/x/records, which is where a campaign has them.
    found = load_records(Workspace("x", path.parents[2], path.parents[2] / "work"))
    if found.problems:
        assert len(found) == 0 and len(found.problems) == 1
        raise ValueError(found.problems[0])
    (record,) = found
    return record


def committed(pattern: str) -> tuple[Path, ...]:
    return tuple(sorted(REPOSITORY.glob(pattern)))


def records_of_each_kind() -> tuple[Path, ...]:
    """Return small committed records: Runs, Ensembles, Samples and Targets."""
    found = sorted((REPOSITORY / "recipes" / "results" / "micro" / "records").glob("*.json"))
    kinds = {"text-": 2, "targets-": 1, "-logits": 3, "-probs": 2, "-s0.json": 4}
    return tuple(path for part, count in kinds.items() for path in [p for p in found if part in p.name][:count])


KINDS = {
    "scale": Kind(
        committed("configs/scales/*demo.toml") + committed("configs/scales/micro-drawn-again.toml"),
        ".toml",
        toml_text,
        tomllib.loads,
        use_scale,
    ),
    "data": Kind(
        committed("configs/data/*.toml"),
        ".toml",
        toml_text,
        tomllib.loads,
        lambda path: load_toml(path, DataConfig),
    ),
    "cluster": Kind(committed("configs/cluster/*.toml"), ".toml", toml_text, tomllib.loads, use_cluster),
    "model": Kind(committed("configs/models/*.json"), ".json", json_text, json.loads, use_model),
    "deepspeed": Kind(committed("configs/deepspeed/*.json"), ".json", json_text, json.loads, use_deepspeed),
    "launch": Kind(committed("configs/accelerate/*.yaml"), ".yaml", json_text, yaml.safe_load, read_launch_file),
    "record": Kind(records_of_each_kind(), ".json", json_text, json.loads, use_record),
}


def judge(kind: str, seed: int, folder: Path) -> str:
    """Read one mutated file; returns "" if it was accepted, else the sentence that refused it.

    Raises AssertionError for a sentence that is none, or numbers that are not finite; any other error is a fault.
    """
    here, source = KINDS[kind], random.Random(f"{kind} {seed}")
    name = source.choice(here.good).stem if kind == "record" else "mutated"
    text = here.text(source)
    if kind == "record":
        name = json.loads(text)["job"]["name"] if '"name"' in text and _sound(text) else name
        folder = folder / "x" / "records"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{here.suffix}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        used = here.use(path)
    except ValueError as error:
        sentence = str(error)
        # Click and the report print a path in front of some sentences, never a line break.
        assert sentence and "\n" not in sentence and len(sentence) < 1200, sentence
        return sentence
    finally:
        path.unlink()
    assert finite(used), used
    return ""


def _sound(text: str) -> bool:
    """Whether the text still names its job, by a name that a file may have."""
    try:
        name = json.loads(text)["job"]["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(name, str) and name.isprintable() and 0 < len(name) < 200 and "/" not in name and name != "."
