"""hhdeploy adapter inspect | import | extract | merge | diff | list | add | ... | unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from hhdeploy.choices import RANGED
from hhdeploy.cli import CONTEXT, Group, adapter_import, adapter_mix, ui
from hhdeploy.cli.naming import adapters_and_strengths
from hhdeploy.cli.progress import note, steps


@click.group(cls=Group, context_settings=CONTEXT)
def command() -> None:
    """Inspect, import, extract, merge, compare, list, add, remove, pack and unpack adapters."""


for _command in (
    adapter_import.command,
    adapter_import.extract,
    adapter_mix.merge,
    adapter_mix.diff,
):
    command.add_command(_command)


@command.command("inspect")
@click.argument("directories", metavar="DIRECTORY...", type=ui.SOURCE, nargs=-1, required=True)
@click.option(
    "--rank/--no-rank", default=True, show_default=True, help="Effective rank (an SVD per site)."
)
@click.option(
    "--html",
    "page",
    metavar="FILE",
    type=ui.FILE,
    help="Write a page: spectra, ranks by layer, and of several adapters their distances.",
)
@ui.json_option
def inspect(directories: tuple[Path, ...], rank: bool, page: Path | None, as_json: bool) -> None:
    """Show the sites, shapes, parameters and effective ranks of the adapter in DIRECTORY.

    The effective rank is exp of the entropy of a delta's normalised singular values: near 1 if
    one direction does it all, near min(out, in) if all matter alike.
    """
    from hhdeploy.adapters.format import load_adapter
    from hhdeploy.algebra import effective_rank
    from hhdeploy.backbones.licences import in_words, licences_to_json

    if page is not None:
        ui.refuse_unused({"rank", "as_json"}, "does not go with --html")
        _write_page(directories, page)
        return
    if len(directories) > 1:
        raise click.UsageError("several adapters are shown together with --html FILE.")
    adapter = load_adapter(directories[0])
    sites: list[dict[str, Any]] = []
    with steps(as_json or not rank) as step:
        step(f"singular values of {len(adapter.sites)} deltas")
        for name, tensors in adapter.sites.items():
            delta = adapter.delta(name)
            out, into = tensors.shape or (None, None)
            sites.append(
                {
                    "site": name,
                    "out": out,
                    "in": into,
                    "k": delta.rank if delta else 0,
                    "parts": list(tensors.parts),
                    "parameters": tensors.parameters,
                    "effective_rank": round(effective_rank(delta), 2) if delta and rank else None,
                }
            )
    config = adapter.config.to_json()
    head = adapter.head.weight.size + adapter.head.bias.size if adapter.head else 0
    if as_json:
        ui.print_json(
            {
                "config": config,
                "sites": sites,
                "values": {path: list(value.shape) for path, value in adapter.values.items()},
                "parameters": adapter.parameters,
                "head_parameters": head,
                "license": licences_to_json(adapter.config.license),
            }
        )
        return
    console = ui.console()
    for key in ("base_model_name_or_path", "form", "reflection", "target_modules", "num_classes"):
        console.print(f"{key:24} {config[key]}")
    console.print(f"{'license':24} {in_words(adapter.config.license)}", markup=False)
    for key in adapter.config.extra:
        console.print(Text.assemble(f"{key:24} ", ("(unknown key, kept)", "dim")))
    rows = [
        (
            s["site"],
            f"{s['out']} x {s['in']}" if s["out"] else "-",
            s["k"],
            " ".join(adapter.sites[s["site"]].parts) or "-",
            s["parameters"],
            s["effective_rank"] or "-",
        )
        for s in sites
    ]
    columns = ("site", "out x in", "k", "parts", "parameters", "effective rank")
    console.print(ui.table(None, columns, rows))
    for path, value in adapter.values.items():
        console.print(f"{path} {list(value.shape)}: replaced, so fold only", markup=False)
    if adapter.config.compressed:
        console.print(f"It is {adapter.config.compressed}", markup=False)
    console.print(f"{adapter.parameters:,} parameters in {len(sites)} sites, {head:,} in the head")


def _write_page(directories: tuple[Path, ...], page: Path) -> None:
    from hhdeploy.adapters.format import load_adapter
    from hhdeploy.cli.adapter_page import adapter_page
    from hhdeploy.files.outputs import check_output, output_file

    check_output(page)
    names = [path.resolve().name for path in directories]  # "." has none
    if len(set(names)) < len(names):
        names = [str(path) for path in directories]
    adapters = {name: load_adapter(path) for name, path in zip(names, directories, strict=True)}
    with steps(quiet=False) as step:
        document = adapter_page(adapters, step)
    with output_file(page) as scratch:
        scratch.write_text(document, encoding="utf-8")
    click.echo(f"Wrote {page}")


@command.command("list")
@click.argument("bundle", type=ui.SOURCE)
@ui.json_option
def list_adapters(bundle: Path, as_json: bool) -> None:
    """List the adapters of BUNDLE."""
    from hhdeploy.backbones.licences import in_words
    from hhdeploy.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    if as_json:
        ui.print_json(manifest.to_json()["adapters"])
        return
    rows = [
        (
            a.name,
            "-" if a.row is None else a.row,
            a.classes or "-",
            "yes" if a.verified else "not yet",
            in_words(a.license),
        )
        for a in manifest.adapters
    ]
    licence = in_words(manifest.backbone.license)
    title = f"{manifest.kind} bundle of {manifest.backbone.model} (licence: {licence})"
    click.echo(title)  # not the table's: a title wraps to the table's width
    ui.console().print(ui.table(None, ("adapter", "row", "classes", "verified", "licence"), rows))
    ui.say_compressed(manifest)


@command.command("add")
@click.argument("bundle", type=ui.SOURCE)
@click.argument("adapter", metavar="[NAME=]DIR[@S]")
@ui.lock_timeout_option
def add(bundle: Path, adapter: str, lock_timeout: float) -> None:
    """Add an adapter to BUNDLE: one more row of its bank, the graph stays as it is.

    DIR@0.7 adds it at 0.7 of its strength. Needs no torch. The adapter counts as unverified until
    hhdeploy verify --against-torch.
    """
    from hhdeploy.bundle import Bundle, add_adapter

    named, strengths = adapters_and_strengths([adapter])
    ((name, directory),) = named.items()
    entry = add_adapter(
        bundle,
        name,
        directory,
        strength=strengths.get(name, 1.0),
        lock_timeout=lock_timeout,
        progress=note,
    )
    click.echo(
        f"Added {entry.name} in row {entry.row} (unverified; check it with: hhdeploy verify "
        f"{ui.quoted(bundle)} --against-torch)"
    )
    graphs = Bundle.open(bundle).manifest.graphs
    for precision in (p for p in RANGED if p in graphs):
        click.echo(
            f"See how far it leaves the ranges of {precision} with: hhdeploy calibrate "
            f"{ui.quoted(bundle)} --data IMAGES --precision {precision} --check "
            f"{ui.quoted(entry.name)}"
        )


@command.command("remove")
@click.argument("bundle", type=ui.SOURCE)
@click.argument("name")
@ui.lock_timeout_option
def remove(bundle: Path, name: str, lock_timeout: float) -> None:
    """Remove the adapter NAME from BUNDLE; its row becomes free."""
    from hhdeploy.bundle import remove_adapter

    remove_adapter(bundle, name, lock_timeout=lock_timeout, progress=note)
    click.echo(f"Removed {name}")


@command.command("pack")
@click.argument("bundle", type=ui.SOURCE)
@click.argument("name")
@click.argument("file", type=ui.FILE)
def pack(bundle: Path, name: str, file: Path) -> None:
    """Write the row of the adapter NAME of BUNDLE as FILE, ONNX Runtime's .onnx_adapter.

    A run of the bundle's graph with it takes no adapter_bank, and adapter_ids of zeros.
    """
    from hhdeploy.bundle.packed import pack_adapter

    pack_adapter(bundle, name, file)
    click.echo(f"Wrote {file}: feed adapter_ids of zeros beside it")


@command.command("unpack")
@click.argument("bundle", type=ui.SOURCE)
@click.argument("file", type=ui.FILE)
@click.argument("out", type=ui.DIRECTORY)
@click.option("--overwrite", is_flag=True, help="Replace OUT once the adapter is complete.")
def unpack(bundle: Path, file: Path, out: Path, overwrite: bool) -> None:
    """Write the row in FILE, an .onnx_adapter of BUNDLE, as the adapter directory OUT.

    Its matrices come back as a diagonal and a product of low rank. Names of classes, what the
    head's numbers mean and preprocessing are in no row: the configuration does not have them.
    """
    from hhdeploy.adapters.format import save_adapter
    from hhdeploy.bundle.packed import unpack_adapter

    adapter = unpack_adapter(bundle, file)
    save_adapter(adapter, out, overwrite=overwrite)
    click.echo(f"Wrote {out}: {len(adapter.sites)} sites of {adapter.config.base_model}")
