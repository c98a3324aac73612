"""Builds the optimizer of a Run over a model, with the paper's decay mask; measures spectral norms for the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epochal import optim, optimizer_config
from epochal.optim.base import Group
from epochal.optim.roles import parameter_roles
from triton_kernels.backend import backend

# Roles of the matrices that Muon leaves to AdamW, and their names in a record, whatever the architecture calls them.
ENDS = {"embedding": "embed_tokens", "head": "lm_head"}
# Parameters from which Fira's published alpha is a sixteenth instead of a quarter.
LARGE = 10**9


def build_optimizer(
    model: nn.Module, choice: optimizer_config.Optimizer, *, steps: int, warmup_steps: int = 0
) -> torch.optim.Optimizer:
    """Return the optimizer that a Run chose, over a model's parameters, at the peak lr.

    Args:
        model: its parameters must be whole, not sharded yet.
        choice: the optimizer of the Run.
        steps, warmup_steps: of the Run; the schedules inside some optimizers depend on them.

    Returns:
        An optimizer whose groups have the key `decay_scale`, the share of the Run's weight decay that they get.

    Raises:
        ValueError: for a pattern in `choice` that matches no parameter.
    """
    groups = parameter_groups(model, choice.wd, matrix=_matrix_rule(model, choice))
    for group in groups:
        is_matrix = group.pop("matrix")
        match choice:
            case optimizer_config.Fira() if is_matrix:
                group.update(_projection(model, choice, group["params"]))
            case optimizer_config.Muon():
                group["orthogonalize"] = is_matrix
    keywords = _keywords(choice, steps)
    match choice:
        case optimizer_config.AdamW():
            # One kernel for all parameters; otherwise the step of a small model is bound by launches.
            keywords["fused"] = True
        case optimizer_config.Spectra():
            # The threshold has a schedule, which follows the Run's.
            keywords.update(warmup_steps=warmup_steps, total_steps=steps)
    optimizer: torch.optim.Optimizer = getattr(optim, type(choice).__name__)(groups, lr=choice.lr, **keywords)
    return optimizer


def parameter_groups(
    model: nn.Module, wd: float, *, matrix: Callable[[str, Tensor], bool] = lambda name, parameter: False
) -> list[Group]:
    """Group parameters by whether they decay and by whether `matrix(name, parameter)` holds (the key `matrix`).

    The decay mask of the paper (docs/infinite_compute.md section 3, point 4): all linear maps and the output head
    decay; token embedding, norm weights and biases do not.
    """
    roles = parameter_roles(model)
    named: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0 if parameter.ndim >= 2 and roles[name] != "embedding" else 0.0
        named.setdefault((matrix(name, parameter), scale), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "param_names": [name for name, _ in members],
            "weight_decay": wd * scale,
            "decay_scale": scale,
            "matrix": is_matrix,
        }
        # Sorted, so that the order of groups, and with it of optimizer state, is the same for every model.
        for (is_matrix, scale), members in sorted(named.items(), key=lambda item: item[0], reverse=True)
    ]


def _matrix_rule(model: nn.Module, choice: optimizer_config.Optimizer) -> Callable[[str, Tensor], bool]:
    """Return which parameters an optimizer with two rules treats as matrices."""
    match choice:
        case optimizer_config.Muon():
            roles = parameter_roles(model)
            return lambda name, parameter: parameter.ndim == 2 and roles[name] not in ENDS
        case optimizer_config.Fira():
            _, projected = optim.fira_param_groups(model, 1, choice.patterns)  # refuses patterns without a match
            chosen = {id(parameter) for parameter in projected["params"]}
            return lambda name, parameter: id(parameter) in chosen
    return lambda name, parameter: False


def _projection(model: nn.Module, choice: optimizer_config.Fira, matrices: list[nn.Parameter]) -> Group:
    """Return the keys of a projected group; rank and alpha default to the published choices for this size."""
    width = max(min(parameter.shape) for parameter in matrices)
    size = sum(parameter.numel() for parameter in model.parameters())
    alpha = choice.alpha if choice.alpha is not None else 0.25 if size < LARGE else 0.0625
    return {"rank": choice.rank or max(1, width // 4), "update_proj_gap": choice.gap, "alpha": alpha}


def _keywords(choice: optimizer_config.Optimizer, steps: int) -> dict[str, Any]:
    """Return the keywords of the optimizer's class: the fields of the config, except where the two differ."""
    keywords = {field.name: getattr(choice, field.name) for field in dataclasses.fields(choice)}
    # The learning rate and, per group, the weight decay are passed by the caller.
    keywords = {name: value for name, value in keywords.items() if name not in ("lr", "wd")}
    betas = tuple(keywords.pop(name) for name in ("beta1", "beta2", "beta3") if name in keywords)
    if betas:
        keywords["betas"] = betas

    match choice:
        case optimizer_config.AdEMAMix():
            warmup = round(keywords.pop("warmup") * steps) or None
            keywords.update(alpha_warmup=warmup, beta3_warmup=warmup)
        case optimizer_config.Muon():
            # torch's name for them, and the scale with which one learning rate suits matrices and vectors.
            keywords.update(ns_steps=keywords.pop("iterations"), adjust_lr_fn="match_rms_adamw")
        case optimizer_config.Fira():
            for name in ("rank", "gap", "alpha", "patterns"):  # in the projected group, see `_projection`
                del keywords[name]
        case optimizer_config.Spectra():
            keywords["base"] = type(choice.base).__name__.lower()
            # The number of steps belongs to the published method only.
            if choice.iterations is not None:
                keywords["method"] = "newton_schulz"
            keywords.update(_keywords(choice.base, steps))  # the wrapper takes the hyper-parameters of its base too
    return keywords


def optimizer_backend(choice: optimizer_config.Optimizer, device: torch.device) -> str:
    """Return how the optimizer's element-wise passes run: "compiled", or "torch" operations and kernels."""
    own = not isinstance(choice, optimizer_config.AdamW)
    return "compiled" if own and backend(device) == "triton" else "torch"


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """Return the largest singular value of each kind of matrix (q_proj, ..., lm_head), over layers."""
    norms: dict[str, float] = {}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # From the Gram matrix of the smaller side: only the largest value is needed, and squaring keeps its
            # digits.
            wide = parameter.float() if parameter.shape[0] <= parameter.shape[1] else parameter.float().mT
            norm = float(torch.linalg.eigvalsh(wide @ wide.mT)[-1].clamp(min=0).sqrt())
            kind = ENDS.get(roles[name]) or name.removesuffix(".weight").split(".")[-1]
            norms[kind] = max(norms.get(kind, 0.0), norm)
    return norms
