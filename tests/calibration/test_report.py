"""The report: everything is in it, nothing is fetched, and no name becomes markup."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hhdeploy.adapters.config import CLASSES, VALUES
from hhdeploy.calibration.judging.accuracy import Accuracy, TaskAccuracy
from hhdeploy.calibration.judging.exam import Exam, Question
from hhdeploy.calibration.judging.findings import (
    Changed,
    Findings,
    Guess,
    changed_images,
    pixels_of,
)
from hhdeploy.calibration.judging.guard import Guarded, Trial
from hhdeploy.calibration.quantised import Quantised, SiteInfo
from hhdeploy.calibration.report.markup import tag
from hhdeploy.calibration.report.page import report_html
from hhdeploy.calibration.report.pictures import png_of
from hhdeploy.calibration.report.plots import split_site
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.preprocess import Preprocess
from hhdeploy.timing import Latency, Paired
from tests.browser import CHROMIUM, WHY_NOT

EVIL = "<img src=x onerror=\"alert('boo')\">&"
KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
PREPROCESS = Preprocess((3, 20, 30), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def info(quantised, sqnr_db):
    return SiteInfo(quantised, (48, 96), 96, 0.125, smoothed=True, bias_corrected=False,
                    sqnr_db=sqnr_db)  # fmt: skip


@pytest.fixture
def findings() -> Findings:
    """Two tasks, one site kept by the guard, one never measured; hostile names."""
    sites = {f"blocks.{b}.{k}": info(True, 20.0 + b) for b in range(3) for k in KINDS}
    sites["blocks.1.mlp.fc2"] = info(False, 7.25)
    sites["norm_free"] = info(True, None)
    settings = CalibrationSettings(exclude=(EVIL,))
    quantised = Quantised(
        None, "int8", sites, ("patch_embed.proj",), dict.fromkeys(sites, 1.5), (), settings,
        {"source": EVIL, "sha256": "ab" * 32}, {"nncf": "3.4.0"},
    )  # fmt: skip
    tasks = (
        TaskAccuracy("digits", 250, 0.98, 31.25, 240, 236, lost=5, gained=1),
        TaskAccuracy(EVIL, 40, 0.9, 24.5),
    )
    picture = pixels_of(np.zeros((3, 20, 30), np.float32), PREPROCESS)
    latency = Latency(2.0, 2.5, 1.9, 20)
    return Findings(
        bundle="out",
        model="vit_base_patch16_224",
        quantised=quantised,
        exam=Exam((), True, EVIL, (f"beware of {EVIL}",)),
        accuracy=Accuracy(tasks, True),
        guarded=Guarded(2.0, ("blocks.1.mlp.fc2",), (Trial(0, 2.75, False), Trial(1, 1.6, True))),
        changed=(
            Changed(f"{EVIL}.png", EVIL, EVIL, Guess(EVIL, 0.75), Guess("other", 0.5), picture),
        ),
        sizes={"float32": 4_000_000, "int8": 1_000_000},
        latency={1: Paired(latency, latency, 1.25, 1.125, 1.5)},
        device="onnxruntime CPUExecutionProvider",
        machine="a machine",
        replaced=True,
    )


class Reader(HTMLParser):
    """Elements, their attributes, and the text of what is shown."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_names_stay_text(findings):
    page = Reader(report_html(findings))
    assert page.text.count(EVIL) >= 6, "shown as it is"
    assert not [e for e in page.elements if "onerror" in e[1]]
    assert {e for e, _ in page.elements}.isdisjoint({"script", "iframe", "object", "link", "base"})
    (image,) = [attributes for element, attributes in page.elements if element == "img"]
    assert image["alt"] == f"{EVIL}.png"


def test_the_page_loads_nothing(findings):
    document = report_html(findings)
    page = Reader(document)
    loads = [a[key] for _, a in page.elements for key in ("src", "href", "srcset") if key in a]
    assert len(loads) == 1
    assert loads[0].startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?://", document)
    policy = [a["content"] for e, a in page.elements if e == "meta" and "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'")


def test_figures_and_kept_sites_are_shown(findings):
    document = report_html(findings)
    text = Reader(document).text
    for shown in (
        "96.00", "94.40", "1.60", "5 / 1", "98.0", "31.2", "blocks.1.mlp.fc2: 7.2 dB, kept",
        "within", "0.25", "1.25 (1.12 to 1.50)", "a machine", "3.4.0", "ab" * 32, "75%",
        "48 × 96", "1 of 13 sites stay float", "are refused",
    ):  # fmt: skip
        assert shown in text, shown
    bars = [a["class"] for e, a in Reader(document).elements if e == "rect"]
    assert bars.count("bar kept") == 1
    assert bars.count("bar") == 11, "a site that was not measured has no bar"


def test_the_verdict_in_one_sentence(findings):
    assert findings.verdict() == (
        "INT8 costs 1.60 points of top-1 (96.00 % to 94.40 %, standard error 0.97, not told apart "
        "from no loss) on 290 held-out images; 1 of 13 sites stay float to keep the bound of 2 "
        "points."
    )
    clear = TaskAccuracy("digits", 250, 0.9, 30.0, 240, 225, lost=15, gained=0)
    worse = replace(findings, accuracy=Accuracy((clear,), False), guarded=None)
    assert "not told apart" not in worse.verdict()
    assert "on 250 calibration images; 1 of 13 sites stay float." in worse.verdict()
    same = TaskAccuracy("digits", 250, 1.0, 40.0, 240, 240, lost=0, gained=0)
    assert (
        "leaves up to 1.2 points open" in replace(worse, accuracy=Accuracy((same,), True)).verdict()
    )
    unknown = replace(findings, accuracy=Accuracy(findings.accuracy.tasks[1:], True))
    assert "90.0% of 40 held-out images, whose true classes are unknown" in unknown.verdict()


def test_what_gains_costs_nothing(findings):
    gains = TaskAccuracy("digits", 250, 0.9, 30.0, 225, 240, lost=0, gained=15)
    found = replace(findings, accuracy=Accuracy((gains,), True)).verdict()
    assert found.startswith("INT8 costs nothing of top-1 (90.00 % to 96.00 %, standard error ")
    same = TaskAccuracy("digits", 60, 1.0, 40.0, 50, 50, lost=0, gained=0)
    accuracy = Accuracy((same, TaskAccuracy("b", 40, 0.9, 24.5)), True)
    found = replace(findings, accuracy=accuracy).verdict()
    assert "up to 5.0 points open" in found, "images without true classes prove nothing"


def test_the_images_that_lost_most_are_shown_first():
    """Right ones that are wrong now, other answers, then those that got less probable; no other."""
    cases = {
        "risen": ([1, 0, 0], [2, 0, 0], 0),
        "fallen": ([9, 0, 0], [1, 0, 0], 0),
        "other": ([1, 0, 0], [1, 1.2, 0], 2),
        "lost": ([1, 0, 0], [1, 1.1, 0], 0),
        "value": ([9, 0, 0], [0, 9, 0], None),
    }
    questions = [
        Question("a", truth, name, lambda: np.full((3, 20, 30), 9, np.float32),
                 VALUES if name == "value" else CLASSES)
        for name, (*_, truth) in cases.items()
    ]  # fmt: skip
    feeder = SimpleNamespace(class_names=lambda name: None, preprocess=lambda name: PREPROCESS)
    before, after = (np.asarray([case[i] for case in cases.values()], np.float32) for i in (0, 1))
    found = changed_images(feeder, Exam(tuple(questions), True, "x", ()), before, after, 9)
    assert [image.source for image in found] == ["lost", "other", "fallen"]
    assert (found[0].before.label, found[0].after.label, found[0].truth) == ("0", "1", "0")
    assert found[0].pixels.max() == 1.0
    assert len(changed_images(feeder, Exam(tuple(questions), True, "x", ()), before, after, 1)) == 1


def test_a_bound_finer_than_the_images_is_said(findings):
    assert any("the guard chose the sites on the images" in w for w in findings.warnings)
    assert not any("cannot resolve" in w for w in findings.warnings)
    fine = replace(findings, guarded=replace(findings.guarded, max_drop=0.5))
    assert any("cannot resolve a bound of 0.5 points" in w for w in fine.warnings)


def test_sites_are_split_into_block_and_kind():
    assert split_site("blocks.11.attn.qkv.q") == ("blocks.11", "attn.qkv.q")
    assert split_site("layers.0.blocks.1.mlp.fc1@1") == ("layers.0.blocks.1", "mlp.fc1@1")
    assert split_site("pre_logits.fc") == ("", "pre_logits.fc")


def test_pictures_show_what_the_model_sees():
    from io import BytesIO

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    mean, std = (np.asarray(x, np.float32) for x in (PREPROCESS.mean, PREPROCESS.std))
    image = ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)
    found = Image.open(BytesIO(png_of(pixels_of(image, PREPROCESS))))
    assert np.array_equal(np.asarray(found), pixels)


def test_markup_escapes_attributes_too():
    assert tag("b", title='"><i>') == '<b title="&quot;&gt;&lt;i&gt;"></b>'


def render(document: str, folder: Path) -> tuple[Reader, list[str], list[str]]:
    """What a browser makes of a page: the DOM, console messages, what the page asked for."""
    folder.mkdir()
    page, log = folder / "page.html", folder / "net.json"
    page.write_text(document, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", "--timeout=3000",
            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    events = [
        json.loads(line.rstrip().rstrip(","))
        for line in log.read_text(encoding="utf-8").splitlines()
        if '"initiator"' in line
    ]
    # The browser's own traffic has "not an origin".
    asked = [
        event["params"]["url"]
        for event in events
        if "url" in event["params"] and event["params"]["initiator"] != "not an origin"
    ]
    return Reader(done.stdout), console, [url for url in asked if not url.startswith("data:")]


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_a_browser_shows_it_without_errors_or_requests(findings, tmp_path):
    page, console, asked = render(report_html(findings), tmp_path / "report")
    assert "int8 calibration of out" in page.text
    assert [e for e, _ in page.elements].count("table") == 6
    assert [e for e, _ in page.elements].count("svg") == 2
    assert (console, asked) == ([], [])
    planted = '<img src="http://192.0.2.1/x.png"><script>console.error("planted")</script>'
    _, console, asked = render(planted, tmp_path / "planted")
    assert len(console) == 1
    assert asked == ["http://192.0.2.1/x.png"]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_inputs_of_other_channels_are_shown(channels):
    """Grey ones, and arrays: the report failed after the calibration, or took one for alpha."""
    from io import BytesIO

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels)).astype(np.uint8)
    found = np.asarray(Image.open(BytesIO(png_of(pixels / 255))))
    assert np.array_equal(found, pixels[..., :3] if channels > 3 else pixels[..., 0])
