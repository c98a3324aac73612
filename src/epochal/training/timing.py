"""Measure the optimizer's share of a step without extra synchronization."""

import time
from typing import Any

import torch


class StepClock:
    """Takes three marks a step: in device time on a GPU, else in wall-clock time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self._whole = self._update = 0.0

    def mark(self) -> None:
        """Record the time: at the start of a step, before the optimizer, and after it."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
        else:
            # Recorded on the stream, and read only when the loop waits for the device anyway.
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._marks.append(event)

    def read(self) -> None:
        """Add up the steps since the last call; waits for the device, so call it where the loop does anyway."""
        for start, before, after in zip(self._marks[::3], self._marks[1::3], self._marks[2::3], strict=True):
            self._whole += self._between(start, after)
            self._update += self._between(before, after)
        self._marks.clear()

    @property
    def share(self) -> float | None:
        """The optimizer's share of the steps read so far, from 0 to 1; None before the first."""
        return round(self._update / self._whole, 4) if self._whole else None

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type == "cpu":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))
