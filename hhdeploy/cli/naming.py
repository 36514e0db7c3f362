"""Words of a command line: paths, one of several names, and adapters: ``NAME=DIR``, ``DIR``, either
with a strength behind."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hhdeploy.adapters.checks import check_name
from hhdeploy.errors import OptionError

if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:  # not generic before click 8.2
    _Choice = click.Choice


class OneOf(_Choice):
    """One of so many names that a help of 80 columns takes several lines for them."""

    def get_metavar(self, *args: Any, **kwargs: Any) -> str:
        """The names, with a break wherever the next one would leave the page."""
        names = textwrap.wrap(
            f"[{'| '.join(self.choices)}]",
            width=78,
            initial_indent=" " * 20,  # of the flag
            subsequent_indent=" " * 10,
            break_on_hyphens=False,
        )
        return "\n".join(line.replace("| ", "|") for line in names).lstrip()


class NamedPath(click.Path):
    """A path. For click an empty one, of a variable that is not set, is where the process is."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """The path."""
        if value == "":
            self.fail("expected a path, found an empty one.", param, ctx)
        return super().convert(value, param, ctx)


def named_directories(values: Sequence[str]) -> dict[str, Path]:
    """``NAME=DIR`` or ``DIR`` (named after the directory); a name given twice is an error.

    Paths may hold ``=`` too (``runs/lr=0.1``): see `_named_directory`.
    """
    named: dict[str, Path] = {}
    for value in values:
        name, directory = _named_directory(value)
        try:
            check_name(name)
        except OptionError as error:
            raise OptionError(f"{error} Give it as NAME=DIR.") from error
        if name in named:
            raise click.UsageError(
                f"two adapters are called {name!r} ({named[name]} and {directory}). Name them "
                "as NAME=DIR."
            )
        named[name] = directory
    return named


def adapters_and_strengths(values: Sequence[str]) -> tuple[dict[str, Path], dict[str, float]]:
    """`named_directories` whose directories may end in ``@0.7``, and the strengths by name."""
    parts = [_strength(value) for value in values]
    named = named_directories([value for value, _ in parts])
    strengths = {
        name: strength
        for name, (_, strength) in zip(named, parts, strict=True)
        if strength is not None
    }
    return named, strengths


def _strength(value: str) -> tuple[str, float | None]:
    """A value without ``@`` and a number after the last ``/``, unless a directory is so called."""
    found = re.fullmatch(r"(.*[^/])@([-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", value)
    written = (value, value.partition("=")[2])
    if found is None or any(text and Path(text).is_dir() for text in written):
        return value, None
    return found[1], float(found[2])


def _named_directory(value: str) -> tuple[str, Path]:
    """(name, directory): a value that is a directory as it stands is one, ``=`` or not.

    Raises:
        UsageError: it can be read both ways, or has no directory behind its ``=``.
    """
    if not value:
        raise click.UsageError("expected NAME=DIR or DIR, found an empty one.")
    whole = Path(value)
    name, separator, path = value.partition("=")
    if not separator:
        return whole.resolve().name, whole
    if not path:
        raise click.UsageError(
            f"{value!r}: expected NAME=DIR or DIR, found no directory after '='."
        )
    inside = Path(name).name != name  # the "=" of a path: no name has a separator in it
    if not whole.is_dir():
        # Neither is there: a path that is wrong is named whole in the message that follows.
        missing = inside and not Path(path).is_dir()
        return (whole.resolve().name, whole) if missing else (name, Path(path))
    if not inside and Path(path).is_dir():
        raise click.UsageError(
            f"{value!r}: both {whole} and {path} are directories. Write "
            f"NAME={whole.resolve()} for the first and {name}={Path(path).resolve()} for the "
            "second."
        )
    return whole.resolve().name, whole
