"""Can a law be trusted? Held-out sizes, other forms, and the comparison of two limits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import TAILS, Interval, PowerLaw, fit_constants
from epochal.scaling.solve import Array

LAW = "E + A/x^alpha"


@dataclass(frozen=True)
class HeldOut:
    """One size x held out: predicted loss, measured mean, and limit E of the refit."""

    x: float
    predicted: float
    measured: float
    E: float

    @property
    def error(self) -> float:
        """Predicted minus measured, in nats per token."""
        return self.predicted - self.measured


def leave_one_out(law: PowerLaw) -> list[HeldOut]:
    """Refit without each size (all its seeds).

    Raises ValueError unless there are more distinct sizes than constants.
    """
    sizes = np.unique(law.x)
    if len(sizes) <= law.parameters:
        raise ValueError(
            f"Holding out a size needs more than {law.parameters} distinct sizes, got {len(sizes)}: "
            "add runs at other sizes."
        )
    held_out = []
    for size in sizes.tolist():
        rest = law.x != size
        refit = fit_constants(law.x[rest], law.y[rest], weights=law.weights[rest], exponent=law.fixed_alpha)
        held_out.append(HeldOut(size, float(refit.predict(size)), float(np.mean(law.y[~rest])), refit.E))
    return held_out


def held_out_largest(law: PowerLaw) -> HeldOut:
    """Predict the largest size from the others: the check closest to extrapolating to a limit."""
    return leave_one_out(law)[-1]


@dataclass(frozen=True)
class FormWeight:
    """One form of a law: its limit (None: it has none), and its weight among all forms."""

    name: str
    E: float | None
    weight: float


@dataclass(frozen=True)
class LawChecks:
    """What leaving out sizes says about a law; empty with too few sizes."""

    left_out: tuple[HeldOut, ...]  # by ascending size
    forms: tuple[FormWeight, ...]  # weights sum to 1

    @property
    def largest(self) -> HeldOut | None:
        """The largest size, predicted from the others."""
        return self.left_out[-1] if self.left_out else None

    @property
    def sentence(self) -> str:
        """All of it in one sentence for a report."""
        if not self.left_out:
            return ""
        worst = max(abs(held.error) for held in self.left_out)
        forms = "; ".join(
            f"{form.name} {form.weight:.2f}" + (f" (E = {form.E:.4f})" if form.E is not None else "")
            for form in self.forms
        )
        return (
            f"Predicted without it, the largest size is off by {self.left_out[-1].error:+.4f} nats, and the worst of "
            f"{len(self.left_out)} sizes by {worst:.4f}. Weights of forms by such errors: {forms}."
        )


def check_law(law: PowerLaw) -> LawChecks:
    """Leave out every size once, for the law and for other forms.

    A form's weight is its squared errors at left-out sizes to the power -n / 2 of n sizes, the likelihood of normal errors
    at their best variance. Empty unless there are more distinct sizes than constants.
    """
    sizes, group = np.unique(law.x, return_inverse=True)
    if len(sizes) <= law.parameters:
        return LawChecks((), ())
    left_out = tuple(leave_one_out(law))
    # One point for each size: seeds of a size do not show what the form misses there.
    means = np.bincount(group, law.weights * law.y) / np.bincount(group, law.weights)
    errors: dict[str, tuple[list[float], float | None]] = {
        LAW if law.fixed_alpha is None else f"E + A/x^{law.fixed_alpha:g}": ([h.error for h in left_out], law.E)
    }
    for name, (predict, limit) in _other_forms(sizes, means).items():
        rest = [np.arange(len(sizes)) != i for i in range(len(sizes))]
        errors[name] = ([predict(k, i) - means[i] for i, k in enumerate(rest)], limit)
    scores = np.array([-len(sizes) / 2 * math.log(np.mean(np.square(e)) + 1e-300) for e, _ in errors.values()])
    weights = np.exp(scores - np.max(scores))
    weights /= np.sum(weights)
    forms = (FormWeight(name, E, w) for (name, (_, E)), w in zip(errors.items(), weights.tolist(), strict=True))
    return LawChecks(left_out, tuple(forms))


def _other_forms(x: Array, y: Array) -> dict[str, tuple[Callable[[Array, int], float], float | None]]:
    """Forms of two constants: how each predicts a size from the others, and its limit."""
    logs = np.log(x)

    def root(kept: Array, index: int) -> float:
        return float(fit_constants(x[kept], y[kept], exponent=0.5).predict(x[index]))

    def no_limit(kept: Array, index: int) -> float:
        return math.exp(float(np.polyval(np.polyfit(logs[kept], np.log(y[kept]), 1), logs[index])))

    def logarithm(kept: Array, index: int) -> float:
        return float(np.polyval(np.polyfit(logs[kept], y[kept], 1), logs[index]))

    return {
        "E + A/x^0.5": (root, fit_constants(x, y, exponent=0.5).E),
        "A/x^alpha": (no_limit, 0.0),
        "a - b log x": (logarithm, None),
    }


class Limit(Protocol):
    """A law with a limit: `PowerLaw` or `MembersLaw`."""

    @property
    def E(self) -> float: ...  # noqa: D102, N802
    @property
    def interval(self) -> dict[str, Interval] | None: ...  # noqa: D102
    @property
    def note(self) -> str: ...  # noqa: D102
    def quantiles(self, probability: npt.ArrayLike, x: npt.ArrayLike, /) -> Array: ...  # noqa: D102


@dataclass(frozen=True)
class Comparison:
    """Two limits compared in one sentence.

    `probability` is that of B's limit being below A's (None: unknown); `difference` is B - A in nats per token, with its
    90% interval.
    """

    probability: float | None
    difference: float
    sentence: str
    interval: Interval | None = None


def compare_limits(a: Limit, b: Limit, *, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compare two limits by their confidence distributions, taken as independent."""
    first, second = names
    difference = b.E - a.E
    where = "" if "limit" in first and "limit" in second else " in the limit"
    for name, law in ((first, a), (second, b)):
        if law.interval is None:
            sentence = f"Whether {second} is lower than {first}{where} is unknown: {name} has no interval"
            return Comparison(None, difference, f"{sentence} ({law.note.rstrip('.')}).")
    # 400 quantiles of each distribution stand for draws from it.
    levels = (np.arange(400) + 0.5) / 400
    qa, qb = a.quantiles(levels, math.inf), b.quantiles(levels, math.inf)
    # The share of pairs with B below A; ties (both limits on their bound) count half.
    below = np.mean(qb[:, None] < qa[None, :]) + 0.5 * np.mean(qb[:, None] == qa[None, :])
    probability = float(below)
    likely = max(probability, 1 - probability)
    # A distribution from a few points does not support a third digit in its tails.
    chance = "above 0.99" if likely > 0.99 else f"{likely:.2f}"
    sentence = f"{second} is {'lower' if probability >= 0.5 else 'higher'} than {first}{where}: probability {chance}"
    if (probability < 0.5) == (difference < 0):
        # The law that fits best and most of the laws that fit about as well are on two sides.
        sentence = f"Whether {second} is lower than {first}{where} is undecided: probability {probability:.2f}"
    low, high = np.quantile(qb[:, None] - qa[None, :], TAILS).tolist()
    # Two limits that were fitted differently from their draws must still be in the interval.
    interval = min(low, difference), max(high, difference)
    return Comparison(probability, difference, f"{sentence} (difference {difference:+.3f} nats).", interval)
