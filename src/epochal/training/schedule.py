"""Multipliers of learning rate and weight decay as pure functions of (step, steps)."""

import math

DECAY_SHARE = 0.2
"""The share of a WSD run that falls linearly to zero (the usual 20%)."""


def multiplier(step: int, steps: int, *, kind: str, warmup: float) -> float:
    """Return lr(step) / peak lr, from 0 at step 0 over 1 at the end of the warm-up to exactly 0 at `steps`.

    `warmup` is a share of `steps`. "cosine": spec section 3, point 5; "wsd": constant, then linear over the last 20%.
    Raises ValueError for another `kind`.
    """
    rise = round(warmup * steps)
    if step < rise:
        return step / rise
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / (steps - rise)))
    if kind == "wsd":
        return min(1.0, (steps - step) / (DECAY_SHARE * steps))
    raise ValueError(f"schedule is {kind!r}; choose from cosine, wsd.")


def decay_multiplier(lr_multiplier: float, *, kind: str) -> float:
    """Return wd(step) / wd where the learning rate is at `lr_multiplier` of its peak.

    "constant": 1. "antiphase": 1.5 - m, which rises from 0.5 at the peak of the learning rate to 1.5 at its end, 1 on
    average over a cosine (the range of NanoGPT Slowrun's schedules). "proportional": m, so that the shrinkage of a
    step goes with the square of the learning rate (AdamC, Defazio 2025). Raises ValueError for another `kind`.
    """
    match kind:
        case "constant":
            return 1.0
        case "antiphase":
            return 1.5 - lr_multiplier
        case "proportional":
            return lr_multiplier
    raise ValueError(f"wd_schedule is {kind!r}; choose from constant, antiphase, proportional.")
