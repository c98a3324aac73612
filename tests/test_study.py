"""Arms, tuned points and settings of recipes, on made-up losses; and recipes of a working folder."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from made_up import TEST_ABOVE, MadeUpRecords, diverged, made_up_loss, made_up_record, simulate, with_table

from epochal.campaign.plan import campaign_jobs, load_recipe, recipe_names
from epochal.run import AdamW, Fira, Job, Lion, Muon, Run, Signum, Spectra
from epochal.scale import Point, Rung, Scale, load_scale
from epochal.study import NOTHING, Arm, Study, Sweep
from recipes import ensembling, epoching, heavy_weight_decay

TOKENS = 24576
TUNED = Arm("tuned")
SWEEP = Sweep(model="w32", tokens=TOKENS, epochs=16, lr=(0.003, 0.01, 0.03), wd=(0.8, 3.2), seeds=3)


@pytest.fixture
def demo() -> Scale:
    return load_scale("demo")


def finished(scale: Scale, plan: Callable[[Study], list[Job]], loss_of: Callable[[Run], float] = made_up_loss) -> Study:
    """Run what a plan names until it names nothing new."""
    records = MadeUpRecords()
    while missing := [job for job in plan(Study(records, scale)) if records.get(job) is None]:
        records = records.having([made_up_record(job, records, loss_of) for job in missing])
    return Study(records, scale)


# --- arms ---------------------------------------------------------------------------------------------------------------


def test_a_factor_scales_the_learning_rate_and_divides_the_decay(demo: Scale) -> None:
    study = Study(MadeUpRecords(), demo)
    plain, scaled = (study.points(Arm("arm", optimizer=Signum(), lr_factor=f), SWEEP) for f in (1.0, 0.25))
    assert [point.lr for point in scaled] == pytest.approx([point.lr / 4 for point in plain])
    assert [point.wd for point in scaled] == pytest.approx([point.wd * 4 for point in plain])
    run = study.run(Arm("arm", optimizer=Signum()), "w32", TOKENS, scaled[0])
    assert run.optimizer == Signum(lr=scaled[0].lr, wd=scaled[0].wd)


@pytest.mark.parametrize("optimizer", [Muon(), Fira(rank=4), Spectra(base=Lion(), clip=2.0)], ids=str)
def test_an_arm_without_optimizer_takes_that_of_the_scale(demo: Scale, optimizer: Muon | Fira | Spectra) -> None:
    study = Study(MadeUpRecords(), replace(demo, optimizer=optimizer))
    point = Point(lr=0.01, epochs=1, wd=0.8)
    own = study.run(TUNED, "w32", TOKENS, point)
    assert type(own.optimizer) is type(optimizer) and (own.optimizer.lr, own.optimizer.wd) == (0.01, 0.8)
    given = study.run(Arm("AdamW", optimizer=AdamW()), "w32", TOKENS, point)
    assert given.optimizer == AdamW(lr=0.01, wd=0.8)
    assert given.name != own.name


def test_an_arm_changes_fields_of_the_run_and_of_its_optimizer(demo: Scale) -> None:
    study, point = Study(MadeUpRecords(), demo), Point(lr=0.01, epochs=1, wd=0.8)
    plain = study.run(TUNED, "w32", TOKENS, point)
    run = study.run(Arm("arm", run={"dropout": 0.1, "optimizer.beta2": 0.99}), "w32", TOKENS, point)
    assert replace(run, name=plain.name) == replace(plain, dropout=0.1, optimizer=AdamW(lr=0.01, wd=0.8, beta2=0.99))
    assert run.name != plain.name


# --- descents -----------------------------------------------------------------------------------------------------------


def test_further_fields_are_tuned_with_the_others(demo: Scale) -> None:
    arm = Arm("with dropout", grids={"dropout": (0.0, 0.1)})
    for sign in (-1, 1):
        loss = lambda run, sign=sign: made_up_loss(run) + sign * run.dropout  # noqa: E731
        study = finished(demo, lambda study: study.search(arm, "w16", TOKENS).jobs, loss)
        descent = study.tuned(arm, "w16", TOKENS)
        assert descent.certified and descent.best is not None
        assert descent.visited[0].get("dropout") == 0.0, "the first value is the start"
        assert descent.best.get("dropout") == (0.1 if sign < 0 else 0.0)


def test_a_fixed_decay_is_not_tuned(demo: Scale) -> None:
    arm = Arm("fixed", tune=("lr", "epochs"), wd=0.1)
    study = finished(demo, lambda study: study.search(arm, "w16", TOKENS).jobs)
    assert {point.wd for point in study.tuned(arm, "w16", TOKENS).visited} == {0.1}


def test_the_best_point_of_a_descent_has_all_seeds(demo: Scale) -> None:
    scale = replace(demo, seeds=3)
    assert Study(MadeUpRecords(), scale).best(TUNED, "w16", TOKENS) == NOTHING
    study = finished(scale, lambda study: study.search(TUNED, "w16", TOKENS).jobs)
    result = study.best(TUNED, "w16", TOKENS)
    assert result.settled and [run.init_seed for run in result.runs] == [0, 1, 2]
    assert sorted(result.losses) == [0], "the other seeds have not run"
    assert result.validation == made_up_loss(result.runs[0]) and result.mean == result.validation + TEST_ABOVE
    other = study.records.having([diverged(result.runs[1]), made_up_record(result.runs[2], study.records)])  # type: ignore[attr-defined]
    assert sorted(Study(other, scale).best(TUNED, "w16", TOKENS).losses) == [0, 2], "one seed diverged"


def test_claims_leave_out_the_seed_that_chose_where_three_others_have_run(demo: Scale) -> None:
    scale = replace(demo, seeds=4)
    study = finished(scale, lambda study: study.search(TUNED, "w16", TOKENS).jobs)
    runs = study.best(TUNED, "w16", TOKENS).runs
    for count, seeds in ((2, [0, 1]), (3, [0, 1, 2]), (4, [1, 2, 3])):
        records = study.records.having([made_up_record(run, study.records) for run in runs[:count]])  # type: ignore[attr-defined]
        assert sorted(Study(records, scale).best(TUNED, "w16", TOKENS).losses) == seeds
    assert [Study(MadeUpRecords(), replace(demo, seeds=count)).judged_seeds for count in (1, 3, 4, 6)] == [1, 3, 3, 5]


def test_a_size_without_start_waits_for_the_next_smaller_one(demo: Scale) -> None:
    scale = replace(with_table(demo, "epoching", sweep_model="w16"), ladder=(demo.ladder[0], Rung(model="w32")))
    scale = replace(scale, tables={"epoching": {"sweep_model": "w16"}})
    arms = (heavy_weight_decay.TUNED, epoching.standard(Study(MadeUpRecords(), scale)))
    for arm in arms:
        fresh = Study(MadeUpRecords(), scale).search(arm, "w32", TOKENS)
        assert fresh.jobs == [] and not fresh.descent.certified
    study = simulate(scale, "heavy_weight_decay").study
    for arm in arms:
        smaller, larger = (study.tuned(arm, model, TOKENS) for model in ("w16", "w32"))
        assert larger.certified and larger.visited[0] == smaller.best
    stuck = with_table(scale, "epoching", sweep_model="w32")
    with pytest.raises(ValueError, match="model 'w32' needs lr and epochs"):
        epoching.settings(Study(MadeUpRecords(), stuck))


# --- sweeps -------------------------------------------------------------------------------------------------------------


def test_a_sweep_has_no_result_before_its_grid_is_complete(demo: Scale) -> None:
    grid = Study(MadeUpRecords(), demo).sweep_jobs(TUNED, SWEEP)
    assert len(grid) == len(SWEEP.lr) * len(SWEEP.wd) and all(job.init_seed == 0 for job in grid)  # type: ignore[union-attr]
    records = MadeUpRecords(made_up_record(job, MadeUpRecords()) for job in grid)
    almost = Study(MadeUpRecords(list(records)[1:]), demo)
    assert almost.swept(TUNED, SWEEP) == NOTHING and almost.sweep_jobs(TUNED, SWEEP) == grid
    study = Study(records, demo)
    result = study.swept(TUNED, SWEEP)
    assert result.runs[0] == min(grid, key=made_up_loss)  # type: ignore[arg-type]
    assert result.settled and result.tried == len(grid)
    further = study.sweep_jobs(TUNED, SWEEP)[len(grid) :]
    assert [job.init_seed for job in further] == [1, 2], "seeds at the best point"  # type: ignore[union-attr]


def test_a_sweep_says_where_its_grid_ends_at_the_best_point(demo: Scale) -> None:
    study = finished(demo, lambda study: study.sweep_jobs(TUNED, SWEEP), lambda run: run.optimizer.lr)
    assert study.swept(TUNED, SWEEP).edges == ("lr", "wd")
    middle = finished(demo, lambda study: study.sweep_jobs(TUNED, SWEEP), lambda run: abs(run.optimizer.lr - 0.01))
    assert middle.swept(TUNED, SWEEP).edges == ("wd",)
    one_wd = replace(SWEEP, wd=(0.8,))
    single = finished(demo, lambda study: study.sweep_jobs(TUNED, one_wd), lambda run: abs(run.optimizer.lr - 0.01))
    assert single.swept(TUNED, one_wd).edges == ()


def test_a_sweep_in_which_all_diverged_has_no_result(demo: Scale) -> None:
    grid = Study(MadeUpRecords(), demo).sweep_jobs(TUNED, SWEEP)
    study = Study(MadeUpRecords(map(diverged, grid)), demo)
    assert study.swept(TUNED, SWEEP) == NOTHING and NOTHING.mean == math.inf and not NOTHING


# --- settings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    width: int = 3


def test_settings_are_read_from_the_table_of_the_defining_module(demo: Scale) -> None:
    name = Settings.__module__
    assert Study(MadeUpRecords(), demo).settings(Settings) is None
    assert Study(MadeUpRecords(), with_table(demo, name, width=4)).settings(Settings) == Settings(width=4)


def test_an_unknown_key_names_the_scale_and_the_recipe(demo: Scale) -> None:
    study = Study(MadeUpRecords(), with_table(demo, "ensembling", cuont=4))
    with pytest.raises(ValueError, match=r"^scale 'demo', \[ensembling\]: unknown key 'cuont' \(did you mean 'count'"):
        ensembling.settings(study)


def test_settings_that_the_scale_cannot_serve_are_refused(demo: Scale) -> None:
    for change, reason in (
        ({"models": ["w7"]}, r"model 'w7' is not on the ladder"),
        ({"models": []}, "models is empty"),
        ({"search_members": 1}, r"search_members is 1; give 2 to count \(4\)"),
    ):
        study = Study(MadeUpRecords(), with_table(demo, "ensembling", **change))
        with pytest.raises(ValueError, match=rf"^scale 'demo', \[ensembling\]: .*{reason}"):
            ensembling.settings(study)


def test_a_table_that_belongs_to_no_recipe_is_refused(demo: Scale) -> None:
    with pytest.raises(ValueError, match=r"scale 'demo' names 'ensembles'.*did you mean 'ensembling'"):
        recipe_names(with_table(demo, "ensembles", count=2))
    assert "ensembling" in recipe_names(demo)


# --- recipes of a working folder ------------------------------------------------------------------------------------------

OWN = '''"""One run at the scale's start."""

from dataclasses import dataclass

from epochal.report.sections import Section
from epochal.study import Arm
from recipes import epoching


@dataclass(frozen=True, kw_only=True)
class Settings:
    dropout: float = 0.0


def plan(study):
    settings = study.settings(Settings) or Settings()
    arm = Arm("dropout", run={"dropout": settings.dropout})
    return [*epoching.plan(study)[:1], *study.search(arm, study.scale.models[0], study.scale.unique_tokens[0]).jobs]


def report(study):
    return Section(title="Own", question="?")
'''


def test_a_recipe_of_the_working_folder_comes_first(
    demo: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("own_question", "continued"):
        (tmp_path / "recipes" / f"{name}.py").write_text(OWN)
    (tmp_path / "recipes" / "_helper.py").write_text("")
    monkeypatch.chdir(tmp_path)
    names = recipe_names()
    assert {"own_question", "epoching"} <= set(names) and "_helper" not in names and len(set(names)) == len(names)
    assert load_recipe("own_question").__doc__ == load_recipe("continued").__doc__ == "One run at the scale's start."
    jobs = campaign_jobs(["own_question"], MadeUpRecords(), with_table(demo, "own_question", dropout=0.3))
    assert {job.dropout for job in jobs if isinstance(job, Run)} == {0.0, 0.3}, "with a job of a built-in recipe"
    monkeypatch.chdir(tmp_path.parent)
    assert "own_question" not in recipe_names()
    assert load_recipe("continued").__doc__ != "One run at the scale's start."
