"""The double limit: more members, then bigger models (or the other way round).

Section 7 of the companion notes to "Pre-training under infinite compute": fit a K law per N, take the limits, fit an
N law through them. The interval carries both levels: the outer profile interval (scatter between sizes), widened to the
spread of the outer limit when every inner limit is drawn from its own confidence distribution. That is on the safe
side: it covered in 97% to 100% of synthetic grids, the outer interval alone in 82% to 90% (`benchmarks/laws.csv`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epochal.scaling.forms import JOINT, SurfaceLaw, fit_surface
from epochal.scaling.power import LEVEL, Interval, PowerLaw, checked, fit_power_law
from epochal.scaling.solve import Array, solve


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
    alpha_K: float | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> JointLaw:
    """Fit the limit K -> inf, then N -> inf, of ensemble losses (nats per token) given as flat lists of points.

    N: parameters of a member in any unit (the paper: billions), K: members; K = `math.inf` marks a loss that already is
    a K limit. `alpha_K` fixes the exponent of the K laws (1.0: independent members). Each N needs at least three K
    (two where `alpha_K` is given), or a K of inf.

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
    nested = _nest(Ns, Ks, losses, inner_alpha=alpha_K, outer_alpha=None, bootstrap=bootstrap, seed=seed)
    if nested is None:
        raise ValueError("Fewer than two N have a K limit: give three K (or K = inf) for two or more N.")
    finite = np.isfinite(Ks)
    reverse = _nest(
        Ks[finite], Ns[finite], losses[finite], inner_alpha=None, outer_alpha=alpha_K, bootstrap=bootstrap, seed=seed
    )
    grid = len(np.unique(Ks[finite])) >= 2 and len(losses) >= 6
    surface = fit_surface(JOINT, losses, N=Ns, K=Ks) if grid else None
    return JointLaw(nested.E, nested.interval, nested.note, nested, reverse, surface)


def _nest(
    outer: Array,
    inner: Array,
    losses: Array,
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
    law = fit_power_law(sizes, ends, alpha=outer_alpha, bootstrap=bootstrap, seed=seed)
    interval, note = _propagated(law, laws, bootstrap=max(bootstrap, 200), seed=seed)
    return NestedLimit(law.E, interval, note, laws, law)


def _propagated(
    outer: PowerLaw, inner: Mapping[float, PowerLaw], *, bootstrap: int, seed: int
) -> tuple[dict[str, Interval] | None, str]:
    """Widen the outer interval to what the inner confidence distributions alone make of the outer limit."""
    unsure = [f"{size:g}" for size, law in inner.items() if law.interval is None]
    if outer.interval is None:
        return None, outer.note
    if unsure:
        return None, f"No interval: the inner laws at {', '.join(unsure)} have too few points for their own."
    if not inner:
        return outer.interval, f"{outer.note} The inner limits were given without intervals.".strip()
    rng = np.random.default_rng(seed)
    draws = np.tile(outer.y, (bootstrap, 1))
    for column, size in enumerate(outer.x):
        if float(size) in inner:
            draws[:, column] = _sample_limit(inner[float(size)], rng, bootstrap)
    centre = float(np.mean(np.log(outer.x)))
    E, A, alpha, _ = solve(
        np.log(outer.x) - centre, draws, outer.weights, alpha=outer.fixed_alpha, bounds=outer.alpha_bounds
    )
    samples = {"E": E, "A": A * np.exp(alpha * centre), "alpha": alpha}
    hull = {}
    for name, values in samples.items():
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        hull[name] = (min(outer.interval[name][0], float(low)), max(outer.interval[name][1], float(high)))
    return hull, outer.note


def _sample_limit(law: PowerLaw, rng: np.random.Generator, count: int) -> Array:
    """Draw from the confidence distribution of E by interpolating its quantiles."""
    levels = np.concatenate([[0.001, 0.005], np.linspace(0.01, 0.99, 50), [0.995, 0.999]])
    return np.interp(rng.uniform(0.001, 0.999, count), levels, law.limit_quantiles(levels))
