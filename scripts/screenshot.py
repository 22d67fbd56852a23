"""Write docs/explorer.png: the page of the explorer, after a text was read and a prompt was continued.

    python scripts/screenshot.py [RUN] [--output PNG] [--width 1280] [--dark]

Without a run the model that comes with the package is shown. Needs the extra 'explorer', selenium, and Chromium with
its driver.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PNG = Path(__file__).parent.parent / "docs" / "explorer.png"
PATIENCE = 120  # seconds, on a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TEXT = "".join(
    f"def {verb}_{noun}({noun}, limit={len(verb + noun)}):\n    return {noun}.{verb}(limit)\n\n"
    for verb in ("fetch", "merge", "drop")
    for noun in ("ledger", "parcel", "voucher", "invoice", "harbour")
)
PROMPT = "def merge_voucher("


def installed() -> tuple[str, str] | None:
    """Chromium and its driver, if they are installed."""
    browser, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def browser(width: int = 1280, height: int = 1000, *, dark: bool = False) -> Iterator[Any]:
    """A headless Chromium that writes down what it asks for and complains about."""
    found = installed()
    if found is None:
        raise SystemExit(f"expected Chromium ({' or '.join(BROWSERS)}) and chromedriver, got none")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "no-first-run",
    ):
        options.add_argument(f"--{flag}")
    if dark:
        options.add_argument("--force-dark-mode")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    try:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        yield driver
    finally:
        driver.quit()


def text_of(driver: Any, name: str) -> str:
    return "".join(str(each.get_property("textContent")) for each in driver.find_elements(By.ID, name))


def wait_for(driver: Any, name: str, text: str, *, gone: bool = False) -> None:
    """Until a part of the page says this, or no longer does."""
    WebDriverWait(driver, PATIENCE).until(
        lambda _: (text in text_of(driver, name)) != gone, f"{text!r} in {name}: {text_of(driver, name)[:300]!r}"
    )


def read_file(driver: Any, path: Path) -> None:
    driver.find_element(By.CSS_SELECTOR, "#files input[type=file]").send_keys(str(path))
    wait_for(driver, "told", path.name)


def press(driver: Any, name: str) -> None:
    element = driver.find_element(By.ID, name)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def ask(driver: Any, prompt: str) -> None:
    field = driver.find_element(By.CSS_SELECTOR, "#prompt textarea")
    field.clear()
    field.send_keys(prompt)
    press(driver, "ask")


def requests(driver: Any) -> list[str]:
    """The addresses that the page has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [str(event["params"]["request"]["url"]) for event in sent]


def shoot(run: str, output: Path, width: int, height: int, *, dark: bool) -> None:
    from memorizing_transformers_pytorch.cli.models import name_of
    from memorizing_transformers_pytorch.explorer.app import launch
    from memorizing_transformers_pytorch.explorer.service import Service
    from memorizing_transformers_pytorch.library.readers import open_reader

    reader = open_reader(run, "cpu", max_memories=None, dtype=None, index=None)
    blocks, address = launch(Service(reader), name_of(run), 7860)
    try:
        with tempfile.TemporaryDirectory() as folder, browser(width, height, dark=dark) as driver:
            path = Path(folder, "parcels.py")
            path.write_text(TEXT)
            driver.get(address)
            wait_for(driver, "documents", "Nothing is remembered")
            read_file(driver, path)
            ask(driver, PROMPT)
            wait_for(driver, "sources", path.name)
            driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
            WebDriverWait(driver, PATIENCE).until(
                lambda _: not driver.find_elements(By.CSS_SELECTOR, ".generating, .eta-bar")
            )
            output.write_bytes(driver.get_screenshot_as_png())
    finally:
        blocks.close(verbose=False)
    print(f"{output}: {os.path.getsize(output):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="shipped")
    parser.add_argument("--output", type=Path, default=PNG)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    shoot(given.run, given.output, given.width, given.height, dark=given.dark)


if __name__ == "__main__":
    main()
