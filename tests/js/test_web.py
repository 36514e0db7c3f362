"""`hhdeploy web`: what it writes, and the page in a real browser, with and without a network."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hhdeploy import write_web
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import hash_files, write_manifest
from hhdeploy.cli import main
from hhdeploy.errors import (
    BundleError,
    HhdeployError,
    MissingDependencyError,
    PlanError,
    WriteError,
)
from hhdeploy.exporting import javascript, web
from hhdeploy.files.writing import sha256_of
from hhdeploy.runtime import open_session
from tests.broken_manifests import OF_OTHER_GRAPHS, broken
from tests.browser import CHROMIUM, PATIENCE_MS, WHY_NOT
from tests.docs.pages import words_of
from tests.js.conftest import OCTETS, PACKAGE
from tests.leash import leashed
from tests.quantised import INT8, int8_with_pictures
from tests.support import assert_caught, assert_parity, images
from tests.workshop import copy_bundle, flip_byte
from tests.wrong_logits import LOGITS, bundle_of_logits

EVIL = "<img src=x onerror=alert(1)> & co"
# Of one colour: whatever way it is resized, its levels stay.
COLOURS = ((200, 30, 90), (10, 180, 40))
AXE = PACKAGE / "node_modules" / "axe-core" / "axe.min.js"
STILL = {"index.html": b"page", "sw.js": b"// keeps\n"}

in_browser = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)


# --- what is written ----------------------------------------------------------------------------


@pytest.fixture
def still(monkeypatch):
    """Pages without code: nothing is compiled."""
    monkeypatch.setattr(web, "page_code", lambda progress: dict(STILL))


def service_files(site: Path) -> dict[str, str]:
    """What the service worker knows: path -> sha256."""
    found = re.match(r"const FILES = (\{.*?\});\n", (site / "sw.js").read_text(), re.S)
    assert found is not None
    content: dict[str, str] = json.loads(found[1])
    return content


@pytest.mark.usefixtures("still")
def test_the_page_has_a_part_of_the_bundle(branches, tmp_path):
    site = tmp_path / "site"
    page = write_web(branches, site)
    assert page.adapters == tuple(a.name for a in Bundle.open(branches).manifest.adapters)
    known = service_files(site)
    found = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    assert found == {*known, "sw.js"} == set(page.files)
    assert all(sha256_of(site / name) == digest for name, digest in known.items())
    assert (site / "sw.js").read_bytes().endswith(STILL["sw.js"])
    inner = {name.removeprefix("bundle/") for name in found if name.startswith("bundle/")}
    names = {"hhdeploy.json", "model.onnx", "model.onnx.data", "bank.safetensors"}
    assert names < inner
    assert all(name.startswith("preprocess.center.") for name in inner - names)
    asked, inputs = ["beta", "alpha"], images(2)
    logits = [
        open_session(path, device="cpu", threads=1).run(inputs, asked)
        for path in (branches, site / "bundle")
    ]
    assert np.array_equal(*logits)
    facts = json.loads((site / "page.json").read_text())
    assert facts["sizes"] == {
        n: s for n, s in page.files.items() if n not in ("page.json", "sw.js")
    }
    assert page.sent == sum(page.files.values())


@pytest.mark.usefixtures("still")
def test_int8_goes_before_float32(tmp_path, monkeypatch):
    bundle = int8_with_pictures(tmp_path / "bundle")
    assert write_web(bundle, tmp_path / "small").precision == "int8"
    monkeypatch.chdir(tmp_path)
    page = write_web(bundle, "exact", precision="float32")
    assert page.path == tmp_path / "exact"  # wherever the process goes
    assert page.precision == "float32"
    assert not [name for name in page.files if "int8" in name]


@pytest.mark.usefixtures("still")
def test_a_page_is_replaced_and_nothing_else(small, branches, tmp_path):
    site = tmp_path / "site"
    write_web(branches, site)
    with pytest.raises(WriteError, match=r"already exists.*`overwrite=True`"):
        write_web(small, site)
    page = write_web(small, site, overwrite=True)
    assert page.adapters == ("alpha", "gamma")
    (site / "notes.txt").write_text("mine")
    for target, reason in ((site, "it holds notes.txt"), (small, "it has no page.json")):
        with pytest.raises(WriteError, match=f"is not a page that hhdeploy wrote: {reason}"):
            write_web(small, target, overwrite=True)
    assert (site / "notes.txt").read_text() == "mine"


def test_what_no_browser_runs_is_refused_before_any_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "page_code", lambda progress: pytest.fail("it compiled"))
    out = tmp_path / "site"
    with pytest.raises(PlanError, match=r"`precision='fp8'`: expected .*int8, float32, float16"):
        write_web(small, out, precision="fp8")
    with pytest.raises(BundleError, match="no int8 graph; it has float32"):
        write_web(small, out, precision="int8")
    older = r"no graph that preprocesses pictures for alpha, gamma.*\. It was exported by an older"
    with pytest.raises(BundleError, match=older):
        write_web(INT8, out)
    bundle = Bundle.open(small).manifest
    other = copy_bundle(small, tmp_path / "other")
    write_manifest(other, replace(bundle, graphs={"bfloat16": bundle.graphs["float32"]}))
    with pytest.raises(BundleError, match="which browsers compute, found bfloat16"):
        write_web(other, out)
    two = replace(bundle.backbone.preprocess, input_size=(2, 32, 32), mean=(0, 0), std=(1, 1))
    box = replace(bundle.backbone.preprocess, interpolation="box")
    for transform, why in (
        (two, "takes 2 channels, a picture has 1 or 3"),
        (box, "this takes box"),
    ):
        entries = tuple(replace(entry, preprocess=transform) for entry in bundle.adapters)
        backbone = replace(bundle.backbone, preprocess=transform)
        write_manifest(other, replace(bundle, backbone=backbone, adapters=entries))
        with pytest.raises(BundleError, match=f"no graph that preprocesses .*{why}"):
            write_web(other, out)
    write_manifest(other, replace(bundle, features={"tokens": (4, 8)}))
    with pytest.raises(PlanError, match=r"a page is for logits alone.*`outputs="):
        write_web(other, out)
    assert not out.exists()


@pytest.mark.parametrize("name", OF_OTHER_GRAPHS)
def test_a_manifest_that_contradicts_the_graph_is_refused(branches, tmp_path, monkeypatch, name):
    """As a session refuses it: the page would show no answer, at every visit."""
    monkeypatch.setattr(web, "page_code", lambda progress: pytest.fail("it compiled"))
    change, message = OF_OTHER_GRAPHS[name]
    bundle = broken(branches, tmp_path / "bundle", change)
    with pytest.raises(BundleError) as by_session:
        open_session(bundle, device="cpu")
    with pytest.raises(BundleError if name != "features" else PlanError) as by_page:
        write_web(bundle, tmp_path / "site")
    assert re.search(message, str(by_session.value))
    assert name == "features" or re.search(message, str(by_page.value))
    assert not (tmp_path / "site").exists()


@pytest.mark.usefixtures("still")
def test_a_graph_that_is_no_onnx_is_refused(small, tmp_path):
    """With the sha256 that the manifest has: it was written so."""
    bundle = copy_bundle(small, tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"\xff" * 300)
    write_manifest(bundle, replace(Bundle.open(bundle).manifest, files=hash_files(bundle)))
    with pytest.raises(BundleError, match=r"model\.onnx: expected a graph of ONNX, found none"):
        write_web(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_without_node_the_message_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"needs the program n.*Install\s+Node.js 20"):
        write_web(small, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_compiler_that_fails_is_quoted(small, tmp_path, monkeypatch):
    for name in ("node", "npm"):
        (tmp_path / name).write_text("#!/bin/sh\necho no registry here >&2\nexit 7\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(HhdeployError, match=r"ended with status 7:\nno registry here"):
        write_web(small, tmp_path / "site")


@pytest.mark.parametrize("said", ["error TS5033: Could not write: ENOSPC: no", "npm error EDQUOT"])
def test_a_full_directory_of_temporary_files_is_no_fault_of_node(
    small, tmp_path, monkeypatch, said
):
    done = subprocess.CompletedProcess([], 1, said, "")
    monkeypatch.setattr(javascript.subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(WriteError, match=r"temporary file in .* set TMPDIR to another\."):
        write_web(small, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_an_installed_package_fetches_the_pages_tools_alone():
    lock = json.loads((javascript.SOURCES / "package-lock.json").read_text())
    package, narrow = javascript.narrowed(lock)
    places = narrow["packages"]
    assert set(package["dependencies"]) == {"typescript", "@types/node", "onnxruntime-web"}
    assert "node_modules/onnxruntime-node" not in places
    assert places[""] == package
    for place, facts in places.items():
        assert place == "" or facts == lock["packages"][place]
        assert all(f"node_modules/{name}" in places for name in facts.get("dependencies", {}))


@pytest.mark.usefixtures("still")
def test_the_command(small, tmp_path, monkeypatch):
    """As it stands in docs/web.md, with the server of the next line, and in docs/commands.md."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "site"
    command = words_of("docs/web.md", "hhdeploy web", BUNDLE=small)
    said = CliRunner().invoke(main, [*command, "--title", "Two", "--json"])
    assert said.exit_code == 0, said.output
    server = words_of("docs/web.md", "python -m http.server")
    with subprocess.Popen(
        leashed([sys.executable, "-u", *server, "0"]), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            (port,) = re.findall(r" port (\d+) ", process.stdout.readline())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
                assert page.read() == STILL["index.html"]
        finally:
            process.kill()
    told = json.loads(said.stdout)
    assert (told["path"], told["precision"]) == (str(out), "float32")
    assert told["adapters"] == ["alpha", "gamma"]
    assert told["sent"] == sum(told["files"].values())
    assert json.loads((out / "manifest.webmanifest").read_text())["name"] == "Two"
    again = CliRunner().invoke(main, words_of("docs/commands.md", "hhdeploy web", tasks=small))
    assert again.exit_code == 1
    assert "pass --overwrite" in again.output


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def code() -> dict[str, bytes]:
    """The page's code, compiled once."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not AXE.is_file():
        pytest.skip("needs the packages that js/package.json names: npm ci --prefix js")
    return javascript.page_code(lambda step: None)


@pytest.fixture
def write(code, monkeypatch):
    """Writes a page without compiling it again."""
    monkeypatch.setattr(web, "page_code", lambda progress: dict(code))
    return write_web


class Site:
    """A page on a web server of files, which can be stopped."""

    def __init__(self, folder: Path) -> None:
        asked = self.asked = list[str]()

        class Handler(http.server.SimpleHTTPRequestHandler):
            extensions_map = {".js": "text/javascript", ".mjs": "text/javascript", "": OCTETS} | {
                ".wasm": "application/wasm", ".html": "text/html", ".css": "text/css",
                ".svg": "image/svg+xml", ".json": "application/json",
            }  # fmt: skip

            def log_message(self, *_: object) -> None:
                asked.append(self.path.lstrip("/"))

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Any]:
    sites = contextlib.ExitStack()

    def start(folder: Path) -> Site:
        site = Site(folder)
        sites.callback(site.stop)
        return site

    with sites:
        yield start


WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@pytest.fixture
def page(browser):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.add_init_script(WATCH)
        yield page


def opened(page, url: str) -> None:
    from playwright.sync_api import expect

    page.goto(url)
    state = page.locator("#state")
    expect(state).to_have_text(re.compile("Ready|Not running"), timeout=PATIENCE_MS)
    assert state.text_content() == "Ready", page.locator("#refused").text_content()


def answers(page, picture: bytes, adapters: int) -> dict[str, dict[str, float]]:
    """What the page shows of a picture: adapter -> label -> score."""
    from playwright.sync_api import expect

    file = {"name": "picture.png", "mimeType": "image/png", "buffer": picture}
    page.set_input_files("#file", file)
    told = re.compile(rf"^{adapters} adapters? answered in")
    expect(page.locator("#said")).to_have_text(told, timeout=PATIENCE_MS)
    cards: list[list[Any]] = page.locator("#answers > li").evaluate_all(
        """(cards) => cards.map((card) => [card.querySelector("h3").textContent,
          [...card.querySelectorAll("ol li")].map((line) => [
            line.querySelector(".label").textContent,
            Number(line.querySelector(".share").dataset.score)])])"""
    )
    return {name: dict(lines) for name, lines in cards}


def png(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (71, 53), colour).save(stream, "PNG")
    return stream.getvalue()


def assert_as_python(
    path: Path, precision: Any, colour, found: dict[str, dict[str, float]]
) -> None:
    """The page's answers are those of a session."""
    stage = "quantised" if precision == "int8" else "branches"
    with open_session(path, device="cpu", threads=1, precision=precision) as session:
        names = [entry.name for entry in session.bundle.manifest.adapters]
        assert set(found) == set(names)
        pictures = [Image.new("RGB", (71, 53), colour)] * len(names)
        wrong = []
        for name, own in zip(names, session.classify(pictures, names), strict=True):
            right = {answer.label: answer.score for answer in own}
            assert list(found[name]) == [answer.label for answer in own][: len(found[name])]
            scores = np.asarray(list(found[name].values()), np.float32)
            expected = np.asarray([right[label] for label in found[name]], np.float32)
            assert_parity(expected, scores, stage, precision)
            wrong.append((expected, scores))
        if len(names) > 1:
            (one, _), (_, other) = (
                wrong[0],
                next(w for w in wrong[1:] if len(w[1]) == len(wrong[0][1])),
            )
            assert_caught(one, other, stage, precision)


@in_browser
@pytest.mark.parametrize("kind", ["branches", "heads", "folded", "int8"])
def test_the_page_answers_as_python_does(kind, write, serve, page, request, tmp_path):
    bundle = int8_with_pictures(tmp_path / "b") if kind == "int8" else request.getfixturevalue(kind)
    written = write(bundle, tmp_path / "site", title=EVIL)
    site = serve(tmp_path / "site")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    opened(page, site.url)
    assert page.locator("h1").text_content() == EVIL
    for colour in COLOURS:
        found = answers(page, png(colour), len(written.adapters))
        assert_as_python(bundle, written.precision, colour, found)
    assert page.locator("#engine").text_content() == "WebAssembly, 1 thread"
    assert page.evaluate("violations") == []
    own = (site.url, f"blob:{site.url}")
    assert [url for url in requests if not url.startswith(own)] == []
    assert not [path for path in site.asked if "jspi" in path]


@in_browser
def test_the_second_visit_loads_nothing_and_needs_no_network(write, serve, page, small, tmp_path):
    write(small, tmp_path / "site")
    site = serve(tmp_path / "site")
    opened(page, site.url)
    first = answers(page, png(COLOURS[0]), 2)
    assert [path for path in site.asked if path.endswith((".wasm", ".data"))] == [
        "bundle/model.onnx.data",
        "ort/ort-wasm-simd-threaded.wasm",
    ]
    site.asked.clear()
    opened(page, site.url)
    assert answers(page, png(COLOURS[0]), 2) == first
    assert set(site.asked) <= {"sw.js"}, "which the browser compares by itself"

    # What was changed behind the page's back is found, and comes again.
    tampered = ("bundle/model.onnx.data", "ort/ort-wasm-simd-threaded.wasm", "js/web/app.js")
    known = service_files(tmp_path / "site")
    changed = page.evaluate(
        """async (hashes) => {
          let changed = 0;
          for (const name of await caches.keys()) {
            const store = await caches.open(name);
            for (const request of await store.keys()) {
              if (!hashes.includes(request.url.slice(-64))) continue;
              const response = await store.match(request);
              const bytes = new Uint8Array(await response.arrayBuffer());
              bytes[bytes.length >> 1] ^= 1;
              await store.put(request, new Response(bytes, { headers: response.headers }));
              changed += 1;
            }
          }
          return changed;
        }""",
        [known[name] for name in tampered],
    )
    assert changed == len(tampered)
    site.asked.clear()
    opened(page, site.url)
    assert answers(page, png(COLOURS[0]), 2) == first
    assert set(site.asked) - {"sw.js"} == set(tampered)

    site.stop()
    opened(page, site.url)
    assert answers(page, png(COLOURS[0]), 2) == first
    assert answers(page, png(COLOURS[1]), 2) != first


@in_browser
def test_what_is_damaged_or_no_picture_is_said(write, serve, page, small, tmp_path):
    from playwright.sync_api import expect

    write(small, tmp_path / "site")
    site = serve(tmp_path / "site")
    opened(page, site.url)
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"none"})
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(
        "expected a picture that this browser can read", timeout=PATIENCE_MS
    )
    wide = io.BytesIO()
    Image.new("RGB", (70_000, 2)).save(wide, "PNG")
    file = {"name": "x.png", "mimeType": "image/png", "buffer": wide.getvalue()}
    page.set_input_files("#file", file)
    expect(alert).to_contain_text("canvas holds, found 70000 x 2 pixels", timeout=PATIENCE_MS)
    answers(page, png(COLOURS[0]), 2)
    expect(alert).to_be_hidden()
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "site", damaged)
    flip_byte(damaged / "bundle" / "model.onnx.data")
    page.goto(serve(damaged).url)
    expect(page.locator("#state")).to_have_text("Not running", timeout=PATIENCE_MS)
    expect(alert).to_contain_text("bundle/: model.onnx.data: expected the sha256")
    file = {"name": "x.png", "mimeType": "image/png", "buffer": png(COLOURS[0])}
    page.set_input_files("#file", file)
    told = "No adapter answers: the model is not running."
    expect(page.locator("#said")).to_have_text(told, timeout=PATIENCE_MS)


@in_browser
def test_what_is_transparent_counts_as_black_and_that_is_said(write, serve, page, small, tmp_path):
    """A canvas has no colour there; Python sees the one that is stored, as of PNGs the page."""
    written = write(small, tmp_path / "site")
    opened(page, serve(tmp_path / "site").url)
    said = "What is transparent in the picture counted as black."
    for kind, alpha, there in (("PNG", 255, False), ("PNG", 0, False), ("WEBP", 0, True)):
        stream = io.BytesIO()
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        Image.new("RGBA", (71, 53), (*COLOURS[0], alpha)).save(stream, kind, **options)
        page.locator("#said").evaluate("line => (line.textContent = '')")
        found = answers(page, stream.getvalue(), len(written.adapters))
        assert (said in page.locator("#said").text_content()) == there
        seen = (0, 0, 0) if there else COLOURS[0]
        assert_as_python(small, written.precision, seen, found)


@in_browser
def test_an_adapter_without_an_answer_takes_no_others_away(write, serve, page, small, tmp_path):
    """Its error is on its card; also of the first one, which is asked when the page opens."""
    from playwright.sync_api import expect

    written = write(bundle_of_logits(small, tmp_path / "bundle"), tmp_path / "site")
    opened(page, serve(tmp_path / "site").url)
    page.evaluate(AXE.read_text())
    file = {"name": "picture.png", "mimeType": "image/png", "buffer": png(COLOURS[0])}
    page.set_input_files("#file", file)
    right = [name for name, (_, _, said) in LOGITS.items() if said is not None]
    told = re.compile(rf"^{len(right)} of {len(written.adapters)} adapters answered in")
    expect(page.locator("#said")).to_have_text(told, timeout=PATIENCE_MS)
    cards = page.locator("#answers > li").evaluate_all(
        """(cards) => cards.map((card) =>
          [card.querySelector("h3").textContent, card.querySelector(".failed")?.textContent])"""
    )
    assert {name for name, error in cards if error is None} == set(right)
    assert all(error is None for _, error in cards[: len(right)]), "errors are last"
    for name, error in cards[len(right) :]:
        assert f"adapter {name}: the logits are no numbers" in error
    assert page.locator("#preview").is_visible()
    assert axe(page) == []


def axe(page) -> list[str]:
    """What axe-core finds wrong with the page as it is."""
    found = page.evaluate("async () => (await axe.run()).violations")
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found]


@in_browser
def test_the_page_is_for_everybody(write, serve, page, heads, tmp_path):
    """Wide, narrow, light, dark: nothing to scroll sideways for, nothing that axe finds."""
    written = write(heads, tmp_path / "site", title="long" * 20)
    site = serve(tmp_path / "site")
    opened(page, site.url)
    page.evaluate(AXE.read_text())
    assert axe(page) == []
    answers(page, png(COLOURS[0]), len(written.adapters))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert axe(page) == []
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"none"})
    page.get_by_role("alert").wait_for()
    assert axe(page) == []
    page.evaluate("document.querySelector('h1').style.color = '#ddd'")
    page.emulate_media(color_scheme="light")
    assert axe(page), "a planted fault"


@in_browser
def test_nothing_leaves_the_device(write, serve, page, small, tmp_path):
    """The policy holds in the page, and in the worker that sees the pictures."""
    write(small, tmp_path / "site")
    opened(page, serve(tmp_path / "site").url)
    foreign = serve(tmp_path)
    (worker,) = page.workers
    asking = """async (url) => {
      try { await fetch(url, { mode: "no-cors" }); } catch (error) { return "refused"; }
      return "sent";
    }"""
    assert worker.evaluate(asking, foreign.url) == "refused"
    assert page.evaluate(asking, foreign.url) == "refused"
    assert foreign.asked == []
    assert "connect-src" in page.evaluate("violations")
