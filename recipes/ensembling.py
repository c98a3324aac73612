"""How low is the loss of K independent models together, and in which limit? (Spec 6, 7.)

Claim: the mean of K members beats the best single model; the excess over the limit falls like 1 / K. Members trained twice
as long with half the decay make a better ensemble although each is worse alone. If that fails at this scale, members are
also trained at the single model's optimum, and the better set is used downstream. Baselines at equal training cost:
snapshots, chains, averaged weights, dropout, masked inputs, and weights of members learned on held-out text.
Command: epochal run ensembling --scale demo
Results: recipes/results/<scale>/report.md
"""

import functools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from epochal.names import named_ensemble
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.figures import draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import AVERAGES, SOUP, Ensemble, Job, Run, inputs
from epochal.scale import Point, Scale, member_point
from epochal.scaling import JointLaw, MembersLaw, compare_limits, fit_joint, fit_members, fit_power_law
from epochal.search.descent import members_limit
from epochal.search.searches import Search
from epochal.study import Study, mean_curve
from recipes import _member_variants, heavy_weight_decay
from recipes.heavy_weight_decay import TUNED

# A three-constant law in N needs at least three sizes.
FEWEST_SIZES = 3

# A free exponent in K needs at least four numbers of members.
FEWEST_COUNTS = 4

# Nats; equal members would make an error of zero, which would weigh infinitely in a fit.
SMALLEST_ERROR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which sizes get ensembles and of how many members."""

    models: tuple[str, ...]  # sizes that get ensembles
    count: int  # members of each
    # 2 or more: epochs and decay of members are tuned for the limit K to infinity, fitted from that many members a
    # point, as in the paper. 0: the rule of twice the epochs and half the decay.
    search_members: int = 0
    search_tokens: tuple[int, ...] = ()  # budgets at which members are tuned; empty for all
    search_models: tuple[str, ...] = ()  # sizes of which members are tuned; empty for all
    member_variants: _member_variants.Settings | None = None

    def check(self, scale: Scale) -> None:
        """Refuse sizes that are not on the ladder and impossible counts."""
        if not self.models:
            raise ValueError("models is empty; give at least one.")
        if self.search_members and not 2 <= self.search_members <= self.count:
            raise ValueError(
                f"search_members is {self.search_members}; give 2 to count ({self.count}), or 0 for the rule."
            )
        scale.check_models("models and search_models", *self.models, *self.search_models)
        unknown = sorted(set(self.search_tokens) - set(scale.unique_tokens))
        if unknown:
            raise ValueError(
                f"search_tokens has {unknown}, which are not budgets of this scale; add them to unique_tokens."
            )
        if self.member_variants is not None:
            self.member_variants.check(scale)


NO_ENSEMBLES = Settings(models=(), count=0)


def settings(study: Study) -> Settings:
    """Return the settings of this recipe; without a table no size gets ensembles."""
    return study.settings(Settings) or NO_ENSEMBLES


def plan(study: Study) -> list[Job]:
    """Return the searches, then members and ensembles of each size whose search has a certificate."""
    here = settings(study)
    jobs = [*heavy_weight_decay.plan(study), *(job for search in member_searches(study) for job in search.jobs)]
    for tokens in study.scale.unique_tokens:
        for model in here.models:
            for point in (_rule_point(study, model, tokens), best_point(study, model, tokens)):
                if point is not None:
                    jobs += [*members_at(study, model, tokens, point), *ensembles_at(study, model, tokens, point)]
        jobs += single_point_ensembles(study, tokens).values()
    jobs += soup(study)
    return jobs + _member_variants.plan(study, here.member_variants, _variant_base(study))


# --- at which point members are trained --------------------------------------------------------------------------------


def best_point(study: Study, model: str, tokens: int) -> Point | None:
    """Return the members' point of one size; None before the search for it, or the choice between two, has ended.

    Without a search for members: the rule's point, or the best single model's where its members have the lower limit.
    """
    if searched(study, model, tokens):
        descent = member_search(study, model, tokens).descent
        return descent.best if descent.certified else None
    rule = _rule_point(study, model, tokens)
    if rule is None or study.scale.seeds == 1:
        return rule
    by_rule, plain = _both_points(study, model, tokens)
    if by_rule is None or plain is None:
        return None
    limits = _both_limits(by_rule, plain)
    single_is_lower = limits is not None and limits[1] < limits[0]
    return study.tuned(TUNED, model, tokens).best if single_is_lower else rule


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
        *runs, ensemble = jobs_of(point)
        if any(study.loss(run) == math.inf for run in runs):
            return math.inf
        record = study.records.get(ensemble)
        if record is None:
            return None
        # What a plan assumes of runs to come is a loss without a curve.
        return members_limit(mean_curve(record)) if "curve" in record.results else record.loss

    # The best single model's point competes: its seeds are members too.
    known = (single.best,) if start and single.best and study.records.named(jobs_of(single.best)[-1].name) else ()
    return study.descend(f"{model} members, D = {tokens:,}", model, tokens, start, grid, loss_of, jobs_of, known)


def member_searches(study: Study) -> list[Search]:
    """Return the searches for members; none where they follow the rule."""
    cells = [(model, tokens) for tokens in study.scale.unique_tokens for model in settings(study).models]
    return [member_search(study, *cell) for cell in cells if searched(study, *cell)]


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


def members(study: Study, model: str, tokens: int) -> tuple[Run, ...]:
    """Return the members of one size; none before their point is known."""
    point = best_point(study, model, tokens)
    return () if point is None else members_at(study, model, tokens, point)


def ensembles(study: Study, model: str, tokens: int) -> list[Ensemble]:
    """Return the ensembles of one size, one for each average; none before the members' point is known.

    Also none of a size that gets no ensembles: its members are not planned.
    """
    point = best_point(study, model, tokens) if model in settings(study).models else None
    return [] if point is None else ensembles_at(study, model, tokens, point)


def single_point_ensembles(study: Study, tokens: int) -> dict[str, Ensemble]:
    """Return, by size, the ensemble of the seeds at the best single model's point."""
    # These seeds were run anyway, so this comparison costs no training.
    results = {model: study.best(TUNED, model, tokens) for model in settings(study).models if study.scale.seeds > 1}
    return {
        model: named_ensemble(tuple(run.name for run in result.runs), "logits")
        for model, result in results.items()
        if result.settled
    }


def soup(study: Study) -> list[Ensemble]:
    """Return the mean of the weights of the best ensemble's members; none before it is known."""
    best = best_ensembles(study, study.scale.unique_tokens[0])
    return [named_ensemble(best[0].runs, SOUP)] if best else []


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
    jobs = [(model, ensemble) for model in settings(study).models for ensemble in ensembles(study, model, tokens)]
    return [(model, job, record) for model, job in jobs if (record := study.records.get(job)) is not None]


def best_ensemble(study: Study, tokens: int) -> Record | None:
    """Return the record of the ensemble with the lowest loss at one budget."""
    return min((record for *_, record in finished(study, tokens)), key=lambda record: record.loss, default=None)


def best_ensembles(study: Study, tokens: int) -> list[Ensemble]:
    """Return all ensembles of the size that has the best one; none before those of every size have run."""
    done, models = finished(study, tokens), settings(study).models
    if len(done) < len(AVERAGES) * len(models) or not done:
        return []
    best, _, _ = min(done, key=lambda entry: entry[2].loss)
    return ensembles(study, best, tokens)


# --- laws ---------------------------------------------------------------------------------------------------------------


def members_law(record: Record) -> MembersLaw:
    """Fit E + A / K to the losses of one ensemble record (exponent 1: independent members, spec section 6).

    Its interval is that of a new draw of members. Subsets share members, so their scatter alone would be far too narrow.
    """
    without = record.results.get("without")
    return fit_members(_by_count(record.results["curve"]), _by_count(without) if without else None)


def _by_count(table: dict[str, list[float]]) -> dict[int, list[float]]:
    return {int(k): losses for k, losses in table.items()}


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
    claims: list[Claim] = []
    tables, figures, notes = [], [], []
    for tokens in study.scale.unique_tokens:
        done = finished(study, tokens)
        claims += _claims(study, tokens, done)
        claims += _exponent_claims(study, tokens, done)
        claims += _settings_claims(study, tokens)
        claims += _joint_claim(study, tokens, done)
        notes += _limit_notes(study, tokens, done)
        if done:
            tables.append(_table(tokens, done))
            figures.append(_figure(study, tokens, done))
    variants, tokens = settings(study).member_variants, study.scale.unique_tokens[0]
    rows = _member_variants.rows(study, variants, _variant_base(study))
    if rows and variants is not None:
        claims += _member_variants.claims(rows, variants, heavy_weight_decay.missing(study, tokens))
        tables.append(_member_variants.table(rows, variants, tokens))
    return Section(
        title="Ensembling",
        question="How low do K independently trained models go together, and to which limit?",
        claims=tuple(claims),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=tuple(notes),
    )


def _claims(study: Study, tokens: int, done: Finished) -> list[Claim]:
    best = best_ensemble(study, tokens)
    single, model = heavy_weight_decay.best_single(study, tokens)
    if best is None or not single or not isinstance(best.job, Ensemble):
        return []
    caveats = heavy_weight_decay.missing(study, tokens)
    claims = [
        Claim(
            id=f"ensembling.beats-single.{tokens}",
            text=f"D = {tokens:,}: {len(best.job.runs)} members ({best.job.average}) beat the best single model ({model})",
            value=f"{single.mean - best.loss:.4f} nats ({single.mean:.4f} to {best.loss:.4f})",
            paper="0.25 nats with 8 members of 300M (3.57 to 3.32), section 6",
            seeds=len(best.job.runs),
            holds=best.loss < single.mean,
            provisional=caveats,
        )
    ]
    for size, ensemble, record in done:
        law = members_law(record)
        claims.append(
            Claim(
                id=f"ensembling.limit.{size}.{ensemble.average}.{tokens}",
                text=f"D = {tokens:,}: the K to infinity limit of {size} members ({ensemble.average}), exponent 1, is "
                "below the best single model",
                # The search chose the setting, so the interval is that of members at this one; the name says which.
                value=f"{law.E:.4f} nats ({ensemble.name})",
                interval=law.interval["E"] if law.interval else None,
                seeds=len(ensemble.runs),
                holds=None if law.interval is None else law.interval["E"][1] < single.mean,
                provisional=caveats if law.interval else (*caveats, law.note.rstrip(".")),
            )
        )
    return claims


def _exponent_claims(study: Study, tokens: int, done: Finished) -> list[Claim]:
    """Fit a free exponent in K to each size's mean losses (logits)."""
    curves = {model: mean_curve(record) for model, ensemble, record in done if ensemble.average == "logits"}
    laws = {m: fit_power_law(list(c), list(c.values())) for m, c in curves.items() if len(c) >= FEWEST_COUNTS}
    return [
        Claim(
            id=f"ensembling.exponent.{model}.{tokens}",
            text=f"D = {tokens:,}: the excess of K {model} members (logits) falls like 1 / K",
            value=f"exponent {law.alpha:.2f}",
            paper="0.96 to 1.09 over seven tables, sections 6 and 13",
            seeds=max(curves[model]),
            holds=0.8 <= law.alpha <= 1.25,
            provisional=(*heavy_weight_decay.missing(study, tokens), "one set of members"),
        )
        for model, law in laws.items()
    ]


def _both_points(study: Study, model: str, tokens: int) -> tuple[Record | None, Record | None]:
    """Return the records of members by the rule and at the single model's point.

    Both are averaged in logits; the second has as many members as there are seeds.
    """
    rule, plain = _rule_point(study, model, tokens), single_point_ensembles(study, tokens).get(model)
    if rule is None or plain is None:
        return None, None
    return study.records.get(ensembles_at(study, model, tokens, rule)[0]), study.records.get(plain)


def _both_limits(by_rule: Record | None, plain: Record | None) -> tuple[float, float] | None:
    """Return the limits in K of members by the rule and at the single model's point; None before both are known."""
    if by_rule is None or plain is None or "curve" not in by_rule.results or "curve" not in plain.results:
        return None
    # At a finite K the rule may look worse although its limit is lower (spec section 6). The rule has more members than
    # there are seeds, so both limits are fitted to the same numbers of members.
    curves = mean_curve(by_rule), mean_curve(plain)
    shared = [k for k in curves[0] if k in curves[1]]
    rule, single = (members_limit({k: curve[k] for k in shared}) for curve in curves)
    return rule, single


def _settings_claims(study: Study, tokens: int) -> list[Claim]:
    """Compare members by the rule with as many at the best single model's point."""
    claims = []
    for model in single_point_ensembles(study, tokens):
        by_rule, plain = _both_points(study, model, tokens)
        limits = _both_limits(by_rule, plain)
        if limits is None or plain is None or not all(map(math.isfinite, limits)):
            continue
        longer, single, k = *limits, len(inputs(plain.job))
        claims.append(
            Claim(
                id=f"ensembling.rule.{model}.{tokens}",
                text=f"D = {tokens:,}: {k} {model} members of twice the epochs and half the decay beat {k} of the best "
                "single setting",
                value=f"{single - longer:+.4f} nats ({single:.4f} to {longer:.4f})",
                paper="limits 3.34 and 3.27 for 300M, section 6",
                seeds=k,
                holds=longer < single,
                provisional=heavy_weight_decay.missing(study, tokens),
            )
        )
    return claims


def _joint_claim(study: Study, tokens: int, done: Finished) -> list[Claim]:
    """Report the double limit, K first and then N, of three or more sizes."""
    law = joint_law(done)
    if law is None:
        return []
    caveats = heavy_weight_decay.missing(study, tokens)
    return [
        Claim(
            id=f"ensembling.double-limit.{tokens}",
            text=f"D = {tokens:,}: the double limit, K to infinity and then N to infinity (logits)",
            value=f"{law.E:.4f} nats",
            interval=law.interval["E"] if law.interval else None,
            seeds=settings(study).count,
            holds=None,
            provisional=caveats if law.interval else (*caveats, law.note.rstrip(".")),
        )
    ]


def _limit_notes(study: Study, tokens: int, done: Finished) -> list[str]:
    """Report the probability that the limit of members is below that of single models."""
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
    return [f"D = {tokens:,}: {comparison.sentence}" for comparison in comparisons]


def _table(tokens: int, done: Finished) -> Table:
    rows = []
    for model, ensemble, record in done:
        for k, losses in record.results["curve"].items():
            low, high = (min(losses), max(losses)) if len(losses) > 1 else (None, None)
            rows.append((model, ensemble.average, int(k), statistics.fmean(losses), low, high))
    return Table(
        title=f"Ensembles, D = {tokens:,} tokens (mean, lowest and highest over subsets of K members)",
        columns=("model", "average", "K", "loss", "lowest", "highest"),
        rows=tuple(rows),
    )


def _figure(study: Study, tokens: int, done: Finished) -> Figure:
    single, model = heavy_weight_decay.best_single(study, tokens)

    def draw(axes: Any) -> None:
        for size, ensemble, record in done:
            curve, label = mean_curve(record), f"{size}, {ensemble.average}"
            draw_series(axes, list(curve), list(curve.values()), label=label)
            if len(curve) > 2:
                draw_law(axes, members_law(record), 1, 4 * max(curve), label=f"{label}: E + A / K")
        if single:
            axes.axhline(single.mean, color="0.4", linewidth=1, label=f"best single ({model})")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("members K")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend()

    caption = f"Loss against K at D = {tokens:,}: members of every size, and the law in K."
    return Figure(name=f"loss-against-members-{tokens}", caption=caption, draw=draw)
