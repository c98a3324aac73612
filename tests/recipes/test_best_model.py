"""The campaign of init: what is tuned decides the members, the student follows them, the control is compared."""

from dataclasses import replace

import pytest
from made_up import MadeUpCampaign, both_losses, made_up_record, simulate, with_table

from epochal.campaign.plan import named_roles
from epochal.records import Record, Records
from epochal.run import Ensemble, Job, Run
from epochal.scale import Scale, load_scale

TEXT = {"tokens": 30_000, "documents": 40, "vocab_size": 1024, "bytes_per_token": 3.0, "unigram_loss": 5.9}
LRS, WDS = (0.003, 0.01, 0.03), (0.4, 1.6, 6.4)


@pytest.fixture
def scale() -> Scale:
    own = replace(load_scale("demo"), recipes=("controls", "best_model"), tables={})
    own = with_table(own, "controls", model="w64", lr=0.01, tokens=24576)
    return with_table(
        own, "best_model", model="w32", epochs=8, lr=0.01, wd=1.6, proxy="w16", proxy_epochs=4, lrs=list(LRS),
        wds=list(WDS), members=3, student_epochs=16,
    )  # fmt: skip


def record_of(job: Job, records: Records) -> Record:
    """Return losses that prefer lr 0.003 and wd 6.4, and that the ensemble and the student improve."""
    record = made_up_record(job, records)
    if isinstance(job, Run):
        loss = 4.0 + abs(job.optimizer.lr - 0.003) + abs(job.optimizer.wd - 6.4) / 100
        loss += 0.5 if job.epochs == 1 else -0.2 if job.teach else 0.0
        return replace(record, results=record.results | {"loss": loss, "text": TEXT})
    return record


def run_campaign(scale: Scale) -> MadeUpCampaign:
    return simulate(scale, "controls", "best_model", record_of=record_of)


def test_members_have_the_best_lr_and_decay_of_the_proxy(scale: Scale) -> None:
    runs = run_campaign(scale).runs
    assert len([run for run in runs if run.model == "w16"]) == len({*LRS}) + len({*WDS}) - 1
    final = [run for run in runs if run.model == "w32"]
    assert {(run.optimizer.lr, run.optimizer.wd) for run in final} == {(0.003, 6.4)}
    assert [run.epochs for run in final if run.teach is None] == [8, 8, 8]
    assert [run.epochs for run in final if run.teach is not None] == [16]


def test_the_student_learns_from_the_ensemble_of_all_members(scale: Scale) -> None:
    campaign = run_campaign(scale)
    (ensemble,) = campaign.ensembles
    assert isinstance(ensemble, Ensemble) and len(ensemble.runs) == 3
    (student,) = [run for run in campaign.runs if run.teach is not None]
    assert student.teach is not None and student.teach.source == ensemble.name


def test_best_is_the_single_model_of_lowest_loss(scale: Scale) -> None:
    campaign = run_campaign(scale)
    roles = named_roles(campaign.records, scale)
    assert roles.keys() == {"control", "single", "ensemble", "student", "best"}
    assert roles["best"] is roles["student"]
    assert roles["control"].job.epochs == 1


def test_the_report_begins_with_the_control_and_counts_bits_per_byte(scale: Scale) -> None:
    campaign = run_campaign(scale)
    section = campaign.report("controls")
    rows = {row[0]: row for row in section.tables[0].rows}
    assert rows["frequencies"][2] == 5.9
    assert rows["all tokens equally likely"][3] == pytest.approx(10 / 3.0)  # 1,024 tokens: 10 bits, of 3 bytes each
    claim = campaign.claims("controls")["controls.one-pass"]
    assert claim.holds
    assert campaign.claims("best_model")["best-model.student"].holds


def test_a_control_that_wins_is_reported_and_exported(scale: Scale) -> None:
    def control_wins(job: Job, records: Records) -> Record:
        record = record_of(job, records)
        one_pass = isinstance(job, Run) and job.epochs == 1
        return replace(record, results=record.results | both_losses(1.0)) if one_pass else record

    campaign = simulate(scale, "controls", "best_model", record_of=control_wins)
    roles = named_roles(campaign.records, scale)
    assert roles["best"] is roles["control"]
    assert campaign.claims("controls")["controls.one-pass"].holds is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 1}, "needs an ensemble"),
        ({"proxy": "w999"}, "not on the ladder"),
        ({"proxy_epochs": 0}, "together"),
    ],
)
def test_impossible_settings_are_refused(scale: Scale, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_campaign(with_table(scale, "best_model", **changes))
