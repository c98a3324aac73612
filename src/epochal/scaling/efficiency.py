"""How much more data the standard recipe would need for the same loss.

Data scaling laws of "Pre-training under infinite compute": invert the standard recipe's data law,
`D_eq = (A / (L - E)) ** (1 / alpha)`, and divide by the tokens really used.
"""

import math
from dataclasses import dataclass

import numpy as np

from epochal.scaling.power import Interval, PowerLaw

SEARCH_DECADES = 30.0


@dataclass(frozen=True)
class DataEfficiency:
    """`multiple` times the data: the reference recipe needs `equivalent` tokens for the loss reached with fewer.

    `interval` is the 90% interval of the multiple from the band of the reference law (its upper end is inf where the
    band never comes down to the loss), or None where the law has none. `extrapolated` is True where `equivalent` lies
    outside the data sizes of the law, None where these are unknown.
    """

    multiple: float
    equivalent: float
    interval: Interval | None
    extrapolated: bool | None
    note: str


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
    low, high = loss_interval if loss_interval is not None else (loss, loss)
    interval = None
    if reference_law.interval is not None:
        interval = (_band(reference_law, high, end=0) / unit, _band(reference_law, low, end=1) / unit)
    extrapolated, note = None, ""
    if reference_law.x.size:
        smallest, largest = float(np.min(reference_law.x)), float(np.max(reference_law.x))
        extrapolated = not smallest <= equivalent <= largest
        if extrapolated:
            note = f"Extrapolated: the reference law was fitted from {smallest:g} to {largest:g}."
    if math.isinf(equivalent):
        note = f"No amount of data brings the reference below its limit {reference_law.E:.4f}."
    return DataEfficiency(equivalent / unit, equivalent, interval, extrapolated, note)


def _invert(law: PowerLaw, loss: float) -> float:
    if loss <= law.E or law.A == 0.0:
        return math.inf
    return math.exp(math.log(law.A / (loss - law.E)) / law.alpha)


def _band(law: PowerLaw, loss: float, *, end: int) -> float:
    """Where the lower (0) or upper (1) edge of the law's band meets the loss; 0 and inf beyond the search range.

    Both edges fall with D, so bisection on log D finds the place.
    """
    centre = float(np.mean(np.log(law.x)))
    span = SEARCH_DECADES * math.log(10)
    # Many small grids instead of single halvings: one call of the band serves all its points.
    low, high = centre - span, centre + span
    for _ in range(12):
        grid = np.linspace(low, high, 21)
        above = law.predict_interval(np.exp(grid))[end] > loss
        if above.all():
            return math.inf
        first = int(np.argmin(above))
        if first == 0:
            return 0.0
        low, high = float(grid[first - 1]), float(grid[first])
    return math.exp((low + high) / 2)
