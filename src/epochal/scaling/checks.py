"""Does the law deserve belief? Held-out points, model choice, seed weights, and comparison of two limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epochal.scaling.power import LEVEL, PowerLaw, checked, fit_power_law
from epochal.scaling.solve import Array

SHRINKAGE = 4.0  # prior degrees of freedom of the pooled variance: two or three seeds alone say little about theirs


@dataclass(frozen=True)
class HeldOut:
    """A law refitted without the points at x: what it predicts there, what was measured, and the limit it then has."""

    x: float
    predicted: float
    measured: float
    E: float

    @property
    def error(self) -> float:
        """Give predicted minus measured, in nats per token."""
        return self.predicted - self.measured


def leave_one_out(law: PowerLaw) -> list[HeldOut]:
    """Refit without each size in turn (all its seeds); needs one more distinct size than constants."""
    sizes = np.unique(law.x)
    if len(sizes) <= law.parameters:
        raise ValueError(
            f"{len(sizes)} distinct sizes leave nothing to hold out of a law with {law.parameters} constants: "
            "add runs at other sizes."
        )
    return [_without(law, float(size)) for size in sizes]


def held_out_largest(law: PowerLaw) -> HeldOut:
    """Refit without the largest size and predict it: the check closest to what an asymptote is used for."""
    return leave_one_out(law)[-1]


def _without(law: PowerLaw, size: float) -> HeldOut:
    rest = law.x != size
    shorter = fit_power_law(
        law.x[rest],
        law.y[rest],
        weights=law.weights[rest],
        bootstrap=0,
        alpha=law.fixed_alpha,
        alpha_bounds=law.alpha_bounds,
    )
    return HeldOut(size, float(shorter.predict(size)), float(np.mean(law.y[~rest])), shorter.E)


@dataclass(frozen=True)
class Choice:
    """The form with the lowest AICc; `scores` by name; `warning` says where the points cannot carry the choice."""

    best: str
    scores: dict[str, float]
    warning: str


def aicc(residuals: npt.ArrayLike, parameters: int, weights: npt.ArrayLike | None = None) -> float:
    """Give Akaike's criterion with the small-sample correction; inf where the points do not exceed the constants by 3.

    The noise variance counts as one more constant.
    """
    r = np.asarray(residuals, dtype=np.float64)
    w = np.ones_like(r) if weights is None else np.asarray(weights, dtype=np.float64)
    n, k = len(r), parameters + 1
    if n - k - 1 <= 0:
        return math.inf
    rss = float(np.sum(w * r**2))
    likelihood = n * math.log(max(rss, np.finfo(float).tiny) / n) - float(np.sum(np.log(w)))
    return likelihood + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def choose(laws: Mapping[str, PowerLaw]) -> Choice:
    """Choose between laws fitted to the same points, for example a free and a fixed exponent."""
    if not laws:
        raise ValueError("No laws were given: pass at least one, by name.")
    if len({len(law.y) for law in laws.values()}) > 1:
        raise ValueError("The laws were fitted to different numbers of points: fit them to the same points first.")
    scores = {name: aicc(law.residuals, law.parameters, law.weights) for name, law in laws.items()}
    starved = [name for name, score in scores.items() if math.isinf(score)]
    warning = ""
    if starved:
        count = len(next(iter(laws.values())).y)
        warning = f"Too few points ({count}) to judge {', '.join(starved)}: it cannot win however well it fits."
    if len(starved) == len(scores):
        fewest = min(laws, key=lambda name: laws[name].parameters)
        return Choice(fewest, scores, f"{warning} The form with the fewest constants is taken.")
    return Choice(min(scores, key=scores.__getitem__), scores, warning)


@dataclass(frozen=True)
class Comparison:
    """How probable it is that the limit of B lies under that of A, the middle of B - A, and one plain sentence."""

    probability: float | None
    difference: float
    sentence: str


def compare_limits(a: PowerLaw, b: PowerLaw, *, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compare two limits through their confidence distributions, taken as independent."""
    first, second = names
    difference = b.E - a.E
    where = "" if "limit" in first and "limit" in second else " in the limit"
    for name, law in ((first, a), (second, b)):
        if law.interval is None:
            return Comparison(None, difference, f"Whether {second} is lower than {first}{where} is open: {name} "
                              f"has no interval ({law.note.rstrip('.')}).")  # fmt: skip
    levels = (np.arange(400) + 0.5) / 400
    qa, qb = a.limit_quantiles(levels), b.limit_quantiles(levels)
    # The share of pairs with B below A; ties (both limits on their bound) count half.
    below = np.mean(qb[:, None] < qa[None, :]) + 0.5 * np.mean(qb[:, None] == qa[None, :])
    probability = float(below)
    if probability >= 0.5:
        sentence = f"{second} is lower than {first}{where}: probability {_shown(probability)}"
    else:
        sentence = f"{second} is higher than {first}{where}: probability {_shown(1 - probability)}"
    return Comparison(probability, difference, f"{sentence} (difference {difference:+.3f} nats).")


def _shown(probability: float) -> str:
    # The tails of a confidence distribution from a few points are not worth a third digit.
    return "above 0.99" if probability > 0.99 else f"{probability:.2f}"


def seed_reach(losses: npt.ArrayLike) -> float:
    """Give half the width of Student's 90% interval of the mean over seeds; raises ValueError for fewer than two."""
    from scipy.special import stdtrit

    values = checked("losses", losses, positive=False)
    if len(values) < 2:
        raise ValueError(f"{len(values)} seed tells nothing about its noise: run a second one.")
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * error


def seed_interval(losses: Sequence[float]) -> tuple[float, float] | None:
    """Give Student's 90% interval of the mean over seeds; None for fewer than two."""
    if len(losses) < 2:
        return None
    mean, reach = float(np.mean(losses)), seed_reach(losses)
    return mean - reach, mean + reach


def unsettled(differences: Sequence[float]) -> tuple[str, ...]:
    """Say what a mean difference over seeds lacks to have a sign: a second seed, or an interval without zero."""
    ends = seed_interval(differences)
    if ends is None:
        return ("one seed",)
    return ("within noise",) if ends[0] <= 0 <= ends[1] else ()


def seed_weights(losses: Sequence[npt.ArrayLike]) -> tuple[Array, Array]:
    """Give the mean and the weight (inverse variance of the mean) per size from the losses of its seeds.

    Each size's variance is shrunk towards the pooled one, which stands for four degrees of freedom: two seeds that
    agree by chance must not own the fit. Needs at least one size with two seeds that differ.
    """
    groups = [checked(f"losses[{i}]", values) for i, values in enumerate(losses)]
    if any(len(group) == 0 for group in groups):
        raise ValueError("A size has no losses: leave it out.")
    dof = np.array([len(group) - 1 for group in groups], dtype=np.float64)
    squares = np.array([float(np.sum((group - group.mean()) ** 2)) for group in groups])
    if not squares.sum() > 0:
        raise ValueError("No size has two seeds that differ, so their noise is unknown: fit without weights.")
    pooled = squares.sum() / dof.sum()
    variance = (SHRINKAGE * pooled + squares) / (SHRINKAGE + dof)
    return np.array([group.mean() for group in groups]), np.array([len(group) for group in groups]) / variance
