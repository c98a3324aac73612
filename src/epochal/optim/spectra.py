"""SPECTRA: any base optimizer with the singular values of its update clipped (Jiang, Semenov, Stich, arXiv 2603.14315).

    W_{k+1} = (1 - lr_k wd) W_k - alpha lr_k H_{c_k}(U_k),    alpha = sqrt(max(1, rows / columns)), 1 for vectors

U_k is the direction of the base optimizer, H_c the soft spectral clip. During warm-up the threshold satisfies
c_k lr_k = c base_lr; afterwards c_k = c, and it may decay over the last steps. Vectors are clipped only with
`apply_to="all"`; embeddings and the head have two axes and so are clipped, as in the paper.

Differs from the published code (which `compat="upstream"` follows) in that
- U_k comes straight from the base, not from a difference of weights, and nothing is cloned;
- the clip is accurate to 1%, not ten steps in bfloat16 (see `epochal.optim.spectral_clip` for the conditions);
- a vector is clipped as a 1 x n matrix, without the jump at ||u|| = c;
- Signum and SGDM start their momentum at zero, not at the weights;
- base_lr is each group's own learning rate, not one number;
- MARS vectors decay with their group, outside the clip.
Not reproduced under compat: for parameters with three or more axes upstream shares one bound over all their matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from epochal.optim.base import Group, MatrixOptimizer, State, Update, fused, per_item, scalar
from epochal.optim.mars import MARS
from epochal.optim.muon import orthogonalize
from epochal.optim.spectra_options import (
    THRESHOLD_OPTIONS,
    base_rule,
    check_group,
    check_patterns,
    clip_threshold,
    is_clipped,
    pre_clip_threshold,
)
from epochal.optim.spectral_clip import hard_spectral_clip, soft_spectral_clip


class Spectra(MatrixOptimizer):
    """A base optimizer whose update has bounded singular values; adds no tensor to the base's state.

    Every option but `base` and `compat` may be set per parameter group. `clip` bounds the singular values of the base's
    update (about 1 per entry for Adam and sign updates), `pre_clip` those of the gradient.

    - `base`: adamw, signum, ademamix, mars, lion or sgdm; its hyper-parameters are further keywords (`betas`, `eps`,
      `momentum`, `nesterov`, `alpha`, `gamma`, ...), with the defaults of its own class.
    - `apply_to`: "2d", "all" (vectors by norm), or regular expressions searched in parameter names, for which the
      parameters must be (name, parameter) pairs. Parameters that are not selected take the plain base step.
    - `operator`: "soft", "hard", or "normalize" (the Muon-like ablation of the paper, no threshold).
    - `method`, `iterations`, `dtype`: see `soft_spectral_clip`.
    - `blocks`: number of equal blocks of rows that are clipped separately; 3 (or 3 x heads) for a fused QKV weight.
    - `warmup_steps`, `clip_decay` (constant, linear, sqrt, cosine, square, exp) over the last `clip_decay_fraction` of
      `total_steps` down to `clip_final_scale`: the schedule of the threshold; `base_lr` is the peak learning rate.
    - `pre_clip`, `pre_clip_end`, `pre_clip_curve`, then `grad_clip` (global L2 norm): gradients are clipped in place,
      in this order, before the base sees them. A non-finite gradient is excluded from the global norm, and skipped.
    - `compat="upstream"`: the rules of the published code wherever they differ (see the top of this file).

    Raises ValueError for an option out of range, a pattern or `apply_to` that selects nothing, and for stepping a
    parameter it was not constructed with, such as the flat shards of a wrapper.
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
        self.rule, self.compat, self.grad_clip = base_rule(base, hyper), compat, grad_clip
        self.selected: dict[Tensor, bool] = {}
        if compat not in (None, "upstream"):
            raise ValueError(f"compat must be 'upstream' or None, got {compat!r}.")
        if compat == "upstream":
            # The published code has one clip and one base learning rate.
            method = "newton_schulz" if method == "auto" else method
            base_lr = float(lr) if base_lr is None else base_lr
        apply_to = apply_to if isinstance(apply_to, str) else tuple(apply_to)
        step = {"lr": lr, "weight_decay": weight_decay, "clip": clip, "apply_to": apply_to, "blocks": blocks}
        how = {"operator": operator, "method": method, "iterations": iterations, "dtype": dtype}
        run = {"warmup_steps": warmup_steps, "total_steps": total_steps, "base_lr": base_lr}
        decay = {"clip_decay_fraction": clip_decay_fraction, "clip_final_scale": clip_final_scale}
        pre = {"pre_clip": pre_clip, "pre_clip_end": pre_clip_end, "pre_clip_curve": pre_clip_curve}
        options = {**step, **how, **run, "clip_decay": clip_decay, **decay, **pre}
        super().__init__(params, {**self.rule.defaults, **hyper, **options})
        check_patterns(self.param_groups)
        # Nothing selected means a wrapper has flattened the matrices, or a pattern is wrong.
        if self.selected and not any(self.selected.values()):
            raise ValueError(
                f"apply_to={apply_to!r} selects none of {len(self.selected)} parameters; use 'all' or other patterns, "
                "and a parallelism preset that keeps parameters whole."
            )

    def settle(self, group: Group) -> None:
        """Check a group and determine which of its parameters are clipped."""
        if group["base_lr"] is None:
            group["base_lr"] = float(group["lr"])
        check_group(group)
        # By parameter: a bucket must be clipped as a whole or not at all.
        self.selected.update(zip(group["params"], is_clipped(group), strict=True))
        super().settle(group)

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Whether the parameter or its gradient is clipped, or the base's update mixes its elements."""
        matrix = parameter.ndim >= 2
        # pre_clip changes the gradient of every matrix, whatever `apply_to` selects.
        return self.selected[parameter] or (matrix and (group["pre_clip"] is not None or not self.rule.elementwise))

    def rounding(self, device: torch.device) -> float:
        """Return that of the least precise clip of the groups."""
        return max(torch.finfo(_arithmetic(group, device)).eps for group in self.param_groups)

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
        """Whether the parameter is clipped."""
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

    def step_bucket(self, parameters: list[Tensor], group: Group) -> Tensor:
        """Update one bucket in place: clipped, or as the base would."""
        if not self.selected[parameters[0]]:
            group = {**group, "operator": None}
            if self._decays_inside(parameters[0].ndim):
                group["weight_decay"] = 0.1 * group["vector_lr_scale"]
        return super().step_bucket(parameters, group)

    def _decays_inside(self, axes: int) -> bool:
        # The published vectors of MARS decay by 0.1 at their own learning rate, inside U.
        return self.compat == "upstream" and self.rule is MARS and axes < 2

    def direction(self, parameter: Tensor, group: Group) -> tuple[Update, Group]:
        """Return the base's rule."""
        return self.rule.of(group)

    def transform(self, update: Tensor, weights: Tensor, step: Tensor, group: Group) -> Tensor:
        """Return H_c(U) of a bucket; U without an operator."""
        if group["operator"] is None:
            return update
        if self._decays_inside(update.ndim - 1):
            update = update + (0.1 * group["vector_lr_scale"] - group["weight_decay"]) * weights
        c = _threshold_now(step, group)
        if update.ndim == 2:
            return clip_vectors(update, c, operator=group["operator"], compat=self.compat)
        return clip_matrices(update, c, group)

    def step_scale(self, parameter: Tensor, group: Group) -> float:
        """Return alpha of a matrix that is clipped."""
        if group["operator"] is None or parameter.ndim < 2:
            return 1.0
        # Of the blocks: a fused QKV weight takes the same step as three separate matrices.
        return math.sqrt(max(1.0, parameter.shape[-2] // group["blocks"] / parameter.shape[-1]))

    def _pre_clip(self, group: Group) -> None:
        """Clip the gradients of all matrices of a group in place, whatever `apply_to` selects."""
        for bucket in self.buckets(group):
            if bucket[0].ndim != 2:
                continue
            gradients = [p.grad for p in bucket if p.grad is not None]
            step = torch.stack([self.state[p]["step"] for p in bucket])
            c = pre_clip_threshold(step, scalar(group["lr"], step.double()), group)
            torch._foreach_copy_(gradients, list(_soft_clip(torch.stack(gradients), c, group).unbind(0)))

    def _clip_globally(self, max_norm: float) -> None:
        """Scale all gradients in place so that their joint L2 norm is at most `max_norm`."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        device = gradients[0].device
        norms = torch.stack([norm.float().to(device) for norm in torch._foreach_norm(gradients)])
        # A non-finite gradient is skipped later; in the norm it would scale all others to zero.
        total = torch.linalg.vector_norm(torch.where(torch.isfinite(norms), norms, 0.0))
        # The formula of torch.nn.utils.clip_grad_norm_.
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "compat", "grad_clip", "selected")}
        return {**super().__getstate__(), **own}


def clip_vectors(update: Tensor, c: Tensor, *, operator: str, compat: str | None) -> Tensor:
    """Clip vectors (B, n) at c (B,) by their norms."""
    # A vector is a 1 x n matrix, whose one singular value is its norm.
    norm = torch.linalg.vector_norm(update, dim=1)
    if operator == "normalize":
        return update / per_item(norm + 1e-7, update)
    ratio = norm / c.to(norm.dtype)
    scale = 1 / torch.sqrt(1 + ratio * ratio) if operator == "soft" else 1 / ratio.clamp(min=1)
    if compat == "upstream":  # does not touch vectors below the threshold
        scale = torch.where(ratio > 1, scale, 1.0)
    return update * per_item(scale, update)


def clip_matrices(update: Tensor, c: Tensor, group: Group) -> Tensor:
    """Return H_c(U) for U (B, ..., rows, columns) and c (B,).

    Every matrix is cut into `blocks` parts by rows, which are clipped separately.
    """
    parts = update.reshape(len(update), -1, update.shape[-2] // group["blocks"], update.shape[-1])
    thresholds = c[:, None].expand(parts.shape[:2])
    if group["operator"] == "normalize":
        out = orthogonalize(parts, steps=group["iterations"] or 5, dtype=group["dtype"] or torch.bfloat16)
    elif group["operator"] == "hard":
        out = hard_spectral_clip(parts, thresholds)
    else:
        out = _soft_clip(parts, thresholds, group)
    return out.to(update.dtype).reshape(update.shape)


def _soft_clip(x: Tensor, c: Tensor, group: Group) -> Tensor:
    return soft_spectral_clip(x, c, method=group["method"], iterations=group["iterations"], dtype=group["dtype"])


def _arithmetic(group: Group, device: torch.device) -> torch.dtype:
    """Return the dtype of the products of a group's clip."""
    if group["dtype"] is not None:
        dtype: torch.dtype = group["dtype"]
        return dtype
    if group["operator"] == "normalize" or group["method"] == "newton_schulz":
        return torch.bfloat16
    exact = group["method"] == "exact" or group["operator"] == "hard" or device.type == "cpu"
    return torch.float32 if exact else torch.float16


def _threshold_now(step: Tensor, group: Group) -> Tensor:
    lr = group["lr"]
    lr = lr.to(step.device, torch.float64) if isinstance(lr, Tensor) else step.new_full((), lr, dtype=torch.float64)
    # Not the group: a compiled function would be compiled again for every learning rate in it.
    return _threshold(step, lr, {name: group[name] for name in THRESHOLD_OPTIONS})


@fused
def _threshold(step: Tensor, lr: Tensor, options: Group) -> Tensor:
    return clip_threshold(step, lr, options)
