"""Atomic writes: whole or absent, and the old one stays when the new one fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import textwrap

import pytest

from hhdeploy.errors import WriteError
from hhdeploy.files import (
    _replace_directory,
    atomic_directory,
    atomic_file,
    os_errors,
    sha256_of,
    write_json,
)


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def old_directory(tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "old.txt").write_text("old")
    return old


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_directory(target, overwrite=False) as scratch:
        (scratch / "a").write_text("x")
        assert not target.exists()
        assert scratch.parent == target.parent, "another file system could not be renamed from"
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_nothing_is_left_on_failure(tmp_path):
    with (  # noqa: PT012  (the failure is planted in the block)
        pytest.raises(RuntimeError, match="planted"),
        atomic_directory(tmp_path / "out", overwrite=False) as scratch,
    ):
        (scratch / "a").write_text("x")
        raise RuntimeError("planted")
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "out", overwrite=False),
    ):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_existing_target_is_refused(tmp_path):
    old = old_directory(tmp_path)
    with (
        pytest.raises(WriteError, match=r"out already exists.*--overwrite"),
        atomic_directory(old, overwrite=False),
    ):
        pytest.fail("the block must not run")
    assert names(old) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_never_replaced_by_a_directory(tmp_path):
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(WriteError, match="is a file, not a directory"),
        atomic_directory(tmp_path / "out", overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "a file"


def test_overwrite_replaces_the_whole(tmp_path):
    old = old_directory(tmp_path)
    with atomic_directory(old, overwrite=True) as scratch:
        (scratch / "new.txt").write_text("new")
        assert names(old) == ["old.txt"]
    assert names(old) == ["new.txt"]
    assert names(tmp_path) == ["out"]


def test_the_old_one_stays_when_the_new_one_fails(tmp_path):
    old = old_directory(tmp_path)
    with (  # noqa: PT012  (the failure is planted in the block)
        pytest.raises(WriteError, match=r"Could not write .*out: .*disk is full.*was changed"),
        atomic_directory(old, overwrite=True) as scratch,
    ):
        (scratch / "new.txt").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (old / "old.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_old_one_is_put_back_when_the_rename_fails(tmp_path):
    old = old_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        _replace_directory(tmp_path / "gone", old)
    assert names(old) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_relative_targets_and_trailing_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    with atomic_directory(Path("x/../out"), overwrite=False) as scratch:
        (scratch / "a").write_text("x")
    assert names(tmp_path) == ["out"]


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
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "may write to"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Nothing that was there before was changed"),
    ],
)
def test_messages_of_the_file_system(tmp_path, number, hint):
    with pytest.raises(WriteError) as caught, os_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert hint in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)


# A file system that really refuses: files may grow to 64 KiB in the child process.
_CHILD = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hhdeploy.adapter import Adapter, AdapterConfig, SiteTensors, save_adapter
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
        old_directory(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert "ulimit -f" in done.stdout
    assert names(tmp_path) == (["out"] if there else [])
    if there:
        assert names(tmp_path / "out") == ["old.txt"]


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB, where the system lets us mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(full_disk):
    old = old_directory(full_disk)
    with (
        pytest.raises(WriteError, match="The disk is full"),
        atomic_directory(old, overwrite=True) as scratch,
    ):
        (scratch / "big").write_bytes(b"x" * 200_000)
    assert names(full_disk) == ["out"]
    assert (old / "old.txt").read_text() == "old"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
