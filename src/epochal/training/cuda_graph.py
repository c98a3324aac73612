"""Forward and backward pass of a micro-batch as one CUDA graph.

For small models, which need a thousand kernels a step, each shorter than its launch. A graph launches them as one; kernels
and numbers are the same.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Passes before the capture: libraries allocate their workspaces in the first ones.
WARM_UP = 3


def capture(function: Callable[[], None]) -> Callable[[], Any]:
    """Capture the kernels of a function in a CUDA graph; returns what replays them."""
    # Warm-up and capture are on a stream of their own: the default stream cannot be captured.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class GraphedPass:
    """A `GradientPass` of the training loop, replayed from a graph.

    All calls must have tokens of one shape and one normaliser. Parameters and gradients keep their memory.
    """

    def __init__(self, function: Callable[[Tensor, int, float], Tensor], parameters: Iterable[Tensor]) -> None:
        self._function = function
        self._parameters = list(parameters)
        self._gradients: list[Tensor] = []
        self._replay: Callable[[], Any] | None = None

    def __call__(self, tokens: Tensor, first_row: int, normaliser: float) -> Tensor:
        """Add the gradient of a micro-batch (b, T) and return its loss, 0-d; see `ModelWithLoss.forward`."""
        if self._replay is None:
            self._record(tokens, first_row, normaliser)
        if tokens.shape != self._tokens.shape or normaliser != self._normaliser:
            raise ValueError(
                f"a CUDA graph of {tuple(self._tokens.shape)} tokens cannot run {tuple(tokens.shape)}; use one shape."
            )
        # The optimizer's step drops the gradients: the first micro-batch of a step starts from zero, in the same memory.
        if self._parameters[0].grad is not self._gradients[0]:
            self._attach()
        self._tokens.copy_(tokens)
        assert self._replay is not None
        self._replay()
        return self._loss.clone()

    def _record(self, tokens: Tensor, first_row: int, normaliser: float) -> None:
        self._tokens, self._normaliser = tokens.clone(), normaliser
        self._loss = torch.zeros((), device=tokens.device)
        # Allocated before the capture, so that backward adds to them.
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._attach()

        def function() -> None:
            self._loss.copy_(self._function(self._tokens, first_row, normaliser))

        self._replay = capture(function)
        self._attach()

    def _attach(self) -> None:
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
