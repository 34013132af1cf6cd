"""Headless Chromium; tests are skipped where it is not installed."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A selenium driver with the console's messages recorded."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Offline by rule: a report that fetched anything would log an error and fail the tests.
    quiet = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1000", "--disable-dev-shm-usage", *quiet):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    instance = webdriver.Chrome(options=options, service=Service(driver))
    yield instance
    instance.quit()


def load(driver: Any, url: str) -> None:
    """Open a page and wait until its scripts have run: Chromedriver may return while the document is being read."""
    from selenium.webdriver.support.wait import WebDriverWait

    driver.get("about:blank")  # or the wait could look at the page before
    driver.get(url)
    script = "return location.href === arguments[0] && document.readyState === 'complete'"
    WebDriverWait(driver, 20).until(lambda _: driver.execute_script(script, url))
