"""Whether the graphs that take pictures make of them what the Python transform makes.

They are compared on parts of one photograph, of odd sizes, which the package brings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import Manifest
from hhdeploy.errors import ParityError, require
from hhdeploy.parity import LEVELS, ParityReport, StageResult
from hhdeploy.preprocess import CROP_MODES, GRAPH_FILTERS, Preprocess, as_rgb, open_image
from hhdeploy.verifying.answers import compared, logits_of, rows_covered

# A cat, 451 x 300, by Stéfan van der Walt: public domain (CC0).
PHOTO = Path(__file__).with_name("photo.jpg")
# Width and height of its parts: odd, wide, tall. The first shrinks in every model (where it would
# not, the photograph is enlarged before), the last grows in most.
PARTS = ((451, 299), (173, 297), (233, 67), (29, 41))
# Of these the model's answers are compared too.
_ANSWERED = (PARTS[0], PARTS[-1])


@dataclass(frozen=True)
class Levels:
    """How far a graph is off, in 1 / 255 of white, where the photograph shrinks and where it grows.

    Attributes:
        largest: direction -> largest difference of a value.
        mean: over all values.
    """

    largest: Mapping[str, int]
    mean: float

    @property
    def failures(self) -> str:
        """What is outside `LEVELS`, in words; "" if nothing is."""
        return "; ".join(
            f"{levels} of 255 levels off where a picture {way} (at most {LEVELS[way]})"
            for way, levels in self.largest.items()
            if levels > LEVELS[way]
        )


def check_pictures(bundle: Bundle, *, added_later: bool = False) -> dict[str, Any]:
    """Compare a bundle's graphs for pictures with the Python transform, in levels and in answers.

    Args:
        bundle: one without such graphs, of an earlier version or for other inputs, passes.
        added_later: adapters that are not verified yet count too.

    Returns:
        What parity.json says of it, ``{"graphs": [...], "answers": [...]}``; nothing where there
        are none.

    Raises:
        ParityError: one is off by more than the table allows; it says which, and where.
        BundleError: a graph is missing or was damaged.
    """
    graphs = _check_levels(bundle)
    if not graphs:
        return {}
    answers = list(_answers(bundle, rows_covered(bundle.manifest, added_later=added_later)))
    failed = ParityReport({}, [stage for stage in answers if stage.failures])
    if failed.stages:
        raise ParityError(
            "the model's answers to what the graphs make of pictures differ by more than the "
            f"parity table allows:\n{failed.explain_failures()}\nPlease report this."
        )
    return {"graphs": graphs, "answers": [stage.to_json() for stage in answers]}


def _check_levels(bundle: Bundle) -> list[dict[str, Any]]:
    """Each graph's file and its largest differences, by the numbers of all adapters that use it, or
    of the backbone where none does."""
    manifest, found = bundle.manifest, []
    for file, transforms in _transforms(manifest).items():
        graph = bundle.read(manifest.named(file))
        judged = {transform: _levels(graph, transform) for transform in transforms}
        for transform, levels in judged.items():
            if levels.failures:
                raise ParityError(
                    f"{bundle.path / manifest.named(file)}, {transform.described()}: "
                    f"{levels.failures}. Another version of onnxruntime or of Pillow may compute "
                    "it otherwise; please report this."
                )
        largest = {w: max(v.largest.get(w, 0) for v in judged.values()) for w in LEVELS}
        mean = max(levels.mean for levels in judged.values())
        found.append({"graph": file, "max_levels": largest, "mean_levels": mean})
    return found


def _answers(bundle: Bundle, rows: Mapping[str, int]) -> Iterator[StageResult]:
    """The model's logits of what the graphs make of two parts of the photograph, compared with
    those of what the Python transforms make of them; none where it gives no logits."""
    manifest = bundle.manifest
    if LOGITS not in manifest.outputs:
        return
    used = {name: _transform_of(manifest, name) for name in rows}
    names = [name for name, transform in used.items() if manifest.picture_graph(transform)]
    if not names:
        return
    made = {t: _made_of(bundle, t) for t in dict.fromkeys(used[name] for name in names)}
    images = np.concatenate([made[used[name]] for name in names])
    ids = np.repeat([rows[name] for name in names], 2 * len(_ANSWERED))
    answers, runtime = logits_of(bundle, "cpu", "float32", images, ids, rows)
    for name in names:
        own = answers[ids == rows[name]]
        right, ours = (manifest.split(own[half::2]) for half in (0, 1))
        comparison = compared(manifest, name, LOGITS, right, ours)
        yield StageResult.of("pictures", "float32", runtime, name, comparison)


def _transform_of(manifest: Manifest, name: str) -> Preprocess:
    return manifest.preprocess_of(None if name == BACKBONE else manifest.adapter(name))


def _made_of(bundle: Bundle, transform: Preprocess) -> NDArray[np.float32]:
    """[2 a picture, channels, H, W]: what the Python transform makes of it, what the graph does."""
    run = _runner(bundle.read(bundle.manifest.named(str(transform.graph_file))))
    parts = [_part(size, transform) for size in _ANSWERED]
    return np.stack([image for part in parts for image in (transform(part), run(transform, part))])


def _transforms(manifest: Manifest) -> dict[str, list[Preprocess]]:
    """File of each graph -> the transforms that it is for."""
    own = manifest.backbone.preprocess
    used = [own, *(entry.preprocess for entry in manifest.adapters)]
    found = {}
    for crop_mode, interpolation in product(CROP_MODES, GRAPH_FILTERS):
        general = replace(own, crop_mode=crop_mode, interpolation=interpolation)
        file = str(general.graph_file)
        if manifest.has(file):
            exact = [t for t in dict.fromkeys(used) if t.graph_file == file]
            found[file] = exact or [general]
    return found


@cache
def _levels(graph: bytes, transform: Preprocess) -> Levels:
    run, std = _runner(graph), np.asarray(transform.std, np.float32)[:, None, None]
    largest: dict[str, int] = {}
    total = 0.0
    for size in PARTS:
        part = _part(size, transform)
        off = np.abs(run(transform, part) - transform(part)) * std * 255
        wide, high = transform.resized(*part.size)
        way = "grows" if wide > part.width or high > part.height else "shrinks"
        largest[way] = max(largest.get(way, 0), round(float(off.max())))
        total += float(off.mean())
    return Levels(largest, total / len(PARTS))


def _runner(graph: bytes) -> Callable[[Preprocess, Image.Image], NDArray[np.float32]]:
    """A graph in ONNX Runtime, on one thread."""
    ort = require("onnxruntime", "cpu", "verifying the graphs that take pictures")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])

    def run(transform: Preprocess, picture: Image.Image) -> NDArray[np.float32]:
        stated = transform.graph_inputs.items()
        feeds = {name: np.asarray(value, dtype) for name, (dtype, value) in stated}
        batch: list[NDArray[np.float32]] = session.run(
            None, {"image": np.asarray(picture), **feeds}
        )
        return np.asarray(batch[0][0])

    return run


def _part(size: tuple[int, int], transform: Preprocess) -> Image.Image:
    """A part of the photograph, from its middle; the first one enlarged for a large model."""
    width, height = size
    photo = _photo()
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    part = photo.crop((left, top, left + width, top + height))
    wide, high = transform.resized(width, height)
    times = math.ceil(max(wide / width, high / height))
    return part.resize((width * times, height * times)) if size == PARTS[0] and times > 1 else part


@cache
def _photo() -> Image.Image:
    return as_rgb(open_image(PHOTO))
