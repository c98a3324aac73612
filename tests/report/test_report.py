"""What a report shows: in Markdown, on the page, in claims.json, in the figures and in the terminal."""

import builtins
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from epochal.report import write
from epochal.report.claims import Case, Claim, placed, read_claims, render_claims
from epochal.report.figures import compact, draw_law, draw_ranking, draw_series, render_interactive, render_svg
from epochal.report.markdown import render_markdown
from epochal.report.sections import Figure, Section, Table, format_column, format_interval, format_number
from epochal.report.terminal import print_summary
from epochal.report.write import write_report

NASTY = '<script>alert("1 & 2")</script> a|b *c* [d](e)'


def curve(axes):
    draw_series(axes, [4, 1, 2], [4.1, 4.5, None], label="member <1>", low=[4.0, 4.4, None], high=[4.2, 4.6, None])
    axes.set_xlabel("epochs")


def ranking(axes):
    draw_ranking(axes, ["standard", "ensemble"], [1.0, None], low=[0.9, None], high=[1.2, None])


def sections():
    claims = (
        Claim(text=NASTY, value="0.27 nats", interval=(0.2512, 0.289), seeds=3, holds=True, paper="0.3 nats"),
        Claim(text="second", value="", holds=None, provisional=("one seed", "neighbor wd=3.2 missing")),
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
        Figure(name="efficiency", caption="Data", draw=ranking),
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


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_report_consists_of_these_files(folder):
    figures = ["figures/efficiency.svg", "figures/epochs.svg"]
    assert sorted(files(folder)) == ["claims.json", *figures, "report.html", "report.md"]


def test_the_same_report_has_the_same_bytes_under_any_matplotlib_settings(folder, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20}):
        write_report(sections(), tmp_path, title=f"Demo {NASTY}", summary=("one", "two"))
        assert matplotlib.rcParams["font.size"] == 20
    assert files(tmp_path) == files(folder)
    written = [re.sub(rb"<script>.*?</script>", b"", data, flags=re.DOTALL) for data in files(folder).values()]
    assert not any(re.search(rb"20\d\d-\d\d-\d\d", data) for data in written)


def test_a_failing_figure_is_named_and_leaves_the_old_report(tmp_path):
    write_report([], tmp_path, title="old")
    before = files(tmp_path)

    def fails(axes):
        raise KeyError("wd")

    broken = Section(title="Broken", question="?", figures=(Figure(name="decay", caption="", draw=fails),))
    with pytest.raises(ValueError, match="figure 'decay' could not be drawn"):
        write_report([broken], tmp_path, title="new")
    assert files(tmp_path) == before
    write_report([], tmp_path, title="new")
    assert "<h1>new</h1>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["../up", "a b", "", ".hidden", "a/b"])
def test_a_figure_name_must_be_a_file_name(tmp_path, name):
    section = Section(title="S", question="?", figures=(Figure(name=name, caption="", draw=curve),))
    with pytest.raises(ValueError, match="must be letters, digits"):
        write_report([section], tmp_path, title="x")


def test_two_figures_of_one_name_are_refused(tmp_path):
    section = Section(title="S", question="?", figures=(Figure(name="a", caption="", draw=ranking),) * 2)
    with pytest.raises(ValueError, match="two figures are called 'a'"):
        write_report([section], tmp_path, title="x")


def test_a_report_without_figures_does_not_need_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "require_matplotlib", lambda: pytest.fail("asked for matplotlib"))
    write_report([], tmp_path, title="Empty")
    assert "No claims yet" in (tmp_path / "report.html").read_text()
    assert "No claims yet" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("library", ["matplotlib", "mpld3"])
def test_a_missing_plotting_library_is_one_sentence(tmp_path, monkeypatch, library):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(name, name=library)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install matplotlib mpld3\.$"):
        write_report(sections(), tmp_path / "out", title="x")
    assert not (tmp_path / "out").exists()


def test_importing_the_report_loads_no_heavy_package():
    heavy = {"torch", "matplotlib", "mpld3", "jinja2", "numpy", "rich"}
    code = f"import sys, epochal.report.sections; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- pages ------------------------------------------------------------------------------------------------------------


def test_markdown_shows_claims_first_and_escapes_markup(folder):
    text = (folder / "report.md").read_text()
    assert text.index("## All claims") < text.index("## First")
    assert "4 claims: 1 reproduced, 1 does not hold, 1 not testable at this scale, 1 open; 2 provisional." in text
    assert "| 0.3 nats | 0.27 nats | 0.25 to 0.29 | 3 | reproduced |" in text
    assert "| open (provisional: one seed; neighbor wd=3.2 missing) |" in text
    assert "| not testable at this scale (needs three sizes) |" in text
    assert "| w64 | 1,200,000 | 0.1 | 4.0500 |" in text
    assert "(figures/epochs.svg)" in text and "see `wd_x`" in text
    assert "<script" not in text and r"a\|b \*c\* \[d\](e)" in text


class Page(HTMLParser):
    """Checks that tags balance, and collects the tags and the text of a page."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open, self.getpos())
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_self_contained_and_escaped(folder):
    source = (folder / "report.html").read_text()
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert [attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "plot"] == [
        "epochs",
        "efficiency",
    ]
    assert not {"img", "link"} & set(tags)
    assert not any("src" in attributes for tag, attributes in page.tags)
    assert all(
        value.startswith("#") for _, attributes in page.tags for name, value in attributes.items() if "href" in name
    )
    assert NASTY in " ".join("".join(page.text).split())
    assert '<td class="number">1,200,000</td>' in source and "<code>wd_x</code>" in source


def test_a_row_of_the_wrong_length_is_refused():
    table = Table(title="T", columns=("a", "b"), rows=((1,),))
    with pytest.raises(ValueError, match="table 'T': a row has 1 cells for 2 columns"):
        render_markdown([Section(title="S", question="?", tables=(table,))], title="x")


def test_the_terminal_shows_every_claim_with_its_evidence():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    print_summary(sections(), console)
    text = console.file.getvalue()
    assert f"reproduced  {NASTY}" in text and "0.27 nats; 90% 0.25 to 0.29; 3 seeds; paper: 0.3 nats" in text
    assert "1 seed; provisional: one seed, neighbor wd=3.2 missing" in text and "2 provisional." in text


# --- claims -----------------------------------------------------------------------------------------------------------


def test_claims_json_has_every_claim_with_its_place(tmp_path):
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


def test_an_open_interval_is_null_in_claims_json_and_infinite_when_read(tmp_path):
    ends = [(1.2, math.inf), (-math.inf, 0.5), None]
    rows = [placed(Claim(text="a", value="b", interval=e), scale="s", section="t", command="c") for e in ends]
    (tmp_path / "claims.json").write_text(render_claims(rows), encoding="utf-8")
    stored = [row["interval"] for row in json.loads((tmp_path / "claims.json").read_text())]
    assert stored == [[1.2, None], [None, 0.5], None]
    assert [row.interval for row in read_claims(tmp_path / "claims.json")] == ends


def test_an_open_interval_of_a_case_is_kept_too(tmp_path):
    case = Case("one", 1.5, (1.2, math.inf))
    row = placed(Claim(text="a", value="b", cases=(case,)), scale="s", section="t", command="c")
    (tmp_path / "claims.json").write_text(render_claims([row]), encoding="utf-8")
    assert read_claims(tmp_path / "claims.json")[0].cases == (case,)


def test_a_claim_cannot_be_judged_and_untestable():
    with pytest.raises(ValueError, match="leave one of the two out"):
        Claim(text="t", value="", holds=True, untestable="why")


@pytest.mark.parametrize("name", ["A", "two words", "-a", "a.", "a..b", "a_b"])
def test_a_claim_id_must_be_lower_case_words_with_dashes_and_dots(name):
    with pytest.raises(ValueError, match="must be lower-case words"):
        Claim(id=name, text="t", value="")
    assert Claim(id="a-1.b2", text="t", value="").id == "a-1.b2"


def test_two_claims_of_one_id_are_refused_and_leave_the_old_report(tmp_path):
    write_report([], tmp_path, title="old")
    before = files(tmp_path)
    same = Section(title="S", question="?", claims=(Claim(id="a.b", text="t", value=""),))
    with pytest.raises(ValueError, match=r"the id 'a\.b'; give each claim its own id"):
        write_report([same, same], tmp_path, title="new")
    assert files(tmp_path) == before


# --- numbers ----------------------------------------------------------------------------------------------------------


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


def test_an_interval_has_the_decimals_of_its_value():
    def shown(value, ends):
        return format_interval(Claim(text="", value=value, interval=ends))

    assert shown("5.17 times", (4.8, 6.24)) == "4.80 to 6.24"
    assert shown("0.1790 nats", (0.16, 0.2)) == "0.1600 to 0.2000"
    assert shown("6 times", (4.8, math.inf)) == "4.8000 to ∞"
    assert shown("4.0 nats", (-math.inf, 4.8)) == "unbounded below, to 4.80"


# --- figures ----------------------------------------------------------------------------------------------------------


class NoInterval:
    """The law 3 + 1 / x, with the interface of a fit of `epochal.scaling`."""

    E, interval = 3.0, None

    def predict(self, x):
        return 3.0 + 1.0 / x

    def predict_interval(self, x):
        return x * math.nan, x * math.nan


class WideInterval(NoInterval):
    interval = {"E": (-50.0, 3.1)}  # noqa: RUF012

    def predict_interval(self, x):
        return self.predict(x) - 0.1, self.predict(x) + 0.1


@pytest.mark.parametrize("law", [NoInterval(), WideInterval()])
def test_a_law_is_drawn_with_its_limit_and_a_wide_interval_does_not_flatten_it(law):
    drawn = []

    def draw(axes):
        draw_law(axes, law, 1, 100)
        drawn.append((axes.get_ylim()[0], [line.get_ydata()[0] for line in axes.lines]))

    render_svg(draw)
    bottom, heights = drawn[0]
    assert bottom > 1.5
    assert heights[-1] == 3.0


def test_an_end_without_a_bound_is_an_arrow_and_says_so():
    """The limit of `WideInterval` has 3.1 above and nothing near below."""

    class Unbounded(WideInterval):
        interval = {"E": (-math.inf, 3.1)}  # noqa: RUF012

    marks = []

    def draw(axes):
        draw_law(axes, Unbounded(), 1, 100, label="law")
        marks.extend(axes.lines)

    spec, _ = render_interactive(draw)
    assert [line.get_marker() for line in marks if line.get_marker() in ("v", "^")] == ["v"]
    assert "law: limit 3.0000 (90%: no lower bound to 3.1000)" in spec


def test_the_limits_of_several_laws_stand_side_by_side():
    places = []

    def draw(axes):
        for _ in range(3):
            draw_law(axes, NoInterval(), 1, 100)
        places.extend(line.get_xdata()[0] for line in axes.lines if line.get_gid() == "limit")

    render_svg(draw)
    assert 100 < places[0] < places[1] < places[2]


def test_the_legend_is_outside_of_the_axes():
    def draw(axes):
        draw_series(axes, [1, 2], [3.0, 2.0], label="a")
        axes.legend()
        seen.append(axes)

    seen = []
    _, keys = render_interactive(draw)
    assert seen[0].get_legend() is None
    assert [(key.label, key.color, key.line, key.point) for key in keys] == [("a", "#0072b2", True, True)]


@pytest.mark.parametrize(
    ("value", "shown"), [(1, "1"), (0.5, "0.5"), (6144, "6.1k"), (598_176, "598k"), (1.2e9, "1.2B"), (49_152, "49k")]
)
def test_counts_on_an_axis_are_short(value, shown):
    assert compact(value) == shown


def test_points_next_to_a_law_are_not_joined():
    def draw(axes):
        line = draw_series(axes, [2, 1], [2, 3], low=[1.9, 2.9], high=[2.1, 3.1], join=False)
        assert line.get_linestyle() == "None" and line.get_marker() == "o"
        assert list(line.get_ydata()) == [3, 2]

    render_svg(draw)


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda axes: draw_series(axes, [1], [1], low=[1]), "only one end of its band"),
        (lambda axes: draw_series(axes, [1, 2], [1]), "1 values of y for 2 of x"),
        (lambda axes: draw_ranking(axes, ["a"], [1], high=[1]), "only one end"),
        (lambda axes: draw_ranking(axes, ["a"], [1, 2]), "1 names for 2 values"),
        (lambda axes: draw_law(axes, NoInterval(), 0, 1), "give 0 < x_min < x_max"),
    ],
)
def test_drawing_helpers_refuse_arguments_that_do_not_fit(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        render_svg(draw)


def test_names_with_dollar_signs_are_no_formulas():
    """An odd formula would raise, an even one would vanish from the text."""
    from matplotlib.figure import Figure as Canvas

    axes = Canvas().subplots()
    line = draw_series(axes, [1, 2], [3.0, 2.0], label="$$")
    draw_ranking(axes, ["$x^$", "a_b"], [1.0, 2.0])
    assert r"\$\$" in line.get_label() and "<svg" in render_svg(lambda axes: draw_ranking(axes, ["$x^$"], [1.0]))
    assert "<svg" in render_svg(lambda axes: draw_series(axes, [1, 2], [3.0, 2.0], label="$$"))
