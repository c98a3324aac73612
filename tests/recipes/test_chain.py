"""The chain from epoching to students and its laws: what is planned when, and what is claimed at every stage."""

import math
import random
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import (
    CHAIN,
    MadeUpCampaign,
    MadeUpRecords,
    diverged,
    draw,
    made_up_loss,
    made_up_record,
    simulate,
    size_of,
    with_table,
)

from epochal.campaign.plan import campaign_jobs, cost_estimate, load_recipe, recipe_names
from epochal.config import REPOSITORY
from epochal.records import Record, Records, Workspace
from epochal.report.claims import Claim
from epochal.run import AVERAGES, SOUP, Ensemble, Job, Run, Samples, fingerprint
from epochal.scale import Point, Scale, load_scale, member_point
from epochal.scaling import DataEfficiency
from epochal.study import Study
from recipes import data_efficiency, distillation, ensembling, epoching, heavy_weight_decay

SCALES = sorted(path.stem for path in (REPOSITORY / "configs" / "scales").glob("*.toml"))
NOT_STATED = {"name": "x", "init_seed": 0, "order_seed": 0, "init_from": None, "teach": None, "distill": None}
TOKENS = 24576


@pytest.fixture
def demo() -> Scale:
    return load_scale("demo")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_claims(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.__doc__ is not None
    assert "Claim: " in recipe.__doc__
    assert "Command: epochal " in recipe.__doc__
    assert callable(recipe.plan)
    assert callable(recipe.report)


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'ensembles' \(did you mean 'ensembling'\?\)"):
        load_recipe("ensembles")


@pytest.mark.parametrize("recipe", CHAIN)
def test_plan_is_pure(tmp_path: Path, demo: Scale, recipe: str) -> None:
    workspace = Workspace("demo", tmp_path / "results", tmp_path / "work")
    first, second = (campaign_jobs([recipe], Records(workspace), demo) for _ in range(2))
    assert first and first == second
    assert all(isinstance(job, Run) for job in first)
    assert not workspace.results.exists() and not workspace.work.exists()


def test_nothing_remains_to_be_planned_or_paid_after_a_whole_campaign(chain: MadeUpCampaign) -> None:
    view = cost_estimate(CHAIN, chain.records, chain.scale)
    assert (view.today.jobs, view.later.jobs) == (0, 0)
    assert {job.name for job in view.status.done} == {job.name for job in chain.jobs}


def test_an_estimate_of_what_is_left_is_never_above_what_comes(demo: Scale) -> None:
    scale = replace(demo, grid=load_scale("micro").grid, seeds=3)
    campaign = simulate(with_table(scale, "epoching", sweep_model="w32"), *CHAIN)
    for done in range(len(campaign.rounds) + 1):
        view = cost_estimate(CHAIN, campaign.after(done), campaign.scale)
        left = [job for jobs in campaign.rounds[done:] for job in jobs]
        assert view.today.jobs <= view.today.jobs + view.later.jobs <= len(left)


def test_a_campaign_starts_with_runs_and_ends_with_students(demo: Scale) -> None:
    campaign = simulate(demo, "distillation")
    assert {type(job) for job in campaign.rounds[0]} == {Run}
    assert {type(job) for job in campaign.rounds[-2]} >= {Samples}
    assert all(isinstance(job, Run) and job.distill for job in campaign.rounds[-1])
    whole = scale_count(demo)
    averages = [job.average for job in campaign.ensembles if len(job.runs) == whole or job.average == SOUP]
    assert averages == [*AVERAGES, SOUP], "one for each average, and the mean of the weights"


@pytest.mark.parametrize("rule_is_lower", [True, False])
def test_two_members_at_each_of_two_points_choose_where_all_train(demo: Scale, rule_is_lower: bool) -> None:
    """With one seed for each setting; the other point gets no further members."""

    def record_of(job: Job, records: Records) -> Record:
        record = made_up_record(job, records)
        if not isinstance(job, Ensemble):
            return record
        run = records.named(job.runs[0]).job  # type: ignore[union-attr]
        by_rule = run.epochs > 16  # the best made-up single model has 16; type: ignore[union-attr]
        low = 3.0 if by_rule == rule_is_lower else 3.5
        return replace(
            record, results=record.results | {"curve": {k: [low + 0.3 / int(k)] for k in record.results["curve"]}}
        )

    campaign = simulate(demo, "ensembling", record_of=record_of)
    members = [run for run in campaign.runs if run.init_seed]
    point = ensembling.best_point(campaign.study, "w64", TOKENS)
    single = campaign.study.tuned(heavy_weight_decay.TUNED, "w64", TOKENS).best
    assert single is not None and point == (member_point(single) if rule_is_lower else single)
    seeds = {
        epochs: {run.init_seed for run in members if run.epochs == epochs} for epochs in {r.epochs for r in members}
    }
    chosen = point.epochs
    assert seeds == {chosen: set(range(1, scale_count(demo))), **{epochs: {1} for epochs in seeds if epochs != chosen}}


def scale_count(scale: Scale) -> int:
    count: int = scale.tables["ensembling"]["count"]
    return count


def test_another_first_seed_repeats_the_campaign_on_other_draws(demo: Scale) -> None:
    variants = {"model": "w32", "count": 3, "seeds": 2, "holdout_tokens": 2048}
    tables = {
        "ensembling": {"models": ["w32"], "count": 4, "member_variants": variants},
        "distillation": demo.tables["distillation"] | {"model": "w32"},
    }
    scale = replace(demo, ladder=demo.ladder[1:2], tables=tables)
    first, second = (simulate(other, "distillation").jobs for other in (scale, replace(scale, first_seed=100)))
    for one, other in zip(first, second, strict=True):
        if isinstance(one, Run) and isinstance(other, Run):
            assert (other.init_seed, other.order_seed) == (one.init_seed + 100, one.order_seed + 100)
            assert replace(other, **NOT_STATED) == replace(one, **NOT_STATED)
    assert not {job.name for job in first} & {job.name for job in second}
    assert not {fingerprint(job) for job in first} & {fingerprint(job) for job in second}


def test_a_campaign_may_have_fewer_sizes_and_ensembles_at_further_budgets(demo: Scale) -> None:
    *small, largest = demo.ladder
    scale = replace(demo, seeds=2, unique_tokens=(TOKENS, 12288))
    scale = replace(scale, ladder=(*small, replace(largest, unique_tokens=(TOKENS,))))
    models = [rung.model for rung in demo.ladder]
    scale = with_table(scale, "epoching", data_scaling_tokens=[], data_scaling_models=[])
    scale = with_table(scale, "ensembling", models=models, models_elsewhere=models[:1], count=2, search_members=0)
    campaign = simulate(scale, "ensembling")
    assert {run.model for run in campaign.runs if run.unique_tokens == 12288} == set(models[:-1])
    members = {
        tokens: {run.model for run in campaign.runs if run.unique_tokens == tokens} for tokens in scale.unique_tokens
    }
    assert members[TOKENS] == set(models)
    study = campaign.study
    assert [model for model, *_ in ensembling.finished(study, 12288)] == [models[0]] * len(AVERAGES)
    assert {model for model, *_ in ensembling.finished(study, TOKENS)} == set(models)
    claim = campaign.claims("heavy_weight_decay")["heavy-decay.monotone"]
    assert f"over {len(models) - 1} to {len(models)} sizes" in claim.text
    assert len(claim.cases) == 2 * len(models) - 3
    assert "waiting" not in " ".join(claim.provisional)
    for recipe in ("heavy_weight_decay", "ensembling", "data_efficiency"):
        draw(campaign.report(recipe))


@pytest.mark.parametrize("seed", range(3))
def test_jobs_may_finish_in_any_order(seed: int) -> None:
    """The scale's searches of decays, members and students may be half done when the next plan is made."""
    scale = load_scale("docs-rehearsal")
    campaign = simulate(scale, *scale.recipes, some=random.Random(seed))
    assert {type(job) for job in campaign.jobs} == {Run, Ensemble, Samples}


def test_a_job_of_two_meanings_is_refused(demo: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    job = campaign_jobs(["epoching"], MadeUpRecords(), demo)[0]
    twin = Ensemble(name=job.name, runs=("a",), average="logits")
    monkeypatch.setattr(distillation, "plan", lambda study: [twin])
    with pytest.raises(ValueError, match=f"'distillation' plans '{job.name}' with another meaning"):
        campaign_jobs(["epoching", "distillation"], MadeUpRecords(), demo)


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_loads_and_is_priced_in_a_second(name: str, tmp_path: Path) -> None:
    scale = load_scale(name)
    assert scale.name == name
    seconds = []
    for _ in range(3):  # the fastest: other work on the same core slows a processor down too
        started = time.process_time()
        view = cost_estimate(
            recipe_names(scale), Records(Workspace(name, tmp_path / "results", tmp_path / "work")), scale
        )
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1.0
    assert view.today.flops > 0
    assert view.later.jobs > 0


# --- reports at every stage ---------------------------------------------------------------------------------------------


def test_every_stage_of_a_campaign_has_a_report(chain: MadeUpCampaign) -> None:
    for rounds in range(len(chain.rounds) + 1):
        sections = [chain.report(recipe, chain.after(rounds)) for recipe in CHAIN]
        figures = [figure.name for section in sections for figure in section.figures]
        ids = [claim.id for section in sections for claim in section.claims]
        assert len(set(figures)) == len(figures) and len(set(ids)) == len(ids)
        assert all(ids)
    for section in sections:
        assert section.claims and section.tables and draw(section), section.title
        missing = {reason for claim in section.claims for reason in claim.provisional}
        assert not [reason for reason in missing if "neighbors" in reason or "one seed" in reason], "nothing is missing"


def test_half_a_round_of_one_seed_supports_provisional_claims_alone(demo: Scale) -> None:
    first = campaign_jobs(["heavy_weight_decay"], MadeUpRecords(), demo)
    half = MadeUpRecords(made_up_record(job, MadeUpRecords()) for job in first[::2])
    claims = [claim for name in CHAIN for claim in load_recipe(name).report(Study(half, demo)).claims]
    assert claims and all(claim.provisional for claim in claims)


def test_diverged_runs_leave_a_report_without_claims(demo: Scale) -> None:
    records = MadeUpRecords(map(diverged, campaign_jobs(["heavy_weight_decay"], MadeUpRecords(), demo)))
    for name in CHAIN:
        assert load_recipe(name).report(Study(records, demo)).claims == ()


def test_verdicts_of_the_made_up_chain(chain: MadeUpCampaign) -> None:
    """The bowl of the made-up loss has heavy decay, and members gain 0.3 (1 - 1 / K) on their own loss."""
    claims = {id: claim.holds for name in CHAIN for id, claim in chain.claims(name).items()}
    variable = ("ensembling.variant", "distillation.way")
    assert {id: holds for id, holds in claims.items() if not id.startswith(variable)} == {
        "epoching.epochs": True,
        "epoching.size": False,
        "heavy-decay.beats-standard": True,
        "heavy-decay.higher-decay": True,
        "heavy-decay.window": True,
        "heavy-decay.monotone": True,
        "heavy-decay.one-setting": False,
        "heavy-decay.seed-limit": True,
        "ensembling.beats-single": True,
        "ensembling.equal-parameters": True,
        "ensembling.limit": True,
        "ensembling.predicted": True,
        "ensembling.rule": False,
        "ensembling.soup": False,
        "ensembling.order-init": True,
        "distillation.student-of-ensemble": False,
        "distillation.share": False,
        "distillation.student-of-self": False,
        "distillation.beats-teacher": False,
    }


def test_the_law_of_the_smaller_sizes_predicts_the_largest_or_does_not(demo: Scale) -> None:
    first = demo.ladder[0]
    scale = replace(demo, seeds=3, ladder=tuple(replace(first, model=f"w{size}") for size in (16, 32, 64, 96, 128)))
    scale = with_table(scale, "epoching", sweep_model="w32", data_scaling_tokens=[], data_scaling_models=[])
    campaign = simulate(scale, "heavy_weight_decay")

    def claim(raised: float) -> Claim:
        records = campaign.records.with_losses(lambda run: made_up_loss(run) + (raised if run.model == "w128" else 0.0))
        section = load_recipe("heavy_weight_decay").report(Study(records, scale))
        return next(claim for claim in section.claims if claim.id == "heavy-decay.predicted-size")

    assert claim(0.0).holds and abs(claim(0.0).cases[0].value) < 0.01
    assert not claim(0.2).holds and claim(0.2).cases[0].value == pytest.approx(claim(0.0).cases[0].value + 0.2)
    four = replace(scale, ladder=scale.ladder[:-1])
    assert "heavy-decay.predicted-size" not in simulate(four, "heavy_weight_decay").claims("heavy_weight_decay")


def test_the_best_run_within_the_papers_window_is_compared_with_the_best_of_all(chain: MadeUpCampaign) -> None:
    records = chain.records.with_losses(lambda run: made_up_loss(run) + (0.5 if 0.2 <= run.tau <= 0.52 else 0.0))
    section = load_recipe("heavy_weight_decay").report(Study(records, chain.scale))
    (table,) = [table for table in section.tables if table.title.startswith("Best run tried")]
    assert len(table.rows) == len(chain.scale.models)
    for tokens, model, tried, tau, share, rate, loss, inside_count, inside, difference in table.rows:
        plain = re.compile(rf"{model}-{tokens / 1000:g}k-lr([\d.]+)-ep(\d+)-wd([\d.]+)-s0")
        found = [
            (record, [float(part) for part in match.groups()])
            for record in records
            if (match := plain.fullmatch(record.job.name))
        ]
        losses = {(lr, epochs, wd): record.loss for record, (lr, epochs, wd) in found}
        windows = {point: 512 / (point[0] * point[2] * tokens) for point in losses}
        lr, epochs, wd = best = min(losses, key=losses.__getitem__)
        within = [losses[point] for point, window in windows.items() if 0.1995 <= window <= 0.5205]
        assert (tried, inside_count) == (len(losses), len(within))
        assert (loss, inside, difference) == pytest.approx((losses[best], min(within), min(within) - losses[best]))
        assert (tau, share, rate) == pytest.approx((windows[best], windows[best] / epochs, lr * wd), abs=6e-4)
        assert difference > 0


def test_members_are_compared_with_the_larger_models_of_as_many_parameters(chain: MadeUpCampaign) -> None:
    claim = chain.claims("ensembling")["ensembling.equal-parameters"]
    assert claim.cases
    for case in claim.cases:
        count, small, large = map(int, re.findall(r"\d+", case.name.removesuffix(f".{TOKENS}")))
        assert count * size_of(f"w{small}") <= size_of(f"w{large}") < (count + 1) * size_of(f"w{small}")
        record = chain.records.get(ensembling.ensembles(chain.study, f"w{small}", TOKENS)[0])
        single = heavy_weight_decay.best(chain.study, f"w{large}", TOKENS)
        together = statistics.fmean(record.results["test_curve"][str(count)])
        assert case.value == pytest.approx(statistics.fmean(single.losses.values()) - together)


def test_members_that_chose_a_setting_do_not_judge_it(demo: Scale) -> None:
    """Members 0 and 1 choose: they are 0.1 better at the setting that they chose, and others are not."""
    scale = with_table(replace(demo, seeds=3), "ensembling", models=["w32"], count=5, search_members=2)
    campaign = simulate(scale, "ensembling")
    cell = ("w32", TOKENS)
    unseen = ensembling.unseen(campaign.study, *cell)
    assert [[run.init_seed for run in runs] for runs in unseen] == [[2, 3, 4]] * 2
    claims = campaign.claims("ensembling")
    caveat = "the members that chose the setting are among those judged"
    for what in ("together", "alone"):
        assert caveat not in claims[f"ensembling.tuned-{what}"].provisional
    laws = [ensembling.members_law(campaign.records.get(ensembling.as_ensemble(runs))) for runs in unseen]
    assert claims["ensembling.tuned-together"].cases[0].value == pytest.approx(laws[1].E - laws[0].E)
    few = simulate(with_table(scale, "ensembling", count=4), "ensembling")
    assert (
        ensembling.unseen(few.study, *cell) == ()
        and caveat in few.claims("ensembling")["ensembling.tuned-alone"].provisional
    )


def test_half_of_the_members_must_predict_all_better_than_no_change(chain: MadeUpCampaign) -> None:
    def claim(curve: dict[int, float]) -> Claim:
        table = {str(k): [loss] * (1 if k == len(curve) else len(curve)) for k, loss in curve.items()}
        changed = [
            replace(record, results=record.results | {"test_curve": table})
            for record in chain.records
            if isinstance(record.job, Ensemble) and len(record.job.runs) == len(curve)
        ]
        return chain.claims("ensembling", chain.records.having(changed))["ensembling.predicted"]

    count = ensembling.settings(chain.study).count
    assert claim({k: 4.0 + 0.2 / k for k in range(1, count + 1)}).holds
    flat = claim({k: 4.0 + (0.02 / k if k < count else 0.02 / (count - 1)) for k in range(1, count + 1)})
    assert not flat.holds and max(abs(case.value) for case in flat.cases) < ensembling.PREDICTED


# --- epoching and heavy decay -------------------------------------------------------------------------------------------


def test_claims_of_epoching_rest_on_every_seed_of_what_they_compare(demo: Scale) -> None:
    campaign = simulate(replace(demo, seeds=3), "epoching")
    *searches, last = campaign.rounds
    assert {run.init_seed for run in last if isinstance(run, Run)} == {1, 2}
    assert not any(run.init_seed for jobs in searches for run in jobs if isinstance(run, Run))
    claims, scale = campaign.claims("epoching"), campaign.scale
    assert [(claim.seeds, claim.provisional) for claim in claims.values()] == [(3, ())] * 2
    curve = {run.epochs: made_up_loss(run) for run in epoching.sweep(campaign.study)}
    assert claims["epoching.epochs"].value == f"{curve[max(curve)] - min(curve.values()):+.4f} nats"
    most = Point(lr=0.01, epochs=max(scale.grid.epochs), wd=scale.standard_wd)
    small, large = (made_up_loss(scale.run(model, TOKENS, most)) for model in (scale.models[0], scale.models[-1]))
    assert claims["epoching.size"].value == f"{large - small:+.4f} nats"
    assert claims["epoching.size"].holds == (large > small)
    # The made-up loss of a seed is the same shift in both settings, so the differences do not scatter.
    for claim in claims.values():
        assert claim.interval == pytest.approx((float(claim.value.split()[0]),) * 2, abs=1e-4)


def test_the_best_standard_run_is_the_lowest_of_all_sizes(chain: MadeUpCampaign) -> None:
    best = epoching.best_standard(chain.study, TOKENS)
    standard = [run for run in chain.runs if run.optimizer.wd == chain.scale.standard_wd and not run.distill]
    assert best.runs[0] == min((run for run in standard if run.init_seed == 0), key=made_up_loss)


@pytest.mark.parametrize("rounds", [0, 1, 99])
def test_the_tables_say_how_many_runs_each_search_tried(chain: MadeUpCampaign, rounds: int) -> None:
    records, scale = chain.after(rounds), chain.scale
    table = chain.report("heavy_weight_decay", records).tables[0]
    tried = {row[0]: row[table.columns.index("runs tried")] for row in table.rows}
    for model in scale.models:
        visited = heavy_weight_decay.TUNED, model, TOKENS
        runs = [scale.run(model, TOKENS, point) for point in Study(records, scale).tuned(*visited).visited]
        assert tried[model] == sum(records.get(run) is not None for run in runs)
        assert bool(tried[model]) == (rounds > 0)


def test_members_train_twice_as_long_at_half_the_decay(chain: MadeUpCampaign) -> None:
    study = chain.study
    for model in ("w32", "w64"):
        best = heavy_weight_decay.best(study, model, TOKENS).runs[0]
        point = study.tuned(heavy_weight_decay.TUNED, model, TOKENS).best
        assert point is not None
        members = ensembling.members_at(study, model, TOKENS, member_point(point))
        assert [(run.init_seed, run.order_seed) for run in members] == [(seed, seed) for seed in range(len(members))]
        assert all(study.records.get(run) for run in members)
        for run in members:
            assert (run.epochs, run.optimizer.wd) == (2 * best.epochs, best.optimizer.wd / 2)
            assert run.optimizer.lr == best.optimizer.lr


# --- laws ---------------------------------------------------------------------------------------------------------------


def test_the_standard_law_is_fitted_through_all_budgets(laws: MadeUpCampaign) -> None:
    """At a data-scaling budget only the standard recipe runs, with the sizes named for it."""
    further = {run for run in laws.runs if run.unique_tokens not in laws.scale.unique_tokens}
    assert {run.unique_tokens for run in further} == {6144, 12288, 49152}
    assert {(run.model, run.optimizer.wd) for run in further} == {("w32", laws.scale.standard_wd)}
    law = data_efficiency.standard_law(laws.study)
    assert law is not None and law.interval is not None
    assert sorted(law.x) == sorted(2 * [6144, 12288, 24576, 49152]), "both seeds of the best run of every budget"


def test_multiples_last_as_the_papers_do() -> None:
    """Its tuned multiples fall from 2.25 to 2.00 over three doublings, which it calls about constant (section 8)."""
    paper = {2.0**k: value for k, value in enumerate((2.25, 2.17, 2.09, 2.00))}
    halved = {2.0**k: 2.0**-k for k in range(4)}

    def claim(multiples: dict[float, float]) -> Claim:
        found = {
            int(1000 * d): {"tuned decay": DataEfficiency(value, 1.0, (value / 1.02, value * 1.02), False, "")}
            for d, value in multiples.items()
        }
        return data_efficiency.lasting_claims(Study(MadeUpRecords(), load_scale("demo")), found)[0]

    assert claim(paper).holds is True and claim(halved).holds is False
    assert claim(paper | {8.0: math.inf}).holds is True, "a loss below the law's limit has no multiple"


def test_the_standard_law_says_what_its_budgets_lack(laws: MadeUpCampaign) -> None:
    """Its sizes differ between budgets here, and the searches at the further budgets are undone one by one."""
    assert (
        "the standard law has other sizes at some budgets"
        in laws.claims("data_efficiency")["data-efficiency.tuned"].provisional
    )
    further = {run.name for run in laws.runs if run.unique_tokens == 49152}
    start = min(name for name in further if "-ep16-" in name and name.endswith("s0"))
    kept = [record for record in laws.records if record.job.name not in further - {start}]
    claims = laws.claims("data_efficiency", MadeUpRecords(kept))
    assert "neighbors of w32 at wd 0.1" in claims["data-efficiency.tuned"].provisional


def test_multiples_of_the_data_invert_the_standard_law(laws: MadeUpCampaign) -> None:
    section, law = laws.report("data_efficiency"), data_efficiency.standard_law(laws.study)
    claims = {claim.id.removeprefix("data-efficiency."): claim for claim in section.claims}
    assert set(claims) == {"tuned", "ensemble", "limit-k", "double-limit", "student"}
    assert law is not None and all(claim.interval for claim in claims.values())
    assert claims["double-limit"].holds is None, "four sizes have no double limit"
    losses = {
        "tuned": heavy_weight_decay.best_single(laws.study, TOKENS)[0].mean,
        "student": sum(r.test_loss for r in distillation.student_records(laws.study, "ensemble")) / 2,
    }
    for what, loss in losses.items():
        assert claims[what].value == f"{(law.A / (loss - law.E)) ** (1 / law.alpha) / TOKENS:.2f}x"
    assert "the interval is that of the law alone" in claims["student"].provisional, "two seeds have no interval"
    tables = {table.title.split(",")[0]: table for table in section.tables}
    assert [row[0] for row in tables["The standard law E + A / D^alpha"].rows] == ["E", "A", "alpha"]
    assert not any("Slowrun" in title for title in tables), "another text has another loss"
    assert draw(section) == {"data-efficiency", "loss-against-data"}


def test_several_sizes_have_a_double_limit(laws: MadeUpCampaign) -> None:
    section = laws.report("ensembling")
    claims = {claim.id: claim for claim in section.claims}
    double = claims["ensembling.double-limit"]
    assert double.holds is None and any("needs at least 6 sizes" in reason for reason in double.provisional)
    (note,) = [note for note in section.notes if "double limit of members" in note]
    assert "the limit in N of single models" in note and ": probability " in note


def test_budgets_of_the_law_need_sizes_on_the_ladder(demo: Scale) -> None:
    for settings, reason in (
        ({"data_scaling_tokens": [12288], "data_scaling_models": []}, "must be given together"),
        ({"data_scaling_tokens": [12288], "data_scaling_models": ["w7"]}, "'w7' is not on the ladder"),
    ):
        scale = with_table(demo, "epoching", **settings)
        with pytest.raises(ValueError, match=reason):
            epoching.settings(Study(MadeUpRecords(), scale))


# --- which members, which teacher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_members_take_the_setting_that_is_lower_together(demo: Scale, shift: float) -> None:
    """Where the limit of members at the best single model's setting is lower than the rule's, all members run there."""
    scale = replace(demo, seeds=2)
    at_single_point = simulate(scale, "heavy_weight_decay").study
    single = ensembling.single_point_ensembles(at_single_point, TOKENS).values()

    def record_of(job, records):  # type: ignore[no-untyped-def]
        record = made_up_record(job, records)
        if job not in single:
            return record
        curve = {k: [loss + shift for loss in losses] for k, losses in record.results["curve"].items()}
        return replace(record, results=record.results | {"loss": record.loss + shift, "curve": curve})

    study = simulate(scale, "ensembling", record_of=record_of).study
    best = study.tuned(heavy_weight_decay.TUNED, "w64", TOKENS).best
    assert best is not None
    assert ensembling.best_point(study, "w64", TOKENS) == (best if shift < 0 else member_point(best))
    members = ensembling.members(study, "w64", TOKENS)
    assert len(members) == demo.tables["ensembling"]["count"] and all(study.records.get(run) for run in members)


@pytest.mark.parametrize("best", ["w32", "w64"])
def test_students_learn_from_the_best_ensemble_of_any_size(demo: Scale, best: str) -> None:
    def record_of(job, records):  # type: ignore[no-untyped-def]
        record = made_up_record(job, records)
        better = isinstance(job, Ensemble) and job.name.startswith(best)
        return replace(record, results=record.results | {"loss": 1.0}) if better else record

    campaign = simulate(with_table(demo, "ensembling", models=["w32", "w64"]), "ensembling", record_of=record_of)
    wd = demo.tables["distillation"]["wd"]
    samples, student = distillation.student(campaign.study, "ensemble", wd)
    assert isinstance(samples, Samples) and samples.source.startswith(f"{best}-")
    assert student.model == demo.tables["distillation"]["model"]  # type: ignore[union-attr]
    unfinished = MadeUpRecords(r for r in campaign.records if not r.job.name.endswith("-probs"))
    assert distillation.student(Study(unfinished, campaign.scale), "ensemble", wd) == (), "an ensemble has yet to run"


def test_the_rule_is_judged_by_limits(chain: MadeUpCampaign) -> None:
    """By quadratics in 1 / K through the losses of all members at both settings."""
    study, claim = chain.study, chain.claims("ensembling")["ensembling.rule"]
    best = study.tuned(heavy_weight_decay.TUNED, "w64", TOKENS).best
    assert best is not None
    limits = []
    for point in (best, member_point(best)):
        record = study.records.get(ensembling.ensembles_at(study, "w64", TOKENS, point)[0])
        assert record is not None
        curve = {int(k): statistics.fmean(losses) for k, losses in record.results["curve"].items()}
        limits.append(np.polyfit([1 / k for k in curve], list(curve.values()), 2)[-1])
    (case,) = [case for case in claim.cases if case.name == f"w64.{TOKENS}"]
    assert case.value == pytest.approx(limits[0] - limits[1], abs=1e-6) and claim.holds is False


def test_all_members_are_predicted_from_fewer(chain: MadeUpCampaign) -> None:
    """Made-up curves fall like 1 / K, with a scatter of 0.003."""
    claim = chain.claims("ensembling")["ensembling.predicted"]
    assert claim.holds == all(abs(case.value) <= ensembling.PREDICTED for case in claim.cases)
    assert len(claim.cases) == 2 * len(AVERAGES) and max(abs(case.value) for case in claim.cases) < 0.05


def test_a_student_is_compared_with_its_teacher_over_all_seeds(chain: MadeUpCampaign) -> None:
    study, claims = chain.study, chain.claims("distillation")
    students = distillation.student_records(study, "self")
    assert [record.job.init_seed for record in students] == list(range(chain.scale.seeds))  # type: ignore[union-attr]
    members = [study.records.get(run) for run in ensembling.members(study, "w64", TOKENS)]
    alike = statistics.fmean(record.loss for record in members if record)
    mean = sum(record.loss for record in students) / len(students)
    claim = claims["distillation.beats-teacher"]
    assert claim.value.startswith(f"{alike - mean:+.4f} nats")
    assert (claim.seeds, claim.provisional) == (
        chain.scale.seeds,
        ("at the end of the grid: w64 (wd)", "the student is not tuned", "one teacher"),
    )
    for what in ("student-of-ensemble", "student-of-self", "beats-teacher"):
        interval = claims[f"distillation.{what}"].interval
        assert interval is not None and interval[0] < interval[1]
    assert all(math.isfinite(record.loss) for record in students)
