"""Does heavy weight decay make loss fall with size again, and to which limit? (Spec section 5.)

Claim: with lr, epochs and decay tuned together for every size, loss falls monotonically in N and follows a power law.
Command: epochal run heavy_weight_decay --scale demo
Results: recipes/results/<scale>/report.md
"""

import math
import statistics
from itertools import pairwise
from typing import Any

from epochal.report.claims import FEWEST_SEEDS, Case, Claim
from epochal.report.comparison import family_claim, family_table, gain_case, incomplete
from epochal.report.figures import LOSS_AXIS, draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job
from epochal.scaling import PowerLaw, check_law, fit_power_law, search_noise
from epochal.search.searches import EarlyStop, Search, early_stops, seed_noise
from epochal.study import Arm, Result, Study
from recipes import epoching

# lr, epochs and decay tuned together, decay first because it matters most, then epochs (spec section 12).
TUNED = Arm("tuned")

# A three-constant law in N needs at least three sizes.
FEWEST_SIZES = 3
WINDOW = (0.20, 0.52)  # epochs; the paper's averaging windows 1 / (lr wd steps per epoch)
SEED_MOVES = 0.02  # nats; the most that the paper's limit moves between seeds


def plan(study: Study) -> list[Job]:
    """Return every job that can be named: the standard searches to compare with, the joint searches, and their seeds."""
    jobs: list[Job] = [*epoching.plan(study), *(job for search in joint_searches(study) for job in search.jobs)]
    for result in (best(study, model, tokens) for tokens, model in cells(study)):
        # Seeds only at certified points, which do not move any more.
        jobs += result.runs if result.settled else ()
    return jobs


def joint_searches(study: Study) -> list[Search]:
    """Return the joint search of every budget and size."""
    return [study.search(TUNED, model, tokens) for tokens, model in cells(study)]


def cells(study: Study) -> list[tuple[int, str]]:
    """Return every budget with each of its sizes."""
    return [(tokens, model) for tokens in study.scale.unique_tokens for model in study.scale.models_at(tokens)]


def searches(study: Study) -> list[Search]:
    """Return the searches that `epochal plan` shows, those of the baseline first."""
    return epoching.searches(study) + joint_searches(study)


def best(study: Study, model: str, tokens: int) -> Result:
    """Return the best known point of the joint search of one size and budget."""
    return study.best(TUNED, model, tokens)


def best_single(study: Study, tokens: int) -> tuple[Result, str]:
    """Return the tuned result with the lowest validation loss over seeds, and its size.

    The size is "" before any result.
    """
    model = min(study.scale.models_at(tokens), key=lambda m: best(study, m, tokens).validation)
    result = best(study, model, tokens)
    return result, model if result else ""


def size_law(
    study: Study, tokens: int, field: str = "parameters", models: tuple[str, ...] | None = None
) -> PowerLaw | None:
    """Fit E + A / N**alpha to the tuned losses of some models (default all); None with fewer than three sizes.

    N is the result `field`: all parameters, or those outside of the embeddings.
    """
    results = [best(study, model, tokens) for model in models or study.scale.models_at(tokens)]
    records = [record for result in results for record in result.records.values() if field in record.results]
    points = [(float(record.results[field]), record.test_loss) for record in records]
    if len({size for size, _ in points}) < FEWEST_SIZES:
        return None
    # What the choice between tied settings adds to the scatter of sizes around the law.
    between = statistics.fmean(search_noise(result.tied) for result in results if result)
    return fit_power_law([size for size, _ in points], [loss for _, loss in points], between=between or None)


def missing(study: Study, *tokens: int) -> tuple[str, ...]:
    """Name what the tuned losses of these budgets lack for a final verdict."""
    return study.caveats(TUNED, {budget: study.scale.models_at(budget) for budget in tokens})


def missing_of(study: Study, tokens: int, *models: str) -> tuple[str, ...]:
    """Name the same of some sizes at one budget."""
    return study.caveats(TUNED, {tokens: tuple(dict.fromkeys(models))})


# --- the report -------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Compare tuned with standard, and extrapolate in N."""
    tables, figures, notes = [], [], []
    for tokens in study.scale.unique_tokens:
        law = size_law(study, tokens)
        tables.append(_table(study, tokens))
        figures += _figures(study, tokens, law)
        if law is not None:
            lines = (law.note, check_law(law).sentence)
            notes += [f"Law in N at D = {tokens:,}: {line}" for line in lines if line]
    claims = [*_standard_claims(study), *_steps_claim(study), *_setting_claim(study), *_seeds_claim(study)]
    claims += _largest_claim(study)
    tables += [_family(claim) for claim in claims if len(claim.cases) > 1] + _window_table(study) + _law_table(study)
    stops = early_stops(study.records, searches(study))
    if stops:
        tables.append(_early_table(stops))
        notes.append(_early_note(stops))
    return Section(
        title="Heavy weight decay",
        question="With lr, epochs and weight decay tuned together, does loss fall with size again, and to which limit?",
        claims=tuple(claims),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=tuple(notes),
    )


def _family(claim: Claim) -> Table:
    return family_table(claim, f"By budget: {claim.text}")


def _standard_claims(study: Study) -> list[Claim]:
    """Compare the best tuned with the best standard model at every budget."""
    pairs = {d: (best_single(study, d)[0], epoching.best_standard(study, d)) for d in study.scale.unique_tokens}
    pairs = {tokens: pair for tokens, pair in pairs.items() if all(pair)}
    if not pairs:
        return []
    cases = [
        gain_case(
            # The sizes are part of the name: a campaign of other sizes measures something else.
            f"{base.runs[0].model}-{tuned.runs[0].model}.{tokens}",
            list(tuned.losses.values()),
            list(base.losses.values()),
            search=choice(tuned, base),
        )
        for tokens, (tuned, base) in pairs.items()
    ]
    (tuned, base), usual = next(iter(pairs.values())), study.scale.standard_wd
    seeds = min(len(result.records) for pair in pairs.values() for result in pair)
    caveats = (*epoching.caveats(study, *pairs), *missing(study, *pairs))
    decays = [found.point.wd / usual for found, _ in pairs.values() if found.point]
    results = [(m, d, r) for d in pairs for m in study.scale.models_at(d) if (r := best(study, m, d))]
    windows = [Case(f"{model}.{tokens}", round(result.runs[0].tau, 3)) for model, tokens, result in results]
    inside = sum(WINDOW[0] <= case.value <= WINDOW[1] for case in windows)
    return [
        family_claim(
            "the best tuned single model beats the best standard one at every budget",
            cases,
            [case.value > 0 for case in cases],
            id="heavy-decay.beats-standard",
            paper="0.29 nats at 200M tokens (3.75 to 3.46), sections 4 and 5",
            sizes=(base.mean - tuned.mean, 0.29),
            seeds=seeds,
            planned=len(study.scale.unique_tokens),
            provisional=caveats,
        ),
        Claim(
            id="heavy-decay.higher-decay",
            text=f"the best decay of the best model is higher than the usual {usual:g} at every budget",
            value=" to ".join(f"{decay:.0f}x" for decay in sorted({min(decays), max(decays)})),
            paper="32 times (3.2 against 0.1), section 5",
            sizes=(decays[0], 32.0),
            seeds=seeds,
            holds=min(decays) > 1,
            provisional=caveats,
        ),
        # Across scales only the window is comparable, not the decay: it counts steps and the learning rate as well.
        Claim(
            id="heavy-decay.window",
            text=f"the averaging window of the best decay is {WINDOW[0]:g} to {WINDOW[1]:g} epochs at every size and budget",
            value=f"in {inside} of {len(windows)}: {min(windows, key=_value).value:g} to {max(windows, key=_value).value:g}",
            paper="0.20 to 0.52 epochs at all tuned sizes, section 5",
            seeds=seeds,
            holds=inside == len(windows),
            cases=tuple(windows),
            provisional=missing(study, *pairs),
        ),
    ]


def _value(case: Case) -> float:
    return case.value


def choice(*results: Result) -> float:
    """Return the standard deviation in nats of choosing among settings that tie with each result's."""
    return math.hypot(*(search_noise(result.tied) for result in results))


def _steps_claim(study: Study) -> list[Claim]:
    """Is every step to a larger size a step down? With an interval for each."""
    cases, steps = [], 0
    for tokens in study.scale.unique_tokens:
        for small, large in pairwise(study.scale.models_at(tokens)):
            steps += 1
            before, after = best(study, small, tokens), best(study, large, tokens)
            if before and after:
                losses = list(after.losses.values()), list(before.losses.values())
                cases.append(gain_case(f"{small}-{large}.{tokens}", *losses, search=choice(before, after)))
    if not cases:
        return []
    return [
        family_claim(
            f"tuned loss falls with every step of N over {_sizes(study)}",
            cases,
            [case.value > 0 for case in cases],
            id="heavy-decay.monotone",
            paper="monotone over four sizes, section 5",
            planned=steps,
            seeds=study.judged_seeds,
            provisional=missing(study, *study.scale.unique_tokens),
        )
    ]


def _sizes(study: Study) -> str:
    """Return the sizes of budgets that have several: "4 sizes, at every budget", or "3 to 4 sizes, ..."."""
    counts = {len(study.scale.models_at(tokens)) for tokens in study.scale.unique_tokens}
    fewest, most = min(counts - {1}), max(counts)
    span = str(most) if fewest == most else f"{fewest} to {most}"
    return f"{span} sizes, at every budget{' with several' if 1 in counts else ''}"


def _setting_claim(study: Study) -> list[Claim]:
    """Is the fall with N lost with one setting for all sizes? From runs that every size has."""
    tokens, models = study.scale.unique_tokens[0], study.scale.models
    results = [best(study, model, tokens) for model in models]
    points = set.intersection(*(set(study.known_points(TUNED, model, tokens)) for model in models))
    runs = {point: [study.run(TUNED, model, tokens, point) for model in models] for point in sorted(points)}
    sums = {point: sum(study.loss(run) or math.inf for run in found) for point, found in runs.items()}
    if len(models) < FEWEST_SIZES or not sums or not all(results):
        return []
    point = min(sums, key=lambda one: (sums[one], one))
    tuned, losses = [result.mean for result in results], [study.test_loss(run) or math.inf for run in runs[point]]
    falls = [all(later < earlier for earlier, later in pairwise(row)) for row in (tuned, losses)]
    return [
        Claim(
            id="heavy-decay.one-setting",
            text=f"D = {tokens:,}: tuned loss falls with every step of N, and with one setting for all sizes (lr {point.lr:g}, "
            f"{point.epochs} epochs, wd {point.wd:g}) it does not",
            value=", ".join(f"{m} {loss:.4f}" for m, loss in zip(models, losses, strict=True)),
            paper="monotone only where every size is tuned, section 5",
            seeds=1,
            holds=falls[0] and not falls[1],
            provisional=missing(study, tokens),
        )
    ]


def _seeds_claim(study: Study) -> list[Claim]:
    """Does the limit in N stay the same with another seed of every size?"""
    cases = []
    for tokens in study.scale.unique_tokens:
        results = [best(study, model, tokens) for model in study.scale.models_at(tokens)]
        seeds = set.intersection(*(set(result.records) for result in results))
        if len(results) < FEWEST_SIZES or len(seeds) < FEWEST_SEEDS:
            continue
        sizes = [float(result.parameters) for result in results]
        limits = [fit_power_law(sizes, [result.losses[seed] for result in results]).E for seed in sorted(seeds)]
        cases.append(Case(str(tokens), max(limits) - min(limits)))
    if not cases:
        return []
    low, high = min(case.value for case in cases), max(case.value for case in cases)
    waiting = incomplete(len(cases), len(study.scale.unique_tokens), "budgets")
    return [
        Claim(
            id="heavy-decay.seed-limit",
            text=f"refitted to each seed alone, the limit in N moves by at most {SEED_MOVES:g} nats at every budget",
            value=f"in {sum(case.value <= SEED_MOVES for case in cases)} of {len(cases)}: {low:.4f} to {high:.4f} nats",
            paper="at most 0.02 nats over three seeds, section 5",
            seeds=study.judged_seeds,
            holds=False if high > SEED_MOVES else None if waiting else True,
            cases=tuple(cases),
            provisional=(*missing(study, *study.scale.unique_tokens), *waiting),
        )
    ]


def _largest_claim(study: Study) -> list[Claim]:
    """Does the law of the smaller sizes predict the tuned loss of the largest?"""
    found = []
    for tokens in study.scale.unique_tokens:
        *smaller, largest = study.scale.models_at(tokens)
        law, measured = size_law(study, tokens, models=tuple(smaller)), best(study, largest, tokens)
        if law is not None and law.interval and measured:
            ends = law.predict_interval(float(measured.parameters), seeds=len(measured.records))
            low, high = (float(end) for end in ends)
            found.append(
                (f"{largest}.{tokens}", float(law.predict(float(measured.parameters))), low, high, measured.mean)
            )
    if not found:
        return []
    return [
        Claim(
            id="heavy-decay.predicted-size",
            text="the law in N of the smaller sizes predicts the tuned loss of the largest within its 90% interval",
            value="; ".join(
                f"{name}: predicted {middle:.4f} ({low:.4f} to {high:.4f}), measured {loss:.4f}"
                for name, middle, low, high, loss in found
            ),
            paper="the limit is read off such a law, section 5",
            seeds=study.judged_seeds,
            holds=all(low <= loss <= high for _, _, low, high, loss in found),
            cases=tuple(
                Case(name, loss - middle, (loss - high, loss - low)) for name, middle, low, high, loss in found
            ),
            provisional=missing(study, *study.scale.unique_tokens),
        )
    ]


def _window_table(study: Study) -> list[Table]:
    """Return what the paper's averaging window would cost: the best run tried inside of it against the best of all."""
    rows: list[tuple[Any, ...]] = []
    for tokens, model in cells(study):
        runs = [study.run(TUNED, model, tokens, point) for point in study.known_points(TUNED, model, tokens)]
        losses = {runs[number]: record.loss for number, record in study.finite(dict(enumerate(runs))).items()}
        inside = [loss for run, loss in losses.items() if WINDOW[0] <= round(run.tau, 3) <= WINDOW[1]]
        if losses and inside:
            winner = min(losses, key=lambda run: (losses[run], run.name))
            rate = winner.optimizer.lr * winner.optimizer.wd
            own = (round(winner.tau, 3), winner.tau / winner.epochs, rate, losses[winner])
            rows.append((tokens, model, len(losses), *own, len(inside), min(inside), min(inside) - losses[winner]))
    columns = ("D", "model", "runs", "tau", "tau / epochs", "lr wd", "loss", "runs inside", "loss inside", "difference")
    title = (
        f"Best run tried, and best run tried with a window of {WINDOW[0]:g} to {WINDOW[1]:g} epochs "
        "(first seed, validation loss)"
    )
    return [Table(title=title, columns=columns, rows=tuple(rows))] if rows else []


def _law_table(study: Study) -> list[Table]:
    """Return the laws in N, with and without embeddings, and what they predict."""
    rows: list[tuple[Any, ...]] = []
    for tokens in study.scale.unique_tokens:
        for field, words in (("parameters", "all"), ("non_embedding", "without embeddings")):
            law = size_law(study, tokens, field)
            if law is not None:
                low, high = law.interval["E"] if law.interval else (None, None)
                far = 4 * float(law.x.max())
                around = (
                    [float(end) for end in law.predict_interval(far, seeds=study.judged_seeds)] if law.interval else []
                )
                rows.append(
                    (tokens, words, law.E, low, high, law.alpha, float(law.predict(far)), *(around or (None, None)))
                )
    columns = ("D", "parameters", "limit", "90% low", "90% high", "alpha", "loss at 4x N", "90% low", "90% high")
    title = "Laws in N of tuned single models, and the loss they predict at four times the largest size"
    return [Table(title=title, columns=columns, rows=tuple(rows))] if rows else []


def _table(study: Study, tokens: int) -> Table:
    rows: list[tuple[Any, ...]] = []
    for model in study.scale.models_at(tokens):
        search, result = study.search(TUNED, model, tokens), best(study, model, tokens)
        point, tried = result.point, search.descent.tried
        if point is None or not result:
            rows.append((model, *(None,) * 7, 0, tried, "no result yet"))
            continue
        tau, noise = round(result.runs[0].tau, 3), seed_noise(study.records, model, tokens)
        outcome = (result.validation, result.mean, len(result.records), tried, str(search.certificate(noise)))
        rows.append((model, result.parameters, point.lr, point.epochs, point.wd, tau, *outcome))
    return Table(
        title=f"Tuned single models, D = {tokens:,} tokens (tau: averaging window in epochs; "
        "losses of the seeds that did not choose the setting, where at least three have run)",
        columns=(
            "model",
            "N",
            "lr",
            "epochs",
            "wd",
            "tau",
            "validation loss",
            "test loss",
            "seeds",
            "runs tried",
            "search",
        ),
        rows=tuple(rows),
    )


def _early_table(stops: list[EarlyStop]) -> Table:
    return Table(
        title="Early stopping: would the best run so far at a share of the steps have won?",
        columns=("share of steps", "stars", "same winner", "worst loss (nats)"),
        rows=tuple((stop.share, stop.stars, stop.same, stop.worst) for stop in stops),
    )


def _early_note(stops: list[EarlyStop]) -> str:
    misled = [stop for stop in stops if stop.same < stop.stars]
    rule = "Runs are stopped early only when they diverge."
    if not misled:
        return (
            f"Early stopping would have kept every winner here, but heavy decay can mislead it (spec section 5). {rule}"
        )
    worst = max(misled, key=lambda stop: stop.worst)
    return (
        f"At {worst.share:.0%} of the steps {worst.stars - worst.same} of {worst.stars} searches have another leader than at "
        f"the end, which would cost up to {worst.worst:.4f} nats. {rule}"
    )


def _figures(study: Study, tokens: int, law: PowerLaw | None) -> list[Figure]:
    tuned = [(r.parameters, r.mean) for m in study.scale.models_at(tokens) if (r := best(study, m, tokens))]
    baseline = [study.best(epoching.standard(study), model, tokens) for model in study.scale.models_at(tokens)]
    standard = [(r.parameters, r.mean) for r in baseline if r]
    if not tuned:
        return []

    def draw(axes: Any) -> None:
        if standard:
            label = f"standard, wd {study.scale.standard_wd:g}"
            draw_series(axes, [n for n, _ in standard], [y for _, y in standard], label=label)
        sizes, losses = [n for n, _ in tuned], [y for _, y in tuned]
        line = draw_series(axes, sizes, losses, label="tuned decay", join=law is None)
        if law is not None:
            draw_law(axes, law, sizes[0], 4 * sizes[-1], label="E + A / N^alpha", color=line.get_color())
        axes.set_xscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel(LOSS_AXIS)

    what = "best standard and best tuned runs" + ("" if law is None else ", and the law in N")
    caption = f"Loss against N at D = {tokens:,}: {what}."
    return [Figure(name=f"loss-against-size-{tokens}", caption=caption, draw=draw)]
