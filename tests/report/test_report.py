"""epochal.report.sections: what a reader gets, in Markdown, on the page and in the terminal."""

import builtins
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from epochal.report import figures as report_figures
from epochal.report.claims import Claim, placed, read_claims, render_claims
from epochal.report.figures import draw_bars, draw_law, draw_series, figure_style
from epochal.report.sections import (
    Figure,
    Section,
    Table,
    format_column,
    format_interval,
    format_number,
    print_summary,
    render_markdown,
    summary_table,
)
from epochal.report.write import write_report

NASTY = '<script>alert("1 & 2")</script> a|b *c* [d](e)'
VOID = {"meta", "link", "br", "hr", "img", "input"}


def curve(axes):
    draw_series(axes, [4, 1, 2], [4.1, 4.5, None], label="member <1>", low=[4.0, 4.4, None], high=[4.2, 4.6, None])
    axes.set_xlabel("epochs")
    axes.set_ylabel("validation loss")


def bars(axes):
    draw_bars(axes, ["standard", "ensemble"], [1.0, None], low=[0.9, None], high=[1.2, None])


def sections():
    claims = (
        Claim(text=NASTY, value="0.27 nats", interval=(0.2512, 0.289), seeds=3, holds=True, paper="0.3 nats"),
        Claim(text="second", value="", holds=None, provisional=("one seed", "neighbour wd=3.2 missing")),
        Claim(text="third", value="1,200 runs", holds=False),
        Claim(text="fourth", value="", untestable="needs three sizes"),
    )
    table = Table(
        title="Loss",
        columns=("model", "tokens", "wd", "loss"),
        rows=(("w64", 1_200_000, 0.1, 4.05), (NASTY, 3, 1.6, None), ("nan", None, None, math.nan)),
    )
    figures = (
        Figure(name="epochs", caption=f"Loss {NASTY}", draw=curve),
        Figure(name="efficiency", caption="Data", draw=bars),
    )
    return [
        Section(title="First", question="Why?", claims=claims, tables=(table,), figures=figures, notes=("see `wd_x`",)),
        Section(title="Nothing yet", question="What?"),
    ]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(sections(), folder, title=f"Demo {NASTY}", summary=("one", "two")) == folder / "report.html"
    return folder


class Page(HTMLParser):
    """Checks that tags balance and keeps what the tests ask for."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(folder):
    page = Page()
    page.feed((folder / "report.html").read_text())
    page.close()
    return page


def test_all_files_are_there_and_nothing_else(folder):
    figures = [f"figures/{name}.{suffix}" for name in ("efficiency", "epochs") for suffix in ("png", "svg")]
    assert sorted(files(folder)) == ["claims.json", *figures, "report.html", "report.md"]
    assert (folder / "figures/epochs.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_well_formed_and_escaped(page):
    assert page.open == []
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert NASTY in " ".join("".join(page.text).split())


def test_the_page_asks_nothing_of_the_network(folder, page):
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_identifiers_are_unique_and_every_reference_has_its_target(folder, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text()
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_tables_can_be_sorted(page):
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads and all(head["aria-sort"] == "none" and head["scope"] == "col" for head in heads)
    assert sum(tag == "button" for tag, _ in page.tags) == len(heads)
    keys = [attributes.get("data-value") for tag, attributes in page.tags if tag == "td"]
    assert "1200000" in keys and "4.05" in keys and "" in keys


def test_points_tell_their_numbers(folder):
    text = (folder / "report.html").read_text()
    titles = re.findall(r'class="hit"[^>]*><title>([^<]*)</title>', text)
    assert titles[0] == "member &lt;1&gt;\nepochs: 1\nvalidation loss: 4.5000\n90%: 4.4000 to 4.6000"
    assert len(titles) == 3  # two points (one is missing) and one bar
    assert titles[2].startswith("standard\n")


def test_figures_follow_light_and_dark(folder):
    text = (folder / "report.html").read_text()
    assert "var(--c0)" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert "#0072b2" in (folder / "figures/epochs.svg").read_text()


def test_two_writes_give_the_same_bytes(folder, tmp_path):
    write_report(sections(), tmp_path, title=f"Demo {NASTY}", summary=("one", "two"))
    assert files(tmp_path) == files(folder)
    assert not any(re.search(rb"20\d\d-\d\d-\d\d|Matplotlib", data) for data in files(folder).values())


def test_user_settings_do_not_show_through(folder, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20}):
        write_report(sections(), tmp_path, title=f"Demo {NASTY}", summary=("one", "two"))
        assert matplotlib.rcParams["font.size"] == 20
    assert files(tmp_path) == files(folder)


def test_markdown(folder):
    text = (folder / "report.md").read_text()
    assert text.index("## All claims") < text.index("## First")
    assert "4 claims: 1 reproduced, 1 does not hold, 1 not testable at this scale, 1 open; 1 provisional." in text
    assert "| 0.3 nats | 0.27 nats | 0.25 to 0.29 | 3 | reproduced |" in text
    assert "| open; *provisional*: one seed; neighbour wd=3.2 missing |" in text
    assert "| not testable at this scale: needs three sizes |" in text
    assert "| w64 | 1,200,000 | 0.1 | 4.0500 |" in text
    assert "(figures/epochs.svg)" in text and "see `wd_x`" in text
    assert "<script" not in text and r"a\|b \*c\* \[d\](e)" in text


def test_claims_are_left_for_other_tables(tmp_path):
    command = "epochal run epoching --scale demo"
    section = replace(sections()[0], figures=(), command=command)
    write_report([section], tmp_path, title="any: thing", scale="demo")
    rows = read_claims(tmp_path / "claims.json")
    assert [row.verdict for row in rows] == ["reproduced", "open", "does not hold", "not testable at this scale"]
    assert rows[0].text == NASTY and rows[0].interval == (0.2512, 0.289) and rows[0].paper == "0.3 nats"
    assert {(row.scale, row.section, row.command) for row in rows} == {("demo", "First", command)}
    assert f"Records made by `{command}`." in (tmp_path / "report.md").read_text()
    (tmp_path / "claims.json").write_text('[{"text": 3}]')
    with pytest.raises(ValueError, match="claim 1"):
        read_claims(tmp_path / "claims.json")


def test_an_open_interval_is_null_in_claims_json_and_infinite_again(tmp_path):
    ends = [(1.2, math.inf), (-math.inf, 0.5), None]
    rows = [placed(Claim(text="a", value="b", interval=e), scale="s", section="t", command="c") for e in ends]
    (tmp_path / "claims.json").write_text(render_claims(rows), encoding="utf-8")
    assert [row["interval"] for row in json.loads((tmp_path / "claims.json").read_text())] == [
        [1.2, None],
        [None, 0.5],
        None,
    ]
    assert [row.interval for row in read_claims(tmp_path / "claims.json")] == ends


def test_a_claim_is_judged_or_untestable():
    with pytest.raises(ValueError, match="leave one of the two out"):
        Claim(text="t", value="", holds=True, untestable="why")


def test_no_claims_and_no_figures_need_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(report_figures, "require_matplotlib", lambda: pytest.fail("asked for matplotlib"))
    write_report([], tmp_path, title="Empty")
    assert "No claims yet" in (tmp_path / "report.html").read_text()
    assert "No claims yet" in (tmp_path / "report.md").read_text()


def test_a_missing_matplotlib_is_one_sentence(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install matplotlib\.$"):
        write_report(sections(), tmp_path / "out", title="x")
    assert not (tmp_path / "out").exists()


def test_a_failing_figure_is_named_and_leaves_the_old_report(tmp_path):
    write_report(sections(), tmp_path, title="old")
    before = files(tmp_path)

    def fails(axes):
        axes.plot([1], [2])
        raise KeyError("wd")

    broken = Section(title="Broken", question="?", figures=(Figure(name="decay", caption="", draw=fails),))
    with pytest.raises(ValueError, match="figure 'decay' could not be drawn"):
        write_report([*sections(), broken], tmp_path, title="new")
    assert files(tmp_path) == before


def test_a_new_report_replaces_the_old_one(tmp_path):
    write_report(sections(), tmp_path, title="old")
    write_report(sections(), tmp_path, title="new")
    assert "<h1>new</h1>" in (tmp_path / "report.html").read_text()
    assert not [name for name in files(tmp_path) if "tmp" in name]


@pytest.mark.parametrize("name", ["../up", "a b", "", ".hidden", "a/b"])
def test_a_figure_name_that_is_no_file_name(tmp_path, name):
    section = Section(title="S", question="?", figures=(Figure(name=name, caption="", draw=curve),))
    with pytest.raises(ValueError, match="is no file name"):
        write_report([section], tmp_path, title="x")


def test_two_figures_of_one_name(tmp_path):
    section = Section(title="S", question="?", figures=(Figure(name="a", caption="", draw=curve),) * 2)
    with pytest.raises(ValueError, match="two figures are called 'a'"):
        write_report([section], tmp_path, title="x")


def test_a_ragged_table_is_named():
    table = Table(title="T", columns=("a", "b"), rows=((1,),))
    with pytest.raises(ValueError, match="table 'T': a row has 1 cells for 2 columns"):
        render_markdown([Section(title="S", question="?", tables=(table,))], title="x")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (4.0, "4.0000"),
        (0.0012, "0.0012"),
        (-0.0315, "-0.0315"),
        (3e-5, "3e-05"),
        (1_234_567, "1,234,567"),
        (1_500_000.0, "1,500,000"),
        (1234.56, "1,234.6"),
        (1e18, "1e+18"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "nan"),
        (True, "yes"),
        ("text", "text"),
    ],
)
def test_format_number(value, shown):
    assert format_number(value) == shown


def test_settings_are_shown_as_written_and_measurements_with_four_decimals():
    assert format_column("lr", [0.001, 3e-4, None]) == ["0.001", "0.0003", "–"]
    assert format_column("wd", [0.1, 12.8, 2000.0]) == ["0.1", "12.8", "2,000"]
    assert format_column("E", [4.25, 4.19431]) == ["4.2500", "4.1943"]
    assert format_column("validation loss", [4.25]) == ["4.2500"]


def test_an_interval_has_the_decimals_of_its_number():
    def shown(value, ends):
        return format_interval(Claim(text="", value=value, interval=ends))

    assert shown("5.17 times", (4.8, 6.24)) == "4.80 to 6.24"
    assert shown("0.1790 nats", (0.16, 0.2)) == "0.1600 to 0.2000"
    assert shown("6 times", (4.8, math.inf)) == "4.8000 to ∞"


def test_summary_in_the_terminal():
    from rich.console import Console

    rows = summary_table(sections())
    assert rows[0] == (NASTY, "0.3 nats", "0.27 nats", "0.25 to 0.29", "3", "reproduced")
    assert rows[1][3:] == ("–", "1", "open (provisional: one seed; neighbour wd=3.2 missing)")
    assert rows[3][-1] == "not testable at this scale (needs three sizes)"
    console = Console(file=io.StringIO(), width=200)
    print_summary(sections(), console)
    assert "[d](e)" in console.file.getvalue() and "1 provisional." in console.file.getvalue()


class Line:
    """A law of known constants, as `epochal.scaling` fits them."""

    E, interval = 3.0, None

    def predict(self, x):
        return 3.0 + 1.0 / x

    def predict_interval(self, x):
        return x * math.nan, x * math.nan


class Sure(Line):
    interval = {"E": (-50.0, 3.1)}  # noqa: RUF012

    def predict_interval(self, x):
        return self.predict(x) - 0.1, self.predict(x) + 0.1


@pytest.mark.parametrize("law", [Line(), Sure()])
def test_a_law_is_drawn_with_its_limit(law):
    drawing = report_figures.render("law", lambda axes: draw_law(axes, law, 1, 100, label="fit"))
    (limit,) = drawing.points
    assert (limit.series, limit.x, limit.y) == ("fit, limit", math.inf, 3.0)
    assert (limit.low, limit.high) == (law.interval or {"E": (None, None)})["E"]


def test_a_wide_interval_does_not_flatten_the_curve():
    limits = []

    def draw(axes):
        draw_law(axes, Sure(), 1, 100)
        limits.extend(axes.get_ylim())

    report_figures.render("law", draw)
    assert limits[0] > 1.5


def test_a_fitted_law_is_drawn():
    from epochal.scaling import fit_power_law

    law = fit_power_law([1, 2, 4, 8, 16], [4.0, 3.52, 3.24, 3.13, 3.06])
    (limit,) = report_figures.render("law", lambda axes: draw_law(axes, law, 1, 16)).points
    assert limit.y == law.E and (limit.low, limit.high) == law.interval["E"]


def test_points_of_plain_matplotlib_are_found():
    def draw(axes):
        axes.plot([1, 2], [1, 2], "o", label="line")
        axes.plot([1, 2], [2, 1])
        axes.errorbar([1, 2], [3, 4], yerr=0.1, fmt="s", label="error")
        axes.scatter([1], [5], label="cloud")
        axes.bar([1], [6], label="bar")

    drawing = report_figures.render("plain", draw)
    assert [(p.series, p.y) for p in drawing.points] == [
        ("line", 1),
        ("line", 2),
        ("error", 3),
        ("error", 4),
        ("cloud", 5),
        ("bar", 6),
    ]
    use = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style', drawing.svg)]
    for point in drawing.points[:4]:  # a point is where its marker is
        assert min(math.dist(point.at, marker) for marker in use) < 0.01


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda axes: draw_series(axes, [1], [1], low=[1]), "only one end of its band"),
        (lambda axes: draw_series(axes, [1, 2], [1]), "1 values of y for 2 of x"),
        (lambda axes: draw_bars(axes, ["a"], [1], high=[1]), "only one end"),
        (lambda axes: draw_bars(axes, ["a"], [1, 2]), "1 bar names for 2 values"),
        (lambda axes: draw_law(axes, Line(), 0, 1), "give 0 < x_min < x_max"),
    ],
)
def test_wrong_use_of_the_drawing_helpers(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        report_figures.render("wrong", draw)


def test_points_beside_a_law_are_not_joined():
    def draw(axes):
        line = draw_series(axes, [1, 2], [3, 2], low=[2.9, 1.9], high=[3.1, 2.1], join=False)
        assert line.get_linestyle() == "None" and line.get_marker() == "o"

    assert [point.low for point in report_figures.render("points", draw).points] == [2.9, 1.9]


def test_figure_style_restores_the_settings():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure_style():
        assert matplotlib.rcParams["svg.hashsalt"] == "epochal"
    assert dict(matplotlib.rcParams) == before


def test_importing_the_report_is_cheap():
    code = "import sys, epochal.report.sections; print({'torch', 'matplotlib', 'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent / "src",
    )
    assert done.stdout.strip() == "set()"
