"""hhdeploy export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hhdeploy.backbones.facts import OUTPUTS
from hhdeploy.choices import TypedPrecision
from hhdeploy.cli import ui
from hhdeploy.cli.naming import adapters_and_strengths
from hhdeploy.cli.parity_table import parity_table
from hhdeploy.cli.progress import steps

if TYPE_CHECKING:
    from hhdeploy.bundle.manifest import Manifest


@click.command()
@click.argument("out", type=ui.DIRECTORY)
@ui.model_option
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR[@S]",
    help="An adapter directory; repeat for more. Named after the directory unless given. S is its "
    "strength, e.g. 0.7.",
)
@click.option("--fold", is_flag=True, help="Put the one adapter, if any, into the weights.")
@ui.backbone_options
@click.option(
    "--output",
    "outputs",
    multiple=True,
    type=click.Choice(OUTPUTS),
    help="Of the graph: logits, features (what the classifier sees), tokens (the last hidden "
    "state). Repeatable; default: logits, or features where there is no classifier.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=ui.PRECISION,
    metavar="P",
    help="Also write this graph: float16 or bfloat16. Repeatable.",
)
@click.option(
    "--opset",
    type=click.Choice(("18", "20")),
    default="20",
    show_default=True,
    help="Of the graphs; 18 has no Gelu, which is written out.",
)
@click.option(
    "--single-file", is_flag=True, help="Weights inside of the graphs' files; below 2 GB."
)
@click.option(
    "--max-rank",
    default=0,
    show_default=True,
    help="Reserve rank: 2 for the reflections + low rank.",
)
@click.option(
    "--max-classes", default=0, show_default=True, help="Reserve classes for later adapters' heads."
)
@click.option(
    "--sites",
    multiple=True,
    metavar="TARGET",
    help="Reserve branches, e.g. fc1, proj:sequential or a site's name. Repeatable.",
)
@click.option(
    "--parts",
    default="",
    metavar="PARTS",
    help="Reserve, at every branch, of s_in,s_out,db: multipliers and a bias (IA3, DoRA).",
)
@click.option(
    "--keep-backbone-head", is_flag=True, help="Keep the backbone's own classifier selectable."
)
@click.option(
    "--bank-as-constant",
    is_flag=True,
    help="Bake the bank into the graph, for servers that keep no inputs between requests.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare with the training-time model.",
)
@click.option(
    "--verify-data",
    type=ui.IMAGES,
    help="Images to verify on (DIR/ADAPTER/... or DIR/..., or a list, FILE.txt); default: seeded "
    "noise.",
)
@click.option(
    "--verify-images",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Images per adapter.",
)
@click.option(
    "--allow-no-effect",
    is_flag=True,
    help="Take an adapter that moves no logit on the images of the verification, too.",
)
@ui.cache_options("traced backbones")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new bundle is complete.")
@ui.lock_timeout_option
@ui.json_option
def command(
    out: Path,
    model: str,
    adapters: tuple[str, ...],
    fold: bool,
    model_args: dict[str, Any] | None,
    checkpoint: Path | None,
    pretrained: bool,
    seed: int,
    input_size: tuple[int, int, int] | None,
    outputs: tuple[str, ...],
    precisions: tuple[TypedPrecision, ...],
    opset: str,
    single_file: bool,
    max_rank: int,
    max_classes: int,
    sites: tuple[str, ...],
    parts: str,
    keep_backbone_head: bool,
    bank_as_constant: bool,
    verify: bool,
    verify_data: Path | None,
    verify_images: int,
    allow_no_effect: bool,
    cache_dir: Path | None,
    no_cache: bool,
    overwrite: bool,
    lock_timeout: float,
    as_json: bool,
) -> None:
    """Export adapters of one backbone to the bundle OUT, verified.

    \b
    One adapter in the weights:
      hhdeploy export --fold --model vit_base_patch16_224 --adapter digits/ OUT
    A model as it is, fine-tuned or merged:
      hhdeploy export --fold --model vit_base_patch16_224 --checkpoint FILE OUT
    Many adapters, one graph, another one for every image:
      hhdeploy export --model vit_base_patch16_224 --adapter digits/ \\
        --adapter cars/ OUT
    """
    from hhdeploy.exporting.bundles import export
    from hhdeploy.plan import Reserve

    named, strengths = adapters_and_strengths(adapters)
    cache = ui.check_cache_options(cache_dir, no_cache)
    if not adapters and not fold and not sites:
        raise click.UsageError(
            "Missing option '--adapter'. Without one, --fold exports the model as it is and "
            "--sites reserves room."
        )
    if not verify:
        ui.refuse_unused(
            {"verify_data", "verify_images", "allow_no_effect"}, "does not go with --no-verify"
        )
    if not overwrite:
        ui.refuse_unused({"lock_timeout"}, "needs --overwrite: nobody changes a new bundle")
    noise = verify and verify_data is None
    ui.check_backbone_options(checkpoint, pretrained, noise=noise)
    with steps(as_json) as step:
        result = export(
            model,
            named,
            out,
            fold=fold,
            strengths=strengths,
            model_args=model_args,
            checkpoint=checkpoint,
            pretrained=pretrained,
            seed=seed,
            input_size=input_size,
            reserve=Reserve(
                max_rank,
                max_classes,
                sites,
                keep_backbone_head,
                tuple(filter(None, parts.split(","))),
            ),
            bank_as_constant=bank_as_constant,
            outputs=outputs,
            precisions=precisions,
            opset=int(opset),
            single_file=single_file,
            verify=verify,
            verify_data=verify_data,
            verify_images=verify_images,
            allow_no_effect=allow_no_effect,
            cache=cache,
            overwrite=overwrite,
            lock_timeout=lock_timeout,
            progress=step,
        )
    if as_json:
        ui.print_json(
            {
                "bundle": str(result.path),
                "kind": result.manifest.kind,
                "adapters": [a.name for a in result.manifest.adapters],
                "outputs": {k: list(v) for k, v in result.manifest.outputs.items()},
                "parity": result.parity.to_json() if result.parity else None,
            }
        )
        return
    console = ui.console()
    if result.parity is not None:
        console.print(parity_table(result.parity))
    else:
        console.print("Not verified (--no-verify).", style="yellow")
    ui.say_compressed(result.manifest)
    console.print(f"Wrote {result.manifest.kind} bundle {result.path}")
    console.print(f"Next: {next_step(result.path, result.manifest)}")


def next_step(bundle: Path, manifest: Manifest) -> str:
    """The command with which a new bundle answers; before that, what it needs to answer."""
    where = ui.quoted(bundle)
    if manifest.adapters:
        name = ui.quoted(manifest.adapters[0].name)
        return f"hhdeploy predict {where} IMAGE --adapter {name}"
    if manifest.answers_backbone:
        return f"hhdeploy predict {where} IMAGE"
    return f"hhdeploy adapter add {where} NAME=DIR"
