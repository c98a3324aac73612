"""The double limit: more members, then bigger models (or the other way round).

Section 7 of the companion notes to "Pre-training under infinite compute": fit a K law per N, take the limits, fit an
N law through them. The inner limits are points of the outer law whose standard errors are known, so the interval knows
both levels: where the limits scatter about the outer law no more than their errors say, both are pooled; where they
scatter more, the outer scatter alone counts (`benchmarks/laws.csv` has the coverage).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epochal.scaling.forms import JOINT, SurfaceLaw, fit_surface
from epochal.scaling.power import LEVEL, Interval, PowerLaw, checked, fit_power_law
from epochal.scaling.solve import Array

SMALLEST_ERROR = 1e-9  # nats; curves without any noise would divide by nothing


@dataclass(frozen=True, eq=False)
class NestedLimit:
    """One order of the limits: a law per outer size (`inner`), and the law through their limits (`outer`)."""

    E: float
    interval: dict[str, Interval] | None
    note: str
    inner: Mapping[float, PowerLaw] = field(repr=False)
    outer: PowerLaw | None = field(repr=False)


@dataclass(frozen=True, eq=False)
class JointLaw:
    """The double limit E of losses over N and K: K first, then N, as the paper does; 90% interval or None and a note.

    `reverse` is the other order (None where the grid has too few points along N); `surface` the single additive form
    `E + A/N**alpha + B/K**beta` (None with fewer than six points). Where the three disagree, trust none of them far.
    """

    E: float
    interval: dict[str, Interval] | None
    note: str
    nested: NestedLimit
    reverse: NestedLimit | None
    surface: SurfaceLaw | None


def fit_joint(
    N: npt.ArrayLike,
    K: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    errors: npt.ArrayLike | None = None,
    error_dof: int = 0,
    alpha_K: float | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> JointLaw:
    """Fit the limit K -> inf, then N -> inf, of ensemble losses (nats per token) given as flat lists of points.

    N: parameters of a member in any unit (the paper: billions), K: members; K = `math.inf` marks a loss that already is
    a K limit. `errors` are standard errors in nats of such limits, with `error_dof` degrees of freedom in all
    (`fit_members` gives both): losses of one set of members are no independent points, so their limits should be given.
    `alpha_K` fixes the exponent of the K laws (1.0: independent members). Each N needs at least three K (two where
    `alpha_K` is given), or a K of inf.

    Raises ValueError on values that cannot be used and where fewer than two N have a limit.
    """
    Ns, losses = checked("N", N), checked("loss", loss)
    Ks = np.asarray(K, dtype=np.float64)
    if not len(Ns) == len(losses) == Ks.size or Ks.ndim != 1:
        raise ValueError(
            f"N, K and loss have {len(Ns)}, {Ks.size} and {len(losses)} values: give one of each per point."
        )
    if not np.all(Ks >= 1):
        raise ValueError(f"K = {Ks[~(Ks >= 1)][0]} is no number of members: use 1 or more, or math.inf for a limit.")
    if errors is not None and not (np.all(np.isinf(Ks)) and np.shape(errors) == losses.shape):
        raise ValueError("errors are those of K limits: give one for each loss, and K = inf for all of them.")
    known = None if errors is None else (checked("errors", errors), error_dof)
    nested = _nest(Ns, Ks, losses, known, inner_alpha=alpha_K, outer_alpha=None, bootstrap=bootstrap, seed=seed)
    if nested is None:
        raise ValueError("Fewer than two N have a K limit: give three K (or K = inf) for two or more N.")
    finite = np.isfinite(Ks)
    reverse = _nest(
        Ks[finite], Ns[finite], losses[finite], None,
        inner_alpha=None, outer_alpha=alpha_K, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip
    grid = len(np.unique(Ks[finite])) >= 2 and len(losses) >= 6
    surface = fit_surface(JOINT, losses, N=Ns, K=Ks) if grid else None
    return JointLaw(nested.E, nested.interval, nested.note, nested, reverse, surface)


def _nest(
    outer: Array,
    inner: Array,
    losses: Array,
    known: tuple[Array, int] | None,
    *,
    inner_alpha: float | None,
    outer_alpha: float | None,
    bootstrap: int,
    seed: int,
) -> NestedLimit | None:
    """Fit a law over `inner` at every value of `outer`, then a law over `outer` through their limits."""
    limits: dict[float, float] = {}
    laws: dict[float, PowerLaw] = {}
    for value in np.unique(outer):
        rows = outer == value
        given = rows & np.isinf(inner)
        rows &= np.isfinite(inner)
        if given.any():
            limits[float(value)] = float(np.mean(losses[given]))
        elif len(np.unique(inner[rows])) >= (2 if inner_alpha is not None else 3):
            law = fit_power_law(inner[rows], losses[rows], alpha=inner_alpha, bootstrap=0)
            laws[float(value)], limits[float(value)] = law, law.E
    if len(limits) < 2:
        return None
    sizes, ends = np.array(list(limits)), np.array(list(limits.values()))
    if len(limits) < 3 and outer_alpha is None:
        note = f"Only {len(limits)} sizes have a limit: no outer law; E is the lowest of the inner limits."
        return NestedLimit(float(np.min(ends)), None, note, laws, None)
    if np.any(ends <= 0):
        note = "An inner limit stopped at 0, so no outer law can be fitted: add points or fix the inner exponent."
        return NestedLimit(float(np.min(ends)), None, note, laws, None)
    if known is not None:
        order = [int(np.flatnonzero(outer == size)[0]) for size in sizes]
        known = (known[0][order], known[1])
    else:
        known = _inner_errors(sizes, laws)
    errors, dof = known if known is not None else (None, 0)
    law = fit_power_law(sizes, ends, errors=errors, error_dof=dof, alpha=outer_alpha, bootstrap=bootstrap, seed=seed)
    return NestedLimit(law.E, law.interval, _note(law, laws), laws, law)


def _inner_errors(sizes: Array, laws: Mapping[float, PowerLaw]) -> tuple[Array, int] | None:
    """Standard errors of the inner limits from their intervals, one noise taken for all; None where one has none.

    One curve tells its noise badly (two or three degrees of freedom), so the curves share theirs: the widths are
    rescaled to the pooled variance.
    """
    from scipy.special import stdtrit

    if set(laws) != set(sizes.tolist()) or any(law.interval is None for law in laws.values()):
        return None
    dof = sum(law.dof for law in laws.values())
    pooled = sum(law.variance * law.dof for law in laws.values()) / dof
    errors = []
    for size in sizes:
        law = laws[float(size)]
        low, high = law.limit_quantiles([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        own = (high - low) / (2 * float(stdtrit(law.dof, (1 + LEVEL) / 2)))
        errors.append(own * np.sqrt(pooled / law.variance) if law.variance > 0 else 0.0)
    return np.maximum(errors, SMALLEST_ERROR), dof


def _note(law: PowerLaw, laws: Mapping[float, PowerLaw]) -> str:
    unsure = [f"{size:g}" for size, inner in laws.items() if inner.interval is None]
    if law.interval is not None and unsure:
        return f"{law.note} The inner laws at {', '.join(unsure)} have too few points for errors of their own.".strip()
    return law.note
