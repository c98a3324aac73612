"""The limit of ever more members, from the losses of the subsets of one set of members.

The losses of 1, 2, ..., K members are no independent points: all are made of the same K models, so their scatter about
the law says nothing about the luck of these members (such intervals covered in 8% to 29% of simulated ensembles). The
interval here is a jackknife over members (each is left out in turn, with every subset that holds it), which is the error
that a new draw of members would show (`benchmarks/laws.csv`). Law: E + A / k, for members that are trained independently
(section 6 of "Pre-training under infinite compute": exponents 1.0 to 1.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from epochal.scaling.power import LEVEL, PowerLaw, fit_power_law
from epochal.scaling.solve import Array

FEWEST_MEMBERS = 4
Curve = Mapping[int, Sequence[float]]


@dataclass(frozen=True, eq=False)
class MembersLaw(PowerLaw):
    """The law in K of one set of members; `replicates` (K, 3) holds E, A, alpha refitted without each member.

    `error` is the jackknife's standard error of E in nats, with `dof` = K - 1; nan where there is none.
    """

    replicates: Array = field(default_factory=lambda: np.empty((0, 3)), repr=False)
    error: float = float("nan")

    def _quantiles(self, probability: Array, x: Array) -> Array:
        from scipy.special import stdtrit

        E, A, alpha = self.replicates.T
        spread = _jackknife_error(E + A * np.exp(-alpha * np.log(x)[:, None]))
        return np.asarray(self.predict(x) + stdtrit(self.dof, probability) * spread)


def fit_members(losses: Curve, without: Curve | None = None, *, alpha: float = 1.0) -> MembersLaw:
    """Fit `E + A / k**alpha` to {k: losses of subsets of k members}, each k entering once with its mean.

    Losses are nats per token. `without[k][i]` is the mean of k members when member i does not exist, as records of
    ensembles hold it; where it is not given it is taken from `losses`, if these are those of the k neighbours from each
    start on a circle of members. There is no interval below four members or where both are missing; `note` then says
    why. Raises ValueError on values that cannot be used and on fewer than two k.
    """
    count = max(losses, default=0)
    means = {k: float(np.mean(values)) for k, values in losses.items()}
    law = MembersLaw(**vars(fit_power_law(list(means), list(means.values()), alpha=alpha, bootstrap=0)))
    curves = _leave_one_out(count, losses, without)
    note = _why_not(count, curves)
    if note:
        return replace(law, interval=None, note=note, dof=max(count - 1, 0))
    fits = [fit_power_law(list(curve), list(curve.values()), alpha=alpha, bootstrap=0) for curve in curves]
    replicates = np.array([[fit.E, fit.A, fit.alpha] for fit in fits])
    errors = _jackknife_error(replicates.T)
    return replace(
        law,
        interval=_interval(law, errors, count - 1),
        note="",
        dof=count - 1,
        replicates=replicates,
        error=float(errors[0]),
    )


def _interval(law: PowerLaw, errors: Array, dof: int) -> dict[str, tuple[float, float]]:
    from scipy.special import stdtrit

    reach = float(stdtrit(dof, (1 + LEVEL) / 2)) * errors
    centres = {"E": law.E, "A": law.A, "alpha": law.alpha}
    return {
        name: (float(centre - half), float(centre + half))
        for (name, centre), half in zip(centres.items(), reach, strict=True)
    }


def _leave_one_out(count: int, losses: Curve, without: Curve | None) -> list[dict[int, float]]:
    """The curve that each member's absence leaves; empty where nobody knows."""
    if without is None:
        without = _from_circle(count, losses)
    usable = {k: values for k, values in without.items() if len(values) == count}
    return [{k: values[member] for k, values in usable.items()} for member in range(count)] if len(usable) > 1 else []


def _from_circle(count: int, losses: Curve) -> dict[int, list[float]]:
    """Means of the subsets that do not hold a member; subset `start` of k members is start, ..., start + k - 1."""
    found = {}
    for k, values in losses.items():
        if k < count and len(values) == count:
            outside = [[start for start in range(count) if (member - start) % count >= k] for member in range(count)]
            found[k] = [float(np.mean([values[start] for start in starts])) for starts in outside]
    return found


def _why_not(count: int, curves: Sequence[object]) -> str:
    if count < FEWEST_MEMBERS:
        return f"Too few members for an interval: {count}, and at least {FEWEST_MEMBERS} are needed."
    if not curves:
        return "No interval: all K share members, and the losses without each member are not known."
    return ""


def _jackknife_error(replicates: Array) -> Array:
    """Standard error from leave-one-out values along the last axis: sqrt((K - 1) / K * sum of squared deviations)."""
    return np.asarray(np.sqrt((replicates.shape[-1] - 1) * np.var(replicates, axis=-1)))
