"""Can a law be trusted? Held-out sizes, model choice, comparison of two limits, and intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epochal.scaling.members import MembersLaw
from epochal.scaling.power import TAILS, Interval, PowerLaw, checked, fit_constants


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
class Choice:
    """The law with the lowest AICc; `warning` names the laws without a score."""

    best: str
    scores: dict[str, float]
    warning: str


def aicc(residuals: npt.ArrayLike, parameters: int, weights: npt.ArrayLike | None = None) -> float:
    """Give Akaike's criterion with the small-sample correction.

    inf with fewer than `parameters` + 3 points: the noise variance counts as one more constant.
    """
    r = np.asarray(residuals, dtype=np.float64)
    w = np.ones_like(r) if weights is None else np.asarray(weights, dtype=np.float64)
    n, k = len(r), parameters + 1
    if n - k - 1 <= 0:
        return math.inf
    # Normal likelihood with the variance at its optimum, rss / n; weights are inverse variances.
    rss = float(np.sum(w * r**2))
    likelihood = n * math.log(max(rss, np.finfo(float).tiny) / n) - float(np.sum(np.log(w)))
    return likelihood + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def choose(laws: Mapping[str, PowerLaw]) -> Choice:
    """Choose between laws fitted to the same points by AICc.

    For example between a free and a fixed exponent. Raises ValueError without laws, or for unequal points.
    """
    if not laws:
        raise ValueError("No laws were given: pass at least one, by name.")
    if len({len(law.y) for law in laws.values()}) > 1:
        raise ValueError("The laws were fitted to different numbers of points: fit them to the same points first.")
    scores = {name: aicc(law.residuals, law.parameters, law.weights) for name, law in laws.items()}
    # Where no score is finite, the law with the fewest constants.
    best = min(laws, key=lambda name: (scores[name], laws[name].parameters))
    unscored = [name for name, score in scores.items() if math.isinf(score)]
    warning = f"Too few points ({len(laws[best].y)}) for an AICc of {', '.join(unscored)}." if unscored else ""
    return Choice(best, scores, warning)


@dataclass(frozen=True)
class Comparison:
    """Two limits compared in one sentence.

    `probability` is that of B's limit being below A's (None: unknown); `difference` is B - A in nats per token.
    """

    probability: float | None
    difference: float
    sentence: str


def compare_limits(
    a: PowerLaw | MembersLaw, b: PowerLaw | MembersLaw, *, names: tuple[str, str] = ("A", "B")
) -> Comparison:
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
    return Comparison(probability, difference, f"{sentence} (difference {difference:+.3f} nats).")


def seed_interval(losses: Sequence[float]) -> Interval | None:
    """Give Student's 90% interval of the mean over seeds; None for fewer than two."""
    from scipy.special import stdtrit

    values = checked("losses", losses, positive=False)
    if len(values) < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean, half_width = float(np.mean(values)), float(stdtrit(len(values) - 1, TAILS[1])) * error
    return mean - half_width, mean + half_width


def seed_caveats(differences: Sequence[float]) -> tuple[str, ...]:
    """Why the sign of a mean difference over seeds is uncertain: "one seed", "within noise", or nothing."""
    interval = seed_interval(differences)
    if interval is None:
        return ("one seed",)
    return ("within noise",) if interval[0] <= 0 <= interval[1] else ()
