"""hhdeploy web."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.choices import Precision
from hhdeploy.cli import ui
from hhdeploy.cli.progress import steps


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.argument("out", type=ui.DIRECTORY)
@click.option(
    "--precision",
    type=ui.PRECISION,
    help="Of the graph that the page runs; default: int8 where the bundle has it, else float32.",
)
@click.option("--title", help="Of the page; default: the bundle's directory name.")
@click.option(
    "--overwrite", is_flag=True, help="Replace the page in OUT once the new one is complete."
)
@ui.json_option
def command(
    bundle: Path,
    out: Path,
    precision: Precision | None,
    title: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write BUNDLE as a page OUT that runs it in the browser: a folder for any static web server.

    All adapters answer for a picture that is dropped, chosen or taken. Nothing leaves the device,
    and after the first visit the page needs no network. Node.js and the extra `export` are needed
    here and now alone.

    \b
      hhdeploy web bundle/ site/
      python -m http.server -d site/ -b 127.0.0.1
    """
    from hhdeploy.exporting.web import write_web_page

    with steps(as_json) as step:
        page = write_web_page(
            bundle, out, precision=precision, title=title, overwrite=overwrite, progress=step
        )
    if as_json:
        ui.print_json(
            {
                "path": str(page.path),
                "precision": page.precision,
                "adapters": list(page.adapters),
                "files": dict(page.files),
                "sent": page.sent,
            }
        )
        return
    click.echo(
        f"Wrote {page.path}: {len(page.files)} files, {page.precision}; a first visit loads "
        f"{page.sent / 1e6:.1f} MB.\n"
        f"Look:  python -m http.server -d {ui.quoted(page.path)} -b 127.0.0.1\n"
        "Publish it on any web server of files, over https."
    )
