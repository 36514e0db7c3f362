"""What a page of ``hhdeploy web`` costs and answers: ``python -m benchmarks.web_page BUNDLE SITE``.

SITE was written of BUNDLE. A visit is a new browser's, from loopback, until the page shows all
answers of one picture: in seconds, and in CPU seconds of all the browser's processes. Then the same
pictures go through the page and through a session in Python. With ``--webgpu`` Chromium computes
WebGPU in software: right or wrong, and nothing about its speed.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from hhdeploy.bundle import Bundle
from hhdeploy.runtime import Session, open_session

FLAGS = (
    "--headless --no-sandbox --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu --use-webgpu-adapter=swiftshader "
    "--enable-features=Vulkan,WebAssemblyJSPI"
)
PATIENCE_MS = 300_000
PICTURES = Path("examples/starter/images")


class Sent:
    """A web server of files, and the bytes of bodies that it sent."""

    def __init__(self, folder: Path) -> None:
        self.bytes = 0
        sent = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def copyfile(self, source: Any, outputfile: Any) -> None:
                content = source.read()
                sent.bytes += len(content)
                outputfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextmanager
def nobody(browser: Browser) -> Iterator[tuple[BrowserContext, Page]]:
    """An empty page of somebody who visited nothing before."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield context, context.new_page()


def reach(page: Page, address: str) -> None:
    """Open the page and wait until it is ready."""
    page.goto(address)
    expect(page.locator("#state")).to_have_text("Ready", timeout=PATIENCE_MS)


def ask(page: Page, picture: bytes) -> dict[str, dict[str, float]]:
    """What the page shows of a picture: adapter -> label -> score."""
    file = {"name": "picture.png", "mimeType": "image/png", "buffer": picture}
    page.set_input_files("#file", file)  # type: ignore[arg-type]
    said = re.compile("answered in")
    expect(page.locator("#said")).to_have_text(said, timeout=PATIENCE_MS)
    cards = page.locator("#answers > li").evaluate_all(
        """(cards) => cards.map((card) => [card.querySelector("h3").textContent,
          [...card.querySelectorAll("ol li")].map((line) => [
            line.querySelector(".label").textContent,
            Number(line.querySelector(".share").dataset.score)])])"""
    )
    return {name: dict(lines) for name, lines in cards}


def cpu_seconds() -> float:
    """Of the browser, below this process, so far."""
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


def timed(page: Page, address: str, picture: bytes) -> tuple[float, float]:
    """Seconds, and seconds of CPU, until a page that is opened answered a picture."""
    begin, spent = time.perf_counter(), cpu_seconds()
    reach(page, address)
    ask(page, picture)
    return time.perf_counter() - begin, cpu_seconds() - spent


def compared(page: Page, session: Session, pictures: list[Path]) -> dict[str, Any]:
    """The page against Python, over all adapters and pictures."""
    names = [entry.name for entry in session.bundle.manifest.adapters]
    off, same = [], 0
    for path in pictures:
        image = Image.open(path).convert("RGB")
        stream = io.BytesIO()
        image.save(stream, "PNG")
        found = ask(page, stream.getvalue())
        for name, own in zip(names, session.classify([image] * len(names), names), strict=True):
            right = {answer.label: answer.score for answer in own}
            off += [abs(right[label] - score) for label, score in found[name].items()]
            same += own[0].label == next(iter(found[name]))
    asked = len(pictures) * len(names)
    return {"answers": asked, "same best": same, "scores off at most": float(np.max(off))}


def summed(what: str, visits: list[tuple[float, float]]) -> dict[str, Any]:
    seconds, cpu = ([round(each, 2) for each in sorted(kind)] for kind in zip(*visits, strict=True))
    return {
        f"s to {what}": seconds,
        f"s to {what}, median": round(statistics.median(seconds), 2),
        f"CPU s to {what}, median": round(statistics.median(cpu), 2),
    }


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("site", type=click.Path(path_type=Path, exists=True))
@click.option("--pictures", type=click.Path(path_type=Path), default=PICTURES)
@click.option("--most", default=40, show_default=True, help="Pictures that are compared.")
@click.option("--visits", default=5, show_default=True)
@click.option("--webgpu", is_flag=True)
def main(bundle: Path, site: Path, pictures: Path, most: int, visits: int, webgpu: bool) -> None:
    files = sorted(pictures.rglob("*.png"))
    chosen = files[:: max(1, len(files) // most)]
    precision = next(iter(Bundle.open(site / "bundle").manifest.graphs))
    flags = [*FLAGS.split(), *(SOFTWARE_GPU.split() if webgpu else ["--disable-gpu"])]
    server = Sent(site)
    address = f"{server.url}?engine={'webgpu' if webgpu else 'wasm'}"
    first, second, sent = [], [], []
    with (
        sync_playwright() as playwright,
        open_session(bundle, device="cpu", threads=1, precision=precision) as session,
    ):
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for _ in range(visits):
            server.bytes = 0
            with nobody(browser) as (_, page):
                first.append(timed(page, address, chosen[0].read_bytes()))
                sent.append(server.bytes)
                second.append(timed(page, address, chosen[0].read_bytes()))
        load = os.getloadavg()[0]
        with nobody(browser) as (context, page):
            reach(page, address)
            engine = page.locator("#engine").text_content()
            context.set_offline(True)
            server.server.shutdown()
            reach(page, address)
            found = compared(page, session, chosen)
        browser.close()
    told = {
        "precision": precision,
        "engine": engine,
        "MB sent at a first visit": round(max(sent) / 1e6, 2),
        "load of the last minute": round(load, 1),
        **summed("the first answer", first),
        **summed("it at the second visit", second),
        "without a network, against Python": found,
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
