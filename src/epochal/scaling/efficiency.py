"""How much more data the standard recipe would need for the same loss.

Data scaling laws of "Pre-training under infinite compute": invert the standard recipe's data law,
`D_eq = (A / (L - E)) ** (1 / alpha)`, and divide by the tokens really used. The NanoGPT Slowrun counts otherwise (a table
of one-pass runs instead of a law of tuned ones): `slowrun_multiple`. The two are no numbers of one column.
"""

import math
from dataclasses import dataclass

import numpy as np

from epochal.scaling.power import LEVEL, Interval, PowerLaw

SEARCH_DECADES = 30.0
ROUNDS, POINTS = 5, 200  # (1 / 199) ** 5 of sixty decades is 4e-10: finer than anybody reads

SLOWRUN_TOKENS = 1e8
"""Distinct tokens of the Slowrun's training text (FineWeb, GPT-2 tokenizer)."""

SLOWRUN_TABLE = ((2e8, 3.703), (4e8, 3.370), (6e8, 3.200), (8e8, 3.123), (1e9, 3.046), (2e9, 2.892))
"""Tokens of one pass, and the lowest validation loss of nanochat d12, d20 and d26 (Slowrun's data_eff/README)."""


@dataclass(frozen=True)
class DataEfficiency:
    """`multiple` times the data: the reference recipe needs `equivalent` tokens for the loss reached with fewer.

    `interval` is the 90% interval of the multiple: the band of the reference law and the interval of the loss, as
    independent errors of log D (its upper end is inf where the band never comes down to the loss). It is None where the
    law has points but no interval; `note` then says why. `extrapolated` is True where `equivalent` lies outside the data
    sizes of the law, None where these are unknown.
    """

    multiple: float
    equivalent: float
    interval: Interval | None
    extrapolated: bool | None
    note: str

    @property
    def sentence(self) -> str:
        """Say the multiple in words, with its interval and whether it is extrapolated."""
        if math.isinf(self.multiple):
            return self.note
        within = "" if self.interval is None else f" (90% interval {self.interval[0]:.2f} to {self.interval[1]:.2f})"
        return " ".join(part for part in (f"Worth {self.multiple:.2f} times the data{within}.", self.note) if part)


def slowrun_multiple(loss: float) -> float | None:
    """Give the NanoGPT Slowrun's data efficiency of a validation loss: piecewise-linear in its table, over 100M tokens.

    Only for losses on the Slowrun's own validation tokens. None outside the table (above 3.703 or below 2.892 nats).
    """
    if not math.isfinite(loss):
        raise ValueError(f"loss = {loss} cannot be placed in the Slowrun's table: give a finite number.")
    tokens, losses = np.array(SLOWRUN_TABLE).T
    if not losses[-1] <= loss <= losses[0]:
        return None
    return float(np.interp(-loss, -losses, tokens)) / SLOWRUN_TOKENS


def law_from_constants(E: float, A: float, alpha: float, *, fitted_range: Interval | None = None) -> PowerLaw:
    """Give a published law as a PowerLaw without points, residuals or interval; `fitted_range` are its sizes' ends."""
    for name, value in (("E", E), ("A", A), ("alpha", alpha)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} = {value} is no constant of a decreasing law: give a finite, positive number.")
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
        note="Published constants: no points, so no interval.",
        variance=0.0,
        dof=0,
    )


def data_efficiency(
    loss: float,
    D: float,
    reference_law: PowerLaw,
    *,
    baseline_loss: float | None = None,
    loss_interval: Interval | None = None,
) -> DataEfficiency:
    """Invert the reference data law at `loss` and divide by D.

    loss: nats per token, reached with D distinct tokens (D in the unit of the law's x; the paper uses billions). With
    `baseline_loss`, divide by the reference's own equivalent of that loss instead of D, so that the baseline is exactly
    1, as the paper's plotting code does. `loss_interval` (an asymptote's interval, say) widens the result.

    Raises ValueError where loss or D is not finite and positive.
    """
    for name, value in (("loss", loss), ("D", D), ("baseline_loss", D if baseline_loss is None else baseline_loss)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value} cannot be placed on a data law: give a finite, positive number.")
    equivalent = _invert(reference_law, loss)
    unit = D if baseline_loss is None else _invert(reference_law, baseline_loss)
    if not math.isfinite(unit):
        raise ValueError(
            f"baseline_loss = {baseline_loss} lies at or below the limit {reference_law.E:.4f} of the reference law, "
            "so nothing can be measured against it: leave it out to divide by D."
        )
    interval, note = _interval(reference_law, loss, loss_interval, equivalent)
    extrapolated = None
    if reference_law.x.size:
        smallest, largest = float(np.min(reference_law.x)), float(np.max(reference_law.x))
        extrapolated = not smallest <= equivalent <= largest
        if extrapolated:
            note = f"Extrapolated: the reference law was fitted from {smallest:g} to {largest:g}. {note}".strip()
    if math.isinf(equivalent):
        note = f"No amount of data brings the reference below its limit {reference_law.E:.4f}."
    if interval is not None:
        interval = (interval[0] / unit, interval[1] / unit)
    return DataEfficiency(equivalent / unit, equivalent, interval, extrapolated, note)


def _interval(
    law: PowerLaw, loss: float, loss_interval: Interval | None, equivalent: float
) -> tuple[Interval | None, str]:
    """The interval of the equivalent tokens, and what it leaves out."""
    ends = (loss, loss) if loss_interval is None else loss_interval
    by_loss = (_invert(law, ends[1]), _invert(law, ends[0]))
    if law.interval is None:
        if law.y.size:
            return None, f"No interval: {law.note}"
        note = "The reference law is taken as exact."
        return (None, "") if loss_interval is None else (by_loss, note)
    by_law = (_band(law, loss, end=0), _band(law, loss, end=1))
    low = _combined(equivalent, by_law[0], by_loss[0], end=0)
    return (low, _combined(equivalent, by_law[1], by_loss[1], end=1)), ""


def _combined(centre: float, first: float, second: float, *, end: int) -> float:
    """The lower (0) or upper (1) end for two independent reasons: distances on the log scale add as squares."""
    if end == 0 and (math.isinf(centre) or 0.0 in (first, second)):
        return min(first, second)
    if end == 1 and math.inf in (centre, first, second):
        return math.inf
    distance = math.hypot(math.log(first / centre), math.log(second / centre))
    return centre * math.exp(distance if end else -distance)


def _invert(law: PowerLaw, loss: float) -> float:
    if loss <= law.E or law.A == 0.0:
        return math.inf
    return math.exp(math.log(law.A / (loss - law.E)) / law.alpha)


def _band(law: PowerLaw, loss: float, *, end: int) -> float:
    """Where the lower (0) or upper (1) edge of the law's band meets the loss; 0 and inf beyond the search range.

    Both edges fall with D, so ever finer grids on log D find the place: few, because each costs one call of the band.
    """
    centre = float(np.mean(np.log(law.x)))
    span = SEARCH_DECADES * math.log(10)
    low, high = centre - span, centre + span
    for _ in range(ROUNDS):
        grid = np.linspace(low, high, POINTS)
        above = law.quantiles((1 - LEVEL) / 2 if end == 0 else (1 + LEVEL) / 2, np.exp(grid)) > loss
        if above.all():
            return math.inf
        first = int(np.argmin(above))
        if first == 0:
            return 0.0
        low, high = float(grid[first - 1]), float(grid[first])
    return math.exp((low + high) / 2)
