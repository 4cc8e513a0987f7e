"""The report of health in Chromium: nothing fetched, nothing run, nothing in the way of a screen reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from replica.health.assessment import assess
from replica.health.page import page as render
from tests.support.health import NOW, fleet

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Return what opens the report of so many VMs, and fails the test for whatever the browser complains of."""
    complaints: list[str] = []

    def open_report(machines: int, *, width: int = 1280, scheme: Any = "light") -> Page:
        file = tmp_path / f"{machines}.html"
        file.write_text(render([assess(one) for one in fleet(machines)], NOW), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda asked: asked.url.startswith("file:") or complaints.append(asked.url))
        page.goto(file.as_uri())
        return page

    yield open_report
    assert complaints == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(opened: Open, width: int, scheme: str) -> None:
    page = opened(24, width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one, n) => { one.open = n < 12 })")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_sideways(opened: Open, width: int) -> None:
    page = opened(24, width=width)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_hostile_names_are_text_and_do_nothing(opened: Open) -> None:
    page = opened(24)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    for box in page.query_selector_all("summary")[:12]:
        box.hover()
    assert page.title() == "Replication health"
    assert page.evaluate("document.querySelectorAll('script, img, iframe, object, embed, link, form').length") == 0
    assert page.evaluate("document.querySelectorAll('style').length") == 1
    assert "<script>document.title='owned'</script>" in page.inner_text("table >> nth=0")


@pytest.mark.browser
def test_a_name_in_the_table_leads_to_the_vm_and_unfolds_it(opened: Open) -> None:
    page = opened(24)
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    link = page.query_selector_all("tbody th a")[4]
    name = link.inner_text()
    link.click()
    [unfolded] = page.query_selector_all("details[open]")
    assert name in unfolded.inner_text()


@pytest.mark.browser
def test_what_a_plot_shows_is_told_under_the_pointer_and_to_a_screen_reader(opened: Open) -> None:
    page = opened(2)
    figures = page.query_selector_all("figure")
    assert len(figures) == 8
    for figure in figures:
        assert "last " in (figure.query_selector("svg").get_attribute("aria-label") or "")  # type: ignore[union-attr]
        assert figure.query_selector("rect.hit title") is not None


@pytest.mark.browser
def test_a_thousand_vms_are_light_enough(opened: Open) -> None:
    started = time.monotonic()
    page = opened(1000)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    loaded = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
    print(f"1,000 VMs: loaded in {loaded} ms; made, written and drawn in {time.monotonic() - started:.1f} s")
    assert page.evaluate("document.querySelectorAll('*').length") < 130_000
