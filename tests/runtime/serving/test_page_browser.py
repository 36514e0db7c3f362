"""The page at `/` in a real browser: what a person sees, and what never happens."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.adapters.format import save_adapter
from hhdeploy.preprocess import open_image
from hhdeploy.runtime import open_session
from tests.browser import CHROMIUM, PATIENCE_MS, WHY_NOT, running_browser
from tests.runtime.serving.fleets import make_adapter, put_adapter
from tests.runtime.serving.servers import Server, running_server
from tests.workshop import ROOT

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
expect.set_options(timeout=PATIENCE_MS)

AXE = ROOT / "js/node_modules/axe-core/axe.min.js"
PICTURES = ROOT / "examples/starter/images"
FLAG, BOOT = PICTURES / "emoji/flags/000.png", PICTURES / "fashion/ankle-boot/000.png"
EVIL = "<img src=x onerror=\"console.error('boo')\"><script>alert(1)</script>"
EVIL_LABELS = (f"{EVIL} one: a", f"{EVIL}:2:b", f"{EVIL} three")
EVIL_FOLDER = "<img src=x onerror=alert(1)>"
MODEL = "<i>tiny & co"
MAX_BATCH = 4
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
OURS = ("alpha", "beta", "evil", "gamma", "headless", "rival")

WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => {
  violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


@dataclass
class Visit:
    """A page that is watched from its first byte on."""

    page: Page
    origin: str
    console: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def open(self) -> Page:
        self.page.add_init_script(WATCH)
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(self.origin)
        expect(self.page.locator("#health")).to_have_text("Ready")
        return self.page

    def check(self) -> None:
        """Nothing in the console, nothing against the policy, nothing asked of others."""
        assert self.console == []
        assert self.page.evaluate("violations") == []
        own = (f"{self.origin}/", f"blob:{self.origin}/", "data:")
        assert [url for url in self.asked if not url.startswith(own)] == []

    def count(self, end: str) -> int:
        """Requests so far whose address ends so."""
        return sum(url.endswith(end) for url in self.asked)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(PATIENCE_MS)
        yield context.new_page()


@pytest.fixture(scope="module")
def hostile(workshop, tmp_path_factory) -> Path:
    """A fleet directory: an adapter whose labels are markup, and a folder whose name is."""
    fleet = tmp_path_factory.mktemp("hostile")
    gamma = workshop.adapters["gamma"]
    config = replace(gamma.config, class_names=EVIL_LABELS)
    save_adapter(replace(gamma, config=config), fleet / "evil")
    (fleet / EVIL_FOLDER).mkdir()
    return fleet


@pytest.fixture(scope="module")
def fleet(branches, hostile, tmp_path_factory) -> Iterator[Server]:
    """Six adapters that answer, more than go in one batch, and a broken one."""
    log = tmp_path_factory.mktemp("fleet") / "log"
    options = ("--model-name", MODEL, "--max-batch", MAX_BATCH, "--adapters-dir", hostile)
    with running_server(branches, log, *options, "--pin", "alpha") as server:
        yield server


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def best_labels(branches: Path, hostile: Path, picture: Path) -> dict[str, str]:
    """What a bare session says of a picture, by adapter, the surest first."""
    with open_session(branches, device="cpu", threads=1) as session:
        session.adapters.add("evil", hostile / "evil")
        found = []
        for name in OURS:
            entry = session.adapters[name]
            logits = session.run(session.preprocess([open_image(picture)], name), name)
            own = logits[0, : entry.classes]
            share = 1 / np.exp(own - own.max()).sum()
            found.append((-share, name, entry.label(int(np.argmax(own)))))
        return {name: label for _, name, label in sorted(found)}


def test_every_adapter_says_what_it_sees(page, fleet, branches, hostile):
    visit = Visit(page, fleet.url)
    visit.open()
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("6 adapters answered in 3 requests")
    assert visit.count("/infer") == 3, "four, one, and one that had no row"
    first = "#answers ol li:first-child .label"
    best = best_labels(branches, hostile, FLAG)
    assert texts(page, "#answers h3") == list(best) != sorted(best)
    assert texts(page, first) == list(best.values())
    bars = page.locator("#answers .track i").evaluate_all(
        "bars => bars.map((bar) => parseFloat(bar.style.width))"
    )
    assert len(bars) == 3 * len(OURS)
    assert all(0 <= share <= 100 for share in bars)
    assert all(a >= b >= c for a, b, c in zip(bars[::3], bars[1::3], bars[2::3], strict=True))
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 64
    expect(page.locator("#picture")).to_contain_text("64 × 64 pixels")

    drop(page, BOOT)
    expect(page.locator("#picture")).to_contain_text("28 × 28 pixels")
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    assert texts(page, first) == list(best_labels(branches, hostile, BOOT).values())

    page.get_by_label("Filter").fill("AL")
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#said")).to_contain_text("2 adapters answered in 1 request")
    assert sorted(texts(page, "#answers h3")) == ["alpha", "rival"]
    visit.check()


def drop(page: Page, picture: Path) -> None:
    """Drop a file on the page, as a mouse does."""
    transfer = page.evaluate_handle(
        """(encoded) => {
          const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
          return transfer;
        }""",
        base64.b64encode(picture.read_bytes()).decode(),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_names_and_labels_stay_text(page, fleet):
    visit = Visit(page, fleet.url)
    visit.open()
    expect(page.locator("h1")).to_have_text(MODEL)
    page.get_by_label("Filter").fill("evil")
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("1 adapter answered")
    assert sorted(texts(page, "#answers .label")) == sorted(EVIL_LABELS)
    page.get_by_label("Filter").fill("broken")
    row = page.locator("#adapters tr")
    expect(row).to_have_count(1)
    expect(row.locator("th")).to_have_text(EVIL_FOLDER)
    expect(row.locator(".problem")).to_contain_text(EVIL_FOLDER)
    assert page.locator("main img").count() == 1, "the preview alone"
    assert page.locator("script").count() == 1
    visit.check()


def test_the_policy_is_in_force(page, fleet):
    """What the other tests rely on: markup and foreign addresses are refused, and seen here."""
    visit = Visit(page, fleet.url)
    visit.open()
    page.evaluate(
        """async () => {
          try { document.body.innerHTML = "<b>markup</b>"; } catch { }
          const script = document.createElement("script");
          try { script.text = "window.ran = true"; } catch { }
          document.body.append(script);
          await fetch("http://192.0.2.1/").catch(() => {});
        }"""
    )
    broken = {violation.split(" ")[0] for violation in page.evaluate("violations")}
    assert {"require-trusted-types-for", "connect-src"} <= broken
    assert page.evaluate("window.ran") is None
    assert page.locator("h1").count() == 1
    assert visit.console
    with pytest.raises(AssertionError):
        visit.check()


def test_numbers_are_those_of_status(page, fleet):
    visit = Visit(page, fleet.url)
    visit.open()
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("answered")
    _, status = fleet.json("GET", "/status")
    # The next look comes within seconds.
    expect(page.locator("#answered")).to_have_text(str(status["requests"]["answered"]))
    expect(page.locator("#images")).to_have_text(str(status["images"]))
    expect(page.locator("#queued")).to_have_text("0")
    expect(page.locator("#rows")).to_have_text(
        f"{status['bank']['rows_used']} of {status['bank']['rows']}"
    )
    for percentile in ("#p50", "#p95", "#p99"):
        expect(page.locator(percentile)).to_contain_text("ms")
    lines = page.locator("#strip-bars").get_attribute("d")
    assert lines.count("M") == len(status["latency_ms"]["recent"])
    cells = [
        row.locator("th, td").all_text_contents() for row in page.locator("#adapters tr").all()
    ]
    assert [row[0] for row in cells] == [a["name"] for a in status["adapters"]]
    for row, adapter in zip(cells, status["adapters"], strict=True):
        assert row[1].startswith(adapter["state"])
        assert ("pinned" in row[1]) == adapter["pinned"]
        numbers = (adapter["classes"], adapter["row"], adapter["images"])
        assert row[2:] == ["–" if n is None else str(n) for n in numbers]
    assert "1 broken" in page.locator("#shown").text_content()
    visit.check()


def test_a_server_that_did_not_answer_in_time_is_asked_again_soon(page, fleet):
    """Not after ten times the time that the page waited for it."""
    page.add_init_script(
        "window.delays = []; const later = setTimeout;"
        "window.setTimeout = (act, ms) => (delays.push(ms), later(act, ms));"
        "const limit = AbortSignal.timeout; let looks = 0;"
        "AbortSignal.timeout = (ms) => limit(looks++ ? ms : 500);"
    )
    held = []
    page.route("**/status", lambda route: held.append(route) if not held else route.fallback())
    page.goto(fleet.url)
    expect(page.locator("#health")).to_have_text("Ready")
    assert len(held) == 1  # and it was never answered
    assert page.evaluate("delays[0]") == 2000


def test_what_the_server_refuses_is_said(page, fleet):
    visit = Visit(page, fleet.url)
    visit.open()
    page.set_input_files(
        "#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture at all"}
    )
    expect(page.get_by_role("alert")).to_have_text(
        "image 0: expected an encoded JPEG, PNG, WEBP picture, found none."
    )
    expect(page.locator("#said")).to_contain_text("No adapter answered")
    expect(page.locator("#invitation")).to_be_visible()
    assert all("400 (Bad Request)" in line for line in visit.console)
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    expect(page.locator("#refused")).to_be_hidden()


def noise(side: int) -> bytes:
    """A PNG of three bytes a pixel."""
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_a_large_photo_is_taken_as_the_server_takes_it(page, fleet, tmp_path):
    """Its text in JSON would be beyond the limit of what is JSON alone."""
    visit = Visit(page, fleet.url)
    visit.open()
    photo = tmp_path / "photo.png"
    photo.write_bytes(noise(1800))
    assert photo.stat().st_size > 9_000_000
    page.set_input_files("#file", photo)
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    vast = tmp_path / "vast.png"
    with vast.open("wb") as file:
        file.truncate(700_000_000)
    page.set_input_files("#file", vast)
    expect(page.get_by_role("alert")).to_contain_text("The picture is too large: the server takes")
    expect(page.locator("#said")).to_have_text("")
    visit.check()


CHOOSE = """(sizes) => sizes.forEach((files) => {
  const transfer = new DataTransfer();
  for (const [name, size] of files) transfer.items.add(new File([new Uint8Array(size)], name));
  document.getElementById("drop").dispatchEvent(
    new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
})"""


def test_the_picture_that_was_chosen_last_is_asked_for(page, fleet):
    """A larger one before it takes longer to read; of several at once it is the first."""
    visit = Visit(page, fleet.url)
    visit.open()
    page.evaluate(CHOOSE, [[["older.png", 30_000_000]], [["newer.png", 10]]])
    expect(page.get_by_role("alert")).to_contain_text("found none")
    assert page.locator("#picture").text_content().startswith("newer.png, 10 bytes")
    assert visit.count("/infer") == 1, "the older one was not sent"
    page.evaluate(CHOOSE, [[["one.png", 11], ["two.png", 12], ["three.png", 13]]])
    expect(page.locator("#picture")).to_have_text("the first of 3 files: one.png, 11 bytes")


def test_a_file_that_cannot_be_read_is_no_silent_server(page, fleet, tmp_path):
    visit = Visit(page, fleet.url)
    visit.open()
    there = tmp_path / "there.png"
    there.write_bytes(FLAG.read_bytes())
    page.set_input_files("#file", there)
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    there.unlink()
    page.get_by_role("button", name="Ask again").click()
    expect(page.get_by_role("alert")).to_contain_text("there.png cannot be read: ")
    expect(page.locator("#said")).to_have_text("No adapter answered.")


@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: npm ci --prefix js")
def test_the_page_is_for_everybody(page, fleet):
    visit = Visit(page, fleet.url)
    visit.open()
    page.evaluate(AXE.read_text())
    for step in ("start", "answers", "refused"):
        if step == "answers":
            page.set_input_files("#file", FLAG)
            expect(page.locator("#said")).to_contain_text("6 adapters answered")
        if step == "refused":
            page.set_input_files(
                "#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"none"}
            )
            expect(page.get_by_role("alert")).to_be_visible()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate("async () => (await axe.run()).violations")
            assert [f"{each['id']}: {each['nodes'][0]['html']}" for each in found] == []


def test_thousands_of_adapters(page, fleet):
    def many(route: Route) -> None:
        status = route.fetch().json()
        one = next(a for a in status["adapters"] if a["state"] == "ready")
        status["adapters"] = [one | {"name": f"task-{i:04}", "pinned": False} for i in range(5000)]
        route.fulfill(json=status)

    def answer(route: Route) -> None:
        body, headers = route.request.post_data_buffer, route.request.headers
        head = body[: int(headers["inference-header-content-length"])]
        names = json.loads(head)["inputs"][1]["data"]
        one = {"index": 0, "score": 0.5, "positive": True}
        data = [
            json.dumps({"problem_type": CLASSES, "answers": [one | {"label": f"class of {name}"}]})
            for name in names
        ]
        route.fulfill(json={"outputs": [{"shape": [len(names)], "data": data}]})

    page.route("**/status", many)
    page.route("**/infer", answer)
    visit = Visit(page, fleet.url)
    visit.open()
    expect(page.locator("#adapters tr")).to_have_count(200)
    expect(page.locator("#shown")).to_have_text(
        "5,000 adapters: 5,000 ready; the first 200 are shown."
    )
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("200 adapters answered in 50 requests")
    page.locator("#answers > li").last.scroll_into_view_if_needed()
    expect(page.get_by_label("Filter")).to_be_in_viewport()
    expect(page.locator("#said")).to_contain_text("the first 200 of 5,000 were asked")
    labels = texts(page, "#answers .label")
    assert labels == [f"class of task-{i:04}" for i in range(200)]
    page.get_by_label("Filter").fill("TASK-4999")
    expect(page.locator("#adapters tr")).to_have_count(1)
    expect(page.locator("#shown")).to_contain_text("1 match")
    visit.check()


def test_labels_and_values_are_shown_as_what_they_are(page, fleet):
    def answers(kind, *found):
        keys = ("label", "score", "positive")
        return json.dumps(
            {"problem_type": kind, "answers": [dict(zip(keys, x, strict=True)) for x in found]}
        )

    kinds = [
        answers(LABELS, ("cat", 0.9, True), ("indoor", 0.5, True), ("night", 0.02, False)),
        answers(VALUES, ("age", 41.25, False), ("height", None, False)),
    ]

    def answer(route: Route) -> None:
        route.fulfill(json={"outputs": [{"shape": [2], "data": kinds}]})

    page.route("**/infer", answer)
    visit = Visit(page, fleet.url)
    visit.open()
    page.get_by_label("Filter").fill("AL")  # two adapters
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("2 adapters answered")
    assert texts(page, "#answers .share") == ["90 %", "50 %", "2.0 %", "41.25", "not a number"]
    assert texts(page, "#answers .said .label") == ["cat", "indoor", "age", "height"]
    assert page.locator("#answers .track").count() == 3
    visit.check()


def test_a_bundle_without_logits_is_not_asked_for_answers(page, fleet):
    def features(route: Route) -> None:
        status = route.fetch().json()
        status["adapters"] = [adapter | {"classes": None} for adapter in status["adapters"]]
        route.fulfill(json=status | {"answers": False})

    page.route("**/status", features)
    visit = Visit(page, fleet.url)
    visit.open()
    expect(page.locator("#lead")).to_contain_text("features and no answers")
    expect(page.locator("#playground")).to_be_hidden()
    drop(page, FLAG)
    assert set(texts(page, "#adapters tr td:nth-child(3)")) == {"–"}
    assert visit.count("/infer") == 0
    visit.check()


def test_an_adapter_that_breaks_meanwhile_does_not_silence_the_others(page, fleet):
    looks = []

    def outdated(route: Route) -> None:
        status = route.fetch().json()
        looks.append(status)
        if len(looks) == 1:
            for adapter in status["adapters"]:
                adapter["state"] = "ready"
        route.fulfill(json=status)

    page.route("**/status", outdated)
    page.clock.install()  # the page looks again only when it has to
    visit = Visit(page, fleet.url)
    visit.open()
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    expect(page.get_by_role("alert")).to_contain_text(EVIL_FOLDER)
    assert sorted(texts(page, "#answers h3")) == list(OURS)
    assert len(looks) == 2


def test_a_hidden_page_asks_nothing(page, fleet):
    page.clock.install()
    visit = Visit(page, fleet.url)
    visit.open()

    def turn(hidden: bool) -> None:
        page.evaluate(
            """(hidden) => {
              Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
              document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    with page.expect_response("**/status"):
        page.clock.run_for(3000)
    turn(hidden=True)
    before = visit.count("/status")
    page.clock.run_for(60_000)
    page.evaluate("fetch('v2/health/live').then((answer) => answer.text())")
    assert visit.count("/status") == before
    with page.expect_response("**/status"):
        turn(hidden=False)
    visit.check()


def test_a_folded_bundle_and_a_server_that_stops(page, folded, tmp_path):
    with running_server(folded, tmp_path / "log") as server:
        visit = Visit(page, server.url)
        visit.open()
        expect(page.locator("#bank")).to_be_hidden()
        page.set_input_files("#file", BOOT)
        expect(page.locator("#said")).to_contain_text("1 adapter answered in 1 request")
        assert texts(page, "#answers h3") == ["alpha"]
        visit.check()
        assert server.stop() == 0
        expect(page.locator("#health")).to_have_text("The server does not answer")
        page.get_by_role("button", name="Ask again").click()
        expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
        expect(page.locator("#said")).to_contain_text("No adapter answered")


def test_a_server_with_tokens_is_asked_with_one(page, small, tmp_path):
    token = "a-token-of-a-visitor"
    (tmp_path / "tokens").write_text(token)
    (tmp_path / "tokens").chmod(0o600)
    with running_server(
        small, tmp_path / "log", "--inference-token-file", tmp_path / "tokens"
    ) as server:
        visit = Visit(page, server.url)
        page.on("console", lambda message: visit.console.append(message.text))
        page.goto(server.url)
        field = page.get_by_label("Token")
        expect(page.locator("#health")).to_have_text("This server wants a token")
        page.set_input_files("#file", FLAG)
        expect(page.get_by_role("alert")).to_have_text("The server wants a token first. Ask again.")
        for wrong in ("wrong", "of two words", f"{token}…"):  # which no header holds
            field.fill(wrong)
            page.get_by_role("button", name="Use it").click()
            expect(page.locator("#health")).to_have_text("The token is wrong")
        page.reload()
        expect(page.locator("#health")).to_have_text("The token is wrong")
        field.fill(token)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#health")).to_have_text("Ready")
        expect(field).to_be_hidden()
        assert page.get_by_role("link").count() == 0, "a link would carry no token"
        page.set_input_files("#file", FLAG)
        expect(page.locator("#said")).to_contain_text("2 adapters answered")
        page.reload()
        expect(page.locator("#health")).to_have_text("Ready")
        assert token not in page.url
        assert all("401 (Unauthorized)" in line for line in visit.console), visit.console


def test_what_stands_between_is_not_taken_for_the_server(page, fleet):
    """E.g. a proxy that wants a login, with 200."""
    visit = Visit(page, fleet.url)
    visit.open()
    page.route("**/infer", lambda route: route.fulfill(body="<html>", content_type="text/html"))
    page.set_input_files("#file", FLAG)
    expect(page.get_by_role("alert")).to_have_text(
        "What answers is not the server: it sent no JSON."
    )
    page.route("**/status", lambda route: route.fulfill(body="<html>", content_type="text/html"))
    expect(page.locator("#health")).to_have_text("What answers is not the server: it sent no JSON.")


CLIPPED = """() => {
  const wide = innerWidth, found = [];
  for (const one of document.querySelectorAll("body *")) {
    const { left, right, width } = one.getBoundingClientRect();
    if (!width || one.closest("svg, thead, .hidden, [hidden]")) continue;
    if (right > wide + 1 || left < -1 || one.scrollWidth > one.clientWidth + 1 &&
        getComputedStyle(one).display !== "inline" && one.localName !== "img") {
      found.push(`${one.localName}#${one.id}.${one.className} ${left} ${right} ${one.scrollWidth}`);
    }
  }
  if (document.documentElement.scrollWidth > wide) found.push("the page itself");
  return found;
}"""


def test_nothing_is_clipped_on_a_phone(page, fleet):
    def long(route: Route) -> None:
        status = route.fetch().json()
        status["adapters"][1]["name"] = "a-name-without-an-end-" * 6
        status["adapters"][1]["images"] = 123_456_789
        status["requests"] = {"answered": 987_654_321, "failed": dict.fromkeys(REASONS, 77_777)}
        route.fulfill(json=status)

    page.set_viewport_size({"width": 390, "height": 844})
    visit = Visit(page, fleet.url)
    visit.open()
    page.set_input_files("#file", FLAG)
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    assert page.evaluate(CLIPPED) == []
    page.route("**/status", long)
    expect(page.locator("#answered")).to_have_text("987,654,321")
    assert page.evaluate(CLIPPED) == []
    cells = page.locator("#adapters tr").first.locator("td.number")
    said = cells.evaluate_all(
        "cells => cells.map((cell) => getComputedStyle(cell, '::before').content)"
    )
    assert said == ['"Classes "', '"Row "', '"Images answered "']
    visit.check()


@pytest.mark.parametrize("heeds", [(), ("beta",), OURS], ids=["nobody", "one", "all"])
def test_a_picture_is_shown_as_the_adapters_see_it(page, fleet, tmp_path, heeds):
    """A photo of 30 x 20 pixels that lies on its side, as phones write them."""
    photo, turned = tmp_path / "photo.jpg", Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20), (200, 40, 40)).save(photo, exif=turned)

    def as_told(route: Route) -> None:
        status = route.fetch().json()
        for adapter in status["adapters"]:
            adapter["exif"] = adapter["name"] in heeds
        route.fulfill(json=status)

    page.route("**/status", as_told)
    visit = Visit(page, fleet.url)
    visit.open()
    page.set_input_files("#file", photo)
    expect(page.locator("#said")).to_contain_text("6 adapters answered")
    told = page.locator("#orientation")
    if heeds == ("beta",):
        expect(told).to_have_text("A photo that was taken on its side is so for 5 adapters.")
    else:
        expect(told).to_have_text("")
    drawn = page.locator("#preview").evaluate("image => getComputedStyle(image).imageOrientation")
    assert drawn == ("none" if not heeds else "from-image")
    visit.check()


def test_a_bank_is_not_turned_over_for_a_visitor(page, branches, hostile, workshop, tmp_path):
    """Three rows and eight adapters: those that others ask for keep theirs."""
    folder = tmp_path / "fleet"
    folder.mkdir()
    for seed in range(3):
        put_adapter(make_adapter(workshop, seed), folder, f"extra{seed}")
    with running_server(
        branches, tmp_path / "log", "--adapters-dir", folder, "--slots", 4
    ) as server:
        _, status = server.json("GET", "/status")
        before = [a["name"] for a in status["adapters"] if a["state"] == "ready"]
        assert len(before) == 3
        visit = Visit(page, server.url)
        visit.open()
        page.set_input_files("#file", FLAG)
        expect(page.locator("#said")).to_contain_text("8 adapters answered in 6 requests")
        evicted = {r["adapter"] for r in server.records() if r["message"] == "adapter evicted"}
        assert len([name for name in before if name not in evicted]) == 2
        visit.check()
