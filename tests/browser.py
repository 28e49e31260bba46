"""A headless Chromium that opens pages from files and notes whatever should not happen in one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => (window.violations ??= []).push(event.violatedDirective));
"""


def executable() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"no browser: none of {', '.join(NAMES)} is on the path (Debian and Ubuntu: apt-get install chromium)"
        )
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile; skips where Playwright or a browser is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser: pip install 'lxt[test]'")
    path = executable()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """An open page.

    Attributes:
        page: Playwright's.
        said: what reached the console, errors of scripts, dialogs.
        asked: every address that was asked for.
    """

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        """Directives of the page's policy that something ran into."""
        return self.page.evaluate("window.violations ?? []")

    def saved(self, selector: str, folder: Path) -> Path:
        """What a click there downloads."""
        with self.page.expect_download() as waiting:
            self.page.click(selector)
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path


@contextmanager
def opened(browser: Browser, path: Path, address: str = "", **options: Any) -> Iterator[Opened]:
    """The file in a window of its own, which has no network.

    Args:
        browser: from `chromium`.
        path: of the file.
        address: what follows # in the address.
        options: of Playwright's `Browser.new_context`.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    context.set_default_timeout(5000)  # a page of one file is there at once
    try:
        context.set_offline(True)
        context.add_init_script(_VIOLATIONS)
        page = context.new_page()
        one = Opened(page)
        page.on("console", lambda message: one.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: one.said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (one.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: one.asked.append(request.url))
        page.goto(path.resolve().as_uri() + (f"#{address}" if address else ""))
        yield one
    finally:
        context.close()
