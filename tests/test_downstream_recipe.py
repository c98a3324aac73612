"""The recipe `downstream`: what it asks whom, and rank correlations against scipy's and gains counted by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from test_recipes import made_up_record, simulate

from epochal.campaign.plan import load_recipe, ready_jobs, recipe_names
from epochal.records import Record, Records, Workspace, load_records
from epochal.report.write import write_report
from epochal.run import Ensemble
from epochal.scale import Scale, load_scale
from recipes import distillation, downstream, ensembling, heavy_weight_decay

TASKS = ("one", "two")
QUESTIONS = {"one": 400, "two": 100}


def asked(seeds: int = 2) -> Scale:
    return replace(load_scale("demo"), seeds=seeds, tasks=TASKS)


def with_answers(record: Record, shares: dict[str, float]) -> Record:
    """Answer the first questions of each task right: so many as its share says."""
    right = {task: "1" * round(share * QUESTIONS[task]) for task, share in shares.items()}
    tables = {task: {"right": ones.ljust(QUESTIONS[task], "0")} for task, ones in right.items()}
    return replace(record, results={**record.results, "tasks": tables})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Records, Scale]:
    """A whole campaign with made-up losses, in which nobody has answered yet."""
    folder = tmp_path_factory.mktemp("finished")
    space = Workspace("demo", folder / "results", folder / "work")
    for _ in simulate(space, "distillation", asked()):
        pass
    return load_records(space), asked()


def answer(records: Records, scale: Scale, shares: dict[str, dict[str, float]]) -> Records:
    jobs = [entry.job for entry in downstream.entries(records, scale)]
    answers = [with_answers(made_up_record(job, records), shares[job.name]) for job in jobs]
    return Records(records.workspace, [*records, *answers])


def test_every_size_every_k_and_both_students_are_asked_once(finished: tuple[Records, Scale]) -> None:
    records, scale = finished
    jobs = ready_jobs(downstream.jobs(records, scale), records)
    assert all(isinstance(job, Ensemble) and job.tasks == TASKS and job.average == "logits" for job in jobs)
    groups = [job.runs for job in jobs if isinstance(job, Ensemble)]
    assert len(set(groups)) == len(groups) == len({job.name for job in jobs})
    tokens = scale.unique_tokens[0]
    for rung in scale.ladder:
        best = heavy_weight_decay.best_records(records, scale, rung.model, tokens)
        assert len(best) == 2 and all((record.job.name,) in groups for record in best)
    members = [run.name for run in ensembling.members(records, scale, "w64", tokens)]
    assert [tuple(members[:k]) for k in (1, 2, 3, 4)] == [group for group in groups if group[0] == members[0]]
    students = [distillation.student_records(records, scale, teacher) for teacher in distillation.TEACHERS]
    assert all(len(seeds) == 2 and all((seed.job.name,) in groups for seed in seeds) for seeds in students)
    assert {rung.model: 1 for rung in scale.ladder} == {
        entry.what: 1 for entry in downstream.entries(records, scale) if entry.kind == "standard"
    }
    assert downstream.jobs(records, replace(scale, tasks=())) == []
    assert "downstream" in recipe_names()


def test_the_order_is_that_of_scipy_and_gains_are_counted(finished: tuple[Records, Scale], tmp_path: Path) -> None:
    records, scale = finished
    rng = np.random.default_rng(3)
    entries = downstream.entries(records, scale)
    shares = {entry.job.name: {task: float(rng.uniform(0.2, 0.9)) for task in TASKS} for entry in entries}
    records = answer(records, scale, shares)
    found = downstream.answered(records, scale)
    assert len(found) == len(entries)
    section = load_recipe("downstream").report(records, scale)
    rows = {(row[0], row[2]): row for row in section.tables[0].rows}
    kinds = {"all": list(downstream.KINDS), "standard decay": ["standard"], "members together": ["members"]}
    for what, members in kinds.items():
        group = [one for one in found if one.entry.kind in members]
        if len(group) < downstream.FEWEST:
            assert (what, "one") not in rows
            continue
        for task in (*TASKS, "mean"):
            accuracy = [one.accuracy if task == "mean" else one.right[task].mean() for one in group]
            expected = spearmanr([-one.record.loss for one in group], accuracy).statistic
            assert rows[what, task][1] == len(group) and rows[what, task][3] == pytest.approx(expected)
    claims = {claim.text.split(": ", 1)[1]: claim for claim in section.claims}
    assert len(claims) == 4
    base = next(one for one in found if one.entry.kind == "standard")
    best = next(one for one in found if one.entry.kind == "members")
    (gain,) = [claim for text, claim in claims.items() if text.startswith("the ensemble with the lowest loss")]
    counted = [
        100 * sum(round(shares[one.entry.job.name][task] * QUESTIONS[task]) / QUESTIONS[task] for task in TASKS) / 2
        for one in (base, best)
    ]
    assert gain.value == f"{counted[1] - counted[0]:+.2f} points ({counted[0]:.2f} to {counted[1]:.2f}%)"
    assert gain.interval is not None and gain.holds == (gain.interval[0] > 0)
    assert gain.interval[0] < counted[1] - counted[0] < gain.interval[1]
    one = found[0]
    mean = {task: one.right[task].mean() for task in TASKS}
    variance = sum(mean[task] * (1 - mean[task]) / QUESTIONS[task] for task in TASKS) / 4
    assert one.error == pytest.approx(math.sqrt(variance))
    write_report([section], tmp_path / "report", title="made up")
    assert (tmp_path / "report" / "figures" / "accuracy-against-loss.svg").is_file()


def test_an_interval_is_paired_over_the_same_questions(finished: tuple[Records, Scale]) -> None:
    """Models that differ in 4 of 400 questions differ by one point with an error of half a point, not of 3.5."""
    records, scale = finished
    ranked = sorted(
        downstream.entries(records, scale), key=lambda entry: made_up_record(entry.job, records).loss, reverse=True
    )
    shares = {entry.job.name: {"one": 0.2 + 0.01 * rank, "two": 0.5} for rank, entry in enumerate(ranked)}
    records = answer(records, scale, shares)
    found = downstream.answered(records, scale)
    draws = downstream.resampled(found)["one"]
    assert draws.shape == (downstream.RESAMPLES + 1, len(found))
    differences = draws[1:, 0] - draws[1:, 1]
    assert differences.mean() == pytest.approx(0.01, abs=5e-4)
    assert differences.std() == pytest.approx(math.sqrt(0.01 * 0.99 / 400), rel=0.1)
    section = load_recipe("downstream").report(records, scale)
    order = section.claims[0]
    assert order.value == "rank correlation 1.00" and order.interval is not None and order.interval[0] > 0.99
    assert order.holds
    flat = answer(records, scale, {name: {"one": 0.5, "two": 0.5} for name in shares})
    section = load_recipe("downstream").report(flat, scale)
    assert all(row[3] is None for row in section.tables[0].rows)
    assert not any("order of the loss" in claim.text for claim in section.claims)


def test_a_report_before_anybody_answered(finished: tuple[Records, Scale]) -> None:
    records, scale = finished
    assert load_recipe("downstream").report(records, scale).notes == ("0 models have answered so far.",)
    (note,) = load_recipe("downstream").report(records, replace(scale, tasks=())).notes
    assert "names no tasks" in note
