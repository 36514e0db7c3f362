"""hhdeploy push."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.cli import ui
from hhdeploy.cli.progress import steps


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.argument("destination")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier push wrote to a folder.")
@click.option("--dry-run", is_flag=True, help="Check every hash and list what would be written.")
@ui.json_option
def command(bundle: Path, destination: str, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """Write BUNDLE to DESTINATION, a repository of models: a folder, or hf://owner/name.

    The model card is the repository's README.md, and .gitattributes sends large files to Git LFS.

    \b
      hhdeploy push bundle/ /mnt/models/flowers
      hhdeploy push bundle/ hf://me/flowers
    """
    from hhdeploy.bundle.hub import ATTRIBUTES, push

    with steps(as_json) as step:
        plan = push(bundle, destination, overwrite=overwrite, dry_run=dry_run, progress=step)
    if as_json:
        ui.print_json({"files": [*plan.files, ATTRIBUTES], "lfs": list(plan.large)})
        return
    if dry_run:
        for name in (*plan.files, ATTRIBUTES):
            click.echo(f"  {name}{' (LFS)' if name in plan.large else ''}")
    click.echo(
        f"{'Would write' if dry_run else 'Wrote'} {len(plan.files) + 1} files to {destination}"
    )
