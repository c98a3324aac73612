"""Which parts of SPECTRA and Fira matter, one change at a time?

Claim: SPECTRA's loss hardly depends on its threshold or on the accuracy of its clip (docs/spectra.md section 3); Fira
needs its limiter, one factor a column and enough rank (docs/fira.md section 2).
Command: epochal run ablations --scale micro
Found: recipes/results/<scale>/report.md

Every change is made to the optimizer at its own best point of the recipe `optimizers` in the first setting, and is not
tuned again: differences are paired by seed with the unchanged optimizer.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from epochal.campaign.plan import ready_jobs
from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.report.sections import Section, Table
from epochal.run import Job, Run
from epochal.scale import Ablations, Scale, Setting
from epochal.scaling import seed_interval, unsettled
from recipes import optimizers
from recipes._differences import difference_claim

NOISE = 0.003
"""Nats between 5, 10 and 15 steps in the paper's own table of one seed: less than this is called no difference."""


@dataclass(frozen=True)
class Change:
    """One field of an optimizer set to another value; `of` is the optimizer's name in the comparison."""

    of: str
    field: str
    value: Any

    @property
    def words(self) -> str:
        """Say what is changed, for a table."""
        match self.field, self.value:
            case "clip", _:
                return f"threshold {self.value:g}"
            case "iterations", _:
                return f"{self.value} published steps in bfloat16"
            case "gamma", None:
                return "no limiter"
            case "scaling", "matrix":
                return "one factor for a matrix"
        return f"{self.field} {self.value}"

    @property
    def mark(self) -> str:
        """Name the change inside the name of a Run."""
        return f"{self.field}-{self.value:g}" if isinstance(self.value, float) else f"{self.field}-{self.value}".lower()


def plan(records: Records, scale: Scale) -> list[Job]:
    """Return the jobs still needed whose inputs exist."""
    return ready_jobs(jobs(records, scale), records)


def jobs(records: Records, scale: Scale) -> list[Job]:
    """Every job that can be named today: both optimizers' grids and seeds, then each change with the same seeds."""
    if scale.ablations is None:
        return []
    setting = setting_of(scale)
    names = dict.fromkeys(change.of for change in changes(scale.ablations))
    found: list[Job] = []
    for name in names:
        found += optimizers.entry_jobs(records, scale, setting, optimizers.entry_of(name))
    for change in changes(scale.ablations):
        found += changed_runs(records, scale, change).values()
    return found


def setting_of(scale: Scale) -> Setting:
    """Return the setting in which parts are taken away: the first of the comparison, one pass in the papers."""
    return optimizers.settings(scale)[0]


def changes(ablations: Ablations) -> list[Change]:
    """Return every change of a scale."""
    return [
        *(Change("SPECTRA-AdamW", "clip", clip) for clip in ablations.clips),
        *(Change("SPECTRA-AdamW", "iterations", count) for count in ablations.iterations),
        Change("Fira", "gamma", None),
        Change("Fira", "scaling", "matrix"),
        *(Change("Fira", "rank", rank) for rank in ablations.ranks),
    ]


def changed_runs(records: Records, scale: Scale, change: Change) -> dict[int, Run]:
    """Return the Runs of one change by seed; none before the optimizer's best point is known."""
    setting, entry = setting_of(scale), optimizers.entry_of(change.of)
    best = optimizers.tuned(records, scale, setting, entry)
    if best is None:
        return {}
    found = {}
    for seed in range(optimizers.comparison(scale).seeds):
        run = optimizers.run_at(scale, setting, entry, best, seed)
        fields: dict[str, Any] = {change.field: change.value}
        found[seed] = replace(run, name=f"{run.name}-{change.mark}", optimizer=replace(run.optimizer, **fields))
    return found


def changed_losses(records: Records, scale: Scale, change: Change) -> dict[int, float]:
    """Return the finite losses of one change by seed."""
    found = {seed: records.get(run) for seed, run in changed_runs(records, scale, change).items()}
    return _finite(found)


def plain_losses(records: Records, scale: Scale, name: str) -> dict[int, float]:
    """Return the losses of an optimizer as it is, by seed."""
    return _finite(optimizers.best_records(records, scale, setting_of(scale), optimizers.entry_of(name)))


def _finite(records: Mapping[int, Record | None]) -> dict[int, float]:
    return {seed: r.loss for seed, r in records.items() if r is not None and math.isfinite(r.loss)}


def report(records: Records, scale: Scale) -> Section:
    """Show what every change does to the loss."""
    title, question = "Ablations", "Which parts of SPECTRA and Fira matter?"
    if scale.ablations is None:
        return Section(title=title, question=question, notes=("This scale has no table [ablations].",))
    found = {change: changed_losses(records, scale, change) for change in changes(scale.ablations)}
    names = dict.fromkeys(change.of for change in found)
    made = (
        _threshold_claim(records, scale, found),
        _steps_claim(records, scale, found),
        *_fira_claims(records, scale, found),
    )
    return Section(
        title=title,
        question=question,
        claims=tuple(claim for claim in made if claim is not None),
        tables=tuple(_table(records, scale, name, found) for name in names),
        notes=(
            "One change at a time at the optimizer's own best learning rate, which is not searched again; positive "
            "differences are losses above the unchanged optimizer, paired by seed.",
        ),
    )


Losses = dict[Change, dict[int, float]]


def differences(changed: Mapping[int, float], plain: Mapping[int, float]) -> list[float]:
    """Return what a change adds to the loss, for each seed that has both, in nats."""
    return [loss - plain[seed] for seed, loss in changed.items() if seed in plain]


def _threshold_claim(records: Records, scale: Scale, found: Losses) -> Claim | None:
    """Losses between half and five times the threshold against the one at a tenth."""
    middle = optimizers.comparison(scale).clip
    by_clip = {change.value: losses for change, losses in found.items() if change.field == "clip"}
    by_clip[middle] = plain_losses(records, scale, "SPECTRA-AdamW")
    means = {clip: statistics.fmean(losses.values()) for clip, losses in sorted(by_clip.items()) if losses}
    flat = {clip: loss for clip, loss in means.items() if clip >= middle / 2}
    low = min(means, default=middle)
    if len(means) < len(by_clip) or len(flat) < 2 or low >= middle / 2:
        return None
    spread, worse = max(flat.values()) - min(flat.values()), means[low] - min(flat.values())
    seeds = min(len(losses) for losses in by_clip.values())
    return Claim(
        text=f"SPECTRA-AdamW: thresholds from {min(flat):g} to {max(flat):g} differ by less than half of what {low:g} loses",
        value=f"{spread:.4f} against {worse:+.4f} nats",
        seeds=seeds,
        holds=spread < worse / 2,
        paper="2.936 to 2.940 for c = 5 to 50, 2.975 for c = 1 at 160M, spectra section 3",
        provisional=_few(scale, seeds),
    )


def _few(scale: Scale, seeds: int) -> tuple[str, ...]:
    wanted = optimizers.comparison(scale).seeds
    return (f"{seeds} of {wanted} seeds",) if seeds < wanted else ()


def _steps_claim(records: Records, scale: Scale, found: Losses) -> Claim | None:
    """The published steps in bfloat16 against a clip accurate to 1%."""
    plain = plain_losses(records, scale, "SPECTRA-AdamW")
    changed = {
        change.value: differences(losses, plain) for change, losses in found.items() if change.field == "iterations"
    }
    if not changed or not all(changed.values()):
        return None
    means = {count: statistics.fmean(values) for count, values in changed.items()}
    worst = max(changed, key=lambda count: abs(means[count]))
    return Claim(
        text="SPECTRA-AdamW: fewer and rougher steps of the clip do not change the loss by more than "
        f"{NOISE} nats or seeds do",
        value=", ".join(f"{count} steps {mean:+.4f}" for count, mean in means.items()) + " nats",
        interval=seed_interval(changed[worst]),
        seeds=len(changed[worst]),
        holds=all(abs(means[count]) <= NOISE or bool(unsettled(values)) for count, values in changed.items()),
        paper="2.939, 2.936, 2.937 for 5, 10 and 15 steps at 160M, spectra section 3",
        provisional=_few(scale, min(len(values) for values in changed.values())),
    )


def _fira_claims(records: Records, scale: Scale, found: Losses) -> list[Claim]:
    plain = plain_losses(records, scale, "Fira")
    papers = {
        ("gamma", None): "0.037 nats at 60M (perplexity 31.06 to 32.22), fira section 2",
        ("scaling", "matrix"): "0.015 nats at 60M (perplexity 31.06 to 31.52), fira section 2",
    }
    claims = []
    for change, losses in found.items():
        values = differences(losses, plain)
        if (change.field, change.value) not in papers or not values:
            continue
        claims.append(
            difference_claim(
                f"Fira: {change.words} raises the loss",
                values,
                paper=papers[change.field, change.value],
                reasons=_few(scale, len(values)),
            )
        )
    by_rank = {change.value: list(losses.values()) for change, losses in found.items() if change.field == "rank"}
    if len(by_rank) > 1 and all(by_rank.values()):
        means = [statistics.fmean(losses) for _, losses in sorted(by_rank.items())]
        falls = all(later < earlier for earlier, later in pairwise(means))
        seeds = min(len(losses) for losses in by_rank.values())
        claims.append(
            Claim(
                text=f"Fira: a higher rank lowers the loss (ranks {', '.join(map(str, sorted(by_rank)))})",
                value=(" > " if falls else ", ").join(f"{loss:.4f}" for loss in means),
                seeds=seeds,
                provisional=_few(scale, seeds),
                holds=falls,
                paper="perplexity about 35, 32, 31, 31 for ranks 4, 16, 64, 128 at 60M, read off a plot, fira section 2",
            )
        )
    return claims


def _table(records: Records, scale: Scale, name: str, found: Losses) -> Table:
    plain = plain_losses(records, scale, name)
    rows: list[tuple[Any, ...]] = [("as it is", _mean(plain.values()), None, None, None, len(plain))]
    for change, losses in found.items():
        if change.of == name:
            values = differences(losses, plain)
            low, high = seed_interval(values) or (None, None)
            rows.append((change.words, _mean(losses.values()), _mean(values), low, high, len(losses)))
    return Table(
        title=f"{name}, {optimizers.words(setting_of(scale))}",
        columns=("change", "loss", "difference (nats)", "low", "high", "seeds"),
        rows=tuple(rows),
    )


def _mean(values: Any) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None
