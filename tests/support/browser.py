"""A real Chromium for tests that look at a page: `from tests.support.browser import browser  # noqa: F401`.

Where Chromium is not installed such tests are skipped, unless FERRY_NEED_CHROMIUM=1 is set: then they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


def _without(reason: str) -> None:
    said = f"NOT TESTED IN A BROWSER: {reason}"
    if os.environ.get("FERRY_NEED_CHROMIUM") == "1":
        pytest.fail(f"{said}, and FERRY_NEED_CHROMIUM=1 wants it")
    pytest.skip(said)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a module; every `watched_page` of it has a context of its own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _without("the package playwright is missing (pip install playwright)")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _without(f"none of {', '.join(NAMES)} is on the PATH (apt-get install chromium)")
    with sync_playwright() as playwright:
        # in a container there is no sandbox to be had, and little shared memory
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@dataclass
class Seen:
    """What a page did: addresses that it asked for, and what it complained of on the console."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def watched_page(browser: Browser, *, width: int = 1280, height: int = 800) -> Iterator[tuple[Page, Seen]]:
    """An empty page of that size in pixels, in a context without cookies, and what it does from then on."""
    context, seen = browser.new_context(viewport={"width": width, "height": height}), Seen()
    page = context.new_page()
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
    try:
        yield page, seen
    finally:
        context.close()
