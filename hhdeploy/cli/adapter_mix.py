"""hhdeploy adapter merge | diff."""

from __future__ import annotations

from pathlib import Path

import click

from hhdeploy.cli import CONTEXT, ui


@click.command("merge", context_settings=CONTEXT)
@click.argument("parts", metavar="DIR=WEIGHT...", nargs=-1, required=True)
@click.argument("out", type=ui.DIRECTORY)
@click.option(
    "--head", metavar="DIR", help="Whose classifier, class names and preprocessing OUT has."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the adapter is complete.")
def merge(parts: tuple[str, ...], out: Path, head: str | None, overwrite: bool) -> None:
    """Write the weighted sum of several adapters of one backbone as the adapter OUT.

    The sum of the changes, exactly: its ranks are those of the parts together. Classifiers are
    not mixed.

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
    mixed = merge_adapters(adapters, head)
    save_adapter(mixed, out, overwrite=overwrite)
    click.echo(f"Wrote {out}: {len(mixed.sites)} sites of {mixed.config.base_model}")


@click.command("diff", context_settings=CONTEXT)
@click.argument("a", type=ui.DIRECTORY)
@click.argument("b", type=ui.DIRECTORY)
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
