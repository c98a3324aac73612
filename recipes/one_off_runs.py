"""What did the runs outside of any recipe give? (`epochal train --like NAME field=value`)

Claim: none; every group of one-off runs is compared, paired by seed, with the run that it was made from.
Command: epochal train --like NAME optimizer.clip=5 --seeds 3 --scale micro
Results: recipes/results/<scale>/report.md
"""

import math

from epochal.report.comparison import ArmLosses, comparison_table
from epochal.report.sections import Section
from epochal.run import Job, Run, without_seed
from epochal.study import Study


def plan(study: Study) -> list[Job]:
    """Return nothing: one-off runs are started by hand."""
    return []


def report(study: Study) -> Section | None:
    """Compare one-off runs with the runs they were made from; None without any."""
    losses: dict[str, dict[int, float]] = {}
    groups: dict[str, dict[str, str]] = {}
    for record in study.records:
        if not isinstance(record.job, Run) or not math.isfinite(record.loss):
            continue
        # Runs of several seeds share this name.
        name = without_seed(record.job.name)
        losses.setdefault(name, {})[record.job.init_seed] = record.test_loss
        # Written by `epochal train --like`.
        if "like" in record.provenance:
            like = without_seed(record.provenance["like"]["name"])
            groups.setdefault(like, {})[record.provenance["like"]["changes"]] = name
    if not groups:
        return None
    tables = [
        comparison_table(
            f"Runs like {like}",
            [
                ArmLosses(label="unchanged", losses=losses.get(like, {})),
                *(ArmLosses(label=changes, losses=losses[name]) for changes, name in made.items()),
            ],
            baseline="unchanged",
            heading="change",
        )
        for like, made in groups.items()
    ]
    return Section(
        title="One-off runs",
        question="What did the runs outside of any recipe give?",
        tables=tuple(tables),
        notes=("Not tuned: each run keeps the learning rate and decay of the run it was made from.",),
    )
