"""Crashes of a writer, at every file-system call that it makes below a directory.

`killed_at_every_call` lets the process end before each call in turn (and half-way through each
write), in a child. `power_cuts` records one run and replays it as a disk may hold it after
a power cut: what was not fsynced is dropped or reordered. Both patch `os`, not the code under test.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import multiprocessing.context
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Writer = Callable[[Path], object]
# Exit code of the children, and how long one may take, on a busy machine.
_KILLED = 9
_SECONDS = 120
# What the children run is in these: imported once, by the process of which all are forked, whoever
# asks it first. A child of another would import PyTorch for itself, at each of a writer's calls.
_WRITERS = (
    "tests.hhdeploy.bundle.test_crashes",
    "tests.hhdeploy.test_training_state",
    "tests.soak.bundle",
)
# So many pending names are tried in all combinations, more of them one by one.
_ALL_SUBSETS = 5


@dataclass(frozen=True)
class Call:
    """A call that changes something below the root, or makes it last.

    Attributes:
        name: of the function of `os`.
        path: what it is about, relative to the root.
        target: of a rename.
        content: of a file, as it is when it is fsynced.
    """

    name: str
    path: str
    target: str = ""
    content: bytes | None = None


class _Watch:
    """Stands for `os` below a root; ``before`` sees every call and may end the process."""

    def __init__(self, root: Path, before: Callable[[Call], None]) -> None:
        self.root, self.before = root, before
        self.real = {n: getattr(os, n) for n in _CALLS}

    def path_of(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Relative to the root; None outside of it."""
        if isinstance(path, int):
            place = Path(os.readlink(f"/proc/self/fd/{path}"))
        else:
            place = Path(os.fsdecode(path))
            if dir_fd is not None and not place.is_absolute():
                place = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / place
        place = Path(os.path.abspath(place))
        return str(place.relative_to(self.root)) if place.is_relative_to(self.root) else None

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        inside = self.path_of(path, dir_fd)
        if inside is not None and flags & os.O_CREAT and not (self.root / inside).exists():
            self.before(Call("open", inside))
        return self.real["open"](path, flags, mode, dir_fd=dir_fd)

    def write(self, handle: int, content: Any) -> int:
        inside = self.path_of(handle)
        if inside is not None:
            self.before(Call("write", inside))
            half = len(content) // 2
            if half:  # a second point: torn in the middle
                done = self.real["write"](handle, content[:half])
                self.before(Call("write", inside))
                return done + self.real["write"](handle, content[half:])
        return self.real["write"](handle, content)

    def fsync(self, handle: int) -> None:
        inside = self.path_of(handle)
        if inside is not None:
            place = self.root / inside
            content = place.read_bytes() if place.is_file() else None
            self.before(Call("fsync", inside, content=content))
        else:  # inside, nothing has to last longer than the test: `power_cuts` knows what would
            self.real["fsync"](handle)

    def _move(self, name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **options: Any) -> None:
            one, other = self.path_of(source), self.path_of(target)
            if one is not None or other is not None:
                assert one is not None and other is not None, "moved in or out of the bundle"
                self.before(Call("rename", one, other))
            self.real[name](source, target, **options)

        return move

    def _simple(self, name: str) -> Callable[..., None]:
        def call(path: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> None:
            inside = self.path_of(path, dir_fd)
            # mkdir of what is there (``exist_ok``) and removing what is not change nothing.
            changes = inside is not None and (self.root / inside).exists() == (name != "mkdir")
            if inside is not None and changes:
                self.before(Call({"remove": "unlink"}.get(name, name), inside))
            self.real[name](path, *arguments, dir_fd=dir_fd, **options)

        return call

    @contextmanager
    def patched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "write", "fsync"):
                patch.setattr(os, name, getattr(self, name))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._move(name))
            for name in ("unlink", "remove", "mkdir", "rmdir"):
                patch.setattr(os, name, self._simple(name))
            # It would not use the functions above.
            patch.setattr(shutil, "_use_fd_functions", False)
            yield


_CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")


def calls_of(write: Writer, root: Path) -> list[Call]:
    """What a writer does below ``root``, in order; it is done."""
    calls: list[Call] = []
    with _Watch(root, calls.append).patched():
        write(root)
    return calls


def deaths(calls: list[Call]) -> list[int]:
    """Before which of the calls a death may leave what one call earlier it would not: not after an
    fsync, which changes nothing that whoever comes after the process sees."""
    return [i for i in range(len(calls)) if i == 0 or calls[i - 1].name != "fsync"]


def killed_at_every_call(
    write: Writer, origin: Path, scratch: Path, step: int = 1
) -> Iterator[Path]:
    """A copy of ``origin`` after each death of the writer, one for every ``step``-th of `deaths`.

    ``write`` is a function of a module: it travels by its name.
    """
    whole = Path(shutil.copytree(origin, scratch / "whole"))
    points = deaths(calls_of(write, whole))[::step]
    shutil.rmtree(whole)
    for point in points:
        root = scratch / f"point-{point}"
        shutil.copytree(origin, root)
        code = _in_child(write, root, point)
        assert code == _KILLED, f"the writer failed or came to its end (exit code {code})"
        yield root
        shutil.rmtree(root)


def _die_at(write: Writer, root: Path, point: int) -> None:
    left = [point]

    def before(call: Call) -> None:
        if not left[0]:
            os._exit(_KILLED)
        left[0] -= 1

    with _Watch(root, before).patched():
        write(root)


def forks() -> multiprocessing.context.ForkServerContext:
    """Processes that are forks of one without threads, which has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_WRITERS))
    return context


def _in_child(write: Writer, root: Path, point: int) -> int | None:
    """How a process of its own ends, of which `_die_at` is all; None: it hangs.

    It is forked by a process without threads. This one has those of every runtime that earlier
    tests opened: a fork of it has their locks, as they were, and nobody who opens them.
    """
    assert write.__module__ in _WRITERS
    child = forks().Process(target=_die_at, args=(write, root, point), daemon=True)
    child.start()
    child.join(_SECONDS)
    code = child.exitcode
    child.kill()
    child.join()
    child.close()
    return code


# --- power cuts -----------------------------------------------------------------------------------


@dataclass
class _Disk:
    """What is certainly on the disk, and what may be.

    Attributes:
        names: path -> number of its file, None for a directory; what lasts.
        pending: changes of names that no fsync of their directory has made last yet.
        contents: number of a file -> content that lasts, b"" if none does.
        now: path -> number of its file, as the running system sees it.
    """

    names: dict[str, int | None]
    contents: dict[int, bytes]
    now: dict[str, int | None]
    pending: list[dict[str, int | str | None]] = field(default_factory=list)


_GONE = "gone"


def power_cuts(
    calls: list[Call], origin: Path, scratch: Path, *, after: bool = False
) -> Iterator[Path]:
    """Every distinct directory that a power cut during ``calls``, or ``after`` the last of them,
    may leave of ``origin``."""
    disk = _disk_of(origin)
    seen: set[str] = set()
    blobs = scratch / "blobs"
    blobs.mkdir(exist_ok=True)
    for number, call in enumerate([*calls, None]):
        for names in _may_last(disk) if call is None or not after else ():
            key = repr(
                [
                    (p, n if n is None else _digest(disk.contents[n]))
                    for p, n in sorted(names.items())
                ]
            )
            if key in seen:
                continue
            seen.add(key)
            root = scratch / f"cut-{number}-{len(seen)}"
            _lay(root, names, disk.contents, blobs)
            yield root
            shutil.rmtree(root)
        if call is not None:
            _apply(disk, call)


@functools.lru_cache(maxsize=256)
def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _disk_of(origin: Path) -> _Disk:
    names: dict[str, int | None] = {}
    contents: dict[int, bytes] = {}
    for path in sorted(origin.rglob("*")):
        name = str(path.relative_to(origin))
        names[name] = None
        if path.is_file():
            names[name] = len(contents)
            contents[len(contents)] = path.read_bytes()
    return _Disk(names, contents, dict(names))


def _apply(disk: _Disk, call: Call) -> None:
    """One call: names change at once for the system, on the disk when their directory is synced."""
    if call.name == "open":
        number = len(disk.contents)
        disk.contents[number] = b""
        _rename(disk, {call.path: number})
    elif call.name == "mkdir":
        _rename(disk, {call.path: None})
    elif call.name in ("unlink", "rmdir"):
        _rename(disk, {call.path: _GONE})
    elif call.name == "rename" and call.path in disk.now:
        added, removed = {call.target: disk.now[call.path]}, {call.path: _GONE}
        if os.path.dirname(call.path) == os.path.dirname(call.target):
            _rename(disk, {**added, **removed})
        else:  # two directories: one may last without the other
            _rename(disk, added)
            _rename(disk, removed)
    elif call.name == "fsync" and call.content is not None:
        if call.path not in disk.now:  # made by a library in its own way: it is here from now on
            _apply(disk, Call("open", call.path))
        number = disk.now[call.path]
        assert number is not None
        disk.contents[number] = call.content
    elif call.name == "fsync":
        folder = "" if call.path == "." else call.path
        for change in [c for c in disk.pending if os.path.dirname(next(iter(c))) == folder]:
            disk.pending.remove(change)
            _put(disk.names, change)


def _rename(disk: _Disk, change: dict[str, Any]) -> None:
    _put(disk.now, change)
    disk.pending.append(change)


def _put(names: dict[str, Any], change: dict[str, Any]) -> None:
    for path, number in change.items():
        if number == _GONE:
            names.pop(path, None)
        else:
            names[path] = number


def _may_last(disk: _Disk) -> Iterator[dict[str, int | None]]:
    """The names on the disk with every choice of the pending changes."""
    count = len(disk.pending)
    if count <= _ALL_SUBSETS:
        chosen = [set(c) for k in range(count + 1) for c in itertools.combinations(range(count), k)]
    else:
        every = set(range(count))
        chosen = [set(), every, *({i} for i in every), *(every - {i} for i in every)]
    for kept in chosen:
        names = dict(disk.names)
        for index in sorted(kept):
            _put(names, disk.pending[index])
        yield {p: n for p, n in names.items() if _reachable(p, names)}


def _reachable(path: str, names: dict[str, int | None]) -> bool:
    folder = os.path.dirname(path)
    return not folder or (folder in names and names[folder] is None and _reachable(folder, names))


def _lay(root: Path, names: dict[str, int | None], contents: dict[int, bytes], blobs: Path) -> None:
    root.mkdir()
    for path, number in sorted(names.items()):
        if number is None:
            (root / path).mkdir()
            continue
        if not contents[number]:  # of its own: who locks one file would lock all that are linked
            (root / path).touch()
            continue
        blob = blobs / _digest(contents[number])
        if not blob.exists():
            blob.write_bytes(contents[number])
        os.link(blob, root / path)
