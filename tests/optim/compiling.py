"""A backend for torch.compile that runs what it is given and counts the graphs: breaks and recompilations show."""

from collections.abc import Callable
from typing import Any

import torch


class CountGraphs:
    """Give an instance as `backend`; `graphs` is the number of graphs so far. Forgets what was compiled before."""

    def __init__(self) -> None:
        self.graphs = 0
        torch._dynamo.reset()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward
