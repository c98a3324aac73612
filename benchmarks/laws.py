"""Do nominal 90% intervals of a law's constants cover the truth in 90% of cases?

Draws synthetic laws `E + A / x**alpha` with constants and noise like those of real records, fits each with every
interval construction, and counts. Run: `python benchmarks/laws.py` (some fifteen minutes on one core; an interrupted
run goes on where it stopped), `--laws 5 --out FILE` for a glance. The default, 40 laws in each of 15 combinations of
sizes and seeds, is 600 laws for every kind of noise.

Noise, each with its reason: `constant` 0.001 to 0.01 nats (seeds of one size); `excess` 1% of the excess over the
limit; `sizes` 0.004 nats per size that all its seeds share (tuning on a grid, model shape) and 0.002 per seed. Every
row of `laws.csv` is one number of sizes, seeds and one noise: shares of laws whose interval covers (E, A, alpha by the
reported profile interval; E by the bootstrap's percentiles, by the profile after a Huber fit, by the profile fitted
with `noise="excess"`; A and alpha by the latter too), the median width of the interval of E in nats, and the share of
intervals of E that reach down to 0. Rows with `all` sizes pool the rows of one noise.
"""

import argparse
import csv
import datetime
import platform
from pathlib import Path

import numpy as np
import scipy

from epochal.scaling import PowerLaw, fit_joint, fit_power_law

OUT = Path(__file__).with_suffix(".csv")
SIZES, SEEDS, NOISES = (4, 5, 6, 7, 8), (1, 2, 3), ("constant", "excess", "sizes")
NAMES = ("E", "A", "alpha")


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


def covers(law: PowerLaw, truth: dict[str, float], name: str, *, bootstrap: bool = False) -> bool:
    low, high = (law.bootstrap_interval if bootstrap else law.interval)[name]
    return low <= truth[name] <= high


def study(laws: int, sizes: int, seeds: int, noise: str) -> dict[str, object]:
    rng = np.random.default_rng([sizes, seeds, NOISES.index(noise)])
    hits, widths, open_below = [], [], []
    for index in range(laws):
        truth, x, y = draw_law(rng, sizes, seeds, noise)
        law = fit_power_law(x, y, bootstrap=200, seed=index)
        huber = fit_power_law(x, y, bootstrap=0, loss="huber")
        relative = fit_power_law(x, y, bootstrap=0, noise="excess")
        row = [covers(law, truth, name) for name in NAMES]
        row += [covers(law, truth, "E", bootstrap=True), covers(huber, truth, "E"), covers(relative, truth, "E")]
        row += [covers(relative, truth, name) for name in NAMES[1:]]
        hits.append(row)
        widths.append(law.interval["E"][1] - law.interval["E"][0])
        open_below.append(law.interval["E"][0] == 0.0)
    columns = ("profile_E", "profile_A", "profile_alpha", "bootstrap_E", "huber_profile_E")
    columns += ("excess_profile_E", "excess_profile_A", "excess_profile_alpha")
    shares = {name: f"{share:.3f}" for name, share in zip(columns, np.mean(hits, axis=0), strict=True)}
    return {
        "form": "power", "sizes": sizes, "seeds": seeds, "noise": noise, "laws": laws, **shares,
        "median_width_E": f"{np.median(widths):.4f}", "reaches_0": f"{np.mean(open_below):.3f}",
    }  # fmt: skip


def pooled(rows: list[dict[str, object]], noise: str) -> dict[str, object]:
    """The rows of one noise, which have equal numbers of laws, as one."""
    part = [row for row in rows if row["noise"] == noise]
    shares = {
        key: f"{np.mean([float(row[key]) for row in part]):.3f}"
        for key in part[0]
        if "profile" in key or key in ("bootstrap_E", "reaches_0")
    }
    total = sum(int(row["laws"]) for row in part)
    return {"form": "power", "sizes": "all", "seeds": "all", "noise": noise, "laws": total, **shares}


def study_joint(laws: int, sizes: int) -> dict[str, object]:
    """Nested limits of K = 1, 2, 3, 5, 8 members at each size; noise of 0.003 nats per point."""
    rng = np.random.default_rng([sizes, 99])
    N, K = (a.ravel() for a in np.meshgrid(np.geomspace(0.15, 2.4, sizes), [1.0, 2, 3, 5, 8], indexing="ij"))
    hits, outer, widths = [], [], []
    for index in range(laws):
        E, A, alpha = rng.uniform(2.5, 3.4), rng.uniform(0.03, 0.15), rng.uniform(0.6, 1.6)
        y = E + A * N**-alpha + rng.uniform(0.2, 0.6) / K ** rng.uniform(0.95, 1.1)
        joint = fit_joint(N, K, y + 0.003 * rng.standard_normal(len(y)), bootstrap=200, seed=index)
        if joint.interval is None:
            continue
        low, high = joint.interval["E"]
        hits.append(low <= E <= high)
        outer.append(joint.nested.outer.interval["E"][0] <= E <= joint.nested.outer.interval["E"][1])
        widths.append(high - low)
    return {
        "form": "nested K then N", "sizes": sizes, "seeds": 1, "noise": "constant", "laws": len(hits),
        "profile_E": f"{np.mean(hits):.3f}", "outer_only_E": f"{np.mean(outer):.3f}",
        "median_width_E": f"{np.median(widths):.4f}",
    }  # fmt: skip


def load(path: Path) -> list[dict[str, object]]:
    """The finished rows of an earlier, interrupted run; pooled rows are made anew."""
    if not path.exists():
        return []
    with path.open() as file:
        return [dict(row) for row in csv.DictReader(file) if row["sizes"] != "all"]


def save(path: Path, rows: list[dict[str, object]]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laws", type=int, default=40)
    parser.add_argument(
        "--out", type=Path, default=OUT, help="rows that are already there are kept: delete to start anew"
    )
    arguments = parser.parse_args()
    where = {
        "machine": platform.machine(), "numpy": np.__version__, "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    rows = load(arguments.out)
    done = {tuple(str(row[key]) for key in ("form", "sizes", "seeds", "noise")) for row in rows}
    jobs = [("power", m, s, noise) for noise in NOISES for m in SIZES for s in SEEDS]
    jobs += [("nested K then N", m, 1, "constant") for m in (4, 5, 6)]
    for form, sizes, seeds, noise in jobs:
        if (form, str(sizes), str(seeds), noise) in done:
            continue
        power = form == "power"
        row = study(arguments.laws, sizes, seeds, noise) if power else study_joint(arguments.laws, sizes)
        rows.append(row | where)
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        save(arguments.out, rows)
    single = [row for row in rows if row["form"] == "power"]
    save(arguments.out, rows + [pooled(single, noise) | where for noise in NOISES])


if __name__ == "__main__":
    main()
