"""What commands share: options, tables, JSON."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hhdeploy.bundle.manifest import LOCK_TIMEOUT
from hhdeploy.choices import AUTO, DEVICES, MOST_SEED, PRECISIONS, Device
from hhdeploy.cli.naming import NamedPath, OneOf
from hhdeploy.cli.progress import UNCUT
from hhdeploy.files.bundle_json import json_problem

if TYPE_CHECKING:
    from hhdeploy.bundle.manifest import Manifest

F = TypeVar("F", bound=Callable[..., Any])


class Number(click.FloatRange):
    """Numbers of a range. For click ``nan`` is in every one: it is neither less nor more."""

    endless = False

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; ``inf`` is one where it may be endless."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number) or (math.isinf(number) and not self.endless):
            self.fail(f"expected a number, found {value}.", param, ctx)
        return number


class Wait(Number):
    """A time to wait, for ever (``inf``) as well."""

    endless = True


DIRECTORY = NamedPath(path_type=Path, file_okay=False)
# Of a bundle, an adapter: a file there is told what it is by who reads it.
SOURCE = NamedPath(path_type=Path)
IMAGES = NamedPath(path_type=Path)  # a folder, or a list of paths and labels
FILE = NamedPath(path_type=Path, dir_okay=False)
DEVICE = OneOf(DEVICES)
PRECISION = click.Choice(PRECISIONS)
SEED = click.IntRange(0, MOST_SEED)

precision_option = click.option("--precision", type=PRECISION, default="float32", show_default=True)
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of one run.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
lock_timeout_option = click.option(
    "--lock-timeout",
    type=Wait(0),
    default=LOCK_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for another process that is changing the bundle.",
)


def console() -> Console:
    """Standard output, made anew so that redirection (and click's test runner) is honoured.

    A table is as wide as what is in it: one that has to fit leaves figures and whole columns out,
    and a pipe counts as 80 columns. A terminal wraps what is longer. Text is no markup: names and
    paths may hold ``[v2]``; a style is said beside it.
    """
    return Console(width=UNCUT, highlight=False, markup=False, emoji=False)


def quoted(word: object) -> str:
    """A name or path as a command line to copy has it."""
    return shlex.quote(str(word))


def say_unverified(bundle: Path, adapters: Iterable[str]) -> None:
    """A line for each adapter of a bundle that was never compared with its training-time model."""
    for adapter in adapters:
        line = f" is not verified: run hhdeploy verify {quoted(bundle)} --against-torch"
        console().print(Text.assemble((adapter, "yellow"), line))


def print_json(content: Any) -> None:
    """One indented JSON document on standard output."""
    click.echo(json.dumps(content, indent=2, allow_nan=False))


def table(
    title: str | Text | None, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> Group:
    """A table; the first column is left-aligned, the others right-aligned.

    Cells are plain text (a class may be called ``[b]``); for colour pass a `Text`.
    """
    result = Table(
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(c if isinstance(c, Text) else Text(str(c)) for c in row))
    # Not rich's own title, which is wrapped to the width of the table.
    return Group(title, result) if title else Group(result)


def fits(shown: Group) -> bool:
    """Whether a table is no wider than the terminal; than 80 columns where there is none."""
    wide = Measurement.get(console(), console().options, shown).maximum
    return wide <= shutil.get_terminal_size().columns


def titled(title: str, remark: str) -> Text:
    """A title of a `table`, and a remark below it."""
    return Text.assemble(f"{title}\n", (remark, "dim"))


def verdict(good: bool, yes: str, no: str) -> Text:
    """``yes`` in green or ``no`` in red."""
    return Text(yes, "green") if good else Text(no, "red")


def json_object(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> dict[str, Any] | None:
    """Callback of an option that takes a JSON object, e.g. ``'{"img_size": 384}'``."""
    if text is None:
        return None
    expected = "expected a JSON object such as '{\"img_size\": 384}', found"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{expected} {text!r} ({json_problem(error)}).") from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{expected} {text!r}.")
    return content


def refuse_unused(names: Container[str], why: str) -> None:
    """Refuse options of the command that runs which would do nothing: none is ignored.

    Args:
        names: of its parameters.
        why: what the message says behind the flag, such as ``needs --serve``.

    Raises:
        UsageError: naming the first one that was given.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in names or context.get_parameter_source(name) is ParameterSource.DEFAULT:
            continue
        negative = context.params[name] is False and parameter.secondary_opts
        flag = (parameter.secondary_opts if negative else parameter.opts)[0]
        raise click.UsageError(f"{flag} {why}.", context)


def check_cache_options(cache_dir: Path | None, no_cache: bool) -> str | Path | None:
    """``cache`` of the API from --cache-dir and --no-cache."""
    if cache_dir is not None and no_cache:
        raise click.UsageError("--cache-dir and --no-cache exclude each other: give one.")
    return None if no_cache else (cache_dir or "default")


def check_backbone_options(checkpoint: Path | None, pretrained: bool, *, noise: bool) -> None:
    """--checkpoint, --no-pretrained and --seed go together.

    Args:
        checkpoint, pretrained: as given.
        noise: the command also draws noise from --seed.
    """
    if checkpoint is not None and not pretrained:
        raise click.UsageError("--checkpoint and --no-pretrained exclude each other: give one.")
    if pretrained and not noise:
        refuse_unused({"seed"}, "has nothing to draw: neither weights nor noise are random here")


def input_size(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, int, int] | None:
    """``C,H,W``, ``H,W`` or one side of a square, as (channels, height, width)."""
    if text is None:
        return None
    numbers = text.replace("x", ",").split(",")
    if not all(n.strip().isdecimal() and int(n) for n in numbers) or len(numbers) > 3:
        raise click.BadParameter(f"expected C,H,W such as 3,224,224, found {text!r}.")
    sizes = [int(n) for n in numbers]
    if len(sizes) == 1:
        sizes *= 2
    channels, height, width = sizes if len(sizes) == 3 else (3, *sizes)
    return channels, height, width


MODEL_HELP = (
    "timm name, e.g. vit_base_patch16_224.augreg_in21k; transformers:DIR_OR_HUB_ID; or "
    "python:package.module:function, which returns a torch module."
)
model_option = click.option("--model", required=True, help=MODEL_HELP)
MODEL_ARGS_HELP = (
    "Further arguments: of timm.create_model, transformers' configuration or the function."
)
model_args_option = click.option(
    "--model-args", callback=json_object, metavar="JSON", help=MODEL_ARGS_HELP
)
input_size_option = click.option(
    "--input-size",
    callback=input_size,
    metavar="C,H,W",
    help="Of the images, where the model does not say.",
)


def backbone_options(command: F) -> F:
    """--model-args, --checkpoint, --input-size, --pretrained/--no-pretrained, --seed."""
    for option in (
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=SEED,
            help="Of random weights and of the noise.",
        ),
        click.option(
            "--pretrained/--no-pretrained",
            default=True,
            show_default=True,
            help="Without --checkpoint: the source's weights, or random ones for benchmarks.",
        ),
        input_size_option,
        click.option("--checkpoint", type=FILE, help="A file with the backbone's weights."),
        model_args_option,
    ):
        command = option(command)
    return command


def cache_options(what: str) -> Callable[[F], F]:
    """--cache-dir and --no-cache, for what is kept; `check_cache_options` reads them."""

    def add(command: F) -> F:
        for option in (
            click.option("--no-cache", is_flag=True, help=f"Neither read nor store {what}."),
            click.option("--cache-dir", type=DIRECTORY, help=f"Where {what} are kept."),
        ):
            command = option(command)
        return command

    return add


def device_option(default: Device, purpose: str = "") -> Callable[[F], F]:
    """--device; ``purpose``: what it does, where that is not what the command is for."""
    help_ = f"{purpose}{AUTO}"
    return click.option("--device", type=DEVICE, default=default, show_default=True, help=help_)


def session_options(command: F) -> F:
    """--device, --precision, --threads, --cache-dir and --no-cache: how a session is opened."""
    for option in (cache_options("compiled models"), threads_option, precision_option):
        command = option(command)
    return device_option("auto")(command)


def repository_options(command: F) -> F:
    """BUNDLE, OUT, --name and --precision: of a model in a server's repository."""
    for option in (
        precision_option,
        click.option("--name", help="Of the model; default: the bundle's directory name."),
        click.argument("out", type=DIRECTORY),
        click.argument("bundle", type=SOURCE),
    ):
        command = option(command)
    return command


overwrite_model_option = click.option(
    "--overwrite", is_flag=True, help="Replace the model in OUT once the new one is complete."
)


def say_compressed(manifest: Manifest) -> None:
    """A line for each adapter that is not all that was trained: parity is with what is left."""
    for entry in manifest.adapters:
        if entry.compressed:
            text = f"{entry.name} is {entry.compressed}"
            console().print(text, style="yellow", markup=False, soft_wrap=True)
