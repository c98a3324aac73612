"""Averages of a run's weights over its steps: EMA and SWA.

EMA: exponential moving average with Adam's bias correction. SWA: arXiv 1803.05407, here the mean over every step of the
end of the run. Both are `average += rate (weights - average)` with a rate that depends on the step.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from epochal.run import Run


class WeightAverage:
    """The running average of a model's weights: `tensors` by parameter name, one more copy of the model.

    With `weight_averaging = "last"` it is empty and all methods are no-ops.
    """

    def __init__(self, run: Run, model: torch.nn.Module) -> None:
        self.run = run
        averaged = model.named_parameters() if run.weight_averaging != "last" else ()
        self.tensors = {name: weight.detach().clone() for name, weight in averaged}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Add the weights after `step` steps (1 after the first)."""
        rate = mixing_rate(self.run, step) if self.tensors else 0.0
        for name, average in self.tensors.items():
            average.lerp_(model.get_parameter(name), rate)

    @contextmanager
    def in_place(self, model: torch.nn.Module) -> Iterator[None]:
        """Use the averaged weights inside a `with` block."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Swap the model's weights and the average."""
        for name, average in self.tensors.items():
            weight = model.get_parameter(name)
            last = weight.detach().clone()
            # In place: the optimizer and the wrapped model hold the same tensors.
            weight.copy_(average)
            average.copy_(last)


def mixing_rate(run: Run, step: int) -> float:
    """Return the share of the newest weights in the average after `step` steps.

    "ema": the sum of d^(step - s) w_s over s <= step, divided by the sum of d^(step - s), where
    d = exp(-1 / (averaging_window * steps)). "swa": the plain mean over the last averaging_window of the steps; before
    them the rate is 1, so the average is the newest weights.
    """
    window = run.averaging_window * run.steps
    if run.weight_averaging == "swa":
        return 1.0 / max(1, step - (run.steps - max(1, round(window))))
    decay = math.exp(-1.0 / window)
    # The denominator is the bias correction; at step 1 the rate is 1, so the initial weights do not count.
    return (1.0 - decay) / (1.0 - decay**step)
