"""hhdeploy adapter import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hhdeploy.algebra import REFLECTIONS, Reflection
from hhdeploy.backbones.sites import FORMS, Form
from hhdeploy.cli import CONTEXT, ui


@click.command("import", context_settings=CONTEXT)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=ui.DIRECTORY)
@ui.model_option
@click.option(
    "--model-args",
    callback=ui.json_object,
    metavar="JSON",
    help=ui.MODEL_ARGS_HELP,
)
@ui.input_size_option
@click.option(
    "--checkpoint",
    type=ui.FILE,
    help="The backbone's weights. HRA is converted with them (default: timm's); for the others "
    "their digest is recorded.",
)
@click.option("--form", type=click.Choice(FORMS), help="Of a .pth file. [default: additive]")
@click.option(
    "--reflection", type=click.Choice(REFLECTIONS), help="Of a .pth file. [default: unnormalized]"
)
@click.option(
    "--lora-scale", default=1.0, show_default=True, help="Of a .pth file: alpha / r kept apart."
)
@click.option("--prefix", default="", help="Stripped from every tensor key, e.g. backbone.")
@click.option(
    "--class-name", "class_names", multiple=True, metavar="NAME", help="In order; one per class."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the adapter is complete.")
def command(
    source: Path,
    out: Path,
    model: str,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    form: Form | None,
    reflection: Reflection | None,
    lora_scale: float,
    prefix: str,
    class_names: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Convert SOURCE, an adapter of another tool, to the adapter directory OUT.

    SOURCE is a directory of PEFT (LoRA, rsLoRA or HRA; PEFT itself is not needed) or a .pth
    file with keys SITE.u, .v, .d, .lora_A or .lora_B and the classifier's. Nothing is unpickled
    but tensors. Variants whose meaning is not known for certain are refused.

    \b
      hhdeploy adapter import lora/ OUT --model vit_base_patch16_224
      hhdeploy adapter import hta.pth OUT --model vit_base_patch16_224 --reflection orthogonal
    """
    from hhdeploy.adapters.format import save_adapter
    from hhdeploy.adapters.importers import ImportOptions, import_adapter, needs_weights
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec

    # timm's would have to be fetched; the other sources have theirs with the model.
    timm_name = not model.startswith(("transformers:", "python:"))
    weights_known = checkpoint is not None or needs_weights(source) or not timm_name
    spec = BackboneSpec(
        model, model_args or {}, checkpoint, pretrained=weights_known, input_size=input_size
    )
    options = ImportOptions(
        form=form,
        reflection=reflection,
        prefix=prefix,
        lora_scale=lora_scale,
        class_names=class_names or None,
        weights_known=weights_known,
    )
    backbone = load_backbone(spec)
    for line in backbone.notes:
        ui.note(line)
    adapter = import_adapter(source, backbone, options)
    save_adapter(adapter, out, overwrite=overwrite)
    head = f"{adapter.config.num_classes} classes" if adapter.head else "no classifier"
    click.echo(f"Wrote {out}: {len(adapter.sites)} sites of {adapter.config.base_model}, {head}")
    if not weights_known:
        click.echo(
            "base_sha256 is unknown: pass --checkpoint to record which weights it belongs to.",
            err=True,
        )
