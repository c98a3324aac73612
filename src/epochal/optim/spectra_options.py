"""Options of `Spectra`: base optimizers, thresholds over a run, the selection of parameters, and checks.

Thresholds are functions of the step k (B,), counted from 0, and of the learning rate; they return float64 (B,).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from epochal.optim.adamw import ADAMW
from epochal.optim.ademamix import ADEMAMIX
from epochal.optim.base import Group, Rule
from epochal.optim.lion import LION
from epochal.optim.mars import MARS, check_mars_type
from epochal.optim.signum import SGDM, SIGNUM
from epochal.optim.spectral_clip import METHODS

BASES: dict[str, Rule] = {
    "adamw": ADAMW,
    "signum": SIGNUM,
    "ademamix": ADEMAMIX,
    "mars": MARS,
    "lion": LION,
    "sgdm": SGDM,
}
OPERATORS = ("soft", "hard", "normalize")

# Keys of a group that `clip_threshold` reads.
THRESHOLD_OPTIONS = (
    "clip",
    "base_lr",
    "warmup_steps",
    "total_steps",
    "clip_decay",
    "clip_decay_fraction",
    "clip_final_scale",
)

# Threshold relative to `clip` after a fraction x of the decay, which ends at the factor F.
DECAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda x, F: torch.ones_like(x),
    "linear": lambda x, F: F + (1 - F) * (1 - x),
    "sqrt": lambda x, F: F + (1 - F) * (1 - x.sqrt()),
    "cosine": lambda x, F: F + (1 - F) * (1 + torch.cos(math.pi * x)) / 2,
    "square": lambda x, F: F + (1 - F) * (1 - x * x),
    "exp": lambda x, F: F**x if F > 0 else 1 - x,
}
# Fraction of the way from `pre_clip` to `pre_clip_end` after a fraction x of the run; exp interpolates logarithms.
CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - torch.cos(math.pi * x)) / 2,
    "sqrt": torch.sqrt,
    "square": lambda x: x * x,
    "exp": lambda x: x,
}


def warmup_threshold(step: Tensor, lr: Tensor, c: float, group: Group) -> Tensor:
    """Threshold with c_k lr_k = c base_lr while k < warmup_steps, c afterwards."""
    rising = c * group["base_lr"] / lr.double().clamp(min=1e-10)
    return torch.where(step < group["warmup_steps"], rising, torch.full_like(rising, c))


def clip_threshold(step: Tensor, lr: Tensor, group: Group) -> Tensor:
    """Threshold on the update: warm-up, constant, then the decay over the last steps (published code)."""
    c = warmup_threshold(step, lr, group["clip"], group)
    if group["clip_decay"] == "constant":
        return c
    total = group["total_steps"]
    length = int(group["clip_decay_fraction"] * total)
    k = step.double()
    x = ((k - (total - length)) / max(length, 1)).clamp(0, 1)
    decayed = group["clip"] * DECAYS[group["clip_decay"]](x, group["clip_final_scale"])
    return torch.where((k >= total - length) & (k >= group["warmup_steps"]), decayed, c)


def pre_clip_threshold(step: Tensor, lr: Tensor, group: Group) -> Tensor:
    """Threshold on gradients: from pre_clip to pre_clip_end along a curve, or with the warm-up of the clip."""
    start, end, curve = group["pre_clip"], group["pre_clip_end"], group["pre_clip_curve"]
    if end is None or curve == "constant":
        return warmup_threshold(step, lr, start, group)
    x = CURVES[curve]((step.double() / group["total_steps"]).clamp(max=1))
    c: Tensor = start * (end / start) ** x if curve == "exp" else start + (end - start) * x
    return c


def is_clipped(group: Group) -> list[bool]:
    """Whether `apply_to` selects each parameter of a group."""
    apply_to, params = group["apply_to"], group["params"]
    if apply_to == "2d":
        return [p.ndim == 2 for p in params]
    if apply_to == "all":
        return [p.ndim >= 1 for p in params]
    if isinstance(apply_to, str):
        raise ValueError(f"apply_to must be '2d', 'all' or a list of regular expressions, got {apply_to!r}.")
    names = group.get("param_names")
    if names is None:
        raise ValueError(
            f"apply_to={list(apply_to)} searches names, but the parameters have none; pass (name, parameter) pairs, such "
            "as model.named_parameters()."
        )
    matches = (any(re.search(pattern, name) for pattern in apply_to) for name in names)
    return [p.ndim >= 1 and match for p, match in zip(params, matches, strict=True)]


def base_rule(base: str, hyper: Group) -> Rule:
    """Rule of the base optimizer; raises ValueError for an unknown name or hyper-parameter."""
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}.")
    for name in hyper:
        if name not in BASES[base].defaults:
            raise ValueError(f"base={base!r} has no hyper-parameter {name!r}; use {', '.join(BASES[base].defaults)}.")
    return BASES[base]


def check_patterns(groups: list[Group]) -> None:
    """Raise ValueError for an `apply_to` pattern that matches no name in any of its groups."""
    names: dict[str, list[str]] = {}
    for group in groups:
        for pattern in group["apply_to"] if not isinstance(group["apply_to"], str) else ():
            names.setdefault(pattern, []).extend(group["param_names"])
    for pattern, candidates in names.items():
        if not any(re.search(pattern, name) for name in candidates):
            raise ValueError(
                f"apply_to pattern {pattern!r} matches none of {len(candidates)} names such as {candidates[0]!r}; "
                "correct it or leave it out."
            )


def check_group(group: Group) -> None:
    """Raise ValueError for an unknown, wrong or unfit option of a group."""
    choices = {"operator": OPERATORS, "method": METHODS, "clip_decay": DECAYS, "pre_clip_curve": ("constant", *CURVES)}
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {group[name]!r}.")
    if group["iterations"] is not None and group["operator"] == "soft" and group["method"] != "newton_schulz":
        raise ValueError(
            f"iterations={group['iterations']} is the number of published steps; pass method='newton_schulz' with it, or "
            "leave it out."
        )
    for name in ("clip", "pre_clip", "pre_clip_end"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"{name} must be above 0, got {group[name]}.")
    moving = group["clip_decay"] != "constant" or (group["pre_clip_end"] and group["pre_clip_curve"] != "constant")
    if moving and not group["total_steps"]:
        raise ValueError("a threshold that changes over the run needs its length; pass total_steps.")
    if "mars_type" in group:
        check_mars_type(group["mars_type"])
    for p in group["params"]:
        if p.ndim >= 2 and p.shape[-2] % group["blocks"]:
            raise ValueError(
                f"blocks={group['blocks']} does not divide the {p.shape[-2]} rows of a parameter of shape "
                f"{tuple(p.shape)}; put it into a group with another number of blocks."
            )
