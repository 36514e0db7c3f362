"""What a manifest says twice: a copy that was damaged is found, and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.hub import pull, push
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST
from hhdeploy.bundle.membership import check_copies
from hhdeploy.bundle.signing import sign
from hhdeploy.bundle.store import edit
from hhdeploy.errors import BundleError
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.verifying.bundles import verify
from tests.hhdeploy.bundle.test_signing import pair
from tests.workshop import copy_bundle

WITNESSES = Path(__file__).parents[2] / "witnesses"
WRITTEN = sorted((f.parent for f in WITNESSES.glob(f"*/*/{MANIFEST}")), key=str)


def changed(path, change):
    """A bundle whose manifest's content ``change`` was given."""
    content = json.loads((path / MANIFEST).read_text())
    change(content)
    (path / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    return path


def first(content):
    return content["adapters"][0]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_what_earlier_versions_wrote_agrees(path):
    check_copies(Bundle.open(path))


@pytest.mark.parametrize("which", ["branches", "small", "heads", "folded", "constant", "scaled"])
def test_an_export_agrees(which, request):
    check_copies(Bundle.open(request.getfixturevalue(which)))


def test_a_bundle_of_features_agrees(workshop, tmp_path):
    workshop.export(tmp_path / "bundle", ("alpha",), outputs=["features"])
    check_copies(Bundle.open(tmp_path / "bundle"))


DAMAGE = {
    "a class": (
        lambda c: first(c)["class_names"].__setitem__(2, "clasr 2"),
        r"class_names\[2\]: expected 'class 2', as adapters/alpha/adapter_config\.json says, found",
    ),
    "no names": (lambda c: first(c).update(class_names=None), r"class_names\[0\]: .* found None"),
    "a mean": (lambda c: first(c)["preprocess"]["mean"].__setitem__(1, 0.1), r"preprocess.mean\[1"),
    "a std": (lambda c: first(c)["preprocess"]["std"].__setitem__(0, 0.9), r"preprocess.std\[0\]"),
    "a filter": (
        lambda c: first(c)["preprocess"].update(interpolation="bilinear"),
        "preprocess.interpolation: expected 'bicubic'",
    ),
    "a crop": (lambda c: first(c)["preprocess"].update(crop_pct=0.8), "preprocess.crop_pct"),
    "a meaning": (
        lambda c: first(c).update(problem_type="multi_label_classification"), "problem_type: "
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["branches", "folded", "int8"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_s_entry_that_its_files_contradict(kind, damage, tmp_path):
    change, message = DAMAGE[damage]
    path = changed(copy_bundle(WITNESSES / "v1" / kind, tmp_path / "bundle"), change)
    with pytest.raises(BundleError, match=rf"hhdeploy\.json: adapter 'alpha': {message}"):
        Bundle.open(path).check_files()


def rows_exchanged(content):
    entries = {entry["name"]: entry for entry in content["adapters"]}
    one, other = entries["alpha"], entries["rival"]  # of as many classes
    one["row"], other["row"] = other["row"], one["row"]


def thirds_exchanged(content):
    sites = content["row"]["branches"][0]["sites"]
    sites[0], sites[1] = sites[1], sites[0]


@pytest.mark.parametrize(
    ("change", "row", "strength"),
    [
        (rows_exchanged, 3, "1"),
        (lambda c: first(c).update(strength=0.7), 1, "0.7"),
        (thirds_exchanged, 1, "1"),
        (lambda c: c["row"]["branches"][0]["sites"].__setitem__(0, "blocks.0.nowhere"), 1, "1"),
    ],
)
def test_a_row_that_holds_something_else(change, row, strength, tmp_path):
    path = changed(copy_bundle(WITNESSES / "v1" / "added", tmp_path / "bundle"), change)
    expected = rf"'alpha': expected it in row {row} of bank\.safetensors, at strength {strength}, "
    with pytest.raises(BundleError, match=expected):
        Bundle.open(path).check_files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["backbone"]["preprocess"]["std"].__setitem__(1, 0.25),
            r"backbone: preprocess_graph\.inputs\.std\.value\[1\]: expected 0\.25",
        ),
        (
            lambda c: first(c)["preprocess_graph"]["inputs"]["mean"]["value"].__setitem__(0, 0.1),
            r"adapter 'alpha': preprocess_graph\.inputs\.mean\.value\[0\]: .*, found 0\.1",
        ),
        (lambda c: first(c).update(preprocess_graph=7), "preprocess_graph.*found None"),
    ],
)
def test_what_other_clients_feed_to_graphs_of_pictures(change, message, small, tmp_path):
    path = changed(copy_bundle(small, tmp_path / "bundle"), change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(path).check_files()


def test_a_bare_backbone_whose_row_is_an_adapter_s(tmp_path):
    path = copy_bundle(WITNESSES / "v1" / "added", tmp_path / "bundle")
    with edit(path) as change:
        bank = change.bundle.bank().copy()
        bank[0] = bank[1]
        change.store(BANK_FILE, tensor_bytes({"adapter_bank": bank}))
    with pytest.raises(BundleError, match=r"expected zeros in row 0, the bare backbone's, found"):
        Bundle.open(path).check_files()


def test_a_whole_model_is_named_as_its_backbone(workshop, tmp_path):
    arguments = workshop.backbone.facts.args
    workshop.export(tmp_path / "bundle", (), fold=True, model_args=arguments)
    check_copies(Bundle.open(tmp_path / "bundle"))
    path = changed(tmp_path / "bundle", lambda c: first(c).update(class_names=list("abcde")))
    with pytest.raises(BundleError, match=r"class_names\[0\]: expected None, as backbone says"):
        verify(path)


def test_nothing_that_compares_files_lets_it_pass(tmp_path):
    bundle = copy_bundle(WITNESSES / "v1" / "branches", tmp_path / "bundle")
    push(bundle, tmp_path / "hub")
    for path in (bundle, tmp_path / "hub"):
        changed(path, DAMAGE["a mean"][0])
    for refuses in (
        lambda: verify(bundle),
        lambda: push(bundle, tmp_path / "another"),
        lambda: push(bundle, tmp_path / "another", dry_run=True),
        lambda: pull(tmp_path / "hub", tmp_path / "pulled"),
        lambda: sign(bundle, pair(tmp_path)[0]),
    ):
        with pytest.raises(BundleError, match=r"preprocess\.mean"):
            refuses()
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "hub", "key.pem", "key.pub"}
