"""The browser that tests look at pages with: the smallest Chromium that is here.

`chromium-headless-shell` has no window, menus or extensions to start, and takes less work
than the whole browser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
WHY_NOT = "needs chromium-headless-shell, chromium or google-chrome to show a page"
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
# A machine under load: nothing waits that long unless it is broken.
PATIENCE_MS = 60_000


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Chromium, started; it ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS.split())
        yield browser
        browser.close()
