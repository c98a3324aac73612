"""The traps of matrix optimizers under sharding: what is refused would also be caught, were it not refused.

Each was a silent failure somewhere: of DeepSpeed, of accelerate, or of the study behind `optim/sharding.py`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import toy
from ranks import Group

from epochal.distributed.presets import check_deepspeed

Processes = Callable[[int], Group]
OFF = r"moves a parameter by ([0-9.e+-]+) of its movement"


def stopped(results: list[str], pattern: str) -> None:
    """Every process stops, with the same sentence."""
    assert len(set(results)) == 1
    assert pattern in results[0] and results[0].count("\n") == 0, results[0]


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_trap_1_a_permuted_map_of_parameters_stops_the_run(processes: Processes, tmp_path: Path, stage: str) -> None:
    """Under round_robin_gradients DeepSpeed's own map is wrong. The key is refused; without the refusal the proof stops it."""
    path = toy.write_profile(tmp_path, stage, round_robin_gradients=True)
    with pytest.raises(ValueError, match="round_robin_gradients"):
        check_deepspeed({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, path)
    stopped(processes(2).run("broken:round_robin", path), "of its movement away from what one process does")


def test_trap_1_a_wrong_layout_of_ours_is_told_by_the_proof_alone(processes: Processes) -> None:
    stopped(processes(2).run("broken:wrong_map"), "of its movement away from what one process does")


def test_trap_1_a_shard_that_holds_other_values_than_the_model_is_a_layout_mismatch(processes: Processes) -> None:
    stopped(processes(2).run("broken:wrong_offsets"), "layout mismatch under zero2: the shard holds other values than")


def test_trap_2_a_profile_that_omits_clipping_does_not_clip(processes: Processes) -> None:
    """DeepSpeed's own default is 1.0, so a config without the key would clip these gradients."""
    one = toy.alone("adamw", 6)
    assert max(one["norms"]) > 1.0
    for result in processes(2).run("toy:trained", "zero2", "adamw", 6):
        assert result["on"] == "zero2" and toy.distance(one, result) < 1e-5


def test_trap_3_an_optimizer_that_was_replaced_is_noticed(processes: Processes) -> None:
    stopped(processes(2).run("broken:replaced_optimizer"), "did not take up stage 2 with the Run's optimizer")


def test_trap_4_training_as_ddp_under_a_zero_profile_is_noticed(processes: Processes) -> None:
    """`Accelerator(cpu=True)` ignores the DeepSpeed plugin, with the right losses: a test of ZeRO would test nothing."""
    stopped(processes(2).run("broken:cpu_flag"), "did not take up stage 2 with the Run's optimizer")


def test_trap_5_step_counts_do_not_run_with_the_sub_groups(processes: Processes, tmp_path: Path) -> None:
    """ZeRO-3 calls the optimizer once for each sub-group: a count per group would run too fast (diff 1.9e-3 in the study)."""
    profile, steps = toy.write_profile(tmp_path, "zero3", sub_group_size=200), 6
    for kind in ("adamw-spectra", "ademamix-spectra"):  # bias corrections, and factors that rise with the step
        one = toy.alone(kind, steps)
        for result in processes(2).run("toy:trained", profile, kind, steps):
            assert result["on"] == "zero3" and result["steps"] <= {steps}
            assert toy.distance(one, result) < 1e-5


# Trap 6 is assumption 7 in test_deepspeed_contract.py.


@pytest.mark.parametrize("profile", ["ddp", "zero2", "zero3", "fsdp2"])
def test_traps_7_and_8_a_process_that_owns_nothing_takes_part(processes: Processes, profile: str) -> None:
    steps, one = 3, toy.alone("fira", 3, 1)
    results = processes(4).run("toy:trained", profile, "fira", steps, 1)
    assert sorted(result["refreshes"] for result in results) == [0, 1, 1, 1]
    assert all(toy.distance(one, result) < 1e-5 for result in results)


@pytest.mark.parametrize("profile", ["zero1", "zero2", "zero3", "fsdp2"])
def test_a_matrix_that_is_half_reduced_stops_the_run(processes: Processes, profile: str) -> None:
    """DeepSpeed's Muon did so for a year under reduce_scatter, its default: relative error 0.6 and no word."""
    stopped(processes(2).run("broken:spoiled", profile, "fira", "gather"), "away from what one process does")


def test_clipping_comes_before_the_matrix_step(processes: Processes) -> None:
    """DeepSpeed's own Muon is clipped after it: there the step shrinks with the clip; orthogonalised, it must not."""
    start = toy.first_weights()
    moved = []
    for clip_norm in (1e9, 1e-3):
        results = processes(2).run("toy:trained_with", "zero2", "muon", {"clip_norm": clip_norm}, 1, 1)
        assert results[0]["on"] == "zero2"
        moved.append(float((results[0]["weights"]["model.layers.0.mix"] - start["model.layers.0.mix"]).norm()))
    assert moved[1] == pytest.approx(moved[0], rel=1e-2)


# The third of DeepSpeed's failures, a model built under zero.Init, is refused: test_owners.py.


@pytest.mark.parametrize(
    ("profile", "kind", "what"),
    [
        ("ddp", "adamw", "numbers"),
        ("zero2", "adamw", "numbers"),
        ("zero3", "fira", "numbers"),
        ("fsdp2", "fira", "keep"),
    ],
)
def test_the_proof_sees_matrices_and_pieces_under_every_profile(
    processes: Processes, profile: str, kind: str, what: str
) -> None:
    """A learning rate that does not arrive, a decay that is left out."""
    stopped(processes(2).run("broken:spoiled", profile, kind, what), "away from what one process does")
