"""Learning-rate multipliers as pure functions of (step, steps)."""

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
