"""Silent failures that happened in DeepSpeed, accelerate or published optimizers cannot happen here unnoticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import toy
from ranks import Group

from epochal.distributed.presets import check_deepspeed

Processes = Callable[[int], Group]


def assert_stopped(results: list[str], reason: str) -> None:
    """Every process stops with the same one-line error."""
    assert len(set(results)) == 1
    assert reason in results[0] and "\n" not in results[0], results[0]


def test_permuted_parameters_are_refused_and_would_be_detected(processes: Processes, tmp_path: Path) -> None:
    path = toy.write_preset(tmp_path, "zero2", round_robin_gradients=True)
    with pytest.raises(ValueError, match="round_robin_gradients"):
        check_deepspeed({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, path)
    assert_stopped(processes(2).run("failures:permuted_parameters", path), "failed the check of its first step")


def test_an_optimizer_replaced_by_deepspeed_is_detected(processes: Processes) -> None:
    assert_stopped(processes(2).run("failures:replaced_optimizer"), "another optimizer than the Run's")


def test_training_as_ddp_under_a_zero_preset_is_detected(processes: Processes) -> None:
    assert_stopped(processes(2).run("failures:trained_as_ddp"), "DeepSpeed runs stage 0 instead of 2")


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3", "fsdp2"])
def test_a_matrix_that_is_only_half_reduced_is_detected(processes: Processes, preset: str) -> None:
    assert_stopped(processes(2).run("failures:half_reduced_matrix", preset), "failed the check of its first step")


def test_a_preset_without_clipping_does_not_clip(processes: Processes) -> None:
    """DeepSpeed clips at 1.0 if its config does not mention clipping."""
    one = toy.alone("adamw", 6)
    assert max(one["norms"]) > 1.0
    for result in processes(2).run("toy:trained", "zero2", "adamw", 6):
        assert result["backend"] == "zero2" and toy.distance(one, result) < 1e-5


def test_clipping_comes_before_the_matrix_step(processes: Processes) -> None:
    """DeepSpeed clips the output of its own Muon, so its step shrinks with clip_norm; orthogonalized, it must not."""
    start = toy.first_weights()
    moved = []
    for clip_norm in (1e9, 1e-3):
        results = processes(2).run("toy:trained_with", "zero2", "muon", {"clip_norm": clip_norm}, 1, 1)
        assert results[0]["backend"] == "zero2"
        moved.append(float((results[0]["weights"]["model.layers.0.mix"] - start["model.layers.0.mix"]).norm()))
    assert moved[1] == pytest.approx(moved[0], rel=1e-2)


@pytest.mark.parametrize("preset", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_rank_that_owns_no_matrix_does_not_block_the_others(processes: Processes, preset: str) -> None:
    steps, one = 3, toy.alone("fira", 3, 1)
    results = processes(4).run("toy:trained", preset, "fira", steps, 1)
    assert sorted(result["refreshes"] for result in results) == [0, 1, 1, 1]
    assert all(toy.distance(one, result) < 1e-5 for result in results)
