"""Atomic writes: whole or absent, and the old one stays when the new one fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from hhdeploy import open_session
from hhdeploy.bundle import Bundle, remove_adapter
from hhdeploy.errors import HhdeployError, ReadError, WriteError
from hhdeploy.files.directories import Replaceable, atomic_directory
from hhdeploy.files.writing import (
    atomic_file,
    cache_of,
    copy_directory,
    os_errors,
    placed_here,
    sha256_of,
    temporary_directory,
    write_bytes,
    write_json,
)
from tests.workshop import copy_bundle, small_disk

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_a_file_appears_whole_or_stays(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"b": [1, 2]})
    assert json.loads(target.read_text()) == {"b": [1, 2]}
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    with pytest.raises(RuntimeError), atomic_file(target) as scratch:  # noqa: PT012
        scratch.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"b": [1, 2]}
    assert names(tmp_path) == ["a.json"]


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, 1)
    with pytest.raises(TypeError):
        write_json(target, {1, 2})
    assert target.read_text() == "1\n"
    assert names(tmp_path) == ["a.json"]


def test_a_file_in_a_directory_that_is_missing(tmp_path):
    with pytest.raises(WriteError, match=r"Could not write .*none/a\.json: No such file"):
        write_json(tmp_path / "none" / "a.json", 1)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "disk is full, or has no room for more files (df -i)"),
        (errno.ENAMETOOLONG, "under a name of 19 bytes more"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "may write to"),
        (errno.EROFS, "read-only"),
        (errno.EXDEV, "lower layer of an overlay"),
        (errno.EIO, "Nothing that was there before was changed"),
    ],
)
def test_messages_of_the_file_system(tmp_path, number, hint):
    with pytest.raises(WriteError) as caught, os_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert hint in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


# --- what is there already ------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True])
def test_what_an_interrupt_leaves_in_its_place_is_known(tmp_path, monkeypatch, done):
    target, rename = tmp_path / "a", os.replace
    target.write_text("old")

    def interrupted(made, place):
        if done:
            rename(made, place)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, placed_here() as record:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt), atomic_file(target, named=target) as scratch:
            scratch.write_text("new")
    assert (list(record), target.read_text()) == (([target], "new") if done else ([], "old"))
    with placed_here() as record:
        for _ in range(2):
            with atomic_file(target, named=target) as scratch:
                scratch.write_text("newer")
    with atomic_file(tmp_path / "b", named=tmp_path / "b") as scratch:
        scratch.write_text("after the block")
    assert list(record) == [target]


def test_a_shorter_file_has_nothing_of_the_longer_one_that_a_crash_left(tmp_path):
    write_bytes(tmp_path / "a", b"longer")
    write_bytes(tmp_path / "a", b"short")
    assert (tmp_path / "a").read_bytes() == b"short"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("deep/real.json")
    (tmp_path / "dangling.json").symlink_to("deep/new.json")
    for name in ("link", "dangling"):
        write_json(tmp_path / f"{name}.json", 1)
        assert (tmp_path / f"{name}.json").is_symlink()
    assert names(tmp_path / "deep") == ["new.json", "real.json"]
    assert {p.read_text() for p in (tmp_path / "deep").iterdir()} == {"1\n"}


def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(WriteError, match=r"Could not write .*loop"):
        write_json(tmp_path / "loop", 1)
    assert names(tmp_path) == ["loop"]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_permissions_are_kept(tmp_path, mode):
    target = tmp_path / "a.json"
    target.write_text("old")
    target.chmod(mode)
    write_json(target, 1)
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("1\n", mode)


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit((tmp_path / "pipe").read_bytes)
        write_json(tmp_path / "pipe", {"a": 1})
        assert json.loads(found.result(timeout=10)) == {"a": 1}
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_process_substitution_is_written_to():
    """bash's ``>(wc -c)``: a pipe that has no path but /dev/fd/N."""
    reading, writing = os.pipe()
    try:
        write_json(Path(f"/dev/fd/{writing}"), 1)
        assert os.read(reading, 10) == b"1\n"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_device_stays_one(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except PermissionError:
        pytest.skip("devices need root")
    write_json(null, 1)
    assert null.is_char_device()
    assert names(tmp_path) == ["null"]


def test_a_file_without_a_name_is_written_to(tmp_path):
    """As a shell passes one that was removed: its path is that of another, which was made."""
    with (tmp_path / "a").open("w+") as stream:
        (tmp_path / "a").unlink()
        with atomic_file(Path(f"/dev/fd/{stream.fileno()}")) as scratch:
            scratch.write_text("x")
        assert stream.read() == "x"
    assert names(tmp_path) == []


def test_nothing_reaches_a_pipe_when_the_content_fails(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "pipe"):
        raise RuntimeError
    assert (tmp_path / "pipe").is_fifo()


# --- reading is not writing -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EMFILE])
def test_what_cannot_be_read_is_not_called_written(tmp_path, number):
    target = tmp_path / "out"
    for source in (tmp_path / "source" / "a", tmp_path / ".outer.hhdeploy-0123abcd"):
        with pytest.raises(ReadError) as caught, os_errors(target):
            raise OSError(number, os.strerror(number), str(source))
        message = str(caught.value)
        assert message.startswith(f"Could not read {source}, which {target} is made from")
        assert os.strerror(number) in message


@pytest.mark.parametrize("inside", ["", "a", ".out.hhdeploy-0123abcd/a", "../"])
def test_what_is_written_is_named(tmp_path, inside):
    target = tmp_path / "deep" / "out"
    path = target.parent / inside if inside.startswith(".") else target / inside
    with (
        pytest.raises(WriteError, match=r"^Could not write .*out: Permission denied"),
        os_errors(target),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_full_disk_is_of_writing_whatever_it_names(tmp_path):
    with pytest.raises(WriteError, match="The disk is full"), os_errors(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/scratch")


def test_a_rename_from_elsewhere_is_of_writing(tmp_path):
    with pytest.raises(WriteError), os_errors(tmp_path / "out"):
        raise OSError(errno.EXDEV, "x", "/elsewhere", None, str(tmp_path / "out" / "a"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_source_that_cannot_be_copied(tmp_path, monkeypatch, number):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("x")
    real = os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith("source/a"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HhdeployError) as caught, os_errors(tmp_path / "copy"):
        copy_directory(tmp_path / "source", tmp_path / "copy")
    assert isinstance(caught.value, ReadError)
    assert "source/a" in str(caught.value)


# --- file systems that lack something -------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_a_file_system_without_fsync(tmp_path, monkeypatch, number):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_an_fsync_that_fails_is_an_error_and_leaves_the_old(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", 1)

    def refuse(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError, match="Input/output error"):
        write_json(tmp_path / "a.json", 2)
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("what", ["file", "directory", "bundle"])
def test_an_fsync_that_fails_at_the_end_is_not_called_no_change(tmp_path, monkeypatch, what):
    """Of the directory in which the new name is: what was asked for is there."""
    bundle = copy_bundle(WITNESS / "added", tmp_path / "bundle")
    kind = Replaceable("anything", lambda path: None)
    fsync, writers = os.fsync, {
        "file": lambda: write_json(tmp_path / "new", 2),
        "directory": lambda: _made(atomic_directory(tmp_path / "new", overwrite=False, kind=kind)),
        "bundle": lambda: remove_adapter(bundle, "rival"),
    }  # fmt: skip
    there = {"bundle": lambda: "rival" not in (bundle / "hhdeploy.json").read_text()}

    def refuse(handle):
        if there.get(what, (tmp_path / "new").exists)():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WriteError, match=r"was written, .*Input/output error") as caught:
        writers[what]()
    assert "Nothing" not in str(caught.value)
    monkeypatch.undo()
    Bundle.open(bundle).check_files()
    assert names(tmp_path) == (["bundle"] if what == "bundle" else ["bundle", "new"])


def _made(directory):
    with directory as scratch:
        (scratch / "a").write_text("x")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HHDEPLOY_CACHE", raising=False)
    assert cache_of("default") == tmp_path / ".cache/hhdeploy"
    monkeypatch.setenv("HHDEPLOY_CACHE", "~/kept")  # no shell reads a Dockerfile's ENV
    assert cache_of("default") == tmp_path / "kept"
    assert cache_of("kept") == Path("kept")
    assert cache_of(None) is cache_of("") is None


@pytest.mark.parametrize("cache", [None, "~/kept"])
def test_without_a_home_the_cache_says_what_to_set(small, monkeypatch, cache):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("HHDEPLOY_CACHE", raising=False)
    if cache:
        monkeypatch.setenv("HHDEPLOY_CACHE", cache)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError("uid not found")))
    with pytest.raises(WriteError, match=r"found none: HOME is not set.*`cache=None`"):
        open_session(small, device="cpu")
    open_session(small, device="cpu", threads=1, cache=None).close()


# --- temporary files ------------------------------------------------------------------------------

_ARRAY = np.zeros((500, 500), np.float32)
# How NumPy says that the disk took no more depends on the array's strides.
_TOO_MUCH = {
    "bytes": lambda path: path.write_bytes(_ARRAY.tobytes()),
    "an array": _ARRAY.tofile,
    "an array of other strides": _ARRAY.T.tofile,
}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A directory of temporary files that takes 64 KiB."""
    with small_disk(tmp_path / "temporary", "64k") as place:
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        yield place


@pytest.mark.parametrize("write", _TOO_MUCH.values(), ids=_TOO_MUCH)
def test_a_full_disk_is_told_however_it_was_written_to(temporary, write):
    with pytest.raises(WriteError, match="The disk is full"), os_errors(temporary / "x"):
        write(temporary / "x")


@pytest.mark.parametrize("write", _TOO_MUCH.values(), ids=_TOO_MUCH)
def test_a_full_directory_of_temporary_files_is_told(temporary, write):
    with (
        pytest.raises(WriteError, match=f"a temporary file in {temporary}: .*set TMPDIR"),
        temporary_directory("x") as scratch,
    ):
        write(scratch / "x")
    assert names(temporary) == []


def test_where_no_temporary_file_can_be_the_directories_are_told(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/none"])
    with (
        pytest.raises(WriteError, match=r"No usable temporary directory .*'/none'.*set TMPDIR"),
        temporary_directory("x"),
    ):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/out"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)),
    ],
    ids=repr,
)
def test_what_else_fails_meanwhile_is_not_of_temporary_files(error):
    with pytest.raises(OSError) as caught, temporary_directory("x"):  # noqa: PT011
        raise error
    assert caught.value is error


def test_a_full_directory_of_temporary_files_is_not_called_a_device_s(temporary):
    with (
        pytest.raises(WriteError, match=f"a temporary file in {temporary}"),
        atomic_file(Path(os.devnull)) as content,
    ):
        content.write_bytes(_ARRAY.tobytes())
