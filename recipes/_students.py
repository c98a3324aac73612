"""Ways to teach one small student, at equal student cost, and students of several sizes: rows of `distillation`.

All take the steps of a student of sampled text, epochs / (1 - fraction) times those of the real text. What the teacher
costs beside is not counted: it is paid once and depends on the way (models that read every batch, or one pass).
"""

import math
import statistics
from dataclasses import dataclass, replace

from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.sections import Table
from epochal.run import Ensemble, Job, Run, Samples, SoftTargetDistillation, Targets
from epochal.scale import Point, Scale, Soft
from epochal.scaling import caveats, seed_interval
from recipes import ensembling, heavy_weight_decay

TEXT = {
    "samples": "text of the members, one by one",
    "average": "text of their average (probs)",
    "self-samples": "text of one member",
}
SOFT = {
    "probs": "mean of probabilities, online",
    "logits": "mean of logits, online",
    "cached": "mean of probabilities, cached",
    "self": "one member, online",
}
WAYS = TEXT | SOFT


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job of the comparison that can be named today."""
    if scale.soft is None:
        return []
    found: list[Job] = []
    for seed in range(scale.soft.seeds):
        for way in WAYS:
            found += student(records, scale, way, seed)
    for model in scale.soft.sizes:
        found += student(records, scale, "cached", 0, model)
    return list({job.name: job for job in found}.values())


def teachers(records: Records, scale: Scale) -> dict[str, Ensemble]:
    """Return the ensembles of the students' own size by their average; none before they are known."""
    assert scale.soft is not None
    tokens = scale.unique_tokens[0]
    return {job.average: job for job in ensembling.ensembles(records, scale, scale.soft.model, tokens)}


def student(records: Records, scale: Scale, way: str, seed: int, model: str = "") -> list[Job]:
    """Return the student of one way, seed and size (by default the teacher's members'), after what it reads."""
    assert scale.soft is not None
    by_average = teachers(records, scale)
    if not by_average:
        return []
    run = _base(scale, scale.soft, way, seed, model or scale.soft.model)
    ensemble, first = by_average["probs"], by_average["probs"].runs[0]
    if way in TEXT:
        samples = Samples(
            name=f"text-{way}-{first if way == 'self-samples' else ensemble.name}",
            source=first if way == "self-samples" else ensemble.name,
            tokens=scale.students.pool_tokens,
            max_length=scale.students.max_length,
            draw="average" if way == "average" else "members",
        )
        return [samples, scale.student(run.model, run.unique_tokens, samples.name, name=run.name, seed=seed)]
    if way == "cached":
        targets = Targets(
            name=f"targets-{ensemble.name}",
            source=ensemble.name,
            unique_tokens=run.unique_tokens,
            sequence_length=run.sequence_length,
            keep=scale.soft.keep,
        )
        teach = SoftTargetDistillation(source=targets.name, kd_weight=scale.soft.weight, mode="cached")
        return [targets, replace(run, teach=teach)]
    source = first if way == "self" else by_average[way].name
    return [replace(run, teach=SoftTargetDistillation(source=source, kd_weight=scale.soft.weight))]


def _base(scale: Scale, soft: Soft, way: str, seed: int, model: str) -> Run:
    """Return a student without a teacher: with soft targets it sees the real text more often, in an order with a fixed cut."""
    settings = scale.students
    point = Point(lr=settings.lr, epochs=round(settings.epochs / (1 - settings.fraction)), wd=soft.wd)
    run = scale.run(model, scale.unique_tokens[0], point, seed=seed)
    return replace(run, name=f"student-{way}-{model}-s{seed}", data_order="sequences")


def record_of(records: Records, scale: Scale, way: str, seed: int, model: str = "") -> Record | None:
    """Return the record of one student, if it has run and did not diverge."""
    found = student(records, scale, way, seed, model)
    record = records.get(found[-1]) if found else None
    return record if record is not None and math.isfinite(record.loss) else None


@dataclass(frozen=True)
class Scales:
    """The two ends of what a student can keep: loss of the best single model of its size, and of the ensemble."""

    single: float
    ensemble: float
    member_size: int
    members: int

    def share(self, loss: float) -> float | None:
        """Return the share of the ensemble's gain over the single model that a loss keeps."""
        gain = self.single - self.ensemble
        return (self.single - loss) / gain if gain > 0 else None


def ends(records: Records, scale: Scale) -> Scales | None:
    """Return the best single model of the students' size and the mean of probabilities of its members."""
    if scale.soft is None:
        return None
    tokens = scale.unique_tokens[0]
    own = heavy_weight_decay.best_records(records, scale, scale.soft.model, tokens)
    job = teachers(records, scale).get("probs")
    ensemble = records.get(job) if job is not None else None
    if not own or ensemble is None:
        return None
    single = statistics.fmean(record.loss for record in own)
    return Scales(single, ensemble.loss, int(own[0].results["parameters"]), int(ensemble.results["members"]))


def losses(records: Records, scale: Scale, way: str) -> dict[int, float]:
    """Return the losses of one way by seed."""
    assert scale.soft is not None
    found = {seed: record_of(records, scale, way, seed) for seed in range(scale.soft.seeds)}
    return {seed: record.loss for seed, record in found.items() if record is not None}


def claims(records: Records, scale: Scale, reasons: tuple[str, ...]) -> list[Claim]:
    """Soft targets against sampled text of the same teacher, paired by seed; and the cache against the models."""
    made = []
    for way, other in (("probs", "samples"), ("cached", "probs"), ("average", "samples"), ("self", "self-samples")):
        ours, theirs = losses(records, scale, way), losses(records, scale, other)
        values = [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
        if not values:
            continue
        mean = statistics.fmean(values)
        made.append(
            Claim(
                text=f"at equal student cost, {WAYS[way]}: "
                + ("as good as" if way == "cached" else "better than")
                + f" {WAYS[other]}",
                value=f"{mean:.4f} nats",
                interval=seed_interval(values),
                seeds=len(values),
                holds=abs(mean) < 0.01 if way == "cached" else mean > 0,
                # two that are meant to be equal are not in doubt because they are
                provisional=(*reasons, *(u for u in caveats(values) if way != "cached" or u == "one seed")),
            )
        )
    return made


def notes(records: Records, scale: Scale) -> list[str]:
    """Say what is equal between the ways to teach and how each got its settings; nothing before a student has run."""
    if scale.soft is None or not any(losses(records, scale, way) for way in WAYS):
        return []
    runs = [run for way in WAYS for run in student(records, scale, way, 0) if isinstance(run, Run)]
    costs = sorted({run.tokens for run in runs})
    text, soft = scale.students, scale.soft
    equal = "Every way costs the student the same" if len(costs) == 1 else "The ways do NOT cost the student the same"
    return [
        f"{equal}: {' to '.join(f'{cost:,}' for cost in costs)} tokens of {soft.model}, lr {text.lr:g}. Text: a share of "
        f"{text.fraction:g} sampled, wd {text.wd:g}; soft targets: weight {soft.weight:g}, wd {soft.wd:g}. What the "
        "teacher costs is left out.",
        "No student is tuned here: the settings are the scale's. Those of soft targets were chosen on validation loss, "
        "those of text follow the paper (a low decay beside sampled text) and were not searched alike, so a difference "
        "between text and soft targets may be one of tuning; differences within either are not.",
    ]


def tables(records: Records, scale: Scale) -> list[Table]:
    """The ways to teach, the best first, and the sizes taught by the cache, the largest first."""
    between = ends(records, scale)
    if scale.soft is None or between is None:
        return []
    found = {way: values for way in WAYS if (values := list(losses(records, scale, way).values()))}
    rows = []
    for way, values in sorted(found.items(), key=lambda item: statistics.fmean(item[1])):
        mean, spread = statistics.fmean(values), seed_interval(values)
        half = None if spread is None else (spread[1] - spread[0]) / 2
        rows.append((WAYS[way], mean, half, between.single - mean, _percent(between.share(mean)), len(values)))
    models = (scale.soft.model, *scale.soft.sizes)
    taught = [(model, record) for model in models if (record := record_of(records, scale, "cached", 0, model))]
    taught.sort(key=lambda pair: -int(pair[1].results["parameters"]))
    sizes = []
    for model, record in taught:
        size = int(record.results["parameters"])
        shares = (size / between.member_size, size / between.member_size / between.members)
        sizes.append((model, size, *(round(x, 3) for x in shares), record.loss, _percent(between.share(record.loss))))
    tokens = f"D = {scale.unique_tokens[0]:,} tokens"
    ways = Table(
        title=f"Students of {between.members} {scale.soft.model} members at equal student cost, {tokens} "
        f"(best single {between.single:.4f}, ensemble {between.ensemble:.4f})",
        columns=("taught by", "loss", "+-90%", "gain over the single model", "share of the ensemble's gain", "seeds"),
        rows=tuple(rows),
    )
    by_size = Table(
        title=f"Students of several sizes, taught by the cache, {tokens}",
        columns=("model", "N", "N / member", "N / ensemble", "loss", "share of the ensemble's gain"),
        rows=tuple(sizes),
    )
    return [table for table in (ways, by_size) if table.rows]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}%"
