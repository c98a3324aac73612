"""Committed results: both generated texts follow from the records, and a machine without torch can redraw them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import simulate

from epochal.config import REPOSITORY
from epochal.records import Workspace
from epochal.report.claims import ClaimRow
from epochal.scale import load_scale
from recipes import _results_page as results_table

COMMITTED = sorted(path.parent.name for path in (REPOSITORY / "recipes" / "results").glob("*/claims.json"))
COMMITTED = [scale for scale in COMMITTED if scale != "demo"]  # the demo's results are not committed
WITHOUT_TORCH = """
import sys
class Absent:  # None in sys.modules would do, but scipy.stats takes what is there for torch
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate"):
            raise ImportError(name + " is absent here")
sys.meta_path.insert(0, Absent())
from epochal.cli import main
sys.argv = ["epochal", "report", "--scale", sys.argv[1]]
main()
"""


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


@pytest.mark.parametrize("scale", COMMITTED)
def test_committed_reports_follow_from_committed_records(scale: str, tmp_path: Path) -> None:
    committed = REPOSITORY / "recipes" / "results" / scale
    shutil.copytree(committed / "records", tmp_path / "recipes" / "results" / scale / "records")
    redraw(scale, tmp_path)
    fresh = tmp_path / "recipes" / "results" / scale
    assert (fresh / "report.md").read_text() == (committed / "report.md").read_text()
    assert (fresh / "claims.json").read_text() == (committed / "claims.json").read_text()
    figures = {path.name for path in (committed / "figures").iterdir()}
    assert {path.name for path in (fresh / "figures").iterdir()} == figures


def test_committed_texts_follow_from_committed_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMMITTED:
        pytest.skip("no campaign has been committed yet")
    monkeypatch.chdir(REPOSITORY)
    scales = results_table.longest_first(COMMITTED)
    rows = {scale: results_table.read_claims(results_table.RESULTS / scale / "claims.json") for scale in scales}
    assert (results_table.RESULTS / "README.md").read_text() == results_table.claims_page(rows)
    readme = Path("README.md").read_text()
    assert readme == results_table.spliced(readme, results_table.headline(scales[0]))


def test_the_campaign_with_most_records_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for scale, count in {"a": 1, "b": 3, "c": 0}.items():
        (results_table.RESULTS / scale / "records").mkdir(parents=True)
        for k in range(count):
            (results_table.RESULTS / scale / "records" / f"{k}.json").touch()
    assert results_table.longest_first(["a", "c", "b"]) == ["b", "a", "c"]


def test_every_claim_stands_in_the_table_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace("demo", tmp_path / "recipes" / "results", tmp_path / "work")
    for _ in simulate(space, "distillation", load_scale("demo")):
        pass
    redraw("demo", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{results_table.BEGIN}\nold\n{results_table.END}\nafter\n")
    monkeypatch.setattr(results_table, "REPOSITORY", tmp_path)
    results_table.main(["demo"])
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
    assert "old" not in readme
    assert "The whole chain, D = 24,576 tokens" in readme
    for figure in ("loss-against-epochs", "loss-against-size-24576", "loss-against-members-24576"):
        assert f"(recipes/results/demo/figures/{figure}.svg)" in readme


def row(text: str, value: str, interval: tuple[float, float] | None, scale: str) -> ClaimRow:
    where = {"scale": scale, "section": "Optimizers", "verdict": "holds", "command": "epochal run"}
    return ClaimRow(text=text, value=value, interval=interval, holds=True, **where)


def test_a_repetition_on_other_seeds_stands_beside_the_first_campaign() -> None:
    first = [row("a", "1.0 nats", (0.9, 1.1), "s"), row("b", "2.0 nats", (1.9, 2.1), "s"), row("c", "3", None, "s")]
    again = [row("a", "1.2 nats", (1.0, 1.3), "s-again"), row("b", "2.4 nats", (2.2, 2.6), "s-again")]
    again += [row("c", "3", None, "s-again"), row("d", "4.0", (3.0, 5.0), "s-again")]
    page = results_table.claims_page({"s": first, "s-again": again})
    below = page.split("### s, and s-again on other seeds")[1]
    assert "1 of 2 intervals meet. " in below
    assert [line.split(" | ")[-1] for line in below.splitlines() if line.startswith(("| a", "| b"))] == [
        "yes |",
        "no |",
    ]
    assert "| c" not in below and "| d" not in below
    assert "on other seeds" not in results_table.claims_page({"s": first})
    assert results_table.repeated("s-drawn-again", ["s", "s-drawn-again", "t"]) == "s"
    assert results_table.repeated("s-drawn", ["s"]) is None


def test_a_readme_without_marks_and_a_scale_without_report_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        results_table.spliced("no marks", "text")
    with pytest.raises(ValueError, match="name at least one scale"):
        results_table.main([])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        results_table.main(["demo"])
