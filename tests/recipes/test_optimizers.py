"""Optimizers tuned alike, ablations at the optimum, and optimizers at several sizes and as members."""

import itertools
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import with_optimizers
from made_up import (
    MadeUpCampaign,
    MadeUpRecords,
    both_losses,
    diverged,
    draw,
    made_up_loss,
    made_up_record,
    simulate,
    with_table,
)

from epochal.campaign.plan import load_recipe
from epochal.config import REPOSITORY
from epochal.report.claims import Claim
from epochal.run import AVERAGES, Fira, Muon, Run, Spectra
from epochal.scale import Scale, load_scale
from epochal.study import Study
from recipes import ablations, optimizers, optimizers_at_scale
from recipes.optimizers import ARMS

LABELS = [arm.label for arm in ARMS]


@pytest.fixture
def comparing() -> Scale:
    return with_optimizers(load_scale("demo"))


def test_every_optimizer_is_tuned_alike_and_gets_its_seeds_at_the_optimum(optimizer_campaign: MadeUpCampaign) -> None:
    study = optimizer_campaign.study
    for sweep in optimizers.sweeps(study).values():
        products = []
        for arm in ARMS:
            runs = [study.run(arm, sweep.model, sweep.tokens, point) for point in study.points(arm, sweep)]
            products.append([pytest.approx(run.optimizer.lr * run.optimizer.wd) for run in runs])
            assert len({(run.optimizer.lr, run.optimizer.wd) for run in runs}) == len(sweep.lr) * len(sweep.wd)
            assert {(run.unique_tokens, run.epochs) for run in runs} == {(sweep.tokens, sweep.epochs)}
            best, result = min(runs, key=made_up_loss), study.swept(arm, sweep)
            assert sorted(result.records) == list(range(sweep.seeds))
            assert all(run.optimizer == best.optimizer for run in result.runs)
        assert all(row == [item.expected for item in products[0]] for row in products)


def test_runs_of_the_scales_own_optimizer_are_shared_with_other_recipes(optimizer_campaign: MadeUpCampaign) -> None:
    study = optimizer_campaign.study
    sweep = optimizers.sweep(study, "repeated")
    for point in study.points(optimizers.arm("AdamW"), sweep):
        assert study.run(optimizers.arm("AdamW"), "w32", 24576, point) == study.scale.run("w32", 24576, point)


def measured(campaign: MadeUpCampaign) -> MadeUpRecords:
    """SPECTRA-AdamW better than AdamW by 0.03, 0.02 and 0.04 in the first setting; state, share and norms measured."""
    study, sweep = campaign.study, optimizers.sweep(campaign.study, "once")
    base, clipped, fira = (
        study.swept(optimizers.arm(label), sweep).records for label in ("AdamW", "SPECTRA-AdamW", "Fira")
    )
    changed = []
    for seed, gain in enumerate((0.03, 0.02, 0.04)):
        better = both_losses(base[seed].loss - gain)
        for record, results, bytes, share, norm in (
            (clipped[seed], better, 8, 0.25, {"q_proj": 2.0, "lm_head": 9.0}),
            (base[seed], {}, 8, 0.1, {"q_proj": 3.0}),
            (fira[seed], {}, 6, 0.1, {"q_proj": 3.0}),
        ):
            provenance = {"state_bytes": bytes * record.results["parameters"], "optimizer_share": share}
            results = record.results | results | {"spectral_norms": norm}
            changed.append(replace(record, results=results, provenance=provenance))
    return campaign.records.having(changed)


def test_optimizers_report_paired_differences_with_intervals(optimizer_campaign: MadeUpCampaign) -> None:
    section = optimizer_campaign.report("optimizers", measured(optimizer_campaign))
    claims = {claim.id.removeprefix("optimizers."): claim for claim in section.claims}
    claim = claims["once.spectra-adamw-adamw"]
    assert (claim.holds, claim.seeds, claim.sizes) == (True, 3, (pytest.approx(0.03), 0.026))
    assert claim.value == "+0.0300 nats (+0.0300 without the first seed, which chose the settings)"
    assert claim.interval == pytest.approx((0.03 - 2.92 * 0.01 / 3**0.5, 0.03 + 2.92 * 0.01 / 3**0.5), rel=1e-4)
    assert "780M" in claim.paper and not any("noise" in reason for reason in claim.provisional)
    other = claims["repeated.spectra-adamw-adamw"]
    assert (other.paper, other.value[:12]) == ("", "+0.0000 nats") and "within noise" in other.provisional
    assert claims["once.adamw-galore"].text.endswith("GaLore is not better than AdamW")
    state, norm, time = (claims[f"once.{what}"] for what in ("fira-state", "spectra-norm", "spectra-time"))
    assert (state.value, state.holds) == ("1.50 against 2.00 times the weights", True)
    assert (norm.value, norm.holds) == ("+1.00 (2.00 against 3.00)", True)
    assert time.value.startswith("+20.0% of a step") and time.untestable, "1 / 0.75 over 1 / 0.9"
    assert draw(section) == {"optimizers-once", "optimizers-repeated"}


def test_every_optimizer_has_a_row_and_was_tried_as_often(optimizer_campaign: MadeUpCampaign) -> None:
    tables = optimizer_campaign.report("optimizers", measured(optimizer_campaign)).tables
    for table, sweep in zip(tables, optimizers.sweeps(optimizer_campaign.study).values(), strict=True):
        assert [row[0] for row in table.rows] == LABELS
        tried = {row[table.columns.index("runs tried")] for row in table.rows}
        assert tried == {len(sweep.lr) * len(sweep.wd)}
    cells = dict(zip(tables[0].columns, tables[0].rows[LABELS.index("SPECTRA-AdamW")], strict=True))
    assert (cells["seeds"], cells["state"], cells["share"], cells["norm"]) == (3, 2.0, "25%", 2.0)


def test_the_first_optimizer_is_named(optimizer_campaign: MadeUpCampaign) -> None:
    claims = optimizer_campaign.claims("optimizers", measured(optimizer_campaign))
    first, none = claims["optimizers.once.ranking"], claims["optimizers.repeated.ranking"]
    assert (first.value, first.holds) == ("SPECTRA-AdamW, +0.0300 nats below AdamW", True)
    assert (none.value, none.holds) == ("AdamW comes first", False), "all made-up losses are equal"


def test_optimizers_report_at_every_stage(comparing: Scale) -> None:
    plan = optimizers.plan(Study(MadeUpRecords(), comparing))
    half = MadeUpRecords(made_up_record(job, MadeUpRecords()) for job in plan[::2])
    section = optimizers.report(Study(half, comparing))
    assert len(section.tables) == 2 and section.claims == ()
    rest = half.having(diverged(job) for job in plan[1::2])
    assert all(claim.provisional for claim in optimizers.report(Study(rest, comparing)).claims)


@pytest.mark.parametrize("name", ["optimizers", "ablations", "optimizers_at_scale"])
def test_a_scale_without_the_table_plans_and_claims_nothing(name: str) -> None:
    study = Study(MadeUpRecords(), load_scale("demo"))
    assert load_recipe(name).plan(study) == []
    assert load_recipe(name).report(study).claims == ()


def test_unknown_settings_and_optimizers_are_named(comparing: Scale) -> None:
    scale = with_table(comparing, "ablations", setting="onse")
    with pytest.raises(ValueError, match=r"\[optimizers\]: there is no setting 'onse' \(did you mean 'once'\?\)"):
        ablations.plan(Study(MadeUpRecords(), scale))
    at_scale = {"setting": "once", "optimizers": ["Muom"], "models": ["w16"], "members": 2, "group": 2}
    with pytest.raises(ValueError, match=r"there is no optimizer 'Muom' \(did you mean 'Muon'\?\)"):
        optimizers_at_scale.plan(Study(MadeUpRecords(), with_table(comparing, "optimizers_at_scale", **at_scale)))
    with pytest.raises(ValueError, match=r"group is 3; give 2 to members \(2\)"):
        optimizers_at_scale.plan(
            Study(MadeUpRecords(), with_table(comparing, "optimizers_at_scale", **at_scale | {"group": 3}))
        )


# --- ablations ----------------------------------------------------------------------------------------------------------


def test_ablations_change_one_field_at_the_optimum(optimizer_campaign: MadeUpCampaign) -> None:
    study, planned = optimizer_campaign.study, {run.name for run in optimizer_campaign.runs}
    sweep = ablations.sweep(study)
    assert sweep is not None
    for label, changes in ablations.CHANGES.items():
        plain = study.swept(optimizers.arm(label), sweep).runs
        for change in changes:
            runs = ablations.changed_runs(study, label, change, sweep)
            for run, other in zip(runs, plain, strict=True):
                assert run.name in planned
                assert replace(run, name="same", optimizer=other.optimizer) == replace(other, name="same")
                names = [field.name for field in fields(run.optimizer)]
                different = [n for n in names if getattr(run.optimizer, n) != getattr(other.optimizer, n)]
                assert len(different) == 1, f"{label}, {change.label}: {different}"


def test_ablations_compare_with_the_unchanged_optimizer(optimizer_campaign: MadeUpCampaign) -> None:
    study = optimizer_campaign.study
    sweep = ablations.sweep(study)
    assert sweep is not None
    best_lr = study.swept(optimizers.arm("Fira"), sweep).runs[0].optimizer.lr

    def loss(run: Run) -> float:
        # Away from the tuned learning rate everything is worse, so the optimum stays where it was.
        optimizer, noise = run.optimizer, 0.001 * run.init_seed + abs(math.log(run.optimizer.lr / best_lr))
        if isinstance(optimizer, Spectra):
            return 4.0 + noise + (0.05 if optimizer.clip < 1 else 0.0) + (0.002 if optimizer.iterations else 0.0)
        if isinstance(optimizer, Fira):
            worse = 0.03 * (optimizer.gamma is None) - 0.01 * (optimizer.scaling == "matrix")
            return 4.1 + noise + worse + 0.1 / (optimizer.rank or 8)
        return made_up_loss(run)

    claims = optimizer_campaign.claims("ablations", optimizer_campaign.records.with_losses(loss))
    verdicts = {id.removeprefix("ablations."): (claim.value, claim.holds) for id, claim in claims.items()}
    assert verdicts["threshold"] == ("0.0000 against +0.0500 nats", True)
    assert verdicts["fira-limiter"] == ("+0.0300 nats", True)
    assert verdicts["fira-columns"] == ("-0.0100 nats", False)
    assert verdicts["fira-rank"][1] and " > " in verdicts["fira-rank"][0]
    steps = claims["ablations.steps"]
    assert steps.holds and steps.value.count("steps +0.0020") == len(ablations.STEPS)
    assert {claim.seeds for claim in claims.values()} == {sweep.seeds}
    assert all(claim.provisional == () for claim in claims.values())


# --- at scale -----------------------------------------------------------------------------------------------------------


def test_optimizers_at_scale_are_tuned_alike_at_every_size(optimizer_campaign: MadeUpCampaign) -> None:
    here = optimizers_at_scale.comparison(optimizer_campaign.study)
    assert here is not None
    assert {here.tuned(label, model).tried for label in ("AdamW", "Muon") for model in here.settings.models} == {6}


def test_members_of_every_optimizer_take_the_rule(optimizer_campaign: MadeUpCampaign) -> None:
    here, runs = optimizers_at_scale.comparison(optimizer_campaign.study), optimizer_campaign.records
    assert here is not None
    groups = optimizer_campaign.ensembles
    variants = 1 + len(optimizers_at_scale.COMPARED)
    assert len(groups) == 2 * (len(AVERAGES) + variants * len(here.settings.repetitions))
    tuned = {label: here.tuned(label, "w32").point for label in ("AdamW", "Muon")}
    for group in groups:
        for run in (runs.named(name).job for name in group.runs):  # type: ignore[union-attr]
            assert isinstance(run, Run)
            point = tuned["Muon" if isinstance(run.optimizer, Muon) else "AdamW"]
            assert point is not None
            assert (run.model, run.epochs, run.optimizer.wd) == ("w32", 24 if run.teach else 32, point.wd / 2)


def test_optimizers_at_scale_claim_what_the_losses_say(optimizer_campaign: MadeUpCampaign) -> None:
    def loss(run: Run) -> float:
        gain = {"w16": 0.01, "w32": 0.02, "w64": 0.03}[run.model] if isinstance(run.optimizer, Muon) else 0.0
        return made_up_loss(run) - gain

    records = optimizer_campaign.records.with_losses(loss)
    section = optimizer_campaign.report("optimizers_at_scale", records)
    claims = {claim.id.removeprefix("optimizers-at-scale."): claim for claim in section.claims}
    below = claims["muon.every-size"]
    assert [(case.name, round(case.value, 4)) for case in below.cases] == [("w16", 0.01), ("w32", 0.02), ("w64", 0.03)]
    assert (below.holds, below.seeds) == (True, 3)
    assert (claims["muon.lasts"].value, claims["muon.lasts"].holds) == ("+0.0200 nats", True)
    assert claims["same-decay"].holds is True
    assert any("needs at least 4 sizes" in note for note in section.notes)
    assert draw(section) == {"optimizers-against-size"}

    here = optimizers_at_scale.comparison(Study(records, optimizer_campaign.scale))
    assert here is not None
    for label in ("AdamW", "Muon"):
        curves = {average: here.ensemble_record(label, average).results["curve"] for average in AVERAGES}  # type: ignore[union-attr]
        mean = {(average, k): sum(curve[k]) / len(curve[k]) for average, curve in curves.items() for k in ("2", "6")}
        first, last = (mean["logits", k] - mean["probs", k] for k in ("2", "6"))
        assert cases(claims["averages"])[label.lower()] == pytest.approx(last - first)
    for variant in optimizers_at_scale.COMPARED:
        own, plain = (here.group_losses("Muon", what) for what in (variant, "independent"))
        gain = (plain[0] + plain[1] - own[0] - own[1]) / 2
        assert cases(claims[variant]) == {"muon": pytest.approx(gain)}, "those of AdamW are variants of `ensembling`"
        assert claims[variant].interval is None and "two repetitions" in claims[variant].provisional
    assert {row[:2] for row in section.tables[0].rows} == set(
        itertools.product(here.settings.models, here.settings.optimizers)
    )


def cases(claim: Claim) -> dict[str, float]:
    return {case.name: case.value for case in claim.cases}


# --- another optimizer for the whole campaign -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    ['kind = "Muon"', 'kind = "Fira"\nrank = 4', 'kind = "Spectra"\nclip = 2.0\n[optimizer.base]\nkind = "Signum"'],
    ids=["Muon", "Fira", "Spectra"],
)
def test_the_scales_optimizer_reaches_every_run_of_the_chain(tmp_path: Path, optimizer: str) -> None:
    demo = load_scale("demo")
    path = tmp_path / "own.toml"
    text = (REPOSITORY / "configs" / "scales" / "demo.toml").read_text()
    path.write_text(f"{text}\n[optimizer]\n{optimizer}\n")
    campaign = simulate(load_scale(str(path)), "distillation")
    kind = optimizer.split('"')[1]
    assert {type(run.optimizer).__name__ for run in campaign.runs} == {kind}
    students = [run for run in campaign.runs if run.distill]
    members = {name for job in campaign.ensembles for name in job.runs}
    assert students and members
    plain = simulate(demo, "distillation")
    assert [len(jobs) for jobs in campaign.rounds] == [len(jobs) for jobs in plain.rounds]
    assert {run.name for run in campaign.runs} == {run.name for run in plain.runs}, "names are relative to the scale"
