"""What would settle which of two settings or arms is better, and its cost.

Arms are compared in the limit of size.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from epochal.campaign.plan import Cost, cost_of, load_recipe, recipe_names
from epochal.config import nearest
from epochal.records import Record, Records
from epochal.run import Run
from epochal.scale import Scale
from epochal.scaling import PowerLaw, compare_limits, fit_power_law, interval_text
from epochal.scaling.decide import compare_seeds, laws_to_settle, seeds_to_settle, settled
from epochal.study import Arm, Study

MORE_SEEDS = (1, 2, 4, 8, 16, 32)
ENOUGH = 0.8  # probability from which an option is recommended


@dataclass(frozen=True)
class Option:
    """More runs, the probability that they settle the comparison, and their cost."""

    what: str
    probability: float
    cost: Cost


@dataclass(frozen=True)
class Decision:
    """How a comparison stands now, and the options to settle it by ascending cost; none where it is settled."""

    now: str
    options: tuple[Option, ...]

    @property
    def cheapest(self) -> Option | None:
        """The cheapest option that settles the comparison in 8 of 10 cases."""
        return next((option for option in self.options if option.probability >= ENOUGH), None)


def decide(first: str, second: str, records: Records, scale: Scale, vocab_size: int | None = None) -> list[Decision]:
    """Compare two runs, or two arms in the limit of size at every budget.

    Raises ValueError for a name that is neither, for a run and an arm, and for too few results to simulate from.
    """
    if records.named(first) is not None and records.named(second) is not None:
        return [_decide_seeds(first, second, records, scale, vocab_size)]
    study = Study(records, scale)
    arms = _arms(study)
    for name in (first, second):
        if name not in arms:
            known = f"arms: {', '.join(arms)}"
            raise ValueError(
                f"--decide needs two recorded runs or two arms, and {name!r} is neither{nearest(name, list(arms))}; {known}."
            )
    found = [
        decision
        for tokens in scale.unique_tokens
        if (decision := _decide_limits(study, arms[first], arms[second], tokens, vocab_size)) is not None
    ]
    if not found:
        raise ValueError(
            f"{first!r} and {second!r} have too few sizes for laws with intervals; run more sizes or seeds."
        )
    return found


def _arms(study: Study) -> dict[str, Arm]:
    """Return the arms of the scale's recipes by label; "standard" is the baseline at the usual weight decay."""
    arms = {}
    for name in recipe_names(study.scale):
        module = load_recipe(name)
        if hasattr(module, "standard"):
            arms["standard"] = module.standard(study)
        values = [value if isinstance(value, tuple) else (value,) for value in vars(module).values()]
        arms |= {arm.label: arm for group in values for arm in group if isinstance(arm, Arm)}
    return arms


def _setting(records: Records, name: str) -> list[Record]:
    for setting in records.settings:
        if any(record.job.name == name for record in setting):
            return setting
    raise ValueError(f"{name!r} is not a training run; --decide compares runs.")


def _losses(records: Records, name: str) -> dict[tuple[int, int], float]:
    """Return the losses of a setting by the seeds of weights and order."""
    runs = [(record.job, record.loss) for record in _setting(records, name) if record.status == "done"]
    return {(run.init_seed, run.order_seed): loss for run, loss in runs if isinstance(run, Run)}


def _decide_seeds(first: str, second: str, records: Records, scale: Scale, vocab_size: int | None) -> Decision:
    a, b = _losses(records, first), _losses(records, second)
    interval = compare_seeds(a, b)
    gain = statistics.fmean(b.values()) - statistics.fmean(a.values())
    counts = f"{len(a)} and {len(b)} seeds"
    now = f"{first} is {gain:+.4f} nats better than {second} over {counts}, 90% interval {interval_text(interval)}"
    if settled(interval):
        return Decision(f"{now}: settled.", ())
    jobs = [record.job for name in (first, second) if (record := records.named(name)) is not None]
    each = cost_of(jobs, scale, vocab_size)
    options = [Option(f"{n} more seeds of both", seeds_to_settle(a, b, n), _times(each, n)) for n in MORE_SEEDS]
    return Decision(f"{now}: open.", tuple(options))


def _decide_limits(study: Study, first: Arm, second: Arm, tokens: int, vocab_size: int | None) -> Decision | None:
    results = [[study.best(arm, model, tokens) for model in study.scale.models_at(tokens)] for arm in (first, second)]
    points = [
        [(float(r.results["parameters"]), r.loss) for one in side for r in one.records.values()] for side in results
    ]
    if any(len({size for size, _ in side}) < 2 for side in points):
        return None
    a, b = (fit_power_law([x for x, _ in side], [y for _, y in side]) for side in points)
    if a.posterior is None or b.posterior is None:
        return None
    comparison = compare_limits(b, a, names=(second.label, first.label))
    shown = interval_text(comparison.interval)
    now = f"D = {tokens:,}: the limit in N of {first.label} is {comparison.difference:+.4f} nats from that of {second.label}"
    now = f"{now}, 90% interval {shown}"
    if settled(comparison.interval):
        return Decision(f"{now}: settled.", ())
    runs = [result.runs[0] for side in results for result in side if result.runs]
    return Decision(f"{now}: open.", tuple(_limit_options(a, b, runs, study.scale, vocab_size)))


def _limit_options(a: PowerLaw, b: PowerLaw, runs: list[Run], scale: Scale, vocab_size: int | None) -> Iterable[Option]:
    seed = cost_of(runs, scale, vocab_size)
    largest = max(float(max(a.x)), float(max(b.x)))
    costly = max(cost_of([run], scale, vocab_size).flops for run in runs)
    options = [
        Option(f"{n} more seeds of every size", laws_to_settle(a, b, more_seeds=n), _times(seed, n)) for n in (1, 4)
    ]
    for factors in ((2.0,), (2.0, 4.0)):
        sizes = [largest * factor for factor in factors]
        seeds = 2 * max(round(len(a.x) / len(set(a.x.tolist()))), 1)
        flops = seeds * costly * sum(factors)  # at the settings of the largest size, without a search
        cost = Cost(seeds * len(sizes), flops, flops / scale.hardware.flops / 3600, 0)
        what = f"sizes of {' and '.join(f'{size:,.0f}' for size in sizes)} parameters (without a search)"
        options.append(Option(what, laws_to_settle(a, b, sizes=sizes), cost))
    return sorted(options, key=lambda option: option.cost.flops)


def _times(cost: Cost, count: int) -> Cost:
    return Cost(cost.jobs * count, cost.flops * count, cost.hours * count, cost.disk * count)
