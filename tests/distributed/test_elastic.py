"""A run that is stopped goes on with any number of processes and under any profile, to the same losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import chain
import pytest
import tiny
from ranks import Group

from epochal.optimizer_config import AdamW, Spectra

Processes = Callable[[int], Group]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("fira", [(2, "ddp"), (1, "zero2"), (4, "zero3"), (2, "fsdp2")]),
        ("spectra", [(2, "zero3"), (1, "ddp"), (4, "zero2"), (2, "zero1")]),
        ("adamw", [(2, "fsdp2"), (1, "zero3"), (4, "ddp")]),
    ],
)
def test_a_run_moves_between_numbers_of_processes_and_profiles(
    processes: Processes, tmp_path: Path, kind: str, parts: list[tuple[int, str]]
) -> None:
    space, _, config = tiny.workspace(tmp_path)
    one = processes(1).run("chain:part", "cpu", space, chain.make_run(config, "one", kind), None)[0]
    run = chain.make_run(config, "moved", kind)
    for number, (world, profile) in enumerate(parts, start=1):
        last = number == len(parts)
        results = processes(world).run("chain:part", profile, space, run, None if last else 7)
        if not last:
            assert all("test" in result for result in results), results
            files = sorted(file.name for file in space.folder("moved").glob("checkpoints/step-*/optimizer-*"))
            assert len({name for name in files if name.startswith("optimizer-")}) >= world
    found = results[0]
    assert found["provenance"]["resumed_at"] and found["provenance"]["world_size"] == parts[-1][0]
    for key in ("loss", "train_loss", "test_loss"):
        assert found[key] == pytest.approx(one[key], abs=1e-5)
    assert found["curve"] == [[step, pytest.approx(loss, abs=1e-5)] for step, loss in one["curve"]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_profiles_are_one_to_the_last_bit_where_gradients_are_summed_alike(
    processes: Processes, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    """Clipped in every step and one micro-batch a process; ZeRO-3 gathers weights where a product may round differently."""
    space, _, config = tiny.workspace(tmp_path)
    optimizer = Spectra(base=AdamW(lr=1e-2, eps=1e-3), clip=1.0)
    found = {}
    for profile in ("ddp", "zero1", "zero2", "fsdp2", *(["zero3"] if precision == "fp32" else [])):
        run = tiny.run(config, name=profile, optimizer=optimizer, epochs=2, precision=precision, clip_norm=0.3)
        found[profile] = processes(2).run("chain:part", profile, space, run, None, 2)[0]
    for profile, results in found.items():
        exact = 0.0 if profile != "zero3" else 1e-5
        for key in ("loss", "train_loss", "test_loss"):
            assert results[key] == pytest.approx(found["ddp"][key], abs=exact, rel=0), (profile, key)


def test_profiles_agree_in_bf16_at_equal_world_size(processes: Processes, tmp_path: Path) -> None:
    """With two micro-batches, which ZeRO-2, -3 and FSDP2 sum in another order: at lr 1e-2 that last bit can grow to 5e-3."""
    space, _, config = tiny.workspace(tmp_path)
    losses: dict[str, Any] = {}
    optimizer = Spectra(base=AdamW(lr=3e-3, eps=1e-3), clip=1.0)
    for profile in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        run = tiny.run(config, name=profile, optimizer=optimizer, epochs=2, precision="bf16")
        losses[profile] = processes(2).run("chain:part", profile, space, run, None)[0]["loss"]
    for profile, loss in losses.items():
        assert loss == pytest.approx(losses["ddp"], abs=2e-3), profile


def test_a_full_disk_on_one_process_is_an_error_on_all_and_leaves_nothing(processes: Processes, tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = chain.make_run(config, "full", "adamw")
    assert processes(2).run("chain:part_with_a_full_disk", "zero2", space, run) == ["no space left on device"] * 2
    assert not list(space.folder("full").glob("checkpoints/*"))


def test_a_batch_that_the_processes_do_not_divide_is_refused_by_all(processes: Processes, tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = chain.make_run(config, "odd", "adamw", batch_size=1)
    for profile in ("ddp", "zero2"):
        for refusal in processes(2).run("chain:refusal", profile, space, run):
            assert "batch_size 1 is not divisible by 2 processes; use 1 processes or another batch_size." in refusal
    assert not space.folder("odd").exists()


def test_averaged_weights_are_refused_where_weights_lie_in_pieces(processes: Processes, tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = chain.make_run(config, "ema", "adamw", weight_averaging="ema")
    for refusal in processes(2).run("chain:refusal", "zero3", space, run):
        assert "averages its weights, which zero3 keeps in pieces; use ddp, zero1 or zero2." in refusal
