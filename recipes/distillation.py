"""How much of an ensemble's gain can one small student keep? (Spec section 9.)

Claim: a fresh model that learns from the real text and from text sampled from the members of an ensemble (or from one
model of its own size) beats the best single model of its size, and keeps most of the ensemble's gain. Baselines at equal
student cost: text of the averaged model, soft targets online and cached; and students of several sizes.
Command: epochal run distillation --scale demo
Results: recipes/results/<scale>/report.md
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Annotated, Any

from epochal.ranges import Decay, Items, Ranged, Repeats, Tokens
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.comparison import beyond_noise, welch_claim, within_noise
from epochal.report.figures import LOSS_AXIS, draw_ranking
from epochal.report.sections import Figure, Section, Table
from epochal.run import Job, Run
from epochal.scale import Scale
from epochal.search.searches import Search
from epochal.study import Study, judged
from recipes import _soft_targets, ensembling, epoching, heavy_weight_decay

TEACHERS = {"ensemble": "the ensemble", "self": "one member of its own size"}
# A control (spec section 9): the same sampled text without the real one, for as many steps.
SYNTHETIC = "self-alone"
# Text of one member that continues documents, each continuation a document of its own or all of one document as one.
MEGADOCS = {
    "separate": "separate continuations",
    "stretched": "stretched documents",
}


@dataclass(frozen=True, kw_only=True)
class Megadocs(Ranged):
    """Students of continued documents: how much of a document a continuation begins with, and how many there are."""

    prompt_tokens: Tokens
    continuations: Repeats  # of each document


@dataclass(frozen=True, kw_only=True)
class Settings(_soft_targets.Student):
    """The student of sampled text, and optionally other ways to teach."""

    soft_targets: _soft_targets.Settings | None = None
    # Decays that the first seed of each student tries; all seeds take the best. Empty: `wd`, untuned.
    tune_wd: Annotated[tuple[Decay, ...], Items(least=0)] = ()
    synthetic_only: bool = False  # students of one member's text without real text as well
    megadocs: Megadocs | None = None  # students of one member's continuations, apart and joined by document, as well

    def check(self, scale: Scale) -> None:
        """Refuse students that cannot be trained."""
        scale.check_models("model", self.model)
        if self.fraction == 1:
            raise ValueError("fraction must be below 1, got 1.0; students without real text are synthetic_only = true.")
        ensembled = scale.tables.get("ensembling", {}).get("models", [])
        if self.soft_targets is not None and self.soft_targets.model not in ensembled:
            model = self.soft_targets.model
            raise ValueError(f"soft_targets.model {model!r} has no ensemble; add it to models of [ensembling].")


def plan(study: Study) -> list[Job]:
    """Return the ensembles, text sampled from them and from one member, and students."""
    settings, jobs = study.settings(Settings), ensembling.plan(study)
    for teacher in teachers(study):
        for wd in decays(study) if teacher in TEACHERS else ():
            jobs += student(study, teacher, wd)
        best = best_decay(study, teacher)
        if best is not None and tuned(study, teacher):
            for seed in range(study.scale.seeds):
                jobs += student(study, teacher, best, seed)
    if settings is not None and settings.soft_targets is not None:
        jobs += _soft_targets.plan(study, settings, settings.soft_targets)
    return jobs


def searches(study: Study) -> list[Search]:
    """Return the searches that this recipe waits for."""
    return ensembling.searches(study)


def teachers(study: Study) -> tuple[str, ...]:
    """Return who teaches: those of TEACHERS, and the control without real text."""
    settings = study.settings(Settings)
    if settings is None:
        return ()
    return (*TEACHERS, *((SYNTHETIC,) if settings.synthetic_only else ()), *(MEGADOCS if settings.megadocs else ()))


def decays(study: Study) -> tuple[float, ...]:
    """Return the decays that the first seed of every student tries."""
    settings = study.settings(Settings)
    return () if settings is None else settings.tune_wd or (settings.wd,)


def tries(study: Study, teacher: str) -> dict[float, float]:
    """Return the known first-seed losses of one teacher's students by decay."""
    # Controls take the decay of the self-distilled student, with which they are compared.
    teacher = teacher if teacher in TEACHERS else "self"
    jobs = {wd: student(study, teacher, wd) for wd in decays(study)}
    return {wd: loss for wd, found in jobs.items() if found and (loss := study.loss(found[-1])) is not None}


def tuned(study: Study, teacher: str) -> bool:
    """Whether the first seed has tried every decay, or there is none to choose."""
    return len(decays(study)) == 1 or len(tries(study, teacher)) == len(decays(study))


def best_decay(study: Study, teacher: str) -> float | None:
    """Return the best known decay of one teacher's students; None before the first."""
    losses = tries(study, teacher)
    if len(decays(study)) == 1:
        return decays(study)[0]
    return min(losses, key=lambda wd: (losses[wd], wd), default=None)


def student(study: Study, teacher: str, wd: float, seed: int = 0) -> tuple[Job, ...]:
    """Return the Samples of a teacher and a student that learns from them; nothing before the teacher is known.

    "ensemble": the members of the best ensemble one by one; "self": the first member of the student's own size alone.
    """
    tokens, settings = study.scale.unique_tokens[0], study.settings(Settings)
    if settings is None:
        return ()
    if teacher == "ensemble":
        ensembles = ensembling.best_ensembles(study, tokens)
    else:
        ensembles = ensembling.ensembles(study, settings.model, tokens)
    if not ensembles:
        return ()
    # Any average will do: Samples draw from the members one by one.
    source = ensembles[0].name if teacher == "ensemble" else ensembles[0].runs[0]
    text: _soft_targets.Student = replace(settings, wd=wd)
    return _soft_targets.text_student(
        study, text, settings.model, source, seed, alone=teacher == SYNTHETIC, **_form(settings, teacher)
    )


def _form(settings: Settings, teacher: str) -> dict[str, Any]:
    """Return the further fields of the Samples of one teacher."""
    if settings.megadocs is None or teacher not in MEGADOCS:
        return {}
    choice = settings.megadocs
    common = {"prompt_tokens": choice.prompt_tokens, "continuations": choice.continuations}
    return common | {"joined": teacher == "stretched"}


def students(study: Study, teacher: str) -> dict[int, Run]:
    """Return one teacher's students at their best decay by seed; none before it is known."""
    best = best_decay(study, teacher)
    jobs = {} if best is None else {seed: student(study, teacher, best, seed) for seed in range(study.scale.seeds)}
    return {seed: run for seed, found in jobs.items() for run in found if isinstance(run, Run)}


def student_records(study: Study, teacher: str) -> list[Record]:
    """Return the finite records of one teacher's students, one for each seed that has run."""
    records = study.finite(students(study, teacher))
    # The first seed tries every decay.
    return list((judged(records) if len(decays(study)) > 1 else records).values())


# --- the report -------------------------------------------------------------------------------------------------------


def roles(study: Study) -> dict[str, Record]:
    """Return the results that people use by a short name, for `epochal export`, `eval`, `generate`."""
    tokens = study.scale.unique_tokens[0]
    single, _ = heavy_weight_decay.best_single(study, tokens)
    students = student_records(study, "ensemble")
    results = {
        "single": next(iter(single.records.values()), None),
        "ensemble": ensembling.best_ensemble(study, tokens),
        "student": students[0] if students else None,
    }
    return {role: record for role, record in results.items() if record is not None}


def report(study: Study) -> Section:
    """Compare students with the best single model of their size and with their teachers."""
    title, question = "Distillation", "How much of an ensemble's gain can one small student keep?"
    settings, tokens = study.settings(Settings), study.scale.unique_tokens[0]
    if settings is None:
        return Section(title=title, question=question, notes=("This scale has no table [distillation].",))
    taught = [ensembling.best_model(study, tokens)] if ensembling.best_ensembles(study, tokens) else []
    missing = heavy_weight_decay.missing_of(study, tokens, settings.model, *taught)
    claims = [claim for teacher in TEACHERS for claim in _student_claims(study, settings.model, teacher, missing)]
    claims += [*_teacher_claim(study, missing), *_synthetic_claim(study, missing), *_megadocs_claim(study, missing)]
    tables, notes, soft = list[Table](), list[str](), settings.soft_targets
    if soft is not None:
        claims += _soft_targets.claims(study, settings, soft, heavy_weight_decay.missing_of(study, tokens, soft.model))
        tables, notes = _soft_targets.tables(study, settings, soft), _soft_targets.notes(study, settings, soft)
    steps = chain(study)
    names = [f"{role}: {record.job.name}" for role, record in roles(study).items()]
    if names:
        notes.append(f"Names for epochal export, eval and generate: {'; '.join(names)}.")
    return Section(
        title=title,
        question=question,
        claims=tuple(claims),
        tables=(*([chain_table(steps, tokens)] if steps else []), *tables),
        figures=(_figure(steps, tokens),) if steps else (),
        notes=tuple(notes),
    )


PAPER = {
    "ensemble": ("0.21 nats (3.57 to 3.36), section 9", 0.21),
    "self": ("0.14 nats (3.57 to 3.43), section 9", 0.14),
}


def _losses(study: Study, teacher: str) -> list[float]:
    return [record.test_loss for record in student_records(study, teacher)]


def _student_claims(study: Study, size: str, teacher: str, missing: tuple[str, ...]) -> list[Claim]:
    single = heavy_weight_decay.best(study, size, study.scale.unique_tokens[0])
    losses, caveats = _losses(study, teacher), (*missing, *_untuned(study, teacher))
    if not losses or not single:
        return []
    paper, effect = PAPER[teacher]
    gain = welch_claim(
        f"a {size} student of {TEACHERS[teacher]} beats the best single {size}",
        losses,
        list(single.losses.values()),
        id=f"distillation.student-of-{teacher}",
        paper=paper,
        size=effect,
        caveats=caveats,
        search=math.hypot(heavy_weight_decay.choice(single), _one_teacher(study) if teacher == "self" else 0.0),
    )
    ensemble = ensembling.best_ensemble(study, study.scale.unique_tokens[0])
    if teacher != "ensemble" or ensemble is None or single.mean <= ensemble.test_loss:
        return [gain]
    # 0: as good as the best single model; 1: as good as the ensemble.
    room = single.mean - ensemble.test_loss
    share = (single.mean - statistics.fmean(losses)) / room
    ends = None if gain.interval is None else (gain.interval[0] / room, gain.interval[1] / room)
    noise = within_noise(ends, 0.5)
    share_claim = Claim(
        id="distillation.share",
        text="the student keeps more than half of the ensemble's gain",
        value=f"{share:.2f} of it",
        interval=ends,
        seeds=len(losses),
        paper="83%, section 9",
        holds=beyond_noise(share > 0.5, noise),
        provisional=(*caveats, *noise),
    )
    return [gain, share_claim]


def _untuned(study: Study, teacher: str) -> tuple[str, ...]:
    """Name what the search for the students' decay lacks, and what their seeds share."""
    grid, best = sorted(decays(study)), best_decay(study, teacher)
    # Students of all seeds read one text: their spread does not show what another member would teach.
    shared = () if teacher == "ensemble" else ("one teacher",)
    if len(grid) < 2:
        return ("the student is not tuned", *shared)
    if not tuned(study, teacher):
        return ("decays of the student that have not run", *shared)
    return (*(("the student's decay is at the end of its grid",) if best in (grid[0], grid[-1]) else ()), *shared)


def _teachers_like(study: Study, model: str) -> list[float]:
    """Return the losses of all members that were trained like the self-distilled student's teacher."""
    runs = ensembling.members(study, model, study.scale.unique_tokens[0])
    return [record.test_loss for record in study.finite(dict(enumerate(runs))).values()]


def _one_teacher(study: Study) -> float:
    """Return the standard deviation in nats between runs trained like the one teacher."""
    # All seeds of the student read the text of one teacher, so their spread lacks what another one would change. Two
    # campaigns with intervals from seeds alone did not meet. A student is taken to follow its teacher nat for nat.
    settings = study.settings(Settings)
    losses = _teachers_like(study, settings.model) if settings else []
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def _teacher_claim(study: Study, missing: tuple[str, ...]) -> list[Claim]:
    """Report whether students of one member beat models of its setting."""
    settings, losses = study.settings(Settings), _losses(study, "self")
    if settings is None or not losses:
        return []
    # The teacher is one run, which has no variance; all members were trained like it.
    alike = _teachers_like(study, settings.model)
    return [
        welch_claim(
            f"a self-distilled student beats models of its teacher's setting ({len(alike)} members)",
            losses,
            alike,
            id="distillation.beats-teacher",
            paper="3.71 to 3.43, section 9",
            size=0.28,
            caveats=(*missing, *_untuned(study, "self")),
            search=_one_teacher(study),
        )
    ]


def _synthetic_claim(study: Study, missing: tuple[str, ...]) -> list[Claim]:
    """Report what real text adds to the text of one member."""
    alone, mixed = _losses(study, SYNTHETIC) if SYNTHETIC in teachers(study) else [], _losses(study, "self")
    if not alone or not mixed:
        return []
    return [
        welch_claim(
            "a self-distilled student with real text beats one of sampled text alone, at equal student cost",
            mixed,
            alone,
            id="distillation.synthetic-only",
            paper="4.07 without, 3.44 with as much real text, section 9",
            size=0.63,
            caveats=(*missing, *_untuned(study, "self")),
        )
    ]


def _megadocs_claim(study: Study, missing: tuple[str, ...]) -> list[Claim]:
    """Report whether the continuations of a document are worth more as one long document."""
    one, apart = (_losses(study, form) if form in teachers(study) else [] for form in ("stretched", "separate"))
    if not one or not apart:
        return []
    return [
        welch_claim(
            f"a student of documents stretched by their continuations beats one of {MEGADOCS['separate']}",
            one,
            apart,
            id="distillation.megadocs",
            paper="1.80x data efficiency against 1.48x, arXiv 2603.18534",
            caveats=(*missing, *_untuned(study, "self")),
        )
    ]


# --- the whole chain --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the chain: its name, how many models it keeps in memory, and its records, one for each seed."""

    what: str
    models: int
    records: list[Record]

    def mean(self, field: str) -> float | None:
        """Return the mean over seeds of one result; None if a record lacks it."""
        values = [value for record in self.records if (value := record.results.get(field)) is not None]
        return statistics.fmean(values) if len(values) == len(self.records) else None


def chain(study: Study) -> list[Step]:
    """Return the steps of the whole chain that have results."""
    tokens, steps = study.scale.unique_tokens[0], list[Step]()
    standard = epoching.best_standard(study, tokens)
    if standard:
        steps.append(Step(f"standard, best single ({standard.runs[0].model})", 1, list(standard.records.values())))
    tuned, model = heavy_weight_decay.best_single(study, tokens)
    if tuned:
        steps.append(Step(f"tuned decay, best single ({model})", 1, list(tuned.records.values())))
    ensemble = ensembling.best_ensemble(study, tokens)
    if ensemble is not None:
        steps.append(Step(f"ensemble of {ensemble.results['members']}", ensemble.results["members"], [ensemble]))
    for teacher, what in (
        ("ensemble", "the ensemble"),
        ("self", "itself"),
        (SYNTHETIC, "itself, no real text"),
        *MEGADOCS.items(),
    ):
        # Without settings of their own, students of continuations have the names of plain self-distilled ones.
        records = student_records(study, teacher) if teacher in teachers(study) else []
        if records:
            steps.append(Step(f"student of {what}", 1, records))
    return steps


def chain_table(steps: list[Step], tokens: int) -> Table:
    """Return the table of the whole chain."""
    losses = [(step.mean("loss"), step.mean("test_loss"), len(step.records)) for step in steps]
    sizes = [(step.what, step.models, step.records[0].results.get("parameters")) for step in steps]
    return Table(
        title=f"The whole chain, D = {tokens:,} tokens, means over seeds",
        columns=("step", "models", "parameters", "validation loss", "test loss", "seeds"),
        rows=tuple((*size, *loss) for size, loss in zip(sizes, losses, strict=True)),
    )


def _figure(steps: list[Step], tokens: int) -> Figure:
    def draw(axes: Any) -> None:
        losses = [step.mean("test_loss") or step.mean("loss") for step in steps]
        draw_ranking(axes, [step.what for step in steps], losses)
        axes.set_xlabel(LOSS_AXIS)

    return Figure(name="whole-chain", caption=f"The whole chain at D = {tokens:,}, one row per step.", draw=draw)
