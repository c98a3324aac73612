"""Do the 90% intervals of `epochal.scaling` contain the truth in 90% of cases, and are verdicts right?

Draws synthetic losses with a known limit, fits each, and counts. Run `python benchmarks/coverage.py` (about ten minutes of
one core; an interrupted run resumes), or with `--draws 20 --out FILE` for a quick look.

`size`: a law in N over a factor of 15, 0.4 nats above its limit of 3 at the smallest size, in designs of sizes x seeds.
Noise: `seed` is 0.01 nats for each seed; `shared` is 0.015 nats for each size, shared by its seeds, and 0.008 for each seed;
`scattered` is 0.03 nats for each size and 0.00375 for each seed, as in committed campaigns;
`flatter` and `steeper` have seed noise and a slightly curved law that the form cannot follow (a second power of twice the
exponent; an exponent that grows by 0.04 for each factor of e). `covered` is the share of posterior intervals with the
true limit and `width` their median; `profile` is the share for profile intervals, where there is one (`profile_given`);
`unbounded` the share of posterior intervals without a lower end; `ahead` is the coverage at four times the largest size.
Four sizes with one seed have one degree of freedom: `fit_power_law` gives no interval there, and the row is what the
posterior alone would give.

`members`: log loss of ensembles on fixed tokens, whose logits have an error of `spread`, independent in every token or
(`common`) in 12 directions that all tokens share; limits of averaged logits are exact, those of averaged probabilities from
10,000 members. `naive` is the coverage of a line in 1 / K through the means as if they were independent points.

`surface`: Chinchilla's form on 6 x 4 places with two seeds of 0.01 nats, E by bootstrap. `decisions`: two recipes on such
places, 0.04 nats apart, by all claims of `epochal report --records`: `covered` is the share of draws in which the recipe
that is better is said to be, `wrong` the number of claims with the wrong sign.
"""

import argparse
import csv
import datetime
import platform
from pathlib import Path

import numpy as np
import scipy

from epochal.report import point_comparisons
from epochal.report.point_laws import point_sections
from epochal.report.points import LossPoint
from epochal.scaling import CHINCHILLA, fit_members, fit_power_law, fit_surface
from epochal.scaling.posterior import sample_posterior

OUT = Path(__file__).with_suffix(".csv")
DESIGNS = ((4, 1), (4, 3), (6, 2), (8, 1))
NOISES = ("seed", "shared", "scattered", "flatter", "steeper")
SCATTER = {"shared": (0.015, 0.008), "scattered": (0.03, 0.00375)}  # nats between sizes, and between their seeds
ALPHAS = (0.2, 0.5, 1.0)
SPREADS = (0.3, 0.6, 1.0, 1.5)
LIMIT, EXCESS, FACTOR, AHEAD = 3.0, 0.4, 15.0, 4
LOWEST, HIGHEST = 0.85, 0.97
FIELDS = (
    "what", "design", "noise", "truth", "draws", "covered", "width", "unbounded", "ahead", "profile", "profile_given",
    "naive", "bias", "wrong", "target", "machine", "numpy", "scipy", "date",
)  # fmt: skip
Row = dict[str, object]


def size_law(noise: str, alpha: float):
    """The true law in x, from 1 at the smallest size."""
    if noise == "flatter":
        return lambda x: LIMIT + EXCESS / 2 * (x**-alpha + x ** (-2 * alpha))
    if noise == "steeper":
        return lambda x: LIMIT + EXCESS * x ** -(alpha + 0.04 * np.log(x))
    return lambda x: LIMIT + EXCESS * x**-alpha


def study_sizes(draws: int, sizes: int, seeds: int, noise: str, alpha: float) -> Row:
    rng = np.random.default_rng([sizes, seeds, NOISES.index(noise), int(10 * alpha)])
    x, truth = np.repeat(np.geomspace(1.0, FACTOR, sizes), seeds), size_law(noise, alpha)
    hits, widths, ahead, profiles = [], [], [], []
    target = AHEAD * FACTOR
    for _ in range(draws):
        own, of_size = rng.standard_normal(len(x)), np.repeat(rng.standard_normal(sizes), seeds)
        between, within = SCATTER.get(noise, (0.0, 0.01))
        errors = between * of_size + within * own
        y = truth(x) + errors
        law = fit_power_law(x, y)
        posterior = law.posterior or sample_posterior(x, y, np.ones(len(x)))
        low, high = law.interval["E"] if law.interval else np.quantile(posterior.E, (0.05, 0.95))
        hits.append(low <= LIMIT <= high)
        widths.append(high - low)
        low, high = np.quantile(posterior.at(np.array([target]))[0], (0.05, 0.95))
        ahead.append(low <= truth(target) <= high)
        if law.profile:
            low, high = law.profile["E"]
            profiles.append(low <= LIMIT <= high)
    row: Row = {
        "what": "size",
        "design": f"{sizes}x{seeds}",
        "noise": noise,
        "truth": f"alpha {alpha:g}",
        "draws": draws,
    }
    row |= {"covered": f"{np.mean(hits):.3f}", "width": f"{np.median(widths):.3f}", "ahead": f"{np.mean(ahead):.3f}"}
    row |= {"unbounded": f"{np.mean(np.isinf(widths)):.3f}", "profile_given": f"{len(profiles) / draws:.3f}"}
    if profiles:
        row["profile"] = f"{np.mean(profiles):.3f}"
    correct = noise == "seed" or noise in SCATTER
    return row | {"target": met(np.mean(hits), LOWEST) if correct else "misspecified"}


def met(share, lowest: float) -> str:
    return "met" if lowest <= share <= HIGHEST else "missed"


def study_members(draws: int, members: int, average: str, spread: float, errors: str) -> Row:
    rng = np.random.default_rng([members, average == "probs", int(10 * spread), errors == "common"])
    tokens, words, directions = 200, 16, 12
    base = rng.normal(0, 1.5, (tokens, words))
    labels = (base + rng.gumbel(size=base.shape)).argmax(-1)
    common = rng.standard_normal((directions, tokens, words)) / np.sqrt(directions)

    def drawn(count: int):
        if errors == "common":
            return base + spread * np.einsum("kd,dnv->knv", rng.standard_normal((count, directions)), common)
        return base + spread * rng.standard_normal((count, tokens, words))

    def normed(logits):
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def loss(log_probabilities) -> float:
        return float(-log_probabilities[np.arange(tokens), labels].mean())

    if average == "logits":
        truth = loss(normed(base))
    else:
        truth = loss(np.log(sum(np.exp(normed(drawn(250))).sum(0) for _ in range(40)) / 10_000))
    hits, naive, widths, bias = [], [], [], []
    for _ in range(draws):
        models = drawn(members) if average == "logits" else np.exp(normed(drawn(members)))
        curve = {}
        for k in range(1, members + 1):
            starts = range(members if k < members else 1)
            means = [models[(start + np.arange(k)) % members].mean(0) for start in starts]
            curve[k] = [loss(normed(mean) if average == "logits" else np.log(mean)) for mean in means]
        law = fit_members(curve)
        assert law.interval is not None
        low, high = law.interval["E"]
        hits.append(low <= truth <= high)
        widths.append(high - low)
        bias.append(law.E - truth)
        line = fit_power_law(list(curve), [np.mean(v) for v in curve.values()], exponent=1.0)
        naive.append(line.interval["E"][0] <= truth <= line.interval["E"][1])
    return {
        "what": "members", "design": f"K = {members}", "noise": f"{average}, {errors}", "truth": f"spread {spread:g}",
        "draws": draws, "covered": f"{np.mean(hits):.3f}", "width": f"{np.median(widths):.3f}",
        "bias": f"{np.mean(bias):+.4f}", "naive": f"{np.mean(naive):.3f}", "target": met(np.mean(hits), 0.88),
    }  # fmt: skip


def two_recipes(rng: np.random.Generator, gap: float) -> list[LossPoint]:
    """Six sizes, four budgets, two seeds of 0.01 nats; "new" is `gap` nats below "old" everywhere."""
    return [
        LossPoint(recipe, float(1.9 - below + 400 / N**0.34 + 410 / D**0.28 + 0.01 * rng.standard_normal()), N, D, 1)
        for N in np.geomspace(1e7, 1e9, 6).tolist()
        for D in np.geomspace(1e8, 1.6e9, 4).tolist()
        for recipe, below in (("old", 0.0), ("new", gap))
        for _ in range(2)
    ]


def study_surface(draws: int) -> Row:
    rng = np.random.default_rng(11)
    hits, widths = [], []
    for _ in range(draws):
        points = [point for point in two_recipes(rng, 0.0) if point.recipe == "old"]
        columns = {"N": [p.N for p in points], "D": [p.D for p in points]}
        law = fit_surface(CHINCHILLA, [p.loss for p in points], draws=60, **columns)
        low, high = law.interval["E"]
        hits.append(low <= 1.9 <= high)
        widths.append(high - low)
    return {
        "what": "surface", "design": "6x4x2", "noise": "seed", "truth": "chinchilla, squares", "draws": draws,
        "covered": f"{np.mean(hits):.3f}", "width": f"{np.median(widths):.3f}", "target": met(np.mean(hits), LOWEST),
    }  # fmt: skip


def study_decisions(draws: int) -> Row:
    point_comparisons.DRAWS = 40  # for speed: a report has 100
    right, wrong = 0, 0
    for seed in range(draws):
        sections = point_sections(two_recipes(np.random.default_rng(seed), 0.04), reference="old")
        verdicts = [claim.holds for section in sections for claim in section.claims]
        right += verdicts[0] is True
        wrong += verdicts.count(False)
    target = "met" if right >= 0.9 * draws and not wrong else "missed"
    return {
        "what": "decisions", "design": "6x4x2", "noise": "seed", "truth": "0.04 nats apart", "draws": draws,
        "covered": f"{right / draws:.3f}", "wrong": wrong, "target": target,
    }  # fmt: skip


def load(path: Path) -> list[Row]:
    """The finished rows of an earlier, interrupted run."""
    if not path.exists():
        return []
    with path.open() as file:
        return [dict(row) for row in csv.DictReader(file)]


def save(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300, help="per row; twice for members, a fifteenth for decisions")
    parser.add_argument("--what", default="", help="only size, members, surface or decisions")
    parser.add_argument("--out", type=Path, default=OUT, help="existing rows are kept: delete the file to start over")
    arguments = parser.parse_args()
    draws, few = arguments.draws, max(arguments.draws // 15, 1)
    where = {
        "machine": platform.machine(), "numpy": np.__version__, "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    jobs: dict[tuple[str, ...], tuple] = {}
    for sizes, seeds in DESIGNS:
        for noise in NOISES:
            for alpha in ALPHAS:
                key = ("size", f"{sizes}x{seeds}", noise, f"alpha {alpha:g}")
                jobs[key] = (study_sizes, draws, sizes, seeds, noise, alpha)
    for members in (4, 5, 8):
        for average in ("logits", "probs"):
            for errors in ("independent", "common"):
                for spread in SPREADS:
                    key = ("members", f"K = {members}", f"{average}, {errors}", f"spread {spread:g}")
                    jobs[key] = (study_members, 2 * draws, members, average, spread, errors)
    jobs["surface", "6x4x2", "seed", "chinchilla, squares"] = (study_surface, 3 * few)
    jobs["decisions", "6x4x2", "seed", "0.04 nats apart"] = (study_decisions, few)
    rows = load(arguments.out)
    done = {tuple(str(row[key]) for key in ("what", "design", "noise", "truth")) for row in rows}
    for key, (study, *options) in jobs.items():
        if key in done or arguments.what not in ("", key[0]):
            continue
        rows.append(study(*options) | where)
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
        save(arguments.out, rows)


if __name__ == "__main__":
    main()
