"""Variants of ensemble members: what differs, that they cost the same, and gains paired by repetition."""

import functools
import statistics
from dataclasses import replace

import pytest
from made_up import MadeUpCampaign, MadeUpRecords, simulate, with_table

from epochal.campaign.plan import flops_of
from epochal.names import named_ensemble
from epochal.run import AVERAGES, Run
from epochal.scale import Point, load_scale
from epochal.study import Study
from recipes import _member_variants, ensembling
from recipes._member_variants import VARIANTS
from recipes.heavy_weight_decay import TUNED

SETTINGS = _member_variants.Settings(model="w32", count=3, seeds=2, holdout_tokens=2048)
POINT = Point(lr=0.01, epochs=32, wd=0.8)


@pytest.fixture(scope="module")
def members() -> dict[str, list[Run]]:
    """The members of the second repetition by variant."""
    study = Study(MadeUpRecords(), load_scale("demo"))
    independent = functools.partial(study.run, TUNED, "w32", 24576, POINT)
    return {
        label: _member_variants.members(study, SETTINGS, independent, variant, 1)
        for label, variant in VARIANTS.items()
        if not variant.weighs
    }


def test_variants_differ_in_what_their_titles_say(members: dict[str, list[Run]]) -> None:
    runs = [run for group in members.values() for run in group]
    assert len({run.name for run in runs}) == len({replace(run, name="x") for run in runs}), "shared runs share names"
    seeds = {label: [(run.init_seed, run.order_seed) for run in group] for label, group in members.items()}
    assert seeds["independent"] == [(3, 3), (4, 4), (5, 5)]
    assert seeds["init"] == [(3, 3), (4, 3), (5, 3)]
    assert seeds["order"] == [(3, 3), (3, 4), (3, 5)]
    snapshots, chain = members["snapshot"], members["chain"]
    assert [run.init_from for run in snapshots] == [None, snapshots[0].name, snapshots[1].name]
    assert {run.wd_schedule for run in snapshots} == {"antiphase"}
    assert len({run.order_seed for run in snapshots}) == 3
    assert [run.teach.source if run.teach else None for run in chain] == [None, chain[0].name, chain[1].name]
    assert [run.epochs for run in chain] == [32, 24, 24]
    for label in ("ema", "swa"):
        assert {run.weight_averaging for run in members[label]} == {label}
    assert {run.dropout for run in members["dropout"]} == {0.1}
    assert {(run.input_mask_prob, run.epochs) for run in members["masked"]} == {(0.5, 16)}
    for group in members.values():
        for run, other in zip(group, members["independent"], strict=True):
            assert (run.model, run.optimizer, run.unique_tokens) == (other.model, other.optimizer, other.unique_tokens)


def test_variants_cost_the_same(members: dict[str, list[Run]]) -> None:
    base = _member_variants.cost(members["independent"])
    costs = {label: _member_variants.cost(group) / base for label, group in members.items()}
    assert costs.pop("holdout") == pytest.approx(1 - 2048 / 24576)
    assert list(costs.values()) == pytest.approx([1.0] * len(costs))
    named = {run.name: run for group in members.values() for run in group}
    flops = {label: sum(flops_of(run, jobs=named) for run in group) for label, group in members.items()}
    assert flops["masked"] == flops["independent"] == pytest.approx(flops["chain"]), "as `epochal plan` prices them"


def test_every_variant_has_a_row_for_each_average(chain: MadeUpCampaign) -> None:
    table = chain.report("ensembling").tables[-1]
    assert {row[:2] for row in table.rows} == {
        (variant.title, average) for variant in VARIANTS.values() for average in AVERAGES
    }
    losses = [row[4] for row in table.rows]
    assert losses == sorted(losses)


def test_weights_learned_on_the_holdout_are_used(chain: MadeUpCampaign) -> None:
    members = {run.name for run in chain.runs if run.holdout_tokens}
    on_holdout = [job for job in chain.ensembles if set(job.runs) <= members]
    assert {job.member_weights for job in on_holdout if len(job.runs) == 3} == {None, (0.5, 0.3, 0.2)}
    assert {len(job.runs) for job in on_holdout} == {2, 3}, "the selected members, and all of them"


def test_gains_of_variants_are_paired_by_repetition(chain: MadeUpCampaign) -> None:
    swa = [run for run in chain.runs if run.weight_averaging == "swa"]
    gains = []
    for first in (0, SETTINGS.count):
        own = sorted((run for run in swa if first <= run.init_seed < first + SETTINGS.count), key=lambda r: r.init_seed)
        plain = [chain.scale.changed(run, {"weight_averaging": "last"}) for run in own]
        together = [named_ensemble(tuple(run.name for run in runs), "probs") for runs in (plain, own)]
        before, after = (chain.records.get(job) for job in together)
        assert before is not None and after is not None
        gains.append(before.loss - after.loss)
    claim = chain.claims("ensembling")["ensembling.variant.swa"]
    assert claim.value == f"{statistics.fmean(gains):+.4f} nats"
    assert claim.interval is None and "two seeds" in claim.provisional and claim.seeds == SETTINGS.seeds
    assert claim.holds == (statistics.fmean(gains) > 0)


def test_a_scale_without_variants_plans_none() -> None:
    campaign = simulate(load_scale("demo"), "ensembling")
    assert not [run for run in campaign.runs if run.weight_averaging != "last" or run.teach or run.holdout_tokens]


def test_variants_need_a_size_on_the_ladder_and_two_members() -> None:
    for change, reason in (
        ({"model": "w7"}, "'w7' is not on the ladder"),
        ({"count": 1}, "count must be an integer from 2 to 1,000, got 1"),
    ):
        variants = {"model": "w32", "count": 3, "seeds": 1, "holdout_tokens": 512} | change
        scale = with_table(load_scale("demo"), "ensembling", member_variants=variants)
        with pytest.raises(ValueError, match=reason):
            ensembling.settings(Study(MadeUpRecords(), scale))
