"""hhdeploy predict."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from hhdeploy.cli import ui
from hhdeploy.errors import SessionError


@click.command()
@click.argument("bundle", type=ui.DIRECTORY)
@click.argument("images", type=ui.FILE, nargs=-1, required=True)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Repeatable: several print side by side. Default: all of the bundle.",
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
    from hhdeploy.preprocess import open_image
    from hhdeploy.runtime import open_session

    cache = ui.chosen_cache(cache_dir, no_cache)
    with open_session(
        bundle, device=device, precision=precision, threads=threads, cache=cache
    ) as session:
        names = adapters or tuple(a.name for a in session.bundle.manifest.adapters)
        if not names:
            raise SessionError(
                f"{bundle} has no adapter to classify with. Add one with: hhdeploy adapter add "
                f"{bundle} NAME=DIR"
            )
        opened = [open_image(path) for path in images]
        inputs = [session.preprocess(opened, None if n == "backbone" else n) for n in names]
        logits = session.run(
            np.concatenate(inputs), [name for name in names for _ in images]
        ).reshape(len(names), len(images), -1)
        answers = [
            {
                "image": str(path),
                "adapter": name,
                "classes": _best(logits[j, i], session.entry(name), top),
            }
            for i, path in enumerate(images)
            for j, name in enumerate(names)
        ]
    if as_json:
        ui.print_json(answers)
        return
    rows = []
    for i, path in enumerate(images):
        cells = []
        for j in range(len(names)):
            best = answers[i * len(names) + j]["classes"]
            assert isinstance(best, list)
            cells.append("\n".join(f"{b['label']} {b['probability']:.1%}" for b in best))
        rows.append((path.name, *cells))
    ui.console().print(ui.table(None, ("image", *names), rows))


def _best(logits: np.ndarray, entry: object, top: int) -> list[dict[str, object]]:  # type: ignore[type-arg]
    """The most probable classes, the -inf padding cut off first."""
    from hhdeploy.bundle import AdapterEntry

    own = logits[: entry.classes] if isinstance(entry, AdapterEntry) else logits
    own = own[np.isfinite(own)].astype(np.float64)
    shares = np.exp(own - own.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return [
        {
            "label": entry.label(int(c)) if isinstance(entry, AdapterEntry) else str(c),
            "index": int(c),
            "probability": float(shares[c]),
        }
        for c in order
    ]
