"""sign, verify --signature, push, pull and bom, as they are typed."""

from __future__ import annotations

import json

import pytest

from hhdeploy.bundle.hub import ATTRIBUTES
from hhdeploy.bundle.manifest import SIGNATURE
from tests.hhdeploy.bundle.test_signing import pair
from tests.workshop import contents, copy_bundle, flip_byte


@pytest.fixture
def bundle(small, tmp_path):
    return copy_bundle(small, tmp_path / "bundle")


def test_signed_pushed_pulled_and_verified(bundle, tmp_path, succeed, succeed_json, refuse):
    key, public = pair(tmp_path, password="opens")
    (tmp_path / "password").write_text("opens\r\nand more")
    refused = refuse("sign", bundle, "--key", key)
    assert "expected an elliptic-curve key" in refused
    assert "encrypted: pass its --password-file" in refused
    told = succeed("sign", bundle, "--key", key, "--password-file", tmp_path / "password")
    assert told == f"Wrote {bundle / SIGNATURE}\n"
    listed = succeed("push", bundle, tmp_path / "hub", "--dry-run")
    assert "  model.onnx.data (LFS)\n" in listed
    assert "  README.md\n" in listed
    assert not (tmp_path / "hub").exists()
    written = succeed_json("push", bundle, tmp_path / "hub")
    assert set(written["files"]) == {*contents(bundle), ATTRIBUTES}
    assert "bank.safetensors" in written["lfs"]
    succeed("pull", tmp_path / "hub", tmp_path / "out", "--public-key", public)
    assert contents(tmp_path / "out") == contents(bundle)
    report = succeed_json("verify", tmp_path / "out", "--signature", "--public-key", public)
    assert report["passed"]
    flip_byte(tmp_path / "out" / "README.md")
    message = refuse("verify", tmp_path / "out", "--signature", "--public-key", public)
    assert "is not what was signed" in message
    assert "README.md" in message


def test_a_change_says_that_it_unsigns(bundle, tmp_path, call, workshop):
    key, _ = pair(tmp_path)
    call("sign", bundle, "--key", key)
    result = call("adapter", "add", bundle, f"rival={workshop.directory('rival')}")
    assert result.exit_code == 0
    assert f"{SIGNATURE} signed the bundle as it was and was removed" in result.stderr


def test_what_a_bundle_is_made_of(bundle, tmp_path, succeed, refuse):
    printed = succeed("bom", bundle)
    assert json.loads(printed)["bomFormat"] == "CycloneDX"
    assert succeed("bom", bundle, "--out", tmp_path / "bom.json") == f"Wrote {tmp_path}/bom.json\n"
    assert (tmp_path / "bom.json").read_text() == printed
    assert "is not a directory. Make it first" in refuse(
        "bom", bundle, "--out", tmp_path / "nowhere" / "bom.json"
    )


def test_licences_are_listed(bundle, succeed, workshop):
    listed = succeed("adapter", "list", bundle)
    assert "(licence: unknown)" in listed
    assert "licence" in listed.splitlines()[2] + listed.splitlines()[1]
    inspected = succeed("adapter", "inspect", workshop.directory("alpha"), "--no-rank")
    assert f"{'license':24} unknown" in inspected
