"""How low do K independent models go together, and to which limit? (Spec sections 6 and 7.)

Claim: the mean of K members beats the best single model; the excess over the limit falls like 1 / K. Members trained longer
and decayed less than the best single model (the same lr, twice the epochs, half the decay) are lower together, though not
alone. Where our members are not, more are made at the point of the best single model, and all that follows takes those.
Beside them, at equal training cost: snapshots, chains, averaged weights, dropout, masked inputs, and weights of members
learned on held-out text.
Command: epochal run ensembling --scale demo
Found: recipes/results/<scale>/report.md
"""

import math
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.figures import draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.run import AVERAGES, Ensemble, Job, Run, without_seed
from epochal.scale import Point, Scale, member_point
from epochal.scaling import JointLaw, MembersLaw, compare_limits, fit_joint, fit_members
from epochal.search.searches import Search, ensemble_search
from recipes import _kinds, _member_claims, heavy_weight_decay

FEWEST_SIZES = 3
"""A law in N of three constants through fewer sizes says nothing."""

SMALLEST_ERROR = 1e-6
"""Nats; equal members would make an error of zero, which weighs infinitely."""


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: the searches, then members and ensembles of each size with a certificate."""
    found = heavy_weight_decay.jobs(records, scale)
    found += [job for here in _member_searches(records, scale) for job in here.jobs]
    for tokens in scale.unique_tokens:
        for model in scale.ensemble.models:
            for point in (_rule_point(records, scale, model, tokens), best_point(records, scale, model, tokens)):
                if point is not None:
                    found += _runs(scale, model, tokens, point)
                    found += _averages(scale, model, tokens, point)
        found += _member_claims.single_point_ensembles(records, scale, tokens).values()
    found = list({job.name: job for job in found}.values())
    return found + _kinds.jobs(records, scale, kinds_point(records, scale))


def kinds_point(records: Records, scale: Scale) -> Point | None:
    """Return the point at which kinds of members are compared, that of independent ones."""
    if scale.kinds is None:
        return None
    return best_point(records, scale, scale.kinds.model, scale.unique_tokens[0])


def members(records: Records, scale: Scale, model: str, tokens: int) -> list[Run]:
    """Return the members of one size: none before their point is known."""
    point = best_point(records, scale, model, tokens)
    return [] if point is None else _runs(scale, model, tokens, point)


def _runs(scale: Scale, model: str, tokens: int, point: Point) -> list[Run]:
    return [scale.run(model, tokens, point, seed=seed) for seed in range(scale.ensemble.count)]


def best_point(records: Records, scale: Scale, model: str, tokens: int) -> Point | None:
    """Return the members' point of one size; None before the search for it, or the choice between two, is done.

    Without a search of their own: the rule's, or the best single model's where the seeds run there are lower together
    than as many members by the rule.
    """
    if scale.ensemble.search_members:
        here = search(records, scale, model, tokens).descent
        return here.best if here.certified else None
    rule = _rule_point(records, scale, model, tokens)
    if rule is None or scale.seeds == 1:
        return rule
    ensemble = _member_claims.single_point_ensembles(records, scale, tokens)[model]
    by_rule, plain = records.get(_averages(scale, model, tokens, rule)[0]), records.get(ensemble)
    if by_rule is None or plain is None:
        return None
    losses = _member_claims.both_settings(by_rule, plain, len(ensemble.runs))
    single_is_lower = losses is not None and losses[1] < losses[0]
    return heavy_weight_decay.tuned(records, scale, model, tokens).best if single_is_lower else rule


def _rule_point(records: Records, scale: Scale, model: str, tokens: int) -> Point | None:
    """Return the point of the best single model as the rule changes it; None before its search has a certificate.

    None, too, where members have a search of their own.
    """
    single = heavy_weight_decay.tuned(records, scale, model, tokens)
    if scale.ensemble.search_members or not single.certified or single.best is None:
        return None
    return member_point(single.best)


def search(records: Records, scale: Scale, model: str, tokens: int) -> Search:
    """Return the search of epochs and decay for the limit of infinitely many members; it starts at the rule's point."""
    single = heavy_weight_decay.tuned(records, scale, model, tokens)
    start = member_point(single.best) if single.certified and single.best else None
    # the rule may lead past the ends of the grid of single models
    grid = {
        field: tuple(sorted({*values, *((start.get(field),) if start else ())}))
        for field, values in (("wd", scale.grid.wd), ("epochs", scale.grid.epochs))
    }
    return ensemble_search(records, scale, model, tokens, start, grid, scale.ensemble.search_members)


def searches(records: Records, scale: Scale) -> list[Search]:
    """Return every search of this recipe, those of single models first: what `epochal plan` shows."""
    return heavy_weight_decay.searches(records, scale) + _member_searches(records, scale)


def _member_searches(records: Records, scale: Scale) -> list[Search]:
    """Return the searches for members: none where they follow the rule."""
    if not scale.ensemble.search_members:
        return []
    return [search(records, scale, model, tokens) for tokens in scale.unique_tokens for model in scale.ensemble.models]


def ensembles(records: Records, scale: Scale, model: str, tokens: int) -> list[Ensemble]:
    """Return the ensembles of one size, one for each way to average: none before the members' point is known."""
    point = best_point(records, scale, model, tokens)
    return [] if point is None else _averages(scale, model, tokens, point)


def _averages(scale: Scale, model: str, tokens: int, point: Point) -> list[Ensemble]:
    names = tuple(run.name for run in _runs(scale, model, tokens, point))
    stem = without_seed(names[0])
    return [Ensemble(name=f"{stem}-k{len(names)}-{average}", runs=names, average=average) for average in AVERAGES]


def members_law(record: Record) -> MembersLaw:
    """Fit E + A / K to the losses of one ensemble record (exponent 1: independent members, spec section 6).

    Its interval is that of a new draw of members: subsets share them, so their scatter alone would say far too little.
    """
    without = record.results.get("without")
    return fit_members(_by_count(record.results["curve"]), _by_count(without) if without else None)


def _by_count(table: dict[str, list[float]]) -> dict[int, list[float]]:
    return {int(k): losses for k, losses in table.items()}


def best_ensemble(records: Records, scale: Scale, tokens: int) -> Record | None:
    """Return the record of the ensemble with the lowest loss at one budget."""
    found = [
        record
        for model in scale.ensemble.models
        for ensemble in ensembles(records, scale, model, tokens)
        if (record := records.get(ensemble)) is not None
    ]
    return min(found, key=lambda record: record.loss, default=None)


def best_ensembles(records: Records, scale: Scale, tokens: int) -> list[Ensemble]:
    """Return the ensembles of the size whose lowest loss is lowest: none before those of every size have run."""
    losses = []
    for model in scale.ensemble.models:
        here = ensembles(records, scale, model, tokens)
        done = [record.loss for ensemble in here if (record := records.get(ensemble)) is not None]
        if len(done) < len(AVERAGES):
            return []
        losses.append((min(done), here))
    return min(losses, key=lambda entry: entry[0])[1]


def report(records: Records, scale: Scale) -> Section:
    """Compare ensembles with the best single model, and extrapolate in K."""
    claims: list[Claim] = []
    tables, figures, notes = [], [], []
    for tokens in scale.unique_tokens:
        done = finished(records, scale, tokens)
        claims += _claims(records, scale, tokens, done)
        claims += _member_claims.exponent_claims(records, scale, tokens, done)
        claims += _settings_claims(records, scale, tokens)
        claims += _joint_claim(records, scale, tokens, done)
        notes += _verdicts(records, scale, tokens, done)
        if done:
            tables.append(_table(scale, tokens, done))
            figures.append(_figure(records, scale, tokens, done))
    kinds = _kinds.rows(records, scale, kinds_point(records, scale))
    if kinds:
        claims += _kinds.claims(kinds, scale, heavy_weight_decay.missing(records, scale, scale.unique_tokens[0]))
        tables.append(_kinds.table(kinds, scale))
    return Section(
        title="Ensembling",
        question="How low do K independently trained models go together, and to which limit?",
        claims=tuple(claims),
        tables=tuple(tables),
        figures=tuple(figures),
        notes=tuple(notes),
    )


Found = list[tuple[str, Ensemble, Record]]


def _claims(records: Records, scale: Scale, tokens: int, done: Found) -> list[Claim]:
    best = best_ensemble(records, scale, tokens)
    single, model = heavy_weight_decay.best_single(records, scale, tokens)
    if best is None or not math.isfinite(single) or not isinstance(best.job, Ensemble):
        return []
    reasons = heavy_weight_decay.missing(records, scale, tokens)
    claims = [
        Claim(
            text=f"D = {tokens:,}: {len(best.job.runs)} members ({best.job.average}) beat the best single model ({model})",
            value=f"{single - best.loss:.4f} nats ({single:.4f} to {best.loss:.4f})",
            paper="0.25 nats with 8 members of 300M (3.57 to 3.32), section 6",
            seeds=len(best.job.runs),
            holds=best.loss < single,
            provisional=reasons,
        )
    ]
    for size, ensemble, record in done:
        law = members_law(record)
        claims.append(
            Claim(
                text=f"D = {tokens:,}: the limit K to infinity of {size} members ({ensemble.average}), exponent 1, lies "
                "under the best single model",
                # The search chose the setting, and the interval is that of members at it.
                value=f"{law.E:.4f} nats ({ensemble.name})",
                interval=law.interval["E"] if law.interval else None,
                seeds=len(ensemble.runs),
                holds=None if law.interval is None else law.interval["E"][1] < single,
                provisional=reasons if law.interval else (*reasons, law.note.rstrip(".")),
            )
        )
    return claims


def _settings_claims(records: Records, scale: Scale, tokens: int) -> list[Claim]:
    """Compare the rule's members with as many of the best single model's point, for every size that has both."""
    found = []
    for model, plain in _member_claims.single_point_ensembles(records, scale, tokens).items():
        rule = _rule_point(records, scale, model, tokens)
        if rule is not None:
            by_rule = records.get(_averages(scale, model, tokens, rule)[0])
            claim = _member_claims.settings_claim(records, scale, tokens, model, by_rule, plain)
            found += [claim] if claim else []
    return found


def finished(records: Records, scale: Scale, tokens: int) -> Found:
    """Return the ensembles of one budget that have run: size, job, record."""
    found = [
        (model, ensemble, records.get(ensemble))
        for model in scale.ensemble.models
        for ensemble in ensembles(records, scale, model, tokens)
    ]
    return [(model, ensemble, record) for model, ensemble, record in found if record is not None]


def joint_law(done: Found) -> JointLaw | None:
    """Fit the double limit through the limits of members (averaged in logits); None with fewer than three sizes."""
    laws = {
        record.results["parameters"] / len(ensemble.runs): members_law(record)
        for _, ensemble, record in done
        if ensemble.average == "logits"
    }
    if len(laws) < FEWEST_SIZES or any(law.E <= 0 for law in laws.values()):
        return None
    known = all(law.interval for law in laws.values())
    return fit_joint(
        list(laws),
        [math.inf] * len(laws),
        [law.E for law in laws.values()],
        errors=[max(law.error, SMALLEST_ERROR) for law in laws.values()] if known else None,
        error_dof=sum(law.dof for law in laws.values()) if known else 0,
    )


def _joint_claim(records: Records, scale: Scale, tokens: int, done: Found) -> list[Claim]:
    """The double limit, K first and then N (spec section 7), where three sizes or more have ensembles."""
    law = joint_law(done)
    if law is None:
        return []
    reasons = heavy_weight_decay.missing(records, scale, tokens)
    return [
        Claim(
            text=f"D = {tokens:,}: the double limit, K to infinity and then N to infinity (logits)",
            value=f"{law.E:.4f} nats",
            interval=law.interval["E"] if law.interval else None,
            seeds=scale.ensemble.count,
            holds=None,
            provisional=reasons if law.interval else (*reasons, law.note.rstrip(".")),
        )
    ]


def _verdicts(records: Records, scale: Scale, tokens: int, done: Found) -> list[str]:
    """Say in a sentence how probable it is that members in the limit are lower than single models in theirs."""
    single = heavy_weight_decay.size_law(records, scale, tokens)
    if single is None or not done:
        return []
    model, ensemble, record = min(done, key=lambda entry: members_law(entry[2]).E)
    name = f"the limit in K of {model} members ({ensemble.average})"
    told = [compare_limits(single, members_law(record), names=("the limit in N of single models", name))]
    joint = joint_law(done)
    if joint is not None and joint.nested.outer is not None:
        names = ("the limit in N of single models", "the double limit of members (logits)")
        told.append(compare_limits(single, joint.nested.outer, names=names))
    return [f"D = {tokens:,}: {comparison.sentence}" for comparison in told]


def _table(scale: Scale, tokens: int, done: Found) -> Table:
    rows = []
    for model, ensemble, record in done:
        for k, losses in record.results["curve"].items():
            low, high = (min(losses), max(losses)) if len(losses) > 1 else (None, None)
            rows.append((model, ensemble.average, int(k), sum(losses) / len(losses), low, high))
    return Table(
        title=f"Ensembles, D = {tokens:,} tokens (mean, lowest and highest over subsets of K members)",
        columns=("model", "average", "K", "loss", "lowest", "highest"),
        rows=tuple(rows),
    )


def _figure(records: Records, scale: Scale, tokens: int, done: Found) -> Figure:
    single, model = heavy_weight_decay.best_single(records, scale, tokens)

    def draw(axes: Any) -> None:
        for size, ensemble, record in done:
            curve = {int(k): losses for k, losses in record.results["curve"].items()}
            means = [sum(losses) / len(losses) for losses in curve.values()]
            label = f"{size}, {ensemble.average}"
            draw_series(axes, list(curve), means, label=label)
            if len(curve) > 2:
                draw_law(axes, members_law(record), 1, 4 * max(curve), label=f"{label}: E + A / K")
        if math.isfinite(single):
            axes.axhline(single, color="0.4", linewidth=1, label=f"best single ({model})")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("members K")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend()

    caption = f"Loss against K at D = {tokens:,}: members of every size, and the law in K."
    return Figure(name=f"loss-against-members-{tokens}", caption=caption, draw=draw)
