"""Fira (Chen et al. 2024, arXiv 2410.01623): Adam in a low-rank subspace, plus the scaled rest of the gradient.

    R = P^T G;  M, V = Adam's moments of R;  N = M / (sqrt(V) + eps);  phi_i = ||N_i|| / (||R_i|| + 1e-8)
    S = phi * (G - alpha P R), limited to grow by gamma a step;  W <- (1 - lr wd)(W - step (alpha P N + S))

Shapes: G, W (B, m, n), a batch of equal shapes; side "left": P (B, m, r), R, M, V, N (B, r, n), phi (B, 1, n);
side "right" is the mirror image: Q (B, r, n), R (B, m, r), phi (B, m, 1). `std` projects the smaller side.

Variants: "code", the default, is the published package, which produced the numbers of the paper; "paper" is Algorithm 1
(alpha on the whole update, the true residual, bias correction before phi and the limiter); "galore" has no S.
docs/fira.md is the specification, with the differences between paper and code.

Differs from the published code:
- after a zero norm the limiter starts again (`limiter="compat"` follows the published code);
- moments, basis and limiter are float32 for half-precision weights;
- the signs of the basis are kept from one refresh to the next;
- a parameter is skipped if its gradient or the gradient's squares are not finite.

Use it for the matrices of attention and MLP blocks; embeddings, head and vectors belong in a group without `rank`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from epochal.optim.base import (
    Group,
    MatrixOptimizer,
    State,
    Update,
    fused,
    joined,
    known_true,
    new_state,
    per_item,
    round_stochastically,
    scalar,
    stack,
    state_dtype,
)
from epochal.optim.projection import METHODS, PROJ_TYPES, compute_basis, project, projected_side, rotate_moments

VARIANTS = ("code", "paper", "galore")
LIMITERS = ("zero_safe", "compat")
# Keys of a projected group that do not change during a run.
OPTIONS = ("alpha", "betas", "eps", "correct_bias", "variant", "gamma", "scaling", "limiter")
RATIO_EPS = 1e-8  # of phi and of the limiter; a literal in the published code

logger = logging.getLogger(__name__)


# --- one step between two refreshes, on a batch (B, m, n) ----------------------------------------------------------


def fira_update(weight: Tensor, gradient: Tensor, state: State, group: Group, side: str) -> Tensor:
    """Take one step of Algorithm 1 with the current basis, in-place.

    Args:
        weight, gradient: (B, m, n), both of the state's dtype; `weight` is updated.
        state: updated; `basis`, `exp_avg`, `exp_avg_sq`, `limiter` (B,) and `step` (B,), shapes as at the top of this file.
        group: the hyper-parameters of `Fira`, and `alpha`.
        side: "left" or "right".

    Returns:
        (B,) booleans: False for a matrix that was skipped because its gradient is not finite.
    """
    with _tensor_cores(weight.device):
        return _update_(weight, gradient, state, *constants(weight, state, group), side)


def constants(weight: Tensor, state: State, group: Group) -> tuple[Tensor, Tensor | None, Group]:
    """Return a group's learning rate and decay factor as tensors, and its other options.

    The decay factor is None without weight decay.
    """
    # A compiled function would be compiled again for every learning rate in a group.
    lr = scalar(group["lr"], state["step"].double())
    decay = MatrixOptimizer.decay_factor(weight, group) if group["weight_decay"] else None
    return lr, decay, {name: group[name] for name in OPTIONS}


@contextlib.contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Multiply float32 in tf32 on a GPU.

    Its error of 3e-4 is a sixtieth of the rounding of a bfloat16 gradient.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@fused
def _update_(
    weight: Tensor, gradient: Tensor, state: State, lr: Tensor, decay: Tensor | None, group: Group, side: str
) -> Tensor:
    alpha, dtype = group["alpha"], weight.dtype

    # Project: R = P^T G, and the squared norm of each column of G.
    low, gradient_squares = project(gradient, state["basis"], side), square_sums(gradient, side)

    # A matrix with a non-finite gradient keeps its weights and state: R, the weight of R in the moments and, through
    # the bias correction, the step size become zero. Masks are needed only if there is such a matrix.
    finite = all_finite(gradient_squares)
    mask = None if known_true(finite) else finite
    moment_weights = [scalar(1 - beta, low) for beta in group["betas"]]
    if decay is not None:
        lr = lr * decay  # the published code decays the updated weight: (1 - lr wd)(W - step U)
    if mask is not None:
        low, gradient_squares = (torch.where(per_item(mask, x), x, 0.0) for x in (low, gradient_squares))
        moment_weights = [per_item(mask * weight, low) for weight in moment_weights]
        decay = None if decay is None else per_item(torch.where(mask, decay, 1.0), weight)

    # Adam in the subspace: N = M / (sqrt(V) + eps), and the squared norms of the columns of R and N.
    direction, squares = adam_direction_(low, state, moment_weights, group["eps"])
    low_squares, direction_squares = (
        squares.sum(-2 if side == "left" else -1, keepdim=True),
        square_sums(direction, side),
    )
    # Read before the step is counted.
    first_step = state["step"] == 0
    state["step"].add_(finite)
    correction = torch.where(finite, bias_correction(state["step"], group), 0.0)  # 0/0 before the first step
    lowrank_scale = per_item(lr * alpha * correction, low).to(dtype)
    if group["variant"] == "galore":
        apply_fira_(weight, gradient, state["basis"], direction, low, lowrank_scale, None, None, decay, mask, side)
        return finite

    # Scale the residual: S = phi * (G - removed P R), with phi_i = ||N_i|| / ||R_i|| for each column or the whole matrix.
    axes = (-2, -1) if group["scaling"] == "matrix" else ()
    phi = _sum(direction_squares, axes).sqrt() / (_sum(low_squares, axes).sqrt() + RATIO_EPS)
    if group["variant"] == "paper":
        removed, residual_lr = 1.0, torch.where(finite, lr * alpha, 0.0)
        phi = phi * per_item(correction, phi).to(dtype)
    else:
        removed, residual_lr = alpha, lr * correction

    # Limit the growth of ||S||. The residual itself is never formed: the columns of P are orthonormal, so
    # ||G_i - removed P R_i||^2 = ||G_i||^2 - removed (2 - removed) ||R_i||^2.
    residual_squares = gradient_squares - removed * (2 - removed) * low_squares
    # The difference of squares may be negative by rounding, where the gradient is inside of the subspace.
    norm = (phi.square() * residual_squares.clamp_(min=0)).sum((-2, -1)).sqrt()
    divisor, remembered = limit_growth(norm, state["limiter"], first_step, group)
    state["limiter"].copy_(torch.where(finite, remembered, state["limiter"]))

    # W <- decay W - (P (lowrank_scale N - projection_coef R) + residual_scale G): two products with a basis, not three.
    residual_scale = phi * per_item(residual_lr / divisor, phi).to(dtype)
    coefficients = (lowrank_scale, removed * residual_scale, residual_scale, decay)
    apply_fira_(weight, gradient, state["basis"], direction, low, *coefficients, mask, side)
    return finite


def _sum(squares: Tensor, axes: tuple[int, ...]) -> Tensor:
    return squares.sum(axes, keepdim=True) if axes else squares


def square_sums(matrix: Tensor, side: str) -> Tensor:
    """Return the squared norms along the projected axis, kept as 1: (B, 1, n) for "left", (B, m, 1) for "right"."""
    # On a CPU vector_norm takes ten times as long as squaring into a temporary over the first axis, and half as long
    # over the last.
    if side == "left":
        return (matrix * matrix).sum(-2, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    return norms.square()


def all_finite(squares: Tensor) -> Tensor:
    """Return (B,) booleans for `square_sums` of B matrices: False for a NaN, an infinity, or squares that overflow."""
    return squares.flatten(1).sum(1) < torch.inf


def adam_direction_(gradient: Tensor, state: State, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Update exp_avg and exp_avg_sq in place; return N = M / (sqrt(V) + eps) and the squared gradient.

    weights: 1 - beta1 and 1 - beta2, 0-d or broadcast over the gradient. There is no bias correction in N.
    """
    squares = gradient * gradient
    mean = state["exp_avg"].lerp_(gradient, weights[0])
    square = state["exp_avg_sq"].lerp_(squares, weights[1])
    return torch.div(mean, square.sqrt().add_(safe_eps(eps))), squares


def adam_update(
    gradient: Tensor, state: State, *, betas: tuple[float, float], eps: float, correct_bias: bool, decay: Tensor | None
) -> tuple[Tensor, State]:
    """Return Hugging Face's Adam, (U, new state), of a bucket that is not projected."""
    new = {name: value.clone() for name, value in state.items()}
    step = new["step"].add_(1)
    direction, _ = adam_direction_(gradient, new, [scalar(1 - beta, gradient) for beta in betas], eps)
    # The published code decays the updated weight, (1 - lr wd)(W - lr U); the base class decays only W.
    factor = per_item(bias_correction(step, {"betas": betas, "correct_bias": correct_bias}), direction)
    return direction.mul_(factor if decay is None else factor * decay), new


def safe_eps(eps: float) -> float:
    """Return eps, but never 0, so that a zero gradient has a direction: 0, not NaN."""
    return max(eps, 1e-30)


def bias_correction(step: Tensor, group: Group) -> Tensor:
    """Return sqrt(1 - beta2^t) / (1 - beta1^t) in float64, t = step; ones without `correct_bias`."""
    # float64: at beta2 = 0.999 and t = 1 the difference loses three of float32's seven digits.
    count = step.double()
    if not group["correct_bias"]:
        return torch.ones_like(count)
    beta1, beta2 = group["betas"]
    correction: Tensor = torch.sqrt(1 - beta2**count) / (1 - beta1**count)
    return correction


def limit_growth(norm: Tensor, last: Tensor, first_step: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return the divisor of the norm-growth limiter and the norm to remember; all (B,), `first_step` boolean.

    "compat" is the published rule. "zero_safe" never remembers a zero, and reads a zero in `last` as "no norm so far".
    """
    gamma = group["gamma"]
    if gamma is None:
        return torch.ones_like(norm), norm
    # A zero norm, as of a zero gradient, must not count as a norm to grow from: the published rule would
    # throttle for 1,400 steps.
    fresh = first_step if group["limiter"] == "compat" else last == 0
    growth = (norm / (last + RATIO_EPS)).clamp(min=gamma) / gamma
    divisor = torch.where(fresh, 1.0, growth)
    limited = norm / divisor
    if group["limiter"] == "zero_safe":
        # Neither zero nor an overflow is remembered.
        limited = torch.where((limited > 0) & (limited < torch.inf), limited, last)
    return divisor, limited


def apply_fira_(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    direction: Tensor,
    low: Tensor,
    lowrank_scale: Tensor,
    projection_coef: Tensor | None,
    residual_scale: Tensor | None,
    decay: Tensor | None,
    mask: Tensor | None,
    side: str,
) -> None:
    """Apply one step to the weights, in-place; overwrites `direction`.

    W <- decay W - (P (lowrank_scale N - projection_coef R) + residual_scale G).
    lowrank_scale: (B, 1, 1). projection_coef, residual_scale: as `square_sums`, or (B, 1, 1); None for "galore".
    decay: 0-d or (B, 1, 1), None for no decay. mask: (B,), False where G is not finite and the scales are zero.
    """
    inner = direction.mul_(lowrank_scale)
    if projection_coef is not None:
        inner.addcmul_(low, projection_coef, value=-1)
    step = basis @ inner if side == "left" else inner @ basis
    if residual_scale is not None:
        # 0 times NaN is NaN, so a zero scale is not enough to skip a matrix.
        safe = gradient if mask is None else torch.where(per_item(mask, gradient), gradient, 0.0)
        step.addcmul_(safe, residual_scale)
    if decay is not None:
        weight.mul_(decay)
    weight.sub_(step)


# --- the optimizer -------------------------------------------------------------------------------------------------


class Fira(MatrixOptimizer):
    """Fira for groups with the key `rank`, Adam (Hugging Face's form) for the others; weight decay is decoupled.

    A projected group may also set `update_proj_gap` (200 steps), `alpha` (1.0) and `proj_type` ("std", "reverse_std",
    "left", "right"), as in the published package; the rank is cut to min(m, n).
    State of a projected (m, n) matrix, a = the projected axis, b = the other: `basis` (a r elements), `exp_avg` and
    `exp_avg_sq` (b r each), `limiter`, `step`.

    Args:
        params: parameters, or groups such as `fira_param_groups` returns.
        lr, betas, eps, weight_decay: as in AdamW.
        correct_bias: whether the step size has Adam's bias correction.
        variant: "code", "paper" or "galore"; see the top of this file.
        gamma: growth allowed to the norm of the residual in one step, None for no limit.
        refresh: how bases are computed, "svd", "gram" or "subspace"; see `epochal.optim.projection`.
        rotate_states: whether a refresh carries the moments into the new basis.
        scaling: one factor phi for every "column" or for the whole "matrix".
        limiter: "zero_safe" or "compat"; see the top of this file.
        stagger: whether the refreshes of different matrices are spread over the gap, after the first.
        stochastic_rounding: of bfloat16 weights.

    Raises:
        ValueError: for a value out of range, and for a projected parameter that is not a matrix.
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
        limiter: str = "zero_safe",
        stagger: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        residual = {"variant": variant, "gamma": gamma, "scaling": scaling, "limiter": limiter}
        bases = {"refresh": refresh, "rotate_states": rotate_states, "stagger": stagger}
        super().__init__(params, {**adam, **residual, **bases, "stochastic_rounding": stochastic_rounding})

    def add_param_group(self, param_group: Group) -> None:
        """Check and add a group; the caller's dict is not changed."""
        group = dict(param_group)
        if "rank" in group:
            # The defaults of the published package.
            group = {"update_proj_gap": 200, "alpha": 1.0, "proj_type": "std", **group}
        super().add_param_group(group)
        if "rank" in group:
            logger.info("Fira projects %d matrices to rank %d", len(self.param_groups[-1]["params"]), group["rank"])
        self._reset_clock()

    def settle(self, group: Group) -> None:
        """Check a group and note what is a matrix in it."""
        _check_group(group)
        super().settle(group)

    def _reset_clock(self) -> None:
        # Per matrix, an upper bound of its completed steps that needs no read from the device; see `_due`.
        self._clock: dict[Tensor, int] = {}
        matrices = [p for group in self.param_groups if "rank" in group for p in group["params"]]
        # Per matrix, its index and the number of all matrices, for `stagger`.
        self._position = {p: (index, len(matrices)) for index, p in enumerate(matrices)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this when a state is loaded, copied or unpickled; any of these may change the step counts.
        super().__setstate__(state)
        self._reset_clock()

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Return whether the parameter is projected."""
        return "rank" in group

    def rounding(self, device: torch.device) -> float:
        """Return tf32's on a GPU, which has the mantissa of float16."""
        return torch.finfo(torch.float16 if device.type == "cuda" else torch.float32).eps

    def rebind(self, params: Mapping[Tensor, Tensor]) -> Self:
        """As the base class; `stagger` still counts all matrices, so refreshes stay at the same steps."""
        other = super().rebind(params)
        other._reset_clock()
        other._position = {params[p]: position for p, position in self._position.items() if p in params}
        return other

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return zero moments, and a zero basis that the first step fills."""
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

    # --- refreshes ---

    def buckets(self, group: Group) -> list[list[Tensor]]:
        """As the base class; also refreshes every basis that is due."""
        buckets = super().buckets(group)
        if "rank" not in group:
            return buckets
        for p in group["params"]:
            if p.grad is not None and p.numel() > 0 and self._due(p, group):
                self._refresh(p, group)
        return buckets

    def _due(self, p: Tensor, group: Group) -> bool:
        """Return whether p's completed steps, shifted by its stagger, are a multiple of the gap."""
        # The true count is on the device, and reading it is a sync. `_clock` counts attempted steps, `step` only those
        # that were not skipped, so the clock reaches every multiple first. Only then is the true count read.
        gap = group["update_proj_gap"]
        index, count = self._position[p]
        shift = index * gap // count if group["stagger"] else 0

        def due(done: int) -> bool:
            return done == 0 or (done + shift) % gap == 0

        done = self._clock.get(p)
        if done is None or due(done):
            done = int(self.state[p]["step"])
        self._clock[p] = done + 1
        return due(done)

    def _refresh(self, p: Tensor, group: Group) -> None:
        """Replace the basis by that of the current gradient; with `rotate_states`, rotate the moments into it."""
        assert p.grad is not None
        state = self.state[p]
        side = projected_side(p.shape, group["proj_type"])
        if not bool(all_finite(square_sums(p.grad.to(state_dtype(p.dtype)).unsqueeze(0), side))):
            del self._clock[p]  # this step will be skipped, so the refresh is due again at the next
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
            rotated = rotate_moments(*moments, old, basis, side, state["step"], group["betas"])
            torch._foreach_copy_(list(moments), list(rotated))
        old.copy_(basis)

    # --- the step ---

    def step_bucket(self, parameters: list[Tensor], group: Group) -> Tensor:
        """Update one bucket in place; a single float32 matrix is updated without copying it."""
        if "rank" not in group:
            return super().step_bucket(parameters, group)
        dtype = parameters[0].dtype
        wide = state_dtype(dtype)
        weights = stack([p.detach() for p in parameters]).to(wide)
        gradients = stack([p.grad for p in parameters if p.grad is not None]).to(wide)
        states = [self.state[p] for p in parameters]
        state = {name: joined(states, name) for name in states[0]}
        finite = fira_update(weights, gradients, state, group, projected_side(parameters[0].shape, group["proj_type"]))
        if group["stochastic_rounding"] and dtype == torch.bfloat16:
            weights = round_stochastically(weights)
        # `stack` returned a view of a single matrix, which is updated already.
        if len(parameters) > 1 or dtype != wide:
            torch._foreach_copy_(parameters, list(weights.unbind(0)))
        return finite

    def direction(self, parameter: Tensor, group: Group) -> tuple[Update, Group]:
        """Return Adam's rule for parameters that are not projected."""
        decay = self.decay_factor(parameter, group) if group["weight_decay"] else None
        return adam_update, {"decay": decay, **{name: group[name] for name in ("betas", "eps", "correct_bias")}}


# --- checks and parameter groups -----------------------------------------------------------------------------------


def _check_matrix(p: Tensor) -> None:
    if p.ndim != 2:
        raise ValueError(
            f"Fira cannot project a parameter of shape {tuple(p.shape)}, because it needs whole matrices; put it in a "
            "group without `rank`, or train with a parallelism that does not flatten parameters."
        )


def _check_group(group: Group) -> None:
    _check_numbers(group)
    choices = {"variant": VARIANTS, "scaling": ("column", "matrix"), "limiter": LIMITERS, "refresh": METHODS}
    if "rank" in group:
        choices["proj_type"] = PROJ_TYPES
        for p in group["params"]:
            _check_matrix(p)
    for name, allowed in choices.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {group[name]!r}.")


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
            positive_integer = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            demands[name] = (positive_integer, "a positive integer")
        demands["alpha"] = (group["alpha"] > 0, "greater than 0")
    for name, (met, demand) in demands.items():
        if not met:
            raise ValueError(f"{name} must be {demand}, got {group[name]!r}.")


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

    A matrix is a trainable 2-D parameter outside nn.Embedding; a shared one is counted once. The key `matched` of the
    second group is the number of matrices that each pattern matched.

    Raises:
        ValueError: for a pattern that matches nothing, and for no patterns.
    """
    if not patterns:
        raise ValueError("patterns must not be empty, or nothing would be projected; name parts of the model.")
    # Embeddings and a head tied to one are 2-D too, but the paper does not project them.
    embedded = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim == 2 and id(p) not in embedded]
    matched = {pattern: sum(pattern in name for name, _ in matrices) for pattern in patterns}
    for pattern, count in matched.items():
        if count == 0:
            raise ValueError(
                f"The pattern {pattern!r} matches none of the model's {len(matrices)} trainable matrices; "
                f"use parts of names such as {matrices[0][0] if matrices else 'attn'!r}."
            )
    chosen = [p for name, p in matrices if any(pattern in name for pattern in patterns)]
    taken = {id(p) for p in chosen}
    others = [p for _, p in named if id(p) not in taken]
    keys = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type}
    return [{"params": others}, {"params": chosen, "matched": matched, **keys}]
