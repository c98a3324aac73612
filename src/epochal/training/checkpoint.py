"""Checkpoints of one run: safetensors and JSON, written beside and renamed, with a manifest of hashes.

checkpoints/step-00000123/{model.safetensors, optimizer-0.safetensors, ..., state.json, manifest.json}, and
average.safetensors where a run averages its weights. Each process writes the optimizer state that it holds, by parameter
name, so any number of processes under any profile can go on from it. The last two are kept; a damaged one is skipped,
said, and the one before it used.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from epochal.records import file_hash

KEEP = 2


class Group(Protocol):
    """The processes that write a checkpoint together."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in order of ranks."""


class Alone:
    """One process."""

    rank = 0

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]


ALONE = Alone()


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    average: dict[str, torch.Tensor] | None = None,
    *,
    group: Group = ALONE,
) -> Path:
    """Write the checkpoint of a step and drop all but the last two; returns its folder. All processes must call it.

    `weights` and `average` (or nothing) are whole tensors by name, and matter on rank 0; `optimizer` is the named state
    that this process holds; `state` is plain JSON: what the loop needs besides tensors. Raises OSError on every process
    when one of them could not write; nothing half-written is left.
    """
    path, beside = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    main = group.rank == 0
    try:
        _together(group, _fresh, beside if main else None)
        _together(group, save_file, optimizer, beside / f"optimizer-{group.rank}.safetensors")
        _together(group, _finish if main else _nothing, beside, path, weights, average or {}, {"step": step, **state})
    finally:
        if main:
            shutil.rmtree(beside, ignore_errors=True)
    for old in _steps(folder)[:-KEEP] if main else ():
        shutil.rmtree(old, ignore_errors=True)
    return path


def _together(group: Group, work: Callable[..., Any], *arguments: Any) -> None:
    """Do a part of the work; when it fails for one process it fails for all, so that none waits for ever."""
    problem = None
    try:
        work(*arguments)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    problems = [text for text in group.gather(problem) if text is not None]
    if problems:
        raise OSError(problems[0])


def _nothing(*_: Any) -> None:
    """What the other processes do meanwhile."""


def _fresh(beside: Path | None) -> None:
    if beside is not None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)


def _finish(
    beside: Path,
    path: Path,
    weights: dict[str, torch.Tensor],
    average: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, beside / "model.safetensors")
    if average:
        save_file(average, beside / "average.safetensors")
    (beside / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = {item.name: file_hash(item) for item in sorted(beside.iterdir())}
    (beside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


class Checkpoint:
    """A sound checkpoint. Optimizer state is read when asked for, and of a piece only the piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        self._files = [safe_open(file, framework="pt") for file in sorted(path.glob("optimizer-*.safetensors"))]
        self._places: dict[str, dict[str, list[tuple[int, Any, str]]]] = {}
        for file in self._files:
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            for tensor in names:
                owner, _, key = tensor.rpartition(".")
                name, _, start = owner.partition("@")
                self._places.setdefault(name, {}).setdefault(key, []).append((int(start or 0), file, tensor))

    def load_weights(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model that no backend has shared out yet."""
        _copy(load_file(self.path / "model.safetensors"), dict(model.named_parameters()))

    def load_average(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the averaged weights into tensors by name; does nothing where there are none to fill."""
        if tensors:
            _copy(load_file(self.path / "average.safetensors"), tensors)

    def whole(self, name: str) -> dict[str, torch.Tensor]:
        """Return the state tensors of a parameter that was stepped whole; none for one that had no step yet."""
        return {key: places[0][1].get_tensor(places[0][2]) for key, places in self._places.get(name, {}).items()}

    def piece(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Return elements [start, stop) of the state of a parameter that was stepped in pieces; 0-d tensors as they are."""
        return {key: _assembled(places, start, stop) for key, places in self._places.get(name, {}).items()}


@torch.no_grad()
def _copy(saved: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def _assembled(places: list[tuple[int, Any, str]], start: int, stop: int) -> torch.Tensor:
    """Put the elements [start, stop) of one state tensor together from the pieces that processes wrote."""
    parts, end = [], start
    for begin, file, tensor in sorted(places, key=lambda place: place[0]):
        piece = file.get_slice(tensor)
        shape = piece.get_shape()
        if not shape:
            found: torch.Tensor = file.get_tensor(tensor)
            return found
        if begin <= end < begin + shape[0] and end < stop:
            parts.append(piece[end - begin : min(stop, begin + shape[0]) - begin])
            end = min(stop, begin + shape[0])
    if end != stop:
        raise ValueError(f"a checkpoint has elements up to {end} of {places[0][2]}, not to {stop}; remove it.")
    return torch.cat(parts)


def newest_checkpoint(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """Return the folder of the newest sound checkpoint, or None; every damaged one is named through `say`."""
    for path in reversed(_steps(folder)):
        problem = _damage(path)
        if problem is None:
            return path
        say(f"checkpoint {path} is damaged ({problem}); the one before it is used.")
    return None


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if file_hash(path / name) != expected:
                return f"{name} does not match its hash"
        missing = {"model.safetensors", "optimizer-0.safetensors", "state.json"} - manifest.keys()
        return f"{min(missing)} is not in its manifest" if missing else None
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
