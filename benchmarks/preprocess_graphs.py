"""Graphs that take pictures against the Python transform: levels, logits, top-1, and time.

    python -m benchmarks.preprocess_graphs [--images DIR] [--pictures 1000] [--model NAME]

Pictures are parts of photographs, of seeded sizes with odd sides from 33 pixels to the whole, each
through all six graphs by the model's numbers. The photographs are the one that hhdeploy brings and
scikit-learn's two, or those of DIR. The model's weights are random; the starter models, which are
trained, answer their own pictures. Times are CPU times on one thread, of center.bicubic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import report
from benchmarks.models import STARTER, bundle, starter_bundle
from hhdeploy.cli.starter import Starter
from hhdeploy.exporters.portable.pictures import picture_graph
from hhdeploy.files.folders import list_images
from hhdeploy.parity import compare
from hhdeploy.preprocess import CROP_MODES, GRAPH_FILTERS, Preprocess, as_rgb, open_image
from hhdeploy.runtime import Session, open_session
from hhdeploy.verifying.pictures import PHOTO

_SMALLEST, _BATCH = 33, 8
Images = NDArray[np.float32]


@click.command()
@click.option("--images", type=click.Path(path_type=Path), help="Photographs of your own.")
@click.option("--pictures", default=1000, show_default=True)
@click.option("--model", default="vit_tiny_patch16_224", show_default=True)
def main(images: Path | None, pictures: int, model: str) -> None:
    """Levels of all graphs, logits of a model with random weights and of the starter models."""
    photos = [as_rgb(open_image(path)) for path in _photographs(images)]
    parts = list(_parts(photos, pictures))
    results: dict[str, Any] = {"photographs": len(photos), "pictures": len(parts)}
    with open_session(bundle(model, "folded"), device="cpu", threads=1) as session:
        transform = session.bundle.manifest.backbone.preprocess
        for crop_mode, interpolation in product(CROP_MODES, GRAPH_FILTERS):
            own = replace(transform, crop_mode=crop_mode, interpolation=interpolation)
            results[f"{crop_mode}.{interpolation}, levels"] = _levels(own, parts)
        results[f"{model}, random weights"] = _answers(session, None, parts)
    results |= _times(transform, parts)
    for task, answered in _starter().items():
        results[f"starter {task}"] = answered
    report("graphs that take pictures", results)


def _photographs(folder: Path | None) -> Sequence[Path]:
    if folder is not None:
        return list_images(folder).paths
    from sklearn.datasets import load_sample_images

    return [PHOTO, *map(Path, load_sample_images().filenames)]


def _parts(photos: Sequence[Image.Image], count: int) -> Iterator[Image.Image]:
    random = np.random.default_rng(0)
    for index in range(count):
        photo = photos[index % len(photos)]
        width, height = (int(random.integers(_SMALLEST, side + 1)) | 1 for side in photo.size)
        width, height = min(width, photo.width), min(height, photo.height)
        left = int(random.integers(photo.width - width + 1))
        top = int(random.integers(photo.height - height + 1))
        yield photo.crop((left, top, left + width, top + height))


def _runner(transform: Preprocess) -> Callable[[Image.Image], Images]:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    graph = picture_graph(transform.crop_mode, transform.interpolation, transform.input_size[0])
    session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    numbers = {n: np.asarray(v, dtype) for n, (dtype, v) in transform.graph_inputs.items()}

    def run(picture: Image.Image) -> Images:
        images: list[Images] = session.run(None, {"image": np.asarray(picture), **numbers})
        return np.asarray(images[0][0])

    return run


def _levels(transform: Preprocess, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Pictures, largest difference and share of values that differ, by whether a side grows."""
    run, std = _runner(transform), np.asarray(transform.std, np.float32)[:, None, None]
    found: dict[str, list[tuple[float, float]]] = {"shrinks": [], "grows": []}
    for picture in pictures:
        off = np.abs(run(picture) - transform(picture)) * std * 255
        width, height = transform.resized(*picture.size)
        way = "grows" if width > picture.width or height > picture.height else "shrinks"
        found[way].append((float(off.max()), float(np.mean(off > 0.5))))
    return {
        way: {
            "pictures": len(values),
            "largest": round(max(largest for largest, _ in values)),
            "share of values": statistics.fmean(share for _, share in values),
        }
        for way, values in found.items()
        if values
    }


def _answers(
    session: Session, adapter: str | None, pictures: Sequence[Image.Image]
) -> dict[str, Any]:
    """Logits of what a graph made of pictures, compared with those of the Python transform's."""
    manifest = session.bundle.manifest
    entry = manifest.adapter(adapter) if adapter else manifest.adapters[0]
    run = _runner(entry.preprocess)
    right, ours = [], []
    for start in range(0, len(pictures), _BATCH):
        batch = pictures[start : start + _BATCH]
        right.append(session.run(np.stack([entry.preprocess(p) for p in batch]), entry.name))
        ours.append(session.run(np.stack([run(p) for p in batch]), entry.name))
    columns = slice(entry.classes)
    compared = compare(np.concatenate(right)[:, columns], np.concatenate(ours)[:, columns])
    return {
        "pictures": compared.images,
        "range error": compared.range_error,
        "top-1": compared.top1,
    }


def _times(transform: Preprocess, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Median CPU time of one picture in ms, of parts as they are and of one of 12 megapixels."""
    large = [max(pictures, key=lambda p: p.width).resize((4000, 3000))]
    run, found = _runner(transform), {}
    for name, chosen, rounds in (("parts", pictures[:200], 3), ("4000 x 3000", large, 5)):
        for way, make in (("Pillow", transform), ("graph", run)):
            times = []
            for picture in [*chosen] * rounds:
                started = time.process_time()
                make(picture)
                times.append(1e3 * (time.process_time() - started))
            found[f"{name}, {way}, ms"] = round(statistics.median(times), 2)
    return found


def _starter() -> dict[str, dict[str, Any]]:
    """The starter models on the pictures that come with them."""
    starter = Starter.read(STARTER)
    with open_session(starter_bundle(), device="cpu", threads=1) as session:
        return {task: _answers(session, task, _pictures(starter, task)) for task in starter.tasks}


def _pictures(starter: Starter, task: str) -> list[Image.Image]:
    paths = [path for paths in starter.images(task).values() for path in paths]
    return [as_rgb(open_image(path)) for path in paths]


if __name__ == "__main__":
    main()
