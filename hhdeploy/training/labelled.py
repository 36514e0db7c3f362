"""Images whose truths a table tells (`hhdeploy.adapters.labels`) as the data of a training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hhdeploy.adapters.config import CLASSES
from hhdeploy.adapters.labels import LabelTable, read_labels
from hhdeploy.errors import DataError
from hhdeploy.files.folders import list_images, name_bytes
from hhdeploy.training.data import (
    ImageFolder,
    Samples,
    count_doubts,
    derived_seed,
    draw_held,
    split_classes,
)
from hhdeploy.training.pictures import number_pictures
from hhdeploy.training.settings import TrainSettings

_UNLABELLED = "pictures without a label"


def read_labelled(settings: TrainSettings, labels: Path) -> ImageFolder:
    """The images that ``labels`` names below ``settings.data``, and those to validate on.

    Without ``val_labels`` a seeded part is held out: of classes the same share of each, else of
    all pictures (at least one, unless the fraction is 0), with their copies.

    Raises:
        DataError: see `read_labels`; fewer than 2 classes; one image, and a part to hold out.
    """
    s = settings
    table = read_labels(labels, s.data, s.problem_type)
    if table.problem_type == CLASSES and len(table.names) < 2:
        raise DataError(f"{labels}: expected 2 classes or more, found {', '.join(table.names)}.")
    sources = (s.data, s.val_data or s.data)
    if s.val_labels is not None:
        judging = read_labels(s.val_labels, sources[1], table.problem_type, table.names)
        train, val = _samples(table), _samples(judging)
        pictures = number_pictures((*train.paths, *val.paths))
    else:
        pictures = number_pictures(table.paths)
        train, val = _split(table, s.val_fraction, s.seed, pictures)
    known = {os.path.abspath(path) for path in (*train.paths, *val.paths)}
    listed = {path for source in dict.fromkeys(sources) for path in list_images(source).paths}
    unlabelled = len({os.path.abspath(path) for path in listed} - known)
    return ImageFolder(
        table.names,
        train,
        val,
        _digest(sources, (train, val)),
        sources,
        {_UNLABELLED: unlabelled} if unlabelled else {},
        table.problem_type,
        *count_doubts(train, val, pictures),
    )


def _samples(table: LabelTable, rows: Sequence[int] | None = None) -> Samples:
    chosen = range(len(table.paths)) if rows is None else rows
    paths = tuple(table.paths[i] for i in chosen)
    if table.problem_type == CLASSES:
        return Samples(paths, tuple(int(table.truths[i].argmax()) for i in chosen))
    return Samples(paths, tuple(tuple(map(float, table.truths[i])) for i in chosen))


def _split(
    table: LabelTable, fraction: float, seed: int, pictures: Mapping[Path, int]
) -> tuple[Samples, Samples]:
    if table.problem_type == CLASSES:
        classes = {
            name: [p for p, row in zip(table.paths, table.truths, strict=True) if row[column]]
            for column, name in enumerate(table.names)
        }
        return split_classes(classes, fraction, seed, pictures)
    shown = list(dict.fromkeys(pictures[path] for path in table.paths))
    generator = torch.Generator().manual_seed(derived_seed(seed, "split"))
    held = set(draw_held(shown, len(shown), fraction, generator))
    parts: tuple[list[int], list[int]] = ([], [])
    for row, path in enumerate(table.paths):
        parts[pictures[path] in held].append(row)
    return _samples(table, parts[0]), _samples(table, parts[1])


def _digest(sources: Sequence[Path], parts: Sequence[Samples]) -> str:
    digest = hashlib.sha256()
    for root, samples in zip(sources, parts, strict=True):
        digest.update(f"{len(samples)}\n".encode())
        for path, label in zip(samples.paths, samples.labels, strict=True):
            name = Path(os.path.relpath(path, root)).as_posix()  # a table may name it from the root
            digest.update(name_bytes(f"{name}\0{path.stat().st_size}\0{label!r}\n"))
    return digest.hexdigest()
