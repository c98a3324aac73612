"""A run resumes with any number of processes under any preset, and reaches the same losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import chain
import pytest
import tiny
from ranks import Group

from epochal.optimizer_config import AdamW, Spectra
from epochal.training.loop import train

Processes = Callable[[int], Group]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("fira", [(2, "ddp"), (1, "zero2"), (4, "zero3"), (2, "fsdp2")]),
        ("spectra", [(2, "zero3"), (1, "ddp"), (4, "zero2"), (2, "zero1")]),
        ("adamw", [(2, "fsdp2"), (1, "zero3"), (4, "ddp")]),
    ],
)
def test_a_run_moves_between_numbers_of_processes_and_presets(
    processes: Processes, tmp_path: Path, kind: str, parts: list[tuple[int, str]]
) -> None:
    space, _, config = tiny.workspace(tmp_path)
    one = processes(1).run("chain:part", "cpu", space, chain.make_run(config, "one", kind), None)[0]
    run = chain.make_run(config, "moved", kind)
    for number, (world, preset) in enumerate(parts, start=1):
        last = number == len(parts)
        results = processes(world).run("chain:part", preset, space, run, None if last else 7)
        if not last:
            assert all("test" in result for result in results), results
            files = sorted(file.name for file in space.folder("moved").glob("checkpoints/step-*/optimizer-*"))
            assert len({name for name in files if name.startswith("optimizer-")}) >= world
    moved = results[0]
    assert moved["provenance"]["resumed_at"] and moved["provenance"]["world_size"] == parts[-1][0]
    for key in ("loss", "train_loss", "test_loss"):
        assert moved[key] == pytest.approx(one[key], abs=1e-5)
    assert moved["curve"] == [[step, pytest.approx(loss, abs=1e-5)] for step, loss in one["curve"]]


def test_a_run_on_four_processes_resumes_to_the_last_bit_under_ddp(processes: Processes, tmp_path: Path) -> None:
    """DDP sums the first step's gradients in another order than later ones; from three processes on that is visible."""
    space, _, config = tiny.workspace(tmp_path)
    results = []
    for name, parts in (("whole", (None,)), ("parts", (3, None))):
        run = chain.make_run(config, name, "adamw")
        for stop_after in parts:
            results.append(processes(4).run("chain:part", "ddp", space, run, stop_after)[0])
    whole, parts = results[0], results[-1]
    assert parts["provenance"]["resumed_at"] is not None
    for key in ("loss", "train_loss", "test_loss", "curve"):
        assert parts[key] == whole[key], key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_presets_agree_to_the_last_bit_if_gradients_are_summed_in_the_same_order(
    processes: Processes, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    """Clipped in every step, with one micro-batch a process. Under ZeRO-3 products of gathered weights round differently."""
    space, _, config = tiny.workspace(tmp_path)
    optimizer = Spectra(base=AdamW(lr=1e-2, eps=1e-3), clip=1.0)
    by_preset = {}
    for preset in ("ddp", "zero1", "zero2", "fsdp2", *(["zero3"] if precision == "fp32" else [])):
        run = tiny.run(config, name=preset, optimizer=optimizer, epochs=1, precision=precision, clip_norm=0.3)
        by_preset[preset] = processes(2).run("chain:part", preset, space, run, None, 2)[0]
    for preset, results in by_preset.items():
        exact = 0.0 if preset != "zero3" else 1e-5
        for key in ("loss", "train_loss", "test_loss"):
            assert results[key] == pytest.approx(by_preset["ddp"][key], abs=exact, rel=0), (preset, key)


def test_presets_agree_in_bf16_with_two_micro_batches(processes: Processes, tmp_path: Path) -> None:
    """ZeRO-2, -3 and FSDP2 sum micro-batches in another order; at lr 1e-2 that last bit can grow to 5e-3 nats."""
    space, _, config = tiny.workspace(tmp_path)
    losses: dict[str, Any] = {}
    optimizer = Spectra(base=AdamW(lr=3e-3, eps=1e-3), clip=1.0)
    for preset in ("ddp", "zero2", "zero3", "fsdp2"):
        run = tiny.run(config, name=preset, optimizer=optimizer, epochs=1, precision="bf16")
        losses[preset] = processes(2).run("chain:part", preset, space, run, None)[0]["loss"]
    for preset, loss in losses.items():
        assert loss == pytest.approx(losses["ddp"], abs=2e-3), preset


def test_noise_does_not_depend_on_the_number_of_processes(processes: Processes, tmp_path: Path) -> None:
    """Masks belong to rows of the global batch."""
    space, _, config = tiny.workspace(tmp_path)
    noise: dict[str, Any] = {"dropout": 0.1, "input_mask_prob": 0.5, "weight_averaging": "ema"}
    results = []
    for world in (1, 2):
        run = chain.make_run(config, f"on-{world}", "adamw", **noise)
        results.append(processes(world).run("chain:part", "ddp", space, run, None)[0])
    for key in ("loss", "train_loss", "test_loss"):
        assert results[1][key] == pytest.approx(results[0][key], abs=1e-5)


def test_modes_agree_with_one_process_under_ddp_and_fsdp2(processes: Processes, tmp_path: Path) -> None:
    """Compiled layers trace through DDP and FSDP2, whose hooks stay outside of the graphs; here a graph runs eagerly."""
    space, _, config = tiny.workspace(tmp_path)
    changes: dict[str, Any] = {"unique_tokens": 1024, "epochs": 1, "dropout": 0.1, "input_mask_prob": 0.5}
    cells = [("ddp", ()), ("ddp", ("compile",)), ("ddp", ("recompute",)), ("zero2", ("compile", "recompute"))]
    cells += [("fsdp2", ("compile",)), ("fsdp2", ("recompute",))]
    before, found = processes(2).run("chain:graphs_so_far"), []
    for preset, modes in cells:
        run = tiny.run(config, name="-".join((preset, *modes)), **changes)
        found.append(processes(2).run("chain:part", preset, space, run, None, 2, modes, "eager")[0])
        assert found[-1]["provenance"]["modes"] == list(modes)
        for key in ("loss", "train_loss", "test_loss", "curve"):
            assert found[-1][key] == found[0][key], (preset, modes, "the same bits as DDP without modes")
    for first, last in zip(before, processes(2).run("chain:graphs_so_far"), strict=True):
        assert last - first <= 4, "one graph of a layer and one of the norm, for whole weights and for gathered ones"
    alone = train(tiny.run(config, name="alone", **changes), space)
    assert alone is not None
    for key in ("loss", "test_loss"):
        assert found[0][key] == pytest.approx(alone.results[key], abs=1e-5)


@pytest.mark.parametrize("modes", [(), ("recompute",)])
def test_linear_maps_gathered_alone_in_bf16_give_the_bits_of_whole_layers(
    processes: Processes, tmp_path: Path, modes: tuple[str, ...]
) -> None:
    space, _, config = tiny.workspace(tmp_path)
    results = []
    for preset in ("fsdp2", "fsdp2-nodes"):
        run = tiny.run(config, name=preset, unique_tokens=1024, epochs=1, precision="bf16", dropout=0.1)
        results.append(processes(2).run("chain:part", preset, space, run, None, 1, modes)[0])
    for key in ("loss", "train_loss", "test_loss", "curve"):
        assert results[0][key] == results[1][key]


def test_a_full_disk_on_one_process_fails_on_all_and_leaves_no_checkpoint(processes: Processes, tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = chain.make_run(config, "full", "adamw")
    assert processes(2).run("chain:part_with_a_full_disk", "zero2", space, run) == ["no space left on device"] * 2
    assert not list(space.folder("full").glob("checkpoints/*"))


def test_a_batch_that_is_not_divisible_by_the_processes_is_refused_on_all(processes: Processes, tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = chain.make_run(config, "odd", "adamw", batch_size=1)
    for preset in ("ddp", "zero2"):
        for refusal in processes(2).run("chain:refusal", preset, space, run):
            assert "batch_size 1 is not divisible by 2 processes; use 1 processes or another batch_size." in refusal
    assert not space.folder("odd").exists()


def test_weight_averaging_is_refused_if_weights_are_sharded(processes: Processes, tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    run = chain.make_run(config, "ema", "adamw", weight_averaging="ema")
    for refusal in processes(2).run("chain:refusal", "zero3", space, run):
        assert "averages its weights, which zero3 shards; use ddp, zero1 or zero2." in refusal
