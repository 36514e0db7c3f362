"""Remake serve-page.png, serve-page-phone.png and serve-playground.png, of the starter models:

    hhdeploy demo
    hhdeploy serve demo-out/all-tasks
    python docs/serve_screenshots.py http://127.0.0.1:8000

Needs chromium and the `test` extra. Sends the server one request for each test image.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

from hhdeploy.cli.starter import Starter, samples

DOCS = Path(__file__).resolve().parent
STARTER = DOCS.parent / "examples" / "starter"
PICTURE = STARTER / "images" / "emoji" / "smileys-emotion" / "008.png"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
# A desktop's and a phone's window.
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def send_traffic(url: str, model: str) -> None:
    """Every test image once, each to its own task's adapter."""
    for sample in samples(Starter.read(STARTER)):
        data = [base64.b64encode(sample.path.read_bytes()).decode()]
        content = {
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": data}],
            "parameters": {"adapter": sample.task},
        }
        request = urllib.request.Request(
            f"{url}/v2/models/{model}/infer", json.dumps(content).encode()
        )
        urllib.request.urlopen(request).close()


def main(url: str) -> None:
    with urllib.request.urlopen(f"{url}/status") as answer:
        send_traffic(url, json.load(answer)["model"])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=FLAGS.split()
        )
        for window, file in ((PHONE, "serve-page-phone.png"), (DESKTOP, "serve-page.png")):
            page = browser.new_page(viewport=window)
            page.goto(url)
            page.locator("#adapters tr").first.wait_for()
            page.screenshot(path=DOCS / file, full_page=True)
        page.set_input_files("#file", PICTURE)
        page.get_by_text("answered in").wait_for()
        section = page.locator("section", has=page.locator("#playground")).bounding_box()
        margin = 24
        clip = {
            "x": section["x"] - margin,
            "y": section["y"] - margin,
            "width": section["width"] + 2 * margin,
            "height": section["height"] + 2 * margin,
        }
        page.screenshot(path=DOCS / "serve-playground.png", clip=clip, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
