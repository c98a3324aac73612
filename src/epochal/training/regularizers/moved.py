"""Weights that are elsewhere for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

TINY = 1e-30


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together, 0-d."""
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def copied_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the gradients, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


@contextmanager
def moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
    """Move parameters by `length` along a direction inside a `with` block.

    Afterwards they have the same bits as before.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        factor = length / (total_norm(direction) + TINY)
        for parameter, each in zip(parameters, direction, strict=True):
            parameter.add_(each * factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
