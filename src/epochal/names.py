"""Names of jobs: every field that differs from the base of the scale is in the name.

Two different jobs of one campaign never share a name, and editing a recipe or a grid cannot give an old name a new
meaning. What all runs of a campaign share (batch, precision, model files) is guarded by `run.fingerprint` instead.
"""

import dataclasses
import functools
import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from epochal.run import Ensemble, Run, Samples, Targets, without_seed

IN_STEM = ("name", "model", "unique_tokens", "epochs", "optimizer", "init_seed", "order_seed")
REFERENCES = ("samples", "source", "init_from")
KINDS = ("regularizer",)  # fields with one of several kinds of values, whose kind is in the name
LONGEST_CHANGES = 100  # characters; names of jobs that read the run add theirs, and a file name ends at 255
# Fields whose values need another word in front of them than the name of the field, or none.
SHORT = {
    "distill": "text",
    "fraction": "",
    "samples": "",
    "source": "",
    "kd_weight": "",
    "init_from": "from",
    "data_order": "",
    "weight_averaging": "",
    "wd_schedule": "",
    "precision": "",
    "input_mask_prob": "mask",
    "holdout_tokens": "holdout",
}


def named_run(run: Run, base: Run) -> Run:
    """Return the run under the name that its differences from `base` give it."""
    optimizer = run.optimizer
    point = f"lr{_text(optimizer.lr)}", f"ep{run.epochs}", f"wd{_text(optimizer.wd)}"
    changes = "-".join([*_optimizer_parts(optimizer, base.optimizer), *_differing(run, base, skip=IN_STEM)])
    if len(changes) > LONGEST_CHANGES:
        changes = digest(changes)
    # Seeds come last, so that runs of one setting share a stem; see `run.without_seed`.
    seeds = f"s{run.init_seed}" if run.init_seed == run.order_seed else f"i{run.init_seed}-o{run.order_seed}"
    parts = [Path(run.model).stem, short_count(run.unique_tokens), *point, *([changes] if changes else []), seeds]
    return replace(run, name="-".join(parts))


@functools.cache  # a plan names the same subsets of members many times
def named_ensemble(runs: tuple[str, ...], average: str, **options: Any) -> Ensemble:
    """Return the ensemble of the named runs; `options` are further fields of `Ensemble`."""
    ensemble = Ensemble(name="unnamed", runs=runs, average=average, **options)
    stems, seeds = {without_seed(run) for run in runs}, [_seed(run) for run in runs]
    # Consecutive seeds of one setting read well; any other set of members becomes a digest.
    if len(stems) == 1 and None not in seeds and seeds == list(range(seeds[0] or 0, (seeds[0] or 0) + len(seeds))):
        members = f"{stems.pop()}-s{seeds[0]}" + (f"-{seeds[-1]}" if len(seeds) > 1 else "")
    else:
        members = f"{runs[0]}-k{len(runs)}-{digest(*runs)}"
    parts = [members, average]
    parts += [f"weights-{digest(*map(_text, ensemble.member_weights))}"] if ensemble.member_weights else []
    parts += [f"on-{Path(ensemble.data).stem}"] if ensemble.data else []
    parts += ["tasks", *ensemble.tasks] if ensemble.tasks else []
    parts += ["sharpness"] if ensemble.sharpness else []
    return replace(ensemble, name="-".join(parts))


def named_samples(source: str, tokens: int, max_length: int, **options: Any) -> Samples:
    """Return the Samples of a source; `options` are further fields of `Samples`."""
    samples = Samples(name="unnamed", source=source, tokens=tokens, max_length=max_length, **options)
    default = Samples(name="unnamed", source=source, tokens=tokens, max_length=max_length)
    parts = ["text", source, short_count(tokens), f"max{max_length}", *_differing(samples, default)]
    return replace(samples, name="-".join(parts))


def named_targets(source: str, unique_tokens: int, sequence_length: int, keep: int) -> Targets:
    """Return the soft targets of a source over the first `unique_tokens` of the training text."""
    name = f"targets-{source}-{short_count(unique_tokens)}-t{sequence_length}-keep{keep}"
    return Targets(name=name, source=source, unique_tokens=unique_tokens, sequence_length=sequence_length, keep=keep)


# --- parts of names ---------------------------------------------------------------------------------------------------


def short_count(tokens: int) -> str:
    """Shorten a count without loss: 24576 -> 24.576k, 200000000 -> 200m."""
    for size, letter in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.15g}{letter}"
    return str(tokens)


def digest(*names: str) -> str:
    """Return six hexadecimal digits that stand for other jobs' names inside a name."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:6]


def _seed(name: str) -> int | None:
    number = name.rpartition("-s")[2]
    return int(number) if number.isdecimal() else None


def _optimizer_parts(optimizer: Any, base: Any) -> list[str]:
    """Name an optimizer that differs from the base in more than lr and wd: spectra-adamw-clip2."""
    if type(optimizer) is not type(base):
        return _described(optimizer)
    parts = _differing(optimizer, base, skip=("lr", "wd", "base"))
    # SPECTRA's lr and wd are those of the optimizer that it wraps.
    inner = _optimizer_parts(optimizer.base, base.base) if hasattr(optimizer, "base") else []
    return [*parts, *(["base", *inner] if inner else [])]


def _described(value: Any) -> list[str]:
    """Name a nested value by its kind and the fields that differ from its defaults."""
    parts = [type(value).__name__.lower()]
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name in ("lr", "wd") or (item == field.default and not dataclasses.is_dataclass(item)):
            continue
        parts += _described(item) if dataclasses.is_dataclass(item) else [f"{field.name}{_text(item)}"]
    return parts


def _differing(value: Any, base: Any, skip: tuple[str, ...] = ()) -> list[str]:
    parts = []
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name in skip or item == getattr(base, field.name):
            continue
        word = _word(field.name)
        if field.name in KINDS and dataclasses.is_dataclass(item):
            parts += _described(item)
        elif dataclasses.is_dataclass(item):
            inner = [f"{_word(f.name)}{_text(getattr(item, f.name), f.name)}" for f in _set_fields(item)]
            parts.append("-".join([word, *inner]))
        else:
            parts.append(f"{word}{'-' * (bool(word) and field.name in REFERENCES)}{_text(item, field.name)}")
    return parts


def _word(field: str) -> str:
    return SHORT.get(field, field).replace("_", "-")


def _set_fields(value: Any) -> list[Any]:
    return [field for field in fields(value) if getattr(value, field.name) != field.default]


def _text(value: Any, field: str = "") -> str:
    """Write one value as part of a name; references to other jobs become digests, so names stay short."""
    if field in REFERENCES:
        return digest(str(value))
    if isinstance(value, bool | None):
        return str(value).lower()
    if isinstance(value, int | float):
        # 12 digits: 0.1 stays 0.1, and values of a grid stay distinct.
        return f"{value:.12g}".replace("+", "")  # 1e+20
    if isinstance(value, tuple):
        return digest(*map(repr, value))
    # A path or a pattern may hold characters that a file name cannot.
    text = Path(value).stem if "/" in value else value
    return text if text.isascii() and all(c.isalnum() or c in "._-" for c in text) else digest(value)
