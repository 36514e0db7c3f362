"""Caches: entries whole or absent, the ones used last kept, other processes left in peace."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from hhdeploy.errors import PlanError, ReadError, WriteError
from hhdeploy.files import caches, scratch
from hhdeploy.files.caches import (
    DEFAULT_LIMIT,
    CacheWarning,
    clear,
    entry_at,
    key_of,
    size_limit,
    stored_in,
)
from hhdeploy.files.writing import os_errors
from tests.workshop import ROOT, contents

LIMIT = "HHDEPLOY_CACHE_LIMIT"
PATIENCE = 60.0


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def blob(root, key, suffix=".bin"):
    return entry_at(root, "kernels", key_of(str(key)) + suffix)


def folder(root, key):
    return entry_at(root, "base", key_of(str(key)))


def put(entry, size=100):
    """Store a file, or a directory of two, of ``size`` bytes in all."""
    with entry.store() as made:
        if made.name and entry.path.suffix:
            made.write_bytes(b"x" * size)
        else:
            made.mkdir()
            (made / "a").write_bytes(b"x" * (size // 3))
            (made / "b").write_bytes(b"x" * (size - size // 3))
    return entry


def there(*entries):
    return [entry.path.exists() for entry in entries]


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_a_key_tells_where_a_fact_ends():
    assert key_of("1.2", "34") != key_of("1.23", "4") != key_of("1.234")


# --- one entry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [blob, folder])
def test_an_entry_appears_whole_and_is_found(root, place):
    entry = place(root, 1)
    assert entry.read(Path.exists) is None
    with entry.store() as made:
        if place is blob:
            made.write_bytes(b"some")
        else:
            made.mkdir()
            (made / "a").write_bytes(b"some")
        assert not entry.path.exists()
        assert made.is_relative_to(entry.path.parent), "another file system could not be moved from"
    assert entry.read(lambda path: (path if place is blob else path / "a").read_bytes()) == b"some"
    assert names(entry.path.parent) == [entry.path.name]


@pytest.mark.parametrize("place", [blob, folder])
def test_a_newer_one_replaces_an_older_one(root, place):
    entry = put(place(root, 1), 30)
    put(entry, 60)
    assert [(e.path, e.size) for e in stored_in(root)] == [(entry.path, 60)]
    assert names(entry.path.parent) == [entry.path.name]


def test_a_making_that_fails_leaves_what_was_there(root):
    entry = put(folder(root, 1), 30)
    with pytest.raises(RuntimeError, match="planted"), entry.store() as made:  # noqa: PT012
        made.mkdir()
        raise RuntimeError("planted")
    assert entry.read(lambda path: names(path)) == ["a", "b"]
    assert names(entry.path.parent) == [entry.path.name]


def test_a_full_disk_is_told_by_the_entry_s_name(root):
    entry = blob(root, 1)
    with pytest.raises(WriteError) as caught, entry.store(), os_errors(entry.path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert f"Could not write {entry.path}: " in str(caught.value)
    assert "disk is full" in str(caught.value)
    assert "HHDEPLOY_CACHE" in str(caught.value)
    assert names(entry.path.parent) == []


def test_a_full_disk_is_told_by_the_entry_s_name_whatever_writes_a_file_of_it(root):
    entry = folder(root, 1)
    with pytest.raises(WriteError) as caught, entry.store() as made:  # noqa: PT012
        made.mkdir()
        with os_errors(made / "a.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert f"Could not write {entry.path}: " in str(caught.value)
    assert "disk is full" in str(caught.value)
    assert "HHDEPLOY_CACHE" in str(caught.value)
    assert names(entry.path.parent) == []


def test_a_read_error_is_no_write_error(root):
    entry = blob(root, 1)
    with pytest.raises(OSError, match="Input/output"), entry.store():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    put(entry)

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        entry.read(fail)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"HHDEPLOY_CACHE.*`cache=None`"):
        put(blob(tmp_path / "file", 1))
    with pytest.warns(CacheWarning, match=r"is used, and not kept.*HHDEPLOY_CACHE.*`cache=None`"):
        assert blob(tmp_path / "file", 1).keep(Path.touch) is None


def test_two_that_store_the_same_at_the_same_time(root, monkeypatch):
    """The other's directory appears between our two renames: it stays, and is no error."""
    entry, replace = folder(root, 1), Path.replace

    def raced(path, target):
        if target == entry.path and not entry.path.exists():
            entry.path.mkdir()
            (entry.path / "theirs").write_text("")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", raced)
    put(entry)
    assert names(entry.path) == ["theirs"]
    assert names(entry.path.parent) == [entry.path.name]


# --- readers ------------------------------------------------------------------------------------


def test_an_entry_that_vanishes_while_it_is_read_is_none(root):
    entry = put(folder(root, 1))

    def load(path):
        (path / "a").read_bytes()
        clear(root)
        return (path / "b").read_bytes()

    assert entry.read(load) is None


def test_an_entry_that_is_replaced_while_it_is_read_is_read_again(root):
    entry, sizes = put(folder(root, 1), 30), []

    def load(path):
        sizes.append(len((path / "a").read_bytes()))
        if len(sizes) == 1:
            put(entry, 300)
            raise ValueError("half of the old, half of the new one")
        return "whole"

    assert entry.read(load) == "whole"
    assert sizes == [10, 100]


def test_one_that_is_damaged_and_stays_is_told(root):
    calls = []

    def load(path):
        calls.append(path)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        put(folder(root, 1)).read(load)
    assert len(calls) == 1


@pytest.mark.parametrize("where", ["the entry", "a file of it"])
def test_a_pipe_in_a_cache_is_not_waited_for(root, where):
    """Where everybody may write, anybody may make one: a command never ended."""
    entry = put(blob(root, 1) if where == "the entry" else folder(root, 1))
    file = entry.path if where == "the entry" else entry.path / "a"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match="a plain file was expected"):
        entry.read(lambda path: pytest.fail("it would wait for it"))
    put(entry)
    assert entry.read(lambda path: "whole") == "whole"


def test_an_open_file_outlives_its_entry(root):
    entry = put(blob(root, 1))
    with entry.path.open("rb") as stream:
        clear(root)
        assert not entry.path.exists()
        assert len(stream.read()) == 100


def test_a_cache_that_may_only_be_read_is_used(root, monkeypatch):
    entry = put(blob(root, 1))

    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert entry.read(lambda path: len(path.read_bytes())) == 100


# --- the limit ----------------------------------------------------------------------------------


def test_those_used_longest_ago_make_room_whatever_their_kind(root, monkeypatch):
    monkeypatch.setenv(LIMIT, "350")
    entries = [put(place(root, i)) for i, place in enumerate((folder, blob, folder))]
    for age, entry in enumerate(entries):
        os.utime(entry.path, (age, age))
    entries[0].read(Path.exists)  # used now
    new = put(blob(root, 3))
    assert there(*entries, new) == [True, False, True, True]
    put(blob(root, 4), 240)
    assert there(*entries, new) == [False, False, False, True]
    assert sum(entry.size for entry in stored_in(root)) <= 350
    assert [names(root / kind) for kind in ("base", "kernels")] == [
        [],
        sorted(e.path.name for e in stored_in(root)),
    ]


def test_one_larger_than_the_limit_is_not_kept_and_costs_no_other(root, monkeypatch):
    monkeypatch.setenv(LIMIT, "350")
    small, large = put(blob(root, 1)), put(folder(root, 2), 351)
    assert there(small, large) == [True, False]
    put(large, 350)
    assert there(small, large) == [False, True]


def test_a_limit_of_nothing_keeps_nothing(root, monkeypatch):
    entry = put(blob(root, 1))
    monkeypatch.setenv(LIMIT, "0")
    put(blob(root, 2))
    assert there(entry, blob(root, 2)) == [True, False]


def test_what_was_stored_now_stays_beside_entries_of_the_future(root, monkeypatch):
    monkeypatch.setenv(LIMIT, "150")
    later = put(blob(root, 1))
    os.utime(later.path, (4e9, 4e9))
    now = put(blob(root, 2))
    assert there(later, now) == [False, True]


def test_an_entry_that_another_user_keeps_is_no_error(root, monkeypatch):
    monkeypatch.setenv(LIMIT, "150")
    older, old, rename = put(blob(root, 0), 50), put(blob(root, 1)), Path.rename
    os.utime(older.path, (1, 1))
    os.utime(old.path, (2, 2))

    def refuse(path, target):
        if path == old.path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert there(old, put(blob(root, 2)), older) == [True, True, False]
    with pytest.raises(WriteError, match=r"Could not remove .*Permission denied"):
        clear(root)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", DEFAULT_LIMIT),
        ("0", 0),
        ("123", 123),
        ("123b", 123),
        ("500MB", 500 * 10**6),
        ("1.5 gb", 15 * 10**8),
        ("8GiB", 8 << 30),
        ("2T", 2 * 10**12),
    ],
)
def test_the_limit_is_what_the_environment_says(monkeypatch, root, text, size):
    monkeypatch.setenv(LIMIT, text)
    assert size_limit() == size
    assert blob(root, 1).limit == size


@pytest.mark.parametrize("text", ["much", "-1", "1 PB", "GB", "1,5GB", "1e9"])
def test_a_limit_that_is_no_size_is_refused_before_anything_is_made(monkeypatch, root, text):
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(PlanError, match=rf"{LIMIT}: expected a size such as 20GB.*{text!r}"):
        blob(root, 1)
    assert not root.exists()


# --- list and clear -----------------------------------------------------------------------------


def test_what_is_stored_is_listed_the_last_used_first(root):
    entries = [put(folder(root, 1), 30), put(blob(root, 2), 20)]
    for age, entry in enumerate(entries):
        os.utime(entry.path, (age, age))
    found = [(e.kind, e.path, e.size, e.used) for e in stored_in(root)]
    assert found == [
        ("kernels", entries[1].path, 20, 1.0),
        ("base", entries[0].path, 30, 0.0),
    ]


def test_nothing_is_listed_or_made_where_nothing_is(root):
    assert stored_in(root) == []
    assert clear(root) == []
    assert not root.exists()


def test_kinds_are_cleared_apart(root):
    base, kernels = put(folder(root, 1)), put(blob(root, 2))
    assert [entry.path for entry in clear(root, ["base"])] == [base.path]
    assert there(base, kernels) == [False, True]
    assert [entry.path for entry in clear(root)] == [kernels.path]
    assert names(root / "base") == names(root / "kernels") == []


def test_other_things_in_the_directory_are_left_alone(root, monkeypatch):
    """Somebody may keep a cache in a directory of his own."""
    copy = f"kernels/{key_of('1')}.bin-copy"
    for name in ("base/mine/a", "base/.hidden/a", copy, "kernels/.new", "photos/b"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("precious")
    before = contents(root)
    monkeypatch.setenv(LIMIT, "100")
    put(blob(root, 1))
    put(blob(root, 2))
    assert len(clear(root)) == 1
    assert contents(root) == before


def test_what_another_process_removes_meanwhile_is_no_error(root, monkeypatch):
    put(blob(root, 1))
    listed = stored_in(root)
    clear(root)
    monkeypatch.setattr(caches, "stored_in", lambda root: listed)
    assert clear(root) == []
    monkeypatch.undo()
    blob(root, 1).path.symlink_to("gone")  # as one that goes between its listing and its size
    assert stored_in(root) == []


def test_a_cache_that_cannot_be_read_is_told(root, monkeypatch):
    put(blob(root, 1))

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ReadError, match=r"cannot be read: Permission denied"):
        stored_in(root)
    assert put(blob(root, 2)).path.exists()  # without room being made


# --- other processes ----------------------------------------------------------------------------

_STORING = """
import sys
from pathlib import Path
from hhdeploy.files.caches import entry_at

with entry_at(Path(sys.argv[1]), "base", sys.argv[2]).store() as made:
    made.mkdir()
    (made / "half").write_text("half")
    print("half way", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def storing(root, key):
    """A process that is half way through storing an entry, until a line comes."""
    command = [sys.executable, "-c", _STORING, str(root), key_of(key)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stdout.readline() == "half way\n"
            yield process
        finally:
            process.kill()


def scratch_of(root):
    return [p for kind in root.iterdir() if kind.is_dir() for p in kind.glob(".*")]


@pytest.mark.parametrize("sweep", [lambda root: put(blob(root, 1)), clear])
def test_what_a_dead_process_left_is_swept_and_what_a_live_one_makes_is_not(root, sweep):
    with storing(root, "a") as live:
        with storing(root, "b") as killed:
            assert len(scratch_of(root)) == 2
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        sweep(root)
        assert len(scratch_of(root)) == 1
        live.communicate("\n", timeout=PATIENCE)
        assert live.returncode == 0
    assert (folder(root, "a").path / "half").read_text() == "half"
    assert scratch_of(root) == []
    assert not folder(root, "b").path.exists()


@pytest.mark.parametrize("how", ["refused", "absent"])
def test_without_locks_nothing_is_swept(root, monkeypatch, how):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if how == "absent":
        monkeypatch.setattr(scratch, "fcntl", None)
    else:
        monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    with blob(root, 1).store() as made:
        made.write_bytes(b"x")
        put(blob(root, 2))
        assert made.exists()
    assert there(blob(root, 1), blob(root, 2)) == [True, True]
    assert scratch_of(root) == []


_BUSY = """
import os, random, sys
from pathlib import Path
from hhdeploy.files.caches import entry_at, key_of

root, seed = Path(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
hits = 0

def load(path):
    a, b = (path / "a").read_bytes(), (path / "b").read_bytes()
    if not (a == b == path.name.encode() * 10):
        raise ValueError(f"half of something: {a[:9]!r} {b[:9]!r}")
    return True

for turn in range(150):
    entry = entry_at(root, random.choice(["base", "calibration"]), key_of(str(random.randrange(6))))
    if entry.read(load) and random.random() < 0.7:
        hits += 1
        continue
    with entry.store() as made:
        made.mkdir()
        for name in "ab":
            (made / name).write_bytes(entry.path.name.encode() * 10)
print(hits)
"""


def test_processes_that_store_read_and_evict_at_the_same_time(root):
    """Twelve entries of 640 bytes, room for five; every read is an entry or none."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), LIMIT: "3300"}
    command = [sys.executable, "-c", _BUSY, str(root)]
    processes = [
        subprocess.Popen(
            [*command, str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    try:
        results = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert all(int(out) > 0 for out, _ in results), "nobody ever found an entry"
    found = stored_in(root)
    assert 0 < sum(entry.size for entry in found) <= 3300
    assert scratch_of(root) == []
    assert random.choice(found).size == 640
