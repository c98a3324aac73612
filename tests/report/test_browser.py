"""The report's page in a real browser: opened from a file, sorted, hovered over, in light and dark, wide and narrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser

from epochal.report.claims import Claim
from epochal.report.figures import draw_bars, draw_law, draw_series
from epochal.report.sections import Figure, Section, Table
from epochal.report.write import write_report
from epochal.scaling import fit_power_law

ARROW_RIGHT, ESCAPE = "\ue014", "\ue00c"
SIZES, LOSSES = [1e5, 2e5, 4e5, 8e5, 1.6e6], [4.6, 4.4, 4.27, 4.19, 4.13]


def curve(axes: Any) -> None:
    law = fit_power_law(SIZES, LOSSES)
    line = draw_series(axes, SIZES, LOSSES, label="tuned", join=False)
    draw_law(axes, law, SIZES[0], 4 * SIZES[-1], color=line.get_color())
    axes.set_xscale("log")
    axes.set_xlabel("parameters N")
    axes.set_ylabel("validation loss")


def bars(axes: Any) -> None:
    draw_bars(axes, ["standard", "ensemble"], [4.5, 4.1], low=[4.4, 4.0], high=[4.6, 4.2])


def sections() -> list[Section]:
    claims = (
        Claim(text="zebra", value="0.27 nats", interval=(0.2, 0.3), seeds=3, holds=True, paper="0.29 nats"),
        Claim(text="apple", value="10 times", seeds=12, holds=False, provisional=("one seed",)),
        Claim(text="mango", value="2 times", untestable="needs three sizes"),
    )
    rows = (("w64", 1_200_000, 0.1, 4.05), ("w16", 90, 12.8, None), ("w128", 5_000, 1.6, 4.2))
    table = Table(title="Losses", columns=("model", "tokens", "wd", "loss"), rows=rows)
    figures = (Figure(name="law", caption="Loss against N", draw=curve), Figure(name="bars", caption="Bars", draw=bars))
    return [Section(title="First", question="Why?", claims=claims, tables=(table,), figures=figures)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sections(), tmp_path_factory.mktemp("report"), title="A report", summary=("One line.",))


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    with browser() as session:
        yield session


@pytest.fixture
def page(session: Browser, report: Path) -> Browser:
    session.resize(1300, 900)
    session.dark(False)
    session.open(report)
    return session


def middle(page: Browser, selector: str, index: int = 0) -> tuple[float, float]:
    """Scroll an element into view and return where its middle is in the window."""
    script = """const hit = document.querySelectorAll(arguments[0])[arguments[1]];
        hit.scrollIntoView({block: "center"}); const box = hit.getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2];"""
    x, y = page.run(script, selector, index)
    return x, y


def column(page: Browser, table: str, index: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => r.cells[arguments[1]].innerText)"
    )
    return [text.split("\n")[0] for text in page.run(script, table, index)]


def test_the_page_opens_from_a_file_and_asks_nothing_of_the_network(page: Browser) -> None:
    assert page.run("return document.title") == "A report"
    assert page.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    # what the page asks for in spite of that would be refused by its own policy, and the console would say so
    assert page.messages() == []
    page.run("document.body.append(Object.assign(new Image(), {src: 'file:///nothing.png'}))")
    assert any("nothing.png" in message for message in page.messages())


def test_a_click_sorts_a_table_and_the_next_turns_it_round(page: Browser) -> None:
    table = "#s0 > .scroll table"
    assert column(page, table, 0) == ["w64", "w16", "w128"]
    for sorted_rows in (["w16", "w64", "w128"], ["w128", "w64", "w16"]):
        page.move(*middle(page, f"{table} th button"), click=True)
        # names sort by the numbers in them: w16, w64, w128
        assert column(page, table, 0) == sorted_rows
    page.move(*middle(page, f"{table} th button", 1), click=True)
    assert column(page, table, 1) == ["90", "5,000", "1,200,000"]
    state = page.run("return [...document.querySelectorAll(arguments[0] + ' th')].map(h => h.ariaSort)", table)
    assert state == ["none", "ascending", "none", "none"]


def test_missing_values_stay_last_either_way(page: Browser) -> None:
    table = "#s0 > .scroll table"
    for losses in (["4.0500", "4.2000", "–"], ["4.2000", "4.0500", "–"]):
        page.move(*middle(page, f"{table} th button", 3), click=True)
        assert column(page, table, 3) == losses


def test_claims_are_sorted_by_their_numbers(page: Browser) -> None:
    assert column(page, ".claims", 0) == ["✓ reproduced", "✗ does not hold", "– not testable at this scale"]
    page.move(*middle(page, ".claims th button", 2), click=True)
    assert column(page, ".claims", 2) == ["0.27 nats", "2 times", "10 times"]
    page.move(*middle(page, ".claims th button", 1), click=True)
    assert column(page, ".claims", 1) == ["apple", "mango", "zebra"]


def test_a_point_under_the_mouse_tells_its_numbers(page: Browser) -> None:
    assert page.run("return tip.textContent") == ""
    page.move(*middle(page, "#fig-law .hit", 1))
    assert page.run("return tip.textContent") == "tuned\nparameters N: 200,000\nvalidation loss: 4.4000"
    box = page.run(
        "const b = tip.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom, innerWidth, innerHeight]"
    )
    assert 0 <= box[0] < box[2] <= box[4] and 0 <= box[1] < box[3] <= box[5]
    page.move(*middle(page, "#fig-bars .hit", 1))
    assert page.run("return tip.textContent").startswith("ensemble\ny: 4.1000\n90%: 4.0000 to 4.2000")
    page.move(2, 2)
    assert page.run("return tip.textContent") == ""


def test_every_hit_lies_on_what_was_drawn(page: Browser) -> None:
    """The targets are placed from matplotlib's numbers: each must cover a marker that the browser really drew."""
    script = """const marks = [...document.querySelectorAll('#fig-law .plot use')].map(u => u.getBoundingClientRect());
        return [...document.querySelectorAll('#fig-law .hit')].map(h => { const b = h.getBoundingClientRect();
          const x = b.left + b.width / 2, y = b.top + b.height / 2;
          return Math.min(...marks.map(m => Math.hypot(m.left + m.width / 2 - x, m.top + m.height / 2 - y))); });"""
    distances = page.run(script)
    assert len(distances) == len(SIZES) + 1  # the limit at the right edge is a point too
    assert max(distances) < 1.0


def test_points_can_be_walked_with_the_keyboard(page: Browser) -> None:
    page.run("document.querySelector('#fig-law .plot').focus()")
    for expected in ("100,000", "200,000"):
        page.press(ARROW_RIGHT)
        assert f"parameters N: {expected}" in page.run("return tip.textContent")
    page.press(ESCAPE)
    assert page.run("return tip.textContent") == ""


def luminance(color: str) -> float:
    red, green, blue = (int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3])
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_figures_are_readable_in_light_and_dark(page: Browser, dark: bool) -> None:
    page.dark(dark)
    color = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    paper = luminance(page.run(color, "body", "backgroundColor"))
    assert (paper < 0.1) == dark
    texts = ("body", ".question", ".aside", ".holds", ".fails", ".away", "nav a", "#fig-law figcaption")
    for selector, name in [*((text, "color") for text in texts), ("#fig-law .plot", "fill")]:
        ink = luminance(page.run(color, selector, name))
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, (selector, contrast)
    labels = (
        """return [...document.querySelectorAll('#fig-law .plot [id*=text_] > g')].map(g => getComputedStyle(g).fill)"""
    )
    inks = [luminance(color) for color in page.run(labels)]
    assert len(inks) > 5 and all((max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5 for ink in inks)
    drawn = page.run("return getComputedStyle(document.querySelector('#fig-law .plot [id*=patch_2] path')).fill")
    assert (luminance(drawn) < 0.1) == dark  # the plot's own background follows


@pytest.mark.parametrize("width", [1300, 800, 500])
def test_nothing_sticks_out_of_the_window(page: Browser, width: int) -> None:
    page.resize(width, 900)
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    script = """const parts = [...document.querySelectorAll('.claims td, figure, h1, h2, p')];
        return parts.every(part => part.getBoundingClientRect().right <= innerWidth)"""
    assert page.run(script)


def test_the_page_reads_without_its_script(page: Browser, report: Path, tmp_path: Path) -> None:
    text = report.read_text()
    still = tmp_path / "still.html"
    still.write_text(text[: text.index("<script>")] + text[text.index("</script>") + 9 :])
    page.open(still)
    assert page.run("return document.querySelectorAll('.hit title').length") == len(SIZES) + 1 + 2
    assert "zebra" in page.run("return document.body.innerText")
