"""Rows as files of ONNX Runtime's adapter format: its own reader, its own runs, and back."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.bundle.manifest import MANIFEST, write_manifest
from hhdeploy.bundle.packed import adapter_of, model_version, pack_adapter, unpack_adapter
from hhdeploy.errors import AdapterError, BundleError, PlanError, WriteError
from tests.support import images
from tests.workshop import copy_bundle


def row_of(bundle, name):
    opened = Bundle.open(bundle)
    return opened.bank()[opened.manifest.adapter(name).row]


def test_onnxruntime_reads_the_row(branches, tmp_path):
    for name in ("alpha", "gamma"):
        pack_adapter(branches, name, tmp_path / f"{name}.onnx_adapter")
        form = ort.AdapterFormat.read_adapter(str(tmp_path / f"{name}.onnx_adapter"))
        ((key, value),) = form.get_parameters().items()
        assert key == "adapter_bank"
        assert value.numpy().tobytes() == row_of(branches, name).tobytes()


def test_a_run_with_the_file_answers_as_the_bank_does(branches, tmp_path):
    pack_adapter(branches, "gamma", tmp_path / "gamma.onnx_adapter")
    session = ort.InferenceSession(branches / "model.onnx", providers=["CPUExecutionProvider"])
    x, bank = images(3), Bundle.open(branches).bank()
    feeds = {"images": x, "adapter_ids": np.full(3, 4), "adapter_bank": bank}
    expected = session.run(None, feeds)[0]
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "gamma.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    # Python's own check of the feeds knows no adapters; the runtime's does.
    found = session._sess.run(["logits"], {"images": x, "adapter_ids": np.zeros(3, int)}, options)
    assert np.array_equal(found[0], expected)


def test_rows_are_of_one_model_and_one_layout(branches):
    manifest = Bundle.open(branches).manifest
    facts, layout = manifest.backbone, manifest.layout
    others = (
        {"backbone": replace(facts, sha256="0" * 64)},
        {"backbone": replace(facts, buffers="0" * 64)},
        {"layout": replace(layout, classes=layout.classes + 1)},
    )
    versions = {model_version(replace(manifest, **other)) for other in ({}, *others)}
    assert len(versions) == 4
    assert all(0 <= version < 2**31 for version in versions)


def test_what_a_manifest_says_beside_is_of_no_meaning_to_a_row(branches, tmp_path):
    path = copy_bundle(branches, tmp_path / "bundle")
    pack_adapter(path, "gamma", tmp_path / "file")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["row"]["note"] = manifest["row"]["branches"][0]["note"] = "mine"
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert unpack_adapter(path, tmp_path / "file").sites


@pytest.mark.parametrize("bundle", ["branches", "scaled"])
def test_back_in_a_bundle_it_has_the_same_row(bundle, request, tmp_path):
    path = copy_bundle(request.getfixturevalue(bundle), tmp_path / "bundle")
    for name in [a.name for a in Bundle.open(path).manifest.adapters]:
        pack_adapter(path, name, tmp_path / "file")
        save_adapter(unpack_adapter(path, tmp_path / "file"), tmp_path / name)
        again = load_adapter(tmp_path / name)
        add_adapter(path, f"{name}-again", tmp_path / name)
        before, after = dense(path, name), dense(path, f"{name}-again")
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert np.array_equal(value, after[key]), (name, key)
        assert again.config.form == Bundle.open(path).load_adapter(name).config.form


def dense(path, name):
    """What a row does, whatever the order of its ranks."""
    bundle = Bundle.open(path)
    layout = bundle.manifest.layout
    parts = dict(layout.views(row_of(path, name).copy()))
    for branch in layout.branches:
        right, left = (parts.pop(f"{branch.name}/{p}") for p in ("right", "left_t"))
        parts[f"{branch.name}/product"] = np.einsum("nko,nki->noi", left, right, dtype=np.float64)
    return parts


def test_a_row_of_two_forms_is_no_adapter(branches):
    bundle = Bundle.open(branches)
    manifest, layout = bundle.manifest, bundle.manifest.layout
    row = row_of(branches, "gamma") + row_of(branches, "headless")
    with pytest.raises(AdapterError, match="file: its row has additive and sequential matrices"):
        adapter_of(manifest, layout, row, "file")


def test_a_sequential_row_without_a_diagonal_is_one(branches):
    bundle = Bundle.open(branches)
    manifest, layout = bundle.manifest, bundle.manifest.layout
    row = row_of(branches, "gamma").copy()
    for name, part in layout.views(row).items():
        if name.endswith("/diag"):
            part[:] = 0
    found = adapter_of(manifest, layout, row, "file")
    assert found.config.form == "sequential"
    assert found.config.base_buffers == manifest.backbone.buffers
    assert found.sites
    assert all((site.d == 1).all() for site in found.sites.values())
    assert np.array_equal(layout.pack("again", found), row)


def test_a_disk_that_is_full_is_said_and_leaves_the_old_file(branches, tmp_path):
    """onnxruntime says it as a RuntimeError of its own, and not what the system said."""
    (tmp_path / "file").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            WriteError, match=f"Could not write {tmp_path / 'file'}: File too large"
        ):
            pack_adapter(branches, "alpha", tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_is_no_such_file_or_another_bundle_s_is_refused(branches, small, folded, tmp_path):
    (tmp_path / "noise").write_bytes(b"noise")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, why in {
        "noise": "The buffer does not appear to be [^/\n]*",
        "empty": "it is empty",
        "pipe": "it is a pipe; a plain file was expected",
        "nowhere": "No such file or directory",
    }.items():
        with pytest.raises(AdapterError, match=rf"{name} .* adapter format .*: {why}\. Pack the a"):
            unpack_adapter(branches, tmp_path / name)
    pack_adapter(branches, "alpha", tmp_path / "alpha")
    with pytest.raises(AdapterError, match="another model or layout"):
        unpack_adapter(small, tmp_path / "alpha")
    bundle = copy_bundle(branches, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    for buffers, alike in (("", True), ("1" * 64, False)):  # an earlier version's; another model's
        facts = replace(manifest.backbone, buffers=buffers)
        write_manifest(bundle, replace(manifest, backbone=facts))
        if alike:
            unpack_adapter(bundle, tmp_path / "alpha")
            continue
        with pytest.raises(AdapterError, match="another model or layout"):
            unpack_adapter(bundle, tmp_path / "alpha")
    with pytest.raises(PlanError, match="takes no rows"):
        pack_adapter(folded, "alpha", tmp_path / "folded")
    with pytest.raises(BundleError, match="unknown adapter 'omega'"):
        pack_adapter(branches, "omega", tmp_path / "omega")
    assert not (tmp_path / "omega").exists()
