"""Ranges: every number of a config has one, and what is outside is refused by key, value and range."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest

from epochal import optimizer_config
from epochal.campaign.cluster import Cluster
from epochal.campaign.one_off import runs_like
from epochal.campaign.plan import campaign_jobs, recipe_names
from epochal.campaign.worker import WorkerConfig
from epochal.config import REPOSITORY, find_config, from_table, load_toml, read_json, seconds, to_table
from epochal.data.prepare import DataConfig
from epochal.distributed.presets import check_deepspeed, read_launch_file
from epochal.models.config import ModelFile
from epochal.ranges import Items, Range, Ranged, checker, shown
from epochal.records import Records, Workspace
from epochal.run import Ensemble, Run, Samples, Targets
from epochal.scale import Point, Scale, load_scale
from recipes import continued, distillation, ensembling, epoching, optimizers, optimizers_at_scale, regularizers

HUGE = 10**400
RECIPES = (continued, distillation, ensembling, epoching, optimizers, optimizers_at_scale, regularizers)
ROOTS = (
    *(Scale, DataConfig, Cluster, WorkerConfig, ModelFile, Run, Ensemble, Samples, Targets),
    *(recipe.Settings for recipe in RECIPES),
    *(getattr(optimizer_config, name) for name in optimizer_config.__all__ if name != "Optimizer"),
)


def inside(hint: Any) -> list[Any]:
    """Return the hints inside of a hint, itself included."""
    return [hint, *(inner for argument in typing.get_args(hint) for inner in inside(argument))]


def dataclasses_inside(roots: Any) -> set[Any]:
    found, todo = set(), list(roots)
    while todo:
        cls = todo.pop()
        if cls not in found:
            found.add(cls)
            hints = typing.get_type_hints(cls)
            todo += [hint for field in hints.values() for hint in inside(field) if dataclasses.is_dataclass(hint)]
    return found


def test_every_number_of_a_config_has_a_range() -> None:
    bare = []
    for cls in dataclasses_inside(ROOTS):
        hints = typing.get_type_hints(cls, include_extras=True)
        for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(cls)):
            # Inside of Annotated a number has its mark; a table of any number is checked by its class.
            outside = [h for h in inside(hint) if typing.get_origin(h) is Annotated]
            marked = [inner for h in outside for inner in inside(h)]
            numbers = [h for h in inside(hint) if h in (int, float)]
            if len(numbers) > len([h for h in marked if h in (int, float)]):
                bare.append(f"{cls.__name__}.{name}")
            if outside and not issubclass(cls, Ranged):
                bare.append(f"{cls.__name__} has ranges and does not check them")
    assert bare == []


@pytest.mark.parametrize(
    ("mark", "hint", "good", "bad"),
    [
        (Range(1, 1000), int, (1, 1000), (0, -1, 1001, 10**12, HUGE, 1.0, True, "1", None, math.nan)),
        (Range(0.0, 2.0), float, (0, 0.0, 2, 1.5), (-1e-300, 2.1, HUGE, -HUGE, math.nan, math.inf, True, "1", [])),
        (Range(0.0, 1.0, above=True, below=True), float, (5e-324, 0.5), (0.0, 1.0, 0, 1, math.nan)),
    ],
)
def test_a_range_takes_numbers_of_its_type_only(mark: Range, hint: Any, good: Any, bad: Any) -> None:
    check = mark.checker(hint)
    for value in good:
        check(value, "x")
    for value in bad:
        with pytest.raises(ValueError, match=r"^x must be (an integer|a number) (from|above) .*, got .*\.$"):
            check(value, "x")


def test_a_refused_value_is_shown_whatever_it_is() -> None:
    loop: list[Any] = []
    for _ in range(100_000):
        loop = [loop]
    for value in (10**5000, "x" * 10**6, loop, {"a": 10**5000}):
        assert len(shown(value)) < 120 and "\n" not in shown(value)


def test_items_are_counted_distinct_and_sorted() -> None:
    check = checker(Annotated[tuple[Annotated[float, Range(0.0, 9.0)], ...], Items(ascending=True)])
    assert check is not None
    check((1.0, 2.0), "lr")
    for value, message in (
        ((), "lr is empty"),
        ((1.0, 1.0), "twice"),
        ((2.0, 1.0), "must ascend"),
        ((math.inf,), "each of lr must be a number from 0 to 9, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            check(value, "lr")


# --- the files of a campaign --------------------------------------------------------------------------------------------

DEMO = (REPOSITORY / "configs" / "scales" / "demo.toml").read_text()
MICRO = (REPOSITORY / "configs" / "scales" / "micro.toml").read_text()
LONG = "9" * 400


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (MICRO, "seeds = 3\nsearch", "seeds = -1\nsearch", "seeds must be an integer from 1 to 1,000, got -1"),
        (MICRO, "seeds = 3\nsearch", "seeds = 0\nsearch", "seeds must be an integer from 1 to 1,000, got 0"),
        (MICRO, "seeds = 3\nsearch", "seeds = true\nsearch", "seeds must be of type int, got True"),
        (MICRO, "seeds = 3\nsearch", "seeds = 1000000000000\nsearch", "seeds must be an integer from 1 to 1,000"),
        (DEMO, "count = 4", "count = 0", "count must be an integer from 1 to 1,000, got 0"),
        (DEMO, "count = 4", "count = 1000000000000", "count must be an integer from 1 to 1,000"),
        (DEMO, "flops = 3e10", "flops = 0", "flops must be a number from 1000 to 1e+25, got 0"),
        (DEMO, "flops = 3e10", "flops = nan", "flops must be a number from 1000 to 1e+25, got nan"),
        (DEMO, "flops = 3e10", "flops = -1", "flops must be a number from 1000 to 1e+25, got -1"),
        (DEMO, "flops = 3e10", f"flops = {LONG}", "flops must be a number from 1000 to 1e+25, got 999"),
        (DEMO, "flops = 3e10", "flops = 3e10\ndevices = 0", "devices must be an integer from 1 to 1,000,000, got 0"),
        (DEMO, "lr = [0.01]", "lr = [inf]", "each of lr must be a number from 1e-12 to 100, got inf"),
        (DEMO, "epochs = [2, 4, 8, 16, 32]", "epochs = [2, 8, 4]", "epochs must ascend"),
        (DEMO, "wd = [0.1, 0.8,", "wd = [0.1, 0.1,", "wd holds a value twice"),
        (DEMO, "warmup = 0.05", "warmup = nan", "warmup must be a number from 0 to below 1, got nan"),
        (DEMO, "num_evals = 4", "num_evals = 1000000000", "num_evals must be an integer from 1 to 10,000"),
        (DEMO, "[24576]", "[24576, 24576]", "unique_tokens holds a value twice"),
        (DEMO, "pool_tokens = 393216", "pool_tokens = -5", "pool_tokens must be an integer from 1"),
        (DEMO, "fraction = 0.75", "fraction = 1.0", "fraction must be below 1, got 1.0"),
        (MICRO, "kd_weight = 0.9", "kd_weight = inf", "kd_weight must be a number above 0 and at most 1, got inf"),
        (MICRO, "wd = 1.6\nseeds = 3", "wd = 1.6\nseeds = -1", "seeds must be an integer from 1 to 1,000, got -1"),
        (MICRO, "wd = [0.4, 1.6, 6.4]", "wd = [0.4, inf]", "each of wd must be a number from 0 to 10000, got inf"),
        (MICRO, "lr = [0.003, 0.01, 0.03]\nwd = [0.4", "lr = [0]\nwd = [0.4", "each of lr must be a number from 1e-12"),
        (MICRO, 'name = "repeated"', 'name = "once"', "settings have the names once, once"),
        (MICRO, "members = 6", "members = 1000000000000", "members must be an integer from 1 to 1,000"),
        (MICRO, 'setting = "repeated"', 'setting = "often"', "there is no setting 'often'"),
        (MICRO, "batch_sizes = [8, 1]", "batch_sizes = [8]", "batch_sizes is [8]; give at least 2"),
        (DEMO, 'data = "kjv"', f"data = {'[' * 3000}{']' * 3000}", "nests brackets too deeply"),
        (DEMO, 'data = "kjv"', f"data = {'9' * 5000}", "is not valid TOML"),
        (DEMO, 'model = "w32"', 'model = "w16"', "ladder names a model twice"),
    ],
)
def test_a_number_outside_of_its_range_is_named_with_its_file(
    tmp_path: Path, text: str, old: str, new: str, message: str
) -> None:
    path = tmp_path / "mine.toml"
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        scale = load_scale(str(path))
        campaign_jobs(recipe_names(scale), Records(Workspace(scale.name, tmp_path, tmp_path)), scale)
    sentence = str(caught.value)
    assert message in sentence and "mine" in sentence and "\n" not in sentence and len(sentence) < 400


def test_a_decay_of_zero_means_no_decay(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(DEMO.replace("wd = 0.2\nmax", "wd = 0\nmax"))
    assert load_scale(str(path)).tables["distillation"]["wd"] == 0


@pytest.mark.parametrize("name", ["a,b", "a|b", "a b", "x\ny", ".hidden", "-x", "$$", "x" * 300, "a\x00b", "a\u202eb"])
def test_an_odd_name_of_a_config_is_refused(tmp_path: Path, name: str) -> None:
    for kind, suffix in (("scales", ".toml"), ("data", ".toml"), ("cluster", ".toml")):
        for given in (name, f"{tmp_path}/{name}{suffix}"):
            with pytest.raises(ValueError, match="cannot name a file of configs/") as caught:
                find_config(kind, given, suffix)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[tokenizer]\ntrain = 2147483648", "train must be an integer from 256 to 4,194,304, got 2147483648"),
        ("[tokenizer]\ntrain = 0", "train must be an integer from 256"),
        ("train_tokens = -1\n[tokenizer]\ntrain = 300", "train_tokens must be an integer from 0"),
        ("shuffle_seed = -1\n[tokenizer]\ntrain = 300", "shuffle_seed must be an integer from 0"),
        ("[tokenizer]\ntrain = 300\n[split]\ntest = nan", "test must be a number from 0 to 1, got nan"),
        ("[tokenizer]\ntrain = 300\nspecials = ['a', 'a']", "specials holds a value twice"),
        (f"more = [{{ files = ['a'], reader = '{'x' * 999}' }}]\n[tokenizer]\ntrain = 300", "reader must .*xx[.]{3}"),
    ],
)
def test_a_data_config_out_of_range_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"licence = 'x'\nsource = {{ files = ['a.txt'] }}\n{lines}\n")
    with pytest.raises(ValueError, match=message):
        load_toml(path, DataConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_limit": "inf"}, "at most a year, got 'inf'"),
        ({"time_limit": "1e9h"}, "at most a year"),
        ({"micro_batch": -3}, "micro_batch must be an integer from 1"),
        ({"slurm": {"additional_parameters": 5}}, "additional_parameters in .slurm. must be a table"),
        ({"slurm": {"setup": ["x"]}}, "sets setup, which stands at the top of the file"),
        ({"slurm": {"cpus_per_task": -2}}, "cpus_per_task in .slurm. must be a number from 0"),
        ({"planner": {"mem": math.nan}}, "mem in .planner. must be a number from 0"),
        ({"planner": {"partition": ["a"]}}, "partition in .planner. must be a text in one line"),
        ({"slurm": {"account": "a\n#SBATCH --uid=0"}}, "account in .slurm. must be a text in one line"),
        ({"slurm": {"additional_parameters": {"a\nb": 1}}}, "cannot name an option"),
    ],
)
def test_a_cluster_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**changes)


@pytest.mark.parametrize("text", ["inf", "nan", "-1s", "0", "", "1e400", "9" * 5000, "1d", "h"])
def test_a_duration_is_finite(text: str) -> None:
    with pytest.raises(ValueError, match="A duration must be"):
        seconds(text)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"zero_optimization": 3}, "zero_optimization must be a table, got 3"),
        ({"zero_optimization": {"stage": True}}, "stage is True"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer must be a table"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size must be a number from 0"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "overlap_comm must be true or false"),
        ({"steps_per_print": HUGE, "zero_optimization": {"stage": 1}}, "steps_per_print must be a number from 0"),
    ],
)
def test_a_deepspeed_config_out_of_range_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_deepspeed(table, "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: -1", "num_processes must be an integer from 1 to 100,000, got -1"),
        ("num_processes: '4'", "num_processes must be an integer"),
        ("- a", "must be a table"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_launch_file_out_of_range_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_launch_file(path)


@pytest.mark.parametrize(
    "text", ["[" * 10**5 + "]" * 10**5, '{"a": NaN}', "3", "\ufeff{}", '{"a": ' + "9" * 5000 + "}"]
)
def test_json_that_is_no_table_of_finite_numbers_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_json(path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs=1000000000000", "epochs must be an integer from 1 to 100,000"),
        ("optimizer.lr=inf", "lr must be a number from 0 to 100, got inf"),
        ("dropout=" + "[" * 5000, "dropout must be of type float"),
        ("nothing.kind=Muon", "'nothing.kind' reaches into 'nothing'"),
        ("dropout.kind=Muon", "'dropout.kind' reaches into 'dropout'"),
    ],
)
def test_a_one_off_run_out_of_range_is_refused(assignment: str, message: str) -> None:
    scale = load_scale("demo")
    like = scale.run("w16", 24576, Point(lr=0.01, epochs=1, wd=0.1))
    with pytest.raises(ValueError, match=message):
        runs_like(like, [assignment], 1, scale)


def test_a_table_is_asked_for_where_something_else_stands() -> None:
    with pytest.raises(ValueError, match="x must be a table, got 3"):
        from_table(3, Run, where="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: optimizer: kind \['a'\] is unknown"):
        from_table({**to_table(load_scale("demo")), "optimizer": {"kind": ["a"]}}, Scale, where="x")
