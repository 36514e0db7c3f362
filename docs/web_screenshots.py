"""Remake web-page.png and web-page-phone.png, of the starter models:

    hhdeploy demo
    hhdeploy web demo-out/all-tasks site --title "Starter tasks"
    python -m http.server -d site -b 127.0.0.1
    python docs/web_screenshots.py http://127.0.0.1:8000

Needs chromium and the `test` extra.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent
PICTURE = DOCS.parent / "examples" / "starter" / "images" / "emoji" / "smileys-emotion" / "008.png"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
# A desktop's and a phone's window.
DESKTOP, PHONE = {"width": 1280, "height": 640}, {"width": 390, "height": 844}


def main(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=FLAGS.split()
        )
        for window, file in ((PHONE, "web-page-phone.png"), (DESKTOP, "web-page.png")):
            page = browser.new_page(viewport=window)
            page.goto(url)
            page.get_by_text("Ready", exact=True).wait_for()
            page.set_input_files("#file", PICTURE)
            page.get_by_text("answered in").wait_for()
            page.screenshot(path=DOCS / file, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
