"""The page in a headless Chromium of this machine; without one, or its driver, skipped."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.evaluation.rows import SampleRow
from kvbench.report.html import Content, write_page
from kvbench.report.html.samples import Question
from kvbench.report.html.thumbnails import contact_sheet

sync_api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
MARKUP = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def file(make_rows: Callable[..., list[SampleRow]], tmp_path: Path) -> Path:
    """Three methods, two tasks, two protocols; sample 1 has markup and a picture."""
    rows = []
    for protocol in ("quantized_prefill", "exact_prefill"):
        same = {"protocol": protocol}
        rows += [
            *make_rows("fp16", "oe", "+++-", cache_bytes=9000, **same),
            *make_rows("fp16", "st", "++", cache_bytes=9000, **same),
            *make_rows("kivi", "oe", "+-++", cache_bytes=2000, kl_first=0.25, **same),
            *make_rows("kivi", "st", "--", cache_bytes=2000, **same),
            replace(make_rows("skvq", "oe", "!!", **same)[1], error=MARKUP),
            *make_rows("skvq", "st", "++", cache_bytes=3000, answer=MARKUP, **same),
        ]
    rows += make_rows("fp16", "su", "+", dataset="others", protocol="exact_prefill")
    sheet = contact_sheet([Image.new("RGB", (64, 64), "red")] * 2, 2, 10_000)
    asked = {
        place: Question("Look.", f"Which, {place}?", ("cat", "dog"), "dog") for place in (0, 2)
    }
    asked[1] = Question("Look.", MARKUP, (MARKUP, "dog"), "dog", sheet)
    path = tmp_path / "page.html"
    write_page(path, Content(rows, {}, questions={("toys", "oe"): asked}))
    return path


@pytest.fixture
def tab(browser: Any, file: Path) -> Iterator[Any]:
    """The page, opened; afterwards nothing may have been reported or asked for."""
    context = browser.new_context(color_scheme="dark")
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    assert not said
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    context.close()


def methods(tab: Any) -> list[str]:
    """Methods of the first leaderboard in the order shown."""
    table = tab.locator("table.leaderboard").first
    return [name.strip() for name in table.locator("tbody th:visible").all_inner_texts()]


def test_headings_sort_by_mouse_and_keyboard(tab: Any) -> None:
    heading = tab.locator("table.leaderboard").first.locator("th", has_text="Mean")
    assert methods(tab) == ["FP16", "KIVI", "SKVQ"]
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    # skvq has no score on oe: its mean is st's, 100; fp16 has 87.5, kivi 37.5.
    assert methods(tab) == ["SKVQ", "FP16", "KIVI"]
    heading.locator("button").focus()
    tab.keyboard.press("Enter")
    assert methods(tab) == ["KIVI", "FP16", "SKVQ"]
    assert tab.locator("#said").inner_text() == "Sorted by Mean, ascending."
    oe = tab.locator("table.leaderboard").first.locator("th", has_text="OE")
    for _ in range(2):  # what is missing stays last
        oe.locator("button").click()
        assert methods(tab)[-1] == "SKVQ"


def test_filters_leave_what_was_asked_for(tab: Any) -> None:
    tab.select_option("#filter-protocol", "exact_prefill")
    assert tab.locator("#leaderboard .block:visible").count() == 2
    tab.select_option("#filter-task", "st")  # the other block has no such task
    for section in ("leaderboard", "tradeoff", "differences", "failures"):
        assert tab.locator(f"#{section} .block:visible").count() == 1
    assert "exact_prefill" in tab.locator("#browse-block option:checked").inner_text()
    shown = tab.locator("#leaderboard thead th:visible").all_inner_texts()
    assert [text.strip() for text in shown] == ["Method", "Bits", "ST", "Cache bytes"]
    assert tab.locator("#sample h3").inner_text() == "ST, sample 0"
    tab.fill("#filter-method", "kiv")
    rows = tab.locator("#leaderboard tbody tr:visible")
    assert [rows.count(), rows.first.inner_text().split()[0]] == [1, "KIVI"]
    failed = tab.locator("#failures tbody tr:visible").all_inner_texts()
    assert [line.split()[:3] for line in failed] == [["KIVI", "ST", "2"]]
    assert tab.locator("#said").inner_text() == "Lines in the leaderboard: 1."


def test_a_sample_opens_with_all_answers(tab: Any) -> None:
    tab.select_option("#browse-task", "oe")
    tab.locator("#browse-sample").focus()
    tab.keyboard.press("ArrowDown")
    sample = tab.locator("#sample")
    assert sample.locator("h3").inner_text() == "OE, sample 1"
    assert MARKUP in sample.inner_text()
    assert tab.title() == "kvbench report"
    picture = sample.locator("img")
    assert picture.count() == 1 and picture.evaluate("image => image.naturalWidth") == 130
    lines = [line.split("\t") for line in sample.locator("tbody tr").all_inner_texts()]
    by_name = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert by_name["FP16"][:3] == ["A", "-", "right"]
    assert by_name["KIVI"] == ["B", "at character 1", "wrong", "A", "0.25", "-"]
    assert by_name["SKVQ"][:3] == [MARKUP, "-", "out of memory"]
    assert sample.locator("mark").all_inner_texts() == ["B"]


def test_samples_can_be_searched(tab: Any) -> None:
    tab.select_option("#browse-task", "oe")
    expected = {
        "lost": [1],
        "gained": [3],
        "changed": [1, 3],
        "failed": [0, 1, 2, 3],
        "all": [0, 1, 2, 3],
    }
    for show, samples in expected.items():
        tab.select_option("#browse-show", show)
        options = tab.locator("#browse-sample option").all_inner_texts()
        assert [int(text.partition(":")[0]) for text in options] == samples
    tab.select_option("#browse-method", "kivi")
    tab.select_option("#browse-show", "failed")
    assert tab.locator("#sample").inner_text() == "No sample is like that."
    assert tab.locator("#browse-count").inner_text() == "0 of 4 samples"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_and_paper_are_legible(browser: Any, file: Path, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 800, "height": 600})
    tab = context.new_page()
    tab.goto(file.as_uri())
    for medium, dark in (("screen", scheme == "dark"), ("print", False)):
        tab.emulate_media(media=medium)
        with Image.open(io.BytesIO(tab.screenshot())) as shot:
            corner = shot.convert("L").getpixel((2, 2))
        assert (corner < 60) is dark
        tone = tab.evaluate("getComputedStyle(document.querySelector('figure svg')).fill")
        light = sum(map(int, tone.strip("rgb()").split(","))) > 384
        assert light is dark
        wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
    assert not tab.locator("#filters").is_visible()
    context.close()
