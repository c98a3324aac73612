"""Checkpoints of one run: safetensors and JSON, written beside and renamed, with a manifest of hashes.

checkpoints/step-00000123/{model.safetensors, optimizer.safetensors, state.json, manifest.json}, and average.safetensors
where a run averages its weights. The last two are kept; a damaged one is skipped, said, and the one before it used.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from epochal.records import file_hash

KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the checkpoint of a step and drop all but the last two; returns its folder.

    `state` is plain JSON: what the loop needs besides tensors. `average` holds averaged weights by name, or nothing.
    """
    path = folder / f"step-{step:08d}"
    beside = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in _unshared(model).items()}, beside / "model.safetensors"
        )
        save_file(_optimizer_tensors(optimizer), beside / "optimizer.safetensors")
        if average:
            save_file(average, beside / "average.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        manifest = {item.name: file_hash(item) for item in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in _steps(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None = None,
    *,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Load the newest sound checkpoint into model, optimizer and average; returns its state, or None without one.

    Every damaged one is named through `say`.
    """
    for path in reversed(_steps(folder)):
        problem = _damage(path)
        if problem is not None:
            say(f"checkpoint {path} is damaged ({problem}); the one before it is used.")
            continue
        _load_model(model, load_file(path / "model.safetensors"))
        _load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        if average:
            for name, tensor in load_file(path / "average.safetensors").items():
                average[name].copy_(tensor)
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return state
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
        missing = {"model.safetensors", "optimizer.safetensors", "state.json"} - manifest.keys()
        return f"{min(missing)} is not in its manifest" if missing else None
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)


def _unshared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, a tied one once: everything else of a model follows from its config."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _load_model(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of every parameter as `index.key`; hyper-parameters are the Run's and need no saving."""
    return {
        f"{index}.{key}": value.detach().contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
