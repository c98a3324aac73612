"""Ways to teach one small student at equal student cost, and students of several sizes: rows of `distillation`.

The teacher's cost is not counted: it is paid once and depends on the way (models that read every batch, or one pass).
"""

import statistics
from dataclasses import dataclass, replace
from typing import Annotated, Any

from epochal.names import named_samples, named_targets
from epochal.ranges import (
    Decay,
    Epochs,
    Items,
    Kept,
    Ranged,
    Rate,
    Repeats,
    SequenceTokens,
    SomeShare,
    Tokens,
)
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.comparison import ArmLosses, Pair, pair_claims
from epochal.report.sections import Table
from epochal.run import Ensemble, Job, Run, SequenceDistillation, SoftTargetDistillation
from epochal.scale import Point
from epochal.scaling import seed_interval
from epochal.study import Study
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
# (way, baseline); the cache should equal the models that it was computed from.
PAIRS = (("probs", "samples"), ("cached", "probs"), ("average", "samples"), ("self", "self-samples"))


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """Students of soft targets, from the ensemble of their own size."""

    model: str  # of the students and of the members
    kd_weight: SomeShare  # of the teacher; the rest is that of the text
    wd: Decay
    keep: Kept = 64  # tokens kept at each position; see `Targets`
    seeds: Repeats = 1  # students each way
    sizes: Annotated[tuple[str, ...], Items(least=0)] = ()  # further sizes of student, taught by the cache


@dataclass(frozen=True, kw_only=True)
class Student(Ranged):
    """How a student of the size `model` learns from sampled text: its share, its pool, and the student's point."""

    model: str
    fraction: SomeShare  # of sampled text; 1 leaves no real text
    pool_tokens: Tokens  # sampled in all
    epochs: Epochs  # of the real text
    lr: Rate
    wd: Decay
    max_length: SequenceTokens  # of one sampled text

    @property
    def point(self) -> Point:
        """The student's lr, epochs of the real text, and decay."""
        return Point(lr=self.lr, epochs=self.epochs, wd=self.wd)


def text_student(
    study: Study,
    text: Student,
    model: str,
    source: str,
    seed: int,
    draw: str = "members",
    *,
    alone: bool = False,
    **more: Any,
) -> tuple[Job, Run]:
    """Return the Samples of a source and a student that learns from them.

    With `alone` it reads no real text, for as many steps. `more` are further fields of the Samples.
    """
    # Samples have no seed of the student: students of all seeds read the same text.
    samples = named_samples(source, text.pool_tokens, text.max_length, draw=draw, **more)
    distill = SequenceDistillation(samples=samples.name, fraction=1.0 if alone else text.fraction)
    # Without real text, epochs count passes over as many sampled tokens as there are real ones.
    point = replace(text.point, epochs=round(text.epochs / (1 - text.fraction))) if alone else text.point
    return samples, study.scale.run(model, study.scale.unique_tokens[0], point, seed=seed, distill=distill)


def teachers(study: Study, soft: Settings) -> dict[str, Ensemble]:
    """Return the ensembles of the students' own size by their average; none before they are known."""
    return {job.average: job for job in ensembling.ensembles(study, soft.model, study.scale.unique_tokens[0])}


def student(study: Study, text: Student, soft: Settings, way: str, seed: int, model: str = "") -> tuple[Job, ...]:
    """Return the student of one way, seed and size, after what it reads.

    The size is by default that of the members. Nothing before the teachers are known.
    """
    by_average, scale = teachers(study, soft), study.scale
    if not by_average:
        return ()
    model, ensemble, tokens = model or soft.model, by_average["probs"], scale.unique_tokens[0]
    if way in TEXT:
        source = ensemble.runs[0] if way == "self-samples" else ensemble.name
        return text_student(study, text, model, source, seed, draw="average" if way == "average" else "members")
    # All ways take the steps of a student of sampled text, epochs / (1 - fraction) times those of the real
    # text.
    # Instead of sampled text the student sees the real text more often, in an order that keeps the cut of the sequences.
    point = Point(lr=text.lr, epochs=round(text.epochs / (1 - text.fraction)), wd=soft.wd)
    if way == "cached":
        targets = named_targets(ensemble.name, tokens, scale.sequence_length, soft.keep)
        teach = SoftTargetDistillation(source=targets.name, kd_weight=soft.kd_weight, mode="cached")
        return targets, scale.run(model, tokens, point, seed=seed, data_order="sequences", teach=teach)
    source = ensemble.runs[0] if way == "self" else by_average[way].name
    teach = SoftTargetDistillation(source=source, kd_weight=soft.kd_weight)
    return (scale.run(model, tokens, point, seed=seed, data_order="sequences", teach=teach),)


def plan(study: Study, text: Student, soft: Settings) -> list[Job]:
    """Return every way with every seed, and the further sizes taught by the cache."""
    jobs = [job for seed in range(soft.seeds) for way in WAYS for job in student(study, text, soft, way, seed)]
    return [*jobs, *(job for model in soft.sizes for job in student(study, text, soft, "cached", 0, model))]


def records(study: Study, text: Student, soft: Settings, way: str) -> dict[int, Record]:
    """Return the finite records of one way by seed."""
    jobs = {seed: student(study, text, soft, way, seed) for seed in range(soft.seeds)}
    return study.finite({seed: found[-1] for seed, found in jobs.items() if found})


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headroom:
    """What a student can gain: the loss of the best single model of its size, and of the ensemble that teaches it."""

    single: float
    ensemble: float
    member_size: int
    members: int

    def share(self, loss: float) -> float | None:
        """Return the share of the ensemble's gain over the single model that a loss keeps."""
        gain = self.single - self.ensemble
        return (self.single - loss) / gain if gain > 0 else None


def headroom(study: Study, soft: Settings) -> Headroom | None:
    """Return what students can gain, from the best single model to the ensemble (probs)."""
    own = heavy_weight_decay.best(study, soft.model, study.scale.unique_tokens[0])
    job = teachers(study, soft).get("probs")
    ensemble = study.records.get(job) if job is not None else None
    if not own or ensemble is None:
        return None
    return Headroom(own.mean, ensemble.test_loss, own.parameters, int(ensemble.results["members"]))


def claims(study: Study, text: Student, soft: Settings, caveats: tuple[str, ...]) -> list[Claim]:
    """Return the claims of `PAIRS`, paired by seed."""
    arms = []
    for way in WAYS:
        losses = {seed: record.test_loss for seed, record in records(study, text, soft, way).items()}
        arms.append(ArmLosses(label=way, losses=losses, caveats=(*caveats, "no student is tuned")))
    pairs = [
        Pair(
            better=way,
            worse=baseline,
            id=f"distillation.way.{way}-{baseline}",
            text=f"students of {WAYS[way]} {'equal' if way == 'cached' else 'have a lower loss than'} students of "
            f"{WAYS[baseline]}, at equal student cost",
            # The cache is a sample of the same distribution, so the claim is equality.
            tolerance=0.01 if way == "cached" else None,
        )
        for way, baseline in PAIRS
    ]
    return pair_claims(arms, pairs)


def notes(study: Study, text: Student, soft: Settings) -> list[str]:
    """Report what is equal between the ways and how each got its settings; nothing before a student has run."""
    if not any(records(study, text, soft, way) for way in WAYS):
        return []
    runs = [run for way in WAYS for run in student(study, text, soft, way, 0) if isinstance(run, Run)]
    costs = sorted({run.tokens for run in runs})
    equal = "Every way costs the student the same" if len(costs) == 1 else "The ways do NOT cost the student the same"
    return [
        f"{equal}: {' to '.join(f'{cost:,}' for cost in costs)} tokens of {soft.model}, lr {text.lr:g}. Text: a share of "
        f"{text.fraction:g} sampled, wd {text.wd:g}; soft targets: weight {soft.kd_weight:g}, wd {soft.wd:g}. The "
        "teacher's cost is not counted.",
        "No student is tuned: the settings are the scale's. Those of soft targets were chosen on validation loss, those of "
        "text follow the paper (a low decay with sampled text) and were not searched alike. So a difference between text and "
        "soft targets may be one of tuning; differences within either are not.",
    ]


def tables(study: Study, text: Student, soft: Settings) -> list[Table]:
    """Return tables of the ways to teach and of the sizes taught by the cache."""
    room = headroom(study, soft)
    if room is None:
        return []
    by_way = {way: [record.test_loss for record in records(study, text, soft, way).values()] for way in WAYS}
    rows: list[tuple[Any, ...]] = []
    for way, losses in sorted(((w, v) for w, v in by_way.items() if v), key=lambda item: statistics.fmean(item[1])):
        mean, spread = statistics.fmean(losses), seed_interval(losses)
        half = None if spread is None else (spread[1] - spread[0]) / 2
        rows.append((WAYS[way], mean, half, room.single - mean, _percent(room.share(mean)), len(losses)))
    tokens = f"D = {study.scale.unique_tokens[0]:,} tokens"
    ways = Table(
        title=f"Students of {room.members} {soft.model} members at equal student cost, {tokens} "
        f"(best single {room.single:.4f}, ensemble {room.ensemble:.4f})",
        columns=("taught by", "loss", "+-90%", "gain over the single model", "share of the ensemble's gain", "seeds"),
        rows=tuple(rows),
    )
    return [table for table in (ways, _size_table(study, text, soft, room, tokens)) if table.rows]


def _size_table(study: Study, text: Student, soft: Settings, room: Headroom, tokens: str) -> Table:
    jobs = {model: student(study, text, soft, "cached", 0, model) for model in (soft.model, *soft.sizes)}
    taught = [(m, study.records.get(job[-1])) for m, job in jobs.items() if job]
    done = [(model, record) for model, record in taught if record is not None and record.status == "done"]
    rows = []
    for model, record in sorted(done, key=lambda pair: -int(pair[1].results["parameters"])):
        size = int(record.results["parameters"])
        shares = (round(size / room.member_size, 3), round(size / room.member_size / room.members, 3))
        rows.append((model, size, *shares, record.test_loss, _percent(room.share(record.test_loss))))
    return Table(
        title=f"Students of several sizes, taught by the cache, {tokens}",
        columns=("model", "N", "N / member", "N / ensemble", "loss", "share of the ensemble's gain"),
        rows=tuple(rows),
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}%"
