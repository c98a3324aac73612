"""Do nominal 90% intervals of a law's constants cover the truth in 90% of cases?

Draws synthetic laws with constants and noise like those of real records, fits each, and counts. Run
`python benchmarks/laws.py` (three to five minutes on one idle core; an interrupted run resumes), or with
`--laws 5 --out FILE` for a quick look. The default is 42 laws for each of 12 combinations of sizes and seeds, so 504 for
each kind of noise.

Noise: `constant` is 0.001 to 0.01 nats (seeds of one size); `excess` is 1% of the excess over the limit; `sizes` is 0.004
nats per size, shared by its seeds (tuning on a grid, model shape), and 0.002 per seed.

Each row of `laws.csv` is one form, number of sizes and seeds, and noise. `given` is the share of laws with an interval
(the others have too few points); the other columns are over those. `E`, `A` and `alpha` are shares covered by the profile
interval, `bootstrap_E` by the bootstrap percentiles; then the median width of the interval of E in nats and the share of
intervals whose lower end is 0. Rows with `all` sizes pool the rows of one noise; `target` says whether E is covered in
85% to 95%.

Two more forms: `nested K then N` has K = 1, 2, 3, 5, 8 members at each size, with the exponent of K known or fitted.
`members` are ensembles under squared error, where bias + variance / K holds exactly (sizes: members): `E` is covered by
the jackknife over members, `naive_E` by the scatter of the curve, as if its points were independent.
"""

import argparse
import csv
import datetime
import platform
from pathlib import Path

import numpy as np
import scipy

from epochal.scaling import bootstrap_interval, fit_joint, fit_members, fit_power_law

OUT = Path(__file__).with_suffix(".csv")
SIZES, SEEDS, NOISES = (4, 5, 6, 8), (1, 2, 3), ("constant", "excess", "sizes")
FIELDS = (
    "form", "sizes", "seeds", "noise", "laws", "given", "E", "A", "alpha", "bootstrap_E", "naive_E", "median_width_E",
    "reaches_0", "target", "machine", "numpy", "scipy", "date",
)  # fmt: skip
Row = dict[str, object]


def draw_law(rng: np.random.Generator, sizes: int, seeds: int, noise: str):
    """One law with constants from the range of published ones, and its noisy points."""
    truth = {"E": rng.uniform(1.8, 3.6), "A": rng.uniform(0.1, 1.0), "alpha": rng.uniform(0.3, 1.6)}
    x = np.repeat(np.geomspace(1.0, rng.uniform(8, 64), sizes), seeds)
    excess = truth["A"] * x ** -truth["alpha"]
    seed_noise = rng.standard_normal(len(x))
    if noise == "constant":
        error = np.exp(rng.uniform(np.log(0.001), np.log(0.01))) * seed_noise
    elif noise == "excess":
        error = 0.01 * excess * seed_noise
    else:
        error = 0.004 * np.repeat(rng.standard_normal(sizes), seeds) + 0.002 * seed_noise
    return truth, x, truth["E"] + excess + error


def covers(interval: dict[str, tuple[float, float]], truth: dict[str, float], name: str) -> bool:
    low, high = interval[name]
    return low <= truth[name] <= high


def study(laws: int, sizes: int, seeds: int, noise: str) -> Row:
    rng = np.random.default_rng([sizes, seeds, NOISES.index(noise)])
    hits: list[list[bool]] = []
    widths: list[float] = []
    open_below: list[bool] = []
    for index in range(laws):
        truth, x, y = draw_law(rng, sizes, seeds, noise)
        law = fit_power_law(x, y)
        if law.interval is None:
            continue
        bootstrap = bootstrap_interval(law, draws=200, seed=index)
        profile_hits = [covers(law.interval, truth, name) for name in ("E", "A", "alpha")]
        hits.append([*profile_hits, covers(bootstrap, truth, "E")])
        widths.append(law.interval["E"][1] - law.interval["E"][0])
        open_below.append(law.interval["E"][0] == 0.0)
    row: Row = {"form": "power", "sizes": sizes, "seeds": seeds, "noise": noise, "laws": laws, **given(hits, laws)}
    if hits:
        shares = zip(("E", "A", "alpha", "bootstrap_E"), np.mean(hits, axis=0), strict=True)
        row |= {name: f"{share:.3f}" for name, share in shares}
        row |= {"median_width_E": f"{np.median(widths):.4f}", "reaches_0": f"{np.mean(open_below):.3f}"}
    return row


def given(hits: list, laws: int) -> Row:
    return {"given": f"{len(hits) / laws:.3f}"}


def pooled(rows: list[Row], noise: str) -> Row:
    """The rows of one noise as one, weighted by the number of laws with an interval."""
    part = [row for row in rows if row["noise"] == noise]
    counts = np.array([int(row["laws"]) * float(row["given"]) for row in part])
    names = ("E", "A", "alpha", "bootstrap_E", "reaches_0")
    shares = {
        name: sum(n * float(row[name]) for n, row in zip(counts, part, strict=True) if n) / counts.sum()
        for name in names
    }
    total = sum(int(row["laws"]) for row in part)
    return {
        "form": "power", "sizes": "all", "seeds": "all", "noise": noise, "laws": total,
        "given": f"{counts.sum() / total:.3f}", **{name: f"{share:.3f}" for name, share in shares.items()},
        "target": "met" if 0.85 <= shares["E"] <= 0.95 else "too wide" if shares["E"] > 0.95 else "missed",
    }  # fmt: skip


def study_joint(laws: int, sizes: int, noise: str) -> Row:
    """Nested limits of K = 1, 2, 3, 5, 8 members at each size; noise of 0.003 nats per point."""
    rng = np.random.default_rng([sizes, 99])
    known = noise == "exponent known"
    N, K = (a.ravel() for a in np.meshgrid(np.geomspace(0.15, 2.4, sizes), [1.0, 2, 3, 5, 8], indexing="ij"))
    hits, widths = [], []
    for _ in range(laws):
        E, A, alpha = rng.uniform(2.5, 3.4), rng.uniform(0.03, 0.15), rng.uniform(0.6, 1.6)
        y = E + A * N**-alpha + rng.uniform(0.2, 0.6) / K ** (1.0 if known else rng.uniform(0.95, 1.1))
        y = y + 0.003 * rng.standard_normal(len(y))
        joint = fit_joint(N, K, y, alpha_K=1.0 if known else None)
        if joint.interval is not None:
            low, high = joint.interval["E"]
            hits.append(low <= E <= high)
            widths.append(high - low)
    return {
        "form": "nested K then N", "sizes": sizes, "seeds": 1, "noise": noise, "laws": laws, **given(hits, laws),
        "E": f"{np.mean(hits):.3f}", "median_width_E": f"{np.median(widths):.4f}",
    }  # fmt: skip


def squared_errors(rng: np.random.Generator, members: int, targets: int = 200):
    """Squared bias, and losses of k consecutive members on a circle; errors vary in twenty directions."""
    bias = rng.normal(1.5, 0.5, targets)
    errors = 0.6 * rng.standard_normal((members, 20)) @ rng.standard_normal((20, targets)) / np.sqrt(20)
    curve = {
        k: [
            float(np.mean((bias + errors[np.arange(s, s + k) % members].mean(0)) ** 2))
            for s in range(1 if k == members else members)
        ]
        for k in range(1, members + 1)
    }
    return float(np.mean(bias**2)), curve


def study_members(laws: int, members: int) -> Row:
    rng = np.random.default_rng([members, 7])
    hits, naive, widths = [], [], []
    for _ in range(laws):
        truth, curve = squared_errors(rng, members)
        interval = fit_members(curve).interval
        points = fit_power_law(list(curve), [float(np.mean(v)) for v in curve.values()], exponent=1.0).interval
        if interval is None or points is None:
            continue
        hits.append(interval["E"][0] <= truth <= interval["E"][1])
        naive.append(points["E"][0] <= truth <= points["E"][1])
        widths.append(interval["E"][1] - interval["E"][0])
    row: Row = {"form": "members", "sizes": members, "seeds": 1, "noise": "members", "laws": laws, **given(hits, laws)}
    if hits:
        row |= {"E": f"{np.mean(hits):.3f}", "naive_E": f"{np.mean(naive):.3f}"}
        row |= {"median_width_E": f"{np.median(widths):.4f}"}
    return row


def load(path: Path) -> list[Row]:
    """The finished rows of an earlier, interrupted run; pooled rows are recomputed."""
    if not path.exists():
        return []
    with path.open() as file:
        return [dict(row) for row in csv.DictReader(file) if row["sizes"] != "all"]


def save(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laws", type=int, default=42, help="per row")
    parser.add_argument("--out", type=Path, default=OUT, help="existing rows are kept: delete the file to start over")
    arguments = parser.parse_args()
    where = {
        "machine": platform.machine(), "numpy": np.__version__, "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    rows = load(arguments.out)
    done = {tuple(str(row[key]) for key in ("form", "sizes", "seeds", "noise")) for row in rows}
    jobs = [("power", m, s, noise) for noise in NOISES for m in SIZES for s in SEEDS]
    jobs += [("members", k, 1, "members") for k in (3, 4, 5, 8)]
    jobs += [("nested K then N", m, 1, f"exponent {how}") for how in ("known", "fitted") for m in (4, 5, 6)]
    for form, sizes, seeds, noise in jobs:
        if (form, str(sizes), str(seeds), noise) in done:
            continue
        if form == "power":
            row = study(arguments.laws, sizes, seeds, noise)
        elif form == "members":
            row = study_members(arguments.laws, sizes)
        else:
            row = study_joint(arguments.laws, sizes, noise)
        rows.append(row | where)
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        save(arguments.out, rows)
    single = [row for row in rows if row["form"] == "power"]
    pools = [pooled(single, noise) | where for noise in NOISES]
    for row in pools:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    save(arguments.out, rows + pools)


if __name__ == "__main__":
    main()
