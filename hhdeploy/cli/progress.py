"""Progress on standard error, for whose sake no work ends: a log may be on a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID, TextColumn

# Of a disk, on which a stream may be that is open already.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNCUT = 100_000  # columns


class _Lossy(io.FileIO):
    """Standard error, of which a full disk takes nothing."""

    def write(self, content: Any) -> int:
        """See `io.RawIOBase.write`."""
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return memoryview(content).nbytes


def _stream() -> TextIO | None:
    """Standard error as `_Lossy`, beside the system's own: that would keep what it could not write,
    and fail once more at the next line and when the process ends. As it is where it is no file, or
    rich's, above whose progress lines are to stay."""
    own = sys.stderr
    if not isinstance(own, io.TextIOWrapper):
        return own
    try:
        lossy = io.BufferedWriter(_Lossy(own.fileno(), "w", closefd=False))
    except (OSError, ValueError):  # in memory, or closed
        return own
    return io.TextIOWrapper(lossy, own.encoding, own.errors, line_buffering=True)


def error_console() -> Console:
    """For progress: as wide as the terminal, if that is one. Text is no markup."""
    options: Any = {"file": _stream(), "highlight": False, "markup": False, "emoji": False}
    from rich.console import Console

    found = Console(**options)
    return found if found.is_terminal else Console(**options, width=UNCUT)


def note(line: str) -> None:
    """A line of progress on standard error, from a command that is quick otherwise."""
    click.echo(line, file=_stream(), err=True)


@contextlib.contextmanager
def steps(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Progress of long work on standard error: what is being done, with the seconds it took."""
    if quiet:
        yield lambda step: None
        return
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(), _description(), TimeElapsedColumn(), console=error_console()
    ) as progress:
        step = _Steps(progress)
        yield step
        step.end()


@contextlib.contextmanager
def phased_steps(
    quiet: bool,
) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """`steps`, and a second callback for a compiler's own phases: (phase, done, steps in all)."""
    if quiet:
        yield lambda step: None, lambda phase, done, total: None
        return
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    with Progress(
        _description(), BarColumn(), TimeElapsedColumn(), console=error_console()
    ) as progress:
        tasks: dict[str, TaskID] = {}
        step = _Steps(progress)

        def phase(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"  {name}")
            progress.update(tasks[name], total=total, completed=done)
            if done >= total:
                progress.remove_task(tasks.pop(name))

        yield step, phase
        step.end()


class _Steps:
    """Lines of a progress, one below the other: a step is done when the next one begins."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._current: TaskID | None = None

    def __call__(self, description: str) -> None:
        self.end()
        self._current = self._progress.add_task(description, total=None)

    def end(self) -> None:
        if self._current is not None:
            self._progress.update(self._current, total=1, completed=1)


def _description() -> TextColumn:
    """What is being done, whole: rich's own column cuts what is longer than the terminal."""
    from rich.progress import TextColumn
    from rich.table import Column

    return TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
