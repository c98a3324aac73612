"""Fira (Chen et al. 2024, arXiv 2410.01623): Adam in a low-rank subspace, plus the rest of the gradient, scaled.

    R = P^T G;  M, V = Adam's moments of R;  N = M / (sqrt(V) + eps);  phi_i = ||N_i|| / (||R_i|| + 1e-8)
    S = phi * (G - alpha P R), limited to grow by gamma a step;  W <- (1 - lr wd)(W - step (alpha P N + S))

Shapes: G, W (B, m, n), a batch of equal shapes; side "left": P (B, m, r), R, M, V, N (B, r, n), phi (B, 1, n);
side "right" is the mirror image: Q (B, r, n), R (B, m, r), phi (B, m, 1). `std` projects the smaller side.

The residual is never formed: with f = phi / L the step is f*G + P (alpha N - alpha f*R), two products with a basis, and
||S||^2 = sum_i phi_i^2 (||G_i||^2 - alpha (2 - alpha) ||R_i||^2) for an orthonormal P.

Variants: "code", the default, is the published package, whose numbers the paper prints; "paper" is Algorithm 1 (alpha
on the whole update, the true residual, bias correction before phi and the limiter); "galore" has no S.

Differs from the published code in: a limiter that saw a zero norm starts afresh instead of throttling for 1,400 steps
(`limiter="compat"` keeps that); moments, basis and limiter in float32 whatever the weights; signs of the basis kept
from one refresh to the next; a gradient that is not finite, or whose squares are not, skips its parameter.
For the 2-D weights of attention and MLP blocks; embeddings, head and vectors belong into a group without `rank`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from epochal.optim.base import (
    Group,
    MatrixOptimizer,
    State,
    new_state,
    per_item,
    round_stochastically,
    stack,
    state_dtype,
)
from epochal.optim.products import matmul
from epochal.optim.projection import METHODS, PROJ_TYPES, compute_basis, project, projected_side, rotate_moments
from triton_kernels.backend import backend
from triton_kernels.fira_step import fira_adam, fira_project, fira_update

VARIANTS = ("code", "paper", "galore")
FLOOR = 1e-8  # of the two ratios, phi and the limiter's; a literal in the published code

logger = logging.getLogger(__name__)


class Hyper(NamedTuple):
    """What the hyper-parameters come to, as 0-d tensors, so that a new value recompiles nothing.

    `lr`, `low_lr` = lr alpha and the betas are float64; the others meet matrices and have the state's dtype: the
    moments' weights 1 - beta (from the Python numbers: 1 - 0.999 in float32 is off by 5e-5), `removed` = alpha
    (2 - alpha), `decay` = 1 - lr wd, and `eps`, never 0, so that a zero gradient has a direction.
    """

    lr: Tensor
    low_lr: Tensor
    beta1: Tensor
    beta2: Tensor
    mean_weight: Tensor
    square_weight: Tensor
    eps: Tensor
    alpha: Tensor
    removed: Tensor
    gamma: Tensor
    decay: Tensor


class Form(NamedTuple):
    """What selects code rather than numbers; gamma=None is `limiter="off"` here."""

    side: str
    variant: str = "code"
    scaling: str = "column"
    limiter: str = "mended"
    correct_bias: bool = True
    decays: bool = True


# --- the mathematics, on a batch (B, m, n) -------------------------------------------------------------------------


def square_sums(matrix: Tensor, side: str) -> Tensor:
    """Return the squared norms along the projected axis, kept as 1: (B, 1, n) for "left", (B, m, 1) for "right"."""
    # On a CPU vector_norm is ten times slower than a temporary over the first axis, and half of it over the last.
    if side == "left":
        return (matrix * matrix).sum(-2, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    return norms.square()


def all_finite(energy: Tensor) -> Tensor:
    """Return (B,) booleans for `square_sums` of B matrices: false for a NaN, an infinity, or squares that overflow."""
    return energy.flatten(1).sum(1) < torch.inf


def adam_direction_(
    gradient: Tensor, state: State, weights: tuple[Tensor, Tensor], eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Update exp_avg, exp_avg_sq in place; return N = M / (sqrt(V) + eps) and the squared gradient.

    No bias correction in N.
    """
    squares = gradient * gradient
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, weights[0])
    square.lerp_(squares, weights[1])
    return torch.div(mean, square.sqrt().add_(eps)), squares


def bias_correction(step: Tensor, hyper: Hyper, wanted: bool) -> Tensor:
    """Return sqrt(1 - beta2^t) / (1 - beta1^t), or ones, in float64 for t = step, shaped as `step`."""
    count = step.double()
    if not wanted:
        return torch.ones_like(count)
    return torch.sqrt(1 - hyper.beta2**count) / (1 - hyper.beta1**count)


def limit(norm: Tensor, last: Tensor, first: Tensor, gamma: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Return the divisor L of the norm-growth limiter and the norm to remember; all (B,), `first` boolean.

    "compat" is the published rule. "mended" remembers no zero and takes a zero in `last` for "nothing seen yet".
    """
    if mode == "off":
        return torch.ones_like(norm), norm
    fresh = first if mode == "compat" else last == 0
    growth = torch.maximum(norm / (last + FLOOR), gamma) / gamma
    divisor = torch.where(fresh, 1.0, growth)
    kept = norm / divisor
    if mode == "mended":
        kept = torch.where((kept > 0) & (kept < torch.inf), kept, last)
    return divisor, kept


def residual_scale(size: Tensor, inside: Tensor, form: Form) -> Tensor:
    """Return phi, shaped as `inside` (||R_i||^2), or (B, 1, 1) for matrix scaling; size: ||N_i||^2, N uncorrected."""
    if form.scaling == "matrix":
        size, inside = size.sum((-2, -1), keepdim=True), inside.sum((-2, -1), keepdim=True)
    return size.sqrt() / (inside.sqrt() + FLOOR)


class Factors(NamedTuple):
    """The step in numbers: W <- keep W - (back(whole N - share R) + factor G), with `keep` in the other three too.

    whole: (B, 1, 1). share, factor: as `square_sums`, or (B, 1, 1); None for variant "galore". keep: (B, 1, 1), 0-d, or
    None where nothing decays.
    """

    whole: Tensor
    share: Tensor | None
    factor: Tensor | None
    keep: Tensor | None


class Operations(NamedTuple):
    """The passes over matrices, by torch or by kernels; everything between is a few numbers for each column.

    project: (G, basis, a moment, side) -> R and `square_sums` of G. adam: (R, state, moments' weights, eps, side) -> N
    and `square_sums` of R and of N, with exp_avg and exp_avg_sq updated in place. update: (W, G, basis, N, R, factors,
    finite, side) -> None, in place on W.
    """

    project: Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]
    adam: Callable[[Tensor, State, tuple[Tensor, Tensor], Tensor, str], tuple[Tensor, Tensor, Tensor]]
    update: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Factors, Tensor | None, str], None]


def _torch_project(gradient: Tensor, basis: Tensor, moment: Tensor, side: str) -> tuple[Tensor, Tensor]:
    return project(gradient, basis, side), square_sums(gradient, side)


def _torch_adam(
    low: Tensor, state: State, weights: tuple[Tensor, Tensor], eps: Tensor, side: str
) -> tuple[Tensor, Tensor, Tensor]:
    direction, squares = adam_direction_(low, state, weights, eps)
    return direction, squares.sum(-2 if side == "left" else -1, keepdim=True), square_sums(direction, side)


def _torch_update(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    direction: Tensor,
    low: Tensor,
    factors: Factors,
    finite: Tensor | None,
    side: str,
) -> None:
    inner = direction.mul_(factors.whole)
    if factors.share is not None:
        inner = inner.addcmul_(low, factors.share, value=-1)
    step = matmul(basis, inner) if side == "left" else matmul(inner, basis)
    if factors.factor is not None:
        safe = gradient if finite is None else torch.where(per_item(finite, gradient), gradient, 0.0)
        step.addcmul_(safe, factors.factor)
    if factors.keep is not None:
        weight.mul_(factors.keep)
    weight.sub_(step)


def _turned(tensor: Tensor, side: str) -> Tensor:
    """View a matrix so that the projected axis comes first, as the kernels have it."""
    return tensor if side == "left" else tensor.mT


def _kernel_project(gradient: Tensor, basis: Tensor, moment: Tensor, side: str) -> tuple[Tensor, Tensor]:
    low, energy = fira_project(*(_turned(t, side) for t in (gradient, basis, moment)))
    return _turned(low, side), _turned(energy[:, None], side)


def _kernel_adam(
    low: Tensor, state: State, weights: tuple[Tensor, Tensor], eps: Tensor, side: str
) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.stack([weight.reshape(-1).expand(len(low)) for weight in weights], 1)
    moments = (_turned(t, side) for t in (low, state["exp_avg"], state["exp_avg_sq"]))
    direction, inside, size = fira_adam(*moments, both, eps)
    return _turned(direction, side), _turned(inside[:, None], side), _turned(size[:, None], side)


def _kernel_update(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    direction: Tensor,
    low: Tensor,
    factors: Factors,
    finite: Tensor | None,
    side: str,
) -> None:
    w, g, p, n, r = (_turned(t, side) for t in (weight, gradient, basis, direction, low))

    def vector(value: Tensor | None) -> Tensor:
        wide = n.new_zeros(()) if value is None else _turned(value, side)[:, 0]
        return wide.expand(len(n), n.shape[2])

    keep = n.new_ones(()) if factors.keep is None else factors.keep
    scalars = [value.reshape(-1).expand(len(n)) for value in (factors.whole, keep)]
    fira_update(w, g, p, n, r, scalars[0], vector(factors.share), vector(factors.factor), scalars[1])


TORCH = Operations(_torch_project, _torch_adam, _torch_update)
KERNELS = Operations(_kernel_project, _kernel_adam, _kernel_update)


def operations(like: Tensor) -> Operations:
    """Return the table for matrices as `like`; a compiler gets torch's, which it can fuse."""
    kernels = backend(like.device) == "triton" and like.dtype == torch.float32 and not torch.compiler.is_compiling()
    return KERNELS if kernels else TORCH


def fira_step_(
    weight: Tensor,
    gradient: Tensor,
    state: State,
    hyper: Hyper,
    form: Form,
    *,
    projected: tuple[Tensor, Tensor] | None = None,
    finite: Tensor | None = None,
) -> None:
    """Take one step between two refreshes, in place on weight (B, m, n) and on every tensor of `state` but the basis.

    gradient: (B, m, n) of the state's dtype; projected: R and `square_sums` of it, where they are known. Where `finite`
    (B,) is false, nothing of that matrix changes.
    """
    passes, basis, dtype = operations(weight), state["basis"], state["exp_avg"].dtype
    low, energy = projected or passes.project(gradient, basis, state["exp_avg"], form.side)
    weights = (hyper.mean_weight, hyper.square_weight)
    if finite is not None:
        low, energy = (torch.where(per_item(finite, value), value, 0.0) for value in (low, energy))
        # A moment's weight of zero leaves it as it is, bit by bit: no masks of R's size.
        weights = (per_item(finite * weights[0], low), per_item(finite * weights[1], low))
    direction, inside, size = passes.adam(low, state, weights, hyper.eps, form.side)
    first = state["step"] == 0
    state["step"].add_(1 if finite is None else finite)
    correction = bias_correction(state["step"], hyper, form.correct_bias)
    if finite is not None:
        correction = torch.where(finite, correction, 0.0)  # 0/0 before the first step
    lr, low_lr, keep = hyper.lr, hyper.low_lr, None
    if form.decays:
        lr, low_lr = lr * hyper.decay, low_lr * hyper.decay
        keep = hyper.decay if finite is None else per_item(torch.where(finite, hyper.decay, 1.0), weight)
    whole = per_item(low_lr * correction, low).to(dtype)
    if form.variant == "galore":
        passes.update(weight, gradient, basis, direction, low, Factors(whole, None, None, keep), finite, form.side)
        return

    scale = residual_scale(size, inside, form)
    if form.variant == "paper":
        scale = scale * per_item(correction, low).to(dtype)
        rest, outer = energy - inside, low_lr.expand_as(correction)
    else:
        rest, outer = energy - hyper.removed * inside, lr * correction
    norm = (scale.square() * rest.clamp_(min=0)).sum((-2, -1)).sqrt()
    divisor, kept = limit(norm, state["limiter"], first, hyper.gamma, form.limiter)
    state["limiter"].copy_(kept if finite is None else torch.where(finite, kept, state["limiter"]))
    factor = scale * per_item(outer / divisor, scale).to(dtype)
    share = factor if form.variant == "paper" else factor * hyper.alpha
    passes.update(weight, gradient, basis, direction, low, Factors(whole, share, factor, keep), finite, form.side)


# --- the class -----------------------------------------------------------------------------------------------------


class Fira(MatrixOptimizer):
    """Fira for groups with the key `rank`, Adam (Hugging Face's form) for the others; decay is decoupled.

    A projected group may also hold `update_proj_gap` (200 steps), `alpha` (1.0) and `proj_type` ("std", "reverse_std",
    "left", "right"), as the published package has them; the rank is cut to min(m, n). State of a projected (m, n)
    matrix, a = the projected axis, b = the other: `basis` (a r), `exp_avg`, `exp_avg_sq` (b r each), `limiter`, `step`.

    variant: "code" | "paper" | "galore" (see the module). scaling: "column" | "matrix". gamma: growth allowed to the
    residual's norm in a step, None for no limit. limiter: "mended" | "compat". refresh: "svd" | "gram" | "subspace".
    rotate_states: carry the moments into the new basis. stagger: spread the refreshes after the first over the gap.
    stochastic_rounding: of bfloat16 weights. Raises ValueError for any value out of range and for a projected
    parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        variant: str = "code",
        gamma: float | None = 1.01,
        refresh: str = "gram",
        rotate_states: bool = False,
        scaling: str = "column",
        limiter: str = "mended",
        stagger: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        choices = {"variant": variant, "gamma": gamma, "scaling": scaling, "limiter": limiter}
        bases = {"refresh": refresh, "rotate_states": rotate_states, "stagger": stagger}
        super().__init__(params, {**adam, **choices, **bases, "stochastic_rounding": stochastic_rounding})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group after checking it; the caller's dict is left as it is."""
        group = dict(param_group)
        if "rank" in group:
            group = {"update_proj_gap": 200, "alpha": 1.0, "proj_type": "std", **group}
        super().add_param_group(group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if "rank" in group:
            logger.info("Fira projects %d matrices to rank %d", len(self.param_groups[-1]["params"]), group["rank"])
        self._forget_clock()

    def _forget_clock(self) -> None:
        # An upper bound of each matrix' completed steps, known without asking the device; see `_due`.
        self._clock: dict[Tensor, int] = {}
        self._last_hyper: tuple[tuple[Any, ...], Hyper] | None = None
        matrices = [p for group in self.param_groups if "rank" in group for p in group["params"]]
        self._place = {p: (index, len(matrices)) for index, p in enumerate(matrices)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this when a state is loaded, copied or unpickled: each may change the counts.
        super().__setstate__(state)
        self._forget_clock()

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Whether the parameter is projected."""
        return "rank" in group

    def over(self, stand_ins: Mapping[Tensor, Tensor]) -> Self:
        """As the base class; every matrix keeps its turn among all matrices for `stagger`."""
        other = super().over(stand_ins)
        other._forget_clock()
        other._place = {stand_ins[p]: place for p, place in self._place.items() if p in stand_ins}
        return other

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return zero moments, and for a projected matrix an empty basis that the first step fills."""
        if "rank" not in group:
            return new_state(parameter, "exp_avg", "exp_avg_sq")
        _check_matrix(parameter)
        rows, columns = parameter.shape
        rank = min(group["rank"], rows, columns)
        left = projected_side(parameter.shape, group["proj_type"]) == "left"
        low = (rank, columns) if left else (rows, rank)
        shapes = {"basis": (rows, rank) if left else (rank, columns), "exp_avg": low, "exp_avg_sq": low, "limiter": ()}
        dtype = state_dtype(parameter.dtype)
        zeros = {name: torch.zeros(shape, dtype=dtype, device=parameter.device) for name, shape in shapes.items()}
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **zeros}

    # --- a step: refreshes in the order of the parameters, then batches ----------------------------------------------

    def buckets(self, group: Group) -> list[list[Tensor]]:
        """List what can be stacked; new parameters get their state, those due their basis."""
        found = super().buckets(group)
        if "rank" not in group:
            return found
        for p in group["params"]:
            if p.grad is not None and p.numel() > 0 and self._due(p, group):
                self._refresh(p, group)
        return found

    def _due(self, p: Tensor, group: Group) -> bool:
        """Whether p's completed steps are a multiple of the gap, without a device sync unless it is likely.

        The clock counts attempts, the state's `step` those that were not skipped: the clock is never behind. So it
        reaches each multiple first, and only there is the true count read and the clock set back.
        """
        gap = group["update_proj_gap"]
        index, count = self._place[p]
        phase = index * gap // count if group["stagger"] else 0

        def hits(done: int) -> bool:
            return done == 0 or (done + phase) % gap == 0

        done = self._clock.get(p)
        if done is None or hits(done):
            done = int(self.state[p]["step"])
        self._clock[p] = done + 1
        return hits(done)

    def _refresh(self, p: Tensor, group: Group) -> None:
        """Replace the basis by that of the current gradient, and carry the moments along if asked to."""
        assert p.grad is not None
        state = self.state[p]
        side = projected_side(p.shape, group["proj_type"])
        if not bool(all_finite(square_sums(p.grad.to(state_dtype(p.dtype)).unsqueeze(0), side))):
            del self._clock[p]  # the step will be skipped, and this refresh is due again at the next
            return
        old = state["basis"]
        previous = old if int(state["step"]) > 0 else None
        basis = compute_basis(p.grad, group["rank"], side, method=group["refresh"], previous=previous)
        if basis.shape != old.shape:
            raise ValueError(
                f"compute_basis returned the shape {tuple(basis.shape)} for a {tuple(p.shape)} gradient; "
                f"return {tuple(old.shape)}."
            )
        basis = basis.to(old.dtype)
        if group["rotate_states"] and previous is not None:
            moments = (state["exp_avg"], state["exp_avg_sq"])
            turned = rotate_moments(*moments, old, basis, side, state["step"], group["betas"])
            torch._foreach_copy_(list(moments), list(turned))
        old.copy_(basis)

    def step_bucket(self, parameters: list[Tensor], group: Group) -> None:
        """Step a bucket in place: a single matrix without a copy, small ones stacked."""
        if "rank" not in group:
            super().step_bucket(parameters, group)
            return
        kept = parameters[0].dtype
        wide = state_dtype(kept)
        weights = stack([p.detach() for p in parameters]).to(wide)
        gradients = stack([p.grad for p in parameters if p.grad is not None]).to(wide)
        states = [self.state[p] for p in parameters]
        state = {name: stack([one[name] for one in states]) for name in states[0]}
        form = _form(parameters[0], group)
        projected = operations(weights).project(gradients, state["basis"], state["exp_avg"], form.side)
        finite = all_finite(projected[1])
        # Looking is free on a CPU and a sync elsewhere; without a look the step masks what may not be finite.
        clean = finite.device.type == "cpu" and bool(finite.all())
        if not clean:
            self.skipped += (~finite).sum().to(self.skipped.device)
        hyper = self._hyper(group, weights)
        fira_step_(weights, gradients, state, hyper, form, projected=projected, finite=None if clean else finite)
        if group["stochastic_rounding"] and kept == torch.bfloat16:
            weights = round_stochastically(weights)
        if len(parameters) > 1 or kept != wide:
            torch._foreach_copy_(parameters, list(weights.unbind(0)))
        if len(parameters) > 1:
            for name, value in state.items():
                if name != "basis":
                    torch._foreach_copy_([one[name] for one in states], list(value.unbind(0)))

    def _hyper(self, group: Group, like: Tensor) -> Hyper:
        # The same for all matrices of a group in a step; eleven fills are much for a small one.
        names = ("lr", "betas", "eps", "weight_decay", "gamma")
        key = (*(group[name] for name in names), group.get("alpha"), like.device, like.dtype)
        if isinstance(group["lr"], Tensor):  # its value may change in place
            return make_hyper(group, like)
        if self._last_hyper is None or self._last_hyper[0] != key:
            self._last_hyper = (key, make_hyper(group, like))
        return self._last_hyper[1]

    def update(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return Adam's (U, new state) of a bucket that is not projected."""
        hyper = self._hyper(group, gradients)
        new = {name: value.clone() for name, value in state.items()}
        step = new["step"].add_(1)
        direction, _ = adam_direction_(gradients, new, (hyper.mean_weight, hyper.square_weight), hyper.eps)
        factor = bias_correction(step, hyper, group["correct_bias"])
        # The published code decays the updated weight, (1 - lr wd)(W - lr U); the base class decays only W.
        return direction.mul_(per_item(factor, direction) * hyper.decay), new


def _form(p: Tensor, group: Group) -> Form:
    side = projected_side(p.shape, group["proj_type"])
    limiter = "off" if group["gamma"] is None else group["limiter"]
    return Form(side, group["variant"], group["scaling"], limiter, group["correct_bias"], group["weight_decay"] != 0)


def make_hyper(group: Group, like: Tensor) -> Hyper:
    """Return a group's numbers beside `like`, in its dtype where they meet matrices."""
    lr, alpha, (beta1, beta2) = group["lr"], group.get("alpha", 1.0), group["betas"]
    gamma = 1.0 if group["gamma"] is None else group["gamma"]
    exact = (lr, lr * alpha, beta1, beta2)
    decay = MatrixOptimizer.kept(like, group)
    broad = (1 - beta1, 1 - beta2, max(group["eps"], 1e-30), alpha, alpha * (2 - alpha), gamma, decay)
    scalars = [_scalar(value, like.device, torch.float64) for value in exact]
    return Hyper(*scalars, *(_scalar(value, like.device, like.dtype) for value in broad))


def _scalar(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    # A fill, not a copy: torch.tensor(..., device="cuda") would wait for the device.
    return torch.full((), value, device=device, dtype=dtype)


# --- refusals and groups -------------------------------------------------------------------------------------------


def _check_matrix(p: Tensor) -> None:
    if p.ndim != 2:
        raise ValueError(
            f"Fira cannot project a parameter of shape {tuple(p.shape)}: it needs whole matrices; give it a group "
            "without `rank`, or use a profile that does not flatten parameters."
        )


def _check_group(group: Group) -> None:
    """Raise ValueError for the first value out of range."""
    _check_numbers(group)
    choices = {
        "variant": VARIANTS,
        "scaling": ("column", "matrix"),
        "limiter": ("mended", "compat"),
        "refresh": METHODS,
    }
    if "rank" in group:
        choices["proj_type"] = PROJ_TYPES
        for p in group["params"]:
            _check_matrix(p)
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"{name}={group[name]!r} is not known to Fira; use one of {', '.join(allowed)}.")


def _check_numbers(group: Group) -> None:
    beta1, beta2 = group["betas"]
    gamma = group["gamma"]
    demands = {
        "lr": (group["lr"] >= 0, "at least 0"),
        "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)"),
        "eps": (group["eps"] >= 0, "at least 0"),
        "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
        "gamma": (gamma is None or gamma >= 1, "at least 1, or None for no limit"),
    }
    if "rank" in group:
        for name in ("rank", "update_proj_gap"):
            value = group[name]
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            demands[name] = (whole, "a whole number, at least 1")
        demands["alpha"] = (group["alpha"] > 0, "greater than 0")
    for name, (met, demand) in demands.items():
        if not met:
            raise ValueError(f"{name}={group[name]!r} is out of Fira's range; it must be {demand}.")


def fira_param_groups(
    model: nn.Module,
    rank: int,
    patterns: Sequence[str] = ("attn", "mlp"),
    *,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: str = "std",
) -> list[Group]:
    """Return two groups: all other trainable parameters, and the matrices whose name contains one of the patterns.

    A matrix is a trainable 2-D parameter outside nn.Embedding; a shared one is counted once. The second group's key
    `matched` tells how many each pattern matched. Raises ValueError when a pattern matches nothing.
    """
    embedded = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim == 2 and id(p) not in embedded]
    matched = {pattern: sum(pattern in name for name, _ in matrices) for pattern in patterns}
    for pattern, count in matched.items():
        if count == 0:
            raise ValueError(
                f"The pattern {pattern!r} is in no name of the model's {len(matrices)} trainable matrices; "
                f"use parts of names such as {matrices[0][0] if matrices else 'attn'!r}."
            )
    if not matched:
        raise ValueError("fira_param_groups got no patterns, so nothing would be projected; name parts of the model.")
    chosen = [p for name, p in matrices if any(pattern in name for pattern in patterns)]
    taken = {id(p) for p in chosen}
    others = [p for _, p in named if id(p) not in taken]
    keys = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type}
    return [{"params": others}, {"params": chosen, "matched": matched, **keys}]
