"""Searches over the Runs of a scale: objectives, starts, further fields, early stopping, what plan says; on made-up records."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import NOWHERE, MadeUpRecords, made_up_record, simulate, with_table

from epochal.campaign.plan import cost_estimate, few_documents, search_states
from epochal.cli import _hours, _search_lines
from epochal.records import Record, Records, Workspace
from epochal.run import Job, Run, fingerprint
from epochal.scale import Point, Rung, Scale, load_scale
from epochal.search.searches import early_stops, seed_noise
from epochal.study import Arm, Study
from recipes import ensembling, heavy_weight_decay
from recipes.heavy_weight_decay import TUNED

TOKENS = 24576


@pytest.fixture
def scale() -> Scale:
    """The demo's scale without further budgets."""
    return with_table(load_scale("demo"), "epoching", data_scaling_tokens=[], data_scaling_models=[])


def record_of(job: Job, **results: object) -> Record:
    return Record(job, fingerprint(job), "done", {"parameters": 9, **results})


def test_a_search_without_start_says_that_it_waits(scale: Scale) -> None:
    scale = replace(scale, ladder=(scale.ladder[0], Rung(model="w32"), scale.ladder[2]))
    states = {state.what: state for state in search_states(["heavy_weight_decay"], MadeUpRecords(), scale)}
    for what in ("w32 tuned, D = 24,576", "w32 at wd 0.1, D = 24,576"):
        assert states[what].state == "waits for the search it starts from"


def test_a_plan_names_budgets_of_few_documents(scale: Scale, tmp_path: Path) -> None:
    """Chapters of 1,200 tokens: 6,144 tokens hold six of them, 24,576 hold 21."""
    store = tmp_path / "data" / "kjv"
    store.mkdir(parents=True)
    np.save(store / "train.lengths.npy", np.full(40, 1200))
    point = Point(lr=0.01, epochs=2, wd=0.1)
    runs = [scale.run("w16", tokens, point) for tokens in (6144, TOKENS)]
    workspace = Workspace("demo", tmp_path, tmp_path)
    (line,) = few_documents(runs, workspace)
    assert line.startswith("kjv: the first 6,144 tokens hold 6 documents, so orders of documents hardly differ")
    assert few_documents([replace(run, data_order="sequences") for run in runs], workspace) == []
    assert few_documents(runs, NOWHERE) == [], "without a store nothing is known"


# --- the limit of members as objective -----------------------------------------------------------------------------------


def member_record(job: Job, records: Records) -> Record:
    """Excess A / K over a limit that is lowest at twice the epochs of the best single model and half its decay."""
    record = made_up_record(job, records)
    if "curve" not in record.results:
        return record
    run = records.named(job.runs[0]).job  # type: ignore[union-attr]
    assert isinstance(run, Run)
    limit = 4.0 + 0.05 * (math.log2(run.epochs / 32) ** 2 + math.log2(run.optimizer.wd / 1.6) ** 2)
    curve = {k: [limit + 0.3 / int(k)] for k in record.results["curve"]}
    return replace(record, results=record.results | {"curve": curve, "test_curve": curve})


def test_members_are_tuned_for_their_limit(scale: Scale) -> None:
    scale = with_table(scale, "ensembling", search_members=2)
    campaign = simulate(scale, "ensembling", record_of=member_record)
    study = campaign.study
    search = ensembling.member_search(study, "w64", TOKENS)
    best = search.descent.best
    assert search.descent.certified and best == Point(lr=0.01, epochs=32, wd=1.6)
    assert search.loss_of(best) == pytest.approx(4.0)
    *runs, ensemble = search.jobs_of(best)
    assert [run.init_seed for run in runs] == [0, 1] and ensemble.runs == tuple(run.name for run in runs)  # type: ignore[union-attr]
    members = ensembling.members(study, "w64", TOKENS)
    assert [(run.epochs, run.optimizer.wd) for run in members] == [(32, 1.6)] * scale.tables["ensembling"]["count"]
    assert all(study.records.get(run) for run in members)
    assert any(
        s.what.startswith("w64 members") for s in cost_estimate(["ensembling"], campaign.records, scale).searches
    )


def test_tuned_members_are_judged_together_and_alone_against_the_best_single_setting(scale: Scale) -> None:
    scale = with_table(replace(scale, seeds=3), "ensembling", search_members=2)
    campaign = simulate(scale, "ensembling", record_of=member_record)
    claims, single = campaign.claims("ensembling"), campaign.study.best(TUNED, "w64", TOKENS)
    (together,), (alone,) = (claims[f"ensembling.tuned-{which}"].cases for which in ("together", "alone"))
    assert single.point is not None
    limit = 0.05 * (math.log2(single.point.epochs / 32) ** 2 + math.log2(single.point.wd / 1.6) ** 2)
    assert together.value == pytest.approx(limit) and limit > 0
    members = [campaign.study.test_loss(run) for run in ensembling.members(campaign.study, "w64", TOKENS)]
    assert alone.value == pytest.approx(statistics.fmean(filter(None, members)) - single.mean)


def test_a_point_with_a_diverged_member_is_no_optimum(scale: Scale) -> None:
    single = simulate(scale, "heavy_weight_decay").records
    scale = with_table(scale, "ensembling", search_members=2)
    search = ensembling.member_search(Study(single, scale), "w64", TOKENS)
    start = search.descent.wanted[0]
    second = search.jobs_of(start)[1]
    assert search.loss_of(start) is None
    diverged = single.having([Record(second, fingerprint(second), "diverged", {"loss": None})])
    assert ensembling.member_search(Study(diverged, scale), "w64", TOKENS).loss_of(start) == math.inf


# --- noise and early stopping --------------------------------------------------------------------------------------------


def test_noise_of_a_size_or_of_all_when_it_has_few_seeds(scale: Scale) -> None:
    def runs(model: str, losses: list[float]) -> list[Record]:
        point = Point(lr=0.01, epochs=16, wd=1.6)
        jobs = [scale.run(model, 24576, point, seed=seed) for seed in range(len(losses))]
        return [record_of(job, loss=loss) for job, loss in zip(jobs, losses, strict=True)]

    records = Records(NOWHERE, [*runs("w16", [1.0, 1.2]), *runs("w64", [4.0, 4.1, 4.2, 4.3, 4.4])])
    w64, w16 = seed_noise(records, "w64", 24576), seed_noise(records, "w16", 24576)
    assert w64 is not None and w16 is not None
    assert (w64.freedom, w16.freedom) == (4, 5)
    assert w64.sd == pytest.approx(math.sqrt(0.1 / 4))
    assert w16.sd == pytest.approx(math.sqrt(0.12 / 5))


def test_early_stopping_is_judged_on_the_curves(scale: Scale) -> None:
    """The best in the end is the worst half-way, as under heavy decay; a quarter before the end it leads."""
    start = Point(lr=0.01, epochs=16, wd=1.6)
    finals = {0.8: 4.2, 1.6: 4.0, 3.2: 4.1}
    half = {0.8: 4.4, 1.6: 4.9, 3.2: 4.8}
    known = []
    for wd, final in finals.items():
        job = scale.run("w64", 24576, start.at("wd", wd))
        shares = {0.25: 6.0 - final / 10, 0.5: half[wd], 0.75: final + 0.2, 1.0: final}
        known.append(record_of(job, loss=final, curve=[[round(job.steps * at), loss] for at, loss in shares.items()]))
    rung, grid = Rung(model="w64", lr=0.01, epochs=16, wd=1.6), replace(scale.grid, wd=tuple(finals))
    records, scale = MadeUpRecords(known), replace(scale, ladder=(rung,), grid=grid, standard_wd=0.8)
    search = Study(records, scale).search(Arm("tuned", tune=("wd",)), "w64", TOKENS)
    assert search.descent.certified
    stops = {stop.share: stop for stop in early_stops(records, [search])}
    assert (stops[0.5].stars, stops[0.5].same) == (1, 0)
    assert stops[0.5].worst == pytest.approx(0.2)
    assert (stops[0.75].same, stops[0.75].worst) == (1, 0.0)
    assert early_stops(MadeUpRecords(), [search]) == []


def test_plan_says_what_the_next_round_costs_and_can_gain(scale: Scale) -> None:
    start = scale.start(scale.rung("w64"), TOKENS)
    assert start is not None
    left_out = scale.run("w64", TOKENS, start.at("wd", 6.4)).name
    jobs = heavy_weight_decay.plan(Study(MadeUpRecords(), scale))
    records = MadeUpRecords(made_up_record(job, MadeUpRecords()) for job in jobs if job.name != left_out)
    states = {state.what: state for state in search_states(["heavy_weight_decay"], records, scale)}
    state = states["w64 tuned, D = 24,576"]
    assert state.begun and not state.certified
    assert state.next_round.jobs == 1 and state.next_round.flops > 0
    assert state.gain is not None and state.gain > 0
    assert "wd 6.4" in state.state
    lines = "\n".join(_search_lines(tuple(states.values()), scale.hardware, all_searches=True))
    assert f"next 1 job, {_hours(state.next_round, scale.hardware)}, gain at most {state.gain:.4f} nats" in lines


def test_plan_says_what_a_finer_grid_could_gain(scale: Scale) -> None:
    campaign = simulate(scale, "heavy_weight_decay")
    states = search_states(["heavy_weight_decay"], campaign.records, scale)
    lines = "\n".join(_search_lines(states, scale.hardware, all_searches=True))
    finer = [search.finer for search in heavy_weight_decay.searches(campaign.study)]
    assert finer and None not in finer
    assert all(f"a finer grid could gain {gain:.4f} nats" in lines for gain in finer)


def test_records_of_another_search_mode_are_used(scale: Scale) -> None:
    campaign = simulate(scale, "heavy_weight_decay")
    sequential = Study(campaign.records, replace(scale, search_mode="sequential"))
    before, after = (study.tuned(TUNED, "w16", TOKENS) for study in (campaign.study, sequential))
    assert before.certified and after.certified
    assert after.best == before.best
