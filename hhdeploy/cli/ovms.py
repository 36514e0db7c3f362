"""hhdeploy ovms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hhdeploy.choices import Precision
from hhdeploy.cli import ui
from hhdeploy.cli.progress import steps

if TYPE_CHECKING:
    from hhdeploy.repositories.graphs import ServedModel


@click.command()
@ui.repository_options
@click.option(
    "--target-device",
    default="CPU",
    show_default=True,
    help="OpenVINO's name of what runs it: CPU, GPU, NPU, AUTO.",
)
@ui.overwrite_model_option
@ui.json_option
def command(
    bundle: Path,
    out: Path,
    name: str | None,
    precision: Precision,
    target_device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write BUNDLE as a model of the OpenVINO Model Server repository OUT.

    The bank is baked in: write the model again after adding or removing adapters. Other models
    in OUT and its config.json stay.

    \b
      hhdeploy ovms bundle/ models/ --precision int8
    """
    from hhdeploy.repositories.ovms import OvmsOptions, write_ovms_repository

    options = OvmsOptions(name=name, precision=precision, target_device=target_device)
    with steps(as_json) as step:
        model = write_ovms_repository(bundle, out, options, overwrite=overwrite, progress=step)
    if as_json:
        ui.print_json(model.to_json())
        return
    ui.say_unverified(bundle, model.unverified)
    click.echo(_summary(model))


def _summary(model: ServedModel) -> str:
    """What was written, how to serve it, and what it takes."""
    written = "\n".join(f"  {model.repository / file}" for file in model.files)
    shape = ", ".join(map(str, model.input_size))
    rows = ", ".join(f"{name} {row}" for name, row in model.rows.items() if row is not None)
    ids = f", and adapter_ids int64 [batch]: {rows}" if rows else ""
    return (
        f"Wrote model {model.name} for OpenVINO Model Server:\n{written}\n\n"
        f"Serve:  its config_path is {model.repository.resolve() / 'config.json'}\n"
        f"It takes images float32 [batch, {shape}]{ids}."
    )
