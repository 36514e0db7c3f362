"""hhdeploy verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from hhdeploy.choices import QUANTISED, Device, Precision
from hhdeploy.cli import ui
from hhdeploy.cli.parity_table import parity_table
from hhdeploy.cli.progress import steps

if TYPE_CHECKING:
    from hhdeploy.bundle.manifest import Manifest
    from hhdeploy.parity import ParityReport

_AGAINST_TORCH = frozenset(
    "model model_args input_size checkpoint pretrained seed verify_data verify_images "
    "lock_timeout".split()
)


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@ui.device_option("cpu")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=ui.PRECISION,
    help="Only these graphs; default: all. Typed graphs are checked by their rounding twin.",
)
@click.option(
    "--against-torch",
    is_flag=True,
    help="Recompute the reference with torch, adapters added later included.",
)
@click.option(
    "--model",
    help="--against-torch, as in export: needed where the bundle does not name it, or names code.",
)
@click.option(
    "--model-args",
    callback=ui.json_object,
    metavar="JSON",
    help="--against-torch: further arguments, with --model.",
)
@ui.input_size_option
@click.option("--checkpoint", type=ui.FILE, help="--against-torch: the backbone's weights.")
@click.option(
    "--pretrained/--no-pretrained",
    default=True,
    show_default=True,
    help="--against-torch, as in export.",
)
@click.option(
    "--seed", default=0, show_default=True, type=ui.SEED, help="--against-torch, as in export."
)
@click.option("--verify-data", type=ui.IMAGES, help="--against-torch: images to use.")
@click.option(
    "--verify-images",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="--against-torch: images per adapter.",
)
@click.option(
    "--signature",
    is_flag=True,
    help="First compare every byte of BUNDLE with its signature: hhdeploy sign.",
)
@click.option("--public-key", type=ui.FILE, help="--signature: of the key that signed it, in PEM.")
@ui.lock_timeout_option
@ui.json_option
def command(
    bundle: Path,
    device: Device,
    precisions: tuple[Precision, ...],
    against_torch: bool,
    model: str | None,
    model_args: dict[str, Any] | None,
    input_size: tuple[int, int, int] | None,
    checkpoint: Path | None,
    pretrained: bool,
    seed: int,
    verify_data: Path | None,
    verify_images: int,
    signature: bool,
    public_key: Path | None,
    lock_timeout: float,
    as_json: bool,
) -> None:
    """Compare BUNDLE with the training-time reference it carries; exit 1 if parity fails.

    Needs no torch for the float32 graph. Adapters added later are not in the reference until
    --against-torch has been run; with --precision it stores nothing unless float32 is among them.
    """
    if signature != (public_key is not None):
        raise click.UsageError("--signature and --public-key go together.")
    if against_torch:
        ui.check_backbone_options(checkpoint, pretrained, noise=verify_data is None)
    else:
        ui.refuse_unused(_AGAINST_TORCH, "needs --against-torch")
    from hhdeploy.bundle import Bundle
    from hhdeploy.bundle.signing import check_signature
    from hhdeploy.verifying.bundles import verify, verify_against_torch

    with steps(as_json) as step:
        if public_key is not None:
            step("comparing with the signature")
            check_signature(bundle, public_key)
        step("verifying")
        if against_torch:
            report = verify_against_torch(
                bundle,
                model=model,
                model_args=model_args,
                input_size=input_size,
                checkpoint=checkpoint,
                pretrained=pretrained,
                seed=seed,
                verify_data=verify_data,
                verify_images=verify_images,
                device=device,
                precisions=precisions or None,
                lock_timeout=lock_timeout,
                progress=step,
            )
        else:
            report = verify(bundle, device=device, precisions=precisions or None)
    if as_json:
        ui.print_json(report.to_json())
    else:
        ui.console().print(parity_table(report))
        for overflow in dict.fromkeys(s.overflow for s in report.stages if s.overflow):
            ui.console().print(overflow, style="red", markup=False, soft_wrap=True)
        manifest = Bundle.open(bundle).manifest
        ui.say_compressed(manifest)
        _say_not_compared(bundle, manifest, report, precisions)
        for name in (a.name for a in manifest.adapters if not a.verified):
            line = (
                " was added later and is not in the reference: run hhdeploy verify "
                f"{ui.quoted(bundle)} --against-torch"
            )
            ui.console().print(Text.assemble((name, "yellow"), line))
    if not report.passed:
        raise SystemExit(1)


def _say_not_compared(
    bundle: Path, manifest: Manifest, report: ParityReport, precisions: tuple[Precision, ...]
) -> None:
    """A line for each graph from calibration that noise cannot show, unless others were named."""
    compared = {stage.precision for stage in report.stages}
    if precisions or report.data.get("kind") != "noise":
        return
    for precision in (p for p in manifest.graphs if p in QUANTISED and p not in compared):
        line = (
            " was not compared: seeded noise leaves the ranges that it was calibrated for. Compare "
            f"it on images: hhdeploy verify {ui.quoted(bundle)} --against-torch --verify-data DIR"
        )
        ui.console().print(Text.assemble((precision, "yellow"), line))
