"""Committed reports and pages follow from the committed records, without torch."""

import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import simulate

from epochal.config import REPOSITORY
from epochal.records import Record, Records, Workspace, load_records
from epochal.report.claims import FEWEST_SEEDS, ClaimRow, read_claims
from epochal.run import Run
from epochal.scale import load_scale
from epochal.search.descent import on_grid
from epochal.study import Study
from recipes import _results_page as results_page
from recipes import ensembling, epoching
from recipes.heavy_weight_decay import TUNED, size_law

COMMITTED = sorted(path.parent.name for path in (REPOSITORY / "recipes" / "results").glob("*/claims.json"))
COMMITTED = [scale for scale in COMMITTED if scale != "demo"]  # the demo's results are not committed
# Replicated rows whose intervals do not meet.
APART = {
    # The searches ended at optima that are no neighbors, 0.03 nats apart for one model.
    "micro-again: ensembling.limit.w16.logits.24576",
    "micro-again: ensembling.limit.w16.probs.24576",
    # Both depend on which of two settings members have, whose limits tie (docs/kjv.md).
    "kjv-again: distillation.share",
    "kjv-again: distillation.beats-teacher",
}
WITHOUT_TORCH = """
import sys
class Absent:  # Not None in sys.modules, which scipy.stats would take for a torch that is loaded.
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate"):
            raise ImportError(name + " is absent")
sys.meta_path.insert(0, Absent())
from epochal.cli import main
sys.argv = ["epochal", "report", "--scale", sys.argv[1]]
main()
"""


@functools.cache
def records_of(scale: str) -> Records:
    return load_records(Workspace(scale, REPOSITORY / "recipes" / "results"))


def redraw(scale: str, folder: Path) -> None:
    """Run `epochal report` in a folder that holds records alone, in a process that cannot import torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY / "src"), str(REPOSITORY)))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, scale],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def assert_same(fresh: Path, committed: Path) -> None:
    """Compare two texts to the byte, but for the last digit shown of a fraction: fits differ between processors."""
    fraction = re.compile(r"(\d+\.\d+(?:e-?\d+)?)")
    ours, theirs = (fraction.split(path.read_text(encoding="utf-8")) for path in (fresh, committed))
    assert ours[::2] == theirs[::2]
    for one, other in zip(ours[1::2], theirs[1::2], strict=True):
        last = 10.0 ** -len(other.partition(".")[2]) if "e" not in other else 0.0
        assert float(one) == pytest.approx(float(other), rel=1e-9, abs=max(1.01 * last, 1e-10)), (one, other)


@pytest.mark.parametrize("scale", COMMITTED)
def test_committed_reports_follow_from_committed_records(scale: str, tmp_path: Path) -> None:
    committed = REPOSITORY / "recipes" / "results" / scale
    shutil.copytree(committed / "records", tmp_path / "recipes" / "results" / scale / "records")
    redraw(scale, tmp_path)
    fresh = tmp_path / "recipes" / "results" / scale
    assert_same(fresh / "report.md", committed / "report.md")
    assert_same(fresh / "claims.json", committed / "claims.json")
    fresh_claims = read_claims(fresh / "claims.json")
    assert all(row.id for row in fresh_claims)
    # A report without figures has no folder for them.
    figures = {path.name for path in (committed / "figures").glob("*")}
    assert {path.name for path in (fresh / "figures").glob("*")} == figures


@pytest.mark.parametrize("scale", COMMITTED)
def test_no_known_run_of_the_grid_beats_a_tuned_optimum(scale: str) -> None:
    study = Study(records_of(scale), load_scale(scale))
    for tokens in study.scale.unique_tokens:
        for model in study.scale.models:
            search = study.search(TUNED, model, tokens)
            best = search.descent.best
            if best is None or not search.descent.certified:
                continue
            known = study.known_points(TUNED, model, tokens)
            losses = {point: search.loss_of(point) for point in known if on_grid(point, best, search.grid)}
            better = [point for point, loss in losses.items() if loss is not None and loss < search.loss_of(best)]  # type: ignore[operator]
            assert not better, f"{search.what} ended at {best}, and the records hold {better[0]}, which is better"


@pytest.mark.parametrize("scale", COMMITTED)
def test_a_settled_verdict_for_a_claim_has_an_interval_or_three_seeds(scale: str) -> None:
    """Of its number or of each of its cases; such a verdict is green."""
    for row in read_claims(REPOSITORY / "recipes" / "results" / scale / "claims.json"):
        if row.holds and not row.provisional:
            cases = bool(row.cases) and all(case.interval is not None for case in row.cases)
            assert row.interval is not None or cases or row.seeds >= FEWEST_SEEDS, f"{row.id}: {row.value}"


def test_replicated_intervals_meet() -> None:
    """Of two honest 90% intervals with three seeds each, 98% meet."""
    rows = {scale: read_claims(REPOSITORY / "recipes" / "results" / scale / "claims.json") for scale in COMMITTED}
    pairs = {
        f"{scale}: {name}": meets
        for scale in COMMITTED
        for original in (results_page.replicated_scale(scale, COMMITTED),)
        if original
        for name, meets in results_page.meeting(rows[original], rows[scale]).items()
    }
    assert {name for name, meets in pairs.items() if not meets} == APART


def test_committed_texts_follow_from_committed_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMMITTED:
        pytest.skip("no campaign has been committed yet")
    monkeypatch.chdir(REPOSITORY)
    read = {scale: read_claims(results_page.RESULTS / scale / "claims.json") for scale in COMMITTED}
    rows = results_page.most_answers_first(read)
    assert (results_page.RESULTS / "README.md").read_text() == results_page.claims_page(rows)
    readme = Path("README.md").read_text()
    first, claims = next(iter(rows.items()))
    assert readme == results_page.replace_results(readme, results_page.main_results(first, claims))


def test_the_campaign_that_answers_most_questions_comes_first() -> None:
    row = read_claims(REPOSITORY / "recipes" / "results" / "micro" / "claims.json")[0]

    def claims(*names: str) -> list[ClaimRow]:
        return [replace(row, id=name) for name in names]

    rows = {
        "many others": claims("a", "b", "c", "d"),
        "two": claims("heavy-decay.monotone", "distillation.share"),
        "two and another": claims("heavy-decay.monotone", "distillation.share", "a"),
        "one, for two sizes": claims("heavy-decay.monotone", "heavy-decay.monotone", "a", "b"),
    }
    assert list(results_page.most_answers_first(rows)) == [
        "two and another",
        "two",
        "one, for two sizes",
        "many others",
    ]


def test_every_claim_is_on_the_page_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace("demo", tmp_path / "recipes" / "results", tmp_path / "work")
    simulate(load_scale("demo"), "distillation").write(space)
    redraw("demo", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{results_page.BEGIN}\nformer text\n{results_page.END}\nafter\n")
    monkeypatch.setattr(results_page, "REPOSITORY", tmp_path)
    results_page.main(["demo"])
    claims = json.loads((tmp_path / "recipes" / "results" / "demo" / "claims.json").read_text())
    page = (tmp_path / "recipes" / "results" / "README.md").read_text()
    assert len(claims) > 5
    for claim in claims:
        (line,) = [
            line
            for line in page.splitlines()
            if line.startswith(f"| {claim['text'].split('(')[0]}") and claim["value"].replace("~", "\\~") in line
        ]
        assert line.endswith(f"`{claim['command']}` |")
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "former text" not in readme
    assert "The whole chain, D = 24,576 tokens" in readme
    for figure in ("loss-against-size-24576", "whole-chain"):
        assert f"(recipes/results/demo/figures/{figure}.svg)" in readme


def test_every_claim_and_figure_of_the_readme_exists() -> None:
    """A misspelled id would leave its claim out of the page."""
    micro = REPOSITORY / "recipes" / "results" / "micro"
    known = {row.id for row in read_claims(micro / "claims.json")}
    known.add("heavy-decay.predicted-size")  # which needs five sizes; tests/recipes/test_chain.py makes it
    figures = {path.stem for path in (micro / "figures").glob("*.svg")}
    tokens = load_scale("micro").unique_tokens[0]
    assert {name for shown in results_page.SHOWN for name in shown.claims} <= known
    assert {shown.figure.format(tokens=tokens) for shown in results_page.SHOWN} <= figures


def row(id: str, value: str, interval: tuple[float, float] | None) -> ClaimRow:
    place = {"scale": "s", "section": "Optimizers", "verdict": "holds", "command": "epochal run"}
    return ClaimRow(id=id, text=f"text of {id}", value=value, interval=interval, holds=True, **place)


def test_a_replication_is_compared_with_its_original_by_the_ids_of_claims() -> None:
    first = [row("a", "1.0 nats", (0.9, 1.1)), row("b", "2.0 nats", (1.9, 2.1)), row("c", "3", None)]
    again = [row("a", "1.2 nats", (1.0, 1.3)), row("b", "2.4 nats", (2.2, 2.6)), row("c", "3", None)]
    again.append(row("d", "4.0", (3.0, 5.0)))
    page = results_page.claims_page({"s": first, "s-again": again})
    comparison = page.split("### s, and s-again on other seeds")[1]
    assert "1 of 2 intervals overlap. " in comparison
    lines = [line for line in comparison.splitlines() if line.startswith("| text of")]
    assert [(line[:11], line.split(" | ")[-1]) for line in lines] == [("| text of a", "yes |"), ("| text of b", "no |")]
    assert "on other seeds" not in results_page.claims_page({"s": first})


def test_a_replication_is_recognized_by_its_name() -> None:
    assert results_page.replicated_scale("s-drawn-again", ["s", "s-drawn-again", "t"]) == "s"
    assert results_page.replicated_scale("s-drawn", ["s"]) is None


def test_a_readme_without_marks_and_a_scale_without_report_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        results_page.replace_results("no marks", "text")
    with pytest.raises(ValueError, match="name at least one scale"):
        results_page.main([])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        results_page.main(["demo"])


# Pages that quote a report: the page, the first and last words of what quotes it, the report, and the numbers.
QUOTES = [
    ("regularizers.md", "Of 15 arms", "Many optima", "regularizers", r"0\.\d{3}"),
    ("forgetting.md", "A model that continues", "Recipe\n`continued`", "micro", r"\b\d\.\d{2}\b"),
    ("forgetting.md", "In `micro` **replay**", "In a Run", "micro", r"\b[1-9]\.\d{2}\b"),
    ("regime.md", "in `micro` (w32) such", "|\n", "micro", r"\d{2}%"),
]


@pytest.mark.parametrize(("page", "first", "last", "scale", "numbers"), QUOTES)
def test_pages_quote_numbers_of_committed_reports(page: str, first: str, last: str, scale: str, numbers: str) -> None:
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    quoted = re.findall(numbers, text.split(first)[1].split(last)[0])
    report = (REPOSITORY / "recipes" / "results" / scale / "report.md").read_text(encoding="utf-8")
    cells = set(re.findall(r"(?<=[| -])\d+\.?\d*%?(?= \|)", report))
    unit = 10.0 ** -len(quoted[0].partition(".")[2])

    def shown(number: str) -> bool:
        if number.endswith("%"):
            return number in cells
        return any(abs(float(number) - float(cell)) < 0.51 * unit for cell in cells if not cell.endswith("%"))

    assert len(quoted) > 1 and [number for number in quoted if not shown(number)] == []


def test_numbers_of_regularizers_are_those_of_the_arms_that_a_sentence_names() -> None:
    """Each point of the list names arms; its numbers are cells of their rows, or test losses above the plain one."""
    report = (REPOSITORY / "recipes" / "results" / "regularizers" / "report.md").read_text(encoding="utf-8")
    lines = report.split("| arm |")[1].split("\n\n")[0].splitlines()[2:]
    rows = {
        cells[0].lower(): cells[2:] for line in lines if (cells := [one.strip() for one in line.strip("|").split("|")])
    }
    loss = 4  # column of the test loss
    page = (REPOSITORY / "docs" / "regularizers.md").read_text(encoding="utf-8")
    points = page.split("What it found:")[1].split("Many optima")[0].lower().split("\n- ")[1:]
    for point in points:
        text = " ".join(point.split())
        named = [cells for arm, cells in rows.items() if arm in text and arm != "plain"]
        shown = {abs(float(cell)) for cells in named for cell in cells if re.fullmatch(r"-?\d+\.\d+", cell)}
        shown |= {abs(float(cells[loss]) - float(rows["plain"][loss])) for cells in named}
        numbers = re.findall(r"\d\.\d{3}", text)
        assert named and [n for n in numbers if min(abs(float(n) - cell) for cell in shown) > 0.00051] == []


def test_the_prediction_of_kjv_follows_from_the_records_of_its_smaller_sizes() -> None:
    scale = load_scale("kjv")
    # The grid ended at 128 epochs when the prediction was written.
    grid = replace(scale.grid, epochs=tuple(epochs for epochs in scale.grid.epochs if epochs <= 128))
    smaller = replace(scale, grid=grid, ladder=tuple(rung for rung in scale.ladder if rung.model != "w128"))
    study = Study(records_of("kjv"), smaller)
    law = size_law(study, 49152)
    assert law is not None
    page = (REPOSITORY / "docs" / "kjv.md").read_text(encoding="utf-8")
    (size,) = re.findall(r"w128 \(N = ([\d,]+)\)", page)
    predicted = re.findall(r"predicted (\S+) nats, 90% (\S+) to (\S+)", page)
    n = float(size.replace(",", ""))
    ends = law.predict_interval(n, seeds=study.judged_seeds)
    # One run of w64 was made again on another processor after the prediction, because its weights were needed.
    assert [float(part) for part in predicted[0]] == pytest.approx([float(law.predict(n)), *map(float, ends)], abs=1e-3)
    assert {record.results["parameters"] for record in records_of("kjv") if of_model(record, "w128")} == {n}


def of_model(record: Record, model: str) -> bool:
    return isinstance(record.job, Run) and record.job.model == model


def gains_of_tuned_decay(study: Study, tokens: int) -> dict[str, float]:
    """Return by how many nats each size is better than with the usual decay, smallest size first."""
    arms = epoching.standard(study), TUNED
    pairs = {model: [study.best(arm, model, tokens) for arm in arms] for model in study.scale.models_at(tokens)}
    return {model: usual.mean - tuned.mean for model, (usual, tuned) in pairs.items() if usual and tuned}


def claim_of(scale: str, id: str) -> ClaimRow:
    rows = read_claims(REPOSITORY / "recipes" / "results" / scale / "claims.json")
    (row,) = [row for row in rows if row.id == id]
    return row


def cases_of(scale: str, id: str) -> dict[str, float]:
    return {case.name: case.value for case in claim_of(scale, id).cases}


def test_the_reasons_that_kjv_gives_for_failing_claims_follow_from_the_records() -> None:
    page = " ".join((REPOSITORY / "docs" / "kjv.md").read_text(encoding="utf-8").split())
    records = records_of("kjv")
    windows = cases_of("kjv", "heavy-decay.window").values()
    assert f"is {min(windows):.1f} to {max(windows):.1f} epochs, the paper's" in page
    short = [tau for name, tau in cases_of("micro", "heavy-decay.window").items() if name.endswith((".6144", ".12288"))]
    assert f"at 6,144 and 12,288 tokens are {min(short):.1f} to {max(short):.1f} epochs" in page

    rule = [
        (next(r.results["parameters"] for r in records if of_model(r, model)) / int(tokens), gain > 0)
        for scale in ("micro", "kjv")
        for name, gain in cases_of(scale, "ensembling.rule").items()
        for model, tokens in [name.split(".")[:2]]
    ]
    for words, low, high in (("below 2", 0, 2), ("2 to 4", 2, 4), ("above 4", 4, 1e9)):
        lower = [gains for ratio, gains in rule if low <= ratio < high]
        assert f"| {words} | {len(lower)} | {sum(lower)} |" in page

    missed = cases_of("kjv", "ensembling.predicted")
    (worst,) = [name for name, error in missed.items() if abs(error) > 0.01]
    assert worst == "w64.probs.98304" and f"by {missed[worst]:.4f} nats in one of" in page
    assert f"predicted to {abs(missed['w64.logits.98304']):.4f} nats" in page

    study = Study(records, load_scale("kjv"))
    (members,) = [search for search in ensembling.searches(study) if search.what == "w32 members, D = 49,152"]
    flat = {(64, 0.4), (128, 0.4), (128, 0.8)}
    limits = {(p.epochs, p.wd): limit for p in members.descent.visited if (limit := members.loss_of(p)) is not None}
    best = min(limits.values())
    assert {setting for setting, limit in limits.items() if limit - best < 0.001} == flat
    assert members.descent.best is not None and members.descent.best.epochs == 128
    assert min(limit for (epochs, _), limit in limits.items() if epochs == 256) > best

    students = {
        wd: [r.test_loss for r in records for seed in range(1, 6) if r.job.name == STUDENT.format(wd=wd, seed=seed)]
        for wd in (0.2, 0.05)
    }
    assert f"have {statistics.fmean(students[0.2]):.3f} nats" in page
    assert f"best, with {statistics.fmean(students[0.05]):.3f}" in page
    assert f"differ by up to {max(students[0.05]) - min(students[0.05]):.2f} nats" in page
    tied = sorted(study.best(TUNED, "w64", 49152).tied)
    assert f"within noise of it and {tied[1] - tied[0]:.3f} nats above" in page

    gains = {tokens: gains_of_tuned_decay(study, tokens) for tokens in sorted(study.scale.unique_tokens)}
    *first, last = [f"{gain['w64']:.3f}" for gain in gains.values()]
    assert f"with w64 {', '.join(first)} and {last} nats over" in page
    assert all(list(gain.values()) == sorted(gain.values()) for gain in gains.values())
    assert list(gains[196608]) == ["w64"]


def test_numbers_of_steps_members_and_ends_that_kjv_names_follow_from_the_records() -> None:
    page = " ".join((REPOSITORY / "docs" / "kjv.md").read_text(encoding="utf-8").split())
    study = Study(records_of("kjv"), load_scale("kjv"))
    cells = [(model, tokens) for tokens in study.scale.unique_tokens for model in study.scale.models_at(tokens)]
    ends = [cell for arm in (TUNED, epoching.standard(study)) for cell in cells if study.best(arm, *cell).edges]
    assert ends == [("w16", 98304)] * 2 and f"One of {len(cells)} tuned optima lies there, w16 at 98,304 tokens" in page

    steps = claim_of("kjv", "heavy-decay.monotone").cases
    noise = {step.name for step in steps if step.interval and step.interval[0] < 0 < step.interval[1]}
    assert noise == {step.name for step in steps if step.name.startswith(("w64-", "w96-"))}

    losses = {record.job.name: record for record in records_of("kjv")}
    members = [losses[f"w64-98.304k-lr0.003-ep64-wd0.4-s{seed}"].test_loss for seed in range(8)]
    worse = statistics.fmean(members) - study.best(TUNED, "w64", 98304).mean
    assert f"makes one of them {worse:.1f} nats worse than the best single model" in page
    (four,) = re.findall(r"to (\S+) off\)", str(claim_of("kjv", "ensembling.predicted").value))
    assert f"four are {float(four):.3f} nats above eight" in page

    point = study.best(TUNED, "w32", 49152).point
    assert point is not None and 4 * point.epochs == 128
    first = {
        model: min(
            r.loss for name, r in losses.items() if name.startswith(f"{model}-196.608k") and name.endswith("-s0")
        )
        for model in ("w32", "w64")
    }
    assert f"is {first['w32']:.3f} on the validation split, that of the same seed of w64 {first['w64']:.3f}." in page


# A student of 8 w32 members at 49,152 tokens.
STUDENT = "w64-49.152k-lr0.01-ep16-wd{wd:g}-text-13f74f-0.75-s{seed}"
