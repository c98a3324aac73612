"""What share of a step the optimizer takes, without making a device wait that would not have waited."""

import time
from typing import Any

import torch


class StepClock:
    """Three marks a step; `read` where the loop waits for the device anyway. Device time where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self._whole = self._update = 0.0

    def mark(self) -> None:
        """Note the time: at the begin of a step, before the optimizer, and after it."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._marks.append(event)

    def read(self) -> None:
        """Add up the steps since the last call."""
        for begin, before, after in zip(*[iter(self._marks)] * 3, strict=True):
            self._whole += self._between(begin, after)
            self._update += self._between(before, after)
        self._marks.clear()

    @property
    def share(self) -> float | None:
        """The optimizer's part of the steps read, from 0 to 1; None before the first."""
        return round(self._update / self._whole, 4) if self._whole else None

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type == "cpu":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end))
