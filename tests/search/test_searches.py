"""Searches over the Runs of a scale: objectives, starts, further fields, early stopping, what plan says; on made-up records."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_recipes import finish, made_up_loss, simulate

from epochal.campaign.plan import cost_estimate, load_recipe, search_states
from epochal.cli import _hours, _search_lines
from epochal.records import Record, Records, Workspace, load_records
from epochal.run import Ensemble, Job, Run, fingerprint
from epochal.scale import Grid, Members, Point, Rung, Scale, load_scale
from epochal.search.searches import early_stops, ensemble_search, seed_noise, single_search
from recipes import ensembling, epoching, heavy_weight_decay


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace("demo", tmp_path / "results", tmp_path / "work")


@pytest.fixture
def scale() -> Scale:
    """The demo's scale without further budgets."""
    return replace(load_scale("demo"), law_tokens=(), law_models=())


def record_of(job: Job, **results: object) -> Record:
    return Record(job, fingerprint(job), "done", {"parameters": 9, **results})


def test_existing_runs_keep_their_names_and_meaning(scale: Scale) -> None:
    plain = scale.run("w64", 24576, Point(lr=0.01, epochs=16, wd=3.2))
    assert plain.name == "w64-24.6k-lr0.01-ep16-wd3.2-s0"
    default = Point(lr=0.01, epochs=16, wd=3.2, more=(("beta2", 0.95), ("warmup", scale.warmup)))
    assert scale.run("w64", 24576, default) == plain
    other = scale.run("w64", 24576, default.at("beta2", 0.99).at("warmup", 0.1), seed=2)
    assert other.name == "w64-24.6k-lr0.01-ep16-wd3.2-beta20.99-warmup0.1-s2"
    assert (other.warmup, getattr(other.optimizer, "beta2")) == (0.1, 0.99)  # noqa: B009
    with pytest.raises(ValueError, match=r"tunes 'betta2', which no Run has \(did you mean 'beta2'\?\)"):
        scale.run("w64", 24576, Point(lr=0.01, epochs=16, wd=3.2, more=(("betta2", 0.9),)))


def test_a_further_field_of_the_grid_is_tuned(workspace: Workspace, scale: Scale) -> None:
    scale = replace(scale, grid=replace(scale.grid, more={"beta2": (0.95, 0.99)}))
    for _ in simulate(workspace, "heavy_weight_decay", scale):
        pass
    search = heavy_weight_decay.search(load_records(workspace), scale, "w16", scale.unique_tokens[0])
    assert search.descent.certified and search.descent.best is not None
    assert {point.get("beta2") for point in search.descent.visited} == {0.95, 0.99}
    assert search.descent.best.get("beta2") == 0.95  # the made-up loss does not know it, and ties do not wander


def test_a_rung_without_a_start_waits_for_the_next_smaller_size(workspace: Workspace, scale: Scale) -> None:
    scale = replace(scale, ladder=(scale.ladder[0], Rung(model="w32"), scale.ladder[2]), epoching="w16")
    tokens = scale.unique_tokens[0]
    for recipe, what in ((heavy_weight_decay, "w32 tuned, D = 24,576"), (epoching, "w32 at wd 0.1, D = 24,576")):
        fresh = recipe.search(Records(workspace), scale, "w32", tokens)
        assert fresh.jobs == [] and not fresh.descent.certified
        states = {state.what: state for state in search_states([recipe.__name__[8:]], Records(workspace), scale)}
        assert states[what].state == "waits for the search it starts from"
    for _ in simulate(workspace, "heavy_weight_decay", scale):
        pass
    records = load_records(workspace)
    for recipe in (heavy_weight_decay, epoching):
        below, above = (recipe.search(records, scale, model, tokens).descent for model in ("w16", "w32"))
        assert above.certified
        assert above.visited[0] == below.best


def test_a_scale_that_could_never_start_is_refused(scale: Scale) -> None:
    with pytest.raises(ValueError, match="smallest size 'w16' needs lr and epochs"):
        replace(scale, ladder=(Rung(model="w16"), *scale.ladder[1:]))
    with pytest.raises(ValueError, match="'w64' is in law_models or epoching"):
        replace(scale, ladder=(*scale.ladder[:2], Rung(model="w64")))
    with pytest.raises(ValueError, match="search_mode must be one of sequential, parallel, got 'random'"):
        replace(scale, search_mode="random")
    with pytest.raises(ValueError, match=r"search_members is 1; give 2 to count \(4\)"):
        Members(models=("w64",), count=4, search_members=1)


# --- the limit of members as objective -----------------------------------------------------------------------------------


def member_curve(run: Run, members: int) -> dict[str, list[float]]:
    """Excess A / K over a limit that is lowest at twice the epochs of the best single model and half its decay."""
    away = math.log2(run.epochs / 32) ** 2 + math.log2(run.optimizer.wd / 0.8) ** 2
    limit, excess = 4.0 + 0.05 * away, 0.3
    return {str(k): [limit + excess / k] for k in range(1, members + 1)}


def test_members_are_tuned_for_their_limit(workspace: Workspace, scale: Scale) -> None:
    start = Point(lr=0.01, epochs=16, wd=1.6)
    grid = {"wd": scale.grid.wd, "epochs": scale.grid.epochs}
    known: list[Record] = []
    for _ in range(50):
        search = ensemble_search(Records(workspace, known), scale, "w64", 24576, start, grid, 2)
        if search.descent.certified:
            break
        for job in search.wanted_jobs:
            if isinstance(job, Run):
                known.append(record_of(job, loss=made_up_loss(job)))
            elif isinstance(job, Ensemble):
                run = next(record.job for record in known if record.job.name == job.runs[0])
                assert isinstance(run, Run)
                curve = member_curve(run, 2)
                known.append(record_of(job, loss=curve["2"][0], curve=curve))
    assert search.descent.best == Point(lr=0.01, epochs=32, wd=0.8)
    assert search.loss_of(search.descent.best) == pytest.approx(4.0)
    jobs = search.jobs_of(search.descent.best)
    assert [job.name[-3:] for job in jobs[:2]] == ["-s0", "-s1"]
    assert isinstance(jobs[2], Ensemble) and jobs[2].runs == (jobs[0].name, jobs[1].name)


def test_a_point_with_a_diverged_member_is_no_optimum(workspace: Workspace, scale: Scale) -> None:
    start = Point(lr=0.01, epochs=16, wd=1.6)
    search = ensemble_search(Records(workspace), scale, "w64", 24576, start, {"wd": (1.6,)}, 2)
    diverged = Record(search.jobs_of(start)[1], fingerprint(search.jobs_of(start)[1]), "diverged", {"loss": None})
    again = ensemble_search(Records(workspace, [diverged]), scale, "w64", 24576, start, {"wd": (1.6,)}, 2)
    assert search.loss_of(start) is None
    assert again.loss_of(start) == math.inf
    with pytest.raises(ValueError, match="two members or more"):
        ensemble_search(Records(workspace), scale, "w64", 24576, start, {"wd": (1.6,)}, 1)


def test_a_campaign_that_tunes_its_members(workspace: Workspace, scale: Scale) -> None:
    scale = replace(scale, ensemble=replace(scale.ensemble, search_members=2))
    for _ in simulate(workspace, "ensembling", scale):
        pass
    records, tokens = load_records(workspace), scale.unique_tokens[0]
    search = ensembling.search(records, scale, "w64", tokens)
    assert search.descent.certified and search.descent.best is not None
    members = ensembling.members(records, scale, "w64", tokens)
    assert [run.epochs for run in members] == [search.descent.best.epochs] * scale.ensemble.count
    assert all(records.get(run) for run in members)
    assert any(state.what.startswith("w64 members") for state in cost_estimate(["ensembling"], records, scale).searches)


# --- noise and early stopping --------------------------------------------------------------------------------------------


def test_noise_of_a_size_or_of_all_when_it_has_few_seeds(workspace: Workspace, scale: Scale) -> None:
    def runs(model: str, losses: list[float]) -> list[Record]:
        point = Point(lr=0.01, epochs=16, wd=1.6)
        jobs = [scale.run(model, 24576, point, seed=seed) for seed in range(len(losses))]
        return [record_of(job, loss=loss) for job, loss in zip(jobs, losses, strict=True)]

    records = Records(workspace, [*runs("w16", [1.0, 1.2]), *runs("w64", [4.0, 4.1, 4.2, 4.3, 4.4])])
    w64, w16 = seed_noise(records, "w64", 24576), seed_noise(records, "w16", 24576)
    assert w64 is not None and w16 is not None
    assert (w64.freedom, w16.freedom) == (4, 5)
    assert w64.sd == pytest.approx(math.sqrt(0.1 / 4))
    assert w16.sd == pytest.approx(math.sqrt(0.12 / 5))


def test_early_stopping_is_judged_on_the_curves(workspace: Workspace, scale: Scale) -> None:
    """The best in the end is the worst half-way, as under heavy decay; a quarter before the end it leads."""
    start, grid = Point(lr=0.01, epochs=16, wd=1.6), {"wd": (0.8, 1.6, 3.2)}
    finals = {0.8: 4.2, 1.6: 4.0, 3.2: 4.1}
    half = {0.8: 4.4, 1.6: 4.9, 3.2: 4.8}
    known = []
    for wd, final in finals.items():
        job = scale.run("w64", 24576, start.at("wd", wd))
        shares = {0.25: 6.0 - final / 10, 0.5: half[wd], 0.75: final + 0.2, 1.0: final}
        known.append(record_of(job, loss=final, curve=[[round(job.steps * at), loss] for at, loss in shares.items()]))
    records = Records(workspace, known)
    search = single_search(records, scale, "w64", 24576, start, grid, "w64")
    assert search.descent.certified
    stops = {stop.share: stop for stop in early_stops(records, [search])}
    assert (stops[0.5].stars, stops[0.5].same) == (1, 0)
    assert stops[0.5].worst == pytest.approx(0.2)
    assert (stops[0.75].same, stops[0.75].worst) == (1, 0.0)
    assert early_stops(Records(workspace), [search]) == []


def test_plan_says_what_the_next_round_costs_and_can_gain(workspace: Workspace, scale: Scale) -> None:
    recipe, tokens = load_recipe("heavy_weight_decay"), scale.unique_tokens[0]
    jobs = recipe.plan(Records(workspace), scale)
    start = scale.regularized_start(scale.rung("w64"), tokens)
    assert start is not None
    left_out = scale.run("w64", tokens, start.at("wd", 6.4)).name
    for job in jobs:
        if job.name != left_out:
            finish(workspace, job, Records(workspace))
    states = {state.what: state for state in search_states(["heavy_weight_decay"], load_records(workspace), scale)}
    state = states["w64 tuned, D = 24,576"]
    assert state.begun and not state.certified
    assert state.next_round.jobs == 1 and state.next_round.flops > 0
    assert state.gain is not None and state.gain > 0
    assert "wd 6.4" in state.state
    lines = "\n".join(_search_lines(tuple(states.values()), scale.hardware, all_searches=True))
    assert f"next 1 job, {_hours(state.next_round, scale.hardware)}, gain at most {state.gain:.4f} nats" in lines
    for _ in simulate(workspace, "heavy_weight_decay", scale):
        pass
    records = load_records(workspace)
    lines = "\n".join(
        _search_lines(search_states([recipe.__name__[8:]], records, scale), scale.hardware, all_searches=True)
    )
    finer = [search.finer for search in recipe.searches(records, scale)]
    assert None not in finer
    assert all(f"a finer grid could gain {gain:.4f} nats" in lines for gain in finer)


def test_the_grid_of_a_scale() -> None:
    grid = Grid(lr=(0.1,), epochs=(1,), wd=(0.2,), more={"dropout": (0.0, 0.1)})
    assert list(grid.values("wd", "lr")) == ["wd", "lr", "dropout"]
    assert grid.first == (("dropout", 0.0),)
