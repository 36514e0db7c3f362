"""Which images of a folder are used for calibration, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hhdeploy.calibration.feeds import Feeder
from hhdeploy.errors import DataError
from hhdeploy.files.folders import Classes, find_splits, in_words, list_classes, visible


@dataclass(frozen=True)
class Picked:
    """An image file, whose it is, and the folder of its class."""

    adapter: str | None
    path: Path
    label: str


@dataclass(frozen=True)
class Choice:
    """The images chosen, what the folder held, and what is wrong with it."""

    images: tuple[Picked, ...]
    description: Mapping[str, Any]
    warnings: tuple[str, ...]


def choose_images(
    feeder: Feeder, folder: Path, count: int, seed: int, *, judging: bool = False
) -> Choice:
    """At most ``count`` images, adapters and classes in turn, shuffled within a class.

    Args:
        feeder: of the bundle.
        folder: DIR/CLASS/image, for side branches DIR/ADAPTER/CLASS/image; each may be split into
            train and val.
        count: over all adapters.
        seed: of the choice and the order.
        judging: of a folder that is split take the part that judges, else the other one.

    Raises:
        DataError: not a folder, no images, or (side branches) a subfolder that is no adapter.
    """
    owners = _owners(feeder, _part(folder, judging))
    rng = np.random.default_rng(seed)
    queues, described, warnings = [], {}, []
    for adapter, place in owners.items():
        place = _part(place, judging)
        classes = list_classes(place)
        warnings += _doubts(feeder, adapter, place, classes)
        described[adapter or ""] = len(classes.paths)
        shuffled = [
            [Picked(adapter, paths[i], label) for i in rng.permutation(len(paths))]
            for label, paths in classes.paths.items()
        ]
        queues.append(_in_turn(shuffled))
    picked = _in_turn(queues)[:count]
    return Choice(tuple(picked), {"classes_per_adapter": described}, tuple(warnings))


def _part(folder: Path, judging: bool) -> Path:
    splits = find_splits(folder)
    return splits.val if judging and splits.val is not None else splits.train


def _owners(feeder: Feeder, folder: Path) -> dict[str | None, Path]:
    """Adapter -> the folder of its classes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory. Expected a folder of calibration images.")
    found = {d.name: d for d in visible(folder) if d.is_dir()}
    if feeder.folded:
        # A folder made for side branches holds this adapter's images and others'.
        own = found.get(feeder.names[0])
        return {None: own if own is not None and any(d.is_dir() for d in visible(own)) else folder}
    unknown = [name for name in found if name not in feeder.names]
    if unknown or not found:
        raise DataError(
            f"{folder}: expected DIR/ADAPTER/CLASS/image with the adapters "
            f"{', '.join(feeder.names)}; found "
            f"{'the folders ' + ', '.join(unknown) if unknown else 'no folder'}."
        )
    return {name: found[name] for name in found}


def _doubts(feeder: Feeder, adapter: str | None, place: Path, found: Classes) -> list[str]:
    """Warnings about one adapter's folder."""
    whose = f"adapter {adapter!r}: " if adapter else ""
    names = feeder.class_names(adapter)
    doubts, classes = [], found.paths
    if found.skipped:
        doubts.append(f"{whose}left out of {place.name}: {in_words(found.skipped)}")
    if len(classes) == 1:
        doubts.append(f"{whose}images of one class only ({next(iter(classes))})")
    if names and (unknown := [c for c in classes if c not in names]):
        doubts.append(
            f"{whose}{place.name} has folders that are none of the adapter's classes: "
            f"{', '.join(unknown)}"
        )
    return doubts


def _in_turn(queues: Sequence[Sequence[Any]]) -> list[Any]:
    """The first of every queue, then the second of every queue, ..."""
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
