"""Campaigns of made-up losses that tests of recipes share. Tests read them and change nothing."""

from dataclasses import replace

import pytest
from made_up import MadeUpCampaign, simulate, with_table

from epochal.scale import Rung, Scale, load_scale


@pytest.fixture(scope="session")
def chain() -> MadeUpCampaign:
    """Everything up to students and downstream accuracy: two ensembled sizes, variants of members, soft targets."""
    scale = replace(load_scale("demo"), seeds=3)
    scale = with_table(scale, "epoching", data_scaling_tokens=[], data_scaling_models=[])
    variants = {"model": "w32", "count": 3, "seeds": 2, "holdout_tokens": 2048}
    scale = with_table(scale, "ensembling", models=["w32", "w64"], member_variants=variants)
    soft_targets = {"model": "w32", "kd_weight": 0.9, "wd": 0.4, "seeds": 2, "sizes": ["w10", "w64"]}
    scale = with_table(scale, "distillation", soft_targets=soft_targets)
    return simulate(scale, "distillation")


@pytest.fixture(scope="session")
def laws() -> MadeUpCampaign:
    """Four sizes, all of them ensembled; three further budgets of the standard recipe with one size."""
    scale = replace(load_scale("demo"), seeds=2)
    scale = replace(scale, ladder=(*scale.ladder, Rung(model="w96", lr=0.01, epochs=16, wd=3.2)))
    scale = with_table(scale, "epoching", data_scaling_tokens=[6144, 12288, 49152], data_scaling_models=["w32"])
    scale = with_table(scale, "ensembling", models=list(scale.models))
    return simulate(scale, "data_efficiency")


def with_optimizers(scale: Scale) -> Scale:
    lr = [0.003, 0.01, 0.03]
    once = {"name": "once", "tokens": 53248, "epochs": 1, "lr": lr, "wd": [0.1]}
    repeated = {"name": "repeated", "tokens": 24576, "epochs": 16, "lr": lr, "wd": [0.8, 3.2]}
    return with_table(scale, "optimizers", model="w32", seeds=3, settings=[once, repeated])


@pytest.fixture(scope="session")
def optimizer_campaign() -> MadeUpCampaign:
    """All optimizers on fresh and on repeated text, ablations, and two optimizers at three sizes as members."""
    scale = with_table(with_optimizers(load_scale("demo")), "ablations", setting="once")
    at_scale = {"optimizers": ["AdamW", "Muon"], "models": ["w16", "w32", "w64"], "members": 6, "group": 3}
    scale = with_table(scale, "optimizers_at_scale", setting="repeated", **at_scale)
    return simulate(scale, "optimizers", "ablations", "optimizers_at_scale")


@pytest.fixture(scope="session")
def continued_campaign() -> MadeUpCampaign:
    """The tuned base of one size, and everything that continues from it on a second text, without arms against forgetting."""
    scale = replace(load_scale("micro"), unique_tokens=(24576,), seeds=1)
    return simulate(with_table(scale, "continued", l2=[], ewc=[], prediction=[], replay=[]), "continued")
