"""Signed bundles: any byte and any file that is another one is refused, and a change unsigns."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hhdeploy.bundle import Bundle, add_adapter, edit, remove_adapter
from hhdeploy.bundle.manifest import OLD, SIGNATURE
from hhdeploy.bundle.signing import check_signature, sign
from hhdeploy.errors import BundleError, ReadError
from hhdeploy.files.scratch import scratch_file
from hhdeploy.runtime import open_session
from tests.workshop import contents, copy_bundle, flip_byte

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"


def pair(folder, name="key", private=None, password=None):
    """Files of a private key and its public one."""
    private = private or ec.generate_private_key(ec.SECP256R1())
    secret = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    key, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    key.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(pem, form))
    return key, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed_once(keys, tmp_path_factory) -> Path:
    bundle = copy_bundle(WITNESS / "int8", tmp_path_factory.mktemp("signed") / "bundle")
    with edit(bundle) as change:  # so that it has a card
        change.manifest = replace(change.manifest, versions={"hhdeploy": "again"})
    assert sign(bundle, keys[0]) == bundle / SIGNATURE
    return bundle


@pytest.fixture
def signed(signed_once, tmp_path) -> Path:
    """A signed bundle of its own, under another name than it was signed with."""
    return copy_bundle(signed_once, tmp_path / "elsewhere")


def refused(bundle, keys, match):
    with pytest.raises(BundleError, match=match):
        check_signature(bundle, keys[1])


def test_it_is_what_was_signed_wherever_it_lies(signed, keys):
    check_signature(signed, keys[1])
    assert SIGNATURE not in Bundle.open(signed).manifest.files
    Bundle.open(signed).check_files()
    with open_session(signed, device="cpu", threads=1) as session:
        assert "alpha" in session.adapters


def test_one_byte_of_every_file(signed, keys):
    draw = random.Random(7)
    names = [name for name in contents(signed) if name != SIGNATURE]
    assert {"README.md", "hhdeploy.json", "model.int8.onnx.data"} <= set(names)
    for name in names:
        path = signed / name
        before = path.read_bytes()
        flip_byte(path, draw.randrange(len(before)))
        refused(signed, keys, "is not what was signed|is damaged|cannot be read|schema_version")
        path.write_bytes(before)
    check_signature(signed, keys[1])


def test_any_byte_of_the_signature(signed, keys):
    path = signed / SIGNATURE
    before, draw = path.read_bytes(), random.Random(3)
    for position in draw.sample(range(len(before)), 60):
        changed = bytearray(before)
        changed[position] ^= 1 << draw.randrange(7)
        path.write_bytes(bytes(changed))
        refused(signed, keys, "is not what was signed")
    for spaced in (before + b"\n", json.dumps(json.loads(before)).encode()):
        path.write_bytes(spaced)
        refused(signed, keys, "is not what was signed")


@pytest.mark.parametrize(
    "name",
    ["evil.txt", "adapters/alpha/more.py", "adapters/new/x", ".hidden", f"{OLD}/x",
     ".gitattributes", ".git/config", ".work.hhdeploy-0/x"],
)  # fmt: skip
def test_a_file_that_was_added(signed, keys, name):
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("x")
    refused(signed, keys, rf"Extra files found.*{name}")


def test_a_file_that_is_gone_or_empty_or_a_link(signed, keys, tmp_path):
    path = signed / "parity.json"
    content = path.read_bytes()
    path.unlink()
    refused(signed, keys, r"Missing files.*parity\.json")
    (tmp_path / "there").write_bytes(content)
    path.symlink_to(tmp_path / "there")
    refused(signed, keys, r"parity\.json is a link")
    path.unlink()
    path.write_bytes(content)
    (signed / "adapters" / "linked").symlink_to(tmp_path)
    refused(signed, keys, "linked is a link")
    (signed / "adapters" / "linked").unlink()
    os.mkfifo(signed / "pipe")
    refused(signed, keys, "pipe is a link, a pipe")


def test_the_lock_of_a_change_is_no_tampering_unless_it_says_something(signed, keys):
    (signed / ".lock").touch()
    check_signature(signed, keys[1])
    (signed / ".lock").write_text("x")
    refused(signed, keys, r"\.lock is no empty file")


def test_another_key_and_none(signed, keys, tmp_path):
    other = pair(tmp_path, "other")
    refused(signed, other, "Key mismatch.*compare it with the right key")
    (signed / SIGNATURE).unlink()
    refused(signed, keys, "is not signed")
    with pytest.raises(BundleError, match="is not a bundle"):
        check_signature(tmp_path, keys[1])


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_change_unsigns_and_says_so(signed, keys, change):
    said = []
    if change == "add":
        add_adapter(signed, "guest", WITNESS / "rival", progress=said.append)
    else:
        remove_adapter(signed, "gamma", progress=said.append)
    assert not (signed / SIGNATURE).exists()
    assert f"{SIGNATURE} signed the bundle as it was and was removed: sign it again" in said
    refused(signed, keys, "is not signed")
    sign(signed, keys[0])
    check_signature(signed, keys[1])
    assert not (signed / OLD).exists()


def test_no_signature_of_another_manifest_stays_where_a_change_is_killed(signed, keys, monkeypatch):
    """It would say that somebody changed what its owner changed."""

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hhdeploy.bundle.store.sync_in_place", killed)
    monkeypatch.setattr("hhdeploy.bundle.store.Change.undo", lambda change, progress: None)
    with pytest.raises(KeyboardInterrupt):
        remove_adapter(signed, "gamma")
    monkeypatch.undo()
    refused(signed, keys, "is not signed")


@pytest.mark.parametrize("where", ["write_bytes", "sync_in_place", "shutil.rmtree"])
def test_ctrl_c_once_a_change_is_committed_unsigns_too(signed, keys, monkeypatch, where):
    """What signs the bundle as it was does not stay beside the one that it is."""
    before, said = Bundle.open(signed).manifest, []

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hhdeploy.bundle.store.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_adapter(signed, "gamma", progress=said.append)
    monkeypatch.undo()
    if where == "write_bytes":  # nothing is committed
        assert Bundle.open(signed).manifest == before
        check_signature(signed, keys[1])
        return
    assert Bundle.open(signed).manifest != before
    assert said == [f"{SIGNATURE} signed the bundle as it was and was removed: sign it again"]
    refused(signed, keys, "is not signed")


def test_a_change_of_nothing_leaves_it(signed, keys):
    with edit(signed):
        pass
    check_signature(signed, keys[1])


def test_what_is_damaged_or_strange_is_not_signed(signed, keys):
    (signed / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match=r"holds notes\.txt, which hhdeploy\.json does not name"):
        sign(signed, keys[0])
    (signed / "notes.txt").unlink()
    flip_byte(signed / "model.onnx.data")
    with pytest.raises(BundleError, match="expected sha256"):
        sign(signed, keys[0])


def test_what_killed_processes_left_is_swept(signed, keys):
    """A signature that was being written, and a bill of materials that somebody had put there."""
    for name in (f".{SIGNATURE}.hhdeploy-ae460791", ".bom.json.hhdeploy-00c0ffee"):
        (signed / name).write_bytes(b"half")
    sign(signed, keys[0])
    check_signature(signed, keys[1])
    assert not [p.name for p in signed.iterdir() if p.name.startswith(".")]
    # Of a process that lives.
    with (
        scratch_file(signed, SIGNATURE),
        pytest.raises(BundleError, match=r"holds \.model\.sig\.hh"),
    ):
        sign(signed, keys[0])


def test_keys(signed, keys, tmp_path):
    key, public = pair(tmp_path, "secret", password="opens")
    sign(signed, key, password="opens")
    check_signature(signed, public)
    kind = r".*elliptic-curve key in PEM \(P-256, P-384 or P-521\): "
    for wrong, words in ((None, "this one is encrypted: pass its `password`"), ("no", "Incorrect")):
        with pytest.raises(ReadError, match=f"`key`: {kind}{words}"):
            sign(signed, key, password=wrong)
    other, other_public = pair(
        tmp_path, "rsa", rsa.generate_private_key(public_exponent=65537, key_size=1024)
    )
    rsa_s = r"this one is of another kind, such as RSA or Ed25519\."
    nowhere = (tmp_path / "nowhere", r"No such file or directory\.")
    for bad, words in ((other, rsa_s), (keys[1], r"it holds no private key\."), nowhere):
        with pytest.raises(ReadError, match=f"`key`: {kind}{words}"):
            sign(signed, bad)
    for bad, words in ((other_public, rsa_s), (keys[0], r"it holds no public key\."), nowhere):
        with pytest.raises(ReadError, match=f"`public_key`: {kind}{words}"):
            check_signature(signed, bad)


def test_export_replaces_a_signed_bundle(signed, tmp_path):
    from hhdeploy.bundle.locking import BUNDLE
    from hhdeploy.files.directories import atomic_directory

    with atomic_directory(signed, overwrite=True, kind=BUNDLE) as scratch:
        shutil.copytree(WITNESS / "added", scratch, dirs_exist_ok=True)
    assert not (signed / SIGNATURE).exists()
