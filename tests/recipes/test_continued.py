"""Continued pre-training: everything starts from the tuned base and is judged on both texts."""

from dataclasses import replace

import pytest
from made_up import MadeUpCampaign, MadeUpRecords, made_up_loss, made_up_record, simulate, with_table

from epochal.campaign.plan import cost_estimate
from epochal.run import AVERAGES, SOUP, Run
from epochal.scale import load_scale
from epochal.study import Study
from recipes import continued, heavy_weight_decay


def test_nothing_continues_before_the_base_is_tuned(continued_campaign: MadeUpCampaign) -> None:
    unknown = Study(MadeUpRecords(), continued_campaign.scale)
    assert continued.continuation(unknown) is None
    assert not [job for job in continued.plan(unknown) if isinstance(job, Run) and job.init_from]
    assert continued.report(unknown).notes == ("Waits for the tuned base.",)


def test_continued_runs_start_from_the_tuned_base(continued_campaign: MadeUpCampaign) -> None:
    study = continued_campaign.study
    settings = study.settings(continued.Settings)
    assert settings is not None
    here = continued.continuation(study)
    assert here is not None
    later = [run for run in continued_campaign.runs if run.data == settings.data]
    large, small = settings.batch_sizes
    assert {run.init_from for run in later} == {heavy_weight_decay.best(study, settings.model, 24576).runs[0].name}
    assert {(run.batch_size, run.epochs) for run in later} == {(large, 1), (small, 1), (small, settings.epochs)}
    single_passes = {run.unique_tokens for run in later if run.batch_size == large}
    assert single_passes == {settings.unique_tokens, *settings.more_tokens}
    assert len({run.order_seed for run in later if run.epochs == settings.epochs}) == settings.members
    assert {run.data_order for run in later} == {"sequences"}, "few long documents have few orders"
    for step in continued.STEPS:
        tried = [study.loss(run) for run in here.tries(step)]
        assert len(tried) == len(settings.lr) and study.loss(here.steps()[step][0]) == min(tried)  # type: ignore[type-var]


def test_ensembles_are_judged_on_both_texts(continued_campaign: MadeUpCampaign) -> None:
    judged = [job for job in continued_campaign.ensembles if job.data is not None]
    assert {job.data for job in judged} == {continued_campaign.scale.data}
    assert {job.average for job in judged if len(job.runs) > 1} == {*AVERAGES, SOUP}
    (table,) = continued_campaign.report("continued").tables
    assert len(table.rows) == len(continued.STEPS) + len(continued.AVERAGES)
    assert all(row[-1] is not None for row in table.rows), "every step has a loss on the first text"


def test_claims_compare_each_step_with_the_one_before(continued_campaign: MadeUpCampaign) -> None:
    claims, here = continued_campaign.claims("continued"), continued.continuation(continued_campaign.study)
    assert here is not None
    losses = [continued_campaign.study.loss(here.steps()[step][0]) or 0.0 for step in continued.STEPS]
    for id, before, after in (("small-batch", *losses[:2]), ("repeated", *losses[1:])):
        assert claims[f"continued.{id}"].value == f"{before - after:+.4f} nats"
        assert claims[f"continued.{id}"].holds == (after < before)
    ids = ("small-batch", "repeated", "forgetting", "ensemble", "soup", "worth")
    assert set(claims) == {f"continued.{id}" for id in ids}


def test_arms_against_forgetting_are_tuned_on_both_texts_and_claimed(continued_campaign: MadeUpCampaign) -> None:
    """The made-up loss has its lowest point at the middle value of each knob, 0.1 below the plain run's."""
    knobs = {"l2": [0.1, 1.0, 10.0], "ewc": [0.1, 1.0, 10.0], "prediction": [0.2, 0.5, 0.8], "replay": [0.1, 0.2, 0.5]}
    assert {len(job.runs) for job in continued_campaign.ensembles} == {1, 4}, "no arm without a scale that turns it on"

    def loss_of(run: Run) -> float:
        best = (
            (run.anchor and run.anchor.strength == 1.0)
            or (run.teach and run.teach.kd_weight == 0.5)
            or run.replay == 0.2
        )
        return made_up_loss(run) - 0.1 * bool(best)

    scale = with_table(replace(continued_campaign.scale, seeds=3), "continued", **knobs)
    campaign = simulate(scale, "continued", record_of=lambda job, records: made_up_record(job, records, loss_of))
    here = continued.continuation(campaign.study)
    assert here is not None
    assert {kind: here.knob(kind) for kind in knobs} == {"l2": 1.0, "ewc": 1.0, "prediction": 0.5, "replay": 0.2}
    protected = [run for run in campaign.runs if run.anchor or run.teach or run.replay]
    assert len(protected) == 4 * (3 + 2), "every value with one seed, the best one with three"
    assert {run.init_from for run in protected} == {here.base}
    plain = here.steps()[continued.STEPS[-1]][0]
    assert {
        replace(run, name="x", order_seed=0, init_seed=0, anchor=None, teach=None, replay=0.0) for run in protected
    } == {replace(plain, name="x")}, "an arm differs from the last step in its own field alone"
    claims = campaign.claims("continued")
    for kind in knobs:
        keeps, both = claims[f"continued.{kind}-keeps"], claims[f"continued.{kind}-both"]
        assert (
            keeps.holds and keeps.seeds == 3 and keeps.value.startswith("+0.1000 nats (+0.1000 without the first seed")
        )
        assert both.holds and both.value.startswith("+0.2000 nats")
    table = campaign.report("continued").tables[-1]
    assert [row[1] for row in table.rows] == [None, 1.0, 1.0, 0.5, 0.2]
    steps = [row[2] for row in table.rows]
    assert steps[0] == steps[1] == steps[2] == steps[3] and steps[4] == round(plain.steps / 0.8)


def test_a_pass_of_few_steps_has_no_verdict(continued_campaign: MadeUpCampaign) -> None:
    """24,576 tokens are 24 steps of the large batch."""
    campaign = simulate(with_table(continued_campaign.scale, "continued", unique_tokens=24576), "continued")
    claims = campaign.claims("continued")
    assert claims["continued.small-batch"].holds is None
    assert claims["continued.small-batch"].untestable == "a run has 24 optimizer steps, at least 100 are needed"
    assert claims["continued.repeated"].holds is not None, "192 steps against 768"


def test_the_papers_setting_is_priced() -> None:
    """Eight members of 4 x 4.19e9 tokens and one pass over 73.4e9 dominate: 6 N tokens for N = 3.21e9."""
    view = cost_estimate(["continued"], MadeUpRecords(), load_scale("paper-math"))
    tokens = 4194304000 * (1 + 1 + 8 * 4) + 73400320000
    assert view.today.flops == pytest.approx(6 * 3_212_749_824 * tokens)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_sizes": [4]}, "give at least 2"),
        ({"base": "llama"}, "give the path of a model folder, with a slash in it"),
        (
            {"base": "models/llama", "ewc": [], "prediction": []},
            "l2, replay work against forgetting of the first text",
        ),
        ({"replay": [1.0]}, "replay.* must be a number from 0 to below 1"),
        ({"model": "w7"}, "'w7' is not on the ladder"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], reason: str) -> None:
    scale = with_table(load_scale("micro"), "continued", **change)
    with pytest.raises(ValueError, match=rf"scale 'micro', \[continued\]: .*{reason}"):
        continued.plan(Study(MadeUpRecords(), scale))
