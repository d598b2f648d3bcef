"""The chat page in its own process, and a headless Chromium that looks at it; run by `make test-clients`."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.keys import Keys

from tests.e2e.conftest import Served, served
from tests.handler.support import ROOT

__all__ = ["served"]

# Nothing but the page may be fetched, neither by Chromium itself nor because the page asks for it.
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without `-m clients` nothing here is imported: its imports are not installed."""
    return None if "clients" in config.getoption("-m") else True


def wait_for(condition: Callable[[], Any], what: str, *, seconds: float = 60) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The chat page as somebody at the browser sees it."""

    browser: Chrome

    def open(self, url: str, *, width: int = 1100, height: int = 800) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get(url)
        wait_for(lambda: self.greeting, "the greeting")

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """What can be read there now; the page may change at any time."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)"
        return self.browser.execute_script(script, selector)

    @property
    def greeting(self) -> str:
        return "".join(self.texts("#chat .placeholder")).strip()

    @property
    def messages(self) -> list[str]:
        return self.texts("#chat .message-row")

    @property
    def notes(self) -> list[str]:
        return self.texts("#chat .note")

    @property
    def busy(self) -> bool:
        return bool(self.all("#box [data-testid=stop-button]"))

    def click(self, selector: str) -> None:
        wait_for(lambda: self.all(selector), selector)[0].click()

    def say(self, text: str) -> None:
        box = self.all("#box textarea")[0]
        box.click()
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})
        box.send_keys(Keys.ENTER)

    def ask(self, text: str) -> str:
        """Say something and wait for the whole reply; its note."""
        replies = len(self.notes)
        self.say(text)
        wait_for(lambda: len(self.notes) > replies and not self.busy, f"a reply to {text}")
        return self.notes[-1]

    def set(self, label: str, value: str) -> None:
        """Write into the settings' field whose label begins so; open them first."""
        if not self._field(label):
            self.click("#settings > button")
        field = wait_for(lambda: self._field(label), label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.TAB)

    def _field(self, label: str) -> Any:
        script = """return [...document.querySelectorAll("#settings [data-testid=block-info]")]
            .filter(element => element.textContent.startsWith(arguments[0]))
            .map(element => element.closest(".block").querySelector("textarea, input[type=number]"))[0]"""
        return self.browser.execute_script(script, label)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    with Chrome(options, ChromeService(driver)) as opened:
        yield opened


@pytest.fixture
def page(browser: Chrome) -> Iterator[Page]:
    yield Page(browser=browser)
    browser.get("about:blank")


@contextlib.contextmanager
def chatting(base_url: str, *arguments: str) -> Iterator[str]:
    """The address of a chat page for the server at `base_url`."""
    command = [sys.executable, "-m", "apps.chat", "--base_url", base_url, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(found[1] for line in process.stdout if (found := re.match(r"The page is at (\S+)", line)))
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def chat_url(served: Served) -> Iterator[str]:
    """The chat page for the real server."""
    with chatting(f"{served.url}/1.0/v1", "--api_key", served.server.key("inference")) as url:
        yield url
