"""What is the best model that a text and a time can buy? (The campaign that `epochal init` writes.)

The learning rate and the weight decay are tuned on a small model; one model is trained with them. Where text is the
limit, more members follow, their ensemble, and a student that learns from the mean of their probabilities.
Claim: the ensemble beats its best member, and so does the student.
Command: epochal run best_model --scale NAME
Results: recipes/results/<scale>/report.md
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from epochal.names import named_ensemble
from epochal.ranges import Decay, Epochs, Items, Range, Ranged, Rate, Repeats, SomeShare
from epochal.records import Record
from epochal.report.claims import Claim
from epochal.report.sections import Section, Table
from epochal.run import Ensemble, Job, Run, SoftTargetDistillation
from epochal.scale import Point, Scale
from epochal.study import Arm, Study


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """The final model, what it is tuned on, and what follows it."""

    model: str
    epochs: Epochs
    lr: Rate  # where the tuning starts, and what is used without a proxy
    wd: Decay
    proxy: str = ""  # the model that lr and wd are tuned on; empty: they are not tuned
    proxy_epochs: Annotated[int, Range(0, 10**5)] = 0
    lrs: Annotated[tuple[Rate, ...], Items(least=0)] = ()  # tried at `wd`
    wds: Annotated[tuple[Decay, ...], Items(least=0)] = ()  # tried at `lr`
    members: Repeats = 1
    student_epochs: Annotated[int, Range(0, 10**5)] = 0  # 0: no student
    kd_weight: SomeShare = 0.9  # of the teacher; the rest is that of the text
    init_from: str = ""  # a model folder that the final model starts from

    def check(self, scale: Scale) -> None:
        """Refuse models that are not on the ladder and a proxy without epochs."""
        scale.check_models("model and proxy", self.model, *([self.proxy] if self.proxy else []))
        if bool(self.proxy) != bool(self.proxy_epochs):
            raise ValueError("proxy and proxy_epochs must be given together.")
        if self.student_epochs and self.members < 2:
            raise ValueError(f"a student needs an ensemble, got members = {self.members}; give 2 or more.")


def _arm(settings: Settings, **changes: Any) -> Arm:
    return Arm("final", run=changes | ({"init_from": settings.init_from} if settings.init_from else {}))


def plan(study: Study) -> list[Job]:
    """Return the runs of the proxy, members, their ensemble and its student."""
    settings = study.settings(Settings)
    if settings is None:
        return []
    runs = [run for values in _tried(study, settings).values() for run in values.values()]
    members = _members(study, settings)
    jobs: list[Job] = [*dict.fromkeys(runs), *members]
    ensemble = _ensemble(members)
    if ensemble is not None:
        jobs += [ensemble, *_student(study, settings, ensemble)]
    return jobs


def _tried(study: Study, settings: Settings) -> dict[str, dict[float, Run]]:
    """Return the runs of the proxy by tuned field and value: each field alone, the other one at its start."""
    if not settings.proxy:
        return {}
    tokens, start = study.scale.unique_tokens[0], Point(settings.lr, settings.proxy_epochs, settings.wd)
    return {
        name: {value: study.run(_arm(settings), settings.proxy, tokens, start.at(name, value)) for value in values}
        for name, values in (("lr", settings.lrs), ("wd", settings.wds))
        if values
    }


def tuned(study: Study, settings: Settings) -> Point | None:
    """Return the point of the final model; None while the proxy runs."""
    point = Point(settings.lr, settings.epochs, settings.wd)
    for name, runs in _tried(study, settings).items():
        known = {value: loss for value, run in runs.items() if (loss := study.loss(run)) is not None}
        if len(known) < len(runs):
            return None
        point = point.at(name, min(known, key=lambda value: known[value]))
    return point


def _members(study: Study, settings: Settings) -> tuple[Run, ...]:
    point = tuned(study, settings)
    if point is None:
        return ()
    return study.seeds(_arm(settings), settings.model, study.scale.unique_tokens[0], point, settings.members)


def _ensemble(members: tuple[Run, ...]) -> Ensemble | None:
    # In `micro` students of the mean of probabilities kept 71% of the ensemble's gain, those of the mean of logits 54%.
    return named_ensemble(tuple(run.name for run in members), "probs") if len(members) > 1 else None


def _student(study: Study, settings: Settings, ensemble: Ensemble) -> tuple[Run, ...]:
    point = tuned(study, settings)
    if not settings.student_epochs or point is None:
        return ()
    teach = SoftTargetDistillation(source=ensemble.name, kd_weight=settings.kd_weight)
    arm = _arm(settings, teach=teach)
    return (study.run(arm, settings.model, study.scale.unique_tokens[0], point.at("epochs", settings.student_epochs)),)


# --- the report -------------------------------------------------------------------------------------------------------


def roles(study: Study) -> dict[str, Record]:
    """Return the final models by name, for `epochal export`, `eval`, `generate`."""
    settings = study.settings(Settings)
    if settings is None:
        return {}
    members = study.finite(dict(enumerate(_members(study, settings))))
    # The member of lowest loss: which seed that is was chosen on the validation split.
    found = {"single": min(members.values(), key=lambda record: record.loss)} if members else {}
    ensemble = _ensemble(_members(study, settings))
    jobs = (
        {}
        if ensemble is None
        else {"ensemble": ensemble, "student": next(iter(_student(study, settings, ensemble)), None)}
    )
    for role, job in jobs.items():
        record = None if job is None else study.records.get(job)
        if record is not None and math.isfinite(record.loss):
            found[role] = record
    return found


def report(study: Study) -> Section | None:
    """Show what was tuned, and what each step of the chain gains."""
    settings = study.settings(Settings)
    if settings is None:
        return None
    return Section(
        title="The best model of this text",
        question="Which settings does a small model prefer, and what do members and a student add?",
        claims=tuple(_claims(roles(study))),
        tables=(_table(study, settings),) if settings.proxy else (),
        notes=("One run for each setting: differences of a few hundredths of a nat are within noise.",),
    )


def _claims(found: dict[str, Record]) -> list[Claim]:
    pairs = (
        ("ensemble", "single", "the ensemble beats its best member"),
        ("student", "single", "the student beats the best member"),
    )
    return [
        Claim(
            id=f"best-model.{better}",
            text=text,
            value=f"{found[worse].test_loss - found[better].test_loss:+.4f} nats ({found[worse].test_loss:.4f} to "
            f"{found[better].test_loss:.4f})",
            holds=found[better].test_loss < found[worse].test_loss,
            provisional=("one seed",),
        )
        for better, worse, text in pairs
        if better in found and worse in found
    ]


def _table(study: Study, settings: Settings) -> Table:
    rows = [
        (name, value, study.loss(run)) for name, runs in _tried(study, settings).items() for value, run in runs.items()
    ]
    title = (
        f"Tuned on {settings.proxy}, {settings.proxy_epochs} epochs: lr at wd {settings.wd:g}, wd at lr {settings.lr:g}"
    )
    return Table(title=title, columns=("field", "value", "loss"), rows=tuple(rows))
