"""New directories: whole, at once, exclusive, and in the place of nothing that is not ours."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import hhdeploy.files.directories
from hhdeploy.adapters.directory import ADAPTER
from hhdeploy.bundle import add_adapter, remove_adapter
from hhdeploy.bundle.locking import BUNDLE, locked, undisturbed
from hhdeploy.bundle.manifest import hash_files
from hhdeploy.bundle.store import Change, edit
from hhdeploy.errors import ConflictError, OptionError, WriteError
from hhdeploy.exporters.triton import check_model_name
from hhdeploy.files.directories import Replaceable, atomic_directory, remove_directory
from hhdeploy.files.scratch import RETIRED, sweep
from hhdeploy.files.writing import write_json
from tests.workshop import COMMAND_SECONDS, contents, copy_bundle, small_disk

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"
ANY = Replaceable("anything", lambda path: None)


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def old_directory(tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "old.txt").write_text("old")
    return old


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_directory(target, overwrite=False, kind=ANY) as scratch:
        (scratch / "a").write_text("x")
        assert not target.exists()
        assert scratch.parent == target.parent, "another file system could not be renamed from"
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    out, synced, fsync = tmp_path / "out", [], os.fsync

    def seen(handle):
        synced.append((os.fstat(handle).st_ino, out.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    with atomic_directory(out, overwrite=False, kind=ANY) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "a").write_text("x")
    made = {(place.stat().st_ino, False) for place in (out, out / "deep", out / "deep" / "a")}
    assert made == set(synced[:-1])
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_nothing_is_left_on_failure(tmp_path):
    with (  # noqa: PT012  (the failure is planted in the block)
        pytest.raises(RuntimeError, match="planted"),
        atomic_directory(tmp_path / "out", overwrite=False, kind=ANY) as scratch,
    ):
        (scratch / "a").write_text("x")
        raise RuntimeError("planted")
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "out", overwrite=False, kind=ANY),
    ):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_existing_target_is_refused(tmp_path):
    old = old_directory(tmp_path)
    with (
        pytest.raises(WriteError, match=r"out already exists.*`overwrite=True`"),
        atomic_directory(old, overwrite=False, kind=ANY),
    ):
        pytest.fail("the block must not run")
    assert names(old) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_never_replaced_by_a_directory(tmp_path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(WriteError, match="is a file, not a directory"),
        atomic_directory(tmp_path / "out", overwrite=True, kind=ANY),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "a file"


def test_overwrite_replaces_the_whole(tmp_path):
    old = old_directory(tmp_path)
    with atomic_directory(old, overwrite=True, kind=ANY) as scratch:
        (scratch / "new.txt").write_text("new")
        assert names(old) == ["old.txt"]
    assert names(old) == ["new.txt"]
    assert names(tmp_path) == ["out"]


def test_the_old_one_stays_when_the_new_one_fails(tmp_path):
    old = old_directory(tmp_path)
    with (  # noqa: PT012  (the failure is planted in the block)
        pytest.raises(WriteError, match=r"Could not write .*out: .*disk is full.*was changed"),
        atomic_directory(old, overwrite=True, kind=ANY) as scratch,
    ):
        (scratch / "new.txt").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (old / "old.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_relative_targets_and_trailing_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    with atomic_directory(Path("x/../out"), overwrite=False, kind=ANY) as scratch:
        (scratch / "a").write_text("x")
    assert names(tmp_path) == ["out"]


# A file system that really refuses: files may grow to 64 KiB in the child process.
_CHILD = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hhdeploy.adapters.format import Adapter, AdapterConfig, SiteTensors, save_adapter
from hhdeploy.errors import WriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
out = Path(sys.argv[1])
big = np.ones((4, 8192), np.float32)
site = SiteTensors(lora_A=big, lora_B=np.ones((3, 4), np.float32))
try:
    save_adapter(Adapter(AdapterConfig("vit_x"), {"blocks.0.attn.proj": site}, None), out,
                 overwrite=True)
except WriteError as error:
    print(error)
else:
    sys.exit("the write succeeded")
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_write_that_the_system_cuts_short(tmp_path, there):
    if there:
        shutil.copytree(WITNESS / "rival", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert "ulimit -f" in done.stdout
    assert names(tmp_path) == (["out"] if there else [])
    if there:
        assert contents(tmp_path / "out") == contents(WITNESS / "rival")


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB, where the system lets us mount one."""
    with small_disk(tmp_path / "small", "64k") as place:
        yield place


def test_a_full_disk(full_disk):
    old = old_directory(full_disk)
    with (
        pytest.raises(WriteError, match="The disk is full"),
        atomic_directory(old, overwrite=True, kind=ANY) as scratch,
    ):
        (scratch / "big").write_bytes(b"x" * 200_000)
    assert names(full_disk) == ["out"]
    assert (old / "old.txt").read_text() == "old"


# --- what appeared meanwhile ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_appears_meanwhile_stays(tmp_path, kind):
    target = tmp_path / "out"
    with (  # noqa: PT012  (it appears in the block)
        pytest.raises(WriteError),
        atomic_directory(target, overwrite=False, kind=ANY) as scratch,
    ):
        (scratch / "a").write_text("x")
        if kind == "directory":
            target.mkdir()
            (target / "thesis.txt").write_text("mine")
        elif kind == "file":
            target.write_text("mine")
        else:
            target.symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path) == ["out"]
    if kind == "link":
        assert target.is_symlink()
    else:
        assert "mine" in (target / "thesis.txt" if kind == "directory" else target).read_text()


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out", overwrite=False, kind=ANY) as scratch:
        (scratch / "a").write_text("x")
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path, monkeypatch, exchange):
    """So it may be another user's, and where one stands."""
    if not exchange:
        monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: None)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to("real")
    others(monkeypatch, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "real")
    with (
        pytest.raises(WriteError, match="already exists"),
        atomic_directory(tmp_path / "link", overwrite=False, kind=ANY),
    ):
        pytest.fail("the block must not run")
    with atomic_directory(tmp_path / "link", overwrite=True, kind=ANY) as scratch:
        (scratch / "a").write_text("x")
    assert names(tmp_path / "real") == ["theirs"]
    assert names(tmp_path / "link") == ["a"]
    assert not (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]


def test_a_link_above_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link" / "out", overwrite=False, kind=ANY) as scratch:
        (scratch / "a").write_text("x")
    assert names(tmp_path / "real" / "out") == ["a"]


# --- only what hhdeploy wrote ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BUNDLE, ADAPTER])
def test_a_foreign_directory_is_refused_before_any_work(tmp_path, kind):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "src" / "paper.tex").write_text("mine")
    with (
        pytest.raises(WriteError, match=r"is not .* that hhdeploy wrote.*replaces nothing else"),
        atomic_directory(project, overwrite=True, kind=kind),
    ):
        pytest.fail("the block must not run")
    assert (project / "src" / "paper.tex").read_text() == "mine"


@pytest.mark.parametrize("where", ["notes.txt", "adapters/alpha/notes.txt", "deep/er/notes.txt"])
def test_a_bundle_with_something_of_the_user_s_is_refused(tmp_path, where):
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    (path / where).parent.mkdir(parents=True, exist_ok=True)
    (path / where).write_text("mine")
    with (
        pytest.raises(WriteError, match=r"notes\.txt, which no bundle has"),
        atomic_directory(path, overwrite=True, kind=BUNDLE),
    ):
        pytest.fail("the block must not run")
    assert (path / where).read_text() == "mine"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (None, r"no hhdeploy\.json that can be read\. "),
        (
            '{"schema_version": 99}',
            r"read \(.*schema_version: expected at most \d, found 99\. Upgrade",
        ),
        ("\ufeff{}", r"read \(.*cannot be read: Unexpected UTF-8 BOM"),
    ],
)
def test_why_a_bundle_cannot_be_read_that_is_not_replaced_is_said(tmp_path, found, why):
    """One of a later version was called none, and its owner told to remove it."""
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    (bundle / "hhdeploy.json").unlink()
    if found is not None:
        (bundle / "hhdeploy.json").write_text(found, encoding="utf-8")
    with (
        pytest.raises(WriteError, match=why),
        atomic_directory(bundle, overwrite=True, kind=BUNDLE),
    ):
        pytest.fail("it is refused before any work")


def test_an_adapter_is_no_bundle_and_a_bundle_no_adapter(tmp_path):
    """A typo in OUT must not cost the adapter that is to be exported."""
    for source, kind in ((WITNESS / "rival", BUNDLE), (WITNESS / "branches", ADAPTER)):
        path = copy_bundle(source, tmp_path / source.name)
        before = contents(path)
        with (
            pytest.raises(WriteError, match="that hhdeploy wrote"),
            atomic_directory(path, overwrite=True, kind=kind),
        ):
            pytest.fail("the block must not run")
        assert contents(path) == before


def test_a_peft_directory_is_not_an_adapter_of_ours(tmp_path):
    path = tmp_path / "peft"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (path / "adapter_model.safetensors").write_bytes(b"")
    with (
        pytest.raises(WriteError, match="peft_type HTA"),
        atomic_directory(path, overwrite=True, kind=ADAPTER),
    ):
        pytest.fail("the block must not run")


def test_something_foreign_that_appears_while_the_new_one_is_made(tmp_path):
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    with (  # noqa: PT012  (it appears in the block)
        pytest.raises(WriteError, match=r"notes\.txt"),
        atomic_directory(path, overwrite=True, kind=BUNDLE) as scratch,
    ):
        shutil.copytree(WITNESS / "added", scratch, dirs_exist_ok=True)
        (path / "notes.txt").write_text("mine")
    assert (path / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["bundle"]


def test_a_bundle_is_replaced_under_its_lock(tmp_path):
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    script = """
        import shutil, sys
        from hhdeploy.files.directories import atomic_directory
        from hhdeploy.bundle.locking import BUNDLE
        from pathlib import Path
        with atomic_directory(Path(sys.argv[1]), overwrite=True, kind=BUNDLE) as scratch:
            shutil.copytree(sys.argv[2], scratch, dirs_exist_ok=True)
            print("made", flush=True)
        print("replaced", flush=True)
    """
    with locked(path):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(path), str(WITNESS / "added")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        assert contents(path / "adapters") == contents(WITNESS / "branches" / "adapters")
    assert child.communicate(timeout=60)[0] == "replaced\n"
    assert contents(path) == contents(WITNESS / "added")
    assert names(tmp_path) == ["bundle"]


@pytest.fixture
def half_added(tmp_path, monkeypatch):
    """A bundle of which a process was killed between an adapter's files and its row."""
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Change, "store", killed)
    monkeypatch.setattr(Change, "undo", lambda change, progress: None)
    with pytest.raises(KeyboardInterrupt):
        add_adapter(path, "pets", WITNESS / "rival")
    monkeypatch.undo()
    assert (path / "adapters" / "pets").is_dir()
    return path


def test_what_a_crash_left_is_not_somebody_s(half_added):
    with atomic_directory(half_added, overwrite=True, kind=BUNDLE) as scratch:
        shutil.copytree(WITNESS / "added", scratch, dirs_exist_ok=True)
    assert contents(half_added) == contents(WITNESS / "added")


def test_what_lies_beside_what_a_crash_left_is(half_added):
    (half_added / "adapters" / "pets" / "notes.txt").write_text("mine")
    with (
        pytest.raises(WriteError, match=r"it holds adapters/pets/notes\.txt, which no bundle has"),
        atomic_directory(half_added, overwrite=True, kind=BUNDLE),
    ):
        pytest.fail("the block must not run")
    assert names(half_added / "adapters" / "pets") == ["notes.txt"]


def test_a_bundle_that_is_being_changed_is_judged_once_the_change_ended(tmp_path):
    """Half of an adapter lies in it meanwhile, which is nobody's."""
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    worked = []

    def replaced():
        kind = replace(BUNDLE, locked=partial(undisturbed, lock_timeout=0.1))
        with atomic_directory(path, overwrite=True, kind=kind) as scratch:
            worked.append(shutil.copytree(WITNESS / "added", scratch, dirs_exist_ok=True))

    with edit(path) as change, ThreadPoolExecutor(1) as other:
        change.copy_adapter("pets", WITNESS / "rival", hash_files(WITNESS / "rival"))
        with pytest.raises(ConflictError, match="another process has been changing"):
            other.submit(replaced).result()
        change.forget_adapter("pets")
    assert worked, "the work before was done while the other one changed it"
    assert contents(path / "adapters") == contents(WITNESS / "branches" / "adapters")
    replaced()
    assert contents(path) == contents(WITNESS / "added")


@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder"])
@pytest.mark.parametrize(
    ("source", "kind", "where"),
    [("branches", BUNDLE, "adapters/alpha/mine"), ("rival", ADAPTER, "mine")],
)
def test_what_is_no_plain_file_is_somebody_s_too(tmp_path, source, kind, where, what):
    path = copy_bundle(WITNESS / source, tmp_path / "out")
    mine = path / where
    if what == "link":
        mine.symlink_to(tmp_path)
    elif what == "dangling":
        mine.symlink_to("nowhere")
    elif what == "pipe":
        os.mkfifo(mine)
    else:
        mine.mkdir()
    with (
        pytest.raises(WriteError, match=f"it holds {where}, which no"),
        atomic_directory(path, overwrite=True, kind=kind),
    ):
        pytest.fail("the block must not run")
    assert os.path.lexists(mine)


def test_a_bundle_without_adapters_is_one(tmp_path):
    """Their empty folder stays when the last one is removed, and their own where files are lost."""
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    for file in (path / "adapters" / "gamma").iterdir():
        file.unlink()
    assert BUNDLE.foreign(path) is None
    for name in names(path / "adapters"):
        remove_adapter(path, name)
    assert names(path / "adapters") == []
    with atomic_directory(path, overwrite=True, kind=BUNDLE) as scratch:
        shutil.copytree(WITNESS / "added", scratch, dirs_exist_ok=True)
    assert contents(path) == contents(WITNESS / "added")


@pytest.mark.parametrize("call", ["open", "fsync of a directory"])
def test_a_file_in_it_that_cannot_be_written_is_told_of_the_whole(tmp_path, monkeypatch, call):
    """It was told of its scratch name, and as written where only its directory was not synced."""
    opened, synced = os.open, os.fsync

    def full(path, flags, *rest, **at):
        if call == "open" and "a.json" in os.fspath(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return opened(path, flags, *rest, **at)

    def unsynced(handle):
        if call != "open" and stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(handle)

    monkeypatch.setattr(os, "open", full)
    monkeypatch.setattr(os, "fsync", unsynced)
    with (
        pytest.raises(WriteError, match="The disk is full") as caught,
        atomic_directory(tmp_path / "out", overwrite=False, kind=ANY) as scratch,
    ):
        write_json(scratch / "a.json", {})
    assert str(caught.value).startswith(f"Could not write {tmp_path / 'out'}: No space left")
    assert names(tmp_path) == []


def test_what_cannot_be_written_elsewhere_meanwhile_is_told_of_that_place(tmp_path):
    """Such as a cache, or a file of temporary ones: the directory itself is not at fault."""
    with (
        pytest.raises(WriteError, match=f"^Could not write {tmp_path}/gone/b.json: No such file"),
        atomic_directory(tmp_path / "out", overwrite=False, kind=ANY),
    ):
        write_json(tmp_path / "gone" / "b.json", {})
    assert names(tmp_path) == []


# --- systems without an exchange ------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_without_an_exchange_the_old_one_is_moved_away_first(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        import ctypes

        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: refuse)
    old = old_directory(tmp_path)
    with atomic_directory(old, overwrite=True, kind=ANY) as scratch:
        (scratch / "new.txt").write_text("new")
    assert names(old) == ["new.txt"]
    assert names(tmp_path) == ["out"]


def test_what_a_failing_disk_does_not_exchange_stays(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: fails)
    old = old_directory(tmp_path)
    with (
        pytest.raises(WriteError, match="Input/output error"),
        atomic_directory(old, overwrite=True, kind=ANY) as scratch,
    ):
        (scratch / "new.txt").write_text("new")
    assert names(old) == ["old.txt"]


def test_a_libc_without_renameat2(tmp_path, monkeypatch):
    monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: None)
    test_overwrite_replaces_the_whole(tmp_path)


def test_the_old_one_is_put_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: None)
    old, real = old_directory(tmp_path), os.rename

    def refuse(source, target):
        if Path(target) == old and (Path(source) / "new.txt").exists():
            raise OSError(errno.ENOTEMPTY if old.exists() else errno.EIO, "planted", str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with (
        pytest.raises(WriteError, match="planted"),
        atomic_directory(old, overwrite=True, kind=ANY) as scratch,
    ):
        (scratch / "new.txt").write_text("new")
    assert names(old) == ["old.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("half", ["away", "in"])
def test_without_an_exchange_ctrl_c_loses_nothing(tmp_path, monkeypatch, half):
    """Between the two renames nothing is in its place: both directories were removed then."""
    monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: None)
    old, real = old_directory(tmp_path), os.rename

    def interrupted(source, target):
        real(source, target)
        if (Path(source) == old) == (half == "away"):
            raise KeyboardInterrupt  # as it comes: when the call is done

    monkeypatch.setattr(os, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(old, overwrite=True, kind=ANY) as scratch,
    ):
        (scratch / "new.txt").write_text("new")
    assert names(old) == ["old.txt" if half == "away" else "new.txt"]
    assert names(tmp_path) == ["out"]


def test_an_old_one_that_cannot_be_put_back_is_kept_and_found(tmp_path, monkeypatch):
    """It was removed with the scratch that it lay in."""
    monkeypatch.setattr(hhdeploy.files.directories, "_renameat2", lambda: None)
    old, real = old_directory(tmp_path), os.rename

    def refuse(source, target):
        if Path(target) == old:
            raise OSError(errno.ENOTEMPTY if old.exists() else errno.EIO, "planted", str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with (
            pytest.raises(
                WriteError, match=r"could not be moved back: planted.* as (.*/.replaced)"
            ),
            atomic_directory(old, overwrite=True, kind=ANY) as scratch,
        ):
            (scratch / "new.txt").write_text("new")
    with atomic_directory(old, overwrite=True, kind=ANY) as scratch:
        assert names(old) == ["old.txt"], "the next command that writes there puts it back"
        (scratch / "new.txt").write_text("new")
    assert names(tmp_path) == ["out"]


def test_a_crash_between_the_two_renames_is_mended_by_the_next_command(tmp_path):
    """For that moment nothing is in its place, and the old one is in a scratch directory."""
    scratch = tmp_path / ".out.hhdeploy-0123abcd"
    scratch.mkdir()
    shutil.copytree(WITNESS / "rival", scratch / RETIRED)
    with (
        pytest.raises(WriteError, match="already exists"),
        atomic_directory(tmp_path / "out", overwrite=False, kind=ADAPTER),
    ):
        pytest.fail("the block must not run")
    assert contents(tmp_path / "out") == contents(WITNESS / "rival")
    assert names(tmp_path) == ["out"]


def test_what_was_made_or_removed_is_not_taken_for_what_was_moved_away(tmp_path):
    """A model of a repository may have nearly any name; a kill left a half one in its scratch, and
    the next command put that in the repository's place."""
    with pytest.raises(OptionError):
        check_model_name(RETIRED)
    for name in ("out", "replaced"):
        (tmp_path / f".{name}.hhdeploy-0123abcd" / check_model_name("replaced")).mkdir(parents=True)
        sweep(tmp_path, name)
    assert names(tmp_path) == []


def test_the_empty_directory_one_stands_in_is_filled_and_stays_itself(tmp_path, monkeypatch):
    here = tmp_path / "out"
    here.mkdir()
    monkeypatch.chdir(here)
    before, synced = here.stat(), []
    monkeypatch.setattr(hhdeploy.files.directories, "sync_directory", synced.append)
    kind = Replaceable("anything", lambda path: None, last="a")
    with atomic_directory(Path(), overwrite=False, kind=kind) as scratch:
        (scratch / "a").write_text("x")
        (scratch / "deep").mkdir()
        (scratch / "deep" / "b").write_text("y")
    assert os.path.samestat(before, here.stat())
    assert sorted(os.listdir()) == ["a", "deep"], "seen from where the shell stands"
    assert synced == [here]
    assert (here / "deep" / "b").read_text() == "y"
    assert names(tmp_path) == ["out"]


def test_filling_ends_with_the_last_file_and_is_undone_where_it_fails(tmp_path, monkeypatch):
    here = tmp_path / "out"
    here.mkdir()
    monkeypatch.chdir(here)
    order, rename = [], os.rename

    def renamed(source, target):
        if Path(target).parent == here:
            order.append(Path(target).name)
            if Path(target).name == "a":
                raise OSError(errno.EIO, "planted")
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    kind = Replaceable("anything", lambda path: None, last="a")
    with (  # noqa: PT012  (the failure is in the end of the block)
        pytest.raises(WriteError, match="planted"),
        atomic_directory(Path(), overwrite=False, kind=kind) as scratch,
    ):
        for name in "abc":
            (scratch / name).write_text(name)
    assert order == ["b", "c", "a"]
    assert names(here) == []
    assert names(tmp_path) == ["out"]


def test_what_appears_in_the_directory_one_stands_in_is_not_written_over(tmp_path, monkeypatch):
    here = tmp_path / "out"
    here.mkdir()
    monkeypatch.chdir(here)
    with (  # noqa: PT012  (it appears in the block)
        pytest.raises(WriteError, match="already exists"),
        atomic_directory(Path(), overwrite=False, kind=ANY) as scratch,
    ):
        (scratch / "a").write_text("ours")
        (here / "a").write_text("theirs")
    assert contents(here) == {"a": b"theirs"}


@pytest.mark.parametrize("below", ["", "deep"])
def test_what_one_stands_in_is_not_replaced(tmp_path, monkeypatch, below):
    old = old_directory(tmp_path)
    (old / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(old / below)
    for place in (old, tmp_path / "link" / "out"):
        with (
            pytest.raises(WriteError, match="the directory you are in, or above it"),
            atomic_directory(place, overwrite=True, kind=ANY),
        ):
            pytest.fail("it is refused before any work")
    assert names(old) == ["deep", "old.txt"]


def test_who_stands_in_a_directory_that_is_gone_may_write_elsewhere(tmp_path, monkeypatch):
    old, gone = old_directory(tmp_path), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with atomic_directory(old, overwrite=True, kind=ANY) as scratch:
        (scratch / "a").write_text("x")
    assert names(old) == ["a"]


def others(monkeypatch, folder):
    """``folder`` is another user's: whoever runs the tests may do everything."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **how: Path(path) != folder and real(path, mode, **how)
    )


@pytest.mark.parametrize("where", ["..", ".", "deep", "deep/deeper"])
def test_what_could_not_be_removed_is_not_replaced(tmp_path, monkeypatch, where):
    """A hidden directory with another user's files stayed for ever."""
    old = old_directory(tmp_path)
    (old / "deep" / "deeper").mkdir(parents=True)
    (old / "deep" / "deeper" / "a").write_text("a")
    before = contents(old)
    others(monkeypatch, Path(os.path.normpath(old / where)))
    with (
        pytest.raises(WriteError, match=r"out: expected .*may not change .*belongs to user \d+"),
        atomic_directory(old, overwrite=True, kind=ANY),
    ):
        pytest.fail("it is refused before any work")
    with pytest.raises(WriteError, match="may not change"):
        remove_directory(old, ANY)
    assert names(tmp_path) == ["out"]
    assert contents(old) == before


@pytest.mark.parametrize("where", ["adapters", "adapters/gamma"])
def test_an_adapter_whose_files_would_stay_is_not_removed(tmp_path, monkeypatch, where):
    """They were nobody's then, and the bundle neither signed nor replaced."""
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    before = contents(bundle)
    others(monkeypatch, bundle / where)
    with pytest.raises(WriteError, match=r"adapters/gamma: expected .*may not change"):
        remove_adapter(bundle, "gamma")
    assert contents(bundle) == before
    shutil.rmtree(bundle / "adapters" / "gamma")  # lost already
    if where != "adapters":
        remove_adapter(bundle, "gamma")


def test_a_directory_is_removed_whole_and_only_of_its_kind(tmp_path, monkeypatch):
    old = old_directory(tmp_path)
    with pytest.raises(WriteError, match=r"out is not anything that hhdeploy wrote: it is mine"):
        remove_directory(old, Replaceable("anything", lambda path: "it is mine"))
    assert names(old) == ["old.txt"]
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "link").symlink_to(other)
    remove_directory(tmp_path / "link", ANY)
    assert names(tmp_path) == ["other", "out"], "what a link leads to is anybody's"
    monkeypatch.chdir(old)
    with pytest.raises(WriteError, match="the directory you are in"):
        remove_directory(old, ANY)
    monkeypatch.chdir(tmp_path)
    remove_directory(old, ANY)
    assert names(tmp_path) == ["other"]


@pytest.mark.parametrize("meanwhile", ["changed", "removed"])
def test_what_is_to_be_removed_is_judged_while_nobody_changes_it(tmp_path, monkeypatch, meanwhile):
    old, held, synced = old_directory(tmp_path), [], []

    @contextlib.contextmanager
    def locked(path, *, lock_timeout=None):
        held.append(path)
        if len(held) == 2 and meanwhile == "changed":
            (path / "mine").write_text("mine")
        elif len(held) == 2:
            shutil.rmtree(path)
        yield

    monkeypatch.setattr(hhdeploy.files.directories, "sync_directory", synced.append)
    kind = Replaceable("x", lambda p: "it is mine" if (p / "mine").exists() else None, locked)
    changed = pytest.raises(WriteError, match="it is mine")
    with changed if meanwhile == "changed" else contextlib.nullcontext():
        remove_directory(old, kind)
    assert old.exists() == (meanwhile == "changed")
    assert synced == ([] if meanwhile == "changed" else [tmp_path])
