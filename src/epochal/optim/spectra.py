"""SPECTRA: any base optimizer with the singular values of its update clipped (Jiang, Semenov, Stich, arXiv 2603.14315).

    W_{k+1} = (1 - lr_k wd) W_k - alpha lr_k H_{c_k}(U_k),    alpha = sqrt(max(1, rows / columns)), 1 for vectors

U_k is the base's direction, H_c the soft spectral clip. Threshold: c_k lr_k = c base_lr while k < warmup_steps, then
c_k = c; it may decay over the last steps. Vectors are clipped only with `apply_to="all"`; embeddings and the head are
two-dimensional and so are clipped, as in the paper.

Differs from the published code (which `compat="upstream"` follows) in that
- U_k comes straight from the base, not from a difference of weights, and nothing is cloned;
- the clip is accurate to 1% whatever the conditioning, not ten steps in bfloat16;
- a vector is clipped as a 1 x n matrix, without the jump at ||u|| = c;
- Signum and SGDM start their momentum at zero, not at the weights;
- base_lr is each group's own learning rate, not one number;
- MARS vectors decay with their group, outside the clip.
Not reproduced under compat: for parameters of three or more axes upstream shares one bound over all their matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from epochal.optim.adamw import ADAMW
from epochal.optim.ademamix import ADEMAMIX
from epochal.optim.base import Group, MatrixOptimizer, Rule, State, per_item, scalar
from epochal.optim.lion import LION
from epochal.optim.mars import MARS, check_mars_type
from epochal.optim.muon import orthogonalize
from epochal.optim.signum import SGDM, SIGNUM
from epochal.optim.spectral_clip import (
    KERNELS,
    METHODS,
    hard_spectral_clip,
    operations,
    soft_clip_step,
    soft_spectral_clip,
)

BASES: dict[str, Rule] = {
    "adamw": ADAMW,
    "signum": SIGNUM,
    "ademamix": ADEMAMIX,
    "mars": MARS,
    "lion": LION,
    "sgdm": SGDM,
}
OPERATORS = ("soft", "hard", "normalize")

# How much of c is left after a fraction x of the decay, ending at the scale F.
DECAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda x, F: torch.ones_like(x),
    "linear": lambda x, F: F + (1 - F) * (1 - x),
    "sqrt": lambda x, F: F + (1 - F) * (1 - x.sqrt()),
    "cosine": lambda x, F: F + (1 - F) * (1 + torch.cos(math.pi * x)) / 2,
    "square": lambda x, F: F + (1 - F) * (1 - x * x),
    "exp": lambda x, F: F**x if F > 0 else 1 - x,
}
# How far the pre-clip threshold is from its start to its end; exp moves along a geometric line.
CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - torch.cos(math.pi * x)) / 2,
    "sqrt": torch.sqrt,
    "square": lambda x: x * x,
    "exp": lambda x: x,
}


def warmed(step: Tensor, lr: Tensor, c: float, *, base_lr: float, warmup_steps: int) -> Tensor:
    """Return c base_lr / lr while step < warmup_steps, c afterwards; step (B,) counts from 0, the result is float64."""
    rising = c * base_lr / lr.double().clamp(min=1e-10)
    return torch.where(step < warmup_steps, rising, torch.full_like(rising, c))


def clip_threshold(step: Tensor, lr: Tensor, group: Group) -> Tensor:
    """Return c_k (B,) in float64 for steps k (B,) counted from 0 (published code, section 1.5 of our notes on it)."""
    c = warmed(step, lr, group["clip"], base_lr=group["base_lr"], warmup_steps=group["warmup_steps"])
    if group["clip_decay"] == "constant":
        return c
    total = group["total_steps"]
    length = int(group["clip_decay_fraction"] * total)
    k = step.double()
    x = ((k - (total - length)) / max(length, 1)).clamp(0, 1)
    left = DECAYS[group["clip_decay"]](x, group["clip_final_scale"])
    return torch.where((k >= total - length) & (k >= group["warmup_steps"]), group["clip"] * left, c)


def _threshold_now(step: Tensor, group: Group) -> Tensor:
    return clip_threshold(step, scalar(group["lr"], step.double()), group)


def pre_clip_threshold(step: Tensor, lr: Tensor, group: Group) -> Tensor:
    """Return the threshold (B,) on gradients in float64 for steps (B,) counted from 0."""
    start, end, curve = group["pre_clip"], group["pre_clip_end"], group["pre_clip_curve"]
    if end is None or curve == "constant":
        return warmed(step, lr, start, base_lr=group["base_lr"], warmup_steps=group["warmup_steps"])
    x = CURVES[curve]((step.double() / group["total_steps"]).clamp(max=1))
    moved: Tensor = start * (end / start) ** x if curve == "exp" else start + (end - start) * x
    return moved


def clip_vectors(update: Tensor, c: Tensor, *, operator: str, compat: str | None) -> Tensor:
    """Clip vectors (B, n) by their norms, as the operator does 1 x n matrices; c (B,)."""
    norm = torch.linalg.vector_norm(update, dim=1)
    if operator == "normalize":
        return update / per_item(norm + 1e-7, update)
    ratio = norm / c.to(norm.dtype)
    scale = 1 / torch.sqrt(1 + ratio * ratio) if operator == "soft" else 1 / ratio.clamp(min=1)
    if compat == "upstream":
        scale = torch.where(ratio > 1, scale, 1.0)
    return update * per_item(scale, update)


def clip_matrices(update: Tensor, c: Tensor, group: Group) -> Tensor:
    """Return alpha H_c(U) for U (B, ..., rows, columns) and c (B,), every matrix cut into `blocks` parts by rows."""
    parts, alpha = in_blocks(update, group)
    thresholds = c[:, None].expand(parts.shape[:2])
    if group["operator"] == "normalize":
        out = orthogonalize(parts, steps=group["iterations"] or 5, dtype=group["dtype"] or torch.bfloat16)
    elif group["operator"] == "hard":
        out = hard_spectral_clip(parts, thresholds)
    else:
        options = {name: group[name] for name in ("method", "iterations", "dtype")}
        out = soft_spectral_clip(parts, thresholds, **options)
    return alpha * out.to(update.dtype).reshape(update.shape)


def in_blocks(tensor: Tensor, group: Group) -> tuple[Tensor, float]:
    """Return (B, ..., rows, columns) as (B, k, rows / blocks, columns), and the alpha of such a matrix."""
    rows, columns = tensor.shape[-2] // group["blocks"], tensor.shape[-1]
    return tensor.reshape(len(tensor), -1, rows, columns), math.sqrt(max(1.0, rows / columns))


def fused(update: Tensor, group: Group) -> bool:
    """Say whether the clip of an update (B, ...) happens with the step of the weights: where kernels do both."""
    soft = group["operator"] == "soft" and group["method"] in ("auto", "minimax")
    return soft and update.ndim > 2 and operations(update.device) is KERNELS


class Spectra(MatrixOptimizer):
    """A base optimizer whose update has bounded singular values; adds no tensor to the base's state.

    Every option but `base` and `compat` may be set per parameter group. In units: `clip` bounds the singular values of
    the base's update (about 1 per entry for Adam and sign updates), `pre_clip` those of the gradient.

    - `base`: adamw, signum, ademamix, mars, lion or sgdm; its hyper-parameters are further keywords (`betas`, `eps`,
      `momentum`, `nesterov`, `alpha`, `gamma`, ...), with the defaults of its own class.
    - `apply_to`: "2d", "all" (vectors by norm), or regular expressions searched in parameter names, for which the
      parameters must be given as (name, parameter) pairs. What is not selected takes the plain base step.
    - `operator`: "soft", "hard", or "normalize" (the Muon-like ablation of the paper, no threshold).
    - `method`, `iterations`, `dtype`: see `soft_spectral_clip`.
    - `blocks`: equal blocks of rows clipped as matrices of their own; 3 (or 3 x heads) for a fused QKV weight.
    - `warmup_steps`, `clip_decay` (constant, linear, sqrt, cosine, square, exp) over the last `clip_decay_fraction` of
      `total_steps` down to `clip_final_scale`: the schedule of the threshold; `base_lr` is the peak learning rate.
    - `pre_clip`, `pre_clip_end`, `pre_clip_curve`, then `grad_clip` (global L2 norm): gradients are clipped in place,
      in this order, before the base sees them. A non-finite gradient is left out of the global norm, and skipped.
    - `compat="upstream"`: the rules of the published code wherever they differ (see the top of this file).

    Raises ValueError for an option out of range, a pattern or a rule that selects nothing, and a parameter it was not
    constructed with, as flattening and sharding wrappers put in place of the matrices.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        base: str = "adamw",
        clip: float = 10.0,
        pre_clip: float | None = None,
        apply_to: str | Sequence[str] = "2d",
        operator: str = "soft",
        method: str = "auto",
        iterations: int | None = None,
        dtype: torch.dtype | None = None,
        blocks: int = 1,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        clip_decay: str = "constant",
        clip_decay_fraction: float = 0.2,
        clip_final_scale: float = 0.0,
        pre_clip_end: float | None = None,
        pre_clip_curve: str = "constant",
        grad_clip: float | None = None,
        base_lr: float | None = None,
        weight_decay: float = 0.1,
        compat: str | None = None,
        **hyper: Any,
    ) -> None:
        self.rule, self.compat, self.grad_clip = _checked_rule(base, compat, hyper), compat, grad_clip
        self.selected: dict[Tensor, bool] = {}
        if compat == "upstream" and method == "auto":
            method = "newton_schulz"
        if compat == "upstream" and base_lr is None:
            base_lr = float(lr)
        options = {
            "lr": lr,
            "clip": clip,
            "pre_clip": pre_clip,
            "apply_to": apply_to if isinstance(apply_to, str) else tuple(apply_to),
            "operator": operator,
            "method": method,
            "iterations": iterations,
            "dtype": dtype,
            "blocks": blocks,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "clip_decay": clip_decay,
            "clip_decay_fraction": clip_decay_fraction,
            "clip_final_scale": clip_final_scale,
            "pre_clip_end": pre_clip_end,
            "pre_clip_curve": pre_clip_curve,
            "base_lr": base_lr,
            "weight_decay": weight_decay,
        }
        super().__init__(params, {**self.rule.defaults, **hyper, **options})
        _check_patterns(self.param_groups)
        if self.selected and not any(self.selected.values()):
            raise ValueError(
                f"apply_to={apply_to!r} selects none of {len(self.selected)} parameters; use 'all' or other patterns, "
                "and a profile that keeps parameters whole."
            )

    def add_param_group(self, group: Group) -> None:
        """As torch's; checks the group and settles which of its parameters are clipped."""
        super().add_param_group(group)
        added = self.param_groups[-1]
        if added["base_lr"] is None:
            added["base_lr"] = float(added["lr"])
        _check_group(added)
        self.selected.update(zip(added["params"], _select(added), strict=True))

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Whether the parameter or its gradient is clipped, or the base looks at it as a whole."""
        matrix = parameter.ndim >= 2
        return self.selected[parameter] or (matrix and (group["pre_clip"] is not None or not self.rule.elementwise))

    def rebind(self, params: Mapping[Tensor, Tensor]) -> Self:
        """As the base class; a replacement is clipped if its parameter is."""
        other = super().rebind(params)
        other.selected = {params[p]: clipped for p, clipped in self.selected.items() if p in params}
        return other

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return the base's state; the published momentum starts as the weights after their first decay."""
        state = self.rule.init(parameter)
        if self.compat == "upstream" and "momentum_buffer" in state:
            state["momentum_buffer"].copy_(parameter).mul_(1 - float(group["lr"]) * group["weight_decay"])
        return state

    def bucket_key(self, parameter: Tensor, group: Group) -> Hashable:
        """Return whether the parameter is clipped."""
        if parameter not in self.selected:
            raise ValueError(
                f"Spectra was not constructed with the parameter of shape {tuple(parameter.shape)} that it is to step; "
                "something flattened or sharded the matrices: use a profile that keeps them whole, such as DDP."
            )
        return self.selected[parameter]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: pre-clip, global clip, base, clip; return the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["pre_clip"] is not None:
                self._pre_clip(group)
        if self.grad_clip is not None:
            self._clip_globally(self.grad_clip)
        super().step()
        return loss

    def step_bucket(self, parameters: list[Tensor], group: Group) -> None:
        """Update one bucket in place: clipped, or as the base would."""
        super().step_bucket(parameters, group if self.selected[parameters[0]] else {**group, "operator": None})

    def update(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return (alpha H_c(U), new state) of a bucket; (U, new state) for no operator, or if `apply_update` will clip."""
        update, new = self._direction(parameters, gradients, state, group)
        if group["operator"] is None or fused(update, group):
            return update, new
        c = _threshold_now(state["step"], group)
        if update.ndim == 2:
            return clip_vectors(update, c, operator=group["operator"], compat=self.compat), new
        return clip_matrices(update, c, group), new

    def apply_update(self, weights: Tensor, update: Tensor, step: Tensor, group: Group) -> Tensor:
        """Return the new weights of a bucket; a kernel clips as it moves them."""
        if group["operator"] is None or not fused(update, group):
            return super().apply_update(weights, update, step, group)
        (w, _), (u, alpha) = in_blocks(weights, group), in_blocks(update, group)
        lr = scalar(group["lr"], step.double())
        count = u.shape[0] * u.shape[1]
        moved = soft_clip_step(
            w.flatten(0, 1),
            u.flatten(0, 1),
            _threshold_now(step, group).repeat_interleave(u.shape[1], output_size=count),
            keep=(1 - lr * group["weight_decay"]).expand(count),
            rate=(alpha * lr).expand(count),
            iterations=group["iterations"],
            dtype=group["dtype"],
        )
        return moved.reshape(weights.shape)

    def _direction(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        update, new = self.rule.apply(gradients, state, group)
        if self.compat == "upstream" and self.rule is MARS and parameters.ndim < 3:
            # The published vectors decay by 0.1 at their own learning rate, and that ends inside U.
            inside = 0.1 * group["vector_lr_scale"] - group["weight_decay"]
            update = update + inside * parameters.to(update.dtype)
        return update, new

    def _pre_clip(self, group: Group) -> None:
        """Clip the gradients of all matrices of a group in place, whatever `apply_to` says."""
        for bucket in self.buckets(group):
            if bucket[0].ndim != 2:
                continue
            gradients = torch.stack([p.grad for p in bucket if p.grad is not None])
            step = torch.stack([self.state[p]["step"] for p in bucket])
            c = pre_clip_threshold(step, scalar(group["lr"], step.double()), group)
            options = {name: group[name] for name in ("method", "iterations", "dtype")}
            clipped = soft_spectral_clip(gradients, c, **options)
            torch._foreach_copy_([p.grad for p in bucket if p.grad is not None], list(clipped.unbind(0)))

    def _clip_globally(self, largest: float) -> None:
        """Scale all gradients in place so that their joint L2 norm is at most `largest`."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        device = gradients[0].device
        norms = torch.stack([norm.float().to(device) for norm in torch._foreach_norm(gradients)])
        total = torch.linalg.vector_norm(torch.where(torch.isfinite(norms), norms, 0.0))
        scale = (largest / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))

    def __getstate__(self) -> dict[str, Any]:
        mine = {name: getattr(self, name) for name in ("rule", "compat", "grad_clip", "selected")}
        return {**super().__getstate__(), **mine}


def _checked_rule(base: str, compat: str | None, hyper: Group) -> Rule:
    """Return the base by its name; raise ValueError for a name or a hyper-parameter that does not exist."""
    if base not in BASES:
        raise ValueError(f"base={base!r} is not offered; use one of {', '.join(BASES)}.")
    if compat not in (None, "upstream"):
        raise ValueError(f"compat={compat!r} names no published code; use 'upstream' or leave it out.")
    known = BASES[base].defaults
    for name in hyper:
        if name not in known:
            raise ValueError(f"base={base!r} has no hyper-parameter {name!r}; it has {', '.join(known)}.")
    return BASES[base]


def _select(group: Group) -> list[bool]:
    """Say for each parameter of a group whether it is clipped."""
    apply_to, params = group["apply_to"], group["params"]
    if apply_to == "2d":
        return [p.ndim == 2 for p in params]
    if apply_to == "all":
        return [p.ndim >= 1 for p in params]
    if isinstance(apply_to, str):
        raise ValueError(f"apply_to={apply_to!r} is no rule; use '2d', 'all' or a list of regular expressions.")
    names = group.get("param_names")
    if names is None:
        raise ValueError(
            f"apply_to={list(apply_to)} needs names to search; give the parameters as (name, parameter) pairs, such as "
            "model.named_parameters()."
        )
    return [
        p.ndim >= 1 and any(re.search(pattern, name) for pattern in apply_to)
        for p, name in zip(params, names, strict=True)
    ]


def _check_patterns(groups: list[Group]) -> None:
    """Raise ValueError for a pattern that matches no name in any of the groups that have it."""
    names: dict[str, list[str]] = {}
    for group in groups:
        for pattern in group["apply_to"] if not isinstance(group["apply_to"], str) else ():
            names.setdefault(pattern, []).extend(group["param_names"])
    for pattern, known in names.items():
        if not any(re.search(pattern, name) for name in known):
            raise ValueError(
                f"apply_to pattern {pattern!r} matches none of {len(known)} names such as {known[0]!r}; correct it or "
                "leave it out."
            )


def _check_group(group: Group) -> None:
    """Raise ValueError for an option of a group that no step could follow."""
    for name, known in (
        ("operator", OPERATORS),
        ("method", METHODS),
        ("clip_decay", tuple(DECAYS)),
        ("pre_clip_curve", ("constant", *CURVES)),
    ):
        if group[name] not in known:
            raise ValueError(f"{name}={group[name]!r} is not offered; use one of {', '.join(known)}.")
    for name in ("clip", "pre_clip", "pre_clip_end"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"{name}={group[name]} bounds no singular value; give a threshold above 0.")
    moving = group["clip_decay"] != "constant" or (group["pre_clip_end"] and group["pre_clip_curve"] != "constant")
    if moving and not group["total_steps"]:
        raise ValueError("a threshold that moves needs the length of the run; give total_steps.")
    if "mars_type" in group:
        check_mars_type(group["mars_type"])
    for p in group["params"]:
        if p.ndim >= 2 and p.shape[-2] % group["blocks"]:
            raise ValueError(
                f"blocks={group['blocks']} does not divide the {p.shape[-2]} rows of a parameter of shape "
                f"{tuple(p.shape)}; put it into a group with other blocks."
            )
