"""The JavaScript package in Node, on both builds of ONNX Runtime: it finds what Python finds."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hhdeploy.adapters import config as adapter_config
from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.bundle import Bundle, manifest
from hhdeploy.bundle.answers import answers_of
from hhdeploy.files.tensors import read_tensors
from hhdeploy.parity import LABELS, LEVELS
from hhdeploy.preprocess import Preprocess
from hhdeploy.runtime import open_session
from tests.broken_manifests import broken
from tests.browser import CHROMIUM, PATIENCE_MS, WHY_NOT
from tests.docs.pages import blocks
from tests.js.conftest import (
    PACKAGE,
    decoded,
    encoded,
    sent,
)
from tests.quantised import INT8, int8_with_pictures
from tests.support import assert_caught, assert_parity, images
from tests.workshop import ROOT, copy_bundle, flip_byte, run_command

PHOTO = ROOT / "hhdeploy" / "verifying" / "photo.jpg"
# Of a picture: columns and rows of the photograph that it is.
PARTS = ((0, 0, 451, 300), (100, 20, 231, 299), (37, 11, 66, 64))


def pictures() -> list[Image.Image]:
    with Image.open(PHOTO) as photo:
        return [photo.convert("RGB").crop(box) for box in PARTS]


def assert_levels(transform: Preprocess, picture: Image.Image, image) -> None:
    """``image`` is what the Python transform makes of a picture, within the table of levels."""
    std = np.asarray(transform.std, np.float32)[:, None, None]
    off = np.abs(image - transform(picture)) * std * 255
    width, height = transform.resized(*picture.size)
    way = "grows" if width > picture.width or height > picture.height else "shrinks"
    assert round(float(off.max())) <= LEVELS[way]


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
            entries = [session.entry(name) for name in names]
            transforms = [session.bundle.manifest.preprocess_of(entry) for entry in entries]
            inputs = [decoded(i, *t.input_size) for i, t in zip(seen, transforms, strict=True)]
            logits = session.run(np.stack(inputs), names)
        for transform, picture, image in zip(transforms, taken, inputs, strict=True):
            assert_levels(transform, picture, image)
        for entry, row, others in zip(entries, logits, found, strict=True):
            answers = answers_of(row, entry, entry.classes)
            assert [(a.label, a.positive, a.index) for a in answers] == [
                (a["label"], a["positive"], a["index"]) for a in others
            ]
            scores = np.asarray([a["score"] for a in others], np.float32)
            right = np.asarray([a.score for a in answers], np.float32)
            assert_parity(right, scores, "branches", "float32")


def test_int8(ask):
    """As the version that wrote the bundle answered."""
    recorded, _ = read_tensors(INT8.with_suffix(".safetensors"), AssertionError)
    batch = recorded["images"]
    question = {"ask": "logits", "where": str(INT8), "images": encoded(batch), "precision": "int8"}
    names = ("alpha", "gamma")
    answers = ask(*({**question, "adapters": [name] * len(batch)} for name in names))
    with open_session(INT8, device="cpu", precision="int8", threads=1) as session:
        here = {name: session.run(batch, [name] * len(batch)) for name in names}
    for name, answer in zip(names, answers, strict=True):
        logits = recorded[f"int8/{name}"]
        found = decoded(answer, *logits.shape)
        assert_parity(logits, found, "quantised", "int8")
        own = np.isfinite(logits)

        def far(known, found=found, own=own):
            return float(np.abs(found[own] - known[:, : own.shape[1]][own]).max())

        # It was recorded on a processor without VNNI, whose sums of 8-bit products saturate; one
        # with VNNI answers otherwise, here as there.
        off = min(far(logits), far(here[name]))
        assert off < far(recorded[f"float32/{name}"]), "another graph's"


def test_the_readme_s_lines_for_node(dist, tmp_path):
    """In a folder with both packages and a bundle in INT8; `data` are a picture's own."""
    modules, (*_, picture) = tmp_path / "node_modules", pictures()
    shutil.copytree(dist, modules / "hhdeploy" / "dist")
    shutil.copy(PACKAGE / "package.json", modules / "hhdeploy")
    (modules / "onnxruntime-node").symlink_to(PACKAGE / "node_modules" / "onnxruntime-node")
    tasks = int8_with_pictures(tmp_path / "tasks")
    (lines,) = (b.text for b in blocks("js/README.md") if "hhdeploy/node" in b.text)
    given = f"{{ width: {picture.width}, height: {picture.height} }}"
    (tmp_path / "ask.mjs").write_text(
        f"const {{ width, height }} = {given};\n"
        f"const data = new Uint8Array({list(np.asarray(picture).tobytes())});\n"
        f"{lines.replace('animals', 'alpha')}\n"
        "console.log(JSON.stringify(answers));\n"
    )
    done = run_command(["node", str(tmp_path / "ask.mjs")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open_session(tasks, device="cpu", precision="int8", threads=1) as session:
        (right,) = session.classify([picture], ["alpha"])
    found = json.loads(done.stdout)
    assert {a["label"] for a in found} == {a.label for a in right}
    assert (found[0]["label"], found[0]["index"]) == (right[0].label, right[0].index)


def test_int8_asks_for_kernels_that_do_not_overflow(ask):
    """As Python does; with what the user says before it."""
    key, question = "x64quantprecision", {"ask": "settings", "where": str(INT8)}
    told = ask(
        {**question, "precision": "int8"},
        {**question, "precision": "float32"},
        {**question, "precision": "int8", "session": {"extra": {"session": {key: "0"}}}},
        {**question, "precision": "int8", "session": {"extra": {"optimization": {"x": "y"}}}},
    )
    assert told == [
        {"session": {key: "1"}},
        None,
        {"session": {key: "0"}},
        {"optimization": {"x": "y"}, "session": {key: "1"}},
    ]


# A page's whole code; `window.answer` is what it found. Beside it the package's own example.
PAGE = """<!doctype html><script type="importmap">
{"imports": {"onnxruntime-web": "./ort/ort.wasm.bundle.min.mjs", "hhdeploy": "./dist/index.js"}}
</script><script type="module">
import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { decodePicture, fromUrl, openBundle } from "./dist/index.js";
const files = [];
const bundle = await openBundle(fromUrl("./bundle", { progress: (file) => files.push(file) }), ort);
const read = async (name) => decodePicture(await (await fetch(name)).blob());
const seen = {};
for (const kind of ["png", "jpeg", "webp"]) {
  const { data, ...rest } = await read(`picture.${kind}`);
  seen[kind] = { data: Array.from(data), ...rest };
}
const picture = await read("picture.png");
const [answers] = await bundle.classify([picture], "alpha");
const image = Array.from(await bundle.preprocess(picture, "alpha"));
window.answer = { answers, image, files: [...new Set(files)], seen };
</script><script type="module">
const file = await (await fetch("picture.png")).blob();
%s
window.example = true;
</script>"""


def named_as_the_example(content):
    for entry, name in zip(content["adapters"], ("animals", "weather"), strict=False):
        entry["name"] = name


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_a_browser_decodes_pictures_and_answers(browser, dist, branches, served, tmp_path):
    for name, place in (
        ("dist", dist),
        ("bundle", branches),
        ("ort", PACKAGE / "node_modules" / "onnxruntime-web" / "dist"),
    ):
        (tmp_path / name).symlink_to(place)
    (lines,) = (b.text for b in blocks("js/README.md") if 'from "hhdeploy"' in b.text)
    (tmp_path / "index.html").write_text(PAGE % lines)
    broken(branches, tmp_path / "tasks", named_as_the_example)
    exif = Image.Exif()
    exif[0x0112] = 6  # its right side is up: a quarter turn is missing
    stored = pictures()[1]
    for kind, options in (("png", {}), ("jpeg", {"quality": 100}), ("webp", {"lossless": True})):
        stored.save(tmp_path / f"picture.{kind}", exif=exif, **options)
    said: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.goto(served(tmp_path))
        try:
            page.wait_for_function("window.answer && window.example", timeout=PATIENCE_MS)
        except Exception as error:
            raise AssertionError(said) from error
        answer = page.evaluate("window.answer")
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    for kind, seen in answer["seen"].items():
        assert seen["orientation"] == 6
        assert (seen["width"], seen["height"]) == stored.size
        pixels = np.asarray(seen["data"], np.int16).reshape(stored.height, stored.width, 4)
        off = np.abs(pixels[..., :3] - np.asarray(stored, np.int16))
        assert off.mean() < 1 if kind == "jpeg" else not off.any(), kind
    assert {"hhdeploy.json", "model.onnx", "bank.safetensors"} <= set(answer["files"])
    with open_session(branches, device="cpu", threads=1) as session:
        entry = session.entry("alpha")
        image = np.asarray(answer["image"], np.float32).reshape(entry.preprocess.input_size)
        right = answers_of(session.run(image[None], "alpha")[0], entry, entry.classes)
        ((other, *_),) = session.classify([upright], ["rival"])
    ((score,),) = [
        found
        for line in said
        if (found := re.findall(rf"^{right[0].label} ([\d.]+) {other.label}$", line))
    ]
    assert float(score) == answer["answers"][0]["score"]
    assert_levels(entry.preprocess, upright, image)
    assert [a.label for a in right] == [a["label"] for a in answer["answers"]]
    scores = np.asarray([a["score"] for a in answer["answers"]], np.float32)
    assert_parity(np.asarray([a.score for a in right], np.float32), scores, "branches", "float32")


# Of adapters that are added. 255 * 0.3 and 255 * 0.1 are halves, which Python rounds to even.
OWN = Preprocess((3, 32, 32), (0.3, 0.1, 0.5), (0.5, 0.25, 0.5))
TRANSFORMS = {
    "center": OWN,
    "squash": replace(OWN, crop_mode="squash", interpolation="bilinear", crop_pct=0.93),
    "border": replace(OWN, crop_mode="border", crop_pct=1.1),
}


@pytest.fixture
def preprocessing(workshop, tmp_path):
    """An adapter with a preprocessing of its own, in a directory: ``make(name, transform)``."""
    rival = load_adapter(workshop.directory("rival"))

    def make(name: str, transform: Preprocess) -> Path:
        config = replace(rival.config, preprocess=transform)
        save_adapter(replace(rival, config=config), tmp_path / name)
        return tmp_path / name

    return make


def test_an_added_adapter_preprocesses_in_its_own_way(ask, small, preprocessing):
    added = {name: str(preprocessing(name, each)) for name, each in TRANSFORMS.items()}
    # What a file leaves out is as in Python: CENTER's own numbers.
    shortest = preprocessing("shortest", TRANSFORMS["center"]) / "adapter_config.json"
    content = json.loads(shortest.read_text())
    for key in ("interpolation", "crop_pct", "crop_mode"):
        del content["preprocess"][key]
    shortest.write_text(json.dumps(content))
    added["shortest"] = str(shortest.parent)
    added["lanczos"] = str(preprocessing("lanczos", replace(OWN, interpolation="lanczos")))
    where = {"where": str(small), "added": added}
    taken, names = pictures(), list(TRANSFORMS)
    seen, none, refused, *graphs = ask(
        {"ask": "images", **where, "pictures": sent(taken), "adapters": names},
        {"ask": "graph", **where, "adapter": "lanczos"},
        {"ask": "images", **where, "pictures": sent(taken[:1]), "adapters": ["lanczos"]},
        *({"ask": "graph", **where, "adapter": name} for name in (*names, "shortest")),
    )
    bundle = Bundle.open(small).manifest
    own = [*TRANSFORMS.values(), TRANSFORMS["center"]]
    for transform, graph in zip(own, graphs, strict=True):
        assert graph["file"] == bundle.named(str(transform.graph_file))
        told = {name: (i["dtype"], i["value"]) for name, i in graph["inputs"].items()}
        assert told == transform.graph_inputs
    for transform, picture, image in zip(own, taken, seen, strict=False):
        assert_levels(transform, picture, decoded(image, *transform.input_size))
    assert none is None
    assert "no graph that preprocesses pictures" in refused["error"]


def test_the_package_reads_what_python_writes():
    """Numbers that both have."""
    for file, newest in (
        ("config", adapter_config.SCHEMA_VERSION),
        ("manifest", manifest.SCHEMA_VERSION),
    ):
        text = (PACKAGE / "src" / f"{file}.ts").read_text()
        assert f"const NEWEST_SCHEMA = {newest};" in text
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    package = json.loads((PACKAGE / "package.json").read_text())
    assert package["version"] == version[1]
    lock = json.loads((PACKAGE / "package-lock.json").read_text())
    assert lock["packages"][""]["version"] == package["version"]


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


def test_an_added_adapter_without_a_classifier_means_what_the_backbone_s_does(
    ask, branches, workshop, tmp_path
):
    bundle, names = copy_bundle(branches, tmp_path / "bundle"), ["a", "b", "c", "d", "e"]
    content = json.loads((bundle / "hhdeploy.json").read_text())
    content["backbone"] |= {"class_names": names, "problem_type": LABELS}
    (bundle / "hhdeploy.json").write_text(json.dumps(content))
    question = {
        "ask": "classify",
        "where": str(bundle),
        "pictures": sent(pictures()[:1]),
        "adapters": ["later"],
        "added": {"later": str(workshop.directory("headless"))},
    }
    ((answers,),) = ask(question)
    assert sorted(answer["label"] for answer in answers) == names
    assert [a["positive"] for a in answers] == [a["score"] >= 0.5 for a in answers]
    assert abs(sum(answer["score"] for answer in answers) - 1) > 0.01


def test_a_bundle_that_changes_while_it_is_opened_is_read_again(ask, small, branches):
    """Its first manifest is of files that are gone."""
    x = images(1)
    question = {"ask": "logits", "where": str(small), "images": encoded(x), "adapters": ["alpha"]}
    (found,) = ask({**question, "before": str(branches)})
    logits = logits_of(small, x, ["alpha"])
    assert_parity(logits, decoded(found, *logits.shape), "branches", "float32")


def test_a_graph_that_could_not_be_read_is_read_again(ask, small):
    told = Bundle.open(small).manifest
    failing = told.named(str(told.backbone.preprocess.graph_file))
    question = {"where": str(small), "pictures": sent(pictures()[:1]), "adapters": "alpha"}
    (found,) = ask({"ask": "again", **question, "failing": failing})
    assert found == [f"{failing}: planted", 1]


def test_what_does_not_fit_is_refused(ask, small, folded, workshop, tmp_path):
    other = load_adapter(workshop.directory("alpha"))
    config = json.loads((workshop.directory("alpha") / "adapter_config.json").read_text())
    foreign = tmp_path / "foreign"
    save_adapter(other, foreign)
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"base_sha256": "0" * 64}))
    large = tmp_path / "large"
    save_adapter(other, large)
    resized = {"preprocess": OWN.to_json() | {"input_size": [3, 40, 40]}, "base_model_args": {}}
    (large / "adapter_config.json").write_text(json.dumps(config | resized))
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
        {**asked, "where": str(small), "added": {"x": str(large)}},
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
        r"preprocess.input_size: expected the backbone's \[3,32,32\], found \[3,40,40\]",
        "its adapters are fixed",
        "hhdeploy.json: expected a file",
    )
    for answer, pattern in zip(found, expected, strict=True):
        assert isinstance(answer, dict) and "error" in answer, (pattern, answer)
        assert re.search(pattern, answer["error"]), answer["error"]
