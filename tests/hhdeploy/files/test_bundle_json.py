"""Manifests that say what cannot be are refused when a bundle is opened."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hhdeploy.adapters.format import load_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, PARITY_FILE, write_manifest
from hhdeploy.errors import AdapterError, BundleError
from tests.broken_manifests import BROKEN, broken, first
from tests.workshop import copy_bundle


@pytest.fixture
def bundle(branches, tmp_path):
    return copy_bundle(branches, tmp_path / "bundle")


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_is_refused(branches, tmp_path, name):
    change, message = BROKEN[name]
    with pytest.raises(BundleError, match=rf"{MANIFEST}.*({message})"):
        Bundle.open(broken(branches, tmp_path / "bundle", change))


@pytest.mark.parametrize("strength", ["2", True, None])
def test_a_strength_that_is_no_number(branches, tmp_path, strength):
    path = broken(branches, tmp_path / "b", lambda c: first(c).update(strength=strength))
    with pytest.raises(BundleError, match=r"adapters\[0\]\.strength: expected a finite number"):
        Bundle.open(path)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_is_refused_wherever_it_stands(bundle, word):
    """Python's parser takes it; no other reader of the bundle does."""
    text = (bundle / MANIFEST).read_text().rstrip()
    (bundle / MANIFEST).write_text(f'{text[:-1]}, "mine": {{"loss": {word}}}}}')
    with pytest.raises(BundleError, match=rf"{MANIFEST} cannot be read: {word} is no number of"):
        Bundle.open(bundle)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_what_no_reader_takes_is_not_written(bundle, number):
    before = (bundle / MANIFEST).read_bytes()
    opened = Bundle.open(bundle)
    manifest = replace(opened.manifest, extra={"mine": {"loss": number}})
    said = re.compile("cannot be written: .* is no number of JSON")
    with pytest.raises(BundleError, match=said), opened.edit() as change:
        change.manifest = manifest
    with pytest.raises(BundleError, match=said):
        write_manifest(bundle, manifest)
    assert (bundle / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("classes", [1, 6, 8])
def test_all_columns_of_a_folded_graph_are_its_adapter_s(folded, tmp_path, classes):
    """The softmax over six of seven classes was an answer."""

    def change(content):
        first(content).update(classes=classes, class_names=None)

    with pytest.raises(BundleError, match=rf"classes: expected .*7, found {classes}"):
        Bundle.open(broken(folded, tmp_path / "bundle", change))


@pytest.mark.parametrize("key", ["out", "in", "rank"])
def test_a_size_of_a_branch_that_is_no_integer(branches, tmp_path, key):
    """48.0 equals 48 until it slices an array."""

    def change(content):
        branch = content["row"]["branches"][0]
        branch[key] = float(branch[key])

    with pytest.raises(BundleError, match=rf"row\.branches\[0\]\.{key}: expected a number"):
        Bundle.open(broken(branches, tmp_path / "bundle", change))


def test_a_bundle_and_an_adapter_in_each_other_s_place_are_told_apart(branches):
    adapter = next((branches / "adapters").iterdir())
    with pytest.raises(BundleError, match=r"It is an adapter's directory: export a bundle with it"):
        Bundle.open(adapter)
    with pytest.raises(AdapterError, match=r"This one is a bundle, which has its adapters in"):
        load_adapter(branches)


def test_a_file_in_a_bundle_s_place_leads_to_the_bundle(branches, tmp_path):
    for file in ("model.onnx", MANIFEST, "adapters/alpha/adapter_config.json"):
        assert (branches / file).is_file()
        with pytest.raises(BundleError, match=rf"is a file, .*Name that: {branches}$"):
            Bundle.open(branches / file)
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(
        BundleError, match=r"is a file, and a bundle is a directory with .*Make one"
    ):
        Bundle.open(tmp_path / "photo.jpg")


def test_a_key_twice_is_no_choice(bundle):
    text = (bundle / MANIFEST).read_text().rstrip()
    (bundle / MANIFEST).write_text(text[:-1] + ', "adapters": []}')
    with pytest.raises(BundleError, match="'adapters' is there twice"):
        Bundle.open(bundle)


def test_a_number_of_thousands_of_digits_gives_no_advice_of_python_s(branches, bundle):
    digits = b'{"version": ' + b"9" * 5000 + b"}"
    (bundle / MANIFEST).write_bytes(digits)
    with pytest.raises(BundleError, match="cannot be read: a number has thousands of digits"):
        Bundle.open(bundle)
    held = replace(Bundle.open(branches), held={PARITY_FILE: digits})
    with pytest.raises(BundleError, match="not valid JSON: a number has thousands of digits"):
        held.parity()


def test_nested_without_end(bundle):
    (bundle / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"[]"], ids=["brackets", "cut", "list"])
def test_another_file_that_is_no_object(branches, text):
    """Its hash is right: whoever wrote the bundle wrote that."""
    bundle = replace(Bundle.open(branches), held={PARITY_FILE: text})
    with pytest.raises(BundleError, match=r"parity\.json.*Export the bundle again"):
        bundle.parity()
