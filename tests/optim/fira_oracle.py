"""Fira by its specification (docs/fira.md, section 1) in NumPy and float64; shares no code with epochal.optim."""

from __future__ import annotations

import numpy as np
import torch


def spread_gradients(shape, steps, seed=0, dtype=torch.float32, ratio=0.8, scale=0.1):
    """Gradients whose singular values fall by 20% each, so that the singular vectors are well defined; 1-D: noise."""
    rng = np.random.default_rng(seed)
    if len(shape) == 1:
        return [torch.tensor(scale * rng.standard_normal(shape), dtype=dtype) for _ in range(steps)]
    m, n = shape
    k = min(m, n)
    out = []
    for _ in range(steps):
        u = np.linalg.qr(rng.standard_normal((m, k)))[0]
        v = np.linalg.qr(rng.standard_normal((n, k)))[0]
        out.append(torch.tensor(scale * (u * ratio ** np.arange(k)) @ v.T, dtype=dtype))
    return out


def start(shape, seed=7, dtype=torch.float32, scale=0.02):
    rng = np.random.default_rng(seed)
    return torch.nn.Parameter(torch.tensor(scale * rng.standard_normal(shape), dtype=dtype))


def numpy_basis(g, rank, side):
    u, _, vt = np.linalg.svd(np.asarray(g, dtype=np.float64), full_matrices=False)
    return u[:, :rank] if side == "left" else vt[:rank]


class Oracle:
    """One matrix: `step(g, basis)` returns lr U; `n`, `scaled` (S) and `residual` are those of the last step."""

    def __init__(self, side, *, alpha, lr, betas=(0.9, 0.999), eps=1e-6, correct_bias=True, gamma=1.01):
        self.side, self.alpha, self.lr, self.betas, self.eps = side, alpha, lr, betas, eps
        self.correct_bias, self.gamma = correct_bias, gamma
        self.m = self.v = self.s = None
        self.t = 0

    def step(self, g, basis, variant="code", scaling="column"):
        g, basis = np.asarray(g, np.float64), np.asarray(basis, np.float64)
        left = self.side == "left"
        r = basis.T @ g if left else g @ basis.T

        def back(x):
            return basis @ x if left else x @ basis

        if self.m is None:
            self.m, self.v = np.zeros_like(r), np.zeros_like(r)
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * r * r
        self.t += 1
        n = self.m / (np.sqrt(self.v) + self.eps)
        correction = np.sqrt(1 - b2**self.t) / (1 - b1**self.t) if self.correct_bias else 1.0
        if variant == "paper":
            n = n * correction
            residual = g - back(r)
        else:
            residual = g - self.alpha * back(r)
        axis = self.axis = 0 if left else 1
        self.low_norms = np.linalg.norm(r, axis=axis)
        if scaling == "column":
            phi = np.linalg.norm(n, axis=axis, keepdims=True) / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        else:
            phi = np.linalg.norm(n) / (np.linalg.norm(r) + 1e-8)
        scaled = phi * residual
        self.raw_norm = np.linalg.norm(scaled)
        if self.s is None:
            self.s = self.raw_norm
        elif self.gamma is not None:
            limit = max(self.raw_norm / (self.s + 1e-8), self.gamma) / self.gamma
            scaled = scaled / limit
            self.s = self.raw_norm / limit
        self.n, self.scaled, self.residual = n, scaled, residual
        if variant == "galore":
            return self.lr * correction * self.alpha * back(n)
        if variant == "paper":
            return self.lr * self.alpha * (back(n) + scaled)
        return self.lr * correction * (self.alpha * back(n) + scaled)


def drive(optimizer, parameter, gradients):
    """Step over the gradients; return the weights after each step."""
    path = []
    for g in gradients:
        parameter.grad = g.clone().to(parameter.dtype)
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def movement(path, begin):
    return max((w.double() - begin.double()).abs().max().item() for w in path)


def difference(path, other):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(path, other, strict=True))
