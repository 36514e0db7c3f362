"""hhdeploy bom."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.cli import ui


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.option("--out", type=ui.FILE, help="Write it to this file; default: standard output.")
def command(bundle: Path, out: Path | None) -> None:
    """Say what BUNDLE is made of: a CycloneDX 1.6 ML-BOM, in JSON.

    Backbone, adapters and files with sha256, licences as their sources state them, errors as
    measured. Every hash is compared first.
    """
    from hhdeploy.bundle.bom import bill_of_materials
    from hhdeploy.files.outputs import check_output, output_file

    if out is not None:
        check_output(out)
    content = bill_of_materials(bundle)
    if out is None:
        click.echo(content.decode(), nl=False)
        return
    with output_file(out) as scratch:
        scratch.write_bytes(content)
    click.echo(f"Wrote {out}")
