"""The lock of a bundle: one change at a time, whatever becomes of the directory meanwhile.

It is a file in the directory, and who waits asks for it again and again by the bundle's path: there
may be another directory by then, or none for the moment in which one is replaced. Between two
askings everything goes by a handle of the directory, since what the path names may change at any
moment. (Libraries for locks take paths, and make a directory that is missing: an empty one, in the
place where the bundle that replaces the old one is about to be put.)

Who holds it ends or undoes first what a change that was killed left half-way; only then can be said
whether all that lies there is the bundle's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from hhdeploy.backbones.licences import CARD
from hhdeploy.bundle.manifest import (
    ADAPTERS,
    BANK_FILE,
    LOCK_TIMEOUT,
    MANIFEST,
    OLD,
    PREVIOUS_BANK,
    SIGNATURE,
    plain_name,
)
from hhdeploy.bundle.reading import NEW_CARD, Bundle
from hhdeploy.choices import seconds
from hhdeploy.errors import BundleError, ConflictError, HhdeployError, WriteError
from hhdeploy.files.directories import Replaceable, strangers
from hhdeploy.files.journal import JOURNAL, follow_journal
from hhdeploy.files.scratch import scratch_directory, sweep_all
from hhdeploy.files.writing import os_errors, sha256_of

LOCK = ".lock"
# Seconds: between two tries, until a line says so, and until a bundle that was there is gone.
_POLL, _SAY_AFTER, _GONE_AFTER = 0.01, 1.0, 2.0
NEW_MANIFEST = f".{MANIFEST}.new"
# Hidden names that a change writes to.
_WRITTEN = (NEW_MANIFEST, NEW_CARD, JOURNAL)
# The signature of the manifest whose digits are in the name, while another takes its place.
_ASIDE = re.compile(rf"\.{re.escape(SIGNATURE)}\.[0-9a-f]{{16}}")
# Stem of the scratch directories inside a bundle.
WORK = "work"
# Names that hhdeploy gives to files at the top of a bundle, and nobody else.
_OURS = re.compile(
    r"(bank|reference)\.safetensors|parity\.json|bank\.safetensors\.previous"
    r"|calibration\.(int8|int8-weights|fp8)\.(json|safetensors)"
    r"|model(\.(float16|bfloat16|int8|int8-weights|fp8))?\.onnx(\.data)?"
    r"|preprocess\.(center|squash|border)\.(bicubic|bilinear)\.onnx"
    r"|model\.[\w-]+\.tensorrt(-rtx)?\.[\w.+-]+\.engine"
)

# ``paths``: bundles that this thread has locked.
_HELD = threading.local()

Progress = Callable[[str], None]


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Iterator[None]:
    """Hold a bundle's lock. It belongs to the directory: if that was replaced while waiting, the
    one that is there now is locked. Nothing is written where there is no bundle.

    Args:
        path: the bundle, its links resolved.
        lock_timeout: seconds to wait for another change to end.
        progress: called with a line after a second of waiting.

    Raises:
        BundleError: no bundle there; of one that was there, also two seconds later.
        ConflictError: the lock is held for too long, or by this thread.
        OptionError: ``lock_timeout`` is no time.
        WriteError: it cannot be made here.
    """
    wait = _Wait(path, lock_timeout, progress)
    held: set[Path] = _HELD.__dict__.setdefault("paths", set())
    if path in held:  # it would wait for itself
        raise ConflictError(
            f"{path} is being changed here: one change began inside of another. End the first one, "
            "or make both in it."
        )
    while True:
        with _bundle_at(path) as handle:
            if handle is None:
                wait.for_the_bundle()
            elif (lock := _tried(path, handle)) is None:
                wait.for_the_lock()
            else:
                try:
                    if _is_there(path, handle):
                        held.add(path)
                        try:
                            yield
                        finally:
                            held.discard(path)
                            # It may stay: another user's, or on a disk that fails. Nobody has it.
                            with contextlib.suppress(OSError):
                                os.unlink(LOCK, dir_fd=handle)
                        return
                finally:
                    os.close(lock)


def check_changeable(path: Path, least: int = 0) -> None:
    """Whether a bundle can be changed at all, which is to be known before slow work.

    Args:
        path: the bundle.
        least: bytes that the change brings in any case, beside another manifest.

    Raises:
        WriteError: the file system lets nobody write there, or has not that much room.
    """
    root = Path(os.path.realpath(path))
    with os_errors(root), scratch_directory(root, WORK):
        free = shutil.disk_usage(root).free
        least += os.stat(root / MANIFEST).st_size
    if free < least:
        raise WriteError(
            f"Could not write {root}: expected {least:,} bytes of its disk to be free, found "
            f"{free:,}. Free some space. Nothing that was there before was changed."
        )


class _Wait:
    """How long somebody has waited, and for what."""

    def __init__(self, path: Path, timeout: float, progress: Progress) -> None:
        self._path, self._progress = path, progress
        self._timeout = seconds(timeout, "lock_timeout")  # nan is never over
        self._start = time.monotonic()
        self._said = False
        self._seen = False  # a bundle
        self._gone_since: float | None = None

    def for_the_lock(self) -> None:
        """Sleep a moment. Raises `ConflictError` when it is enough."""
        self._seen, self._gone_since = True, None
        waited = time.monotonic() - self._start
        if waited >= self._timeout:
            raise ConflictError(
                f"another process has been changing {self._path} for {self._timeout:g} seconds. "
                "Try again when it has ended, or wait longer with `lock_timeout`."
            )
        if waited >= _SAY_AFTER and not self._said:
            self._said = True
            self._progress(f"waiting for another change of {self._path} to end")
        time.sleep(_POLL)

    def for_the_bundle(self) -> None:
        """Sleep a moment. Raises `BundleError` where there never was one, or none comes back."""
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
        if not self._seen or now - self._gone_since >= _GONE_AFTER:
            Bundle.open(self._path)  # says what was expected; or it is there again
        time.sleep(_POLL)


@contextlib.contextmanager
def _bundle_at(path: Path) -> Iterator[int | None]:
    """A handle of the directory if there is a bundle in it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError as error:
        Bundle.open(path)  # says what is wrong with such a path
        raise _no_lock(path, error) from error
    try:
        there = True
        try:
            os.stat(MANIFEST, dir_fd=handle)
        except FileNotFoundError:
            there = False
        except OSError as error:
            raise _no_lock(path, error) from error
        yield handle if there else None
    finally:
        os.close(handle)


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _tried(path: Path, directory: int) -> int | None:
    """A handle of the locked file in a directory; closing it unlocks. None if another holds it, or
    the directory or the file went meanwhile."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        lock = _opened(flags, directory)
    except FileNotFoundError:  # no file can be made in a directory that was removed
        return None
    except OSError as error:
        raise _no_lock(path, error) from error
    held = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder removes the file: a lock of one that was removed keeps nobody out.
        held = os.path.samestat(os.fstat(lock), os.stat(LOCK, dir_fd=directory))
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        raise _no_lock(path, error) from error
    finally:
        if not held:
            os.close(lock)
    return lock if held else None


def _opened(flags: int, directory: int) -> int:
    """The lock's file, made if it is absent; another user's is only read, as flock needs no more.

    Writing is asked for first: NFS gives a lock that excludes others to such a handle alone. One
    that may not even be read is not removed, since a living process may hold it.
    """
    try:
        return os.open(LOCK, flags, 0o666, dir_fd=directory)
    except PermissionError:
        reading = flags & ~(os.O_RDWR | os.O_CREAT)
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return os.open(LOCK, reading | os.O_RDONLY, dir_fd=directory)
        raise


def _no_lock(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"Could not lock {path / LOCK}: {error}. A bundle is changed where its directory can be "
        "written to and its file system has locks (flock): copy it to such a place, and change it "
        "there. Nothing was changed."
    )


def tidy(bundle: Bundle) -> None:
    """End or undo what changes before this one left half-way."""
    _clear_names(bundle.path)
    _heal(bundle)
    _settle_card(bundle)
    _settle_signature(bundle.path)
    _remove_leftovers(bundle)
    follow_journal(bundle.path, ADAPTERS, bundle.manifest.files)


def _clear_names(root: Path) -> None:
    """Remove what no change makes from the names that changes write to: a link would be followed
    to somebody's files, a pipe would be waited for."""
    for name, fits in (*((n, stat.S_ISREG) for n in _WRITTEN), (OLD, stat.S_ISDIR)):
        with contextlib.suppress(OSError):
            mode = os.lstat(root / name).st_mode
            if not fits(mode) and not stat.S_ISDIR(mode):
                os.unlink(root / name)


def _heal(bundle: Bundle) -> None:
    """A change that an earlier version did not finish left the valid bank under another name."""
    previous, current = bundle.path / PREVIOUS_BANK, bundle.path / BANK_FILE
    expected = bundle.manifest.files.get(BANK_FILE)
    if expected is not None and previous.is_file() and sha256_of(previous) == expected:
        with os_errors(bundle.path):
            os.replace(previous, current)


def _settle_card(bundle: Bundle) -> None:
    """Put the new card in the old one's place, which moves into ``.old``, once the manifest names
    it; else it belongs to a change that was not committed. Readers find it at either place."""
    new, card, old = (bundle.path / n for n in (NEW_CARD, CARD, f"{OLD}/{CARD}"))
    with contextlib.suppress(OSError):
        if sha256_of(new) != bundle.manifest.files.get(CARD):
            os.unlink(new)
            return
        if card.exists():
            old.parent.mkdir(exist_ok=True)
            os.replace(card, old)
        os.replace(new, card)


def put_signature_aside(root: Path) -> bool:
    """Hide a signature until the manifest that it signs is another one, or a change that was not
    committed is undone; whether there is one. What cannot be moved stays."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.lstat(root / SIGNATURE).st_mode):
            os.replace(root / SIGNATURE, root / _aside(root))
            return True
    return False


def _aside(root: Path) -> str:
    return f".{SIGNATURE}.{sha256_of(root / MANIFEST)[:16]}"


def _settle_signature(root: Path) -> None:
    """Put a signature back that signs the manifest which is there; remove any other."""
    with contextlib.suppress(OSError):
        for name in filter(_ASIDE.fullmatch, os.listdir(root)):
            if name == _aside(root) and not os.path.lexists(root / SIGNATURE):
                os.replace(root / name, root / SIGNATURE)
            else:
                os.unlink(root / name)


def _remove_leftovers(bundle: Bundle) -> None:
    """What changes that ended half-way left: files of ours that the manifest does not name."""
    sweep_all(bundle.path)
    named = bundle.manifest.files
    with contextlib.suppress(OSError):
        for name in os.listdir(bundle.path):
            if _is_ours(name) and name not in named:
                os.unlink(bundle.path / name)


def _is_ours(name: str) -> bool:
    """Whether a change, and nobody else, makes a file of this name at the top of a bundle."""
    return name == NEW_MANIFEST or _OURS.fullmatch(plain_name(name)) is not None


def foreign(path: Path, beside: Collection[str] = ()) -> str | None:
    """Why a directory is not a bundle, or what is in it that no bundle has, nor is named by
    ``beside``. Nobody may be changing it, and it is tidy: see `undisturbed`."""
    try:
        named = Bundle.open(path).manifest.files
    except BundleError as error:
        why = f" ({str(error).rstrip('.')})" if os.path.lexists(path / MANIFEST) else ""
        return f"it has no {MANIFEST} that can be read{why}"
    known = {*named, MANIFEST, NEW_CARD, SIGNATURE, ADAPTERS, *beside}
    return strangers(path, known, "no bundle has", passing=_passes)


def _passes(name: str) -> bool:
    top = name.split("/")[0]
    hidden = (
        top in (LOCK, OLD, JOURNAL)
        or _ASIDE.fullmatch(top) is not None
        or top.startswith(f".{WORK}.hhdeploy-")
    )
    return hidden or _is_ours(name)


@contextlib.contextmanager
def undisturbed(
    path: Path,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Iterator[None]:
    """Hold what may be a bundle, and is to be judged and replaced; where there is none nothing is
    written. Arguments and errors as `locked`."""
    try:
        Bundle.open(path)
    except BundleError:
        yield
        return
    with locked(path, lock_timeout=lock_timeout, progress=progress):
        with os_errors(path):
            tidy(Bundle.open(path))
        yield


# What `export` may replace.
BUNDLE = Replaceable("a bundle", foreign, undisturbed, last=MANIFEST)


@contextlib.contextmanager
def left_alone(bundle: Bundle) -> Iterator[None]:
    """Around long work of other packages, which know a bundle's files by their paths: where these
    went meanwhile, that is said, and not what such a package made of it.

    Raises:
        ConflictError: it failed, and the bundle is another one by now, or gone.
    """
    try:
        yield
    except (HhdeployError, OSError) as error:
        if isinstance(error, ConflictError) or not bundle.changed():
            raise
        raise ConflictError(
            f"{bundle.path} was changed, moved or removed by another process meanwhile. Nothing "
            "was written. Run the command again, with the bundle where it is now."
        ) from error
