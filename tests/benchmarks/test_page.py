"""The page in a real browser: it renders, sorts, switches, asks the network for nothing and complains of nothing."""

import json
import os
import shutil

import pytest
import records
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from trainstep.benchmarks.comparison import Comparison

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"),  # There it is installed, or the tests fail.
    reason="there is no Chromium with its chromedriver here; Debian has them by the names chromium and chromium-driver",
)

EVIL = "</script><script>window.harmed = true</script><img src=x onerror='window.harmed=true'>&\"[red]"
DESKTOP, PHONE = 1280, 390
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return the address of a page about one workload, with a run that failed and a label that means harm."""
    runs, costs = records.suite({"standard": 0, "up": 0.012, EVIL: 0.004, "down": -0.01})
    failed = runs[-1].model_copy(update={"failure": f"DivergedError: {EVIL}"})
    path = tmp_path_factory.mktemp("one") / "report.html"
    Comparison((*runs[:-1], failed), costs, "standard").to_html(path)
    return path.as_uri()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    runs, costs = records.suite({"standard": 0, "up": 0.012, "down": -0.01}, workloads=["first", "second"])
    path = tmp_path_factory.mktemp("many") / "report.html"
    Comparison(runs, costs, "standard").to_html(path)
    return path.as_uri()


def opened(browser, address, *, width=DESKTOP, dark=False):
    """Open the page with nothing kept from before; return the addresses it asked for."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("performance")
    browser.get(address)
    browser.execute_script("localStorage.clear()")
    browser.get(address)
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def texts(browser, selector):
    return [each.text for each in browser.find_elements(By.CSS_SELECTOR, selector)]


def labels(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#summary tbody th')].map(each => each.firstChild.textContent.trim())"
    )


def clicked(browser, title):
    buttons = browser.find_elements(By.CSS_SELECTOR, "#summary thead button")
    next(button for button in buttons if button.text.startswith(title)).click()


def page_colour(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_renders_in_silence_and_loads_nothing(browser, one, width, dark):
    asked = opened(browser, one, width=width, dark=dark)
    assert {address for address in asked if not address.startswith(("data:", "blob:"))} == {one}
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.harmed") is None
    # Three charts, each with lines or dots, none of them wider than its place.
    drawn = browser.find_elements(By.CSS_SELECTOR, ".chart .main-svg .scatterlayer")
    assert len(drawn) == 3
    assert all(each.find_elements(By.CSS_SELECTOR, "path") for each in drawn)
    # Tables may scroll; the page must not.
    assert browser.execute_script("const d = document.documentElement; return d.scrollWidth <= d.clientWidth")
    assert EVIL in labels(browser)


def test_a_click_sorts_and_another_turns_the_order(browser, one):
    opened(browser, one)
    assert labels(browser) == ["standard", "up", EVIL, "down"]
    clicked(browser, "accuracy")
    assert labels(browser) == ["up", EVIL, "standard", "down"]
    clicked(browser, "accuracy")
    assert labels(browser) == ["down", "standard", EVIL, "up"]
    clicked(browser, "verdict")
    assert labels(browser) == [EVIL, "up", "down", "standard"]  # Alike: as before. Absent: last.
    clicked(browser, "strategy")
    assert labels(browser)[1:] == ["down", "standard", "up"]
    # The remark stays with its row.
    [remark] = browser.find_elements(By.CSS_SELECTOR, "#summary .remark")
    assert remark.find_element(By.XPATH, "..").text.startswith("down")
    assert browser.get_log("browser") == []


def test_the_theme_follows_the_system_until_it_is_chosen_and_the_choice_is_kept(browser, one):
    opened(browser, one, dark=True)
    dark = page_colour(browser)
    opened(browser, one)
    light = page_colour(browser)
    assert dark != light
    button = browser.find_element(By.ID, "theme")
    button.click()
    assert (button.text, page_colour(browser)) == ("Theme: light", light)
    button.click()
    assert (button.text, page_colour(browser)) == ("Theme: dark", dark)
    browser.refresh()
    assert page_colour(browser) == dark
    assert browser.execute_script("return document.querySelector('.chart').layout.font.color") == "#e6e8ea"


def test_charts_have_views_to_switch_between(browser, one):
    opened(browser, one)
    assert texts(browser, "section h3") == ["Learning curves", "Quality against cost", "Seed by seed"]
    for kind, view, title in (
        ("curves", "seconds", "seconds of training"),
        ("cost", "robust accuracy", "robust accuracy"),
        ("pairs", "values", "accuracy"),
    ):
        section = browser.find_element(By.CSS_SELECTOR, f"section[data-kind={kind}]")
        button = section.find_element(By.XPATH, f".//button[text()='{view}']")
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        axes = section.find_elements(By.CSS_SELECTOR, ".infolayer .xtitle, .infolayer .ytitle")
        assert title in [axis.get_attribute("data-unformatted") for axis in axes]
    assert browser.get_log("browser") == []


def test_several_workloads_have_one_table_a_profile_and_charts_to_choose(browser, many):
    opened(browser, many)
    assert labels(browser) == ["standard", "up", "down"] * 2
    assert len(browser.find_elements(By.CSS_SELECTOR, "#profile .scatterlayer path.js-line")) == 3
    before = browser.execute_script("return JSON.stringify(document.querySelector('#charts .chart').data)")
    chooser = browser.find_element(By.ID, "workload")
    chooser.find_elements(By.TAG_NAME, "option")[1].click()
    assert browser.execute_script("return JSON.stringify(document.querySelector('#charts .chart').data)") != before
    assert len(browser.find_elements(By.CSS_SELECTOR, "#charts .scatterlayer")) == 3
    assert browser.get_log("browser") == []


def test_the_experiment_can_be_copied(browser, one):
    opened(browser, one)
    browser.find_element(By.CSS_SELECTOR, "button.copy").click()
    browser.execute_cdp_cmd("Page.bringToFront", {})
    # Copied, or selected to be copied by hand where the browser forbids it.
    WebDriverWait(browser, 5).until(
        lambda b: b.execute_script(
            "return document.querySelector('button.copy').textContent === 'Copied' "
            "|| getSelection().toString().startsWith('workload:')"
        )
    )
