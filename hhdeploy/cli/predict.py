"""hhdeploy predict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.config import LABELS, VALUES
from hhdeploy.backbones.facts import FEATURES, TOKENS
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.choices import Device, Precision
from hhdeploy.cli import ui
from hhdeploy.errors import SessionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from hhdeploy.bundle.answers import Answer
    from hhdeploy.runtime.session import Session

# Pictures times adapters that are open and computed at once, however many are asked for.
_BATCH = 32


def _pictures(
    context: click.Context, parameter: click.Parameter, given: tuple[Path, ...]
) -> tuple[Path, ...]:
    for path in given:
        if (path / MANIFEST).is_file():
            raise click.BadParameter(
                f"{path} is a bundle, which comes first: hhdeploy predict BUNDLE IMAGES."
            )
        if path.is_dir():
            raise click.BadParameter(
                f"{path} is a directory: name the pictures in it, as {ui.quoted(path)}/* does."
            )
    return given


@click.command()
@click.argument("bundle", type=ui.SOURCE)
@click.argument("images", type=ui.IMAGES, nargs=-1, required=True, callback=_pictures)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Repeatable: several print side by side. Default: all of the bundle; if it has none, "
    "its backbone.",
)
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="Classes shown.")
@click.option(
    "--output",
    type=click.Choice((FEATURES, TOKENS)),
    help="Numbers instead of classes, of a bundle that gives them. Default: classes; of a bundle "
    "without logits what it has.",
)
@ui.session_options
@ui.json_option
def command(
    bundle: Path,
    images: tuple[Path, ...],
    adapters: tuple[str, ...],
    top: int,
    output: str | None,
    device: Device,
    precision: Precision,
    threads: int | None,
    cache_dir: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Classify IMAGES with adapters of BUNDLE; or show their features.

    \b
      hhdeploy predict bundle/ cat.jpg --adapter pets
      hhdeploy predict bundle/ cat.jpg dog.jpg --adapter pets --adapter scenes
      hhdeploy predict bundle/ cat.jpg --output features --json
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
        if not names and manifest.answers_backbone:
            names = (BACKBONE,)
        if not names:
            raise SessionError(
                f"{bundle} has no adapter to classify with. Add one with: hhdeploy adapter add "
                f"{ui.quoted(bundle)} NAME=DIR"
            )
        pairs = [(path, name) for path in images for name in names]
        if output is None and not manifest.classes:
            output = next(iter(manifest.outputs))
        if output is not None:
            ui.refuse_unused({"top"}, f"is about classes, and this shows {output}")
        found: list[Any] = []
        at_once = max(1, _BATCH // len(names))
        for first in range(0, len(images), at_once):
            opened = [open_image(path) for path in images[first : first + at_once]]
            each, called = [i for i in opened for _ in names], [*names] * len(opened)
            if output is not None:
                found += list(_numbers(session, each, called, output))
            else:
                found += session.classify(each, called)
    if output is not None:
        _show(output, found, pairs, as_json)
        return
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
    titles = _titles(images)
    cells = ["\n".join(map(str, answers)) for answers in shown]
    rows = [
        (titles[path], *cells[i * len(names) : (i + 1) * len(names)])
        for i, path in enumerate(images)
    ]
    side_by_side = ui.table(None, ("image", *names), rows)
    below = [(titles[path], name, cell) for (path, name), cell in zip(pairs, cells, strict=True)]
    ui.console().print(
        side_by_side
        if ui.fits(side_by_side)
        else ui.table(None, ("image", "adapter", "answers"), below)
    )


def _titles(images: Iterable[Path]) -> dict[Path, str]:
    """What a table calls pictures: their names; where several have one, the paths as given."""
    several = {name for name, n in Counter(path.name for path in set(images)).items() if n > 1}
    return {path: str(path) if path.name in several else path.name for path in images}


def _numbers(
    session: Session, images: list[Image.Image], names: list[str], output: str
) -> NDArray[np.float32]:
    """[n, ...]: an output of each image, preprocessed as its own adapter wants it."""
    import numpy as np

    pixels = [session.preprocess([image], name) for image, name in zip(images, names, strict=True)]
    return session.run(np.concatenate(pixels), names, output)


def _show(
    output: str,
    found: Sequence[NDArray[np.float32]],
    pairs: list[tuple[Path, str]],
    as_json: bool,
) -> None:
    """All numbers as JSON; on a terminal their shape, length and the first few."""
    if as_json:
        ui.print_json(
            [
                {"image": str(path), "adapter": name, output: numbers.tolist()}
                for (path, name), numbers in zip(pairs, found, strict=True)
            ]
        )
        return
    titles = _titles([path for path, _ in pairs])
    rows = [
        (
            titles[path],
            name,
            " x ".join(map(str, numbers.shape)),
            f"{float((numbers**2).sum() ** 0.5):.6g}",
            " ".join(f"{x:.4g}" for x in numbers.ravel()[:4]) + " …",
        )
        for (path, name), numbers in zip(pairs, found, strict=True)
    ]
    ui.console().print(ui.table(None, ("image", "adapter", output, "length", "begins"), rows))


def _json(answer: Answer) -> dict[str, Any]:
    """A value is called one; a label also says whether it is said."""
    if answer.problem_type == VALUES:
        return {"label": answer.label, "index": answer.index, "value": answer.score}
    said = {"positive": answer.positive} if answer.problem_type == LABELS else {}
    return {"label": answer.label, "index": answer.index, "probability": answer.score, **said}
