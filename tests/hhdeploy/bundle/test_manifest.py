"""hhdeploy.json on disk: what earlier versions wrote is written again byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.manifest import (
    MANIFEST,
    AdapterEntry,
    Manifest,
    write_manifest,
)
from hhdeploy.choices import QUANTISED, TYPED
from hhdeploy.errors import BundleError
from hhdeploy.parity import PARITY
from hhdeploy.preprocess import Preprocess
from tests.workshop import copy_bundle

WITNESSES = Path(__file__).parents[2] / "witnesses"
WITNESS = WITNESSES / "v1"
WRITTEN = sorted(WITNESSES.glob(f"*/*/{MANIFEST}"), key=str)
ENGINE = {
    "file": "model.float16.tensorrt.sm89.engine",
    "backend": "tensorrt",
    "version": "10.13",
    "precision": "float16",
    "architectures": ["sm89"],
    "gpu": None,
    "batch": [1, 8, 32],
    "slots": None,
    "bank_sha256": "ba" * 32,
    "graph_sha256": "cd" * 32,
    "optimization_level": None,
    "build_seconds": 2.5,
    "bytes": 7,
}


def content(name="branches", **changes):
    """The JSON form of a witness's manifest."""
    return {**json.loads((WITNESSES / "v1" / name / MANIFEST).read_text()), **changes}


@pytest.mark.parametrize("owner", ["backbone", "adapter"])
def test_what_a_transform_would_not_do_is_refused(tmp_path, owner):
    """It was left out in silence, and dropped by the next change."""

    def told(content):
        entry = content["backbone"] if owner == "backbone" else content["adapters"][0]
        entry["preprocess"]["pad"] = 4

    with pytest.raises(BundleError, match=r"hhdeploy\.json.*preprocess: expected keys .*'pad'"):
        Bundle.open(edited(tmp_path, told))


@pytest.mark.parametrize("file", WRITTEN, ids=lambda f: f.parent.name)
def test_it_is_written_as_it_was_read(file, tmp_path):
    write_manifest(tmp_path, Bundle.open(file.parent).manifest)
    assert (tmp_path / MANIFEST).read_bytes() == file.read_bytes()


def test_there_are_witnesses():
    assert {f.parent.name for f in WRITTEN} >= {"branches", "folded", "int8", "added"}


def test_engines_and_further_keys_of_the_backbone_survive():
    written = content(engines=[ENGINE])
    written["backbone"]["kind"] = "transformers"
    manifest = Manifest.from_json(written)
    assert json.dumps(manifest.to_json()) == json.dumps(written)


def test_it_is_typed():
    manifest = Manifest.from_json(content(engines=[ENGINE]))
    assert (manifest.backbone.classifier, manifest.backbone.dim) == ("head", 48)
    assert manifest.backbone.preprocess.input_size == manifest.input_size == (3, 32, 32)
    assert isinstance(manifest.backbone.preprocess, Preprocess)
    (engine,) = manifest.engines
    assert (engine.batch, engine.architectures) == ((1, 8, 32), ("sm89",))


@pytest.mark.parametrize("key", ["model", "args", "sha256", "classifier", "dim", "preprocess"])
def test_a_backbone_that_lacks_something_is_damage(key, tmp_path):
    damaged = content()
    del damaged["backbone"][key]
    (tmp_path / MANIFEST).write_text(json.dumps(damaged))
    with pytest.raises(BundleError, match=rf"damaged .*{key}"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("damage", [{"batch": 3}, {"unknown": 1}])
def test_an_engine_that_cannot_be_is_damage(damage, tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(content(engines=[{**ENGINE, **damage}])))
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("classes", "given", "meant", "written"),
    [
        (7, None, CLASSES, None),
        (7, CLASSES, CLASSES, None),
        (1, None, VALUES, None),
        (1, LABELS, LABELS, LABELS),
        (3, VALUES, VALUES, VALUES),
    ],
)
def test_an_entry_says_what_its_numbers_mean_where_that_is_not_clear(
    classes, given, meant, written
):
    (entry, *_) = content()["adapters"]
    found = AdapterEntry.from_json({**entry, "classes": classes, "problem_type": given})
    assert found.problem_type == meant
    assert found.to_json().get("problem_type") == written
    assert AdapterEntry.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="ranking"):
        AdapterEntry.from_json({**entry, "problem_type": "ranking"})


def test_every_precision_has_its_bounds():
    bounds = {kind: {p for stage, p in PARITY if stage == kind} for kind in ("twin", "quantised")}
    assert bounds == {"twin": set(TYPED), "quantised": set(QUANTISED)}


# --- what is edited by hand -----------------------------------------------------------------------


def edited(tmp_path, change):
    path = copy_bundle(WITNESS / "branches", tmp_path / "edited")
    content = json.loads((path / MANIFEST).read_text())
    change(content)
    (path / MANIFEST).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("classes", [1, 3, 6])
def test_fewer_classes_than_a_row_has_are_refused(tmp_path, classes):
    """The softmax over a part of them would be another answer."""

    def fewer(content):
        content["adapters"][0].update(classes=classes, class_names=None)

    bundle = Bundle.open(edited(tmp_path, fewer))
    with pytest.raises(BundleError, match=f"'alpha': expected 7 classes, .*found {classes}"):
        bundle.bank()


def test_weights_without_a_hash_are_refused(tmp_path):
    bundle = Bundle.open(edited(tmp_path, lambda c: c["files"].pop("model.onnx.data")))
    with pytest.raises(BundleError, match=r"expected the sha256 of model\.onnx\.data, found none"):
        bundle.graph("float32")


def test_keys_that_are_not_known_are_kept(tmp_path):
    """Of another tool, of the bundle's owner, of a later version."""

    def told(content):
        content["notes"] = {"by": "me"}
        content["adapters"][0]["owner"] = "me"
        content["row"]["note"] = content["row"]["branches"][1]["note"] = "mine"
        content["tensors"]["masks"] = ["batch", 4]

    path = edited(tmp_path, told)
    add_adapter(path, "guest", WITNESS / "rival")
    remove_adapter(path, "gamma")
    content = json.loads((path / MANIFEST).read_text())
    assert content["notes"] == {"by": "me"}
    assert [entry.get("owner") for entry in content["adapters"]] == ["me", None]
    branches = [branch.get("note") for branch in content["row"]["branches"]]
    assert (content["row"]["note"], branches[:3]) == ("mine", [None, "mine", None])
    assert content["tensors"]["masks"] == ["batch", 4]


def test_a_size_that_is_not_that_of_the_row_s_parts_is_refused(tmp_path):
    """JavaScript and C++ go by it; Python wrote the right one again in silence."""
    path = edited(tmp_path, lambda content: content["row"].update(size=5))
    with pytest.raises(BundleError, match=r"row\.size: expected \d+, of its parts, found 5"):
        Bundle.open(path)


@pytest.mark.parametrize("file", WRITTEN, ids=lambda f: f.parent.name)
def test_every_key_of_a_manifest_is_known(file):
    manifest = Bundle.open(file.parent).manifest
    for known in (manifest, Manifest.from_json(manifest.to_json())):
        assert not known.extra
        assert not known.extra_tensors
        rows = () if known.layout is None else (known.layout, *known.layout.branches)
        assert not any(row.unknown for row in rows)
        assert not any(entry.extra for entry in known.adapters)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("images", ["batch", 3, 16, 16]),
        ("images", None),
        ("adapter_ids", ["batch", 2]),
        ("adapter_ids", None),
        ("adapter_bank", ["slots", 7]),
        ("logits", None),
    ],
)
def test_tensors_that_the_rest_has_otherwise_are_refused(tmp_path, name, shape):
    """What a client that goes by them would feed; Python wrote the right ones again in silence."""

    def told(content):
        content["tensors"].update({name: shape})
        if shape is None:
            del content["tensors"][name]

    with pytest.raises(BundleError, match=rf"tensors: expected .*{name}.*, found"):
        Bundle.open(edited(tmp_path, told))
