"""Points from a CSV or from records, the laws through them, and two campaigns side by side."""

import csv
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import simulate

from epochal import cli
from epochal.records import Record, Records, Workspace, load_records, write_record
from epochal.report import point_comparisons
from epochal.report.campaigns import CampaignReport, compare_campaigns
from epochal.report.claims import read_claims
from epochal.report.point_comparisons import joint_section, paired_section
from epochal.report.point_laws import DATA, MEMBERS, SIZE, fit_axis, point_sections, referenced_sections
from epochal.report.points import LossPoint, campaign_points, question_points, read_points
from epochal.report.sections import Section
from epochal.run import Ensemble, SequenceDistillation, fingerprint
from epochal.scale import Point, load_scale
from epochal.study import Study
from recipes import epoching, heavy_weight_decay

SIZES = (1e8, 2e8, 4e8, 8e8, 1.6e9)


def power(E: float, A: float, alpha: float) -> Callable[[float], float]:
    return lambda x: E + A / x**alpha


def table(folder: Path, *lines: str) -> Path:
    path = folder / "points.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv_is_read_with_its_suffixes_and_limits(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "recipe,loss,N_params,D_tokens,K,source",
        "ours,3.5,150M,209715200,1,table 3",
        "ours,3.2,2.7B,1e8,inf,",
        "theirs,3.1,best,,,x",
    )
    points, problems = read_points(path)
    assert problems == ()
    assert points == [
        LossPoint("ours", 3.5, 150e6, 209715200, 1),
        LossPoint("ours", 3.2, 2.7e9, 1e8, math.inf),
        LossPoint("theirs", 3.1, None, None, None),
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ("Recipe ; Val Loss ; Model Size ; Tokens", "ours;3,5;150m;1e8"),
        ("method\tVALIDATION_LOSS\tparams\tunique_tokens\ttokens", "ours\t3.5\t0.15b\t100M\t2.4B"),
        ("name,val-loss,N,D", "ours, 3.5 ,1.5e8,100000k"),
    ],
)
def test_names_and_separators_of_others_are_understood(tmp_path: Path, lines: tuple[str, ...]) -> None:
    (point,), problems = read_points(table(tmp_path, *lines))
    assert problems == () and replace(point, T=None) == LossPoint("ours", 3.5, 150e6, 1e8)
    assert (2.4e9 if "unique_tokens" in lines[0] else None) == point.T


def test_units_that_look_wrong_are_questioned(tmp_path: Path) -> None:
    assert question_points([LossPoint("a", 3.0, 1e8), LossPoint("a", 2.9, 2e9)]) == []
    (perplexity,) = question_points([LossPoint("a", 33.1, 1e8), LossPoint("a", 2.9, 2e8)])
    assert perplexity.startswith("1 of 2 losses are above 13.8 nats, up to 33.1: are they perplexities")
    (low,) = question_points([LossPoint("a", 0.93), LossPoint("a", 0.91)])
    assert "accuracies or bits per byte" in low
    (mixed,) = question_points([LossPoint("a", 3.0, 150), LossPoint("a", 2.9, 3e8)])
    assert mixed == "N runs from 150 to 3e+08: are two units mixed?"
    _, problems = read_points(table(tmp_path, "recipe,loss", "a,3.5", "a,35%"))
    assert problems == ("line 3: loss is a percentage, got '35%'; give nats per token",)


def test_unusable_rows_are_left_out_and_named(tmp_path: Path) -> None:
    path = table(
        tmp_path, "recipe,loss,K", "a,3.5,1", "a,,1", "a,nan,1", "a,low,1", ",3,1", "a,3,-2", "a,3", "a,3,1,9", "b,2,"
    )
    points, problems = read_points(path)
    assert [point.recipe for point in points] == ["a", "b"]
    assert problems == (
        "line 3: loss must be a finite number, got ''",
        "line 4: loss must be above 0, got 'nan'",
        "line 5: loss must be a number, got 'low'",
        "line 6: recipe is empty",
        "line 7: K must be above 0, got '-2'",
        "line 8: the number of cells differs from that of the first line",
        "line 9: the number of cells differs from that of the first line",
    )


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (("title,loss", "a,3"), "has no column recipe; found: title, loss. Its first line must name recipe, loss"),
        (("a", "b"), "has no column recipe and no loss; found: a"),
        (("recipe,ppl", "a,3"), "'ppl' is not a loss in nats: convert it, a perplexity by its logarithm"),
        (("recipe,loss", "a,"), "has no row with a loss"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, lines: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_points(table(tmp_path, *lines))
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        read_points(tmp_path / "none.csv")


def test_laws_are_fitted_to_points_that_differ_along_one_axis() -> None:
    size, members, data = power(3.0, 2e3, 0.5), power(2.9, 0.4, 1.0), power(2.0, 300.0, 0.3)
    points = [LossPoint("a", size(n), n, 1e8, 1) for n in SIZES]
    points += [LossPoint("c", members(k), 1e8, 1e8, k) for k in (1, 2, 3, 4, 5)]
    points += [LossPoint("b", data(d), None, d) for d in SIZES] + [LossPoint("b", data(d) + 1, 5.0, d) for d in SIZES]
    (fit,) = fit_axis(points, SIZE)
    assert (fit.recipe, fit.place, len(fit.xs)) == ("a", "D = 1e+08, K = 1", 5)
    assert (fit.law.E, fit.law.alpha) == (pytest.approx(3.0, abs=1e-4), pytest.approx(0.5, abs=1e-3))
    (fit,) = fit_axis(points, MEMBERS)
    assert (fit.recipe, fit.place) == ("c", "D = 1e+08, N = 1e+08")
    assert pytest.approx(2.9, abs=1e-4) == fit.law.E
    (fit,) = fit_axis(points, DATA)
    assert fit.recipe == "b" and fit.ys == tuple(data(d) for d in SIZES)  # the best at each budget
    assert pytest.approx(2.0, abs=1e-3) == fit.law.E


def noisy(recipe: str, E: float, sign: int = 1) -> list[LossPoint]:
    wave = (0.002, -0.002, 0.001, -0.001, 0.001)
    return [LossPoint(recipe, E + 2e3 / n**0.5 + sign * w, n, n, 1) for n, w in zip(SIZES, wave, strict=True)]


def test_limits_are_compared_with_the_reference() -> None:
    points = [replace(point, D=1e8) for point in (*noisy("new", 2.8, -1), *noisy("old", 3.0))]
    sections = {section.title: section for section in point_sections(points, reference="old")}
    (claim,) = sections["Size"].claims
    assert claim.text.startswith("new ends below old as N grows")
    assert claim.holds is True and claim.value.startswith("-0.2")
    (other,) = {section.title: section for section in point_sections(points)}["Size"].claims
    assert other.holds is False
    with pytest.raises(ValueError, match=r"recipe 'ol' has no points \(did you mean 'old'\?\)"):
        point_sections(points, reference="ol")


def two_recipes(seed: int, unit: float = 1.0, sizes: int = 6) -> list[LossPoint]:
    """Recipes 0.04 nats apart at six sizes and four budgets, two seeds of 0.01 nats; sizes in any unit."""
    rng = np.random.default_rng(seed)
    return [
        LossPoint(
            name, float(1.9 - below + 400 / N**0.34 + 410 / D**0.28 + 0.01 * rng.standard_normal()), N / unit, D / unit
        )
        for N in np.geomspace(1e7, 1e9, 6)[:sizes].tolist()
        for D in np.geomspace(1e8, 1.6e9, 4).tolist()
        for name, below in (("old", 0.0), ("new", 0.04))
        for _ in range(2)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_recipes_with_a_known_difference_are_decided_at_shared_places(seed: int) -> None:
    """A small version of the row `decisions` of benchmarks/coverage.csv, which also counts the claims about limits."""
    section = paired_section(two_recipes(seed), {"new": "old"})
    assert section is not None
    (claim,) = section.claims
    assert claim.text == "new has a lower loss than old at 24 shared places" and claim.seeds == 2
    assert claim.holds is True and claim.interval is not None and abs(float(claim.value.split()[0]) + 0.04) < 0.01
    same = [replace(point, loss=point.loss + 0.04 * (point.recipe == "new")) for point in two_recipes(seed)]
    (equal,) = paired_section(same, {"new": "old"}).claims  # type: ignore[union-attr]
    assert abs(float(equal.value.split()[0])) < 0.01


def test_a_verdict_needs_an_interval() -> None:
    one = [LossPoint("a", 3.0, 1e8, 1e9), LossPoint("b", 2.0, 1e8, 1e9)]
    (claim,) = paired_section(one, {"b": "a"}).claims  # type: ignore[union-attr]
    assert claim.holds is None and claim.interval is None
    assert claim.provisional == ("1 shared place with too few seeds",)
    seeds = [LossPoint(name, loss + 0.001 * i, 1e8, 1e9) for name, loss in (("a", 3.0), ("b", 2.0)) for i in range(3)]
    (decided,) = paired_section(seeds, {"b": "a"}).claims  # type: ignore[union-attr]
    assert decided.holds is True and decided.interval == pytest.approx((-1.00174, -0.99826), abs=1e-4)


def test_ensembles_are_paired_at_one_count_of_members() -> None:
    points = [LossPoint(r, 3.0 + 0.1 / k, n, 1e8, k) for r in ("a", "b") for n in (1e6, 2e6) for k in (1, 2, 3)]
    (claim,) = paired_section(points, {"b": "a"}).claims  # type: ignore[union-attr]
    assert "at 2 shared places" in claim.text


def test_units_of_sizes_do_not_change_a_word_of_the_verdicts() -> None:
    """Budgets in billions once printed as "0" and were compared by that text, which gave a wrong verdict."""

    def words(unit: float) -> list[tuple[object, ...]]:
        sections = referenced_sections(two_recipes(0, unit, sizes=4), {"new": "old"})
        assert {section.title for section in sections} >= {"Shared places", "Size", "Data"}
        return [
            (section.title, re.sub(r"D = [^,)]+", "D", claim.text), claim.holds, claim.value.split(" (")[0])
            for section in sections
            for claim in section.claims
        ]

    tokens = words(1.0)
    assert len(tokens) == 6 and all(verdict is not False for _, _, verdict, _ in tokens)
    assert words(1e6) == tokens and words(1e9) == tokens


def test_chinchillas_points_give_its_limit_with_an_interval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All 245 points: Besiroglu et al. (arXiv 2404.10102) find 1.8172 after leaving five out by eye."""
    monkeypatch.setattr(point_comparisons, "DRAWS", 20)
    with (Path(__file__).parents[1] / "reference" / "chinchilla_points.csv").open() as file:
        rows = [(1e6 * float(r["N_millions"]), 1e18 * float(r["flops_1e18"]), r["loss"]) for r in csv.DictReader(file)]
    lines = [f"chinchilla;{loss};{N:.0f};{flops / (6 * N):.0f}" for N, flops, loss in rows]
    points, _ = read_points(table(tmp_path, "Recipe;val loss;params;tokens", *lines))
    section = joint_section(points, {}, "chinchilla")
    assert section is not None and len(points) == 245
    huber = section.tables[0].rows[0]
    assert huber[1] == "huber" and huber[3] == pytest.approx(1.817, abs=0.02)
    low, high = (float(end) for end in str(huber[4]).split(" to "))
    assert low < 1.817 < high < low + 0.15
    assert "of 245 points lie more than 8 robust standard deviations off and are left out" in section.notes[0]


def test_nested_ensembles_give_a_law_in_members_without_an_interval() -> None:
    points = [LossPoint("ours", 4.0 + 0.3 / k, 1e6, 1e5, k) for k in range(1, 9)]
    (fitted,) = fit_axis(points, MEMBERS)
    assert abs(fitted.law.E - 4.0) < 1e-4
    assert fitted.law.interval is None and "share members" in fitted.law.note
    grown = [LossPoint("ours", 4.0 + 0.3 / n, 1e6 * n, 1e5, 1) for n in range(1, 9)]
    assert fit_axis(grown, SIZE)[0].law.interval is not None


def test_data_efficiency_against_the_reference() -> None:
    data = power(2.0, 300.0, 0.3)
    points = [LossPoint("base", data(d), None, d) for d in SIZES]
    points += [LossPoint("twice", data(2 * d), None, d) for d in SIZES[:2]]
    section = next(section for section in point_sections(points) if section.title == "Data efficiency")
    assert [row[3] for row in section.tables[0].rows] == [pytest.approx(2.0, rel=1e-3)] * 2


def test_too_few_points_are_only_listed() -> None:
    (section,) = point_sections([LossPoint("a", 3.0, 1e8), LossPoint("a", 2.9, 2e8)])
    assert section.title == "Points" and section.notes[0].startswith("No law")


def test_the_command_reports_a_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        f"{point.recipe},{point.loss},{point.N:.0f},1e8,1" for point in (*noisy("new", 2.8), *noisy("old", 3.0, -1))
    ]
    path = table(tmp_path, "recipe,loss,N_params,D_tokens,K", *rows, "old,,1,1,1")
    monkeypatch.setattr("sys.argv", ["epochal", "report", "--records", str(path), "--reference", "old"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    captured = capsys.readouterr()
    assert "left out: line 12: loss must be a finite number, got ''" in captured.err
    folder = tmp_path / "points-report"
    assert f"report: {folder / 'report.html'}" in captured.out
    assert (folder / "figures" / "loss-against-N-1.svg").exists()
    assert [claim.verdict for claim in read_claims(folder / "claims.json")] == ["holds", "holds"]
    assert "1 rows were left out" in (folder / "report.md").read_text()


# --- records as points ----------------------------------------------------------------------------------------------------


def test_the_best_points_of_a_campaign(tmp_path: Path) -> None:
    scale, space = load_scale("demo"), Workspace("demo", tmp_path / "results", tmp_path / "work")

    def record(name_wd: float, seed: int, loss: float | None) -> Record:
        job = scale.run("w64", 24576, Point(lr=0.01, epochs=16, wd=name_wd), seed=seed)
        results = {"loss": loss, "parameters": 5}
        return Record(job, fingerprint(job), "diverged" if loss is None else "done", results)

    # wd 1.6 has the lowest single loss but a worse mean; one seed of wd 3.2 diverged.
    runs = [record(0.8, 0, 4.2), record(0.8, 1, 4.22), record(1.6, 0, 4.1), record(1.6, 1, 4.5)]
    runs += [record(3.2, 0, 4.0), record(3.2, 1, None)]
    student = replace(runs[0].job, name="student", distill=SequenceDistillation(samples="text", fraction=0.5))
    runs.append(Record(student, "x", "done", {"loss": 3.0, "parameters": 5}))
    members = (runs[2].job.name, runs[3].job.name)
    for average, low in (("logits", 4.05), ("probs", 4.04)):
        curve = {"1": [4.1, 4.5], "2": [low]}
        job = Ensemble(name=average, runs=members, average=average)
        runs.append(Record(job, "x", "done", {"loss": low, "curve": curve, "parameters": 10}))
    points = campaign_points(Records(space, runs), "demo")
    assert points[:2] == [LossPoint("demo, single", loss, 5.0, 24576, 1) for loss in (4.2, 4.22)]
    assert points[2:] == [
        LossPoint("demo, ensembles", pytest.approx(4.3), 5.0, 24576, 1),
        LossPoint("demo, ensembles", 4.04, 5.0, 24576, 2),
    ]


def sections_of(records: Records, scale: str) -> list[Section]:
    study = Study(records, load_scale(scale))
    return [recipe.report(study) for recipe in (epoching, heavy_weight_decay)]


def test_two_campaigns_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = load_scale("demo")
    first_space, second_space = (Workspace("demo", tmp_path / side, tmp_path / side / "work") for side in ("A", "B"))
    campaign = simulate(scale, "ensembling")
    for space in (first_space, second_space):
        campaign.write(space)
    for record in load_records(second_space):  # the same campaign with higher losses
        worse = {**record.results, "loss": 1.1 * record.loss}
        write_record(second_space, replace(record, results=worse))
    sides = [
        CampaignReport(name, "kjv", records, sections_of(records, "demo"))
        for name, records in (("A", load_records(first_space)), ("B", load_records(second_space)))
    ]
    first, *rest = compare_campaigns(*sides)
    assert len(first.tables) == 1 and first.tables[0].title.endswith("claims of both")
    rows = {row[1]: row[2:] for row in first.tables[0].rows}
    beats = next(cells for text, cells in rows.items() if "beats the best standard one" in text)
    assert len(beats) == 2 and all(cell.endswith(" nats") for cell in beats)
    assert {"Size"} <= {section.title for section in rest}
    alone = compare_campaigns(sides[0], replace(sides[1], sections=sides[1].sections[:1]))[0].tables
    assert [table.columns for table in alone] == [("section", "claim", "A", "B"), ("section", "claim", "A")]
    assert {row[0] for row in alone[1].rows} == {"Heavy weight decay"}
    assert sum(len(table.rows) for table in alone) == len(first.tables[0].rows)
    with pytest.raises(ValueError, match="both campaigns are called 'A'"):
        compare_campaigns(sides[0], sides[0])
    assert "not comparable" in compare_campaigns(sides[0], replace(sides[1], data="other"))[0].notes[0]

    arguments = [
        "--results",
        str(first_space.results),
        "--against",
        str(second_space.results / "demo"),
        "--out",
        str(tmp_path / "page"),
    ]
    monkeypatch.setattr("sys.argv", ["epochal", "report", "heavy_weight_decay", "--scale", "demo", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None), capsys.readouterr().err
    assert "Claims side by side" in (tmp_path / "page" / "report.md").read_text()
