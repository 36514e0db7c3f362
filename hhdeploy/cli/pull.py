"""hhdeploy pull."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.cli import ui
from hhdeploy.cli.progress import steps


@click.command()
@click.argument("source")
@click.argument("out", type=ui.DIRECTORY)
@click.option("--public-key", type=ui.FILE, help="Refuse what was not signed with its private key.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle OUT once all is checked.")
@ui.lock_timeout_option
def command(
    source: str, out: Path, public_key: Path | None, overwrite: bool, lock_timeout: float
) -> None:
    """Get the bundle in SOURCE, a folder or hf://owner/name, and write it to OUT.

    Every file is compared with its hash, and with --public-key the whole with its signature,
    before anything is at OUT.

    \b
      hhdeploy pull hf://me/flowers bundle/ --public-key key.pub
    """
    if not overwrite:
        ui.refuse_unused({"lock_timeout"}, "needs --overwrite")
    from hhdeploy.bundle.hub import pull

    with steps(quiet=False) as step:
        bundle = pull(
            source,
            out,
            public_key=public_key,
            overwrite=overwrite,
            lock_timeout=lock_timeout,
            progress=step,
        )
    click.echo(f"Wrote {out}: {len(bundle.manifest.files) + 1} files")
