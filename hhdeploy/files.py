"""Atomic writes and content hashes: nothing on disk is ever half of something."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hhdeploy.errors import WriteError

_CHUNK = 1 << 22


def default_cache() -> Path:
    """``$HHDEPLOY_CACHE``, else ``~/.cache/hhdeploy``."""
    root = os.environ.get("HHDEPLOY_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "hhdeploy"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def os_errors(target: Path) -> Iterator[None]:
    """Turn an `OSError` while writing ``target`` into a `WriteError` that says what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "The disk is full: free some space or choose another directory.",
            errno.EDQUOT: "The disk quota is used up: free some space or choose another directory.",
            errno.EFBIG: "The file is larger than the file system or ulimit -f allows.",
            errno.EACCES: "Permission denied: choose a directory that you may write to.",
            errno.EROFS: "The file system is read-only: choose another directory.",
        }
        hint = hints.get(error.errno or 0, "")
        reason = error.strerror or str(error)
        raise WriteError(
            f"Could not write {target}: {reason}. {hint} Nothing that was there before was changed."
        ) from error


def copy_directory(source: Path, target: Path) -> None:
    """Copy a directory's files, links followed; the first error is raised as it is.

    (`shutil.copytree` collects errors in one of its own, which no longer tells a full disk.)
    """
    for folder, _, names in os.walk(source, followlinks=True):
        place = target / Path(folder).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(Path(folder) / name, place / name)


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a scratch directory beside ``target`` that becomes ``target`` on success.

    On any error the scratch directory is removed and an existing ``target`` stays as it was.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not overwrite:
        raise WriteError(
            f"{target} already exists. Choose another output directory, or pass --overwrite "
            "to replace it once the new one is complete."
        )
    if target.exists() and not target.is_dir():
        raise WriteError(f"{target} is a file, not a directory. Choose another output directory.")
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with os_errors(target):
            yield scratch
            scratch.chmod(0o755)
            _replace_directory(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_directory(scratch: Path, target: Path) -> None:
    """Rename ``scratch`` to ``target``; an old ``target`` is put back if that fails."""
    if not target.exists():
        scratch.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(retired / "it")
    try:
        scratch.rename(target)
    except OSError:
        (retired / "it").rename(target)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``target`` that replaces it, in one step, on success."""
    with os_errors(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    scratch = Path(name)
    try:
        with os_errors(target):
            yield scratch
            scratch.chmod(0o644)
            scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with atomic_file(target) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
