"""Changing a bundle: one at a time, on what the work relied on, and readers that start again."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hhdeploy.bundle.locking
import hhdeploy.bundle.membership
from hhdeploy.adapters.format import load_adapter
from hhdeploy.adapters.mixing import at_strength
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.manifest import BANK_FILE, hash_files, name_with_digits, plain_name
from hhdeploy.bundle.membership import entry_of
from hhdeploy.bundle.reading import read_bundle
from hhdeploy.bundle.store import Basis, edit
from hhdeploy.errors import (
    AdapterError,
    BundleError,
    ConflictError,
    ReadError,
    WriteError,
)
from hhdeploy.files.tensors import read_tensors, tensor_bytes
from hhdeploy.files.writing import json_bytes, sha256_of
from hhdeploy.runtime import open_session
from tests.support import assert_parity
from tests.workshop import contents, copy_bundle, flip_byte

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"
LOGITS, _ = read_tensors(WITNESS / "added.safetensors", AssertionError)


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Alpha (row 1) and gamma (row 2), free to be changed."""
    return copy_bundle(WITNESS / "branches", tmp_path / "bundle")


def add(path, name="guest"):
    return add_adapter(path, name, WITNESS / "rival")


def top(path):
    """Names at the top that are not hidden."""
    return {p.name for p in path.iterdir() if not p.name.startswith(".")}


def answer(path, name, known="float32/rival"):
    with open_session(path, device="cpu", threads=1) as session:
        found = session.run(LOGITS["images"], name)
    assert_parity(LOGITS[known], found, "branches", "float32")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "named"),
    [
        ("bank.safetensors", "bank.3fa9c1d2.safetensors"),
        ("parity.json", "parity.3fa9c1d2.json"),
        ("model.int8.onnx", "model.int8.3fa9c1d2.onnx"),
        ("model.int8.onnx.data", "model.int8.3fa9c1d2.onnx.data"),
        ("model.float32.tensorrt-rtx.sm86+sm89.engine",
         "model.float32.tensorrt-rtx.sm86+sm89.3fa9c1d2.engine"),
    ],
)  # fmt: skip
def test_names_and_their_digits(plain, named):
    assert name_with_digits(plain, "3fa9c1d2" + 56 * "0") == named
    assert plain_name(named) == plain
    assert plain_name(plain) == plain


def test_a_fresh_export_has_plain_names_and_an_edit_adds_digits(bundle):
    assert all(plain_name(n) == n for n in Bundle.open(bundle).manifest.files)
    add(bundle)
    manifest = Bundle.open(bundle).manifest
    (bank,) = [n for n in manifest.files if plain_name(n) == BANK_FILE]
    assert bank == f"bank.{sha256_of(bundle / bank)[:8]}.safetensors"
    assert manifest.named(BANK_FILE) == bank
    assert manifest.has(BANK_FILE)
    assert not manifest.has("model.int8.onnx")
    # One file a role at the top, and adapters as they came.
    assert top(bundle) == {n.split("/")[0] for n in manifest.files} | {"hhdeploy.json"}
    assert contents(bundle / "adapters" / "guest") == contents(WITNESS / "rival")
    assert hash_files(bundle) == dict(manifest.files)


def test_what_a_commit_replaces_is_there_until_the_next(bundle):
    first = contents(bundle)
    add(bundle)
    assert contents(bundle / ".old") == {BANK_FILE: first[BANK_FILE]}
    second = contents(bundle)
    remove_adapter(bundle, "guest")
    old = contents(bundle / ".old")
    assert BANK_FILE not in old
    assert old == {
        n: c for n, c in second.items()
        if n.startswith(("bank.", "adapters/guest/", "README.md"))
    }  # fmt: skip
    assert "guest" not in {p.name for p in (bundle / "adapters").iterdir()}


def test_the_same_content_again_has_the_same_name(bundle):
    add(bundle)
    one = Bundle.open(bundle).manifest
    remove_adapter(bundle, "guest")
    add(bundle)
    assert Bundle.open(bundle).manifest == one
    answer(bundle, "guest")


def test_a_live_file_is_never_written_over(bundle):
    """Not even where two contents had the same digits."""
    before = contents(bundle)
    (bundle.parent / "other").write_bytes(b"other")
    with pytest.raises(WriteError, match="is taken by another content"), edit(bundle) as change:
        change.adopt(BANK_FILE, bundle.parent / "other", "0" * 64, BANK_FILE)
    assert contents(bundle) == before


def test_an_edit_without_a_change_writes_nothing(bundle):
    before, stamp = contents(bundle), (bundle / "hhdeploy.json").stat().st_mtime_ns
    with edit(bundle):
        pass
    assert contents(bundle) == before
    assert (bundle / "hhdeploy.json").stat().st_mtime_ns == stamp


def test_an_edit_that_fails_leaves_what_was_there(bundle):
    before = contents(bundle)
    with pytest.raises(RuntimeError, match="planted"), edit(bundle) as change:  # noqa: PT012
        change.store(BANK_FILE, b"half")
        change.copy_adapter("x", WITNESS / "rival", {})
        raise RuntimeError("planted")
    assert contents(bundle) == before
    assert not (bundle / ".lock").exists()


# --- the lock -------------------------------------------------------------------------------------

_HOLDER = """
import sys, time
from hhdeploy.bundle.store import edit
with edit(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
print("done", flush=True)
"""


@pytest.fixture
def holder(bundle):
    """A process that is in the middle of an edit until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_HOLDER), str(bundle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_one_change_at_a_time(bundle, holder):
    said = []
    with pytest.raises(ConflictError, match=r"changing .*bundle for 1.2 seconds"):
        add_adapter(bundle, "guest", WITNESS / "rival", lock_timeout=1.2, progress=said.append)
    assert said == [f"waiting for another change of {bundle} to end"]
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert add(bundle).row == 3
    assert not (bundle / ".lock").exists()


def test_reading_needs_no_lock(bundle, holder):
    answer(bundle, "alpha", "float32/alpha")
    Bundle.open(bundle).check_files()


def test_a_change_inside_of_another_does_not_wait_for_itself(bundle):
    with edit(bundle), pytest.raises(ConflictError, match="one change began inside of another"):
        add(bundle)
    assert add(bundle).row == 3


def test_the_lock_of_a_killed_process_is_free(bundle, holder):
    holder.kill()
    holder.wait(60)
    assert (bundle / ".lock").exists()
    add_adapter(bundle, "guest", WITNESS / "rival", lock_timeout=0)
    assert not (bundle / ".lock").exists()


def waiting_thread(bundle, result) -> threading.Thread:
    """An `add_adapter` that waits for the lock; ``result`` gets its entry, or its error."""
    waiting = threading.Event()

    def work():
        try:
            result.append(
                add_adapter(bundle, "guest", WITNESS / "rival", progress=lambda step: waiting.set())
            )
        except BundleError as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(60)
    return thread


def looked(monkeypatch, times=1):
    """Wait until whoever waits for a bundle that is gone has looked again."""
    look, real = threading.Semaphore(0), hhdeploy.bundle.locking._Wait.for_the_bundle

    def counted(self):
        look.release()
        real(self)

    monkeypatch.setattr(hhdeploy.bundle.locking._Wait, "for_the_bundle", counted)
    return lambda: [look.acquire(timeout=60) for _ in range(times)] == [True] * times


@pytest.mark.parametrize("between", ["nothing", "no bundle"])
def test_a_bundle_that_is_gone_for_a_moment_is_waited_for(
    bundle, tmp_path, holder, monkeypatch, between
):
    """It is replaced without an exchange: nothing is there meanwhile, or not all of it yet."""
    result, again = [], looked(monkeypatch, times=3)
    thread = waiting_thread(bundle, result)
    bundle.rename(tmp_path / "away")
    if between == "no bundle":
        bundle.mkdir()
    assert again()
    if between == "no bundle":
        assert os.listdir(bundle) == []  # no lock where there is no bundle
        bundle.rmdir()
    copy_bundle(WITNESS / "added", tmp_path / "new")
    (tmp_path / "new").rename(bundle)
    thread.join(60)
    assert [entry.row for entry in result] == [4]
    assert [a.name for a in Bundle.open(tmp_path / "away").manifest.adapters] == ["alpha", "gamma"]
    assert (tmp_path / "away" / ".lock").exists()  # the holder's own
    assert not (bundle / ".lock").exists()


@pytest.mark.parametrize("becomes", ["away", "nothing"])
def test_no_directory_is_made_for_a_lock(bundle, tmp_path, monkeypatch, becomes):
    """The bundle goes after it was seen, before its lock is taken: its place stays free."""
    tried, seen = hhdeploy.bundle.locking._tried, []

    def gone(path, directory):
        if not seen:
            seen.append(path)
            if becomes == "away":
                bundle.rename(tmp_path / "away")
            else:
                shutil.rmtree(bundle)
        lock = tried(path, directory)
        assert not bundle.exists()
        copy_bundle(WITNESS / "added", tmp_path / "new")
        (tmp_path / "new").rename(bundle)
        monkeypatch.undo()
        return lock

    monkeypatch.setattr(hhdeploy.bundle.locking, "_tried", gone)
    assert add(bundle).row == 4
    assert seen == [bundle]
    assert not (bundle / ".lock").exists()


def test_a_lock_that_its_holder_removed_is_none(bundle, monkeypatch):
    """It is opened, and removed before it is locked: the next in line makes its own."""
    real, removed = fcntl.flock, []

    def late(handle, operation):
        if not removed:
            removed.append(handle)
            (bundle / ".lock").unlink()
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with edit(bundle), ThreadPoolExecutor(1) as other:
        assert len(removed) == 1
        late_one = other.submit(add_adapter, bundle, "guest", WITNESS / "rival", lock_timeout=0)
        with pytest.raises(ConflictError, match="has been changing"):
            late_one.result()
    assert not (bundle / ".lock").exists()


def test_a_bundle_that_stays_away_is_gone(bundle, tmp_path, holder, monkeypatch):
    monkeypatch.setattr(hhdeploy.bundle.locking, "_GONE_AFTER", 0.1)
    result = []
    thread = waiting_thread(bundle, result)
    bundle.rename(tmp_path / "away")
    thread.join(60)
    (error,) = result
    assert "is not a bundle" in str(error)
    assert not bundle.exists()


def test_the_lock_is_of_the_directory_that_is_there_now(bundle, tmp_path, holder):
    """While one waits, the bundle is replaced: it changes the new one, not the one that is gone."""
    result = []
    thread = waiting_thread(bundle, result)
    copy_bundle(WITNESS / "added", tmp_path / "new")
    bundle.rename(tmp_path / "away")
    (tmp_path / "new").rename(bundle)
    holder.stdin.write("\n")
    holder.stdin.flush()
    thread.join(60)
    assert [entry.row for entry in result] == [4]
    assert [a.name for a in Bundle.open(bundle).manifest.adapters][-2:] == ["rival", "guest"]
    assert [a.name for a in Bundle.open(tmp_path / "away").manifest.adapters] == ["alpha", "gamma"]
    assert not (tmp_path / "away" / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_not_worked_around(bundle, monkeypatch, number):
    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    before = contents(bundle)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(WriteError, match=r"Could not lock .*copy it to such a place"):
        add(bundle)
    assert {k: v for k, v in contents(bundle).items() if k != ".lock"} == before


def test_no_bundle_to_change(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="is not a bundle"):
            add(path)
    assert os.listdir(tmp_path) == []


# --- sources that change, disks that are full -----------------------------------------------------


def test_an_adapter_that_is_replaced_while_it_is_read(bundle, tmp_path, monkeypatch):
    """What was checked is what is stored: never the row of one, and the files of another."""
    source = copy_bundle(WITNESS / "rival", tmp_path / "source")
    before, real = contents(bundle), hhdeploy.bundle.membership.load_adapter

    def swapped(path):
        adapter = real(path)
        flip_byte(source / "adapter_model.safetensors")
        return adapter

    monkeypatch.setattr(hhdeploy.bundle.membership, "load_adapter", swapped)
    with pytest.raises(AdapterError, match="was changed while it was read"):
        add_adapter(bundle, "guest", source)
    assert contents(bundle) == before


def test_a_source_that_cannot_be_read_is_not_called_written(bundle, monkeypatch):
    real = os.open

    def refuse(path, *arguments, **options):
        if "rival" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    before = contents(bundle)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ReadError, match=r"^Could not read .*rival.*adapter_config\.json"):
        add(bundle)
    monkeypatch.undo()
    assert contents(bundle) == before


def test_a_signature_that_cannot_be_removed_does_not_hide_the_change(bundle):
    """The change is committed by then: that nothing was changed would be false."""
    (bundle / "model.sig").mkdir()
    with pytest.raises(WriteError, match=r"bundle was changed, and .*model\.sig, which .* Remove"):
        remove_adapter(bundle, "alpha")
    assert [entry.name for entry in Bundle.open(bundle).manifest.adapters] == ["gamma"]


# --- what the work relied on ----------------------------------------------------------------------


def test_what_is_kept(bundle):
    basis = Basis.of(Bundle.open(bundle).manifest)
    add(bundle)
    assert basis.kept_adapters(Bundle.open(bundle).manifest) == {"alpha", "gamma"}
    remove_adapter(bundle, "gamma")
    remove_adapter(bundle, "guest")
    assert basis.kept_adapters(Bundle.open(bundle).manifest) == {"alpha"}
    add(bundle, "gamma")  # another adapter, in the same row
    manifest = Bundle.open(bundle).manifest
    assert manifest.adapter("gamma").row == 2
    assert basis.kept_adapters(manifest) == {"alpha"}
    assert basis.kept_graphs(manifest) == {"float32"}


def test_another_graph_is_refused_and_nothing_is_written(bundle, tmp_path):
    basis = Basis.of(Bundle.open(WITNESS / "folded").manifest)
    before = contents(bundle)
    with (
        pytest.raises(ConflictError, match="was exported again meanwhile"),
        edit(bundle, basis),
    ):
        pytest.fail("the block must not run")
    assert contents(bundle) == before


# --- readers --------------------------------------------------------------------------------------


def test_who_opened_the_old_bundle_reads_it_to_its_end(bundle):
    opened = Bundle.open(bundle)
    bank, adapter = opened.bank(), opened.load_adapter("gamma")
    remove_adapter(bundle, "gamma")
    assert np.array_equal(opened.bank(), bank)
    assert opened.load_adapter("gamma").sites.keys() == adapter.sites.keys()
    add(bundle, "gamma")  # adapters/gamma is another one by now
    with pytest.raises(ConflictError, match="was changed by another process"):
        opened.load_adapter("gamma")
    with pytest.raises(ConflictError, match="was changed by another process"):
        opened.bank()


def test_what_is_held_stays(bundle):
    held = Bundle.open(bundle).hold()
    bank, images = held.bank(), held.reference()[0]
    for name in ("a", "b", "c"):
        add(bundle, name)
    assert np.array_equal(held.bank(), bank)
    assert np.array_equal(held.reference()[0], images)
    assert held.parity()["passed"] is True


def test_a_reader_starts_again(bundle):
    seen = []

    def work(opened):
        seen.append(opened)
        if len(seen) == 1:
            add(bundle, "a")
            add(bundle, "b")
        return opened.bank()

    assert len(read_bundle(bundle, work)) == 5
    assert len(seen) == 2


def test_a_reader_gives_up_with_the_reason(bundle):
    count = [0]

    def work(opened):
        count[0] += 1
        add(bundle, f"a{count[0]}")
        add(bundle, f"b{count[0]}")
        return opened.bank()

    with pytest.raises(ConflictError, match="changed 3 times while it was read"):
        read_bundle(bundle, work)
    assert count == [3]


def test_damage_is_damage(bundle):
    flip_byte(bundle / BANK_FILE)
    with pytest.raises(BundleError, match="expected sha256") as caught:
        read_bundle(bundle, lambda opened: opened.bank())
    assert not isinstance(caught.value, ConflictError)


def test_a_bundle_that_is_replaced_while_a_session_opens(bundle, tmp_path):
    """Never the graph of one and the bank of the other: what was opened is closed."""
    shutil.copytree(WITNESS / "added", tmp_path / "other")
    opened, closed = [], []

    def work(found):
        opened.append(found)
        if len(opened) == 1:
            bundle.rename(tmp_path / "away")
            (tmp_path / "other").rename(bundle)
        return len(opened)

    assert read_bundle(bundle, work, closed.append) == 2
    assert closed == [1]
    assert len(opened[1].manifest.adapters) == 3


# --- state that others left -----------------------------------------------------------------------


def test_an_unfinished_add_of_an_earlier_version_is_read_and_mended(bundle):
    """It wrote the new bank in place, and kept the valid one under another name."""
    os.link(bundle / BANK_FILE, bundle / "bank.safetensors.previous")
    bank = Bundle.open(bundle).bank()
    (bundle / BANK_FILE).unlink()
    (bundle / BANK_FILE).write_bytes(tensor_bytes({"adapter_bank": bank * 2}))
    shutil.copytree(WITNESS / "rival", bundle / "adapters" / "half")
    answer(bundle, "alpha", "float32/alpha")
    add(bundle)
    answer(bundle, "alpha", "float32/alpha")
    answer(bundle, "guest")
    # Such a version kept no journal: nobody can tell whose the folder is, so it stays.
    found = {n: d for n, d in hash_files(bundle).items() if not n.startswith("adapters/half/")}
    assert found == dict(Bundle.open(bundle).manifest.files)
    with pytest.raises(WriteError, match=r"adapters/half is there and is none of the bundle's"):
        add(bundle, "half")


def test_folders_beside_the_adapters_are_their_owner_s(bundle, tmp_path):
    """Somebody made an adapter in the bundle's own folder, and notes in one of the bundle's."""
    mine = bundle / "adapters" / "mine"
    shutil.copytree(WITNESS / "rival", mine)
    (bundle / "adapters" / "alpha" / "NOTES.md").write_text("mine")
    before = contents(mine)
    with pytest.raises(BundleError, match="unknown adapter"):
        remove_adapter(bundle, "nobody")
    with pytest.raises(WriteError, match=r"adapters/mine is there and is none of the bundle's"):
        add_adapter(bundle, "mine", mine)
    assert add_adapter(bundle, "guest", mine).row == 3
    remove_adapter(bundle, "alpha")
    remove_adapter(bundle, "guest")
    assert contents(mine) == before
    assert os.listdir(bundle / "adapters" / "alpha") == ["NOTES.md"]
    assert not (bundle / "adapters" / "guest").exists()
    assert not (bundle / ".changing").exists()


@pytest.mark.parametrize("linked", ["adapters", "adapters/alpha"])
def test_what_a_link_leads_to_is_not_changed(bundle, tmp_path, linked):
    shutil.move(bundle / linked, tmp_path / "shared")
    (bundle / linked).symlink_to(tmp_path / "shared")
    before = contents(tmp_path / "shared")
    with pytest.raises(WriteError, match=rf"{linked} is a symbolic link: what it leads to"):
        remove_adapter(bundle, "alpha")
    if linked == "adapters":
        with pytest.raises(WriteError, match="adapters is a symbolic link"):
            add(bundle)
    else:
        add(bundle)
    assert contents(tmp_path / "shared") == before
    answer(bundle, "alpha", "float32/alpha")


@pytest.mark.parametrize("name", [".old", ".README.md.new", ".changing", ".hhdeploy.json.new"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_what_no_change_makes_is_removed_from_the_names_that_it_writes_to(
    bundle, tmp_path, name, kind
):
    """A change wrote over what ``.old`` led to, made what other links led to, waited for pipes."""
    (tmp_path / "mine").mkdir()
    for own in ("bank.safetensors", "README.md"):
        (tmp_path / "mine" / own).write_text("mine")
    before = contents(tmp_path / "mine")
    if kind == "pipe":
        os.mkfifo(bundle / name)
    else:
        target = "mine" if name == ".old" else "mine/README.md"
        (bundle / name).symlink_to(tmp_path / (f"{target}.none" if "nothing" in kind else target))
    remove_adapter(bundle, "alpha")
    assert contents(tmp_path / "mine") == before
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "mine"}
    assert {p.name for p in bundle.iterdir() if p.name.startswith(".")} == {".old"}
    assert (bundle / ".old").is_dir()
    Bundle.open(bundle).check_files()


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"{",
        b"5",
        pytest.param(b"[" * 100_000, id="brackets"),
        b'["../away/x", "model.onnx", "adapters/x", 3, "adapters/../a/b"]',
    ],
)
def test_a_journal_that_nobody_wrote_removes_nothing(bundle, tmp_path, journal):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "x").write_text("mine")
    (bundle / ".changing").write_bytes(journal)
    before = contents(bundle)
    remove_adapter(bundle, add(bundle).name)
    after = contents(bundle)
    assert (tmp_path / "away" / "x").exists()
    assert {n: after[n] for n in before if n in after and n.startswith("model")} == {
        n: c for n, c in before.items() if n.startswith("model")
    }
    assert not (bundle / ".changing").exists()


def test_files_of_the_user_s_are_not_swept(bundle):
    for name in ("README.md", "model.best.onnx", "notes.json", "bank.old.safetensors"):
        (bundle / name).write_text("mine")
    add(bundle)
    remove_adapter(bundle, "guest")
    for name in ("README.md", "model.best.onnx", "notes.json", "bank.old.safetensors"):
        assert (bundle / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_names": ("one", "two")}, r"class_names: expected 7 names, found 2"),
        ({"row": 2}, r"expected every row once"),
        ({"name": "other"}, r"adapter 'other': expected its files in adapters/other, found none"),
        ({"extra": {"mine": Path("x")}}, r"PosixPath is not JSON serializable"),
    ],
)
def test_an_edit_that_no_reader_would_take_is_refused(bundle, change, said):
    before = contents(bundle)
    alpha, gamma = Bundle.open(bundle).manifest.adapters
    with pytest.raises(BundleError, match=rf"cannot be right .*{said}.* Nothing was changed"):  # noqa: SIM117
        with edit(bundle) as made:
            made.manifest = replace(made.manifest, adapters=(replace(alpha, **change), gamma))
    assert contents(bundle) == before


@pytest.mark.parametrize("classifier", ["head", ""])
def test_an_entry_has_its_adapter_s_strength(bundle, classifier):
    """Also where the graph gives no logits: else the adapter would not be the one in its row."""
    adapter = at_strength(load_adapter(WITNESS / "rival"), 0.5)
    facts = replace(Bundle.open(bundle).manifest.backbone, classifier=classifier)
    assert entry_of("guest", 3, adapter, facts, verified=False).strength == 0.5


def test_a_damaged_file_is_written_again(bundle):
    """Its content comes once more, from the same calibration, say: the bundle is whole again."""
    flip_byte(bundle / "parity.json")
    content = (WITNESS / "branches" / "parity.json").read_bytes()
    with edit(bundle) as change:
        named = change.store("parity.json", content)
    flip_byte(bundle / named)
    with pytest.raises(BundleError, match="expected sha256"):
        Bundle.open(bundle).read(named)
    with (bundle / named).open("rb") as stream:
        with edit(bundle) as change:
            assert change.store("parity.json", content) == named
        assert stream.read() != content, "who has the damaged one open keeps it"
    assert Bundle.open(bundle).read(named) == content
    assert contents(bundle).keys() >= {named}


@pytest.mark.parametrize("lost", ["adapters/alpha/adapter_config.json", "adapters/alpha"])
def test_an_adapter_whose_files_were_lost_is_removed(bundle, lost):
    """With all that else is done for that: nothing is left for the next change."""
    shutil.rmtree(bundle / lost) if (bundle / lost).is_dir() else (bundle / lost).unlink()
    remove_adapter(bundle, "alpha")
    assert {p.name for p in bundle.iterdir() if p.name.startswith(".")} == {".old"}
    assert not (bundle / "adapters" / "alpha").exists()
    Bundle.open(bundle).check_files()


def test_an_adapter_in_another_user_s_folder_keeps_nothing_else_from_being_tidied(
    bundle, monkeypatch
):
    replaced = os.replace

    def refuse(source, target):
        if "alpha" in str(source):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    remove_adapter(bundle, "alpha")
    assert {p.name for p in bundle.iterdir() if p.name.startswith(".")} == {".old"}
    Bundle.open(bundle).check_files()


@pytest.mark.parametrize("graph", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("change", [add, lambda path: remove_adapter(path, "alpha")])
def test_a_bundle_that_lost_a_graph_is_not_changed(bundle, graph, change):
    (bundle / graph).unlink()
    before = contents(bundle)
    with pytest.raises(
        BundleError, match=rf"/{graph}: expected a file of the bundle's model\.onnx"
    ):
        change(bundle)
    assert contents(bundle) == before


def test_what_was_measured_of_an_adapter_goes_with_it(bundle):
    """Another one of its name in its row would have its errors for its own."""
    answers = [{"adapter": "alpha"}, {"adapter": "gamma"}]
    with edit(bundle) as change:
        measured = {**change.bundle.parity(), "pictures": {"answers": answers}}
        change.store("parity.json", json_bytes(measured))
    remove_adapter(bundle, "alpha")
    assert Bundle.open(bundle).parity()["pictures"] == {"answers": answers[1:]}
    add(bundle, "alpha")
    assert {s["adapter"] for s in Bundle.open(bundle).parity()["stages"]} == {"gamma"}
    assert "(alpha)" not in (bundle / "README.md").read_text()
    Bundle.open(bundle).check_files()


@pytest.mark.parametrize(
    "name", ["../mine.json", "adapters/../../mine.json", "/mine.json", "", "."]
)
def test_what_is_stored_stays_in_the_bundle(bundle, tmp_path, name):
    named = str(tmp_path / "mine.json") if name.startswith("/") else name
    before = contents(tmp_path)
    with (
        pytest.raises(WriteError, match="expected the name of a file inside of"),
        edit(bundle) as made,
    ):
        made.store(named, b"mine")
    assert contents(tmp_path) == before


def test_a_name_that_is_another_adapter_s_on_the_file_system(tmp_path, monkeypatch):
    """As if it knew no case. It said to move the folder, which is the other adapter's, out."""
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    (bundle / "adapters" / "ALPHA").mkdir()
    before = contents(bundle)
    with pytest.raises(WriteError, match=r"ALPHA is there and is none of the bundle's adapters"):
        add_adapter(bundle, "ALPHA", WITNESS / "rival")
    monkeypatch.setattr(os.path, "samefile", lambda a, b: str(a).lower() == str(b).lower())
    with pytest.raises(WriteError, match=r"for 'ALPHA', found that of the adapter 'alpha': .*Add"):
        add_adapter(bundle, "ALPHA", WITNESS / "rival")
    assert contents(bundle) == before


def test_names_that_other_systems_cannot_have_are_said(tmp_path):
    """Whoever copied such a bundle to Windows or macOS was the first to know."""
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    for name, why in (
        ("Aux.v2", "Windows has no folder of this name"),
        ("v2.", "Windows has no folder of this name"),
        ("ALPHA", "Windows and macOS take it for the name of 'alpha'"),
        ("auxiliary", None),
    ):
        said: list[str] = []
        add_adapter(bundle, name, WITNESS / "rival", progress=said.append)
        told = f"adapter {name!r}: {why}: the bundle cannot be copied there"
        assert [line for line in said if "copied there" in line] == ([told] if why else [])
    assert "Aux.v2" in {a.name for a in Bundle.open(bundle).manifest.adapters}
