"""A bundle's graphs for pictures: what a client without hhdeploy finds, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.bundle import Bundle, add_adapter, edit, remove_adapter
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.errors import ParityError
from hhdeploy.exporters.portable.pictures import picture_graph
from hhdeploy.exporting.bundles import export
from hhdeploy.preprocess import graph_file
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify, verify_against_torch
from hhdeploy.verifying.pictures import PHOTO
from tests.support import TINY_MODEL, assert_parity
from tests.workshop import copy_bundle

CENTER = graph_file("center", "bicubic")


def stated_by(path):
    """Name -> entry of the manifest on disk, as another language reads it."""
    told = json.loads((path / MANIFEST).read_text())
    return {"backbone": told["backbone"], **{a["name"]: a for a in told["adapters"]}}


def with_graph(path, graph):
    """The bundle with another graph in the place of the one that all use."""
    with edit(path) as change:
        change.store(CENTER, graph)
    return path


def test_a_client_makes_its_inputs_of_the_manifest_alone(branches):
    photo = Image.open(PHOTO).convert("RGB").crop((31, 7, 308, 200))
    manifest = Bundle.open(branches).manifest
    entries = stated_by(branches)
    assert {"alpha", "gamma", "headless"} < set(entries)
    assert entries["gamma"]["preprocess_graph"] != entries["alpha"]["preprocess_graph"]
    for name, entry in entries.items():
        told = entry["preprocess_graph"]
        feeds = {n: np.array(i["value"], i["dtype"]) for n, i in told["inputs"].items()}
        session = ort.InferenceSession(branches / told["file"], providers=["CPUExecutionProvider"])
        (images,) = session.run(["images"], {"image": np.asarray(photo), **feeds})
        adapter = None if name == "backbone" else name
        with open_session(branches, device="cpu", threads=1) as ours:
            expected = ours.run(ours.preprocess([photo], adapter=adapter), adapter)
            found = ours.run(images, adapter)
        own = manifest.backbone.classes if adapter is None else manifest.adapter(name).classes
        assert_parity(expected[:, :own], found[:, :own], "pictures", "float32")


def test_the_report_tells_levels_and_answers(branches):
    told = json.loads((branches / "parity.json").read_text())["pictures"]
    assert len({g["graph"] for g in told["graphs"]}) == 6
    assert {a["adapter"] for a in told["answers"]} == {
        "backbone", "alpha", "rival", "beta", "gamma", "headless",
    }  # fmt: skip
    assert all(a["passed"] and a["images"] == 2 for a in told["answers"])
    assert verify(branches).to_json()["pictures"] == told


def test_an_adapter_that_is_added_brings_numbers_and_no_graph(branches, workshop, tmp_path):
    path = copy_bundle(branches, tmp_path / "bundle")
    adapter = load_adapter(workshop.directory("rival"))
    transform = replace(workshop.backbone.facts.preprocess, crop_mode="border", crop_pct=0.7)
    other = replace(transform, interpolation="lanczos")
    for name, own in (("border", transform), ("lanczos", other)):
        save_adapter(
            replace(adapter, config=replace(adapter.config, preprocess=own)), tmp_path / name
        )
        add_adapter(path, name, tmp_path / name)
    entries = stated_by(path)
    assert entries["border"]["preprocess_graph"]["file"] == graph_file("border", "bicubic")
    assert entries["border"]["preprocess_graph"]["inputs"]["resize"]["value"] == [45, 45]
    assert "preprocess_graph" not in entries["lanczos"]
    assert entries["alpha"] == stated_by(branches)["alpha"]
    assert Bundle.open(path).manifest == Bundle.open(path).manifest
    told = Bundle.open(path).parity()["pictures"]["answers"]
    remove_adapter(path, "alpha")
    left = Bundle.open(path).parity()["pictures"]["answers"]
    assert left == [a for a in told if a["adapter"] != "alpha"] != told
    graphs = sorted(p.name for p in path.glob("preprocess.*"))
    assert graphs == sorted(p.name for p in branches.glob("preprocess.*"))
    report = verify_against_torch(path, checkpoint=workshop.checkpoint)
    judged = {a["adapter"] for a in report.pictures["answers"]}
    assert "border" in judged
    assert "lanczos" not in judged


def test_a_graph_that_computes_something_else_is_refused(small, tmp_path):
    path = with_graph(
        copy_bundle(small, tmp_path / "bundle"), picture_graph("center", "bilinear", 3)
    )
    with pytest.raises(ParityError, match=r"center\.bicubic\.[0-9a-f]{8}\.onnx.* of 255 levels"):
        verify(path)


def test_answers_are_compared_where_levels_are_not_off(small, tmp_path, monkeypatch):
    path = copy_bundle(small, tmp_path / "bundle")
    monkeypatch.setattr("hhdeploy.verifying.pictures.LEVELS", {"shrinks": 255, "grows": 255})
    with_graph(path, picture_graph("squash", "bilinear", 3))
    with pytest.raises(ParityError, match=r"pictures float32 .*adapter alpha"):
        verify(path)


def test_an_export_fails_where_a_graph_is_wrong(workshop, tmp_path, monkeypatch):
    wrong = picture_graph("squash", "bicubic", 3)
    monkeypatch.setattr("hhdeploy.exporters.portable.pictures.picture_graph", lambda *which: wrong)
    with pytest.raises(ParityError, match="levels"):
        export(
            TINY_MODEL, {"alpha": workshop.directory("alpha")}, tmp_path / "out", fold=True,
            checkpoint=workshop.checkpoint, cache=workshop.cache,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_graphs_for_pictures_passes(small, tmp_path):
    path = copy_bundle(small, tmp_path / "bundle")
    with edit(path) as change:
        files = {n: d for n, d in change.manifest.files.items() if not n.startswith("preprocess.")}
        change.manifest = replace(change.manifest, files=files)
    assert not any("preprocess_graph" in entry for entry in stated_by(path).values())
    assert verify(path).passed
    assert "pictures" not in verify(path).to_json()
