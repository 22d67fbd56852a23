"""The page of the explorer in a browser."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By

from memorizing_transformers_pytorch.explorer.service import MAX_BYTES, Service
from memorizing_transformers_pytorch.library.readers import open_reader
from scripts import screenshot
from tests.library.conftest import make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(screenshot.installed() is None, reason="there is no Chromium with chromedriver"),
    # The server runs in a thread, and what it leaves to be closed later is its own affair.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HOSTILE = "<img src=x onerror=\"document.title='taken over'\">\u202e the sea was wide and white. " * 2


@pytest.fixture
def service(tmp_path: Path) -> Service:
    reader = open_reader(str(make_run(tmp_path / "run")), "cpu", max_memories=None, dtype=None, index=None)
    return Service(reader)


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    pytest.importorskip("gradio")  # not at the top: every process of pytest would spend seconds on it
    from memorizing_transformers_pytorch.explorer.app import launch

    blocks, address = launch(service, "<b>a run</b>", 7_900)
    yield address
    blocks.close(verbose=False)
    del blocks
    gc.collect()  # while what Gradio leaves unclosed is no failure of whichever test comes next


def opened(driver: Any, address: str) -> None:
    driver.get(address)
    screenshot.wait_for(driver, "documents", "Nothing is remembered yet")


def write_few_tokens(driver: Any) -> None:
    """The tiny model takes no more than 32 with the prompt."""
    driver.find_element(By.XPATH, "//button[contains(., 'How to continue')]").click()
    wanted = (By.CSS_SELECTOR, "input[type=number][aria-label*='Tokens to write']")
    field = screenshot.WebDriverWait(driver, screenshot.PATIENCE).until(lambda _: driver.find_element(*wanted))
    field.clear()
    field.send_keys("5\t")


def choose_first(driver: Any, name: str) -> None:
    driver.find_element(By.CSS_SELECTOR, f"#{name} input").click()
    screenshot.WebDriverWait(driver, screenshot.PATIENCE).until(
        lambda _: driver.find_elements(By.CSS_SELECTOR, f"#{name} li, ul li")
    )
    driver.find_element(By.CSS_SELECTOR, f"#{name} li, ul li").click()


def test_more_tabs_than_a_browser_has_connections_are_served_and_let_go(service: Service, address: str) -> None:
    with screenshot.browser() as driver:
        opened(driver, address)
        for number in range(2, 8):
            driver.switch_to.new_window("tab")
            opened(driver, address)
            assert len(service.sessions) == number
        first, *others = driver.window_handles
        for each in others[1:]:
            driver.switch_to.window(each)
            driver.close()
        driver.switch_to.window(others[0])
        opened(driver, address)  # anew
        screenshot.WebDriverWait(driver, screenshot.PATIENCE).until(lambda _: len(service.sessions) == 2)
        driver.switch_to.window(first)
        write_few_tokens(driver)
        screenshot.ask(driver, "the sea")
        screenshot.wait_for(driver, "sources", "Nothing was looked up")


def luminance(colour: str) -> float:
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(driver: Any, selector: str, on: str) -> float:
    """WCAG 2: of the text of one element on the background of another."""
    text = driver.find_element(By.CSS_SELECTOR, selector).value_of_css_property("color")
    back = driver.find_element(By.CSS_SELECTOR, on).value_of_css_property("background-color")
    low, high = sorted(luminance(each) for each in (text, back))
    return (high + 0.05) / (low + 0.05)


def test_a_narrow_page_can_be_read_and_cuts_nothing_off_and_shows_what_has_the_focus(
    address: str, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(HOSTILE)
    with screenshot.browser(width=335) as driver:  # 320 without the scroll bar
        opened(driver, address)
        write_few_tokens(driver)
        screenshot.read_file(driver, book)
        screenshot.ask(driver, "the sea")
        screenshot.wait_for(driver, "sources", "book.txt")
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert contrast(driver, "#ask", "#ask") >= 4.5
        assert contrast(driver, "#files .or", "body") >= 4.5
        field = driver.find_element(By.CSS_SELECTOR, "#prompt textarea")
        field.send_keys("\t")
        assert driver.switch_to.active_element.value_of_css_property("outline-style") != "none"
        field.click()
        assert field.value_of_css_property("outline-style") == "solid"


SLOW_TO_HEAR_OF_A_CLOSE = """
const real = window.fetch, later = () => new Promise((done) => setTimeout(done, 60));
const slow = {async transform(chunk, to) {
  if (new TextDecoder().decode(chunk).includes("close_stream")) await later();
  to.enqueue(chunk);
}};
window.fetch = async (...asked) => {
  const found = await real(...asked);
  if (!String(asked[0].url ?? asked[0]).includes("/queue/data")) return found;
  return new Response(found.body.pipeThrough(new TransformStream(slow)), {headers: found.headers});
};"""


def test_what_is_asked_while_a_stream_closes_is_answered(address: str) -> None:
    ways = (("save", "expected a folder"), ("forget", "expected documents")) * 2
    with screenshot.browser() as driver:
        opened(driver, address)
        driver.execute_script(SLOW_TO_HEAR_OF_A_CLOSE)
        for name, answer in ways:
            driver.execute_script("document.getElementById(arguments[0]).click()", name)
            screenshot.wait_for(driver, "told", answer)


def test_a_session_in_the_browser(service: Service, address: str, tmp_path: Path) -> None:
    """Read, ask, see the source, forget it; a second tab knows nothing of it; nobody else is asked for anything."""
    book, picture, large = (tmp_path / name for name in ("book.txt", "picture.png", "large.txt"))
    book.write_text(HOSTILE)
    picture.write_bytes(b"\x89PNG\0\0")
    with screenshot.browser() as driver:
        opened(driver, address)
        assert driver.find_element(By.TAG_NAME, "main").size["width"] > 1_100  # of 1,280, also while nothing is there
        write_few_tokens(driver)
        screenshot.read_file(driver, picture)
        assert "binary file" in screenshot.text_of(driver, "told")
        large.write_bytes(b"x" * (MAX_BYTES + 1))
        driver.find_element(By.CSS_SELECTOR, "#files input[type=file]").send_keys(f"{large}\n{book}")
        screenshot.wait_for(driver, "told", "in 'large.txt'")
        screenshot.wait_for(driver, "documents", "book.txt")
        screenshot.ask(driver, "the sea")
        screenshot.wait_for(driver, "sources", "book.txt")
        assert "the sea" in screenshot.text_of(driver, "with")
        assert "the sea" in screenshot.text_of(driver, "without")
        assert "⟨U+202E⟩" in screenshot.text_of(driver, "sources") or "onerror" in screenshot.text_of(driver, "sources")

        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        opened(driver, address)
        write_few_tokens(driver)
        screenshot.ask(driver, "the sea")
        screenshot.wait_for(driver, "sources", "Nothing was looked up")
        assert len(service.sessions) == 2
        driver.close()
        driver.switch_to.window(first)
        screenshot.WebDriverWait(driver, screenshot.PATIENCE).until(lambda _: len(service.sessions) == 1)

        assert "book.txt" in screenshot.text_of(driver, "documents")
        choose_first(driver, "chosen")
        driver.find_element(By.TAG_NAME, "h1").click()
        screenshot.press(driver, "forget")
        screenshot.wait_for(driver, "told", "Forgotten")
        screenshot.wait_for(driver, "documents", "Nothing is remembered yet")
        screenshot.wait_for(driver, "sources", "book.txt", gone=True)

        assert driver.title == "Memory explorer"
        assert driver.find_elements(By.CSS_SELECTOR, "img[src=x], .mt-note b") == []
        asked = [urlsplit(each) for each in screenshot.requests(driver)]
        assert {each.hostname for each in asked if each.scheme in ("http", "https", "ws", "wss")} == {"127.0.0.1"}
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
