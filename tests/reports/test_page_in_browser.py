"""Pages in a real browser: what a reader sees, clicks, types and hears.

Headless Chromium by its driver. Where there is none the tests are skipped, unless the environment
variable TORCHPRUNE_BROWSER is "required".
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shown_pages import HOSTILE, every_piece, many_layers

from torchprune.reports.page import save_page

AXE = Path(__file__).parent / "axe" / "axe.min.js"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
BARS = 'figure[data-kind="bars"]'


def _missing() -> str | None:
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "the package 'selenium' is not installed"
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} on the path" if absent else None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if (why := _missing()) is not None:
        if os.environ.get("TORCHPRUNE_BROWSER") == "required":
            pytest.fail(f"TORCHPRUNE_BROWSER=required, but {why}")
        pytest.skip(why)
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of saved pages."""
    home = tmp_path_factory.mktemp("pages")
    pages = {
        "many": many_layers(),
        "few": many_layers(5),
        "every": every_piece("word"),
        "hostile": every_piece(HOSTILE),
        "odd": every_piece("odd", float("nan")),
    }
    for name, page in pages.items():
        save_page(page, home / f"{name}.html")
    return {name: (home / f"{name}.html").as_uri() for name in pages}


def show(browser: Any, address: str, *, width: int = 1280, dark: bool = False) -> None:
    """Open a page in a window of that width, its storage as a new reader's."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
    browser.get(address)
    browser.execute_script("try { localStorage.clear() } catch {}")


def run(browser: Any, script: str, *given: Any) -> Any:
    return browser.execute_script(script, *given)


def names_drawn(browser: Any) -> list[str]:
    """The names at the bars, from top to bottom."""
    return run(
        browser,
        f"""return [...document.querySelectorAll('{BARS} .chunk svg')].flatMap((svg) =>
        [...svg.querySelectorAll('text')].filter((t) => /proj$/.test(t.textContent))
        .map((t) => [t.getBoundingClientRect().top, t.textContent]))
        .sort((a, b) => a[0] - b[0]).map((pair) => pair[1])""",
    )


def choose(browser: Any, css: str, value: str) -> None:
    run(
        browser,
        """const field = document.querySelector(arguments[0]); field.value = arguments[1];
        field.dispatchEvent(new Event(field.matches('select') ? 'change' : 'input'))""",
        css,
        value,
    )


def said(browser: Any) -> str:
    return run(browser, "return document.querySelector('#said').textContent")


def wide(browser: Any) -> tuple[int, int]:
    root = "document.documentElement"
    return tuple(run(browser, f"return [{root}.scrollWidth, {root}.clientWidth]"))


@pytest.mark.parametrize("name", ["many", "every", "hostile", "odd"])
def test_it_opens_without_errors_and_without_a_network(browser, places, name):
    browser.get_log("browser"), browser.get_log("performance")
    show(browser, places[name])
    assert run(browser, "return document.documentElement.dataset.drawn") == "true"
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = {p["request"]["url"] for p in sent if p.get("documentURL") == places[name]}
    assert places[name] in asked  # what the browser asks for its first tab is no matter
    assert {url for url in asked if not url.startswith("data:")} <= {places[name]}
    assert run(browser, "return document.images.length") == 0
    counts = run(
        browser,
        """return [...document.querySelectorAll('figure.chart')].map(
        (figure) => figure.querySelectorAll('svg path').length)""",
    )
    assert len(counts) == (3 if name == "many" else 6)
    assert min(counts) > 2


def test_a_hostile_name_is_a_name(browser, places):
    show(browser, places["hostile"])
    shown = run(browser, "return document.querySelector('h1').textContent")
    assert "</script><img src=x onerror=alert(1)>" in shown
    tip = run(browser, "return document.querySelector('figure .drawing').textContent")
    assert "<img" in tip


def test_bars_are_sorted_and_filtered(browser, places):
    show(browser, places["many"])
    before = names_drawn(browser)
    assert len(before) == 301
    assert before[:2] == ["0.q_proj", "0.k_proj"]
    data = {bar["name"]: bar for bar in drawn(browser)["bars"]}

    choose(browser, f"{BARS} .sort", "most")
    values = [data[name]["value"] for name in names_drawn(browser)]
    assert values == sorted(values, reverse=True)
    assert said(browser) == "301 of 301 bars, greatest first."
    row = run(browser, f"return document.querySelector('{BARS} tbody th').textContent")
    assert row.endswith(names_drawn(browser)[0])  # the table goes along

    choose(browser, f"{BARS} .kind", "o_proj")
    choose(browser, f"{BARS} .sort", "name")
    assert names_drawn(browser) == [f"{i}.o_proj" for i in range(43)]
    choose(browser, f"{BARS} .filter", "layers.4")
    assert names_drawn(browser) == ["4.o_proj", "40.o_proj", "41.o_proj", "42.o_proj"]
    assert said(browser) == "4 of 301 bars, by name."
    shown = run(
        browser, f"return document.querySelectorAll('{BARS} tbody tr:not([hidden])').length"
    )
    assert shown == 4
    choose(browser, f"{BARS} .filter", "no such layer")
    assert names_drawn(browser) == []


def drawn(browser: Any) -> Any:
    return json.loads(run(browser, f"return document.querySelector('{BARS} .drawn').textContent"))


def test_tables_are_sorted_and_filtered(browser, places):
    show(browser, places["every"])
    table = "document.querySelector('.sortable table')"
    first = f"return [...{table}.querySelectorAll('tbody th')].map((h) => h.textContent)"
    assert run(browser, first) == ["word", "b", "c"]
    click = f"{table}.querySelectorAll('thead button')[1].click()"
    run(browser, click)
    assert run(browser, first) == ["b", "word", "c"]  # 20, 1,000, nothing
    sort = f"return {table}.querySelectorAll('thead th')[1].getAttribute('aria-sort')"
    assert run(browser, sort) == "ascending"
    run(browser, click)
    assert run(browser, first) == ["word", "b", "c"]
    assert run(browser, sort) == "descending"
    show(browser, places["many"])
    choose(browser, ".sortable .filter", "layers.7.")
    assert said(browser) == "7 of 301 rows."


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_kept(browser, places):
    paper = "return getComputedStyle(document.body).backgroundColor"
    ink = f"return getComputedStyle(document.querySelector('{BARS} svg text')).fill"
    show(browser, places["every"])
    light = run(browser, paper), run(browser, ink)
    show(browser, places["every"], dark=True)
    dark = run(browser, paper), run(browser, ink)
    assert light[0] == "rgb(255, 255, 255)"
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    pressed = "return document.querySelector('#theme').getAttribute('aria-pressed')"
    assert run(browser, pressed) == "true"
    run(browser, "document.querySelector('#theme').click()")
    assert (run(browser, paper), run(browser, ink)) == light
    assert run(browser, pressed) == "false"
    browser.refresh()
    assert run(browser, paper) == light[0]


def test_everything_is_reached_by_keyboard(browser, places):
    from selenium.webdriver import ActionChains, Keys

    show(browser, places["every"])

    def press(key: str) -> Any:
        ActionChains(browser).send_keys(key).perform()
        return browser.switch_to.active_element

    first = press(Keys.TAB)
    assert first.text == "Skip to the content"
    assert run(browser, "return arguments[0].getBoundingClientRect().left", first) >= 0
    assert run(browser, "return getComputedStyle(arguments[0]).outlineStyle", first) != "none"
    assert press(Keys.ENTER).get_attribute("id") == "main"
    met = []
    for _ in range(14):
        here = press(Keys.TAB)
        met.append(here.tag_name)
        outline = run(browser, "return getComputedStyle(arguments[0]).outlineStyle", here)
        assert outline != "none", here.get_attribute("outerHTML")[:200]
    assert {"button", "div", "select", "input", "summary"} <= set(met)


@pytest.mark.parametrize("name", ["many", "every", "hostile"])
def test_a_phone_scrolls_in_one_direction(browser, places, name):
    show(browser, places[name], width=375)
    whole, seen = wide(browser)
    assert whole == seen == 375


@pytest.mark.parametrize("name", ["many", "few", "every"])
def test_no_scroll_bar_hides_what_stands_at_the_right_of_a_chart(browser, places, name):
    show(browser, places[name])
    boxes = run(
        browser,
        """return [...document.querySelectorAll('.scroll.js')]
        .map((box) => [box.scrollWidth, box.clientWidth, box.offsetWidth - box.clientWidth])""",
    )
    assert boxes
    assert all(inside <= shown for inside, shown, _ in boxes)
    if name == "many":
        assert max(bar for _, _, bar in boxes) > 5, "no bar was there to hide anything"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_serious_fault(browser, places, dark):
    for name, width in (("every", 1280), ("few", 375)):
        show(browser, places[name], width=width, dark=dark)
        run(browser, "document.querySelector('details').open = true")
        run(browser, AXE.read_text("utf-8"))
        found = browser.execute_async_script(
            """const done = arguments[arguments.length - 1];
            axe.run(document, {resultTypes: ['violations']}).then(done)"""
        )
        grave = [
            (v["id"], v["nodes"][0]["html"][:150], v["nodes"][0]["failureSummary"])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert len(found["passes"]) > 20
        assert grave == []


def test_the_json_is_handed_out_and_code_is_copied(browser, places):
    show(browser, places["many"])
    run(
        browser,
        """window.blobs = []; URL.createObjectURL = (blob) => { blobs.push(blob); return '#' };
        HTMLAnchorElement.prototype.click = function () { window.named = this.download };
        document.querySelector('#download').click()""",
    )
    text = browser.execute_async_script("blobs[0].text().then(arguments[0])")
    assert json.loads(text) == {"total": {"sparsity": 0.5}, "worst": "inf"}
    assert run(browser, "return named") == "Pruning-report-a-model.json"
    run(browser, "document.querySelector('.copy').click()")
    copied = """const done = arguments[0], look = () =>
        /^(Copied|Selected)/.test(document.querySelector('#said').textContent)
            ? done(document.querySelector('.copy').textContent) : setTimeout(look, 20);
        look()"""
    assert browser.execute_async_script(copied) in ("Copied", "Selected")


def test_without_scripts_the_tables_are_there(browser, places):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(places["many"])
        from selenium.webdriver.common.by import By

        figure = browser.find_element(By.CSS_SELECTOR, BARS)
        assert figure.find_element(By.CSS_SELECTOR, "tbody tr").is_displayed()
        assert figure.find_element(By.CSS_SELECTOR, ".without-js").is_displayed()
        assert not figure.find_element(By.CSS_SELECTOR, ".controls").is_displayed()
        assert not browser.find_element(By.CSS_SELECTOR, "#theme").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_it_prints_with_its_charts(browser, places):
    show(browser, places["every"], dark=True)
    seen = run(
        browser,
        """dispatchEvent(new Event('beforeprint'));
        const widths = [...document.querySelectorAll('svg')].map((s) => s.getAttribute('width'));
        dispatchEvent(new Event('afterprint')); return widths""",
    )
    assert set(seen) == {"680"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    heights = run(
        browser, "return [...document.querySelectorAll('.chunk')].map((c) => c.offsetHeight)"
    )
    assert min(heights) > 20
    assert run(browser, "return getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    assert (
        run(browser, "return getComputedStyle(document.querySelector('.tools')).display") == "none"
    )
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert base64.b64decode(pdf).startswith(b"%PDF")
