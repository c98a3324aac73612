"""Recipes as pure functions of the records: whole campaigns with made-up losses, and reports at every stage."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from epochal.campaign.plan import (
    AssumeAllDone,
    campaign_jobs,
    cost_estimate,
    flops_of,
    load_recipe,
    ready_jobs,
    recipe_names,
)
from epochal.models.config import parameter_counts
from epochal.records import Record, Records, Workspace, load_records, write_record
from epochal.report.sections import Section
from epochal.report.write import write_report
from epochal.run import (
    Ensemble,
    Fira,
    Job,
    Muon,
    Run,
    Samples,
    SoftTargetDistillation,
    Spectra,
    Targets,
    fingerprint,
    inputs,
)
from epochal.scale import Ablations, Comparison, Kinds, Limits, Point, Scale, Setting, Soft, load_scale, member_point
from recipes import _kinds, _member_claims, _students, heavy_weight_decay

ROOT = Path(__file__).resolve().parents[1]
SCALES = sorted(path.stem for path in (ROOT / "configs" / "scales").glob("*.toml"))
CHAIN = ("epoching", "heavy_weight_decay", "ensembling", "distillation")
SIZES = {"w10": 2e4, "w16": 4e4, "w32": 1e5, "w64": 3e5, "w96": 6e5, "w128": 1.2e6}


def made_up_loss(job: Run) -> float:
    """Loss in nats that falls with size at the right decay and rises past it: a bowl around tau = 0.35 epochs."""
    size = SIZES[job.model]
    window = math.log(job.tau / 0.35) if math.isfinite(job.tau) else 4.0
    epochs = math.log2(job.epochs / 16)
    gain = 0.3 if job.distill else 0.0
    gain -= 20 * job.unique_tokens**-0.4  # more text is better
    return 4.0 + 30 * size**-0.4 + 0.02 * window**2 * size**0.1 + 0.03 * epochs**2 - gain + 0.001 * job.init_seed


def made_up_record(job: Job, records: Records) -> Record:
    match job:
        case Run():
            loss = made_up_loss(job)
            results = {"loss": loss, "test_loss": loss + 0.01, "parameters": int(SIZES[job.model]), "steps": job.steps}
        case Samples():
            results = {"tokens": job.tokens, "texts": 5, "members": 1}
        case Targets():
            results = {"positions": job.unique_tokens, "kept_mass": 0.7, "bytes": 9, "members": 1}
        case Ensemble():
            found = [records.named(name) for name in job.runs]
            losses = [member.loss for member in found if member is not None]
            assert len(losses) == len(job.runs)
            mean, count = sum(losses) / len(losses), len(losses)
            curve = {
                k: [mean - 0.3 * (1 - 1 / k) + 0.003 * math.sin(7 * k + len(job.name))] * (1 if k == count else count)
                for k in range(1, count + 1)
            }
            results = {
                "loss": curve[count][0],
                "curve": {str(k): values for k, values in curve.items()},
                "members": count,
                "parameters": sum(int(member.results["parameters"]) for member in found if member is not None),
            }
            runs = [member.job for member in found if member is not None and isinstance(member.job, Run)]
            if runs[0].holdout_tokens and job.member_weights is None and count == 3:
                results["holdout"] = {"weights": [0.5, 0.3, 0.2], "selected": [0, 2]}
    return Record(job, fingerprint(job), "done", results)


def finish(workspace: Workspace, job: Job, records: Records) -> None:
    """Leave what a worker leaves: a record and an output."""
    write_record(workspace, made_up_record(job, records))
    output = workspace.output(job)
    if output is not None:
        output.mkdir(parents=True) if isinstance(job, Run | Targets) else output.parent.mkdir(parents=True)
        if isinstance(job, Samples):
            output.touch()


def simulate(workspace: Workspace, recipe: str, scale: Scale) -> Iterator[list[Job]]:
    """Run the loop of the executor without training; yields what each turn did."""
    plan = load_recipe(recipe).plan
    for _ in range(200):
        records = load_records(workspace)
        ready = plan(records, scale)
        if not ready:
            return
        for job in ready:
            finish(workspace, job, records)
        yield ready
    raise AssertionError("the campaign does not end")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace("demo", tmp_path / "results", tmp_path / "work")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_claims(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.__doc__ is not None
    assert "Claim: " in recipe.__doc__
    assert "Command: epochal run " in recipe.__doc__
    assert callable(recipe.plan)
    assert callable(recipe.report)


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'ensembles' \(did you mean 'ensembling'\?\)"):
        load_recipe("ensembles")


@pytest.mark.parametrize("recipe", CHAIN)
def test_plan_is_pure(workspace: Workspace, recipe: str) -> None:
    scale = load_scale("demo")
    records = Records(workspace)
    first, second = (load_recipe(recipe).plan(records, scale) for _ in range(2))
    assert first == second
    assert first
    assert all(isinstance(job, Run) for job in first)
    assert len({job.name for job in first}) == len(first)
    assert not workspace.results.exists()
    assert not workspace.work.exists()


def test_a_whole_campaign_at_demo_scale(workspace: Workspace) -> None:
    scale = load_scale("demo")
    turns = list(simulate(workspace, "distillation", scale))
    done = [job for turn in turns for job in turn]
    assert len({job.name for job in done}) == len(done), "a job was asked for twice"
    kinds = [{type(job) for job in turn} for turn in turns]
    assert Ensemble not in kinds[0]
    assert Samples not in kinds[0]
    students = [job for job in turns[-1] if isinstance(job, Run)]
    assert [job.distill is not None for job in students] == [True] * len(students)
    assert len([job for job in done if isinstance(job, Ensemble)]) == 2 * len(scale.ensemble.models)

    records = load_records(workspace)
    assert len(records) == len(done)
    view = cost_estimate(CHAIN, records, scale)
    assert view.today.jobs == 0
    assert view.later.jobs == 0
    assert len(view.status.done) == len(done)


def test_another_first_seed_repeats_the_campaign_on_other_draws(workspace: Workspace, tmp_path: Path) -> None:
    scale = replace(with_kinds(), students=replace(load_scale("demo").students, model="w32"), epoching="")
    scale = replace(
        scale, ladder=tuple(rung for rung in scale.ladder if rung.model == "w32"), law_tokens=(), law_models=()
    )
    again = Workspace("again", tmp_path / "results", tmp_path / "again")
    first = [job for turn in simulate(workspace, "distillation", scale) for job in turn]
    second = [job for turn in simulate(again, "distillation", replace(scale, first_seed=100)) for job in turn]
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        if isinstance(one, Run) and isinstance(other, Run):
            assert (other.init_seed, other.order_seed) == (one.init_seed + 100, one.order_seed + 100)
            assert replace(
                other, name="x", init_seed=0, order_seed=0, init_from=None, teach=None, distill=None
            ) == replace(one, name="x", init_seed=0, order_seed=0, init_from=None, teach=None, distill=None)
        assert one.name == other.name or fingerprint(one) != fingerprint(other)
    assert not {fingerprint(job) for job in first} & {fingerprint(job) for job in second if isinstance(job, Run)}


def test_claims_of_epoching_rest_on_every_seed_of_what_they_compare(workspace: Workspace) -> None:
    scale, recipe = replace(load_scale("demo"), seeds=3, law_tokens=(), law_models=()), load_recipe("epoching")
    turns = list(simulate(workspace, "epoching", scale))
    late = [job for job in turns[-1] if isinstance(job, Run)]
    assert {run.init_seed for run in late} == {1, 2} and len(late) == 6, "four settings, of which both claims share one"
    assert not any(run.init_seed for turn in turns[:-1] for run in turn if isinstance(run, Run))
    claims = recipe.report(load_records(workspace), scale).claims
    assert [(claim.seeds, claim.provisional) for claim in claims] == [(3, ()), (3, ())]
    curve = {run.epochs: made_up_loss(run) for run in recipe.sweep(scale)}
    assert claims[0].value == f"{curve[max(curve)] - min(curve.values()):+.4f} nats"
    at_most = Point(lr=scale.ladder[0].lr or 0.0, epochs=int(claims[1].text.split()[2]), wd=scale.standard_wd)
    small, large = (made_up_loss(scale.run(rung.model, 24576, at_most)) for rung in (scale.ladder[0], scale.ladder[-1]))
    assert claims[1].value == f"{large - small:+.4f} nats" and claims[1].holds == (large > small)
    # the made-up loss of a seed is the same shift in both settings, so the differences do not scatter
    assert all(claim.interval == pytest.approx((float(claim.value.split()[0]),) * 2, abs=1e-4) for claim in claims)
    records = load_records(workspace)
    best = recipe.best_records(records, scale, scale.unique_tokens[0])
    assert best and best[0].loss == recipe.best_standard(records, scale, scale.unique_tokens[0])[0]


def test_the_tables_say_how_many_runs_each_search_tried(workspace: Workspace) -> None:
    scale, recipe = load_scale("demo"), load_recipe("heavy_weight_decay")
    first = recipe.plan(Records(workspace), scale)
    for job in first[: len(first) // 2]:
        finish(workspace, job, Records(workspace))
    for records in (
        load_records(workspace),
        [*simulate(workspace, "heavy_weight_decay", scale)] and load_records(workspace),
    ):
        table = recipe.report(records, scale).tables[0]
        tried = dict(
            zip(
                [row[0] for row in table.rows],
                [row[table.columns.index("runs tried")] for row in table.rows],
                strict=True,
            )
        )
        for rung in scale.ladder:
            asked = recipe.tuned(records, scale, rung.model, scale.unique_tokens[0]).visited
            runs = [scale.run(rung.model, scale.unique_tokens[0], point) for point in asked]
            assert tried[rung.model] == sum(records.get(run) is not None for run in runs)
            assert tried[rung.model] or len(records) < len(first)


def test_members_train_twice_as_long_at_half_the_decay(workspace: Workspace) -> None:
    scale = load_scale("demo")
    list(simulate(workspace, "ensembling", scale))
    records = load_records(workspace)
    model, tokens = scale.ensemble.models[0], scale.unique_tokens[0]
    best = load_recipe("heavy_weight_decay").best_records(records, scale, model, tokens)[0].job
    members = load_recipe("ensembling").members(records, scale, model, tokens)
    assert len(members) == scale.ensemble.count
    for seed, member in enumerate(members):
        assert (member.epochs, member.optimizer.wd) == (2 * best.epochs, best.optimizer.wd / 2)
        assert member.optimizer.lr == best.optimizer.lr
        assert (member.init_seed, member.order_seed) == (seed, seed)


def test_reports_at_every_stage(workspace: Workspace) -> None:
    scale = load_scale("demo")
    recipes = [load_recipe(name) for name in CHAIN]
    turns = 0
    for _ in [None, *simulate(workspace, "distillation", scale)]:
        sections = [recipe.report(load_records(workspace), scale) for recipe in recipes]
        assert all(isinstance(section, Section) for section in sections)
        figures = [figure.name for section in sections for figure in section.figures]
        assert len(set(figures)) == len(figures)
        turns += 1
    assert turns > 4
    for section in sections:
        assert section.claims, section.title
        assert section.tables
        assert section.figures
        for claim in section.claims:
            assert claim.value
            assert "one seed" in claim.provisional or claim.seeds > 1 or scale.seeds > 1, claim.text


def test_a_report_of_half_a_turn_calls_claims_provisional(workspace: Workspace) -> None:
    scale = load_scale("demo")
    records = load_records(workspace)
    jobs = load_recipe("heavy_weight_decay").plan(records, scale)
    for job in jobs[::2]:
        finish(workspace, job, records)
    records = load_records(workspace)
    for name in CHAIN:
        section = load_recipe(name).report(records, scale)
        assert all(claim.provisional for claim in section.claims), name


def test_diverged_runs_are_no_obstacle(workspace: Workspace) -> None:
    scale = load_scale("demo")
    for job in load_recipe("epoching").plan(Records(workspace), scale):
        write_record(workspace, Record(job, fingerprint(job), "diverged", {"loss": None, "parameters": 9}))
    for name in CHAIN:
        assert isinstance(load_recipe(name).report(load_records(workspace), scale), Section)


def test_one_name_cannot_mean_two_things(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = load_scale("demo")
    recipe = load_recipe("distillation")
    other = [scale.run("w16", scale.unique_tokens[0], point) for point in ()]
    first = load_recipe("epoching").jobs(Records(workspace), scale)[0]
    assert isinstance(first, Run)
    twin = Ensemble(name=first.name, runs=("a",), average="logits")
    monkeypatch.setattr(recipe, "jobs", lambda *_: [*other, twin])
    with pytest.raises(ValueError, match="means two things"):
        campaign_jobs(["epoching", "distillation"], Records(workspace), scale)


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_loads_and_is_priced_in_a_second(name: str, tmp_path: Path) -> None:
    scale = load_scale(name)
    assert scale.name == name
    records = Records(Workspace(name, tmp_path / "results", tmp_path / "work"))
    started = time.process_time()
    view = cost_estimate(recipe_names(), records, scale)
    assert time.process_time() - started < 1.0
    assert view.today.flops > 0
    assert view.later.jobs > 0
    assert not ready_jobs([], records)


def test_several_budgets_and_sizes_get_their_laws(workspace: Workspace, tmp_path: Path) -> None:
    """With four budgets and four ensembled sizes there are data-efficiency multiples and a double limit."""
    scale = replace(load_scale("micro"), seeds=2, kinds=None, soft=None)
    four = replace(scale.ensemble, models=tuple(rung.model for rung in scale.ladder))
    scale = replace(scale, ensemble=four)
    for _ in simulate(workspace, "data_efficiency", scale):
        pass
    records = load_records(workspace)
    sections = {name: load_recipe(name).report(records, scale) for name in ("ensembling", "data_efficiency")}
    assert any("double limit" in claim.text for claim in sections["ensembling"].claims)
    told = [note for note in sections["ensembling"].notes if "double limit of members" in note]
    assert len(told) == len(scale.unique_tokens) and all("the limit in N of single models" in note for note in told)
    assert all(": probability " in note for note in told)
    law = load_recipe("data_efficiency").standard_law(records, scale)
    assert sorted(law.x) == sorted(2 * scale.unique_tokens)  # the best standard run of every budget has both seeds
    assert law.interval is not None
    tokens = scale.unique_tokens[0]
    multiples = {claim.text: claim for claim in sections["data_efficiency"].claims}
    found = [
        next(text for text in multiples if what in text) for what in ("tuned decay", "ensemble of", "its limit in K")
    ]
    found += [next(text for text in multiples if what in text) for what in ("limit in K and N", "student")]
    assert all(multiples[text].interval is not None for text in found)
    tuned = load_recipe("heavy_weight_decay").best_single(records, scale, tokens)[0]
    assert multiples[found[0]].value == f"{(law.A / (tuned - law.E)) ** (1 / law.alpha) / tokens:.2f}x"
    assert multiples[found[-1]].provisional == (), "students of two seeds have an interval of their own"
    tables = {table.title.split(",")[0]: table for table in sections["data_efficiency"].tables}
    assert [row[0] for row in tables["The standard law E + A / D^alpha"].rows] == ["E", "A", "alpha"]
    assert not any("Slowrun" in title for title in tables)  # another text, another loss
    write_report(list(sections.values()), tmp_path / "report", title="made up")
    assert {path.stem for path in (tmp_path / "report" / "figures").glob("*.svg")} >= {
        "data-efficiency",
        "loss-against-data",
    }


def test_law_budgets_give_the_standard_law_its_points(workspace: Workspace) -> None:
    """At a law budget only the standard recipe runs, with the sizes named for it; the law is fitted through all."""
    base = replace(load_scale("demo"), law_tokens=(), law_models=())
    scale = replace(base, law_tokens=(12288, 49152), law_models=("w32",))
    for _ in simulate(workspace, "data_efficiency", scale):
        pass
    records = load_records(workspace)
    elsewhere = [r.job for r in records if isinstance(r.job, Run) and r.job.unique_tokens not in scale.unique_tokens]
    assert {run.unique_tokens for run in elsewhere} == {12288, 49152}
    assert {(run.model, run.optimizer.wd) for run in elsewhere} == {("w32", scale.standard_wd)}
    law = load_recipe("data_efficiency").standard_law(records, scale)
    assert sorted(law.x) == [12288, 24576, 49152]
    with pytest.raises(ValueError, match="go together"):
        replace(base, law_tokens=(12288,))
    with pytest.raises(ValueError, match="not on the ladder"):
        replace(base, law_tokens=(12288,), law_models=("w7",))


# --- optimizers -----------------------------------------------------------------------------------------------------


def comparing(seeds: int = 3) -> Scale:
    rates = (0.003, 0.01, 0.03)
    settings = (
        Setting(name="once", tokens=49152, epochs=1, lr=rates, wd=(0.1,)),
        Setting(name="repeated", tokens=24576, epochs=16, lr=rates, wd=(0.8, 3.2)),
    )
    comparison = Comparison(model="w32", settings=settings, seeds=seeds, clip=3.0)
    return replace(load_scale("demo"), optimizers=comparison)


def test_every_optimizer_is_tuned_alike_and_gets_its_seeds_at_the_optimum(workspace: Workspace) -> None:
    scale, recipe = comparing(), load_recipe("optimizers")
    turns = list(simulate(workspace, "optimizers", scale))
    assert [len(turn) for turn in turns] == [11 * (3 + 6), 2 * 11 * 2]
    for setting in scale.optimizers.settings if scale.optimizers else ():
        products = []
        for entry in recipe.ENTRIES:
            runs = [recipe.run_at(scale, setting, entry, point) for point in recipe.grid(scale, setting, entry)]
            products.append([pytest.approx(run.optimizer.lr * run.optimizer.wd) for run in runs])
            assert len({run.optimizer.lr for run in runs}) == 3
            assert {(run.unique_tokens, run.epochs) for run in runs} == {(setting.tokens, setting.epochs)}
            best = min(runs, key=made_up_loss)
            found = recipe.best_records(load_records(workspace), scale, setting, entry)
            assert sorted(found) == [0, 1, 2]
            assert all(record.job.optimizer == best.optimizer for record in found.values())
        assert all(row == [item.expected for item in products[0]] for row in products)
    # AdamW's runs are those of the other recipes: a record serves both.
    assert recipe.run_at(scale, setting, recipe.ENTRIES[0], recipe.grid(scale, setting, recipe.ENTRIES[0])[0]) in [
        scale.run("w32", 24576, point) for point in recipe.grid(scale, setting, recipe.ENTRIES[0])
    ]


def test_optimizers_report_paired_differences_with_intervals(workspace: Workspace, tmp_path: Path) -> None:
    scale, recipe = comparing(), load_recipe("optimizers")
    for _ in simulate(workspace, "optimizers", scale):
        pass
    # SPECTRA-AdamW better by 0.03, 0.02 and 0.04 than AdamW in the first setting; the truth is then known.
    setting = scale.optimizers.settings[0] if scale.optimizers else None
    records = load_records(workspace)
    entries = {entry.name: entry for entry in recipe.ENTRIES}
    base = recipe.best_records(records, scale, setting, entries["AdamW"])
    clipped = recipe.best_records(records, scale, setting, entries["SPECTRA-AdamW"])
    for seed, gain in enumerate((0.03, 0.02, 0.04)):
        results = {
            **clipped[seed].results,
            "loss": base[seed].loss - gain,
            "spectral_norms": {"q_proj": 2.0, "lm_head": 9.0},
        }
        provenance = {"state_bytes": 8 * results["parameters"], "optimizer_share": 0.25}
        write_record(workspace, replace(clipped[seed], results=results, provenance=provenance))
        for name, state, share, norm in (("AdamW", 8, 0.1, 3.0), ("Fira", 6, 0.1, 3.0)):
            record = recipe.best_records(records, scale, setting, entries[name])[seed]
            measured = {"state_bytes": state * record.results["parameters"], "optimizer_share": share}
            found = record.results | {"spectral_norms": {"q_proj": norm}}
            write_record(workspace, replace(record, results=found, provenance=measured))
    section = recipe.report(load_records(workspace), scale)
    claims = {claim.text: claim for claim in section.claims}
    claim = claims["one pass over 49,152 tokens: SPECTRA-AdamW has a lower loss than AdamW"]
    assert (claim.value, claim.holds, claim.seeds) == ("+0.0300 nats", True, 3)
    assert claim.interval == pytest.approx((0.03 - 2.92 * 0.01 / 3**0.5, 0.03 + 2.92 * 0.01 / 3**0.5), rel=1e-4)
    assert "780M" in claim.paper and not any("noise" in reason for reason in claim.provisional)
    other = claims["16 epochs over 24,576 tokens: SPECTRA-AdamW has a lower loss than AdamW"]
    assert other.paper == "" and other.value == "+0.0000 nats" and "within noise" in other.provisional
    state = next(claim for text, claim in claims.items() if "optimizer state is smaller" in text)
    assert (state.value, state.holds) == ("1.50 against 2.00 times the weights", True)
    weights = next(claim for text, claim in claims.items() if "smaller weights than AdamW" in text)
    assert (weights.value, weights.holds) == ("2.00 against 3.00", True)
    slower = claims["SPECTRA adds little to AdamW's step"]  # 1 / 0.75 over 1 / 0.9
    assert slower.value.startswith("+20.0% of a step") and slower.untestable
    row = next(row for row in section.tables[0].rows if row[0] == "SPECTRA-AdamW")
    cells = dict(zip(section.tables[0].columns, row, strict=True))
    assert (cells["seeds"], cells["state"], cells["share"], cells["norm"]) == (3, 2.0, "25%", 2.0)
    assert [row[-2] for row in section.tables[0].rows] == [3] * 11, "every optimizer was tried as often"
    assert [row[-2] for row in section.tables[1].rows] == [6] * 11
    write_report([section], tmp_path / "report", title="made up")
    drawn = {path.stem for path in (tmp_path / "report" / "figures").glob("*.svg")}
    assert drawn == {"optimizers-once", "optimizers-repeated"}


def test_optimizers_report_at_every_stage_and_without_a_comparison(workspace: Workspace) -> None:
    scale, recipe = comparing(), load_recipe("optimizers")
    empty = recipe.report(Records(workspace), load_scale("demo"))
    assert recipe.jobs(Records(workspace), load_scale("demo")) == [] and empty.claims == ()
    for job in recipe.plan(Records(workspace), scale)[::2]:
        finish(workspace, job, Records(workspace))
    half = recipe.report(load_records(workspace), scale)
    assert len(half.tables) == 2 and half.claims == ()
    for job in recipe.plan(load_records(workspace), scale):
        write_record(workspace, Record(job, fingerprint(job), "diverged", {"loss": None, "parameters": 9}))
    assert all(claim.provisional for claim in recipe.report(load_records(workspace), scale).claims)


def judged(workspace: Workspace, loss_of: Callable[[Run], float]) -> Records:
    """Give every run on record another loss."""
    records = load_records(workspace)
    for record in list(records):
        if isinstance(record.job, Run):
            write_record(workspace, replace(record, results=record.results | {"loss": loss_of(record.job)}))
    return load_records(workspace)


def test_ablations_change_one_thing_at_the_optimum(workspace: Workspace) -> None:
    plan_of = Ablations(clips=(0.3, 1.5, 6.0), iterations=(5,), ranks=(1, 4))
    scale, recipe = replace(comparing(), ablations=plan_of), load_recipe("ablations")
    turns = list(simulate(workspace, "ablations", scale))
    assert [len(turn) for turn in turns] == [2 * 3, 2 * 2 + 8 * 3], (
        "two grids; then seeds at both optima and eight changes"
    )
    setting, records = recipe.setting_of(scale), load_records(workspace)
    for change in recipe.changes(plan_of):
        plain = recipe.optimizers.best_records(records, scale, setting, recipe.optimizers.entry_of(change.of))
        for seed, run in recipe.changed_runs(records, scale, change).items():
            there = replace(run, name="same", optimizer=plain[seed].job.optimizer)
            assert there == replace(plain[seed].job, name="same"), "nothing but the optimizer differs"
            different = [
                field.name
                for field in fields(run.optimizer)
                if getattr(run.optimizer, field.name) != getattr(plain[seed].job.optimizer, field.name)
            ]
            assert different == [change.field]
        best_lr = plain[0].job.optimizer.lr

    def loss(run: Run) -> float:
        # away from the tuned learning rate everything is worse, so that the optimum stays where it was
        optimizer, noise = run.optimizer, 0.001 * run.init_seed + abs(math.log(run.optimizer.lr / best_lr))
        if isinstance(optimizer, Spectra):
            return 4.0 + noise + (0.05 if optimizer.clip < 1 else 0.0) + (0.002 if optimizer.iterations else 0.0)
        assert isinstance(optimizer, Fira)
        worse = 0.03 * (optimizer.gamma is None) - 0.01 * (optimizer.scaling == "matrix")
        return 4.1 + noise + worse + {1: 0.2, 4: 0.1}.get(optimizer.rank or 0, 0.0)

    claims = {claim.text: claim for claim in recipe.report(judged(workspace, loss), scale).claims}
    threshold = claims["SPECTRA-AdamW: thresholds from 1.5 to 6 differ by less than half of what 0.3 loses"]
    assert (threshold.value, threshold.holds) == ("0.0000 against +0.0500 nats", True)
    steps = next(claim for text, claim in claims.items() if "rougher steps" in text)
    assert (steps.value, steps.holds, steps.seeds) == ("5 steps +0.0020 nats", True, 3)
    limiter, matrix = (
        claims["Fira: no limiter raises the loss"],
        claims["Fira: one factor for a matrix raises the loss"],
    )
    assert (limiter.value, limiter.holds, limiter.provisional) == ("+0.0300 nats", True, ())
    assert (matrix.value, matrix.holds) == ("-0.0100 nats", False)
    rank = claims["Fira: a higher rank lowers the loss (ranks 1, 4)"]
    assert (rank.value, rank.holds) == ("4.3010 > 4.2010", True)


def test_ablations_and_limits_are_silent_without_their_tables(workspace: Workspace) -> None:
    for name in ("ablations", "limits"):
        recipe = load_recipe(name)
        assert recipe.jobs(Records(workspace), comparing()) == []
        assert recipe.report(Records(workspace), comparing()).claims == ()
    with pytest.raises(ValueError, match=r"add that table"):
        replace(comparing(), optimizers=None, ablations=Ablations())


def test_limits_compare_optimizers_at_every_size_and_as_members(workspace: Workspace) -> None:
    wanted = Limits(optimizers=("AdamW", "Muon"), models=("w16", "w32", "w64"), members=6, group=3)
    scale, recipe = replace(comparing(), limits=wanted), load_recipe("limits")
    turns = list(simulate(workspace, "limits", scale))
    jobs = [job for turn in turns for job in turn]
    assert len(turns[0]) == 2 * 3 * 6, "two optimizers, three sizes, six points"
    tuned_muon = recipe.optimizers.tuned(
        load_records(workspace), scale, recipe.setting_of(scale), recipe.optimizers.entry_of("Muon")
    )
    groups = [job for job in jobs if isinstance(job, Ensemble)]
    assert len(groups) == 2 * (2 + 3 * 2), "two averages of all members; three kinds in two groups each"
    members = {job.name: job for job in jobs if isinstance(job, Run)}
    for group in groups:
        for run in (members[name] for name in group.runs):
            epochs = 24 if "chain" in run.name and run.teach else 32
            assert (run.model, run.epochs) == ("w32", epochs)
            if isinstance(run.optimizer, Muon):
                assert run.optimizer.wd == tuned_muon.wd / 2

    def loss(run: Run) -> float:
        gain = {"w16": 0.01, "w32": 0.02, "w64": 0.03}[run.model] if isinstance(run.optimizer, Muon) else 0.0
        return made_up_loss(run) - gain

    section = recipe.report(judged(workspace, loss), scale)
    claims = {claim.text: claim for claim in section.claims}
    below = claims["Muon is lower than AdamW at every size (w16, w32, w64), tuned alike on repeated text"]
    assert (below.value, below.holds, below.seeds) == ("w16 +0.0100, w32 +0.0200, w64 +0.0300 nats", True, 3)
    lasts = claims["what Muon gains over AdamW does not shrink from w16 to w64"]
    assert (lasts.value, lasts.holds) == ("+0.0200 nats", True)
    same = claims["Muon has its lowest loss at the decay at which AdamW has it"]
    assert same.holds is True
    assert any("cannot bear a law in N" in note for note in section.notes)
    assert len([text for text in claims if "gains on the mean of logits" in text]) == 2
    loss_of = {record.job.name: record for record in load_records(workspace) if isinstance(record.job, Ensemble)}
    for name in wanted.optimizers:
        averaged = {
            job.average: loss_of[job.name].results["curve"] for job in groups if f"limits-{name.lower()}-" in job.name
        }
        first, last = (
            sum(averaged["logits"][k]) / len(averaged["logits"][k])
            - sum(averaged["probs"][k]) / len(averaged["probs"][k])
            for k in ("2", "6")
        )
        claim = claims[f"w32 members with {name}: the mean of probabilities gains on the mean of logits as K grows"]
        assert claim.value == f"{first:+.4f} nats at K = 2, {last:+.4f} at K = 6" and claim.holds == (last > first)
    member = recipe.independent(load_records(workspace), scale, "Muon")
    losses = {
        kind: [loss_of[recipe.grouped(member, scale, kind, seed).name].loss for seed in (0, 1)]
        for kind in ("independent", "chain")
    }
    gain = (sum(losses["independent"]) - sum(losses["chain"])) / 2
    (chain,) = [claim for text, claim in claims.items() if "with Muon at equal" in text and "chain" in text]
    assert chain.value == f"{gain:+.4f} nats" and chain.holds == (gain > 0)
    assert len([text for text in claims if "equal training cost" in text]) == 4
    assert [len(table.rows) for table in section.tables] == [6, 4, 6]


def test_continued_runs_start_from_the_tuned_base(workspace: Workspace) -> None:
    scale = replace(load_scale("micro"), unique_tokens=(24576,), seeds=1)
    recipe, settings = load_recipe("continued"), scale.continued
    assert settings is not None
    assert recipe.base_of(load_records(workspace), scale, settings) is None, "nothing starts before the base is tuned"
    turns = list(simulate(workspace, "continued", scale))
    records = load_records(workspace)
    tuned = load_recipe("heavy_weight_decay").best_records(records, scale, "w64", 24576)[0]
    later = [job for turn in turns for job in turn if isinstance(job, Run) and job.data == settings.data]
    assert {run.init_from for run in later} == {tuned.job.name}
    assert {(run.batch_size, run.epochs) for run in later} == {(32, 1), (4, 1), (4, 4)}
    assert {run.unique_tokens for run in later if run.batch_size == 32} == {24576, *settings.more_tokens}
    assert len({run.order_seed for run in later if run.epochs == 4}) == settings.members
    judged = [job for turn in turns for job in turn if isinstance(job, Ensemble) and job.data is not None]
    assert {job.data for job in judged} == {scale.data}
    assert {job.average for job in judged if len(job.runs) > 1} == {"logits", "probs", "parameters"}

    section = recipe.report(records, scale)
    assert [len(table.rows) for table in section.tables] == [6]
    assert all(row[-1] is not None for row in section.tables[0].rows)
    assert len(section.claims) == 5
    step = next(claim for claim in section.claims if "repeated beats" in claim.text)
    losses = [records.get(run).loss for run in recipe.steps(scale, settings, tuned.job.name)]
    assert step.value == f"{losses[1] - losses[2]:+.4f} nats"
    assert step.holds == (losses[2] < losses[1])


def test_the_papers_continued_setting_is_priced(workspace: Workspace) -> None:
    """Eight members of 4 x 4.19e9 tokens and one pass over 73.4e9 dominate: 6 N tokens for N = 3.21e9."""
    view = cost_estimate(["continued"], Records(workspace), load_scale("paper-math"))
    tokens = 4194304000 * (1 + 1 + 8 * 4) + 73400320000
    assert view.today.flops == pytest.approx(6 * 3_212_749_824 * tokens)


# --- kinds of members -------------------------------------------------------------------------------------------------


def with_kinds(seeds: int = 2) -> Scale:
    kinds = Kinds(model="w32", count=3, seeds=seeds, holdout_tokens=2048)
    scale = load_scale("demo")
    return replace(scale, ensemble=replace(scale.ensemble, models=("w32",)), kinds=kinds)


def test_kinds_of_members_differ_in_what_they_say_and_cost_the_same(workspace: Workspace) -> None:
    scale = with_kinds()
    assert scale.kinds is not None
    point = Point(lr=0.01, epochs=32, wd=0.8)
    arms = {kind: _kinds.members(scale.kinds, _kinds.plain(scale, point), kind, 1) for kind in _kinds.TRAINED}
    assert len({run.name for runs in arms.values() for run in runs}) == 3 * len(arms)
    seeds = {kind: [(run.init_seed, run.order_seed) for run in runs] for kind, runs in arms.items()}
    assert seeds["independent"] == [(3, 3), (4, 4), (5, 5)]
    assert seeds["init"] == [(3, 3), (4, 3), (5, 3)]
    assert seeds["order"] == [(3, 3), (3, 4), (3, 5)]
    snapshots = arms["snapshot"]
    assert [run.init_from for run in snapshots] == [None, snapshots[0].name, snapshots[1].name]
    assert {run.wd_schedule for run in snapshots} == {"antiphase"}
    assert len({run.order_seed for run in snapshots}) == 3
    chain = arms["chain"]
    assert [run.teach.source if run.teach else None for run in chain] == [None, chain[0].name, chain[1].name]
    assert [run.epochs for run in chain] == [32, 24, 24]
    assert {run.weight_averaging for run in arms["ema"]} == {"ema"} and {
        run.weight_averaging for run in arms["swa"]
    } == {"swa"}
    assert {run.dropout for run in arms["dropout"]} == {0.1}
    assert {(run.input_mask_prob, run.epochs) for run in arms["masked"]} == {(0.5, 16)}
    costs = {kind: _kinds.cost(runs) / _kinds.cost(arms["independent"]) for kind, runs in arms.items()}
    named = {run.name: run for runs in arms.values() for run in runs}
    flops = {kind: sum(flops_of(run, jobs=named) for run in runs) for kind, runs in arms.items()}  # what `plan` prices
    assert flops["masked"] == flops["independent"] == pytest.approx(flops["chain"])
    held = costs.pop("holdout")
    assert list(costs.values()) == pytest.approx([1.0] * len(costs))
    assert held == pytest.approx(1 - 2048 / 24576)
    for kind, runs in arms.items():  # apart from what a kind is about, all is as for independent members
        for run, other in zip(runs, arms["independent"], strict=True):
            assert (run.model, run.optimizer, run.unique_tokens) == (other.model, other.optimizer, other.unique_tokens)
            assert (run == other) == (kind == "independent")


def test_a_teacher_is_priced_by_its_forward_passes() -> None:
    """6 N a token for the student, twice with masked inputs; 2 N' a token for each model that reads beside it."""
    scale = load_scale("demo")
    point = Point(lr=0.01, epochs=4, wd=0.1)
    student = replace(scale.run("w16", 24576, point), name="student", teach=SoftTargetDistillation(source="both"))
    small, large = scale.run("w32", 24576, point), scale.run("w64", 24576, point)
    both = Ensemble(name="both", runs=(small.name, large.name), average="probs")
    targets = Targets(name="cache", source="both", unique_tokens=24576, sequence_length=128)
    jobs = {job.name: job for job in (student, small, large, both, targets)}
    size = {model: parameter_counts(model, vocab_size=300).total for model in ("w16", "w32", "w64")}
    tokens = 4 * 24576
    teachers = 2 * (size["w32"] + size["w64"])
    assert flops_of(student, 300, jobs) == tokens * (6 * size["w16"] + teachers)
    assert flops_of(replace(student, input_mask_prob=0.5), 300, jobs) == tokens * (12 * size["w16"] + teachers)
    single = replace(student, teach=SoftTargetDistillation(source=large.name))
    assert flops_of(single, 300, jobs) == tokens * (6 * size["w16"] + 2 * size["w64"])
    cached = replace(student, data_order="fixed", teach=SoftTargetDistillation(source="cache", mode="cached"))
    assert flops_of(cached, 300, jobs) == tokens * 6 * size["w16"] == flops_of(single, 300)
    assert [flops_of(job, 300, jobs) for job in (both, targets)] == [0, 0]


def test_a_plan_prices_teachers(workspace: Workspace) -> None:
    """Online students of five members cost more than the cached one in `plan`, whether the teacher has run or not."""
    scale = with_soft()
    for _ in simulate(workspace, "ensembling", scale):
        pass
    records = load_records(workspace)
    jobs = {job.name: job for job in load_recipe("distillation").jobs(records, scale)}
    ready = ready_jobs(jobs.values(), records)
    view = cost_estimate(("distillation",), records, scale)
    plain = sum(flops_of(job) for job in jobs.values() if records.get(job) is None)
    teachers = sum(
        2 * parameter_counts(jobs[name].model).total * run.tokens  # type: ignore[union-attr]
        for run in jobs.values()
        if isinstance(run, Run) and run.teach is not None and run.teach.mode == "online"
        for name in (inputs(jobs[run.teach.source]) or (run.teach.source,))
    )
    assert ready and teachers > 0
    assert view.today.flops == pytest.approx(plain + teachers)


def test_kinds_get_a_row_each_with_paired_gains(workspace: Workspace) -> None:
    scale = with_kinds()
    for _ in simulate(workspace, "ensembling", scale):
        pass
    records = load_records(workspace)
    section = load_recipe("ensembling").report(records, scale)
    table = section.tables[-1]
    assert {(row[0], row[1]) for row in table.rows} == {
        (words, average) for words in _kinds.KINDS.values() for average in ("logits", "probs")
    }
    losses = [row[4] for row in table.rows]
    assert losses == sorted(losses)
    learned = [r.job for r in records if isinstance(r.job, Ensemble) and "-learned-" in r.job.name]
    assert {job.member_weights for job in learned} == {(0.5, 0.3, 0.2)}
    chosen = [r.job for r in records if isinstance(r.job, Ensemble) and "-selected-" in r.job.name]
    assert {len(job.runs) for job in chosen} == {2}
    found = _kinds.rows(records, scale, load_recipe("ensembling").kinds_point(records, scale))
    ours, theirs = found["swa", "probs"].losses, found["independent", "probs"].losses
    claim = next(claim for claim in section.claims if "SWA" in claim.text)
    assert claim.value == f"{sum(theirs[k] - ours[k] for k in (0, 1)) / 2:.4f} nats"
    assert claim.interval is not None and claim.seeds == 2
    assert claim.holds == (sum(theirs.values()) > sum(ours.values()))


def test_a_scale_without_kinds_plans_none(workspace: Workspace) -> None:
    scale = replace(with_kinds(), kinds=None)
    for _ in simulate(workspace, "ensembling", scale):
        pass
    assert not [record for record in load_records(workspace) if "snapshot" in record.job.name]
    with pytest.raises(ValueError, match="not on the ladder"):
        replace(scale, kinds=Kinds(model="w7", count=3, seeds=1, holdout_tokens=512))
    with pytest.raises(ValueError, match="count 1"):
        Kinds(model="w32", count=1, seeds=1, holdout_tokens=512)


# --- students of soft targets -----------------------------------------------------------------------------------------


def with_soft(seeds: int = 2) -> Scale:
    scale = load_scale("demo")
    soft = Soft(model="w32", weight=0.9, wd=0.4, seeds=seeds, sizes=("w10", "w64"))
    return replace(scale, ensemble=replace(scale.ensemble, models=("w32", "w64")), soft=soft)


def test_every_way_to_teach_costs_the_student_the_same(workspace: Workspace) -> None:
    scale = with_soft()
    for _ in simulate(workspace, "distillation", scale):
        pass
    records = load_records(workspace)
    ensembles = _students.teachers(records, scale)
    runs = {way: [_students.student(records, scale, way, seed)[-1] for seed in (0, 1)] for way in _students.WAYS}
    flat = [run for pair in runs.values() for run in pair if isinstance(run, Run)]
    assert len({run.name for run in flat}) == 2 * len(_students.WAYS) == len(flat)
    assert {(run.model, run.steps, run.unique_tokens) for run in flat} == {("w32", 64 * 48, 24576)}
    assert [(run.init_seed, run.order_seed) for run in flat] == [(0, 0), (1, 1)] * len(runs)
    assert len({run.optimizer.lr for run in flat}) == 1
    sources = {way: run.teach.source for way, (run, _) in runs.items() if run.teach is not None}  # type: ignore[union-attr]
    first = ensembles["probs"].runs[0]
    assert sources["probs"] == ensembles["probs"].name and sources["logits"] == ensembles["logits"].name
    assert sources["self"] == first
    targets = records.named(sources["cached"])
    assert targets is not None and isinstance(targets.job, Targets) and targets.job.source == ensembles["probs"].name
    texts = {way: records.named(run.distill.samples) for way, (run, _) in runs.items() if run.distill is not None}  # type: ignore[union-attr]
    assert {way: (text.job.source, text.job.draw) for way, text in texts.items()} == {  # type: ignore[union-attr]
        "samples": (ensembles["probs"].name, "members"),
        "average": (ensembles["probs"].name, "average"),
        "self-samples": (first, "members"),
    }


def test_students_report_shares_of_the_gain_and_sizes(workspace: Workspace) -> None:
    scale = with_soft()
    for _ in simulate(workspace, "distillation", scale):
        pass
    records = load_records(workspace)
    section = load_recipe("distillation").report(records, scale)
    ways, sizes = section.tables[1:]
    single = (
        sum(r.loss for r in load_recipe("heavy_weight_decay").best_records(records, scale, "w32", 24576)) / scale.seeds
    )
    ensemble = records.get(_students.teachers(records, scale)["probs"])
    assert ensemble is not None
    assert {row[0] for row in ways.rows} == set(_students.WAYS.values())
    for _, loss, half, gain, share, seeds in ways.rows:
        assert gain == pytest.approx(single - loss) and seeds == 2 and half > 0
        assert share == f"{100 * (single - loss) / (single - ensemble.loss):.0f}%"
    assert [(row[0], row[2], row[3]) for row in sizes.rows] == [
        ("w64", 3.0, 0.75),
        ("w32", 1.0, 0.25),
        ("w10", 0.2, 0.05),
    ]
    told = " ".join(section.notes)
    assert (
        f"the same: {64 * 48 * 512:,} tokens of w32, lr 0.01." in told and "soft targets: weight 0.9, wd 0.4." in told
    )
    assert f"a share of {scale.students.fraction:g} sampled, wd {scale.students.wd:g}" in told
    uneven = replace(scale, students=replace(scale.students, fraction=0.7))  # 16 / 0.3 is no whole number of epochs
    assert "do NOT cost the student the same" in _students.notes(AssumeAllDone(Records(workspace)), uneven)[0]
    claim = next(claim for claim in section.claims if "cached: as good as" in claim.text)
    assert claim.value == "0.0000 nats" and claim.holds


def test_soft_students_need_an_ensemble_of_their_size() -> None:
    with pytest.raises(ValueError, match="'w16' has no ensemble"):
        replace(with_soft(), soft=Soft(model="w16", weight=0.5, wd=0.1))


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_members_take_the_setting_that_is_lower_together(workspace: Workspace, shift: float) -> None:
    """As many members of both settings run; where those of the best single model are lower, five of them are made."""
    scale, recipe = replace(load_scale("demo"), seeds=2), load_recipe("ensembling")
    for jobs in simulate(workspace, "ensembling", scale):
        records = load_records(workspace)
        ensembles = {
            model: _member_claims.single_point_ensembles(records, scale, 24576).get(model)
            for model in scale.ensemble.models
        }
        for job in jobs:
            if job in ensembles.values():
                results = dict(records.get(job).results)
                write_record(
                    workspace, Record(job, fingerprint(job), "done", results | {"loss": results["loss"] + shift})
                )
    records = load_records(workspace)
    for model in scale.ensemble.models:
        single = heavy_weight_decay.tuned(records, scale, model, 24576).best
        assert recipe.best_point(records, scale, model, 24576) == (single if shift < 0 else member_point(single))
        members = recipe.members(records, scale, model, 24576)
        assert len(members) == scale.ensemble.count and all(records.get(run) is not None for run in members)


@pytest.mark.parametrize("best", ["w32", "w64"])
def test_students_learn_from_the_best_ensemble_of_any_size(workspace: Workspace, best: str) -> None:
    demo = load_scale("demo")
    scale = replace(demo, ensemble=replace(demo.ensemble, models=("w32", "w64")))
    for jobs in simulate(workspace, "ensembling", scale):
        for job in (job for job in jobs if isinstance(job, Ensemble) and job.name.startswith(best)):
            results = dict(load_records(workspace).get(job).results)
            write_record(workspace, Record(job, fingerprint(job), "done", results | {"loss": 1.0}))
    samples, student = load_recipe("distillation").student(load_records(workspace), scale, "ensemble")
    assert samples.source.startswith(f"{best}-") and student.model == scale.students.model
    others = Records(
        workspace, [record for record in load_records(workspace) if not record.job.name.endswith("-probs")]
    )
    assert load_recipe("distillation").student(others, scale, "ensemble") == [], "an ensemble has yet to run"


def test_claims_about_members_and_teachers(workspace: Workspace) -> None:
    """Made-up curves fall like 1 / K, so the free exponent is near 1; the seeds of the single point form an ensemble."""
    scale = replace(load_scale("demo"), seeds=2)
    for _ in simulate(workspace, "distillation", scale):
        pass
    records = load_records(workspace)
    claims = {claim.text: claim for claim in load_recipe("ensembling").report(records, scale).claims}
    (exponent,) = [claim for text, claim in claims.items() if "falls like 1 / K" in text]
    assert exponent.holds
    assert float(exponent.value.split()[1]) == pytest.approx(1.0, abs=0.25)
    (settings,) = [claim for text, claim in claims.items() if "best single setting" in text]
    tuned = heavy_weight_decay.best_records(records, scale, "w64", 24576)
    plain = records.named(tuned[0].job.name.removesuffix("-s0") + "-k2-logits")
    by_rule = scale.run("w64", 24576, member_point(heavy_weight_decay.tuned(records, scale, "w64", 24576).best))
    curve = records.named(by_rule.name.removesuffix("-s0") + f"-k{scale.ensemble.count}-logits").results["curve"]["2"]
    assert settings.value.startswith(f"{plain.loss - sum(curve) / len(curve):+.4f} nats")
    (teacher,) = [
        claim
        for claim in load_recipe("distillation").report(records, scale).claims
        if "beats its teacher" in claim.text
    ]
    students = load_recipe("distillation").student_records(records, scale, "self")
    assert [record.job.init_seed for record in students] == list(range(scale.seeds))
    mean = sum(record.loss for record in students) / len(students)
    member = load_recipe("ensembling").members(records, scale, "w64", 24576)[0]
    assert teacher.value.startswith(f"{records.get(member).loss - mean:+.4f} nats")
    assert teacher.seeds == scale.seeds and teacher.provisional == ()
    spread = [claim.interval for claim in load_recipe("distillation").report(records, scale).claims if claim.interval]
    assert len(spread) == 3 and all(low < high for low, high in spread)
