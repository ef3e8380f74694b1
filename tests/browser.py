"""Headless Chromium, for tests that use a page as a reader does."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.command import TIMEOUT

BROWSER = ("chromium", "chromedriver")


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that starts a browser; it is skipped where there is none."""
    missing = not all(map(shutil.which, BROWSER))
    skipped = pytest.mark.skipif(missing, reason="needs chromium and chromedriver")
    return pytest.mark.process(skipped(test))


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """A browser, which is closed in the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


def wait(browser: Any, script: str) -> Any:
    """What a script returns, once that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, TIMEOUT, poll_frequency=0.02).until(
        lambda browser: browser.execute_script(script)
    )
