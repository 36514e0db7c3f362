"""hhdeploy adapter import | extract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hhdeploy.adapters.config import PROBLEM_TYPES
from hhdeploy.algebra import REFLECTIONS, Reflection
from hhdeploy.backbones.sites import FORMS, Form
from hhdeploy.cli import CONTEXT, ui
from hhdeploy.cli.naming import OneOf
from hhdeploy.cli.progress import note
from hhdeploy.errors import abbreviate

if TYPE_CHECKING:
    from hhdeploy.adapters.format import Adapter
    from hhdeploy.backbones.facts import BackboneFacts
    from hhdeploy.preprocess import Preprocess

F = TypeVar("F", bound=Callable[..., Any])


def _shared_options(checkpoint_help: str) -> Callable[[F], F]:
    """The backbone, and what no source says."""

    def add(command: F) -> F:
        for option in reversed(
            (
                ui.model_option,
                ui.model_args_option,
                ui.input_size_option,
                click.option("--checkpoint", type=ui.FILE, help=checkpoint_help),
                click.option(
                    "--class-name",
                    "class_names",
                    multiple=True,
                    metavar="NAME",
                    help="In order; one per class.",
                ),
                click.option(
                    "--problem-type",
                    type=OneOf(PROBLEM_TYPES),
                    help="What the head's outputs are. [default: classes, of one output a value]",
                ),
                click.option(
                    "--preprocess",
                    callback=ui.json_object,
                    metavar="JSON",
                    help="How images become inputs: mean, std, interpolation, crop_pct, crop_mode; "
                    "what it leaves out is the model's. [default: preprocessor_config.json beside "
                    "SOURCE, else the model's]",
                ),
                click.option(
                    "--compress-rank",
                    type=int,
                    metavar="K",
                    help="Changes of Linears that could only be folded become products of rank K.",
                ),
                click.option(
                    "--accept-error",
                    type=float,
                    metavar="X",
                    help="Share of the logits' range that --compress-rank may lose. "
                    "[default: 0.01]",
                ),
                click.option(
                    "--overwrite", is_flag=True, help="Replace OUT once the adapter is complete."
                ),
            )
        ):
            command = option(command)
        return command

    return add


@click.command("import", context_settings=CONTEXT)
@click.argument("source", type=ui.SOURCE)
@click.argument("out", type=ui.DIRECTORY)
@_shared_options(
    "The backbone's weights [default: the model's own]. All but plain LoRA is converted with them; "
    "of plain LoRA their digest is recorded."
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
    "--key-map",
    type=ui.FILE,
    help="JSON: what the keys of a .pth file mean, by regular expressions; see docs/importing.md.",
)
@click.option("--adapter-name", metavar="NAME", help="Which one of a file that holds several.")
def command(
    source: Path,
    out: Path,
    model: str,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    overwrite: bool,
    form: Form | None,
    reflection: Reflection | None,
    lora_scale: float,
    prefix: str,
    key_map: Path | None,
    adapter_name: str | None,
    **stated: Any,
) -> None:
    """Convert SOURCE, an adapter of another tool, to the adapter directory OUT.

    SOURCE is a directory of PEFT or a .pth file with keys SITE.u, .v, .d, .lora_A or .lora_B and
    the classifier's. LoRA, rsLoRA and HRA are read as they are; PEFT itself merges its other
    methods (pip install 'hhdeploy[peft]'). What cannot be a side branch exactly is marked: it can
    be folded, or compressed. Nothing is unpickled but tensors, and no code runs because a file
    names it.

    \b
      hhdeploy adapter import lora/ OUT --model vit_base_patch16_224
      hhdeploy adapter import hta.pth OUT --model vit_base_patch16_224 \\
        --reflection orthogonal
    """
    from hhdeploy.adapters.importers import (
        ImportOptions,
        brings_classifier,
        import_adapter,
        needs_weights,
    )
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec
    from hhdeploy.backbones.transformers import with_classifier

    # timm's would have to be fetched; its folders and the other sources have theirs with the model.
    at_hand = model.startswith(("transformers:", "python:")) or Path(model, "config.json").is_file()
    weights_known = checkpoint is not None or needs_weights(source) or at_hand
    spec = BackboneSpec(
        model, model_args or {}, checkpoint, pretrained=weights_known, input_size=input_size
    )
    backbone = load_backbone(with_classifier(spec) if brings_classifier(source) else spec)
    for line in backbone.notes:
        note(line)
    options = ImportOptions(
        form=form,
        reflection=reflection,
        prefix=prefix,
        lora_scale=lora_scale,
        weights_known=weights_known,
        key_map=key_map,
        adapter_name=adapter_name,
        **_stated(stated, backbone.facts),
    )
    _write(import_adapter(source, backbone, options), out, overwrite, options.compress_rank)


@click.command("extract", context_settings=CONTEXT)
@click.argument("fine_tuned", metavar="CHECKPOINT", type=ui.SOURCE)
@click.argument("out", type=ui.DIRECTORY)
@_shared_options("The backbone's weights before the fine-tuning [default: the model's own].")
def extract(
    fine_tuned: Path,
    out: Path,
    model: str,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    overwrite: bool,
    **stated: Any,
) -> None:
    """Write what CHECKPOINT, a fine-tuned model, changed of its backbone as the adapter OUT.

    A merged LoRA is found again at its rank and can be a side branch; a change of every weight
    can be folded, or compressed. Of a training's checkpoint the averaged weights (EMA) are taken.

    \b
      hhdeploy adapter extract tuned.pth OUT --model vit_base_patch16_224
      hhdeploy adapter extract tuned.pth OUT --model vit_base_patch16_224 \\
        --compress-rank 16
    """
    from hhdeploy.adapters.importers import ImportOptions
    from hhdeploy.adapters.importers.checkpoint import extract_adapter
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec

    spec = BackboneSpec(model, model_args or {}, checkpoint, input_size=input_size)
    backbone = load_backbone(spec)
    options = ImportOptions(**_stated(stated, backbone.facts))
    adapter = extract_adapter(fine_tuned, spec, options, backbone=backbone)
    _write(adapter, out, overwrite, options.compress_rank)


def _stated(options: dict[str, Any], facts: BackboneFacts) -> dict[str, Any]:
    """`ImportOptions` of the options that both commands have."""
    preprocess = _preprocess(options["preprocess"], facts)
    return {**options, "class_names": options["class_names"] or None, "preprocess": preprocess}


def _preprocess(stated: dict[str, Any] | None, facts: BackboneFacts) -> Preprocess | None:
    """The model's transform with what ``--preprocess`` replaces."""
    from hhdeploy.preprocess import Preprocess

    if stated is None:
        return None
    known = facts.preprocess.to_json()
    if unknown := sorted(set(stated) - set(known)):
        raise click.UsageError(
            f"--preprocess: expected keys among {', '.join(known)}, found {', '.join(unknown)}."
        )
    try:
        return Preprocess.stated({**known, **stated})
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"--preprocess: {error}") from error


def _write(adapter: Adapter, out: Path, overwrite: bool, compress_rank: int | None) -> None:
    """Save it, and say what it is and what was assumed, or left as it was."""
    from hhdeploy.adapters.format import save_adapter

    save_adapter(adapter, out, overwrite=overwrite)
    config = adapter.config
    head = f"{config.num_classes} classes" if adapter.head else "no classifier"
    click.echo(f"Wrote {out}: {len(adapter.sites)} sites of {config.base_model}, {head}")
    for line in config.extra["imported_from"].get("assumed", ()):
        note(line)
    if config.fold_only:
        names = abbreviate(adapter.values, 3)
        note(
            f"It can be folded (export --fold) and is no side branch: {names} changed in a way "
            "that a row does not hold. Changes of Linears become side branches with "
            "--compress-rank K."
        )
    if config.compressed:
        note(f"It is {config.compressed}.")
    elif compress_rank is not None:
        note(
            f"--compress-rank {compress_rank} compressed nothing: no change is dense, and those of "
            "low rank stay as they are."
        )
    if config.extra["imported_from"]["preprocess_assumed"] and config.preprocess is not None:
        note(
            f"preprocessing assumed, the model's: {config.preprocess.described()}. Say how images "
            "become inputs with --preprocess JSON."
        )
    if config.base_sha256 is None:
        note("base_sha256 is unknown: pass --checkpoint to record which weights it belongs to.")
