"""hhdeploy predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.config import LABELS, VALUES
from hhdeploy.cli import ui
from hhdeploy.errors import SessionError

if TYPE_CHECKING:
    from hhdeploy.bundle.answers import Answer


@click.command()
@click.argument("bundle", type=ui.DIRECTORY)
@click.argument("images", type=ui.FILE, nargs=-1, required=True)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Repeatable: several print side by side. Default: all of the bundle; if it has none, "
    "its backbone.",
)
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="Classes shown.")
@click.option("--device", type=ui.DEVICES, default="auto", show_default=True)
@click.option("--precision", default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of one run.")
@ui.cache_options("compiled models")
@ui.json_option
def command(
    bundle: Path,
    images: tuple[Path, ...],
    adapters: tuple[str, ...],
    top: int,
    device: str,
    precision: str,
    threads: int | None,
    cache_dir: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Classify IMAGES with adapters of BUNDLE, all in one batch.

    \b
      hhdeploy predict OUT cat.jpg --adapter pets
      hhdeploy predict OUT cat.jpg dog.jpg --adapter pets --adapter scenes
    """
    from hhdeploy.bundle.answers import best
    from hhdeploy.preprocess import open_image
    from hhdeploy.runtime import open_session

    cache = ui.check_cache_options(cache_dir, no_cache)
    with open_session(
        bundle, device=device, precision=precision, threads=threads, cache=cache
    ) as session:
        manifest = session.bundle.manifest
        names = adapters or tuple(a.name for a in manifest.adapters)
        if not names and manifest.backbone_classes:
            names = (BACKBONE,)
        if not names:
            raise SessionError(
                f"{bundle} has no adapter to classify with. Add one with: hhdeploy adapter add "
                f"{bundle} NAME=DIR"
            )
        opened = [open_image(path) for path in images]
        found = session.classify(
            [image for image in opened for _ in names], [name for _ in opened for name in names]
        )
    pairs = [(path, name) for path in images for name in names]
    shown = [best(answers, top) for answers in found]
    if as_json:
        ui.print_json(
            [
                {
                    "image": str(path),
                    "adapter": name,
                    "problem_type": answers[0].problem_type,
                    "classes": [_json(answer) for answer in answers],
                }
                for (path, name), answers in zip(pairs, shown, strict=True)
            ]
        )
        return
    cells = ["\n".join(map(str, answers)) for answers in shown]
    rows = [
        (path.name, *cells[i * len(names) : (i + 1) * len(names)]) for i, path in enumerate(images)
    ]
    ui.console().print(ui.table(None, ("image", *names), rows))


def _json(answer: Answer) -> dict[str, Any]:
    """A value is called one; a label also says whether it is said."""
    if answer.problem_type == VALUES:
        return {"label": answer.label, "index": answer.index, "value": answer.score}
    said = {"positive": answer.positive} if answer.problem_type == LABELS else {}
    return {"label": answer.label, "index": answer.index, "probability": answer.score, **said}
