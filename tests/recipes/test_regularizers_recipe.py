"""The recipe `regularizers`: arms tuned alike around the plain optimum, paired on the test split, as members, in one pass."""

import statistics
from dataclasses import replace

import pytest
from made_up import MadeUpCampaign, MadeUpRecords, made_up_loss, made_up_record, simulate

from epochal.campaign.plan import flops_of
from epochal.records import Record, Records
from epochal.run import Job, RandomTokens, Run, StableMax
from epochal.scale import load_scale
from epochal.study import Study
from recipes import regularizers
from recipes.regularizers import PLAIN, ROWS


def loss(run: Run) -> float:
    """Random tokens gain 0.05 where text repeats and cost 0.02 in one pass; a bowl in its share around 0.05."""
    value = made_up_loss(run) + 0.002 * (run.init_seed % 3)
    if isinstance(run.regularizer, RandomTokens):
        share = run.regularizer.share
        value += (-0.05 if run.epochs > 1 else 0.02) + (share - 0.05) ** 2 + 0.001 * run.init_seed
    return value


def record_of(job: Job, records: Records) -> Record:
    record = made_up_record(job, records, loss)
    return replace(record, results={**record.results, "text": {"vocab_size": 1024}})


@pytest.fixture(scope="module")
def campaign() -> MadeUpCampaign:
    return simulate(load_scale("regularizers"), "regularizers", record_of=record_of)


def settings(campaign: MadeUpCampaign) -> regularizers.Settings:
    here = campaign.study.settings(regularizers.Settings)
    assert here is not None
    return here


def test_every_arm_is_tuned_alike_around_the_plain_optimum(campaign: MadeUpCampaign) -> None:
    study, here = campaign.study, settings(campaign)
    base = study.tuned(regularizers.TUNED, here.model, 49152).best
    assert base is not None
    for row in ROWS:
        search = regularizers.search(study, here, row)
        assert search.descent.certified
        run = study.run(row.arm, here.model, 49152, search.descent.visited[0])
        assert abs(run.passes * run.epochs - base.epochs) <= run.passes / 2, row.arm.label
        assert search.grid["epochs"] == (run.epochs, 2 * run.epochs)
        assert set(search.grid["wd"]) == {0.1, base.wd / 4, base.wd / 2, base.wd}
        point = search.descent.best
        assert point is not None and len(regularizers.repeated(study, here, row, point)) == here.seeds
        assert {run.epochs for run in regularizers.once(study, here, row, point)} == {1}
        if row.arm.label == "random tokens":
            assert point.get("regularizer.share") == 0.05


def test_gains_are_paired_by_seed_on_the_test_split(campaign: MadeUpCampaign) -> None:
    study, here = campaign.study, settings(campaign)
    plain, noisy = (
        regularizers.outcome(study, here, regularizers.row_of(label)).records for label in (PLAIN, "random tokens")
    )
    # The first seed chose the settings.
    gains = [plain[seed].results["test_loss"] - noisy[seed].results["test_loss"] for seed in range(1, 5)]
    claims = campaign.claims("regularizers")
    claim = claims["regularizers.repeated.random-tokens"]
    assert claim.value == f"{statistics.fmean(gains):+.4f} nats" and claim.holds and claim.seeds == 4
    assert claims["regularizers.once.random-tokens"].holds is False
    assert not any("plain" in name or name.endswith(".muon") for name in claims)


def test_the_table_has_one_row_for_each_arm_and_names_what_is_missing(campaign: MadeUpCampaign) -> None:
    section = campaign.report("regularizers")
    (table,) = section.tables
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == [row.arm.label for row in ROWS]
    assert {rows[label]["cost"] for label in ("gradient norm", "masked inputs")} <= {1.0, 2.0}, (
        "the same as plain, or twice"
    )
    assert rows["StableMax"]["limit in K"] is None, "its logits are not those of a softmax"
    assert rows["random tokens"]["gain in the limit"] == pytest.approx(0.05, abs=0.01)
    assert rows[PLAIN]["gain"] is None
    assert any("weight compander" in note for note in section.notes)
    assert campaign.report("regularizers", MadeUpRecords()).claims == ()


def test_a_claim_says_that_the_arm_is_at_the_end_of_its_grid(campaign: MadeUpCampaign) -> None:
    study, here, claims = campaign.study, settings(campaign), campaign.claims("regularizers")
    tuned = regularizers.outcome(study, here, regularizers.row_of(PLAIN)).point
    assert tuned is not None
    flagged = set()
    for row in ROWS[1:]:
        point = regularizers.outcome(study, here, row).point
        ends = [name for name, values in row.arm.grids.items() if point.get(name) in (values[0], values[-1])]
        ends = [name.split(".")[-1] for name in ends] + ["wd"] * (point.wd in (0.1, tuned.wd))
        id = f"regularizers.repeated.{row.arm.label}".replace(" ", "-").lower()
        reasons = [why for why in claims[id].provisional if "end of its grid" in why] if id in claims else []
        if id in claims:
            assert [set(why.split(": ")[1].split(", ")) for why in reasons] == ([set(ends)] if ends else [])
        flagged.add(bool(reasons))
    assert flagged == {True, False}


def test_members_are_the_seeds_and_a_second_pass_is_priced(campaign: MadeUpCampaign) -> None:
    members = {name for ensemble in campaign.ensembles for name in ensemble.runs}
    stable = {run.name for run in campaign.runs if isinstance(run.regularizer, StableMax)}
    assert len(campaign.ensembles) == len(ROWS) - 1 and not members & stable
    for run in campaign.runs:
        plain = campaign.scale.changed(run, {"regularizer": None, "input_mask_prob": 0.0, "optimizer.wd": 0.1})
        if not run.more_heads:
            assert flops_of(run) == pytest.approx(run.passes * flops_of(plain))
    costs = {row[0]: row[5] for row in campaign.report("regularizers").tables[0].rows}
    # 6 FLOPs for each weight: w32 has 95,392 at this vocabulary.
    assert costs["second token"] / costs[PLAIN] == pytest.approx(1 + 32 * (32 + 1024) / 95392)


def test_a_scale_without_the_table_plans_and_reports_nothing() -> None:
    study = Study(MadeUpRecords(), load_scale("micro"))
    assert regularizers.plan(study) == [] and regularizers.report(study) is None
