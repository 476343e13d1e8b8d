"""Real headless Chromium, for tests of the pages.

Chromium is the system's, from its package manager; without it the tests skip.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = [
    "--no-sandbox",  # Chromium has none as root, as in most containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
]


@dataclasses.dataclass(frozen=True)
class Visit:
    """A page that is open, and what it did while it loaded.

    Attributes:
      page: playwright's page.
      errors: console errors and warnings, exceptions, dialogs.
      requests: addresses asked for beyond the file itself; `data:` addresses stay in the file.
    """

    page: Any
    errors: list[str]
    requests: list[str]

    @property
    def overflow(self) -> float:
        """CSS pixels by which the page is wider than its window."""
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """`width` as decoded (0: not loaded) and `alt` of each image."""
        return self.page.evaluate(
            "Promise.all([...document.images].map(i => i.decode().catch(() => 0).then("
            "() => ({width: i.naturalWidth, alt: i.alt}))))"
        )


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; skips the test where it or Chromium is missing."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(browser: Any, file: Path, width: int = 1280, height: int = 800, **options: Any) -> Any:
    """Opens `file` in a window of that size, in CSS pixels."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        page = context.new_page()
        opened = Visit(page, [], [])
        address = file.absolute().as_uri()

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning"):
                opened.errors.append(message.text)

        def on_request(request: Any) -> None:
            if request.url != address and not request.url.startswith("data:"):
                opened.requests.append(request.url)

        def on_dialog(dialog: Any) -> None:
            opened.errors.append(f"dialog {dialog.message}")
            dialog.dismiss()

        page.on("console", on_console)
        page.on("request", on_request)
        page.on("dialog", on_dialog)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.goto(address, wait_until="load", timeout=30_000)
        yield opened
    finally:
        context.close()
