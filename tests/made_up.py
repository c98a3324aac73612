"""Campaigns without training: losses from a formula, records in memory, and a loop that runs a campaign to its end."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epochal.campaign.plan import campaign_jobs, load_recipe, partition_jobs
from epochal.records import Record, Records, Workspace, write_record
from epochal.report.claims import Claim
from epochal.report.sections import Section
from epochal.run import Ensemble, Job, Run, Samples, Targets, fingerprint
from epochal.scale import Scale
from epochal.study import Study

NOWHERE = Workspace("made-up", Path("no-results"), Path("no-work"))
CHAIN = ("epoching", "heavy_weight_decay", "ensembling", "distillation")
LossOf = Callable[[Run], float]


def size_of(model: str) -> int:
    """Return made-up parameters of wN: quadratic in the width."""
    return 75 * int(model[1:]) ** 2


def made_up_loss(run: Run) -> float:
    """Loss in nats that falls with size at the right decay and rises past it: a bowl around tau = 0.35 epochs."""
    size = size_of(run.model)
    window = math.log(run.tau / 0.35) if math.isfinite(run.tau) else 4.0
    epochs = math.log2(run.epochs / 16)
    gain = (0.3 if run.distill else 0.0) - 20 * run.unique_tokens**-0.4  # more text is better
    return 4.0 + 30 * size**-0.4 + 0.02 * window**2 * size**0.1 + 0.03 * epochs**2 - gain + 0.001 * run.init_seed


class MadeUpRecords(Records):
    """Records in memory, with all outputs on disk."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        super().__init__(NOWHERE, records)

    def get(self, job: Job) -> Record | None:
        """Compare whole jobs, which costs less than fingerprints."""
        record = self.named(job.name)
        assert record is None or record.job == job, f"{job.name} names two different jobs"
        return record

    def has_output(self, job: Job) -> bool:
        return True

    def having(self, records: Iterable[Record]) -> "MadeUpRecords":
        """Return these records and others, which replace those of the same name."""
        return MadeUpRecords([*self, *records])

    def with_losses(self, loss_of: LossOf) -> "MadeUpRecords":
        """Return the same runs with other losses."""
        runs = [record for record in self if isinstance(record.job, Run)]
        return self.having(replace(r, results=r.results | both_losses(loss_of(r.job))) for r in runs)  # type: ignore[arg-type]


TEST_ABOVE = 0.01  # nats; how far made-up test losses are above those of validation text


def both_losses(loss: float) -> dict[str, float]:
    """Return the results of a made-up loss on validation text."""
    return {"loss": loss, "test_loss": loss + TEST_ABOVE}


def made_up_record(job: Job, records: Records, loss_of: LossOf = made_up_loss) -> Record:
    match job:
        case Run():
            results = both_losses(loss_of(job)) | {"parameters": size_of(job.model), "steps": job.steps}
        case Samples():
            results = {"tokens": job.tokens, "texts": 5, "members": 1}
        case Targets():
            results = {"positions": job.unique_tokens, "kept_mass": 0.7, "bytes": 9, "members": 1}
        case Ensemble():
            results = _ensemble_results(job, [records.named(name) for name in job.runs])
    return Record(job, fingerprint(job), "done", results)


def _ensemble_results(job: Ensemble, members: list[Any]) -> dict[str, Any]:
    """An excess that falls like 1 / K, with some scatter that depends on the average."""
    mean, count = sum(member.loss for member in members) / len(members), len(members)
    curve = {
        str(k): [mean - 0.3 * (1 - 1 / k) + 0.003 * math.sin(7 * k + len(job.average))] * (1 if k == count else count)
        for k in range(1, count + 1)
    }
    parameters = sum(member.results["parameters"] for member in members)
    results = both_losses(curve[str(count)][0]) | {"curve": curve, "members": count, "parameters": parameters}
    results["test_curve"] = {k: [loss + TEST_ABOVE for loss in losses] for k, losses in curve.items()}
    if members[0].job.holdout_tokens and job.member_weights is None and count == 3:
        results["holdout"] = {"weights": [0.5, 0.3, 0.2], "selected": [0, 2]}
    return results


def diverged(job: Job) -> Record:
    return Record(job, fingerprint(job), "diverged", {"loss": None, "parameters": 9})


@dataclass(frozen=True)
class MadeUpCampaign:
    """A campaign of made-up losses that ran to its end: what each round ran, and all records."""

    scale: Scale
    rounds: tuple[tuple[Job, ...], ...]
    records: MadeUpRecords

    @property
    def study(self) -> Study:
        return Study(self.records, self.scale)

    def after(self, rounds: int) -> MadeUpRecords:
        """Return the records of the first rounds."""
        names = {job.name for jobs in self.rounds[:rounds] for job in jobs}
        return MadeUpRecords(record for record in self.records if record.job.name in names)

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.rounds for job in jobs]

    @property
    def runs(self) -> list[Run]:
        return [job for job in self.jobs if isinstance(job, Run)]

    @property
    def ensembles(self) -> list[Ensemble]:
        return [job for job in self.jobs if isinstance(job, Ensemble)]

    def report(self, recipe: str, records: Records | None = None) -> Section:
        section: Section = load_recipe(recipe).report(Study(self.records if records is None else records, self.scale))
        return section

    def claims(self, recipe: str, records: Records | None = None) -> dict[str, Claim]:
        """Return the claims of one recipe by id."""
        return {claim.id: claim for claim in self.report(recipe, records).claims}

    def write(self, workspace: Workspace) -> None:
        for record in self.records:
            write_record(workspace, record)


def draw(section: Section) -> set[str]:
    """Draw all figures of a section on axes without a file; return their names."""
    from matplotlib.figure import Figure

    for figure in section.figures:
        figure.draw(Figure().subplots())
    return {figure.name for figure in section.figures}


RecordOf = Callable[[Job, Records], Record]


def simulate(
    scale: Scale, *recipes: str, record_of: RecordOf = made_up_record, some: random.Random | None = None
) -> MadeUpCampaign:
    """Run the recipes to their end: in each round every planned job whose inputs have records, or `some` of these."""
    records, rounds = MadeUpRecords(), list[tuple[Job, ...]]()
    for _ in range(200):
        # Refuses a plan in which a job reads another that nobody plans.
        status = partition_jobs(campaign_jobs(recipes, records, scale), records)
        ready = status.ready
        if not ready:
            causes = {name for lacking in status.waiting.values() for name in lacking} - status.waiting.keys()
            assert all(map(records.diverged, causes)), f"nothing is ready, and {status.waiting} wait"
            return MadeUpCampaign(scale, tuple(rounds), records)
        if some is not None:
            ready = tuple(some.sample(ready, some.randint(1, len(ready))))
        records = records.having([record_of(job, records) for job in ready])
        rounds.append(ready)
    raise AssertionError("the campaign does not end")


def with_table(scale: Scale, recipe: str, **settings: Any) -> Scale:
    """Return a scale with further settings in the table of one recipe."""
    return replace(scale, tables={**scale.tables, recipe: {**scale.tables.get(recipe, {}), **settings}})
