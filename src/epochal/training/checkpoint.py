"""Checkpoints of one run: safetensors and JSON with a manifest of hashes.

checkpoints/step-00000123/{model.safetensors, optimizer-0.safetensors, ..., state.json, manifest.json}; average.safetensors if
the run averages its weights; regularizer.safetensors if its regularizer has state. With the files of the model's config and
tokenizer it is a Hugging Face folder. Each process writes the optimizer state that it holds, by parameter name, so that any
number of processes under any preset can resume. The last two checkpoints are kept; a damaged one is skipped with a warning;
one of another job is set aside. state.json holds the meaning of the job (`epochal.meaning`).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from epochal.meaning import describe
from epochal.records import file_hash

KEEP = 2


class Group(Protocol):
    """The processes that write one checkpoint."""

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
    regularizer: dict[str, torch.Tensor] | None = None,
    settings: Callable[[Path], None] | None = None,
    group: Group = ALONE,
) -> Path:
    """Write the checkpoint of a step and return its folder. A collective.

    All but the last two checkpoints are deleted. `weights`, `average` and `regularizer` are whole tensors by name, used on rank 0
    only; `optimizer` is the named state of this process; `state` is JSON; `settings` writes the files of the model and its
    tokenizer into the folder. Raises OSError on every process if one of
    them could not write; the incomplete files are deleted.
    """
    # Written under another name and renamed when complete, so that a killed process leaves no incomplete checkpoint.
    path, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    main = group.rank == 0
    try:
        _on_all(group, _make_empty if main else None, temporary)
        _on_all(group, save_file, optimizer, temporary / f"optimizer-{group.rank}.safetensors")
        more = {"average": average or {}, "regularizer": regularizer or {}}
        _on_all(group, _finish if main else None, temporary, path, weights, more, {"step": step, **state}, settings)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in _steps(folder)[:-KEEP] if main else ():
        shutil.rmtree(old, ignore_errors=True)
    return path


def _on_all(group: Group, write: Callable[..., Any] | None, *arguments: Any) -> None:
    """Call `write` on the processes that have one; a failure is raised on all."""
    # A process that failed alone would leave the others blocked in the next collective.
    problem = None
    try:
        if write is not None:
            write(*arguments)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    problems = [text for text in group.gather(problem) if text is not None]
    if problems:
        raise OSError(problems[0])


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(
    temporary: Path,
    path: Path,
    weights: dict[str, torch.Tensor],
    more: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    settings: Callable[[Path], None] | None,
) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, temporary / "model.safetensors", metadata={"format": "pt"})  # transformers 4 wants it
    if settings is not None:
        settings(temporary)
    for name, tensors in more.items():
        if tensors:
            save_file(tensors, temporary / f"{name}.safetensors")
    # The manifest comes last and lists the hashes of all other files; the rename makes them visible together.
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = {item.name: file_hash(item) for item in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


class Checkpoint:
    """An intact checkpoint. Optimizer state is read lazily."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        # Opened, not loaded: of a sharded parameter only the needed piece is read.
        self._files = [safe_open(file, framework="pt") for file in sorted(path.glob("optimizer-*.safetensors"))]
        self._places: dict[str, dict[str, list[tuple[int, Any, str]]]] = {}
        for file in self._files:
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            for tensor in names:
                # Names are those of `Distributed.named_state`: name.key, or name@start.key for a piece.
                owner, _, key = tensor.rpartition(".")
                name, _, start = owner.partition("@")
                self._places.setdefault(name, {}).setdefault(key, []).append((int(start or 0), file, tensor))

    def load_weights(self, model: torch.nn.Module) -> None:
        """Copy the weights into a model that is not sharded yet."""
        _copy(load_file(self.path / "model.safetensors"), dict(model.named_parameters()))

    def load_average(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the averaged weights into tensors by name; a no-op if there are none."""
        if tensors:
            _copy(load_file(self.path / "average.safetensors"), tensors)

    def load_regularizer(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the state of the run's regularizer into tensors by name; a no-op if there are none."""
        if tensors:
            _copy(load_file(self.path / "regularizer.safetensors"), tensors)

    def whole(self, name: str) -> dict[str, torch.Tensor]:
        """Return the state of a parameter that was stepped whole; empty before its first step."""
        return {key: places[0][1].get_tensor(places[0][2]) for key, places in self._places.get(name, {}).items()}

    def piece(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Return elements [start, stop) of the state of a parameter stepped in pieces; 0-d tensors as they are."""
        return {key: _assembled(places, start, stop) for key, places in self._places.get(name, {}).items()}


@torch.no_grad()
def _copy(saved: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def _assembled(places: list[tuple[int, Any, str]], start: int, stop: int) -> torch.Tensor:
    """Concatenate elements [start, stop) of one state tensor from the pieces that processes wrote."""
    parts, end = [], start
    for begin, file, tensor in sorted(places, key=lambda place: place[0]):
        piece = file.get_slice(tensor)
        shape = piece.get_shape()
        if not shape:
            scalar: torch.Tensor = file.get_tensor(tensor)
            return scalar
        if begin <= end < begin + shape[0] and end < stop:
            parts.append(piece[end - begin : min(stop, begin + shape[0]) - begin])
            end = min(stop, begin + shape[0])
    if end != stop:
        raise ValueError(f"a checkpoint has elements up to {end} of {places[0][2]}, not to {stop}; delete it.")
    return torch.cat(parts)


def newest_checkpoint(folder: Path, meaning: Mapping[str, Any], *, warn: Callable[[str], None]) -> Path | None:
    """Return the newest intact checkpoint of a job of this meaning, or None.

    `warn` is called with a sentence for each checkpoint that is damaged, or of another job, which is renamed.
    """
    for path in reversed(_steps(folder)):
        problem = _damage(path)
        if problem is not None:
            warn(f"checkpoint {path} is damaged ({problem}); using the previous one.")
            continue
        before = json.loads((path / "state.json").read_text(encoding="utf-8")).get("meaning", {})
        if before == meaning:
            return path
        aside = path.with_name(f"aside-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warn(f"checkpoint {path} was made {describe(before, dict(meaning))}; renamed to {aside.name} and not used.")
    return None


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _damage(path: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is intact."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if file_hash(path / name) != expected:
                return f"{name} does not match its hash"
        missing = {"model.safetensors", "optimizer-0.safetensors", "state.json"} - manifest.keys()
        return f"{min(missing)} is not in its manifest" if missing else None
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
