"""Manifests that cannot be right: JavaScript refuses what Python refuses."""

from __future__ import annotations

import json
import os
import re

import pytest
from PIL import Image

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST
from hhdeploy.errors import BundleError
from hhdeploy.runtime import open_session
from tests.broken_manifests import (
    BROKEN,
    NO_BANK,
    NO_JSON,
    OF_FOLDED,
    OF_OTHER_GRAPHS,
    OF_OTHER_PICTURES,
    OF_OTHER_ROWS,
    broken,
    exchange_rows,
    first,
    graph_inputs,
    rewritten,
    whole,
    with_nan_for_a_head,
)
from tests.js.conftest import encoded, sent
from tests.support import images
from tests.workshop import copy_bundle


def asked(bundle):
    return {
        "ask": "logits",
        "where": str(bundle),
        "images": encoded(images(1)),
        "adapters": ["alpha"],
    }


def test_what_python_refuses_javascript_refuses(ask, branches, tmp_path):
    all_of_them = BROKEN | OF_OTHER_ROWS | OF_OTHER_PICTURES | OF_OTHER_GRAPHS
    bundles = [broken(branches, tmp_path / n, change) for n, (change, _) in all_of_them.items()]
    for (name, (_, message)), said in zip(
        all_of_them.items(), ask(*map(asked, bundles)), strict=True
    ):
        assert "error" in said, name
        assert re.search(rf"{MANIFEST}.*({message})", said["error"]), (name, said)


def test_a_graph_whose_shapes_the_runtime_does_not_tell(ask, branches, tmp_path):
    """As ONNX Runtime before 1.22: the names are known, and the logits when there are some."""
    bundles = [broken(branches, tmp_path / n, c) for n, (c, _) in OF_OTHER_GRAPHS.items()]
    said = ask(*(asked(bundle) | {"untold": True} for bundle in (*bundles, branches)))
    assert isinstance(said.pop(), str)
    for name, answer in zip(OF_OTHER_GRAPHS, said, strict=True):
        assert re.search("expected .*(of 12 classes|adapter_bank|features)", answer["error"]), name


def test_a_key_that_is_there_twice(ask, branches, tmp_path):
    """Of nested objects each has its own keys; texts may hold what looks like one."""
    bundle = broken(branches, tmp_path / "bundle", lambda c: c.update(said='{"kind": ["\\\\"'))
    ((fine),) = ask(asked(bundle))
    assert isinstance(fine, str), fine
    file = bundle / MANIFEST
    text = file.read_text()
    file.write_text(text.replace('"verified": true', '"verified": false, "verified": true', 1))
    (said,) = ask(asked(bundle))
    assert re.search(rf'{MANIFEST}.*"verified" is there twice', said["error"])
    with pytest.raises(BundleError, match="'verified' is there twice"):
        open_session(bundle)


def test_what_is_no_json_is_refused(ask, branches, tmp_path):
    bundles = [rewritten(branches, tmp_path / n, MANIFEST, edit) for n, edit in NO_JSON.items()]
    for name, bundle, said in zip(NO_JSON, bundles, ask(*map(asked, bundles)), strict=True):
        assert re.search(rf"HhdeployError: .*{MANIFEST}: expected a bundle's", said["error"]), name
        assert said["error"].count("Error: ") == 1, said  # in a sentence of ours, not its own
        with pytest.raises(BundleError, match=f"{MANIFEST} cannot be read"):
            open_session(bundle)


def test_what_is_no_bank_is_refused(ask, branches, tmp_path):
    bundles = [rewritten(branches, tmp_path / n, BANK_FILE, edit) for n, edit in NO_BANK.items()]
    for name, bundle, said in zip(NO_BANK, bundles, ask(*map(asked, bundles)), strict=True):
        assert re.search(f"HhdeployError: .*{BANK_FILE}: ", said["error"]), name
        with pytest.raises(BundleError, match=BANK_FILE):
            open_session(bundle)


def test_a_row_that_does_not_say_whose_its_head_is(ask, branches, tmp_path):
    bundle = rewritten(branches, tmp_path / "bundle", BANK_FILE, with_nan_for_a_head)
    (said,) = ask(asked(bundle))
    message = "adapter 'alpha': expected a head.own of 0 or 1 in its row, found nan"
    assert message.replace("'", "") in said["error"].replace("NaN", "nan")
    with pytest.raises(BundleError, match=message):
        open_session(bundle)


def test_what_a_folded_bundle_cannot_be(ask, folded, tmp_path):
    bundles = [broken(folded, tmp_path / name, change) for name, (change, _) in OF_FOLDED.items()]
    for bundle, said in zip(bundles, ask(*map(asked, bundles)), strict=True):
        message = OF_FOLDED[bundle.name][1]
        assert re.search(rf"{MANIFEST}: .*({message})", said["error"]), said
        with pytest.raises(BundleError, match=message):
            Bundle.open(bundle)


def test_names_that_every_object_has(ask, branches, tmp_path):
    """In JavaScript: of an adapter one is as good as another, of anything else it is none."""

    def rename(content):
        first(content)["name"] = "__proto__"

    def number(content):
        graph_inputs(content)["__proto__"] = {}

    renamed = broken(branches, tmp_path / "renamed", rename)
    names = ["__proto__", "constructor", "alpha"]
    taken, *refused = ask(*(asked(renamed) | {"adapters": [name]} for name in names))
    assert isinstance(taken, str)
    for name, said in zip(names[1:], refused, strict=True):
        assert "expected an adapter of __proto__, rival" in said["error"], name
    for precision in ("constructor", "__proto__"):
        (said,) = ask(asked(branches) | {"precision": precision})
        assert f"expected a precision of float32, found {precision}." in said["error"]
    (said,) = ask(asked(broken(branches, tmp_path / "number", number)))
    assert "preprocess_graph.inputs.__proto__: expected undefined" in said["error"]


@pytest.mark.parametrize("runtime", ["node", "web"])
@pytest.mark.parametrize("content", [b"garbage", b""], ids=["garbage", "empty"])
def test_a_graph_that_is_none(ask, served, branches, tmp_path, runtime, content):
    """Its digest is right; the runtime's own error, of no class that a caller knows, came up."""
    bundle = rewritten(branches, tmp_path / "bundle", "model.onnx", lambda _: content)
    where = served(tmp_path) + "bundle" if runtime == "web" else str(bundle)
    (said,) = ask(asked(bundle) | {"where": where, "runtime": runtime})
    assert re.search(
        "HhdeployError: .*model.onnx: expected a graph that the runtime can open: .*export the",
        said["error"],
    )


@pytest.mark.parametrize("source", ["model.onnx", "README.md"])
def test_a_graph_of_pictures_that_is_none(ask, branches, tmp_path, source):
    """Whole models answered of feeds that they have not."""
    content = (branches / source).read_bytes()
    file = "preprocess.center.bicubic.onnx"
    bundle = rewritten(branches, tmp_path / "bundle", file, lambda _: content)
    pictures = sent([Image.new("RGB", (40, 40))])
    (said,) = ask({**asked(bundle), "ask": "classify", "pictures": pictures})
    assert re.search(f"HhdeployError: .*{file}: expected a graph that", said["error"])


def test_all_that_a_manifest_may_say(ask, branches, tmp_path):
    bundle = broken(branches, tmp_path / "bundle", whole)
    assert ask(asked(bundle)) == ask(asked(branches))
    assert Bundle.open(bundle).manifest.engines


@pytest.mark.parametrize("which", ["branches", "heads", "folded", "constant"])
def test_as_they_are_they_are_taken(request, ask, which):
    bundle = request.getfixturevalue(which)
    ((said),) = ask(asked(bundle) | {"adapters": [_first_of(bundle)]})
    assert isinstance(said, str), said


def _first_of(bundle):
    return first(json.loads((bundle / MANIFEST).read_text()))["name"]


def test_shapes_of_images_are_those_of_the_transforms(ask, branches, tmp_path):
    size = ["batch", 3, 32, 64]
    bundle = broken(branches, tmp_path / "bundle", lambda c: c["tensors"].update(images=size))
    (said,) = ask(asked(bundle))
    assert (
        f"{MANIFEST}: tensors.images: expected [batch,3,32,32], as the backbone's" in said["error"]
    )


def test_rows_of_a_bank_that_is_baked_in(ask, constant, tmp_path):
    """Whose numbers are asked for all the same."""
    bundle = broken(constant, tmp_path / "bundle", exchange_rows)
    (said,) = ask(asked(bundle))
    message = "gamma'?: expected 7 classes, which its row has, found 3"
    assert re.search(message, said["error"])
    with pytest.raises(BundleError, match=message):
        open_session(bundle)


def test_a_row_past_the_bank(ask, branches, tmp_path):
    """Of zeros, and so the bare backbone's."""
    bundle = broken(branches, tmp_path / "bundle", lambda c: first(c).update(row=99))
    (said,) = ask(asked(bundle))
    assert re.search(r"adapter alpha: expected a row from 1 to \d+, found 99", said["error"])
    with pytest.raises(BundleError, match="adapter 'alpha': expected a row from 1 to"):
        open_session(bundle)


def test_weights_without_a_hash(ask, branches, tmp_path):
    """The runtime would open them by itself, whatever they are."""
    bundle = broken(branches, tmp_path / "bundle", lambda c: c["files"].pop("model.onnx.data"))
    (said,) = ask(asked(bundle))
    message = rf"{MANIFEST}: files: expected the sha256 of model\.onnx\.data, found none"
    assert re.search(message, said["error"])
    with pytest.raises(BundleError, match=message):
        open_session(bundle)


@pytest.mark.parametrize("file", [MANIFEST, "bank.safetensors"])
def test_a_pipe_is_not_waited_for(ask, branches, tmp_path, file):
    bundle = copy_bundle(branches, tmp_path / "bundle")
    (bundle / file).unlink()
    os.mkfifo(bundle / file)
    (said,) = ask(asked(bundle))
    assert f"{file}: expected a file: found something else" in said["error"]
