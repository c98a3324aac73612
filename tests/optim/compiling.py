"""A backend for torch.compile that runs graphs as they are and counts them, so breaks and recompilations show."""

from collections.abc import Callable
from typing import Any

import torch


class CountGraphs:
    """Pass an instance as `backend`; `graphs` counts the graphs so far. Creating one clears earlier compilations."""

    def __init__(self) -> None:
        self.graphs = 0
        torch._dynamo.reset()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward
