"""The page of a report in a real browser: Debian's chromium, started once."""

import os
import re
import shutil

import pytest

from epochal.config import REPOSITORY
from epochal.report.claims import Claim
from epochal.report.figures import AVERAGE_LINES, PALETTE, draw_key, draw_law, draw_level, draw_ranking, draw_series
from epochal.report.overview import Model, Overview
from epochal.report.sections import Figure, Section, Table
from epochal.report.write import write_report

WIDE, PHONE = 1280, 390
HIGHEST = 8000  # pixels of micro's page before anything is unfolded
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)
OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("svg.mpld3-figure")) {
  const texts = [...svg.querySelectorAll("text")].filter((one) => one.textContent.trim());
  texts.forEach((one, i) => texts.slice(i + 1).forEach((other) => {
    const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 1) found.push(`${svg.parentElement.id}: ${one.textContent} on ${other.textContent}`);
  }));
}
return found;
"""
OUTSIDE = """
const found = [];
for (const element of document.querySelectorAll("body *")) {
  if (element.closest(".scroll") && !element.matches(".scroll") || element.closest("svg svg, defs, clipPath, script")) continue;
  const place = element.getBoundingClientRect();
  if (place.width && (place.right > innerWidth + 1 || place.left < -1) && !element.closest("g"))
    found.push(`${element.tagName} ${element.className} ${place.left} to ${place.right}`);
}
return found.slice(0, 5);
"""


class Limit:
    """The law 3 + 1 / x with an interval that has no lower bound, with the interface of a fit of `epochal.scaling`."""

    E = 3.0
    interval = {"E": (float("-inf"), 3.1)}  # noqa: RUF012

    def predict(self, x):
        return 3.0 + 1.0 / x

    def predict_interval(self, x):
        return self.predict(x) - 0.1, self.predict(x) + 0.1


def members(axes):
    for color, shift in zip(PALETTE, (0.0, 0.5), strict=False):
        for average, dash in AVERAGE_LINES.items():
            draw_series(axes, [1, 2, 4], [4 + shift, 3.5 + shift, None], label=average, color=color, join=False)
            draw_law(axes, Limit(), 1, 16, color=color, line_style=dash, in_legend=False, label=average)
        draw_key(axes, f"size {shift}", color=color)
    draw_level(axes, 3.4, 1, 16, label="best single")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("members K")
    axes.set_ylabel("validation loss (nats per token)")


def rows(axes):
    names = ["a long name of one optimizer", "b", "a name that would leave no room for the numbers of the axis"]
    draw_ranking(axes, names, [4.1, 4.2, 4.55], low=[4.0, None, None], high=[4.3, None, None])
    axes.set_xlabel("validation loss (nats per token)")


def write(folder):
    wide = Table(title="Wide", columns=tuple(f"column {i}" for i in range(30)), rows=(tuple(range(30)),))
    claims = (
        Claim(text="settled", value="0.2 nats", interval=(0.1, 0.3), seeds=3, holds=True),
        Claim(text="provisional", value="0.1 nats", holds=False, provisional=("one seed",)),
    )
    figures = tuple(Figure(name=f"members-{i}", caption="Loss against K", draw=members) for i in range(3))
    section = Section(title="First", question="Why?", claims=claims, tables=(wide,), figures=figures, notes=("note",))
    chain = Section(
        title="Chain", question="What?", figures=(Figure(name="whole-chain", caption="The chain", draw=rows),)
    )
    model = Model(
        what="Best student",
        job="w64",
        loss=4.2,
        bits_per_byte=1.9,
        parameters=300_000,
        hours=0.2,
        sure="3 seeds",
        command="epochal export student exported --scale a-scale-with-a-long-name",
    )
    return write_report([chain, section], folder, title="Demo", overview=Overview(models=(model,), sample="In the"))


class Browser:
    """One chromium and what a person does with it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width, *, dark=False):
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get(path.as_uri())

    def command(self, name, **options):
        return self.driver.execute_cdp_cmd(name, options)

    def run(self, script):
        return self.driver.execute_script(script)

    def unfold(self):
        # The event of a fold comes later; drawing twice draws nothing.
        self.run('for (const one of document.querySelectorAll("details")) one.open = true; drawFigures(document)')


def missing():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "chromium and chromedriver are not installed; apt-get install chromium chromium-driver"
    return ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Skips where there is no chromium; EPOCHAL_REQUIRE_BROWSER=1 makes that a failure."""
    if reason := missing():
        if os.environ.get("EPOCHAL_REQUIRE_BROWSER") == "1":
            pytest.fail(f"EPOCHAL_REQUIRE_BROWSER is set, but {reason}")
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    committed = REPOSITORY / "recipes" / "results" / "micro" / "report.html"
    return {"micro": committed, "made up": write(tmp_path_factory.mktemp("page"))}


@pytest.mark.parametrize("page", ["micro", "made up"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_nothing_is_clipped_and_no_label_covers_another(browser, pages, page, width):
    browser.open(pages[page], width)
    height = browser.run("return document.documentElement.scrollHeight")
    assert width == PHONE or height <= HIGHEST, f"the page is {height} pixels high; fold more of it"
    browser.unfold()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(OUTSIDE) == []
    assert browser.run('return document.querySelectorAll(".plot:empty").length') == 0
    assert browser.run(OVERLAPS) == []


@pytest.mark.parametrize("page", ["micro", "made up"])
def test_the_page_needs_no_network_and_logs_no_error(browser, pages, page):
    browser.driver.get_log("browser")
    browser.open(pages[page], WIDE)
    browser.unfold()
    assert browser.run('return performance.getEntriesByType("resource").map((one) => one.name)') == []
    assert [entry["message"] for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_mark_shows_its_numbers_and_the_wheel_zooms(browser, pages):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    browser.open(pages["made up"], WIDE)
    figure = browser.driver.find_element("id", "whole-chain")
    mark = figure.find_elements("css selector", '.mpld3-path[style*="stroke:#FFFFFF"], .mpld3-path[transform]')[0]
    ActionChains(browser.driver).move_to_element(mark).perform()
    shown = browser.run(
        'return [...document.querySelectorAll(".mpld3-tooltip")].filter((one) => one.style.visibility == "visible")'
        ".map((one) => one.textContent)"
    )
    assert shown == ["a long name of one optimizer: 4.1000 (90%: 4.0000 to 4.3000)"]
    ticks = 'return [...document.querySelectorAll("#whole-chain .mpld3-xaxis text")].map((one) => one.textContent)'
    before = browser.run(ticks)
    button = 'document.querySelector("#whole-chain .mpld3-zoombutton").dispatchEvent(new MouseEvent("click"))'
    browser.run(button)
    ActionChains(browser.driver).scroll_from_origin(ScrollOrigin.from_element(mark), 0, -400).perform()
    assert browser.run(ticks) != before


def test_light_and_dark_follow_the_system(browser, pages):
    places = {
        "paper": "document.body).backgroundColor",
        "text": "document.body).color",
        "figure": 'document.querySelector(".mpld3-xaxis text")).fill',
    }

    def brightness(place):
        color = browser.run(f"return getComputedStyle({places[place]}")
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    browser.open(pages["micro"], WIDE)
    light = {place: brightness(place) for place in places}
    browser.open(pages["micro"], WIDE, dark=True)
    dark = {place: brightness(place) for place in places}
    assert light["paper"] > 240 > 60 > max(light["text"], light["figure"]), light
    assert dark["paper"] < 30 < 200 < min(dark["text"], dark["figure"]), dark


def test_provisional_claims_are_gray_and_figures_stand_before_tables(browser, pages):
    browser.open(pages["made up"], WIDE)
    browser.unfold()
    color = 'getComputedStyle(document.querySelector(".claims li{}")).color'
    settled, provisional = (browser.run(f"return {color.format(kind)}") for kind in (".holds", ".provisional"))
    assert settled != provisional
    order = browser.run(
        'return [...document.querySelectorAll("#q2 .plot, #q2 table, #q2 .claims")].map((one) => one.className || one.tagName)'
    )
    assert order == ["plot", "plot", "plot", "claims", "TABLE"]
