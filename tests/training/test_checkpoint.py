"""Checkpoints restore every bit; a damaged one is reported and the previous one used."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epochal.distributed.sharding import Replicated
from epochal.models.llama import build_model
from epochal.optim.build import build_optimizer
from epochal.run import AdamW, AdEMAMix, Fira, Lion, Mars, Muon, Optimizer, Signum, Spectra
from epochal.training import checkpoint
from epochal.training.checkpoint import Checkpoint, newest_checkpoint

PLAIN = AdamW(lr=1e-2)
OTHERS = [
    Signum(lr=1e-3),
    AdEMAMix(lr=1e-2),
    Mars(lr=1e-2),
    Lion(lr=1e-3),
    Muon(lr=1e-2),
    Fira(lr=1e-2, gap=3),
    Fira(lr=1e-2, gap=2, refresh="subspace", rotate_states=True, stagger=True),
    Fira(lr=1e-2, gap=3, variant="galore"),
    Spectra(base=AdamW(lr=1e-2), clip=1.0),
    Spectra(base=Signum(lr=1e-2), clip=1.0, apply_to="all", clip_decay="sqrt", pre_clip=0.1),
    Spectra(base=AdEMAMix(lr=1e-2), clip=1.0, apply_to=("attn", "mlp")),
    Spectra(base=Mars(lr=1e-2), clip=1.0),
]


def build(seed: int, choice: Optimizer = PLAIN) -> tuple[torch.nn.Module, Replicated]:
    model = build_model("w16", vocab_size=64, max_positions=32, seed=seed)
    return model, Replicated(build_optimizer(model, choice, steps=5, warmup_steps=2), model.named_parameters())


def save_checkpoint(
    folder: Path, step: int, model: torch.nn.Module, optimizer: Replicated, state: dict[str, Any]
) -> Path:
    return checkpoint.save_checkpoint(folder, step, weights(model), optimizer.named_state(), state)


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: Replicated, *, warn: Any) -> dict[str, Any] | None:
    path = newest_checkpoint(folder, {}, warn=warn)
    if path is None:
        return None
    newest = Checkpoint(path)
    newest.load_weights(model)
    optimizer.load_named_state(newest)
    return newest.state


def steps(model: torch.nn.Module, optimizer: Replicated, numbers: range) -> None:
    for number in numbers:
        tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(number))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """Checkpoints of steps 2 and 4 of five, and the weights after 2, 4 and 5."""
    model, optimizer = build(0)
    after = {}
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        steps(model, optimizer, range(start, stop))
        after[stop] = weights(model)
        if stop < 5:
            save_checkpoint(tmp_path, stop, model, optimizer, {"curve": [[stop, 0.1]], "note": None})
    return tmp_path, after


def test_round_trip_and_continuation_are_bit_identical(
    saved: tuple[Path, dict[int, dict[str, torch.Tensor]]],
) -> None:
    folder, after = saved
    model, optimizer = build(1)
    state = load_checkpoint(folder, model, optimizer, warn=pytest.fail)
    assert state == {"step": 4, "curve": [[4, 0.1]], "note": None}
    assert_same(weights(model), after[4])
    steps(model, optimizer, range(4, 5))
    assert_same(weights(model), after[5])


@pytest.mark.parametrize("choice", OTHERS, ids=lambda item: type(item).__name__)
def test_every_optimizer_resumes_bit_identically(tmp_path: Path, choice: Optimizer) -> None:
    model, optimizer = build(0, choice)
    for step in range(5):
        steps(model, optimizer, range(step, step + 1))
        save_checkpoint(tmp_path / str(step + 1), step + 1, model, optimizer, {})
    for step in (1, 2, 3, 4):  # before, at and after a refresh of the subspaces
        again, resumed = build(1, choice)
        load_checkpoint(tmp_path / str(step), again, resumed, warn=pytest.fail)
        steps(again, resumed, range(step, 5))
        assert_same(weights(again), weights(model))
        assert_same(optimizer.named_state(), resumed.named_state())


def test_without_checkpoints_nothing_is_loaded(tmp_path: Path) -> None:
    model, optimizer = build(0)
    before = weights(model)
    assert load_checkpoint(tmp_path / "none", model, optimizer, warn=pytest.fail) is None
    assert_same(weights(model), before)


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = build(0)
    steps(model, optimizer, range(1))
    for step in (5, 10, 15, 20, 20):
        path = save_checkpoint(tmp_path, step, model, optimizer, {})
    assert path.name == "step-00000020"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-0.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_newest_is_reported_and_the_previous_one_used(
    saved: tuple[Path, dict[int, dict[str, torch.Tensor]]], name: str, damage: str
) -> None:
    folder, after = saved
    path = folder / "step-00000004" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    warnings: list[str] = []
    model, optimizer = build(1)
    state = load_checkpoint(folder, model, optimizer, warn=warnings.append)
    assert state is not None and state["step"] == 2
    assert (
        len(warnings) == 1 and "step-00000004 is damaged (" in warnings[0] and "using the previous one" in warnings[0]
    )
    assert_same(weights(model), after[2])


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_if_all_are_damaged_each_is_reported(saved: tuple[Path, dict[int, dict[str, torch.Tensor]]], name: str) -> None:
    folder, _ = saved
    for path in folder.glob(f"step-*/{name}"):
        path.write_text("{}")
    warnings: list[str] = []
    model, optimizer = build(1)
    before = weights(model)
    assert load_checkpoint(folder, model, optimizer, warn=warnings.append) is None
    assert len(warnings) == 2
    assert_same(weights(model), before)


def test_a_failed_save_leaves_the_earlier_ones(
    saved: tuple[Path, dict[int, dict[str, torch.Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    folder, after = saved
    model, optimizer = build(1)
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(folder, 9, model, optimizer, {})
    monkeypatch.undo()
    assert sorted(item.name for item in folder.iterdir()) == ["step-00000002", "step-00000004"]
    load_checkpoint(folder, model, optimizer, warn=pytest.fail)
    assert_same(weights(model), after[4])


def test_only_safetensors_and_json_are_written(saved: tuple[Path, dict[int, dict[str, torch.Tensor]]]) -> None:
    folder, _ = saved
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        head = path.read_bytes()[:9]
        assert head[:1] in (b"{", b"[") or head[8:9] == b"{", f"{path.name} is neither JSON nor safetensors"


class Killed(BaseException):
    """Stands for a killed process, which does not clean up."""


@pytest.mark.parametrize("moment", ["save_file", "file_hash"])
def test_an_interrupted_save_leaves_no_checkpoint_and_no_part_of_the_next(
    saved: tuple[Path, dict[int, dict[str, torch.Tensor]]], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Four processes are killed while saving; one process resumes and saves the same step."""

    def killed(*_: object) -> None:
        raise Killed

    folder, after = saved
    model, optimizer = build(1)
    load_checkpoint(folder, model, optimizer, warn=pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(checkpoint, moment, killed)
        with pytest.raises(Killed):
            save_checkpoint(folder, 6, model, optimizer, {})
    (remains,) = [item for item in folder.iterdir() if item.name not in ("step-00000002", "step-00000004")]
    (remains / "optimizer-3.safetensors").write_bytes(b"of a killed process")
    again, resumed = build(1)
    load_checkpoint(folder, again, resumed, warn=pytest.fail)
    assert_same(weights(again), after[4])

    path = save_checkpoint(folder, 6, again, resumed, {})
    complete = {"model.safetensors", "optimizer-0.safetensors", "state.json", "manifest.json"}
    assert {item.name for item in path.iterdir()} == complete
    assert sorted(item.name for item in folder.iterdir()) == ["step-00000004", "step-00000006"]


def test_pieces_of_twelve_processes_are_concatenated_and_a_missing_one_is_named(tmp_path: Path) -> None:
    """In the order of their elements: the names of their files sort 0, 1, 10, 11, 2, ..."""
    (tmp_path / "state.json").write_text("{}")
    whole = torch.arange(30.0)
    for rank in range(12):
        start = 30 * rank // 12
        piece = {f"w@{start}.step": torch.tensor(7.0), f"w@{start}.m": whole[start : 30 * (rank + 1) // 12]}
        save_file(piece, tmp_path / f"optimizer-{rank}.safetensors")
    for start, stop in ((0, 30), (3, 28), (10, 15), (29, 30)):
        piece = Checkpoint(tmp_path).piece("w", start, stop)
        assert torch.equal(piece["m"], whole[start:stop]) and piece["step"] == 7.0
    (tmp_path / "optimizer-5.safetensors").unlink()
    assert torch.equal(Checkpoint(tmp_path).piece("w", 15, 30)["m"], whole[15:])
    with pytest.raises(ValueError, match=r"elements up to 12 of w@\d+.m, not to 30"):
        Checkpoint(tmp_path).piece("w", 0, 30)


class Rank:
    """One of two processes, run as a thread."""

    def __init__(self, rank: int, box: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._box, self._barrier = rank, box, barrier

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(20)
        values = list(self._box)
        self._barrier.wait(20)
        return values


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_of_the_second_process_is_reported_and_the_previous_checkpoint_used(
    tmp_path: Path, damage: str
) -> None:
    box, barrier = [None, None], threading.Barrier(2)
    for step in (2, 4):
        ranks = [
            threading.Thread(
                target=checkpoint.save_checkpoint,
                args=(tmp_path, step, {"w": torch.ones(8)}, {f"w@{4 * rank}.exp_avg": torch.full((4,), rank)}, {}),
                kwargs={"group": Rank(rank, box, barrier)},
            )
            for rank in range(2)
        ]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(30)
    newest = tmp_path / "step-00000004"
    assert newest_checkpoint(tmp_path, {}, warn=pytest.fail) == newest
    assert Checkpoint(newest).piece("w", 2, 6)["exp_avg"].tolist() == [0, 0, 1, 1]

    shard = newest / "optimizer-1.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    shard.write_bytes(data[:-3] if damage == "cut" else data)
    if damage == "delete":
        shard.unlink()
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, {}, warn=warnings.append) == tmp_path / "step-00000002"
    assert len(warnings) == 1 and "optimizer-1.safetensors" in warnings[0]
