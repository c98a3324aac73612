"""How much more data the reference recipe would need for the same loss.

Data scaling laws of "Pre-training under infinite compute": invert the reference recipe's law in D,
`D_eq = (A / (L - E)) ** (1 / alpha)`, and divide by the tokens used. The NanoGPT Slowrun instead interpolates a table of
one-pass runs (`slowrun_multiple`). The two multiples are not comparable.
"""

import math
from dataclasses import dataclass

import numpy as np

from epochal.scaling.power import TAILS, Interval, PowerLaw

# Distinct tokens of the Slowrun's training text (FineWeb, GPT-2 tokenizer).
SLOWRUN_TOKENS = 1e8

# Tokens of one pass, and the lowest validation loss of nanochat d12, d20 and d26 (Slowrun's data_eff/README).
SLOWRUN_TABLE = ((2e8, 3.703), (4e8, 3.370), (6e8, 3.200), (8e8, 3.123), (1e9, 3.046), (2e9, 2.892))


@dataclass(frozen=True)
class DataEfficiency:
    """How much data a loss is worth, in terms of a reference law."""

    multiple: float  # `equivalent` over the tokens used
    equivalent: float  # tokens that the reference needs for the loss
    # 90%, of the multiple, from the band of the law and the interval of the loss; the upper end is inf if the band
    # never reaches the loss; None (with a `note`) if the law has points but no interval.
    interval: Interval | None
    extrapolated: bool | None  # whether `equivalent` is outside the data sizes of the law; None if these are unknown
    note: str


def slowrun_multiple(loss: float) -> float | None:
    """Give the NanoGPT Slowrun's data efficiency of a validation loss, piecewise linear in its table.

    Only for losses on the Slowrun's own validation tokens. None outside the table (above 3.703 or below 2.892 nats).
    """
    if not math.isfinite(loss):
        raise ValueError(f"loss must be a finite number, got {loss}.")
    tokens, losses = np.array(SLOWRUN_TABLE).T
    if not losses[-1] <= loss <= losses[0]:
        return None
    return float(np.interp(-loss, -losses, tokens)) / SLOWRUN_TOKENS


def law_from_constants(E: float, A: float, alpha: float, *, fitted_range: Interval | None = None) -> PowerLaw:
    """Give a published law, without points or interval; `fitted_range` is its smallest and largest x."""
    for name, value in (("E", E), ("A", A), ("alpha", alpha)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}.")
    empty = np.empty(0)
    return PowerLaw(
        E=E,
        A=A,
        alpha=alpha,
        x=np.array(fitted_range if fitted_range is not None else ()),
        y=empty,
        weights=empty,
        residuals=empty,
        interval=None,
        note="Published constants without points, so without an interval.",
        variance=0.0,
        dof=0,
    )


def data_efficiency(
    loss: float, D: float, reference_law: PowerLaw, *, loss_interval: Interval | None = None
) -> DataEfficiency:
    """Invert the reference data law at `loss` and divide by D.

    loss: nats per token, reached with D distinct tokens (D in the unit of the law's x; the paper uses billions).
    `loss_interval`, for example that of an asymptote, widens the result. Raises ValueError unless loss and D are finite
    and positive.
    """
    for name, value in (("loss", loss), ("D", D)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and positive, got {name} = {value}.")
    equivalent = _invert(reference_law, loss)
    interval, note = _interval(reference_law, loss, loss_interval, equivalent)
    if interval is not None:
        interval = (interval[0] / D, interval[1] / D)
    extrapolated = None
    if reference_law.x.size:
        smallest, largest = float(np.min(reference_law.x)), float(np.max(reference_law.x))
        extrapolated = not smallest <= equivalent <= largest
        if extrapolated:
            note = f"Extrapolated: the reference law was fitted from {smallest:g} to {largest:g}. {note}".strip()
    # The reference has a limit above the loss.
    if math.isinf(equivalent):
        note = f"No amount of data brings the reference below its limit {reference_law.E:.4f}."
    return DataEfficiency(equivalent / D, equivalent, interval, extrapolated, note)


def _interval(
    law: PowerLaw, loss: float, loss_interval: Interval | None, equivalent: float
) -> tuple[Interval | None, str]:
    """The interval of the equivalent tokens, and a note on what it does not cover."""
    ends = (loss, loss) if loss_interval is None else loss_interval
    # A higher loss needs less data, so the ends swap.
    by_loss = (_invert(law, ends[1]), _invert(law, ends[0]))
    if law.interval is None:
        if law.y.size:
            return None, f"No interval: {law.note}"
        return (None, "") if loss_interval is None else (by_loss, "The reference law is taken as exact.")
    low = _combined(equivalent, _band(law, loss, end=0), by_loss[0], end=0)
    return (low, _combined(equivalent, _band(law, loss, end=1), by_loss[1], end=1)), ""


def _combined(center: float, first: float, second: float, *, end: int) -> float:
    """Combine two independent errors into the lower (0) or upper (1) end."""
    # Added as squares, on the log scale, because multiples of data are ratios.
    if end == 0 and (math.isinf(center) or 0.0 in (first, second)):
        return min(first, second)
    if end == 1 and math.inf in (center, first, second):
        return math.inf
    distance = math.hypot(math.log(first / center), math.log(second / center))
    return center * math.exp(distance if end else -distance)


def _invert(law: PowerLaw, loss: float) -> float:
    if loss <= law.E or law.A == 0.0:
        return math.inf
    return math.exp(math.log(law.A / (loss - law.E)) / law.alpha)


def _band(law: PowerLaw, loss: float, *, end: int) -> float:
    """Where the lower (0) or upper (1) edge of the law's band meets the loss; inf if it never does."""
    assert law.posterior is not None
    excess = loss - law.posterior.E
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        needed = np.exp(np.log(law.posterior.A / excess) / law.posterior.alpha)
    needed = np.sort(np.where(excess > 0, needed, np.inf))
    return float(needed[round(TAILS[end] * (len(needed) - 1))])
