"""Which subsets of an ensemble's members are evaluated, and what their losses say about other members.

Subsets share members, so their losses are no independent draws: an interval comes from the jackknife over members
(Efron and Stein 1981), which takes one member at a time away from everything. No torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """Losses in nats against the number of members k.

    `losses[k]` are those of the subsets of `circle`; `without[k][i]` is their mean when member i does not exist, for
    k < K. Both average over members equally.
    """

    losses: dict[int, list[float]]
    without: dict[int, list[float]]

    def intervals(self) -> dict[int, tuple[float, float]]:
        """Return the 90% interval of the mean loss of k members like these, for every k that the jackknife reaches.

        It covers the draw of the members, not that of the held-out text. For k = K it is as wide as for K - 1, which
        is what the jackknife knows, and a little wider than it need be.
        """
        count = max(self.losses)
        found = {}
        for k, losses in self.losses.items():
            replicates = self.without.get(min(k, count - 1), [])
            if len(replicates) > 1:
                mean, reach = math.fsum(losses) / len(losses), jackknife_reach(replicates)
                found[k] = (mean - reach, mean + reach)
        return found


def jackknife_reach(replicates: Sequence[float], *, level: float = 0.90) -> float:
    """Return half the width of an interval for a statistic of n members from its n leave-one-out values.

    Student's t with n - 1 degrees of freedom times the jackknife error, sqrt((n - 1) / n * sum of squared deviations).
    """
    from scipy import special

    n = len(replicates)
    mean = math.fsum(replicates) / n
    error = math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in replicates))
    return float(special.stdtrit(n - 1, (1 + level) / 2)) * error


def circle(members: Sequence[int], k: int) -> list[Subset]:
    """Return the k neighbours from each start on a circle of members; one subset when k is all of them."""
    count = len(members)
    starts = 1 if k == count else count
    return [tuple(sorted(members[(start + offset) % count] for offset in range(k))) for start in range(starts)]


def curve_of(count: int, losses_of: Callable[[list[Subset]], dict[Subset, float]]) -> Curve:
    """Return the curve of `count` members; `losses_of` is asked once, for all subsets.

    That are fewer than 2^K and about K^3 / 2. A subset without a loss in the answer is left out of every mean.
    """
    everyone = list(range(count))
    others = [[member for member in everyone if member != gone] for gone in everyone]
    wanted = {k: circle(everyone, k) for k in range(1, count + 1)}
    wanted_without = {k: [circle(rest, k) for rest in others] for k in range(1, count)}
    flat = [subset for subsets in wanted.values() for subset in subsets]
    flat += [subset for lists in wanted_without.values() for subsets in lists for subset in subsets]
    found = losses_of(list(dict.fromkeys(flat)))
    losses = {k: [found[subset] for subset in subsets if subset in found] for k, subsets in wanted.items()}
    without = {k: [_mean(found, subsets) for subsets in lists] for k, lists in wanted_without.items()}
    return Curve(
        losses={k: values for k, values in losses.items() if values},
        without={k: values for k, values in without.items() if not any(map(math.isnan, values))},
    )


def _mean(found: dict[Subset, float], subsets: list[Subset]) -> float:
    values = [found[subset] for subset in subsets if subset in found]
    return math.fsum(values) / len(values) if values else math.nan
