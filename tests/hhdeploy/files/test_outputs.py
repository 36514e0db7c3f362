"""What a user names to be written to: nothing is written into a bundle."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from hhdeploy.adapters.directory import ADAPTER
from hhdeploy.adapters.format import load_adapter, save_adapter
from hhdeploy.bundle.hub import pull, push
from hhdeploy.bundle.packed import pack_adapter
from hhdeploy.errors import WriteError
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.outputs import check_output, output_file
from hhdeploy.files.writing import placed_here
from tests.workshop import contents, copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"
INSIDE = "is inside of the bundle .*bundle: a part that is written over is damage"


@pytest.fixture
def bundle(tmp_path):
    return copy_bundle(WITNESS / "branches", tmp_path / "bundle")


@pytest.mark.parametrize(
    "name",
    [
        "bank.safetensors",
        "hhdeploy.json",
        "model.sig",
        "adapters/alpha/adapter_config.json",
        "../bundle/bank.safetensors",
        "bank.0123abcd.safetensors",
        "mine.json",
        "adapters/mine.html",
    ],
)
def test_a_file_inside_of_a_bundle_is_refused(bundle, name):
    before = contents(bundle)
    with pytest.raises(WriteError, match=INSIDE), output_file(bundle / name):
        pytest.fail("the block must not run")
    with pytest.raises(WriteError, match=INSIDE):
        pack_adapter(bundle, "alpha", bundle / name)
    assert contents(bundle) == before


def test_a_link_to_a_part_is_refused(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle / "bank.safetensors")
    (tmp_path / "folder").symlink_to(bundle)
    (bundle / "out").symlink_to(tmp_path / "elsewhere")
    inside = (tmp_path / "folder" / "bank.safetensors", bundle / "out")
    for path in (tmp_path / "link", *inside):
        with pytest.raises(WriteError, match=INSIDE):
            check_output(path)


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_in_a_folder_that_is_not_there(tmp_path):
    words = r"nowhere/bom\.json: .*nowhere is not a directory\. Make it first, or choose another"
    with pytest.raises(WriteError, match=words), output_file(tmp_path / "nowhere" / "bom.json"):
        pass
    (tmp_path / "bom.json").symlink_to("nowhere/bom.json")
    with pytest.raises(WriteError, match=r"/bom\.json: .*nowhere is not a directory"):
        check_output(tmp_path / "bom.json")


def test_what_was_written_is_known_by_its_name(tmp_path):
    (tmp_path / "link").symlink_to("there")
    with placed_here() as record, output_file(tmp_path / "link") as scratch:
        scratch.write_text("new")
    assert list(record) == [tmp_path / "link"]


def test_what_cannot_be_written_is_known_before_slow_work(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=r"^`report`: .*folder: Is a directory. Name a file in it"):
        check_output(tmp_path / "folder", "`report`: ")
    (tmp_path / "there").write_text("old")
    check_output(tmp_path / "there")
    check_output(Path(os.devnull))
    monkeypatch.setattr("hhdeploy.files.writing.write_bytes", no_room)
    with pytest.raises(WriteError, match=r"^`report`: .*there: No space left .* was changed"):
        check_output(tmp_path / "there", "`report`: ")
    assert contents(tmp_path) == {"there": b"old"}


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"files": 3}), "[" * 100_000])
def test_another_s_file_of_that_name_makes_no_bundle(tmp_path, text):
    (tmp_path / "hhdeploy.json").write_text(text)
    check_output(tmp_path / "bank.safetensors")


@pytest.mark.parametrize("name", ["adapters/alpha", "adapters", "adapters/mine", "new/copy"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_inside_of_a_bundle_is_refused(bundle, name, overwrite):
    adapter, before = load_adapter(WITNESS / "rival"), contents(bundle)
    with (
        pytest.raises(WriteError, match=INSIDE),
        atomic_directory(bundle / name, overwrite=overwrite, kind=ADAPTER),
    ):
        pytest.fail("the block must not run")
    for write in (
        lambda out: push(bundle, out, overwrite=overwrite),
        lambda out: pull(bundle, out, overwrite=overwrite),
        lambda out: save_adapter(adapter, out, overwrite=overwrite),
    ):
        with pytest.raises(WriteError, match=INSIDE):
            write(bundle / name)
    assert contents(bundle) == before
    assert not (bundle / "new").exists()


def test_a_bundle_is_replaced_where_it_is(bundle):
    push(bundle, bundle.parent / "copy")
    pull(bundle.parent / "copy", bundle, overwrite=True)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(WriteError, match=r"`report`: .*none is not a directory\. Make it first"):
        check_output(tmp_path / "none" / "a.html", "`report`: ")
