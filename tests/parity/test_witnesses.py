"""Bundles that earlier versions wrote are opened, verified, run, served and edited by this one."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.errors import AdapterError
from hhdeploy.exporting.bundles import export
from hhdeploy.files.tensors import read_tensors
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify, verify_against_torch
from tests.runtime.serving.servers import running_server
from tests.support import TINY_MODEL, assert_caught, assert_parity
from tests.workshop import contents, copy_bundle

WITNESSES = Path(__file__).parents[1] / "witnesses"
FORMATS = sorted(p.name for p in WITNESSES.iterdir() if (p / "branches").is_dir())
NAMES = ("folded", "branches", "int8", "added")
# The second schema: rows with s_in, s_out and db; values of whole parameters, folded.
FOLDED = ("folded", "values")
ALL = [*(("v1", name) for name in NAMES), ("v2", "scaled"), ("v2", "values")]


@pytest.fixture(params=FORMATS)
def format_(request) -> Path:
    """The directory of one format."""
    return WITNESSES / request.param


def logits(format_, name):
    """Images, and what the version that wrote the bundle answered: PRECISION/ADAPTER -> logits."""
    tensors, _ = read_tensors(format_ / f"{name}.safetensors", AssertionError)
    return tensors.pop("images"), tensors


def stage_of(name, precision):
    if precision != "float32":
        return "quantised", precision
    return ("folded" if name in FOLDED else "branches"), precision


def nodes_of(path):
    """The nodes of a graph in their order, and its constants' names and shapes."""
    graph = onnx.load(path, load_external_data=False).graph
    nodes = [
        (n.name, n.op_type, *n.input, "->", *n.output, *sorted(str(a) for a in n.attribute))
        for n in graph.node
    ]
    return nodes, [(i.name, tuple(i.dims), i.data_type) for i in graph.initializer]


def test_who_needs_no_new_part_gets_the_graph_of_then_node_for_node(workshop, tmp_path):
    """What was exported before s_in, s_out and db had room in a row, exported again."""
    old = WITNESSES / "v1" / "branches"
    adapters = {name: old / "adapters" / name for name in ("alpha", "gamma")}
    new = export(
        TINY_MODEL, adapters, tmp_path / "new", verify=False, cache=workshop.cache,
        checkpoint=WITNESSES / "v1" / "backbone.safetensors",
    )  # fmt: skip
    before = Bundle.open(old).manifest
    for package in ("torch", "timm", "onnx-ir", "onnxscript"):
        if new.manifest.versions[package] != before.versions[package]:
            pytest.skip(f"traced by another {package}: {new.manifest.versions[package]}")
    assert nodes_of(new.path / "model.onnx") == nodes_of(old / "model.onnx")
    assert new.manifest.layout.to_json() == before.layout.to_json()
    told = [json.loads((p / "hhdeploy.json").read_text()) for p in (new.path, old)]
    assert told[0]["row"] == told[1]["row"]
    assert told[0]["schema_version"] == told[1]["schema_version"] == 1


def test_there_are_witnesses():
    assert FORMATS[0] == "v1"
    folders = {
        (b.parent.name, b.name) for b in WITNESSES.glob("*/*") if (b / "hhdeploy.json").exists()
    }
    assert folders == set(ALL)
    told = {
        json.loads((WITNESSES / v / n / "hhdeploy.json").read_text())["schema_version"]
        for v, n in ALL
    }
    assert told == {1, 2}


@pytest.mark.parametrize(("version", "name"), ALL)
def test_it_opens_and_answers_as_it_did(version, name):
    format_ = WITNESSES / version
    before = contents(format_ / name)
    images, expected = logits(format_, name)
    bundle = Bundle.open(format_ / name)
    assert {key.partition("/")[0] for key in expected} == set(bundle.manifest.graphs)
    for key, known in expected.items():
        precision, _, adapter = key.partition("/")
        with open_session(bundle.path, device="cpu", precision=precision, threads=1) as session:
            found = session.run(images, None if name in FOLDED else adapter)
        assert_parity(known, found, *stage_of(name, precision))
    assert contents(format_ / name) == before


@pytest.mark.parametrize(("version", "name"), ALL)
def test_it_is_verified(version, name):
    format_ = WITNESSES / version
    report = verify(format_ / name)
    assert report.passed, report.explain_failures()
    verified = {a.name for a in Bundle.open(format_ / name).manifest.adapters if a.verified}
    assert {stage.adapter for stage in report.stages} == verified


@pytest.mark.parametrize(("version", "name"), ALL)
def test_against_torch_it_is_verified_whole(version, name, tmp_path):
    format_ = WITNESSES / version
    path = copy_bundle(format_ / name, tmp_path / "bundle")
    report = verify_against_torch(path, checkpoint=format_ / "backbone.safetensors")
    assert report.passed, report.explain_failures()
    assert all(a.verified for a in Bundle.open(path).manifest.adapters)
    assert verify(path).passed


@pytest.mark.parametrize("name", ["branches", "int8", "added"])
def test_it_is_edited(format_, name, tmp_path):
    path = copy_bundle(format_ / name, tmp_path / "bundle")
    images, expected = logits(format_, name)
    add_adapter(path, "guest", format_ / "rival")
    remove_adapter(path, "gamma")
    for precision in Bundle.open(path).manifest.graphs:
        with open_session(path, device="cpu", precision=precision, threads=1) as session:
            assert "gamma" not in session.adapters
            alpha, guest = session.run(images, "alpha"), session.run(images, "guest")
        assert_parity(expected[f"{precision}/alpha"], alpha, *stage_of(name, precision))
        rival = logits(format_, "added")[1]["float32/rival"]
        assert_parity(rival, guest, *stage_of(name, precision))
        assert_caught(rival, alpha, *stage_of(name, precision))
    assert verify(path).passed


def test_what_is_no_adapter_of_it_is_refused_still(format_, tmp_path):
    path = copy_bundle(format_ / "branches", tmp_path / "bundle")
    before = contents(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError):
        add_adapter(path, "guest", tmp_path / "empty")
    assert contents(path) == before


@pytest.mark.parametrize("name", NAMES)
def test_it_is_served(format_, name, tmp_path):
    images, expected = logits(format_, name)
    path = copy_bundle(format_ / name, tmp_path / "bundle")
    with running_server(path, tmp_path / "log", "--model-name", "old") as server:
        for key, known in expected.items():
            precision, _, adapter = key.partition("/")
            if precision == "float32":
                status, found = server.logits("old", adapter, images)
                assert status == 200, found
                own = known[:, : found.shape[1]]
                assert_parity(own, found, *stage_of(name, precision))
