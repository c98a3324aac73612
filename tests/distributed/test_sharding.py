"""Matrix optimizers give the weights of one process under DDP, ZeRO-1, -2, -3 and FSDP2; each rank does its share.

The oracle is a plain loop in one process; the tests in tests/optim compare its optimizers with published code. The whole
matrix (every optimizer, 33 matrices, bars and shares) is in benchmarks/parity.csv.
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
PROFILES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
SHARDED = PROFILES[1:]


@functools.cache
def alone(kind: str, steps: int = toy.STEPS, depth: int = 2, clip_norm: float = 1e9) -> dict[str, Any]:
    """What a plain loop in this process makes of it, computed once for each setting."""
    return toy.alone(kind, steps, depth, clip_norm=clip_norm)


def same_everywhere(results: list[dict[str, Any]]) -> None:
    for other in results[1:]:
        for name, weight in results[0]["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


def check(results: list[dict[str, Any]], one: dict[str, Any], profile: str, steps: int) -> None:
    """What must hold whatever the optimizer: the profile is on, weights agree, nothing was stepped twice."""
    expected = "DistributedDataParallel" if profile == "ddp" else profile
    for result in results:
        assert result["on"] == expected
        assert result["counts_at_start"] == [], "a step was taken at construction"
        assert result["steps"] <= {steps}
    same_everywhere(results)
    assert toy.distance(one, results[0]) < 1e-5
    assert sum(result["clips"] for result in results) == one["clips"]
    assert sum(result["refreshes"] for result in results) == one["refreshes"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["adamw", "fira", "spectra"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_many_processes_train_as_one(processes: Processes, profile: str, kind: str, world: int) -> None:
    kind = "adamw-spectra" if kind == "spectra" else kind
    one = alone(kind)
    results = processes(world).run("toy:trained", profile, kind)
    check(results, one, profile, toy.STEPS)
    if kind == "fira":
        assert one["refreshes"] == 2 * one["matrices"] == 12
    if kind == "adamw-spectra":
        assert one["clips"] == toy.STEPS * one["matrices"]
    if profile != "ddp" or world > 1:
        assert results[0]["error"] is not None and results[0]["error"] < 1e-4, "every such run proves itself"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", [f"{base}-spectra" for base in toy.BASES[1:]] + ["muon-float32"])
def test_every_base_of_spectra_and_muon_trains_as_one(processes: Processes, profile: str, kind: str) -> None:
    steps = 6
    check(processes(2).run("toy:trained", profile, kind, steps), alone(kind, steps), profile, steps)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["fira", "adamw-spectra"])
def test_each_rank_holds_and_does_its_share(processes: Processes, profile: str, kind: str) -> None:
    steps, depth, world = 2, 11, 4
    one = alone(kind, steps, depth)
    assert one["matrices"] >= 8 * world
    share = 1 / world + 0.1
    for result in processes(world).run("toy:trained", profile, kind, steps, depth):
        assert result["bytes"] <= share * sum(one["state"][name] for name in result["whole"])
        assert result["clips"] <= share * one["clips"]
        assert result["refreshes"] <= share * one["refreshes"]
    if profile != "ddp":
        elements = 3 * depth * 17 * 12
        assert result["sent"] / steps < 4 * 8 * elements * (world - 1) / world**2


@pytest.mark.parametrize("profile", SHARDED)
@pytest.mark.parametrize("world", [2, 4])
def test_parameters_whose_elements_do_not_divide_are_padded(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, profile: str, world: int
) -> None:
    monkeypatch.setattr(toy, "WIDTH", toy.ODD)
    assert all(weight.numel() % 2 for weight in toy.first_weights().values())
    steps = 3
    check(processes(world).run("toy:trained_odd", profile, "fira", steps), toy.alone("fira", steps), profile, steps)


@pytest.mark.parametrize("profile", SHARDED)
def test_clipping_and_accumulation_are_no_further_off_than_twice_ddp(processes: Processes, profile: str) -> None:
    setting = {"clip_norm": 0.05}
    one = alone("adamw-spectra", **setting)
    ddp = processes(2).run("toy:trained_with", "ddp", "adamw-spectra", setting, 2)[0]
    other = processes(2).run("toy:trained_with", profile, "adamw-spectra", setting, 2)[0]
    assert min(one["norms"]) > 0.05, "clipping must act"
    assert other["norms"] == pytest.approx(one["norms"], rel=1e-4)
    for matrices in (True, False):
        floor = 2e-6  # a few roundings of float32
        allowed = 2 * toy.distance(one, ddp, matrices=matrices) + floor
        assert toy.distance(one, other, matrices=matrices) <= allowed


@pytest.mark.parametrize(
    ("base", "zero"),
    [
        ("zero1", {"overlap_comm": False, "contiguous_gradients": False}),
        ("zero2", {"reduce_scatter": False, "overlap_comm": False}),
        ("zero2", {"reduce_bucket_size": 200, "allgather_bucket_size": 200}),
        ("zero3", {"sub_group_size": 200}),
        ("zero3", {"reduce_scatter": False, "reduce_bucket_size": 200, "stage3_param_persistence_threshold": 0}),
        ("zero1", {"offload_optimizer": {"device": "cpu"}}),
        ("zero2", {"offload_optimizer": {"device": "cpu"}}),
        ("zero3", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_a_profile_may_choose_changes_nothing(
    processes: Processes, tmp_path: Path, base: str, zero: dict[str, Any]
) -> None:
    steps = 6
    profile = toy.write_profile(tmp_path, base, **zero)
    results = processes(2).run("toy:trained", profile, "fira", steps)
    check(results, alone("fira", steps), base, steps)
    assert [result["offloaded"] for result in results] == ["offload_optimizer" in zero] * 2


@pytest.mark.parametrize("profile", PROFILES)
def test_a_gradient_that_is_not_finite_moves_nothing_and_the_next_one_does(processes: Processes, profile: str) -> None:
    for result in processes(2).run("toy:skips_what_is_not_finite", profile):
        assert result == {"still": True, "moves": True}
