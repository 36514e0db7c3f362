"""Scratch that ends with its process, however that ends, and with no other's."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from hhdeploy.files import scratch
from hhdeploy.files.scratch import (
    alone_in,
    held_file,
    scratch_directory,
    scratch_file,
    sweep,
    sweep_all,
)

_CHILD = """
import sys, time
from pathlib import Path
from hhdeploy.files.scratch import scratch_directory, scratch_file
with scratch_directory(Path(sys.argv[1]), "out") as folder, scratch_file(Path(sys.argv[1]), "out"):
    (folder / "a").write_text("x")
    print("made", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def child(tmp_path):
    """A process that has a scratch directory and a scratch file."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_is_gone_at_the_end(tmp_path):
    with scratch_directory(tmp_path, "out") as folder, scratch_file(tmp_path, "out") as file:
        (folder / "a").write_text("x")
        assert file.read_bytes() == b""
        assert folder.name.startswith(".out.hhdeploy-")
        assert len(folder.name) == len("out") + 19  # which an error says
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == []


def test_a_living_process_keeps_its_own(tmp_path, child):
    before = sorted(os.listdir(tmp_path))
    assert len(before) == 2
    sweep(tmp_path, "out")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_keeps_nothing(tmp_path, child, number):
    child.send_signal(number)
    child.wait(60)
    assert len(os.listdir(tmp_path)) == 2
    with scratch_directory(tmp_path, "other"):
        assert len(os.listdir(tmp_path)) == 3, "another's is not for this one to sweep"
    with scratch_directory(tmp_path, "out"):
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_what_only_looks_alike_stays(tmp_path):
    for name in (".out.hhdeploy", ".outer.hhdeploy-1", "out.hhdeploy-1", ".out.backup-1"):
        (tmp_path / name).mkdir()
    sweep(tmp_path, "out")
    assert len(os.listdir(tmp_path)) == 4


def test_scratch_of_all_kinds_is_swept_where_it_is_asked_for(tmp_path, child):
    """But for a living process's, and what only looks alike."""
    living = {p.name for p in tmp_path.iterdir()}
    stays = {".x.hhdeploy-1234567", ".x.hhdeploy-123456789", "x.hhdeploy-12345678"}
    for name in (*stays, ".x.hhdeploy-12345678", ".y.sig.hhdeploy-0a0b0c0d"):
        (tmp_path / name).touch()
    sweep_all(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == living | stays


def test_what_is_swept_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """Another process sweeps between the two, or looks whether it may."""
    hold, swept = scratch._hold, []

    def late(path, *, by_maker=False):
        if len(swept) < 2:
            swept.append(path)
            raise (FileNotFoundError, BlockingIOError)[len(swept) - 1]
        return hold(path, by_maker=by_maker)

    monkeypatch.setattr(scratch, "_hold", late)
    with scratch_directory(tmp_path, "out") as folder:
        assert folder.is_dir()
    assert len(swept) == 2
    sweep(tmp_path / "none", "out")


def test_one_process_at_a_time_is_alone_in_a_directory(tmp_path):
    with alone_in(tmp_path):
        handle = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    with alone_in(tmp_path):  # again, as it was given back
        assert os.listdir(tmp_path) == []


def test_a_link_is_neither_followed_nor_a_crash(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / ".out.hhdeploy-0123abcd").symlink_to(tmp_path / "mine")
    sweep(tmp_path, "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_what_was_made_anew_while_it_was_taken_is_another_s(tmp_path, monkeypatch):
    """Between opening a dead one's file and locking it: another sweeps it and makes its own."""
    path, flock = tmp_path / ".out.hhdeploy-0123abcd", fcntl.flock
    path.touch()

    def late(handle, operation):
        path.unlink()
        path.write_text("another's")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    sweep(tmp_path, "out")
    assert path.read_text() == "another's"


def test_a_pipe_is_not_waited_for(tmp_path):
    """Anybody may make one where everybody may write."""
    os.mkfifo(tmp_path / ".out.hhdeploy-00000000")
    os.mkfifo(tmp_path / "lock")
    with scratch_directory(tmp_path, "out") as folder, held_file(tmp_path / "lock"):
        assert sorted(os.listdir(tmp_path)) == [folder.name, "lock"]
    assert os.listdir(tmp_path) == []


def test_names_with_the_signs_of_patterns(tmp_path):
    with scratch_directory(tmp_path, "a[b]*") as folder:
        assert folder.is_dir()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_nothing_is_swept(tmp_path, monkeypatch, number):
    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.hhdeploy-0123abcd").mkdir()
    with scratch_directory(tmp_path, "out") as folder:
        assert folder.is_dir()
    assert os.listdir(tmp_path) == [".out.hhdeploy-0123abcd"]


def test_what_cannot_be_removed_at_the_end_hides_no_error(tmp_path, monkeypatch):
    """Of a disk that is read-only since its first error, that error is to be told."""

    def refuse(path, **at):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    for make in (scratch_directory, scratch_file, lambda place, name: held_file(place / name)):
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, refuse)
            with pytest.raises(OSError, match="the first"), make(tmp_path, "out"):
                raise OSError(errno.EIO, "the first")
            with make(tmp_path, "other"):
                pass


def test_in_the_directory_of_temporary_files_it_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory(None, "twin") as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o077 == 0


def test_a_held_file_is_one_holder_s(tmp_path):
    path = tmp_path / "lock"
    with held_file(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(BlockingIOError), held_file(path):
            pass
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()
    path.write_text("99999")  # of a process that was killed
    with held_file(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_of_many_at_once_one_holds_the_file(tmp_path):
    path, inside, most = tmp_path / "lock", [], []
    path.write_text("99999")

    def ask(number):
        for _ in range(50):
            try:
                with held_file(path):
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)
            except BlockingIOError:
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert set(most) == {1}
    assert not path.exists()
