"""hhdeploy adapter merge | diff."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hhdeploy.cli import CONTEXT, ui
from hhdeploy.cli.progress import note

if TYPE_CHECKING:
    from hhdeploy.adapters.format import Adapter
    from hhdeploy.backbones.spec import Backbone


@click.command("merge", context_settings=CONTEXT)
@click.argument("parts", metavar="DIR=WEIGHT...", nargs=-1, required=True)
@click.argument("out", type=ui.DIRECTORY)
@click.option(
    "--head", metavar="DIR", help="Whose classifier, class names and preprocessing OUT has."
)
@click.option(
    "--model", help="The backbone of all, where they replace parameters (can only be folded)."
)
@click.option(
    "--model-args",
    callback=ui.json_object,
    metavar="JSON",
    help=ui.MODEL_ARGS_HELP + " [default: the adapters']",
)
@ui.input_size_option
@click.option("--checkpoint", type=ui.FILE, help="A file with the backbone's weights.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the adapter is complete.")
def merge(
    parts: tuple[str, ...],
    out: Path,
    head: str | None,
    model: str | None,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    overwrite: bool,
) -> None:
    """Write the weighted sum of several adapters of one backbone as the adapter OUT.

    The sum of the changes, exactly: its ranks are those of the parts together. Classifiers are
    not mixed. Parameters that are replaced whole move by what the backbone has there, which takes
    --model, unless the weights are 1 together.

    \b
      hhdeploy adapter merge birds=0.5 planes=0.5 OUT --head birds
    """
    from hhdeploy.adapters.format import load_adapter, save_adapter
    from hhdeploy.adapters.mixing import merge_adapters

    weights: dict[str, float] = {}
    for part in parts:
        name, _, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not name or not value == value or abs(value) == float("inf"):
            raise click.UsageError(f"{part!r}: expected DIR=WEIGHT such as birds=0.5.")
        if name in weights:
            raise click.UsageError(f"{name} is named twice: give the sum of its weights.")
        weights[name] = value
    adapters = {name: (load_adapter(name), weight) for name, weight in weights.items()}
    backbone = None
    if model is not None:
        every = {name: adapter for name, (adapter, _) in adapters.items()}
        backbone = _backbone(model, model_args, input_size, checkpoint, every)
    elif (model_args, input_size, checkpoint) != (None, None, None):
        raise click.UsageError("--model-args, --input-size and --checkpoint are of --model.")
    mixed = merge_adapters(adapters, head, backbone)
    save_adapter(mixed, out, overwrite=overwrite)
    replaced = f", {len(mixed.values)} whole parameters" if mixed.values else ""
    click.echo(f"Wrote {out}: {len(mixed.sites)} sites of {mixed.config.base_model}{replaced}")


def _backbone(
    model: str,
    model_args: Mapping[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    adapters: Mapping[str, Adapter],
) -> Backbone:
    """The backbone of all, with the arguments that they agree on."""
    from hhdeploy.adapters.checks import model_args_of
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec

    args = model_args_of(model, model_args, adapters)
    backbone = load_backbone(BackboneSpec(model, args, checkpoint, input_size=input_size))
    for line in backbone.notes:
        note(line)
    return backbone


@click.command("diff", context_settings=CONTEXT)
@click.argument("a", type=ui.SOURCE)
@click.argument("b", type=ui.SOURCE)
@ui.json_option
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show how the adapters A and B differ, setting by setting and site by site.

    The distance is the norm of the difference over the larger of both norms: 0 for the same
    change, 1.4 for changes of one size that have nothing in common, 2 for opposite ones.
    """
    from hhdeploy.adapters.differing import difference
    from hhdeploy.adapters.format import load_adapter

    found = difference(load_adapter(a), load_adapter(b))
    if as_json:
        ui.print_json(found.to_json())
        return
    console = ui.console()
    for key, (mine, theirs) in found.settings.items():
        console.print(f"{key:24} {mine}  |  {theirs}")
    rows = [
        (
            site.site,
            f"{site.norm_a:.3g}",
            f"{site.norm_b:.3g}",
            "-" if site.cosine is None else f"{site.cosine:.3f}",
            f"{site.distance:.2g}",
        )
        for site in found.sites
    ]
    console.print(ui.table(None, ("site", "norm of A", "norm of B", "cosine", "distance"), rows))
    click.echo("The adapters are equal." if found.equal else "The adapters differ.")
