"""Manifests that say what cannot be are refused when a bundle is opened."""

from __future__ import annotations

import json

import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.errors import BundleError
from tests.workshop import copy_bundle


@pytest.fixture
def bundle(branches, tmp_path):
    return copy_bundle(branches, tmp_path / "bundle")


def first(content):
    return content["adapters"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: first(c).update(class_names="abcdefg"), r"adapters\[0\]\.class_names: .*names"),
        (lambda c: first(c).update(class_names=["a"]), r"class_names: expected 7 names, found 1"),
        (lambda c: first(c).update(classes="7"), r"adapters\[0\]\.classes: .*found '7'"),
        (lambda c: first(c).update(classes=True), r"adapters\[0\]\.classes: .*found True"),
        (lambda c: first(c).update(row=c["adapters"][1]["row"]), "expected every row once"),
        (lambda c: first(c).update(row=0), r"adapters\[0\]\.row: expected 1 or more, or null"),
        (lambda c: first(c).update(name=c["adapters"][1]["name"]), "expected every name once"),
        (lambda c: first(c).update(verified="no"), "verified: expected true or false, found 'no'"),
        (lambda c: c.update(classes=3), "classes: expected at most the graph's 3, found 7"),
        (lambda c: c.update(adapters=[5]), r"adapters\[0\]: expected an object, found 5"),
        (lambda c: c.update(tensors=[]), "tensors: expected an object"),
        (lambda c: c["files"].update({"model.onnx": 5}), r"files\.model\.onnx: expected 64 hex"),
        (lambda c: c["files"].pop("model.onnx"), "graphs.float32: model.onnx is not among"),
        (lambda c: c["backbone"].update(sha256=None), r"backbone\.sha256: expected a text"),
        (lambda c: c["row"].update(dim=10**30), r"row\.dim: expected a number"),
        (lambda c: c["row"]["branches"].reverse(), r"row\.parts: expected those of row\.branches"),
        (lambda c: c.update(schema_version=True), "schema_version: expected at most"),
    ],
)
def test_what_cannot_be_is_refused(bundle, change, message):
    content = json.loads((bundle / MANIFEST).read_text())
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rf"{MANIFEST}.*{message}"):
        Bundle.open(bundle)


def test_a_key_twice_is_no_choice(bundle):
    text = (bundle / MANIFEST).read_text().rstrip()
    (bundle / MANIFEST).write_text(text[:-1] + ', "adapters": []}')
    with pytest.raises(BundleError, match="'adapters' is there twice"):
        Bundle.open(bundle)


def test_nested_without_end(bundle):
    (bundle / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle)
