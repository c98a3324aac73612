"""Multipliers of learning rate and weight decay as pure functions of (step, steps)."""

import math


def multiplier(step: int, steps: int, *, warmup: float) -> float:
    """Return lr(step) / peak lr of a cosine schedule with linear warm-up.

    `warmup` is the share of the steps that warm up. The multiplier is exactly 0 at step 0 (with a warm-up) and at
    `steps`, and 1 at the end of the warm-up. Source: docs/infinite_compute.md, section 3.
    """
    rise = round(warmup * steps)
    if step < rise:
        return step / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / (steps - rise)))


def decay_multiplier(lr_multiplier: float, *, kind: str) -> float:
    """Return wd(step) / wd for the current multiplier m of the learning rate.

    "constant": 1. "antiphase": 1.5 - m, from 0.5 at the peak of the learning rate to 1.5 at its end and 1 on average over
    a cosine, the range of NanoGPT Slowrun's schedules. Raises ValueError for another `kind`.
    """
    match kind:
        case "constant":
            return 1.0
        case "antiphase":
            return 1.5 - lr_multiplier
    raise ValueError(f"wd_schedule must be constant or antiphase, got {kind!r}.")
