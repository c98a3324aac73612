"""An optimizer for a model out of a Run's choice, with the paper's decay mask; and what it did, for the record."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from epochal import optim, optimizer_config
from epochal.optim.base import Group
from triton_kernels.backend import backend

CLASSES: dict[type, Callable[..., torch.optim.Optimizer]] = {
    optimizer_config.AdamW: torch.optim.AdamW,
    optimizer_config.Signum: optim.Signum,
    optimizer_config.AdEMAMix: optim.AdEMAMix,
    optimizer_config.Mars: optim.Mars,
    optimizer_config.Lion: optim.Lion,
    optimizer_config.Muon: optim.Muon,
    optimizer_config.Fira: optim.Fira,
    optimizer_config.Spectra: optim.Spectra,
}
ENDS = ("embed_tokens", "lm_head")
LARGE = 10**9
"""Parameters from which Fira's published alpha is a sixteenth instead of a quarter."""


def build_optimizer(
    model: nn.Module,
    choice: optimizer_config.Optimizer,
    *,
    steps: int,
    warmup_steps: int = 0,
    decay: Sequence[optimizer_config.DecayGroup] = (),
) -> torch.optim.Optimizer:
    """Return the chosen optimizer over a model's parameters, at the peak learning rate.

    Every group's `decay_scale` says how much of the run's weight decay it gets; `steps` and `warmup_steps` (of the run)
    place the schedules that some optimizers have inside. Raises ValueError for a pattern that matches nothing.
    """
    groups = parameter_groups(model, choice.wd, decay, matrix=_matrix_rule(model, choice))
    for group in groups:
        is_matrix = group.pop("matrix")
        match choice:
            case optimizer_config.Fira() if is_matrix:
                group.update(_projection(model, choice, group["params"]))
            case optimizer_config.Muon():
                group["orthogonalize"] = is_matrix
    return CLASSES[type(choice)](groups, lr=choice.lr, **_keywords(choice, steps, warmup_steps))


def parameter_groups(
    model: nn.Module,
    wd: float,
    decay: Sequence[optimizer_config.DecayGroup] = (),
    *,
    matrix: Callable[[str, Tensor], bool] = lambda name, parameter: False,
) -> list[Group]:
    """Divide parameters by how much they decay, and by whether `matrix(name, parameter)` holds (the key `matrix`).

    The decay mask of the paper (spec section 3, point 4) unless a `decay` pattern says otherwise: token embedding,
    norm weights and biases are not decayed; all linear maps and the output head are. Raises ValueError for a pattern
    that matches no name.
    """
    named = list(model.named_parameters())
    for rule in decay:
        if not any(re.search(rule.pattern, name) for name, _ in named):
            raise ValueError(
                f"decay pattern {rule.pattern!r} matches none of {len(named)} parameters such as {named[0][0]!r}; "
                "correct it or leave it out."
            )
    found: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        found.setdefault((matrix(name, parameter), _decay_scale(name, parameter, decay)), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "param_names": [name for name, _ in members],
            "weight_decay": wd * scale,
            "decay_scale": scale,
            "matrix": is_matrix,
        }
        for (is_matrix, scale), members in sorted(found.items(), key=lambda item: item[0], reverse=True)
    ]


def _decay_scale(name: str, parameter: Tensor, decay: Sequence[optimizer_config.DecayGroup]) -> float:
    for rule in decay:
        if re.search(rule.pattern, name):
            return rule.scale
    return 1.0 if parameter.ndim >= 2 and "embed_tokens" not in name else 0.0


def _matrix_rule(model: nn.Module, choice: optimizer_config.Optimizer) -> Callable[[str, Tensor], bool]:
    """Return which parameters an optimizer with two rules treats as matrices."""
    match choice:
        case optimizer_config.Muon():
            return lambda name, parameter: parameter.ndim == 2 and not any(end in name for end in ENDS)
        case optimizer_config.Fira():
            # fira_param_groups refuses patterns that match nothing.
            _, projected = optim.fira_param_groups(model, 1, choice.patterns)
            chosen = {id(parameter) for parameter in projected["params"]}
            return lambda name, parameter: id(parameter) in chosen
    return lambda name, parameter: False


def _projection(model: nn.Module, choice: optimizer_config.Fira, matrices: list[nn.Parameter]) -> Group:
    """Return Fira's keys of a projected group, the published ones for this size where the choice leaves them open."""
    width = max(min(parameter.shape) for parameter in matrices)
    size = sum(parameter.numel() for parameter in model.parameters())
    alpha = choice.alpha if choice.alpha is not None else 0.25 if size < LARGE else 0.0625
    return {"rank": choice.rank or max(1, width // 4), "update_proj_gap": choice.gap, "alpha": alpha}


def _keywords(choice: optimizer_config.Optimizer, steps: int, warmup_steps: int) -> dict[str, Any]:
    """Return the constructor's keywords beside parameters, lr and weight decay."""
    match choice:
        case optimizer_config.AdamW():
            return {"betas": (choice.beta1, choice.beta2), "eps": choice.eps, "fused": True}
        case optimizer_config.Muon():
            matrix = {"momentum": choice.momentum, "nesterov": choice.nesterov, "ns_steps": choice.iterations}
            others = {"betas": (choice.beta1, choice.beta2), "eps": choice.eps}
            return {**matrix, **others, "adjust_lr_fn": "match_rms_adamw"}
        case optimizer_config.Fira():
            names = ("variant", "gamma", "scaling", "refresh", "rotate_states", "stagger", "eps")
            return {"betas": (choice.beta1, choice.beta2), **{name: getattr(choice, name) for name in names}}
        case optimizer_config.Spectra():
            clip = ("clip", "apply_to", "operator", "clip_decay", "clip_decay_fraction", "pre_clip")
            own = {name: getattr(choice, name) for name in clip}
            base = type(choice.base).__name__.lower()
            length = {"warmup_steps": warmup_steps, "total_steps": steps}
            published = (
                {} if choice.iterations is None else {"method": "newton_schulz", "iterations": choice.iterations}
            )
            return {"base": base, **own, **length, **published, **_base_keywords(choice.base, steps)}
        case _:
            return _base_keywords(choice, steps)


def _base_keywords(
    choice: optimizer_config.AdamW
    | optimizer_config.Signum
    | optimizer_config.AdEMAMix
    | optimizer_config.Mars
    | optimizer_config.Lion,
    steps: int,
) -> dict[str, Any]:
    """Return the hyper-parameters of a base optimizer, by the names its class and `Spectra` have for them."""
    match choice:
        case optimizer_config.Signum():
            return {"momentum": choice.momentum, "nesterov": choice.nesterov}
        case optimizer_config.AdEMAMix():
            rise = round(choice.warmup * steps) or None
            moments = {"betas": (choice.beta1, choice.beta2, choice.beta3), "alpha": choice.alpha, "eps": choice.eps}
            return {**moments, "alpha_warmup": rise, "beta3_warmup": rise}
        case optimizer_config.Mars():
            own = {"gamma": choice.gamma, "vector_lr_scale": choice.vector_lr_scale, "eps": choice.eps}
            return {"betas": (choice.beta1, choice.beta2), **own}
        case optimizer_config.Lion():
            return {"betas": (choice.beta1, choice.beta2)}
        case optimizer_config.AdamW():
            return {"betas": (choice.beta1, choice.beta2), "eps": choice.eps}


def optimizer_backend(choice: optimizer_config.Optimizer, device: torch.device) -> str:
    """Return the path of the optimizer's passes over matrices on a device, "triton" or "torch", for a record."""
    has_kernels = isinstance(choice, optimizer_config.Fira | optimizer_config.Spectra)
    return "triton" if has_kernels and backend(device) == "triton" else "torch"


# --- what happened, for log lines and records -----------------------------------------------------------------------


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """Return the largest singular value of every kind of matrix (`q_proj`, ..., `lm_head`), the most over its layers."""
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            wide = parameter.float() if parameter.shape[0] <= parameter.shape[1] else parameter.float().mT
            norm = float(torch.linalg.eigvalsh(wide @ wide.mT)[-1].clamp(min=0).sqrt())
            kind = name.removesuffix(".weight").split(".")[-1]
            found[kind] = max(found.get(kind, 0.0), norm)
    return found
