"""The published SPECTRA wrapper (docs/spectra.md, sections 1.3 to 1.10) in float64, written from its description.

Per step: base step on a copy of the weights, recover U from the difference, clip U, step again from the old weights.
The bases with the hyper-parameters of the published runs are included, one function each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def soft_clip(x: Tensor, c: float, iterations: int) -> Tensor:
    """What `iterations` exact cubic Newton-Schulz steps do to each singular value (section 1.6), by an SVD."""
    if x.ndim == 1:
        norm = float(x.norm())
        return x if norm <= c else x / math.sqrt(1 + (norm / c) ** 2)
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    gram = wide @ wide.mT
    a = 1 + min(float(gram.abs().sum(1).max()), float(gram.norm())) / c**2
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    root = torch.sqrt((1 + (s / c) ** 2) / a)
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * root**3
    return (left * (root * s / torch.sqrt(1 + (s / c) ** 2))) @ right


def normalize(x: Tensor, iterations: int) -> Tensor:
    """Muon's quintic steps (section 1.7)."""
    if x.ndim == 1:
        return x / (x.norm() + 1e-7)
    y = (x if x.shape[0] <= x.shape[1] else x.mT) / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return y if x.shape[0] <= x.shape[1] else y.mT


@dataclass
class PublishedSpectra:
    """The wrapper over a list of float64 weights; `step` replaces them. Options as those of `epochal.optim.Spectra`."""

    weights: list[Tensor]
    base: str
    peak_lr: float
    weight_decay: float
    clip: float
    iterations: int
    apply_to: str = "2d"
    operator: str = "soft"
    betas: tuple[float, ...] = (0.9, 0.95)
    mars_type: str = "mars-adamw"
    warmup_steps: int = 0
    total_steps: int = 1
    pre_clip: float | None = None
    grad_clip: float | None = None
    k: int = 0
    state: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = [{} for _ in self.weights]

    def step(self, gradients: list[Tensor], lr: float) -> None:
        gradients = self.clipped_gradients(gradients, lr)
        for i, (w, g) in enumerate(zip(self.weights, gradients, strict=True)):
            after = self.base_step(w, g, self.state[i], lr)
            if w.ndim != 2 and self.apply_to == "2d":
                self.weights[i] = after
                continue
            update = (w - after) / lr - self.weight_decay * w
            alpha = math.sqrt(max(1, w.shape[0] / w.shape[1])) if w.ndim == 2 else 1.0
            if self.operator == "normalize":
                clipped = normalize(update, self.iterations)
            else:
                clipped = soft_clip(update, self.threshold(self.clip, lr), self.iterations)
            self.weights[i] = (1 - self.weight_decay * lr) * w - alpha * lr * clipped
        self.k += 1

    def threshold(self, c: float, lr: float) -> float:
        return c * self.peak_lr / max(lr, 1e-10) if self.k < self.warmup_steps else c

    def clipped_gradients(self, gradients: list[Tensor], lr: float) -> list[Tensor]:
        if self.pre_clip is not None:
            c = self.threshold(self.pre_clip, lr)
            gradients = [soft_clip(g, c, self.iterations) if g.ndim == 2 else g for g in gradients]
        if self.grad_clip is not None:
            total = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients))
            gradients = [g * min(1, self.grad_clip / (total + 1e-6)) for g in gradients]
        return gradients

    # --- the bases ----------------------------------------------------------------------------------------------------

    def base_step(self, w: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> Tensor:
        decayed = w * (1 - lr * self.weight_decay)
        if self.base == "adamw":
            return decayed - lr * self.adam(g, state, *self.betas)
        if self.base in ("signum", "sgdm"):
            return decayed - lr * self.momentum(g, state, decayed)
        if self.base == "lion":
            return decayed - lr * self.lion(g, state)
        if self.base == "ademamix":
            return decayed - lr * self.ademamix(g, state)
        assert self.base == "mars"
        if g.ndim < 2:  # vectors have their own learning rate and decay
            lr_1d = lr / 3
            return w * (1 - lr_1d * 0.1) - lr_1d * self.adam(g, state, 0.8, 0.999)
        return decayed - lr * self.mars(g, state)

    def adam(self, g: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        t = self.k + 1
        state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
        return state["m"] / (1 - beta1**t) / ((state["v"] / (1 - beta2**t)).sqrt() + 1e-8)

    def momentum(self, g: Tensor, state: dict[str, Any], decayed: Tensor) -> Tensor:
        """Signum and SGDM with Nesterov; the published buffer starts at the decayed weights."""
        state["m"] = 0.95 * state.get("m", decayed) + g
        direction = g + 0.95 * state["m"]
        return direction.sign() if self.base == "signum" else direction

    def lion(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        beta1, beta2 = self.betas
        m = state.get("m", torch.zeros_like(g))
        state["m"] = beta2 * m + (1 - beta2) * g
        return (beta1 * m + (1 - beta1) * g).sign()

    def ademamix(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        """AdEMAMix with alpha = 8, whose alpha and beta_3 rise over all steps."""
        beta1, beta2, beta3 = self.betas
        t = self.k + 1
        risen = min(t / self.total_steps, 1.0)
        # beta_3 interpolates half-lives.
        half_life1, half_life3 = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))
        beta3_t = beta3 if risen == 1 else 0.5 ** (1 / ((1 - risen) * half_life1 + risen * half_life3 + 1))
        state["slow"] = beta3_t * state.get("slow", 0) + (1 - beta3_t) * g
        fast = self.adam(g, state, beta1, beta2)
        return fast + 8.0 * risen * state["slow"] / ((state["v"] / (1 - beta2**t)).sqrt() + 1e-8)

    def mars(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        """MARS with gamma = 0.025; mars-lion takes the sign of the momentum."""
        corrected = g + 0.025 * 0.95 / 0.05 * (g - state.get("last", 0))
        corrected = corrected / max(1.0, float(corrected.norm()))
        state["last"] = g
        direction = self.adam(corrected, state, 0.95, 0.99)
        return state["m"].sign() if self.mars_type == "mars-lion" else direction
