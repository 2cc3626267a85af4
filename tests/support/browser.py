"""A real browser for the tests of pages: the system's chromium, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def opened(width: int = 1280, height: int = 1000, dark: bool = False) -> Iterator[Any]:
    """Give a page of the browser, or skip the test where there is none.

    The page has two lists: `requests`, the addresses it asked for, and `complaints`, what its
    console said as an error or a warning and what its programs raised.
    """
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the package playwright (it is in the extra dev)"
    )
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            permissions=["clipboard-read", "clipboard-write"],
        )
        page: Any = context.new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on(
            "console",
            lambda said: said.type in ("error", "warning") and page.complaints.append(said.text),
        )
        try:
            yield page
        finally:
            browser.close()
