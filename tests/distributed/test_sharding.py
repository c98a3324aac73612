"""Matrix optimizers give the weights of one process under DDP, ZeRO-1, -2, -3 and FSDP2; each rank does its share.

The oracle is a plain loop in one process; the tests in tests/optim compare its optimizers with published code. All
combinations (every optimizer, 33 matrices) are in benchmarks/parity.csv; here are those that take different code paths.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import Group

Processes = Callable[[int], Group]
PRESETS = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
SHARDED = PRESETS[1:]
STEPS = 16
"""Enough for Fira to compute its bases twice."""


@functools.cache
def alone(kind: str, steps: int, depth: int = 2, clip_norm: float = 1e9) -> dict[str, Any]:
    """The oracle, computed once for each setting."""
    return toy.alone(kind, steps, depth, clip_norm=clip_norm)


def check(results: list[dict[str, Any]], one: dict[str, Any], preset: str, steps: int) -> None:
    """The preset is active, all ranks have the weights of one process, and nothing was stepped twice."""
    expected = "DistributedDataParallel" if preset == "ddp" else preset
    for result in results:
        assert result["backend"] == expected
        assert result["counts_at_start"] == [], "a step was taken at construction"
        assert result["steps"] <= {steps}
        for name, weight in results[0]["weights"].items():
            assert torch.equal(weight, result["weights"][name]), name
    assert toy.distance(one, results[0]) < 1e-5
    assert sum(result["clips"] for result in results) == one["clips"]
    assert sum(result["refreshes"] for result in results) == one["refreshes"]


@pytest.mark.parametrize(
    ("world", "preset", "kind"),
    [
        *((2, preset, kind) for preset in PRESETS for kind in ("adamw", "fira", "adamw-spectra")),
        *((4, preset, "fira") for preset in PRESETS),
        (4, "zero3", "adamw"),
        (4, "zero2", "adamw-spectra"),
        *((1, preset, "adamw-spectra") for preset in ("zero2", "zero3", "fsdp2")),
    ],
)
def test_many_processes_train_as_one(processes: Processes, world: int, preset: str, kind: str) -> None:
    one = alone(kind, STEPS)
    results = processes(world).run("toy:trained", preset, kind, STEPS)
    check(results, one, preset, STEPS)
    if kind == "fira":
        assert one["refreshes"] == 2 * one["matrices"] == 12
    if kind == "adamw-spectra":
        assert one["clips"] == STEPS * one["matrices"]
    assert results[0]["error"] is not None and results[0]["error"] < 1e-4, "the first step was checked"


# ZeRO-1 and -2 take the same path for all of these.
@pytest.mark.parametrize("preset", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("kind", [f"{base}-spectra" for base in toy.BASES[1:]] + ["muon-float32"])
def test_every_base_of_spectra_and_muon_trains_as_one(processes: Processes, preset: str, kind: str) -> None:
    steps = 6
    check(processes(2).run("toy:trained", preset, kind, steps), alone(kind, steps), preset, steps)


@pytest.mark.parametrize(
    ("preset", "kind"), [("ddp", "fira"), ("zero2", "adamw-spectra"), ("zero3", "fira"), ("fsdp2", "adamw-spectra")]
)
def test_each_rank_holds_and_does_its_share(processes: Processes, preset: str, kind: str) -> None:
    steps, depth, world = 2, 11, 4
    one = alone(kind, steps, depth)
    assert one["matrices"] >= 8 * world
    share = 1 / world + 0.1
    for result in processes(world).run("toy:trained", preset, kind, steps, depth):
        assert result["bytes"] <= share * sum(one["state"][name] for name in result["whole"])
        assert result["clips"] <= share * one["clips"]
        assert result["refreshes"] <= share * one["refreshes"]
        if preset != "ddp":
            elements = 3 * depth * 17 * 12
            assert result["sent"] / steps < 4 * 8 * elements * (world - 1) / world**2


@pytest.mark.parametrize("preset", SHARDED)
def test_parameters_whose_elements_do_not_divide_are_padded(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setattr(toy, "WIDTH", toy.ODD)
    assert all(weight.numel() % 2 for weight in toy.first_weights().values())
    steps = 3
    check(processes(4).run("toy:trained_odd", preset, "fira", steps), toy.alone("fira", steps), preset, steps)


@pytest.fixture(scope="module")
def clipped_ddp(processes: Processes) -> dict[str, Any]:
    """DDP on two ranks, clipped in every step and with two micro-batches."""
    return processes(2).run("toy:trained_with", "ddp", "adamw-spectra", {"clip_norm": 0.05}, 2, STEPS)[0]


@pytest.mark.parametrize("preset", SHARDED)
def test_clipping_and_accumulation_deviate_at_most_twice_as_much_as_ddp(
    processes: Processes, clipped_ddp: dict[str, Any], preset: str
) -> None:
    setting = {"clip_norm": 0.05}
    one = alone("adamw-spectra", STEPS, **setting)
    other = processes(2).run("toy:trained_with", preset, "adamw-spectra", setting, 2, STEPS)[0]
    assert min(one["norms"]) > 0.05, "clipping must act"
    assert other["norms"] == pytest.approx(one["norms"], rel=1e-4)
    for matrices in (True, False):
        floor = 2e-6  # a few roundings of float32
        allowed = 2 * toy.distance(one, clipped_ddp, matrices=matrices) + floor
        assert toy.distance(one, other, matrices=matrices) <= allowed


@pytest.mark.parametrize(
    ("base", "zero", "kind"),
    [
        ("zero1", {"overlap_comm": False, "contiguous_gradients": False}, "fira"),
        ("zero2", {"reduce_scatter": False, "overlap_comm": False}, "fira"),
        ("zero2", {"reduce_bucket_size": 200, "allgather_bucket_size": 200}, "fira"),
        # Called once for each sub-group: a step count per group would rise too fast. Both have bias corrections.
        ("zero3", {"sub_group_size": 200}, "fira"),
        ("zero3", {"sub_group_size": 200}, "ademamix-spectra"),
        (
            "zero3",
            {"reduce_scatter": False, "reduce_bucket_size": 200, "stage3_param_persistence_threshold": 0},
            "fira",
        ),
        ("zero1", {"offload_optimizer": {"device": "cpu"}}, "fira"),
        ("zero2", {"offload_optimizer": {"device": "cpu"}}, "fira"),
        ("zero3", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, "fira"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_of_a_preset_do_not_change_the_result(
    processes: Processes, tmp_path: Path, base: str, zero: dict[str, Any], kind: str
) -> None:
    steps = 6
    path = toy.write_preset(tmp_path, base, **zero)
    results = processes(2).run("toy:trained", path, kind, steps)
    check(results, alone(kind, steps), base, steps)
    assert [result["offloaded"] for result in results] == ["offload_optimizer" in zero] * 2


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(processes: Processes, preset: str) -> None:
    for result in processes(2).run("toy:step_with_nan_then_without", preset):
        assert result == {"moved": [False, True]}
