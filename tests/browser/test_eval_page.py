"""The page of an evaluation in a real browser: quiet, readable at both widths, filtered, sorted and opened by keyboard, two runs side by side."""

from __future__ import annotations

from typing import Any

import pytest

from agents.recordfile import read_records
from agents.report.evaluation import build_evaluation_report
from cluster.evaluation.comparison import compare
from cluster.evaluation.records import Scored
from tests.support.evaluation_folder import HOSTILE, Shape, write_evaluation, write_pair


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses: of one evaluation with hostile text and two samples, and of two compared."""
    folder = tmp_path_factory.mktemp("evaluations")
    one = write_evaluation(folder / "one", Shape(questions=24, samples=2, hostile=HOSTILE))
    before, after = write_pair(folder, questions=24)
    long = "2026-11-20_qwen3-30b-a3b-thinking_tools_bm25"
    before, after = before.rename(folder / f"{long}_before"), after.rename(folder / f"{long}_after_grpo")
    scores = [read_records(f / "scores.jsonl", Scored) for f in (before, after)]
    two = build_evaluation_report(after, against=before, compared=compare(*scores))
    return {"one": build_evaluation_report(one).resolve().as_uri(), "two": two.resolve().as_uri()}


def show(browser: Any, page: str, width: int = 1280) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(page)
    WebDriverWait(browser, 20, 0.05).until(
        lambda b: b.execute_script("return document.documentElement.dataset.ready === '1'")
    )


def wait(browser: Any, script: str, *given: Any) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, 0.05).until(lambda b: b.execute_script(script, *given))


def open_first(browser: Any) -> None:
    browser.execute_script("document.querySelector('.q').click()")
    wait(browser, "return document.querySelector('.detail .verdict') !== null")


def rows(browser: Any) -> int:
    return int(browser.execute_script("return document.querySelectorAll('.questions tbody .q').length"))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one", "two"])
def test_it_is_quiet_and_fits_the_width(browser: Any, pages: dict[str, str], name: str, width: int) -> None:
    browser.get_log("performance")
    browser.get_log("browser")
    show(browser, pages[name], width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    open_first(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    wait(browser, "return document.querySelectorAll('.page-text').length > 2")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    smallest = browser.execute_script(
        "return Math.min(...Array.from(document.querySelectorAll('p, td, th, li, dt, dd, label, button, text')).filter(e => e.getClientRects().length)"
        ".map(e => { const svg = e.ownerSVGElement; const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;"
        " return parseFloat(getComputedStyle(e).fontSize) * scale; }))"
    )
    assert smallest >= 9.5
    question = browser.execute_script("return document.querySelector('.c-question').getBoundingClientRect().width")
    assert question >= 110
    assert browser.get_log("browser") == []
    assert "owned" not in browser.title
    import json

    urls = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
        and not message["params"]["documentURL"].startswith("chrome:")  # the browser's own tabs ask for things, too
    ]
    assert [url for url in urls if not url.startswith(("data:", "blob:"))] == [pages[name]]


def test_it_searches_filters_and_sorts(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    show(browser, pages["one"])
    assert rows(browser) == 24
    box = browser.find_element(By.ID, "search")
    box.send_keys("q0003", Keys.ENTER)
    assert rows(browser) == 1 and browser.find_element(By.ID, "matches").text == "1 of 24 questions"
    browser.find_element(By.CSS_SELECTOR, ".filters button[type=reset]").click()
    assert wait(browser, "return document.querySelectorAll('.q').length === 24")
    select = Select(browser.find_element(By.ID, "f-outcome"))
    option = next(o for o in select.options if o.get_attribute("value") == "right")
    select.select_by_value("right")
    assert rows(browser) == int(option.text.split("(")[1].rstrip(")"))
    select.select_by_value("")
    Select(browser.find_element(By.ID, "f-slice0")).select_by_index(1)
    assert 0 < rows(browser) < 24
    Select(browser.find_element(By.ID, "f-slice0")).select_by_index(0)
    header = browser.find_element(By.CSS_SELECTOR, "th.c-tokens")
    read = "return Array.from(document.querySelectorAll('td.c-tokens')).map(td => { const t = td.textContent; return t.endsWith('k') ? 1000 * parseFloat(t) : t ? parseFloat(t) : -1; })"
    header.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert header.get_attribute("aria-sort") == "descending"
    values = browser.execute_script(read)
    assert values == sorted(values, reverse=True)
    header.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert header.get_attribute("aria-sort") == "ascending"
    values = [v for v in browser.execute_script(read) if v >= 0]
    assert values == sorted(values)


def test_questions_open_by_keyboard(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["one"])
    browser.execute_script("document.querySelector('thead th:last-child button').focus()")
    browser.switch_to.active_element.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.get_attribute("class") == "q"
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    first.send_keys(Keys.ARROW_DOWN)
    second = browser.switch_to.active_element
    assert second.get_attribute("data-n") == "1"
    second.send_keys(Keys.END)
    assert browser.switch_to.active_element.get_attribute("data-n") == "23"
    browser.switch_to.active_element.send_keys(Keys.HOME)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait(browser, "return document.querySelector('.detail .timeline') !== null")
    assert first.get_attribute("aria-expanded") == "true"
    # half a character in the hostile text would not come through the driver
    text = browser.execute_script(
        r"return document.querySelector('.detail').textContent.replace(/[\ud800-\udfff]/g, '')"
    )
    for said in ("gold answer", "I need the", "search", "What the judge found", "What it used", "calls", "sample 2"):
        assert said in text, said
    browser.execute_script("document.querySelectorAll('.samples button')[1].focus()")
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert browser.switch_to.active_element.get_attribute("aria-pressed") == "true"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.execute_script("return document.querySelector('.detail')") is None
    assert browser.switch_to.active_element.get_attribute("data-n") == "0"


def test_a_citation_leads_to_the_marked_sentence(browser: Any, pages: dict[str, str]) -> None:
    show(browser, pages["two"])
    open_first(browser)
    browser.execute_script("document.querySelector('.run:last-child button.cite').click()")
    marked = wait(browser, "const m = document.querySelector('mark.at'); return m ? m.textContent : ''")
    assert " of " in marked and marked.startswith("1")
    assert browser.execute_script("return document.activeElement.className") == "page-text"


def test_two_runs_stand_side_by_side(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.common.by import By

    show(browser, pages["two"])
    browser.find_element(By.CSS_SELECTOR, "[data-flip='gained']").click()
    wait(
        browser,
        "return document.getElementById('f-flip').value === 'gained' && document.querySelectorAll('.q').length < 24",
    )
    badges = browser.execute_script(
        "return Array.from(document.querySelectorAll('td.c-outcome')).map(td => td.textContent)"
    )
    assert badges and set(badges) == {"right"}
    open_first(browser)
    boxes = browser.execute_script(
        "return Array.from(document.querySelectorAll('.detail .run')).map(r => { const b = r.getBoundingClientRect(); return [b.left, b.right, b.top]; })"
    )
    assert len(boxes) == 2 and boxes[0][1] <= boxes[1][0] and boxes[0][2] == boxes[1][2]
    assert browser.execute_script("return document.querySelectorAll('.detail .timeline').length") == 2
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    stacked = "const r = document.querySelectorAll('.detail .run'); return r[1].getBoundingClientRect().top >= r[0].getBoundingClientRect().bottom"
    assert wait(browser, stacked)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: Any, pages: dict[str, str], scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    show(browser, pages["one"])
    open_first(browser)
    worst = browser.execute_script(
        """
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const rgb = (c) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
        const light = (c) => { const v = Array.from(c).slice(0, 3).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
        const back = (e) => { while (e) { const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] === 255) return c; e = e.parentElement; } return 'white'; };
        let worst = [99, ''];
        for (const e of document.querySelectorAll('p, dd, dt, td, th, h1, h2, h3, h4, h5, summary, a, label, button, .cite, .badge, .flags span, small')) {
          if (!e.getClientRects().length) continue;
          const a = light(rgb(getComputedStyle(e).color)), b = light(rgb(back(e)));
          const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
          if (ratio < worst[0]) worst = [ratio, e.tagName + '.' + e.className];
        }
        return worst;
        """
    )
    assert worst[0] >= 4.5, worst
