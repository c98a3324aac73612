"""How low is the loss of K independent models together, and in which limit? (Spec 6, 7.)

Claim: the mean of K members beats the best single model, fewer members predict the loss of more, and the limit in K is
below that of single models in N. Members trained twice as long with half the decay have the lower limit although each is
worse alone; members at the single model's optimum are trained too, and the set with the lower limit is used downstream.
Baselines at equal training cost: snapshots, chains, averaged weights, dropout, masked inputs, weights learned on held-out text.
Command: epochal run ensembling --scale demo
Results: recipes/results/<scale>/report.md
"""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from epochal.names import named_ensemble
from epochal.ranges import Items, Range, Ranged, Repeats, Tokens
from epochal.records import Record, curves, mean_curve, validation_curve
from epochal.report.claims import Case, Claim
from epochal.report.comparison import family_claim, family_table, gain_case, incomplete, measured_case
from epochal.report.figures import (
    AVERAGE_LINES,
    LOSS_AXIS,
    PALETTE,
    draw_key,
    draw_law,
    draw_level,
    draw_series,
    size_color,
)
from epochal.report.sections import Figure, Section, Table
from epochal.run import AVERAGES, SOUP, Ensemble, Job, Run, inputs
from epochal.scale import Point, Scale, member_point
from epochal.scaling import (
    JointLaw,
    MembersLaw,
    compare_limits,
    fit_joint,
    fit_members,
    predict_members,
    seed_interval,
)
from epochal.scaling.seeds import NORMAL
from epochal.search.descent import members_limit
from epochal.search.searches import Search
from epochal.study import FEWEST_FRESH, Result, Study
from recipes import _member_variants, heavy_weight_decay
from recipes.heavy_weight_decay import TUNED

# A three-constant law in N needs at least three sizes.
FEWEST_SIZES = 3

# Three constants are fitted to all numbers of members but the largest.
FEWEST_COUNTS = 4
PREDICTED = 0.01  # nats; the error allowed for the loss of all members
PILOT = 2  # members at each of two points that choose between them, where every setting has one seed
SURE = 0.95  # probability above which one limit counts as below another

# Nats; equal members would make an error of zero, which would weigh infinitely in a fit.
SMALLEST_ERROR = 1e-6

SOUP_MEMBERS = 3  # few, because every subset of a soup loads its members again


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """Which sizes get ensembles and of how many members."""

    models: Annotated[tuple[str, ...], Items(least=0)]  # sizes that get ensembles
    count: Repeats  # members of each
    models_elsewhere: Annotated[tuple[str, ...], Items(least=0)] = ()  # sizes at further budgets; empty for the same
    # 2 or more: epochs and decay of members are tuned for the limit K to infinity, fitted from that many members a
    # point, as in the paper. 0: the rule of twice the epochs and half the decay, or the best single model's setting where
    # its members have the lower limit.
    search_members: Annotated[int, Range(0, 1000)] = 0
    # Budgets at which members are tuned; empty for all.
    search_tokens: Annotated[tuple[Tokens, ...], Items(least=0)] = ()
    # Sizes of which members are tuned; empty for all.
    search_models: Annotated[tuple[str, ...], Items(least=0)] = ()
    member_variants: _member_variants.Settings | None = None

    def check(self, scale: Scale) -> None:
        """Refuse sizes that are not on the ladder and impossible counts."""
        if not self.models:
            raise ValueError("models is empty; give at least one.")
        if self.search_members and not 2 <= self.search_members <= self.count:
            raise ValueError(
                f"search_members is {self.search_members}; give 2 to count ({self.count}), or 0 for the rule."
            )
        scale.check_models(
            "models, models_elsewhere and search_models", *self.models, *self.models_elsewhere, *self.search_models
        )
        if extra := sorted(set(self.models_elsewhere) - set(self.models)):
            raise ValueError(f"models_elsewhere has {extra}, which are not in models; add them there.")
        unknown = sorted(set(self.search_tokens) - set(scale.unique_tokens))
        if unknown:
            raise ValueError(
                f"search_tokens has {unknown}, which are not budgets of this scale; add them to unique_tokens."
            )
        if self.member_variants is not None:
            self.member_variants.check(scale)


NO_ENSEMBLES = Settings(models=(), count=1)


def settings(study: Study) -> Settings:
    """Return the settings of this recipe; without a table no size gets ensembles."""
    return study.settings(Settings) or NO_ENSEMBLES


def sizes(study: Study, tokens: int) -> list[str]:
    """Return the sizes that get ensembles at one budget, smallest first."""
    here, scale = settings(study), study.scale
    wanted = here.models if tokens == scale.unique_tokens[0] else here.models_elsewhere or here.models
    return [model for model in here.models if model in wanted and model in scale.models_at(tokens)]


def plan(study: Study) -> list[Job]:
    """Return the searches, then members and ensembles of each size whose search has a certificate."""
    here = settings(study)
    jobs = [*heavy_weight_decay.plan(study), *(job for search in member_searches(study) for job in search.jobs)]
    for tokens in study.scale.unique_tokens:
        for model in sizes(study, tokens):
            points = [best_point(study, model, tokens)]
            if _piloted(study, model, tokens):
                jobs += [job for pilot in _pilots(study, model, tokens).values() for job in pilot]
            else:
                points.insert(0, _rule_point(study, model, tokens))
            for point in points:
                if point is not None:
                    jobs += [*members_at(study, model, tokens, point), *ensembles_at(study, model, tokens, point)]
        jobs += single_point_ensembles(study, tokens).values()
    for cell in searched_cells(study):
        together = unseen(study, *cell)
        jobs += [*(run for group in together for run in group), *(as_ensemble(group) for group in together)]
    jobs += soup(study)
    return jobs + _member_variants.plan(study, here.member_variants, _variant_base(study))


# --- at which point members are trained --------------------------------------------------------------------------------


def best_point(study: Study, model: str, tokens: int) -> Point | None:
    """Return the members' point of one size; None before the search for it, or the choice between two, has ended.

    Without a search for members: the rule's point, or the best single model's where its members have the lower limit. With
    one seed for each setting, `PILOT` members at each of the two decide.
    """
    if searched(study, model, tokens):
        descent = member_search(study, model, tokens).descent
        return descent.best if descent.certified else _earlier_point(study, model, tokens)
    if _piloted(study, model, tokens):
        found = [(_limit(study, *pilot), point) for point, pilot in _pilots(study, model, tokens).items()]
        decided = [(limit, point) for limit, point in found if limit is not None]
        return min(decided)[1] if found and len(decided) == len(found) else _earlier_point(study, model, tokens)
    rule = _rule_point(study, model, tokens)
    if rule is None or study.records.get(ensembles_at(study, model, tokens, rule)[0]) is None:
        return _earlier_point(study, model, tokens)
    by_rule, plain = _both_points(study, model, tokens, rule)
    if by_rule is None or plain is None:
        return None
    limits = _both_limits(by_rule, plain, study.scale.seeds, validation_curve)
    single_is_lower = limits is not None and limits[1] < limits[0]
    return study.tuned(TUNED, model, tokens).best if single_is_lower else rule


def _piloted(study: Study, model: str, tokens: int) -> bool:
    """Whether a few members at each of two points choose between them."""
    # With several seeds the best single model's seeds are members there, and all members by the rule are compared with them.
    return study.scale.seeds == 1 and not searched(study, model, tokens)


def _pilots(study: Study, model: str, tokens: int) -> dict[Point, tuple[Job, ...]]:
    """Return `PILOT` members and their ensemble at each of two points.

    The rule's point and the best single model's; none before the search for the single model has a certificate.
    """
    rule, single = _rule_point(study, model, tokens), study.tuned(TUNED, model, tokens).best
    if rule is None or single is None:
        return {}
    groups = {point: study.seeds(TUNED, model, tokens, point, PILOT) for point in (rule, single)}
    return {point: (*runs, as_ensemble(runs)) for point, runs in groups.items()}


def _limit(study: Study, *jobs: Job) -> float | None:
    """Return the limit in K of members on validation text; None before they have run.

    `jobs` are the members and their ensemble; inf where a member diverged.
    """
    *runs, ensemble = jobs
    if any(study.loss(run) == math.inf for run in runs):
        return math.inf
    record = study.records.get(ensemble)
    if record is None:
        return None
    # What a plan assumes of runs to come is a loss without a curve.
    return members_limit(validation_curve(record)) if "curve" in record.results else record.loss


def _earlier_point(study: Study, model: str, tokens: int) -> Point | None:
    """Return the point of the best ensemble of an earlier optimum; None without any."""
    # Where the best single model has moved, its members are still to come; until then the known ones count.
    limits = {}
    for point in study.known_points(TUNED, model, tokens):
        records = [study.records.named(job.name) for job in ensembles_at(study, model, tokens, point)]
        if all(record is not None and "curve" in record.results for record in records) and records[0] is not None:
            limits[point] = members_limit(validation_curve(records[0]))
    return min(limits, key=lambda point: (limits[point], point), default=None)


def searched(study: Study, model: str, tokens: int) -> bool:
    """Whether members of one size and budget are tuned by a search of their own."""
    here = settings(study)
    where = model in (here.search_models or here.models) and tokens in (here.search_tokens or study.scale.unique_tokens)
    return here.search_members > 0 and where


def _rule_point(study: Study, model: str, tokens: int) -> Point | None:
    """Return the best single model's point as the rule changes it; None before that search has a certificate."""
    single = study.tuned(TUNED, model, tokens)
    return member_point(single.best) if single.certified and single.best is not None else None


def member_search(study: Study, model: str, tokens: int) -> Search:
    """Return the search of epochs and decay for the limit of infinitely many members; it starts at the rule's point.

    A point with a diverged member counts as diverged.
    """
    single, count = study.tuned(TUNED, model, tokens), settings(study).search_members
    start = member_point(single.best) if single.certified and single.best else None
    # The rule may lead past the ends of the single models' grid, so its point is added to it.
    grid = {
        name: tuple(sorted({*values, *((start.get(name),) if start else ())}))
        for name, values in (("wd", study.scale.grid.wd), ("epochs", study.scale.grid.epochs))
    }

    def jobs_of(point: Point) -> tuple[Job, ...]:
        runs = study.seeds(TUNED, model, tokens, point, count)
        return (*runs, named_ensemble(tuple(run.name for run in runs), "logits"))

    def loss_of(point: Point) -> float | None:
        return _limit(study, *jobs_of(point))

    # The best single model's point competes: its seeds are members too.
    known = (single.best,) if start and single.best and study.records.named(jobs_of(single.best)[-1].name) else ()
    return study.descend(f"{model} members, D = {tokens:,}", model, tokens, start, grid, loss_of, jobs_of, known)


def member_searches(study: Study) -> list[Search]:
    """Return the searches for members; none where they follow the rule."""
    return [member_search(study, *cell) for cell in searched_cells(study)]


def cells(study: Study) -> list[tuple[str, int]]:
    """Return every size and budget that gets ensembles."""
    return [(model, tokens) for tokens in study.scale.unique_tokens for model in sizes(study, tokens)]


def searched_cells(study: Study) -> list[tuple[str, int]]:
    """Return every size and budget whose members are tuned by a search of their own."""
    return [cell for cell in cells(study) if searched(study, *cell)]


def searches(study: Study) -> list[Search]:
    """Return the searches that `epochal plan` shows, those of single models first."""
    return heavy_weight_decay.searches(study) + member_searches(study)


# --- members and ensembles ----------------------------------------------------------------------------------------------


def members_at(study: Study, model: str, tokens: int, point: Point) -> tuple[Run, ...]:
    """Return the members of one size at a point."""
    return study.seeds(TUNED, model, tokens, point, settings(study).count)


def ensembles_at(study: Study, model: str, tokens: int, point: Point) -> list[Ensemble]:
    """Return the ensembles of one size at a point, one for each average."""
    names = tuple(run.name for run in members_at(study, model, tokens, point))
    return [named_ensemble(names, average) for average in AVERAGES]


def unseen(study: Study, model: str, tokens: int) -> tuple[tuple[Run, ...], ...]:
    """Return the members that no search has seen.

    Those at the members' point, and those at the best single model's. None before both are known, and where fewer are left
    than an interval needs.
    """
    descent, single, seen = (
        member_search(study, model, tokens).descent,
        study.tuned(TUNED, model, tokens),
        settings(study),
    )
    points = (descent.best if descent.certified else None, single.best if single.certified else None)
    if None in points or seen.count - seen.search_members < FEWEST_FRESH:
        return ()
    return tuple(
        members_at(study, model, tokens, point)[seen.search_members :] for point in points if point is not None
    )


def as_ensemble(runs: tuple[Run, ...]) -> Ensemble:
    """Return the ensemble of some members, averaged in logits."""
    return named_ensemble(tuple(run.name for run in runs), "logits")


def members(study: Study, model: str, tokens: int) -> tuple[Run, ...]:
    """Return the members of one size; none before their point is known."""
    point = best_point(study, model, tokens)
    return () if point is None else members_at(study, model, tokens, point)


def ensembles(study: Study, model: str, tokens: int) -> list[Ensemble]:
    """Return the ensembles of one size, one for each average; none before the members' point is known.

    Also none of a size that gets no ensembles: its members are not planned.
    """
    point = best_point(study, model, tokens) if model in sizes(study, tokens) else None
    return [] if point is None else ensembles_at(study, model, tokens, point)


def single_point_ensembles(study: Study, tokens: int) -> dict[str, Ensemble]:
    """Return, by size, the ensemble of the seeds at the best single model's point."""
    # These seeds were run anyway, so this comparison costs no training.
    results = {model: study.best(TUNED, model, tokens) for model in sizes(study, tokens) if study.scale.seeds > 1}
    return {
        model: named_ensemble(tuple(run.name for run in result.runs), "logits")
        for model, result in results.items()
        if result.settled
    }


def soup(study: Study) -> list[Ensemble]:
    """Return the mean of the weights of the best ensemble's first members; none before it is known."""
    best = best_ensembles(study, study.scale.unique_tokens[0])
    return [named_ensemble(best[0].runs[:SOUP_MEMBERS], SOUP)] if best else []


def _variant_base(study: Study) -> _member_variants.MakeMember | None:
    """Return what makes the independent members with which variants are compared; None before their point is known."""
    variants, tokens = settings(study).member_variants, study.scale.unique_tokens[0]
    point = best_point(study, variants.model, tokens) if variants else None
    if variants is None or point is None:
        return None
    return functools.partial(study.run, TUNED, variants.model, tokens, point)


Finished = list[tuple[str, Ensemble, Record]]


def finished(study: Study, tokens: int) -> Finished:
    """Return the ensembles of one budget that have run: size, job, record."""
    jobs = [(model, ensemble) for model in sizes(study, tokens) for ensemble in ensembles(study, model, tokens)]
    return [(model, job, record) for model, job in jobs if (record := study.records.get(job)) is not None]


def best_ensemble(study: Study, tokens: int) -> Record | None:
    """Return the record of the ensemble with the lowest loss at one budget."""
    return min((record for *_, record in finished(study, tokens)), key=lambda record: record.loss, default=None)


def best_ensembles(study: Study, tokens: int) -> list[Ensemble]:
    """Return all ensembles of the size that has the best one; none before those of every size have run."""
    done, models = finished(study, tokens), sizes(study, tokens)
    if len(done) < len(AVERAGES) * len(models) or not done:
        return []
    return ensembles(study, best_model(study, tokens), tokens)


def best_model(study: Study, tokens: int) -> str:
    """Return the size of the best ensemble; raises ValueError before any has run."""
    return min(finished(study, tokens), key=lambda entry: entry[2].loss)[0]


# --- laws ---------------------------------------------------------------------------------------------------------------


def members_law(record: Record) -> MembersLaw:
    """Fit the law in K to the test losses of one ensemble (spec section 6).

    Its interval is that of a new draw of members. Subsets share members, so their scatter alone would be far too narrow.
    """
    subsets, without = curves(record)
    return fit_members(subsets, without or None)


def joint_law(done: Finished) -> JointLaw | None:
    """Fit the double limit through the limits of members (averaged in logits); None with fewer than three sizes."""
    laws = {
        record.results["parameters"] / len(ensemble.runs): members_law(record)
        for _, ensemble, record in done
        if ensemble.average == "logits"
    }
    if len(laws) < FEWEST_SIZES or any(law.E <= 0 for law in laws.values()):
        return None
    # Errors of some limits only would weigh the others arbitrarily.
    known = all(law.interval for law in laws.values())
    return fit_joint(
        list(laws),
        [math.inf] * len(laws),
        [law.E for law in laws.values()],
        sigma=[max(law.error, SMALLEST_ERROR) for law in laws.values()] if known else None,
        sigma_dof=sum(law.dof for law in laws.values()) if known else 0,
    )


# --- the report -----------------------------------------------------------------------------------------------------------


def report(study: Study) -> Section:
    """Compare ensembles with the best single model, and extrapolate in K."""
    done = {tokens: finished(study, tokens) for tokens in study.scale.unique_tokens}
    claims = [*_gain_claims(study, done), *_equal_claim(study, done), *_limit_claims(study, done)]
    claims += [*_predicted_claim(study, done), *_rule_claim(study), *_tuned_members_claims(study)]
    claims += [*_soup_claim(study), *_joint_claim(study, done)]
    tables = [_table(tokens, found) for tokens, found in done.items() if found]
    tables += [family_table(claim, f"By case: {claim.text}") for claim in claims if len(claim.cases) > 1]
    figures = [_figure(study, tokens, found) for tokens, found in done.items() if found]
    figures += [*_tuned_figure(study), *_parameters_figure(study, done[study.scale.unique_tokens[0]])]
    variants, tokens = settings(study).member_variants, study.scale.unique_tokens[0]
    rows = _member_variants.rows(study, variants, _variant_base(study))
    if rows and variants is not None:
        claims += _member_variants.claims(rows, variants, heavy_weight_decay.missing_of(study, tokens, variants.model))
        tables.append(_member_variants.table(rows, variants, tokens))
    return Section(
        title="Ensembling",
        question="How low do K independently trained models go together, and to which limit?",
        claims=tuple(claims),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=tuple(note for tokens, found in done.items() for note in _limit_notes(study, tokens, found)),
    )


Done = dict[int, Finished]


def half_width(interval: tuple[float, float] | None) -> float | None:
    """Return half of an interval's width; None without one, and where an end is open."""
    half = None if interval is None else (interval[1] - interval[0]) / 2
    return half if half is not None and math.isfinite(half) else None


def _around(gain: float, *halves: float | None) -> tuple[float, float] | None:
    """Return the interval of a difference whose parts are independent; None where one is not known."""
    if any(half is None for half in halves):
        return None
    half = math.hypot(*(one for one in halves if one is not None))
    return gain - half, gain + half


def _gain(record: Record, count: int, single: Result) -> tuple[float, tuple[float, float] | None]:
    """Return what `count` members of an ensemble gain over a single model, and its interval."""
    # Members are one draw: their error is the jackknife's of the law at that K.
    law, gain = members_law(record), single.mean - mean_curve(record)[count]
    low, high = (float(end) for end in law.predict_interval(count)) if law.interval else (math.nan, math.nan)
    own = half_width(seed_interval(list(single.losses.values()), search=heavy_weight_decay.choice(single)))
    return gain, _around(gain, own, (high - low) / 2 if law.interval else None)


def _dof(record: Record, single: Result) -> int:
    """Return the lower degrees of freedom, of an ensemble's members or a model's seeds."""
    return min(int(record.results["members"]), len(single.records)) - 1


def _gain_claims(study: Study, done: Done) -> list[Claim]:
    """Compare the best ensemble with the best single model at every budget."""
    cases, sizes, seeds = list[Case](), list[float](), list[int]()
    for tokens in done:
        best, (single, model) = best_ensemble(study, tokens), heavy_weight_decay.best_single(study, tokens)
        if best is None or not single:
            continue
        gain, interval = _gain(best, int(best.results["members"]), single)
        name = f"{model}-{best_model(study, tokens)}.{tokens}"
        cases.append(measured_case(name, gain, interval, dof=_dof(best, single)))
        sizes, seeds = [*sizes, gain], [*seeds, len(single.records)]
    if not cases:
        return []
    return [
        family_claim(
            "the best ensemble beats the best single model at every budget",
            cases,
            [case.value > 0 for case in cases],
            id="ensembling.beats-single",
            paper="0.25 nats with 8 members of 300M (3.57 to 3.32), section 6",
            sizes=(sizes[0], 0.25),
            seeds=min(seeds),
            planned=len(done),
            provisional=heavy_weight_decay.missing(study, *done),
        )
    ]


def _equal_claim(study: Study, done: Done) -> list[Claim]:
    """Compare members with larger single models of as many parameters."""
    cases, costs, counts = list[Case](), list[float](), list[int]()
    for tokens, found in done.items():
        for model, ensemble, record in found:
            one = record.results["parameters"] / len(ensemble.runs)
            epochs = members(study, model, tokens)[0].epochs
            for larger in study.scale.models_at(tokens) if ensemble.average == "logits" else ():
                single = heavy_weight_decay.best(study, larger, tokens)
                count = math.floor(single.parameters / one) if single else 0
                if 2 <= count <= len(ensemble.runs) and single.point is not None:
                    gain, interval = _gain(record, count, single)
                    name = f"{count}x{model}-{larger}.{tokens}"
                    cases.append(measured_case(name, gain, interval, dof=_dof(record, single)))
                    costs.append(count * one * epochs / (single.parameters * single.point.epochs))
                    counts.append(len(single.records))
    if not cases:
        return []
    return [
        family_claim(
            "members with at most the parameters of a larger single model have a lower loss together, at "
            f"{min(costs):.2g} to {max(costs):.2g} times its training FLOPs",
            cases,
            [case.value > 0 for case in cases],
            id="ensembling.equal-parameters",
            paper="3 members of 300M (3.42) are below the limit in N of single models (3.43), section 6",
            seeds=min(counts),
            provisional=heavy_weight_decay.missing(study, *done),
        )
    ]


def _limit_claims(study: Study, done: Done) -> list[Claim]:
    """Compare the limits in K with single models, trained and in the limit of N."""
    limits, signs, chances = list[Case](), list[bool](), list[Case]()
    for tokens, found in done.items():
        single, _ = heavy_weight_decay.best_single(study, tokens)
        laws = [(model, ensemble, record, members_law(record)) for model, ensemble, record in found]
        for model, ensemble, record, law in laws if single else ():
            # The members' setting was chosen: what ties with it belongs to the error of their limit.
            search = heavy_weight_decay.choice(heavy_weight_decay.best(study, model, tokens))
            jackknife = half_width(law.interval["E"]) if law.interval else None
            half = None if jackknife is None else math.hypot(jackknife, NORMAL * search)
            own, gain = half_width(seed_interval(list(single.losses.values()))), single.mean - law.E
            # Judged by the gain over the single model, shown as the limit, which a replication can be compared with.
            judged = measured_case("", gain, _around(gain, half, own), dof=_dof(record, single))
            shown = None if half is None else (law.E - half, law.E + half)
            limits.append(Case(f"{model}.{ensemble.average}.{tokens}", law.E, shown, judged.t, judged.dof))
            signs.append(gain > 0)
        size_law = heavy_weight_decay.size_law(study, tokens)
        if size_law is not None and laws:
            comparison = compare_limits(size_law, min((law for *_, law in laws), key=lambda law: law.E))
            if comparison.probability is not None:
                chances.append(Case(str(tokens), comparison.probability))
    if not limits:
        return []
    caveats, count = heavy_weight_decay.missing(study, *done), settings(study).count
    claims = [
        family_claim(
            "the limit in K of members of every size and average is below the best single model of any size",
            limits,
            signs,
            id="ensembling.limit",
            differences=False,
            planned=len(AVERAGES) * len(cells(study)),
            seeds=count,
            provisional=caveats,
        )
    ]
    if chances:
        probabilities = [case.value for case in chances]
        waiting = incomplete(len(chances), len(done), "budgets")
        sure = not waiting and all(chance >= SURE for chance in probabilities)
        claims.append(
            Claim(
                id="ensembling.limit-below-size",
                text="the lowest limit in K of members is below the limit in N of single models at every budget",
                value="probability " + ", ".join(f"{c.value:.2f} (D = {int(c.name):,})" for c in chances),
                paper="3.27 for 300M members against 3.43, section 6",
                seeds=count,
                # One budget where the opposite is as sure is enough to be false.
                holds=True if sure else False if min(probabilities) <= 1 - SURE else None,
                cases=tuple(chances),
                provisional=(*caveats, *waiting),
            )
        )
    return claims


def _predicted_claim(study: Study, done: Done) -> list[Claim]:
    """Predict the loss of all members from half of them, and compare with no change."""
    count = settings(study).count
    few, cases, unchanged = max(FEWEST_COUNTS - 1, math.ceil(count / 2)), list[Case](), list[float]()
    for tokens, found in done.items() if count > few else ():
        for model, ensemble, record in found:
            predicted, means = predict_members(curves(record)[0], upto=few), mean_curve(record)
            cases.append(Case(f"{model}.{ensemble.average}.{tokens}", predicted.error))
            unchanged.append(means[few] - means[count])
    if not cases:
        return []
    worst = max(abs(case.value) for case in cases)
    near = sum(abs(case.value) <= min(PREDICTED, abs(same)) for case, same in zip(cases, unchanged, strict=True))
    waiting = incomplete(len(cases), len(AVERAGES) * len(cells(study)))
    return [
        Claim(
            id="ensembling.predicted",
            text=f"E + A/K + B/K^2 fitted to K up to {few} predicts the loss of {count} members within {PREDICTED:g} nats, and "
            f"better than the loss of {few}",
            value=f"in {near} of {len(cases)}: at most {worst:.4f} nats off ({few} are {min(unchanged):.4f} to "
            f"{max(unchanged):.4f} off)",
            paper="1 / K over seven tables (free exponents 0.96 to 1.09), sections 6 and 13",
            seeds=count,
            holds=False if near < len(cases) else None if waiting else True,
            cases=tuple(cases),
            provisional=waiting,
        )
    ]


def _soup_claim(study: Study) -> list[Claim]:
    """Does averaging the weights of members that were trained apart fail?"""
    jobs, best = soup(study), best_ensemble(study, study.scale.unique_tokens[0])
    record = study.records.get(jobs[0]) if jobs else None
    if record is None or best is None:
        return []
    single = mean_curve(best)[1]
    return [
        Claim(
            id="ensembling.soup",
            text="the mean of the weights of independent members is worse than one of them",
            value=f"{record.test_loss - single:+.4f} nats ({single:.4f} to {record.test_loss:.4f})",
            paper="averaging weights of independent members fails (no number), section 10",
            seeds=int(best.results["members"]),
            holds=record.test_loss > single,
        )
    ]


def _both_points(study: Study, model: str, tokens: int, point: Point) -> tuple[Record | None, Record | None]:
    """Return the records of members at a point and at the single model's.

    Both are averaged in logits; the second has as many members as there are seeds.
    """
    plain, single = single_point_ensembles(study, tokens).get(model), study.tuned(TUNED, model, tokens).best
    if plain is None or single is None:
        return None, None
    # All members where they have run there, and else as many as there are seeds.
    more = ensembles_at(study, model, tokens, single)[0]
    known = study.records.get(more) if study.records.named(more.name) else study.records.get(plain)
    return study.records.get(ensembles_at(study, model, tokens, point)[0]), known


def _both_limits(
    members: Record | None, plain: Record | None, seeds: int, curve_of: Callable[[Record], dict[int, float]]
) -> tuple[float, float] | None:
    """Return the limits in K of members at a point and at the single model's.

    `curve_of` says on which text. None before both are known.
    """
    if members is None or plain is None or "curve" not in members.results or "curve" not in plain.results:
        return None
    # At a finite K members may look worse although their limit is lower (spec section 6). Both limits are fitted to the
    # same numbers of members, as many as there are seeds, so that further members cannot change the choice.
    both = curve_of(members), curve_of(plain)
    shared = [k for k in both[0] if k in both[1] and k <= seeds]
    found, single = (members_limit({k: curve[k] for k in shared}) for curve in both)
    return found, single


def _limit_gain(study: Study, model: str, tokens: int, point: Point) -> tuple[Case, bool, int] | None:
    """Compare the limit of members at a point with that at the single model's; None before both are known.

    Returns the gain, whether it is above zero, and how many members the second has.
    """
    members, plain = _both_points(study, model, tokens, point)
    limits = _both_limits(members, plain, study.scale.seeds, mean_curve)
    if members is None or plain is None or limits is None or not all(map(math.isfinite, limits)):
        return None
    case = limit_case(f"{model}.{tokens}", members, plain, dof=settings(study).count - 1)
    if case.interval is None:
        # As few members at one of the points as there are seeds have no interval: both limits are then fitted to those.
        case = Case(case.name, limits[1] - limits[0])
    return case, case.value > 0, len(inputs(plain.job))


def limit_case(name: str, members: Record, others: Record, *, dof: float) -> Case:
    """Return how far the limit in K of members is below that of independent others."""
    laws = members_law(members), members_law(others)
    gain, halves = laws[1].E - laws[0].E, [half_width(law.interval["E"]) if law.interval else None for law in laws]
    return measured_case(name, gain, _around(gain, *halves), dof=dof)


def _unseen_gain(study: Study, model: str, tokens: int) -> tuple[Case, bool, int] | None:
    """Return what `_limit_gain` does, from unseen members; None before they have run."""
    records = [record for runs in unseen(study, model, tokens) if (record := study.records.get(as_ensemble(runs)))]
    if len(records) < 2 or any("curve" not in record.results for record in records):
        return None
    count = len(inputs(records[0].job))
    case = limit_case(f"{model}.{tokens}", *records, dof=count - 1)
    return case, case.value > 0, count


def _rule_claim(study: Study) -> list[Claim]:
    """Compare the limits by the rule with those at the single model's point."""
    gains = list[tuple[Case, bool, int]]()
    for tokens in study.scale.unique_tokens:
        for model in single_point_ensembles(study, tokens):
            point = _rule_point(study, model, tokens)
            gain = None if point is None else _limit_gain(study, model, tokens, point)
            gains += [] if gain is None else [gain]
    if not gains:
        return []
    cases, signs, counts = zip(*gains, strict=True)
    few = sum(case.interval is None for case in cases)
    return [
        family_claim(
            "members of twice the epochs and half the decay have a lower limit in K than those of the best single setting, "
            "at every size and budget",
            cases,
            signs,
            id="ensembling.rule",
            paper="limits 3.34 and 3.27 for 300M, section 6",
            seeds=min(counts),
            planned=len(cells(study)),
            provisional=(
                *heavy_weight_decay.missing(study, *study.scale.unique_tokens),
                *((f"{few} of {len(cases)} have too few members at one setting for an interval",) if few else ()),
            ),
        )
    ]


def _tuned_members_claims(study: Study) -> list[Claim]:
    """Are members tuned for their limit better together and worse alone?"""
    together, alone, seen = list[tuple[Case, bool, int]](), list[Case](), False
    for model, tokens in searched_cells(study):
        point, single = best_point(study, model, tokens), study.best(TUNED, model, tokens)
        if point is None or not single:
            continue
        fresh = _unseen_gain(study, model, tokens)
        gain = fresh or _limit_gain(study, model, tokens, point)
        judged = unseen(study, model, tokens)[0] if fresh else members_at(study, model, tokens, point)
        losses = [loss for run in judged if (loss := study.test_loss(run)) is not None]
        if gain is not None and losses:
            together.append(gain)
            search = heavy_weight_decay.choice(single)
            alone.append(gain_case(f"{model}.{tokens}", list(single.losses.values()), losses, search=search))
            seen = seen or fresh is None
    if not together:
        return []
    cases, signs, counts = zip(*together, strict=True)
    budgets = dict.fromkeys(tokens for _, tokens in searched_cells(study))
    chosen = ("the members that chose the setting are among those judged",) if seen else ()
    caveats, planned = (*heavy_weight_decay.missing(study, *budgets), *chosen), len(searched_cells(study))
    return [
        family_claim(
            "members tuned for their limit have a lower limit in K than those of the best single setting, wherever they were tuned",
            cases,
            signs,
            id="ensembling.tuned-together",
            paper="the best single model is not the best member (no number), section 6",
            seeds=min(counts),
            planned=planned,
            provisional=caveats,
        ),
        family_claim(
            "a member tuned for the limit has a higher loss alone than the best single model of its size, wherever they were tuned",
            alone,
            [case.value > 0 for case in alone],
            id="ensembling.tuned-alone",
            paper="the best single model is not the best member (no number), section 6",
            seeds=study.judged_seeds,
            planned=planned,
            provisional=caveats,
        ),
    ]


def _joint_claim(study: Study, done: Done) -> list[Claim]:
    """Report the double limit, K first and then N, of three or more sizes."""
    laws = {tokens: law for tokens, found in done.items() if (law := joint_law(found)) is not None}
    if not laws:
        return []
    notes = dict.fromkeys(law.note.rstrip(".") for law in laws.values() if not law.interval)
    return [
        Claim(
            id="ensembling.double-limit",
            text="the double limit, K to infinity and then N to infinity (logits), at every budget",
            value=", ".join(f"{law.E:.4f} (D = {tokens:,})" for tokens, law in laws.items()) + " nats",
            seeds=settings(study).count,
            holds=None,
            cases=tuple(Case(str(d), law.E, law.interval["E"] if law.interval else None) for d, law in laws.items()),
            provisional=(*heavy_weight_decay.missing(study, *done), *notes),
        )
    ]


def _limit_notes(study: Study, tokens: int, done: Finished) -> list[str]:
    """Report which limits were compared, and how far forms in K differ."""
    single = heavy_weight_decay.size_law(study, tokens)
    if single is None or not done:
        return []
    model, ensemble, record = min(done, key=lambda entry: members_law(entry[2]).E)
    name = f"the limit in K of {model} members ({ensemble.average})"
    comparisons = [compare_limits(single, members_law(record), names=("the limit in N of single models", name))]
    joint = joint_law(done)
    if joint is not None and joint.outer is not None:
        names = ("the limit in N of single models", "the double limit of members (logits)")
        comparisons.append(compare_limits(single, joint.outer, names=names))
    spread = max(members_law(record).spread for *_, record in done)
    forms = (
        f"The limits in K differ by up to {spread:.4f} nats between the forms E + A/K, E + A/K + B/K^2 and E + A/K^a."
    )
    return [f"D = {tokens:,}: {line}" for line in (*(comparison.sentence for comparison in comparisons), forms)]


def _table(tokens: int, done: Finished) -> Table:
    rows = []
    for model, ensemble, record in done:
        for k, losses in curves(record)[0].items():
            low, high = (min(losses), max(losses)) if len(losses) > 1 else (None, None)
            rows.append((model, ensemble.average, k, statistics.fmean(losses), low, high))
    return Table(
        title=f"Ensembles, D = {tokens:,} tokens (mean, lowest and highest over subsets of K members)",
        columns=("model", "average", "K", "loss", "lowest", "highest"),
        rows=tuple(rows),
    )


def _figure(study: Study, tokens: int, done: Finished) -> Figure:
    single, model = heavy_weight_decay.best_single(study, tokens)

    def draw(axes: Any) -> None:
        members = max(max(mean_curve(record)) for _, _, record in done)
        for size, ensemble, record in done:
            curve, label = mean_curve(record), f"{size}, {ensemble.average}"
            look: dict[str, Any] = {
                "color": size_color(study.scale.models, size),
                "line_style": AVERAGE_LINES[ensemble.average],
            }
            lawful = len(curve) > 2
            draw_series(axes, list(curve), list(curve.values()), label=label, join=not lawful, in_legend=False, **look)
            if lawful:
                draw_law(axes, members_law(record), 1, 4 * members, label=label, in_legend=False, **look)
        for size in dict.fromkeys(size for size, _, _ in done):
            draw_key(axes, size, color=size_color(study.scale.models, size))
        for average in dict.fromkeys(ensemble.average for _, ensemble, _ in done):
            draw_key(axes, average, line_style=AVERAGE_LINES[average])
        if single:
            draw_level(axes, single.mean, 1, 4 * members, label=f"best single ({model})")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("members K")
        axes.set_ylabel(LOSS_AXIS)

    caption = f"Loss against K at D = {tokens:,}: members of every size (color), average (dash), and the law in K with its limit."
    return Figure(name=f"loss-against-members-{tokens}", caption=caption, draw=draw)


def _tuned_figure(study: Study) -> list[Figure]:
    """Draw members tuned for their limit next to those of the best single setting."""
    cells = searched_cells(study)
    tokens = cells[0][1] if cells else 0
    curves = list[tuple[str, str, dict[int, float], MembersLaw]]()
    for model, _ in (cell for cell in cells if cell[1] == tokens):
        point = best_point(study, model, tokens)
        records = (None, None) if point is None else _both_points(study, model, tokens, point)
        for name, record in zip(("tuned for the limit", "best single setting"), records, strict=True):
            if record is not None and len(record.results.get("curve", {})) > 2:
                curves.append((model, name, mean_curve(record), members_law(record)))
    if not curves:
        return []
    most, lines = (
        max(max(curve) for _, _, curve, _ in curves),
        {"tuned for the limit": "-", "best single setting": "--"},
    )

    def draw(axes: Any) -> None:
        for model, name, curve, law in curves:
            look: dict[str, Any] = {"color": size_color(study.scale.models, model), "line_style": lines[name]}
            draw_series(
                axes, list(curve), list(curve.values()), label=f"{model}, {name}", join=False, in_legend=False, **look
            )
            draw_law(axes, law, 1, 4 * most, label=f"{model}, {name}", in_legend=False, **look)
        for model in dict.fromkeys(model for model, *_ in curves):
            draw_key(axes, model, color=size_color(study.scale.models, model))
        for name, line in lines.items():
            draw_key(axes, name, line_style=line)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("members K")
        axes.set_ylabel(LOSS_AXIS)

    caption = f"Members tuned for their limit and members of the best single setting (logits) at D = {tokens:,}."
    return [Figure(name="members-tuned", caption=caption, draw=draw)]


def _parameters_figure(study: Study, done: Finished) -> list[Figure]:
    """Draw members and single models against all of their parameters, on the first budget."""
    tokens = study.scale.unique_tokens[0]
    singles = [result for model in study.scale.models if (result := heavy_weight_decay.best(study, model, tokens))]
    law = heavy_weight_decay.size_law(study, tokens)
    if not done or not singles:
        return []

    def draw(axes: Any) -> None:
        ends = [result.parameters for result in singles]
        most = max([max(ends), *(record.results["parameters"] for *_, record in done)])
        label, losses = "single models, tuned", [result.mean for result in singles]
        line = draw_series(axes, ends, losses, label=label, join=law is None, color=PALETTE[-1])
        if law is not None:
            draw_law(axes, law, min(ends), 2 * most, label="their law in N", color=line.get_color())
        for model, ensemble, record in done:
            if ensemble.average == "logits":
                curve, one = mean_curve(record), record.results["parameters"] / len(ensemble.runs)
                color = size_color(study.scale.models, model)
                sizes = [count * one for count in curve]
                draw_series(axes, sizes, list(curve.values()), label=f"members of {model}", color=color)
        axes.set_xscale("log")
        axes.set_xlabel("parameters in all")
        axes.set_ylabel(LOSS_AXIS)

    caption = f"Ensembles (logits) and single models against their parameters at D = {tokens:,}."
    return [Figure(name="loss-against-parameters", caption=caption, draw=draw)]
