"""Calibration images as feeds of a bundle's graph, one image at a time.

Never random numbers: a calibration without images of the task is an error. Images are decoded
when they are asked for and not kept. Every adapter's images are preprocessed as that adapter
asks, so that the ranges cover all adapters of the bundle.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CLASSES, LABELS
from hhdeploy.adapters.labels import LABELS_FILE, read_labels
from hhdeploy.bundle import Bundle
from hhdeploy.calibration.feeds import Feed, Feeder, picture_digest, whose
from hhdeploy.errors import DataError, abbreviate
from hhdeploy.files.folders import (
    Classes,
    find_splits,
    in_words,
    is_list,
    list_classes,
    list_images,
    visible,
)
from hhdeploy.files.tensors import open_arrays
from hhdeploy.files.writing import is_folder

# Ranges of fewer images are accidents; with fewer than FEW a warning goes into the result.
LEAST_IMAGES, FEW_IMAGES = 4, 32

ImageSource = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class CalibrationImage:
    """One calibration image.

    Attributes:
        adapter: whose image it is; None: the bare backbone's.
        digest: sha256 of its content.
        load: makes float32 [3, H, W], normalised.
        source: name of the file, or number of the array.
    """

    adapter: str | None
    digest: str
    load: Callable[[], NDArray[np.float32]]
    source: str


class CalibrationData:
    """A sized, repeatable sequence of feeds; every pass gives the same ones in the same order.

    Attributes:
        feeder: knows the bundle's adapters.
        samples: the images, in order.
        description: what they are, JSON-able; goes into the result.
        warnings: what may make the ranges wrong, in words.
        digest: sha256 over the content of all images, their order, and how they are fed.
    """

    def __init__(
        self,
        feeder: Feeder,
        samples: Sequence[CalibrationImage],
        description: Mapping[str, Any],
        warnings: Sequence[str],
    ) -> None:
        different = len({(sample.adapter, sample.digest) for sample in samples})
        if different < LEAST_IMAGES:
            raise DataError(
                f"{description['source']}: expected at least {LEAST_IMAGES} calibration images, "
                f"found {in_copies(different, len(samples))}. Pass images like those that the "
                f"model will see, and a bound of `images` that takes them: {FEW_IMAGES} or more, "
                "of every class."
            )
        self.samples = tuple(samples)
        self.feeder = feeder
        self.warnings = (*warnings, *self._few(), *feeder.unmet({s.adapter for s in samples}))
        self.digest = self._digest()
        self.description = {
            **description,
            "images": len(samples),
            "images_per_adapter": self._counts(),
            "sha256": self.digest,
        }

    @classmethod
    def open(
        cls, bundle: Bundle, source: ImageSource, *, images: int, seed: int
    ) -> CalibrationData:
        """Calibration data from whatever ``source`` is.

        Args:
            bundle: whose graph is calibrated.
            source: an image folder (``DIR/CLASS/image``; for side branches
                ``DIR/ADAPTER/CLASS/image``), a list of paths and labels (``.txt``; for side
                branches ``DIR/ADAPTER.txt``), an ``.npz`` file, or an iterable of mappings. The
                latter two hold ``images`` (float32 [n, 3, H, W], normalised) and, for side
                branches, ``adapter_ids`` (rows, int64 [n]) or ``adapters`` (n names).
            images: at most this many, over all adapters, spread over adapters and, of a folder,
                classes.
            seed: of the choice and the order of the images.

        Raises:
            DataError: no images, too few, an unknown adapter, or arrays that do not fit.
        """
        return cls.of(Feeder(bundle), source, images=images, seed=seed)

    @classmethod
    def of(cls, feeder: Feeder, source: ImageSource, *, images: int, seed: int) -> CalibrationData:
        """As `open`, of a bundle whose adapters are known already."""
        if not isinstance(source, str | Path):
            return cls._from_arrays(feeder, "a Python iterable", source, images, seed)
        path = Path(source)
        if path.suffix == ".npz":
            return cls._from_arrays(feeder, path.name, [_read_npz(path)], images, seed)
        return cls._from_folder(feeder, path, images, seed)

    @classmethod
    def _from_folder(cls, feeder: Feeder, path: Path, images: int, seed: int) -> CalibrationData:
        chosen = choose_images(feeder, path, images, seed)
        samples = [
            CalibrationImage(
                picked.adapter,
                picture_digest(picked.path),
                feeder.loader(picked.adapter, picked.path),
                picked.path.name,
            )
            for picked in chosen.images
        ]
        description = {"kind": "folder", "source": path.name, "seed": seed, **chosen.description}
        return cls(feeder, samples, description, chosen.warnings)

    @classmethod
    def _from_arrays(
        cls,
        feeder: Feeder,
        source: str,
        batches: Iterable[Mapping[str, Any]],
        images: int,
        seed: int,
    ) -> CalibrationData:
        """All are read: such a file has one adapter's images behind another's."""
        singles = (single for batch in batches for single in feeder.checked(source, batch))
        found: dict[str | None, list[tuple[int, NDArray[np.float32]]]] = {}
        for number, (adapter, image) in enumerate(singles):
            found.setdefault(adapter, []).append((number, image))
        rng = np.random.default_rng(seed)
        shuffled = [
            [(adapter, *numbered[i]) for i in rng.permutation(len(numbered))]
            for adapter, numbered in found.items()
        ]
        samples = [
            CalibrationImage(
                adapter, hashlib.sha256(image.data).hexdigest(), image.copy, f"image {number}"
            )
            for adapter, number, image in _in_turn(shuffled)[:images]
        ]
        return cls(feeder, samples, {"kind": "arrays", "source": source, "seed": seed}, ())

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Feed]:
        for sample in self.samples:
            yield self.feeder.feed(sample.adapter, sample.load())

    def _few(self) -> tuple[str, ...]:
        pictures = {(s.adapter or "", s.digest) for s in self.samples}
        different = Counter(name for name, _ in pictures)
        return tuple(
            f"only {in_copies(different[name], count)} calibration images"
            f"{f' for adapter {name!r}' if name else ''}: {FEW_IMAGES} or more give steadier ranges"
            for name, count in self._counts().items()
            if different[name] < FEW_IMAGES
        )

    def _counts(self) -> dict[str, int]:
        return dict(Counter(s.adapter or "" for s in self.samples))

    def _digest(self) -> str:
        digest = hashlib.sha256(self.feeder.digest().encode())
        for sample in self.samples:
            digest.update(f"{sample.adapter}\0{sample.digest}\n".encode())
        return digest.hexdigest()


def in_copies(different: int, count: int) -> str:
    """How many pictures there are, which may be fewer than images: copies are one picture.

    >>> in_copies(1, 42)
    '1 (42 with copies)'
    """
    return str(count) if different == count else f"{different} ({count} with copies)"


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with open_arrays(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. An .npz file was expected there.") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as an .npz file of plain arrays: {error}. Write it with "
            "numpy.savez(path, images=..., adapters=...)."
        ) from error


@dataclass(frozen=True)
class Picked:
    """An image file and whose it is, with the folder of its class or what a table tells of it."""

    adapter: str | None
    path: Path
    label: str = ""
    truths: tuple[float, ...] | None = None


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
            train and val. Of labels and values DIR/labels.csv tells the truths, see
            `hhdeploy.adapters.labels`; without it the images are just any.
        count: over all adapters.
        seed: of the choice and the order.
        judging: of a folder that is split take the part that judges, else the other one.

    Raises:
        DataError: not a folder, no images, or (side branches) a subfolder that is no adapter.
    """
    owners = _owners(feeder, _part(folder, judging))
    rng = np.random.default_rng(seed)
    queues, described = [], {}
    warnings: list[str] = []
    for adapter, place in owners.items():
        place = _part(place, judging)
        if feeder.problem_type(adapter) != CLASSES:
            images = _labelled(feeder, adapter, place, warnings)
            described[adapter or ""] = 1
            queues.append([images[i] for i in rng.permutation(len(images))])
            continue
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


def _labelled(
    feeder: Feeder, adapter: str | None, place: Path, warnings: list[str]
) -> list[Picked]:
    """Images of labels or values, with their truths where there is a table of them."""
    file = place / LABELS_FILE
    if not file.is_file():
        return [Picked(adapter, path) for path in list_images(place).paths]
    kind, names = feeder.problem_type(adapter), feeder.class_names(adapter)
    table, count = read_labels(file, place, kind, names), feeder.class_count(adapter)
    if kind == LABELS and names is None:
        if all(name.isdecimal() for name in table.names):
            table = read_labels(file, place, kind, _by_number(table.names, count))
        else:
            warnings.append(
                f"{whose(adapter)}the adapter has no names of its "
                f"labels: those of {LABELS_FILE} are taken in the order {', '.join(table.names)}"
            )
    if len(table.names) != count:
        raise DataError(
            f"{file}: expected {count} labels or values, as many as the adapter has, found "
            f"{abbreviate(table.names)}."
        )
    rows = zip(table.paths, table.truths, strict=True)
    return [Picked(adapter, path, truths=tuple(map(float, row))) for path, row in rows]


def _by_number(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Labels that are numbers, in the order of the columns: sorted as text, 10 comes before 2.

    A column whose number is there is its label; of others, as 1 to 10 and 01, the place tells.
    """
    ordered = sorted(names, key=int)
    columns = tuple(map(str, range(count)))
    return columns if set(ordered) <= set(columns) else tuple(ordered)


def _part(folder: Path, judging: bool) -> Path:
    splits = find_splits(folder)
    return splits.val if judging and splits.val is not None else splits.train


def _owners(feeder: Feeder, folder: Path) -> dict[str | None, Path]:
    """Adapter -> the folder of its classes."""
    if is_list(folder):
        return {_only(feeder, folder): folder}
    if not is_folder(folder, DataError):
        raise DataError(f"{folder} is not a directory. Expected a folder of calibration images.")
    lists = {} if feeder.folded else {f.stem: f for f in visible(folder) if is_list(f)}
    folders = {d.name: d for d in visible(folder) if d.is_dir()}
    if both := sorted(lists.keys() & folders.keys()):
        raise DataError(
            f"{folder}: expected a folder or a list of an adapter's images, found both {both[0]} "
            f"and {lists[both[0]].name}. Move the one that is not meant elsewhere; a list may name "
            "pictures elsewhere, as ../pictures/1.png."
        )
    found = {**lists, **folders}
    if feeder.folded:
        # A folder made for side branches holds this adapter's images and others'.
        own = found.get(feeder.names[0])
        whole = own is None or not any(
            d.is_dir() or feeder.problem_type(None) != CLASSES for d in visible(own)
        )
        return {None: folder if own is None or whole else own}
    unknown = [place.name for name, place in found.items() if name not in feeder.names]
    if unknown or not found:
        raise DataError(
            f"{folder}: expected DIR/ADAPTER/CLASS/image with the adapters "
            f"{abbreviate(feeder.names, 20)}; found "
            + (
                f"{abbreviate(unknown)}. Move what is no adapter's elsewhere."
                if unknown
                else "no folder."
            )
        )
    return {name: found[name] for name in found}


def _only(feeder: Feeder, file: Path) -> str | None:
    """Whose images a list has."""
    if feeder.folded:
        return None
    if len(feeder.names) != 1:
        raise DataError(
            f"{file} has the images of one adapter, and the bundle has {abbreviate(feeder.names)}: "
            "pass a folder of folders DIR/ADAPTER, or of lists DIR/ADAPTER.txt."
        )
    return feeder.names[0]


def _doubts(feeder: Feeder, adapter: str | None, place: Path, found: Classes) -> list[str]:
    """Warnings about one adapter's folder."""
    names = feeder.class_names(adapter)
    doubts, classes = [], found.paths
    if found.skipped:
        doubts.append(f"{whose(adapter)}left out of {place.name}: {in_words(found.skipped)}")
    if len(classes) == 1:
        doubts.append(f"{whose(adapter)}images of one class only ({next(iter(classes))})")
    if names and (unknown := [c for c in classes if c not in names]):
        doubts.append(
            f"{whose(adapter)}{place.name} has folders that are none of the adapter's classes: "
            f"{abbreviate(unknown)}"
        )
    return doubts


def _in_turn(queues: Sequence[Sequence[Any]]) -> list[Any]:
    """The first of every queue, then the second of every queue, ..."""
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
