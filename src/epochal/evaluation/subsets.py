"""Which subsets of an ensemble's members are evaluated, and confidence intervals from their losses. No torch.

Subsets share members, so their losses are not independent samples. Intervals come from the jackknife over members (Efron
and Stein 1981), which leaves one member at a time out of all subsets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """Losses in nats against the number of members k.

    `losses[k]` are those of the subsets of `cyclic_subsets`; `leave_one_out[k][i]` is their mean if the ensemble had been
    trained without member i, for k < K. Both weight members equally.
    """

    losses: dict[int, list[float]]  # by k: one loss for each subset
    leave_one_out: dict[int, list[float]]  # by k: one mean for each member left out

    def intervals(self) -> dict[int, tuple[float, float]]:
        """Return the 90% interval of the mean loss of k new members, by k.

        A k without enough replicates is left out. The interval covers the random draw of the members, not that of the
        held-out text.
        """
        count = max(self.losses)
        intervals = {}
        for k, losses in self.losses.items():
            # There is no leave-one-out value at k = K; that of K - 1 is slightly too wide, so conservative.
            replicates = self.leave_one_out.get(min(k, count - 1), [])
            if len(replicates) > 1:
                mean, half_width = math.fsum(losses) / len(losses), jackknife_half_width(replicates)
                intervals[k] = (mean - half_width, mean + half_width)
        return intervals


def jackknife_half_width(replicates: Sequence[float], *, level: float = 0.90) -> float:
    """Return half the width of an interval for a statistic from its n leave-one-out values.

    Student's t with n - 1 degrees of freedom times the jackknife error, sqrt((n - 1) / n * sum of squared deviations).
    """
    from scipy import special

    n = len(replicates)
    mean = math.fsum(replicates) / n
    error = math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in replicates))
    return float(special.stdtrit(n - 1, (1 + level) / 2)) * error


def cyclic_subsets(members: Sequence[int], k: int) -> list[Subset]:
    """Return the K subsets of k consecutive members, the last followed by the first; one subset if k = K.

    Every member is in k of them, so all members count equally.
    """
    count = len(members)
    starts = 1 if k == count else count
    return [tuple(sorted(members[(start + offset) % count] for offset in range(k))) for start in range(starts)]


def curve_of(count: int, losses_of: Callable[[list[Subset]], dict[Subset, float]]) -> Curve:
    """Return the curve of `count` members; `losses_of` is called once, with all subsets.

    There are fewer than 2^K and about K^3 / 2 of them. Subsets that `losses_of` omits are left out of every mean.
    """
    members = list(range(count))
    remaining = [[member for member in members if member != removed] for removed in members]
    full = {k: cyclic_subsets(members, k) for k in range(1, count + 1)}
    reduced = {k: [cyclic_subsets(rest, k) for rest in remaining] for k in range(1, count)}
    flat = [subset for subsets in full.values() for subset in subsets]
    flat += [subset for lists in reduced.values() for subsets in lists for subset in subsets]
    # Each subset once: leave-one-out rings share many of them.
    loss_of = losses_of(list(dict.fromkeys(flat)))
    losses = {k: [loss_of[subset] for subset in subsets if subset in loss_of] for k, subsets in full.items()}
    leave_one_out = {k: [_mean(loss_of, subsets) for subsets in lists] for k, lists in reduced.items()}
    return Curve(
        losses={k: values for k, values in losses.items() if values},
        leave_one_out={k: values for k, values in leave_one_out.items() if not any(map(math.isnan, values))},
    )


def _mean(loss_of: dict[Subset, float], subsets: list[Subset]) -> float:
    values = [loss_of[subset] for subset in subsets if subset in loss_of]
    return math.fsum(values) / len(values) if values else math.nan
