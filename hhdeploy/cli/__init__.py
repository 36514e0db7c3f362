"""The ``hhdeploy`` command. Subcommands are imported when they are used, so -h is instant."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

import click
from click.exceptions import Exit

from hhdeploy.cli.progress import FULL, note
from hhdeploy.cli.wording import as_command_line
from hhdeploy.errors import HhdeployError, OptionError, first_line
from hhdeploy.files.caches import CacheWarning
from hhdeploy.files.writing import placed_here

# Command -> (module under hhdeploy.cli, one line of help): the help of the group needs no import.
_COMMANDS = {
    "demo": ("demo", "Run everything once on the starter models."),
    "export": ("export", "Adapters in, a verified ONNX bundle out."),
    "build": ("build", "Compile a bundle's graph to a TensorRT engine."),
    "calibrate": ("calibrate", "Quantise a bundle's graph on images: INT8, FP8."),
    "triton": ("triton", "Write a bundle as a model of a Triton repository."),
    "ovms": ("ovms", "Write a bundle as a model of OpenVINO Model Server."),
    "web": ("web", "Write a bundle as a page that runs it in the browser."),
    "verify": ("verify", "Compare a bundle with its training-time reference."),
    "predict": ("predict", "Classify images with one or several adapters of a bundle."),
    "serve": ("serve", "Serve all adapters of a bundle over HTTP and gRPC."),
    "sign": ("sign", "Sign a bundle with a key."),
    "bom": ("bom", "Say what a bundle is made of, as a CycloneDX ML-BOM."),
    "push": ("push", "Write a bundle to a repository of models: a folder, or a hub's."),
    "pull": ("pull", "Get a bundle from a repository of models, every file checked."),
    "adapter": ("adapter", "Inspect, import, list, add and remove adapters."),
    "train": ("train", "Fine-tune an adapter on an image folder."),
    "bench": ("bench", "Measure the latency of a bundle on this machine."),
    "cache": ("cache", "List and clear what is kept to be faster the next time."),
    "doctor": ("doctor", "Tell what this machine can do, and what is missing."),
}

_OUT_OF_MEMORY = (
    "The memory is used up, or more than ulimit -v allows. Give the command more, or ask for less: "
    "smaller batches, fewer images, fewer processes."
)
# Of who stops a container or a service, and of a terminal that closes.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def interrupted(interrupt: KeyboardInterrupt, placed: Iterable[Path], hint: str = "") -> Exit:
    """What to raise after Ctrl-C, or one of `_ENDING`, which this says: it is no error, and not to
    be taken back where something was in its place by then.

    Args:
        interrupt: it has the number of the signal, unless that is Ctrl-C's.
        placed: what was in its place, as `placed_here` tells it.
        hint: what to do, where nothing was.
    """
    number = signal.Signals(*interrupt.args or (signal.SIGINT,))
    by = "" if number == signal.SIGINT else f" by {number.name}"
    click.echo(f"Interrupted{by}. {_complete(placed) or hint}".rstrip(), err=True)
    return Exit(128 + number)  # as shells have it


def _complete(placed: Iterable[Path]) -> str:
    """A sentence about what was in its place when a command ended early; "" where nothing was."""
    # What lay in a directory of temporary files may be gone with it.
    there = [str(path) for path in placed if os.path.lexists(path)]
    if not there:
        return ""
    return (
        f"Complete by then, and on the disk: {', '.join(there)}. Look at what is there before you "
        "run the command again."
    )


class _Unprintable(click.ClickException):
    """Standard output took no more, as far as can be told."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Say it, and keep Python from trying to write the rest once more when it ends."""
        super().show(file)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    """hhdeploy's own warnings as lines of standard error, without the place in its source."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, CacheWarning):
                note(f"Warning: {as_command_line(str(message))}")
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """`_ENDING` are as Ctrl-C: what is half done is removed first. The next one ends the process at
    once; what is ignored (`nohup`) or has another handler stays as it is."""
    alone = threading.current_thread() is threading.main_thread()
    ours = [n for n in _ENDING if alone and signal.getsignal(n) is signal.SIG_DFL]

    def interrupt(number: int, frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    for each in ours:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """A memory that is used up is told as that, whatever another package, or what asked it, made of
    it: that a model cannot be traced, or a file not be read."""
    try:
        yield
    except (HhdeployError, MemoryError, OSError, RuntimeError) as error:
        behind: BaseException | None = error
        while behind is not None:
            if isinstance(behind, MemoryError) or os.strerror(errno.ENOMEM) in str(behind):
                raise click.ClickException(f"{_OUT_OF_MEMORY} ({first_line(error)})") from error
            behind = behind.__cause__ or behind.__context__
        raise


class Group(click.Group):
    """A group whose commands end with a message.

    Exit code 1, 2 for a wrong command line, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand.

        Raises:
            UsageError: for an OptionError, as if click had found it.
            ClickException: for every other error of hhdeploy's, and of a file that the system
                names and refuses.
            Exit: for Ctrl-C and its like.
        """
        with placed_here() as placed, _said_plainly(), _interrupted_by_signals():
            try:
                return self._invoked(ctx, placed)
            except KeyboardInterrupt as interrupt:
                raise interrupted(interrupt, placed) from interrupt

    def _invoked(self, ctx: click.Context, placed: Collection[Path]) -> object:
        try:
            with _memory_told():
                return super().invoke(ctx)
        except HhdeployError as error:
            context = self._context_of(ctx)
            message = as_command_line(str(error), context.command)
            if isinstance(error, OptionError):
                raise click.UsageError(message, context) from error
            raise click.ClickException(message) from error
        except OSError as error:
            if error.filename is None:
                # Who reads no further wants no more, unless something else was done as well.
                closed = error.errno == errno.EPIPE and placed
                # A stream that is open already has no name.
                if error.errno not in FULL and not closed:
                    raise
                raise _Unprintable(
                    "What is printed, or a temporary file, could not be written: "
                    f"{error.strerror}. Free some space, or print to another place. "
                    f"{_complete(placed)}".rstrip()
                ) from error
            raise click.ClickException(
                f"{os.fsdecode(error.filename)}: {error.strerror}. See that it is there, is what "
                "was expected, and may be read or written to."
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write all commands, each with its first sentence, however long that is."""
        with formatter.section("Commands"):
            formatter.write_dl(self.short_texts(ctx))

    def short_texts(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Name and first sentence of every command."""
        return [(n, c.get_short_help_str(limit=1000)) for n, c in sorted(self.commands.items())]

    def _context_of(self, ctx: click.Context) -> click.Context:
        """The subcommand's, which is gone by now, for the usage line."""
        name = ctx.invoked_subcommand or ""
        command = self.get_command(ctx, name)
        return click.Context(command, parent=ctx, info_name=name) if command is not None else ctx


class LazyGroup(Group):
    """A group that knows its commands by name and imports them on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, as ``--help`` lists them; imports none."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its module imported; None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"hhdeploy.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named.

        Raises:
            UsageError: there is none of that name; it says which are near. Click itself looks among
                those that are imported.
        """
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx))
            if not near:
                raise
            more = f" (Did you mean {' or '.join(map(repr, near))}?)"
            raise click.UsageError(error.message + more, error.ctx) from error

    def short_texts(self, ctx: click.Context) -> list[tuple[str, str]]:
        """Name and first sentence of every command, known without importing them."""
        return [(name, text) for name, (_, text) in _COMMANDS.items()]


def _say_version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from hhdeploy.packages import own_version  # a search of what is installed

        click.echo(f"{context.find_root().info_name}, version {own_version()}")
        context.exit()


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Deploy Householder (HTA) and LoRA adapters of Vision Transformers.

    Fold one adapter into the weights, or keep many beside one backbone and choose per image;
    every step is verified against the PyTorch training-time model.

    Start with:  hhdeploy demo
    """
    # Names of files are not always text: what cannot be printed is shown as stderr shows it.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
