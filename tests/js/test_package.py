"""The JavaScript package in Node, on both builds of ONNX Runtime: it finds what Python finds."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.runtime import open_session
from tests.support import assert_caught, assert_parity, images
from tests.workshop import ROOT, copy_bundle, flip_byte

PACKAGE = ROOT / "js"
PHOTO = ROOT / "hhdeploy" / "verifying" / "photo.jpg"
INSTALL = "npm ci --prefix js --ignore-scripts"
# Of a picture: columns and rows of the photograph that it is.
PARTS = ((0, 0, 451, 300), (100, 20, 231, 299), (37, 11, 66, 64))


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Asks one Node process some questions, see js/test/ask.mjs."""
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (PACKAGE / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip(f"needs the packages that js/package.json names: {INSTALL}")
    dist = tmp_path_factory.mktemp("js") / "dist"
    compiler = PACKAGE / "node_modules" / ".bin" / "tsc"
    built = subprocess.run(
        [compiler, "-p", PACKAGE, "--outDir", dist], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout

    def answers(*questions: dict[str, Any]) -> list[Any]:
        said = subprocess.run(
            ["node", PACKAGE / "test" / "ask.mjs", dist],
            input=json.dumps(questions),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)

    return answers


@pytest.fixture
def served():
    """Serves a folder as a static web server does: its address."""
    servers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    def start(folder: Path) -> str:
        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def encoded(array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decoded(answer: str, *shape: int):
    assert isinstance(answer, str), answer
    return np.frombuffer(base64.b64decode(answer), np.float32).reshape(shape)


def pictures() -> list[Image.Image]:
    with Image.open(PHOTO) as photo:
        return [photo.convert("RGB").crop(box) for box in PARTS]


def sent(pictures) -> list[dict[str, Any]]:
    return [
        {"data": encoded(np.asarray(p)), "width": p.width, "height": p.height} for p in pictures
    ]


def logits_of(bundle: Path, inputs, names):
    with open_session(bundle, device="cpu", threads=1) as session:
        return session.run(inputs, names)


def test_logits_of_every_adapter(ask, branches, heads, scaled, constant, folded):
    questions, expected = [], []
    for bundle in (branches, heads, scaled, constant, folded):
        names = [a.name for a in Bundle.open(bundle).manifest.adapters]
        inputs = images(len(names))
        expected.append(logits_of(bundle, inputs, names))
        questions.append(
            {"ask": "logits", "where": str(bundle), "images": encoded(inputs), "adapters": names}
        )
    for answer, logits in zip(ask(*questions), expected, strict=True):
        found = decoded(answer, *logits.shape)
        assert np.array_equal(np.isfinite(found), np.isfinite(logits))
        assert_parity(logits, found, "branches", "float32")
        if len(logits) > 1:
            assert_caught(logits, np.roll(found, 1, 0), "branches", "float32")


def test_a_web_server_and_web_assembly(ask, branches, served):
    names, inputs = ["beta", "alpha", "backbone"], images(3)
    question = {"images": encoded(inputs), "adapters": names, "runtime": "web"}
    (answer,) = ask({"ask": "logits", "where": served(branches), **question})
    logits = logits_of(branches, inputs, names)
    assert_parity(logits, decoded(answer, *logits.shape), "branches", "float32")


def test_pictures_to_answers(ask, branches, heads):
    taken = pictures()
    for bundle, names in (
        (branches, ["gamma", "alpha", "headless"]),
        (heads, ["tags", "age", "alpha"]),
    ):
        question = {"where": str(bundle), "pictures": sent(taken), "adapters": names}
        found, seen = ask({"ask": "classify", **question}, {"ask": "images", **question})
        with open_session(bundle, device="cpu", threads=1) as session:
            expected = session.classify(taken, names)
            transforms = [
                session.bundle.manifest.preprocess_of(session.entry(name)) for name in names
            ]
        for transform, picture, image in zip(transforms, taken, seen, strict=True):
            exact = transform(picture)
            off = (decoded(image, *exact.shape) - exact) * np.asarray(transform.std)[:, None, None]
            assert np.abs(off).max() < 2.01 / 255
        for answers, others in zip(expected, found, strict=True):
            by_index = {a["index"]: a for a in others}
            for answer in answers:
                other = by_index[answer.index]
                assert (answer.label, answer.positive) == (other["label"], other["positive"])
                assert other["score"] == pytest.approx(answer.score, rel=1e-2, abs=1e-2)


def test_rows_are_packed_as_python_packs_them(ask, branches, scaled, workshop, scaled_workshop):
    cases = [
        (branches, workshop, name)
        for name in ("alpha", "beta", "gamma", "lora", "headless", "probe")
    ]
    cases += [(scaled, scaled_workshop, name) for name in ("scaled", "ia3", "after", "plain")]
    questions = [
        {"ask": "row", "where": str(bundle), "adapter": str(shop.directory(name))}
        for bundle, shop, name in cases
    ]
    for (bundle, shop, name), answer in zip(cases, ask(*questions), strict=True):
        layout = Bundle.open(bundle).manifest.layout
        assert layout is not None
        row = layout.pack(name, load_adapter(shop.directory(name)))
        found = decoded(answer, row.size)
        if name in ("lora", "probe"):
            assert np.array_equal(found, row)
        np.testing.assert_array_max_ulp(found, row, 1)


def test_an_adapter_that_is_added(ask, small, workshop):
    names, inputs = ["rival", "alpha", "rival"], images(3)
    question = {
        "ask": "logits",
        "where": str(small),
        "images": encoded(inputs),
        "adapters": names,
        "added": {"rival": str(workshop.directory("rival"))},
    }
    (answer,) = ask(question)
    found = decoded(answer, 3, 7)
    assert_parity(workshop.mixed_truth(names, inputs, 7), found, "branches", "float32")


def test_what_does_not_fit_is_refused(ask, small, folded, workshop, tmp_path):
    other = load_adapter(workshop.directory("alpha"))
    config = json.loads((workshop.directory("alpha") / "adapter_config.json").read_text())
    foreign = tmp_path / "foreign"
    save_adapter(other, foreign)
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"base_sha256": "0" * 64}))
    damaged = copy_bundle(small, tmp_path / "damaged")
    flip_byte(damaged / "model.onnx.data")
    asked = {"ask": "logits", "images": encoded(images(1)), "adapters": ["alpha"]}
    found = ask(
        {**asked, "where": str(damaged)},
        {**asked, "where": str(small), "precision": "int8"},
        {**asked, "where": str(small), "adapters": ["nobody"]},
        {**asked, "where": str(small), "adapters": ["backbone"]},
        {**asked, "where": str(small), "added": {"x": str(workshop.directory("beta"))}},
        {**asked, "where": str(small), "added": {"x": str(foreign)}},
        {**asked, "where": str(folded), "added": {"x": str(workshop.directory("rival"))}},
        {**asked, "where": str(tmp_path)},
    )
    expected = (
        "DamagedError: .*model.onnx.data: expected the sha256",
        "expected a precision of float32, found int8",
        "expected an adapter of alpha, gamma, found nobody",
        "did not keep the backbone's own classifier",
        "changes .*, which this bundle has no branch for|needs rank",
        "trained on other weights",
        "its adapters are fixed",
        "hhdeploy.json: expected a file",
    )
    for answer, pattern in zip(found, expected, strict=True):
        assert isinstance(answer, dict) and "error" in answer, (pattern, answer)

        assert re.search(pattern, answer["error"]), answer["error"]
