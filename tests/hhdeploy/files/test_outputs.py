"""What a user names to be written to: no part of a bundle is written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hhdeploy.adapters.format import ADAPTER, load_adapter, save_adapter
from hhdeploy.bundle import add_adapter
from hhdeploy.bundle.packed import pack_adapter
from hhdeploy.errors import WriteError
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.outputs import check_output, output_file
from tests.workshop import contents, copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"
PART = "is a part of the bundle .*bundle, which that would damage"


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
    ],
)
def test_a_part_of_a_bundle_is_refused(bundle, name):
    before = contents(bundle)
    with pytest.raises(WriteError, match=PART), output_file(bundle / name):
        pytest.fail("the block must not run")
    assert contents(bundle) == before


def test_the_bank_that_has_digits_by_now_is_refused_under_its_plain_name(bundle):
    """The next change would remove what has the name of a fresh export's bank."""
    add_adapter(bundle, "guest", WITNESS / "rival")
    assert not (bundle / "bank.safetensors").exists()
    with pytest.raises(WriteError, match=PART):
        pack_adapter(bundle, "guest", bundle / "bank.safetensors")


def test_a_link_to_a_part_is_refused(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle / "bank.safetensors")
    (tmp_path / "folder").symlink_to(bundle)
    for path in (tmp_path / "link", tmp_path / "folder" / "bank.safetensors"):
        with pytest.raises(WriteError, match=PART):
            check_output(path)


@pytest.mark.parametrize("name", ["mine.json", "adapters/mine.html", "bundle.json"])
def test_what_lies_beside_the_parts_is_written(bundle, name):
    with output_file(bundle / name) as scratch:
        scratch.write_text("mine")
    assert (bundle / name).read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"files": 3}), "[" * 100_000])
def test_another_s_file_of_that_name_makes_no_bundle(tmp_path, text):
    (tmp_path / "hhdeploy.json").write_text(text)
    check_output(tmp_path / "bank.safetensors")


def test_an_adapter_of_a_bundle_is_not_replaced(bundle, tmp_path):
    adapter, before = load_adapter(WITNESS / "rival"), contents(bundle)
    for out in (bundle / "adapters" / "alpha", bundle / "adapters"):
        with (
            pytest.raises(WriteError, match=PART),
            atomic_directory(out, overwrite=True, kind=ADAPTER),
        ):
            pytest.fail("the block must not run")
    assert contents(bundle) == before
    save_adapter(adapter, bundle / "adapters" / "mine")
    save_adapter(adapter, bundle / "adapters" / "mine", overwrite=True)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(WriteError, match=r"`report`: .*none is not a directory\. Make it first"):
        check_output(tmp_path / "none" / "a.html", "`report`: ")
