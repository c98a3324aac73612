"""The recipe `downstream`: which models answer, rank correlations against scipy's, and gains counted by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up import MadeUpCampaign, draw, made_up_record, with_table
from scipy.stats import spearmanr

from epochal.records import Record
from epochal.report.sections import Section
from epochal.run import Ensemble
from epochal.study import Study
from recipes import distillation, downstream, ensembling, epoching, heavy_weight_decay

TASKS = ("one", "two")
QUESTIONS = {"one": 400, "two": 100}
TOKENS = 24576
Shares = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def unanswered(chain: MadeUpCampaign) -> Study:
    """A whole campaign in which no model has answered yet."""
    return Study(chain.records, with_table(chain.scale, "downstream", tasks=list(TASKS)))


def answer(study: Study, shares: Shares) -> Study:
    """Let every model answer the first questions of each task right, as many as its share says."""

    def answered(record: Record) -> Record:
        right = {task: "1" * round(share * QUESTIONS[task]) for task, share in shares[record.job.name].items()}
        tables = {task: {"right": ones.ljust(QUESTIONS[task], "0")} for task, ones in right.items()}
        return replace(record, results={**record.results, "tasks": tables})

    jobs = [entry.job for entry in downstream.entries(study)]
    answers = [answered(made_up_record(job, study.records)) for job in jobs]
    return Study(study.records.having(answers), study.scale)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def shares(unanswered: Study) -> Shares:
    rng = np.random.default_rng(3)
    names = [entry.job.name for entry in downstream.entries(unanswered)]
    return {name: {task: float(rng.uniform(0.2, 0.9)) for task in TASKS} for name in names}


@pytest.fixture(scope="module")
def answered(unanswered: Study, shares: Shares) -> Study:
    return answer(unanswered, shares)


@pytest.fixture(scope="module")
def section(answered: Study) -> Section:
    return downstream.report(answered)


def test_every_size_every_number_of_members_and_all_students_answer_once(unanswered: Study) -> None:
    study, records = unanswered, unanswered.records
    missing = [job for job in downstream.plan(study) if records.get(job) is None]
    jobs = [job for job in missing if isinstance(job, Ensemble)]
    assert len(jobs) == len(missing)
    assert all(job.tasks == TASKS and job.average == "logits" for job in jobs)
    groups = [job.runs for job in jobs]
    assert len(set(groups)) == len(groups) == len({job.name for job in jobs})
    for model in study.scale.models:
        best = heavy_weight_decay.best(study, model, TOKENS).runs
        standard = study.best(epoching.standard(study), model, TOKENS).runs
        assert len(best) == study.scale.seeds and all((run.name,) in groups for run in (*best, standard[0]))
    for model in ensembling.settings(study).models:
        names = [run.name for run in ensembling.members(study, model, TOKENS)]
        assert all(tuple(names[:k]) in groups for k in range(1, len(names) + 1))
    for teacher in distillation.TEACHERS:
        students = distillation.students(study, teacher).values()
        assert len(students) == study.scale.seeds and all((run.name,) in groups for run in students)


def test_without_tasks_nothing_is_planned(chain: MadeUpCampaign) -> None:
    assert downstream.plan(chain.study) == []
    (note,) = downstream.report(chain.study).notes
    assert "no table [downstream]" in note


def test_a_report_before_any_answer(unanswered: Study) -> None:
    assert downstream.report(unanswered).notes == ("0 models have answered so far.",)


def test_rank_correlations_are_those_of_scipy(answered: Study, section: Section) -> None:
    found = downstream.answered(answered)
    assert len(found) == len(downstream.entries(answered))
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
    assert draw(section) == {"accuracy-against-loss"}


def test_gains_are_counted_over_the_questions(answered: Study, section: Section, shares: Shares) -> None:
    claims = {claim.id: claim for claim in section.claims}
    assert set(claims) == {
        f"downstream.{what}" for what in ("order.all", "order.single", "tuned", "gain.members", "gain.student")
    }
    found = downstream.answered(answered)
    # The paper's baseline is the standard model with the most right answers, not the one with the lowest loss.
    base = max((one for one in found if one.entry.kind == "standard"), key=lambda one: one.accuracy)
    best = next(one for one in found if one.entry.kind == "members")
    counted = [
        100 * sum(round(shares[one.entry.job.name][task] * QUESTIONS[task]) / QUESTIONS[task] for task in TASKS) / 2
        for one in (base, best)
    ]
    gain = claims["downstream.gain.members"]
    assert gain.value == f"{counted[1] - counted[0]:+.2f} points ({counted[0]:.2f} to {counted[1]:.2f}%)"
    assert gain.interval is not None and gain.holds == (gain.interval[0] > 0)
    assert gain.interval[0] < counted[1] - counted[0] < gain.interval[1]
    mean = {task: found[0].right[task].mean() for task in TASKS}
    variance = sum(mean[task] * (1 - mean[task]) / QUESTIONS[task] for task in TASKS) / 4
    assert found[0].error == pytest.approx(math.sqrt(variance))


def test_an_interval_is_paired_over_the_same_questions(unanswered: Study) -> None:
    """Models that differ in 4 of 400 questions differ by one point with an error of half a point, not of 3.5."""
    jobs = [entry.job for entry in downstream.entries(unanswered)]
    ranked = sorted(jobs, key=lambda job: made_up_record(job, unanswered.records).loss, reverse=True)
    by_rank = {job.name: {"one": 0.2 + 0.01 * rank, "two": 0.5} for rank, job in enumerate(ranked)}
    study = answer(unanswered, by_rank)
    found = downstream.answered(study)
    draws = downstream.resampled(found)["one"]
    assert draws.shape == (downstream.RESAMPLES + 1, len(found))
    differences = draws[1:, 0] - draws[1:, 1]
    assert differences.mean() == pytest.approx(0.01, abs=5e-4)
    assert differences.std() == pytest.approx(math.sqrt(0.01 * 0.99 / 400), rel=0.1)
    order = next(claim for claim in downstream.report(study).claims if claim.id == "downstream.order.all")
    assert order.value == "rank correlation 1.00" and order.interval is not None and order.interval[0] > 0.99
    assert order.holds


def test_equal_answers_have_no_order(unanswered: Study) -> None:
    names = [entry.job.name for entry in downstream.entries(unanswered)]
    section = downstream.report(answer(unanswered, {name: {"one": 0.5, "two": 0.5} for name in names}))
    assert all(row[3] is None for row in section.tables[0].rows)
    assert not any(claim.id.startswith("downstream.order") for claim in section.claims)
