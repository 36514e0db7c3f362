"""Bundles on disk: the manifest, its files, adapters added and removed, crashes in between."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.licences import CARD
from hhdeploy.backbones.sites import linear_spec
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.layout import Branch, RowLayout
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST, Manifest, hash_files, write_manifest
from hhdeploy.bundle.membership import admit
from hhdeploy.errors import (
    AdapterError,
    BundleError,
    CapacityError,
    ConflictError,
    HhdeployError,
    OptionError,
    PlanError,
    SessionError,
)
from hhdeploy.runtime import open_session
from tests.broken_manifests import OF_OTHER_GRAPHS, broken
from tests.support import assert_parity, images, random_adapter
from tests.workshop import contents, copy_bundle, flip_byte


@pytest.fixture
def bundle(small, tmp_path):
    """Alpha (row 1) and gamma (row 2), free to be changed."""
    return copy_bundle(small, tmp_path / "bundle")


def rows_of(path):
    return {a.name: a.row for a in Bundle.open(path).manifest.adapters}


def names_in(path):
    return sorted(p.name for p in path.iterdir())


def answer(path, workshop, name, adapter=None):
    """Check one adapter of a bundle against the training-time model."""
    x = images(3)
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(x, name)
    assert_parity(workshop.mixed_truth([adapter or name] * 3, x, 7), found, "branches", "float32")


def edit(path, **changes):
    """Change keys of a manifest; a value of None removes the key."""
    file = path / MANIFEST
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# --- the manifest -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["branches", "small", "folded", "constant"])
def test_the_manifest_survives_json(which, request):
    path = request.getfixturevalue(which)
    text = (path / MANIFEST).read_text()
    manifest = Bundle.open(path).manifest
    assert Manifest.from_json(json.loads(text)) == manifest
    assert json.loads(json.dumps(manifest.to_json())) == json.loads(text)


def test_what_the_manifest_says(branches, workshop):
    content = json.loads((branches / MANIFEST).read_text())
    assert content["schema_version"] == 1
    assert content["kind"] == "branches"
    assert content["backbone"].pop("preprocess_graph")["file"] == "preprocess.center.bicubic.onnx"
    assert content["backbone"] == json.loads(json.dumps(workshop.backbone.facts.to_json()))
    assert content["backbone"]["sha256"] == workshop.backbone.facts.sha256
    described = [(a["name"], a["row"], a["classes"], a["verified"]) for a in content["adapters"]]
    assert described == [
        ("alpha", 1, 7, True),
        ("rival", 2, 7, True),
        ("beta", 3, 11, True),
        ("gamma", 4, 3, True),
        ("headless", 5, 5, True),
    ]
    size = content["row"]["size"]
    assert content["tensors"] == {
        "images": ["batch", 3, 32, 32],
        "adapter_ids": ["batch"],
        "adapter_bank": ["slots", size],
        "logits": ["batch", 11],
    }
    assert content["graphs"] == {"float32": "model.onnx"}
    assert {"hhdeploy", "torch", "timm", "onnx", "python"} <= set(content["versions"])
    assert load_file(branches / BANK_FILE)["adapter_bank"].shape == (6, size)


def test_row_zero_is_zero_and_the_others_are_not(branches):
    bank = Bundle.open(branches).bank()
    assert bank.dtype == np.float32
    assert not bank[0].any()
    assert all(row.any() for row in bank[1:])


@pytest.mark.parametrize("which", ["branches", "folded", "constant"])
def test_every_file_has_its_hash(which, request):
    path = request.getfixturevalue(which)
    manifest = Bundle.open(path).manifest
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(manifest.files) == on_disk - {MANIFEST}
    assert hash_files(path) == dict(manifest.files)
    assert (BANK_FILE in on_disk) == (which != "folded")


def test_adapters_are_kept_as_they_came(branches, workshop):
    for name in ("alpha", "headless"):
        assert contents(branches / "adapters" / name) == contents(workshop.directory(name))


def test_lookups(branches, folded):
    manifest = Bundle.open(branches).manifest
    assert manifest.adapter("gamma").row == 4
    assert manifest.input_size == (3, 32, 32)
    assert manifest.backbone_classes == 5
    assert Bundle.open(folded).manifest.backbone_classes == 0
    with pytest.raises(BundleError, match=r"'omega'.*has: alpha, rival, beta, gamma, headless"):
        manifest.adapter("omega")


def test_a_graph_that_is_not_there(branches):
    with pytest.raises(BundleError, match=r"has no int8 graph; it has float32\. Add it with"):
        Bundle.open(branches).graph("int8")
    bare = Bundle(branches, replace(Bundle.open(branches).manifest, graphs={}))
    with pytest.raises(BundleError, match=r"has no float32 graph; it has none\. Export"):
        bare.graph("float32")


def test_labels(branches):
    entry = Bundle.open(branches).manifest.adapter("alpha")
    assert entry.label(6) == "class 6"
    assert replace(entry, class_names=None).label(6) == "6"


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", BANK_FILE])
@pytest.mark.parametrize("position", [0, 1009, -1])
def test_a_flipped_byte_is_refused_by_name(bundle, file, position):
    flip_byte(bundle / file, position)
    with pytest.raises(BundleError, match=rf"{file}: expected sha256 .* found"):
        open_session(bundle, device="cpu")


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", BANK_FILE])
def test_a_missing_or_truncated_file_is_refused_by_name(bundle, file):
    whole = (bundle / file).read_bytes()
    (bundle / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=f"{file}: expected sha256"):
        open_session(bundle, device="cpu")
    (bundle / file).unlink()
    with pytest.raises(BundleError, match=f"{file} is missing"):
        open_session(bundle, device="cpu")


def test_line_ends_that_git_changed_are_named(bundle):
    """Of a clone with core.autocrlf=true."""
    for file in bundle.rglob("*.json"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    said = r"adapter_config\.json: expected sha256 .*CRLF.*Clone it with git -c core.autocrlf=false"
    with pytest.raises(BundleError, match=said):
        Bundle.open(bundle).check_files()


def test_a_damaged_reference_is_refused_by_name(bundle):
    flip_byte(bundle / "reference.safetensors")
    with pytest.raises(BundleError, match=r"reference\.safetensors: expected sha256"):
        Bundle.open(bundle).reference()


def test_a_reference_of_other_columns_is_refused_by_name(branches, tmp_path):
    """`verify` ended with an error of NumPy's."""
    path = broken(branches, tmp_path / "bundle", OF_OTHER_GRAPHS["wider"][0])
    with pytest.raises(BundleError, match=r"reference\.safetensors: expected what .*\(\d+,12\)"):
        Bundle.open(path).reference()


def test_no_bundle(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=r"is not a bundle: hhdeploy\.json was expected"):
            Bundle.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "expected at most 2, found 3.*pip install -U"),
        ({"schema_version": None}, "found None"),
        ({"schema_version": "1"}, "found '1'"),
        ({"row": {}}, "is damaged"),
        ({"adapters": [{}]}, "is damaged"),
        ({"adapters": 7}, "is damaged"),
        ({"graphs": None}, "is damaged"),
        ({"files": None}, "is damaged"),
    ],
)
def test_manifests_that_are_refused(bundle, changes, message):
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_a_manifest_that_may_not_be_read(bundle, monkeypatch):
    """Which is no reason to export again."""

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("hhdeploy.files.bundle_json.read_plain", refuse)
    expected = (
        r"hhdeploy\.json cannot be read: Permission denied\. Give it its permissions, or copy"
    )
    with pytest.raises(BundleError, match=expected):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"schema_version": 1}', "\x00\xff"])
def test_a_manifest_that_is_not_json_or_not_whole(bundle, text):
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"hhdeploy\.json"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": 3},
        {"backbone": {}},
        {"adapters": [["alpha"]]},
        {"graphs": ["model.onnx"]},
        {"files": [1]},
        {"row": 5},
        {"row": {"branches": 1, "classes": 1, "dim": 1, "backbone_head": True}},
    ],
)
def test_values_of_another_type_are_the_bundle_s_fault_and_not_a_crash(bundle, changes):
    edit(bundle, **changes)
    with pytest.raises(HhdeployError), open_session(bundle, device="cpu"):
        pass


def test_an_adapter_whose_row_is_not_in_the_bank(bundle):
    entries = json.loads((bundle / MANIFEST).read_text())["adapters"]
    entries[0]["row"] = 97
    edit(bundle, adapters=entries)
    with pytest.raises(HhdeployError, match="row"):
        open_session(bundle, device="cpu")


def test_a_folded_bundle_has_no_bank(folded):
    with pytest.raises(BundleError, match="folded bundle"):
        Bundle.open(folded).bank()


# --- adapters added -----------------------------------------------------------------------------


def test_an_adapter_is_added(bundle, workshop):
    graph = (bundle / "model.onnx").read_bytes()
    entry = add_adapter(bundle, "rival", workshop.directory("rival"))
    assert (entry.name, entry.row, entry.classes, entry.verified) == ("rival", 3, 7, False)
    assert rows_of(bundle) == {"alpha": 1, "gamma": 2, "rival": 3}
    assert hash_files(bundle) == dict(Bundle.open(bundle).manifest.files)
    assert contents(bundle / "adapters" / "rival") == contents(workshop.directory("rival"))
    assert (bundle / "model.onnx").read_bytes() == graph
    for name in ("rival", "alpha", "gamma"):
        answer(bundle, workshop, name)


def test_an_adapter_directory_with_folders_in_it_is_added(bundle, workshop, tmp_path):
    source = shutil.copytree(workshop.directory("rival"), tmp_path / "messy")
    (source / "logs" / "run 1").mkdir(parents=True)
    (source / "logs" / "run 1" / "events.txt").write_text("loss 1")
    add_adapter(bundle, "rival", source)
    assert hash_files(bundle) == dict(Bundle.open(bundle).manifest.files)
    answer(bundle, workshop, "rival")


def test_rows_are_reused_and_the_bank_only_grows_when_it_must(bundle, workshop):
    size = Bundle.open(bundle).bank().shape
    remove_adapter(bundle, "alpha")
    assert rows_of(bundle) == {"gamma": 2}
    assert not Bundle.open(bundle).bank()[1].any()
    assert not (bundle / "adapters" / "alpha").exists()
    assert not [f for f in Bundle.open(bundle).manifest.files if "alpha" in f]
    assert add_adapter(bundle, "rival", workshop.directory("rival")).row == 1
    assert Bundle.open(bundle).bank().shape == size
    answer(bundle, workshop, "rival")
    answer(bundle, workshop, "gamma")
    assert add_adapter(bundle, "more", workshop.directory("alpha")).row == 3
    assert len(Bundle.open(bundle).bank()) == size[0] + 1
    answer(bundle, workshop, "more", "alpha")
    assert names_in(bundle / "adapters") == ["gamma", "more", "rival"]


def test_an_adapter_without_a_head_where_the_backbone_s_was_kept(branches, workshop, tmp_path):
    copy = copy_bundle(branches, tmp_path / "copy")
    entry = add_adapter(copy, "second", workshop.directory("headless"))
    assert (entry.row, entry.classes) == (6, 5)
    x = images(2)
    with open_session(copy, device="cpu", threads=1) as session:
        assert np.array_equal(session.run(x, "second"), session.run(x, "headless"))


def test_a_fused_qkv_that_is_one_site(small):
    """As of TinyViT, which keeps q, k and v together head by head."""
    manifest = Bundle.open(small).manifest
    whole = linear_spec("blocks.0.attn.qkv", 144, 48, thirds=False)
    adapter = random_adapter(replace(manifest.backbone, linears=(whole,)), targets=("qkv",))
    branch = Branch(whole.path, "additive", (whole.path,), 144, 48, 3)
    layout = RowLayout((branch,), 7, manifest.backbone.dim, False)
    row = admit(replace(manifest, layout=layout), "omega", adapter)
    assert np.array_equal(row, layout.pack("omega", adapter))


@pytest.fixture
def make(workshop, tmp_path):
    """A directory of a random adapter of the workshop's backbone, or of one that is changed."""

    def build(facts=None, **options):
        directory = tmp_path / "made"
        adapter = random_adapter(facts or workshop.backbone.facts, **options)
        save_adapter(adapter, directory, overwrite=True)
        return directory

    return build


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"r": 3}, "max_rank=5"),
        ({"classes": 11}, "max_classes=11"),
        ({"targets": ("fc1",)}, "`sites`"),
        ({"targets": ("fc2",)}, "`sites`"),  # gamma's fc2 is sequential
        ({"form": "sequential", "targets": ("proj", "fc2"), "r": 5}, "max_rank=7"),
        ({"classes": None}, "keep_backbone_head=True"),
    ],
)
def test_an_adapter_that_does_not_fit_names_the_flag(bundle, make, options, flag):
    before = contents(bundle)
    with pytest.raises(CapacityError, match=rf"'omega'.*{flag}"):
        add_adapter(bundle, "omega", make(**options))
    assert contents(bundle) == before


def test_adapters_of_another_backbone(bundle, make, workshop):
    facts = workshop.backbone.facts
    before = contents(bundle)
    with pytest.raises(AdapterError, match=r"base_sha256.*000000000000"):
        add_adapter(bundle, "omega", make(replace(facts, sha256="0" * 64)))
    with pytest.raises(AdapterError, match=r"base_model_name_or_path.*vit_small"):
        add_adapter(
            bundle, "omega", make(replace(facts, model="vit_small_patch16_224", sha256=None))
        )
    with pytest.raises(AdapterError, match=r"head\.fc\.weight: expected head\.weight"):
        add_adapter(bundle, "omega", make(replace(facts, classifier="head.fc")))
    larger = replace(facts.preprocess, input_size=(3, 64, 64))
    args = {**facts.args, "img_size": 64}
    with pytest.raises(AdapterError, match="image sizes disagree"):
        add_adapter(bundle, "omega", make(replace(facts, preprocess=larger, args=args)))
    assert contents(bundle) == before


def test_an_adapter_that_lacks_sites_it_names(bundle, make):
    directory = make()
    tensors = load_file(directory / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("blocks.1.attn.qkv.v.")}
    assert len(kept) < len(tensors)
    save_file(kept, directory / "adapter_model.safetensors")
    before = contents(bundle)
    with pytest.raises(AdapterError, match=r"missing .*blocks\.1\.attn\.qkv\.v"):
        add_adapter(bundle, "omega", directory)
    assert contents(bundle) == before


def test_class_names_of_an_adapter_without_a_head(branches, workshop, tmp_path):
    copy = copy_bundle(branches, tmp_path / "copy")
    source = shutil.copytree(workshop.directory("headless"), tmp_path / "named")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"num_classes": 3, "class_names": ["one", "two", "three"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"num_classes: expected 5 .* found 3"):
        add_adapter(copy, "named", source)


def test_a_change_does_not_accept_damage_elsewhere(bundle, workshop):
    """Hashes of files that a change does not touch stay those of the export."""
    old = dict(Bundle.open(bundle).manifest.files)
    flip_byte(bundle / "adapters" / "alpha" / "adapter_model.safetensors")
    add_adapter(bundle, "rival", workshop.directory("rival"))
    written = {BANK_FILE, CARD}
    new = dict(Bundle.open(bundle).manifest.files)
    assert {k: v for k, v in new.items() if k in old and k not in written} == {
        k: v for k, v in old.items() if k not in written
    }


def test_names_that_are_refused(bundle, workshop):
    before = contents(bundle)
    for name, message in (("alpha", "has an adapter 'alpha' already"), ("backbone", "reserved")):
        with pytest.raises(PlanError, match=message):
            add_adapter(bundle, name, workshop.directory("rival"))
    for name in ("../evil", "a/b", "", "."):
        with pytest.raises(PlanError, match="letters, digits"):
            add_adapter(bundle, name, workshop.directory("rival"))
    with pytest.raises(AdapterError, match="is not a directory"):
        add_adapter(bundle, "omega", workshop.root / "nowhere")
    assert contents(bundle) == before


@pytest.mark.parametrize("which", ["folded", "constant"])
def test_bundles_that_cannot_be_changed(which, request, workshop, tmp_path):
    copy = copy_bundle(request.getfixturevalue(which), tmp_path / "copy")
    before = contents(copy)
    expected = "fold=True" if which == "folded" else "bank_as_constant=True"
    with pytest.raises(PlanError, match=expected):
        add_adapter(copy, "rival", workshop.directory("rival"))
    with pytest.raises(PlanError, match="cannot be removed"):
        remove_adapter(copy, "alpha")
    assert contents(copy) == before


def test_removing_what_is_not_there(bundle):
    before = contents(bundle)
    with pytest.raises(BundleError, match=r"unknown adapter 'omega'.*alpha, gamma"):
        remove_adapter(bundle, "omega")
    assert contents(bundle) == before


def test_a_bundle_is_changed_by_its_methods(bundle, workshop):
    before = Bundle.open(bundle)
    added = before.add("rival", workshop.directory("rival"), strength=0.5)
    assert added.manifest.adapter("rival").strength == 0.5
    assert rows_of(bundle) == {"alpha": 1, "gamma": 2, "rival": 3}
    assert added == Bundle.open(bundle) != before
    removed = added.remove("alpha")
    assert removed == Bundle.open(bundle)
    assert [a.name for a in removed.manifest.adapters] == ["gamma", "rival"]
    with pytest.raises(BundleError, match="unknown adapter 'alpha'"):
        before.remove("alpha")  # what counts is what is on disk
    with before.edit() as change:
        assert change.bundle == removed
        change.manifest = replace(change.manifest, versions={"tool": "1"})
    assert Bundle.open(bundle).manifest.versions == {"tool": "1"}


def test_a_bundle_stays_the_one_that_was_opened(bundle, workshop, tmp_path, monkeypatch):
    """Of a relative path, too, when the process goes to where another bundle has its name."""
    other = copy_bundle(bundle, tmp_path / "elsewhere" / "bundle")
    before = contents(other)
    monkeypatch.chdir(tmp_path)
    opened = Bundle.open("bundle")
    with open_session("bundle", device="cpu", threads=1) as session:
        assert opened == session.bundle == Bundle.open(bundle)
        monkeypatch.chdir(other.parent)
        added = opened.add("rival", workshop.directory("rival"))
        assert session.bundle.changed()
    removed = added.remove("alpha")
    assert rows_of(bundle) == {"gamma": 2, "rival": 3}
    with removed.edit() as change:
        change.manifest = replace(change.manifest, versions={"tool": "1"})
    assert Bundle.open(bundle).manifest.versions == {"tool": "1"}
    assert contents(other) == before


def test_a_link_to_a_bundle_is_followed_when_it_is_used(bundle, tmp_path, monkeypatch):
    link = tmp_path / "current"
    link.symlink_to("bundle")
    monkeypatch.chdir(tmp_path)
    assert Bundle.open("current").path == link


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_bundle_goes_to_another_process_and_a_session_does_not(bundle, again):
    for there in (Bundle.open(bundle), Bundle.open(bundle).hold()):
        found = again(there)
        assert (found, found.held) == (there, there.held)
        assert np.array_equal(found.bank(), there.bank())
    with (
        open_session(bundle, device="cpu", threads=1) as session,
        pytest.raises(SessionError, match="cannot be copied or sent: open one in each process"),
    ):
        again(session)


def test_a_bundle_is_a_key(bundle):
    """It was unhashable, for the dictionaries in its manifest."""
    assert {Bundle.open(bundle): 1}[Bundle.open(bundle).hold()] == 1


def test_what_is_no_bundle_is_told_where_there_is_one(bundle, tmp_path):
    copy_bundle(bundle, tmp_path / "outer" / "tasks")
    inside = re.escape(str(tmp_path / "outer" / "tasks"))
    with pytest.raises(BundleError, match=f"outer is not a bundle: .* that it holds: {inside}$"):
        Bundle.open(tmp_path / "outer")
    with pytest.raises(BundleError, match=r"nowhere is not a bundle: .* Nothing of this name is"):
        Bundle.open(tmp_path / "nowhere")


def test_an_edit_relies_on_the_graph_that_was_opened(bundle):
    opened = Bundle.open(bundle)
    files = {**opened.manifest.files, "model.onnx.data": "0" * 64}
    other = replace(opened, manifest=replace(opened.manifest, files=files))
    before = contents(bundle)
    with pytest.raises(ConflictError, match="exported again meanwhile"), other.edit():
        raise AssertionError("the block must not run")
    assert contents(bundle) == before


def test_all_adapters_removed(bundle, workshop):
    remove_adapter(bundle, "alpha")
    remove_adapter(bundle, "gamma")
    with pytest.raises(BundleError, match="has: none"):
        remove_adapter(bundle, "alpha")
    assert not Bundle.open(bundle).bank().any()
    add_adapter(bundle, "gamma", workshop.directory("gamma"))
    answer(bundle, workshop, "gamma")


def test_the_manifest_is_replaced_in_one_step(bundle, monkeypatch):
    """A manifest that cannot be written leaves the old one, whole."""
    before = contents(bundle)
    manifest = Bundle.open(bundle).manifest
    with pytest.raises(TypeError):
        write_manifest(bundle, replace(manifest, versions={"python": object()}))
    assert contents(bundle) == before


def test_what_is_no_directory_name_or_strength(small, tmp_path, workshop):
    path, source = copy_bundle(small, tmp_path / "bundle"), workshop.directory("rival")
    with pytest.raises(AdapterError, match=r"found Adapter\. save_adapter\(adapter, directory\)"):
        add_adapter(path, "z", workshop.adapters["rival"])
    with pytest.raises(OptionError, match="adapter name 3: expected letters"):
        add_adapter(path, 3, source)
    with pytest.raises(OptionError, match="`strength`: expected a finite number, found '1'"):
        add_adapter(path, "z", source, strength="1")
    add_adapter(path, "z", source, strength=np.float32(0.5))
    assert Bundle.open(path).manifest.adapters[-1].strength == 0.5
