"""Labelled images as seeded batches, preprocessed by the code that inference uses.

An image is decoded once and kept as uint8 pixels while the cache has room. For evaluation the
pixels are those that `Preprocess` makes; for training with augmentation they are the whole
area that `Preprocess` resizes before it crops, so that the random crop can look around the
centre. Cropped or not, the pixels are normalised by `Preprocess` itself.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hhdeploy.adapters.config import CLASSES, ProblemType
from hhdeploy.errors import DataError
from hhdeploy.files.folders import (
    Classes,
    check_words,
    find_splits,
    is_list,
    list_classes,
    name_bytes,
    place_of,
)
from hhdeploy.preprocess import Preprocess, open_image
from hhdeploy.training.pictures import number_pictures

# Mild, because an adapter sees few images: at least 60 % of the area, at most 5:4 stretched.
CROP_AREA = (0.6, 1.0)
CROP_RATIO = (4 / 5, 5 / 4)

Pixels = NDArray[np.uint8]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Samples:
    """Image files and what is true of each: the class's number, or a number for every name."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | tuple[tuple[float, ...], ...]

    def __len__(self) -> int:
        return len(self.paths)

    def truths(self, indices: Sequence[int]) -> Tensor:
        """int64 [n] of classes, else float32 [n, names], on the CPU."""
        chosen = [self.labels[i] for i in indices]
        classes = all(isinstance(label, int) for label in chosen)
        return torch.tensor(chosen, dtype=torch.int64 if classes else torch.float32)


@dataclass(frozen=True)
class ImageFolder:
    """The images of one task.

    Attributes:
        class_names: sorted folder names, of which a label is a position; or what a table names.
        train, val: the images to train on and to validate on (may be empty).
        digest: sha256 over the relative names and file sizes of both, which tells whether a
            resumed training sees the same data.
        sources: the folders that ``train`` and ``val`` were listed from, the same one where a part
            was held out.
        skipped: how many files were left out, by what they are.
        problem_type: what is true of the images.
        val_trained_on: how many of ``val`` show a picture that is in ``train`` too. Of a part
            that was held out none does.
        contrary: pictures of which different things are said to be true.
        unread: parts of a split that neither train nor validate.
    """

    class_names: tuple[str, ...]
    train: Samples
    val: Samples
    digest: str
    sources: tuple[Path, Path]
    skipped: Mapping[str, int]
    problem_type: ProblemType = CLASSES
    val_trained_on: int = 0
    contrary: int = 0
    unread: tuple[Path, ...] = ()


def derived_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose and epoch: streams of one ``seed`` do not overlap."""
    digest = hashlib.sha256(f"hhdeploy/{purpose}/{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def read_image_folder(
    data: Path, val_data: Path | None, val_fraction: float, seed: int
) -> ImageFolder:
    """List DIR/CLASS/image, or a list's labels, and split off the validation images.

    A ``data`` of DIR/train/CLASS/image and DIR/val/CLASS/image is split already; a ``val_data``
    goes before its val. All of the rest is for training then. Otherwise ``val_fraction`` of
    every class's pictures is held out (seeded; at least one unless the fraction is 0, and never a
    class's only one), with all of their copies.

    Raises:
        DataError: fewer than 2 classes, a class without images, or class names in ``val_data``
            that differ from those in ``data``.
    """
    splits = find_splits(data)
    data, val_data = splits.train, val_data or splits.val
    read = {os.path.realpath(place) for place in (data, val_data or data)}
    parts = (splits.val, *splits.test)
    unread = tuple(p for p in parts if p is not None and os.path.realpath(p) not in read)
    found = list_classes(data)
    classes, skipped = found.paths, Counter(found.skipped)
    if len(classes) < 2:
        raise DataError(
            f"{data} has {len(classes)} class folder ({', '.join(classes)}); expected 2 or more, "
            "as DIR/CLASS/image."
        )
    names = tuple(classes)
    if val_data is None:
        whole = _samples(classes)
        pictures = number_pictures(whole.paths)
        train, val = split_classes(classes, val_fraction, seed, pictures)
    else:
        judging = list_classes(val_data)
        skipped.update(judging.skipped)
        train, val = _samples(classes), _samples(_matching(judging, names, val_data))
        pictures = number_pictures((*train.paths, *val.paths))
    sources = (data, val_data or data)
    digest = _digest(data, train, sources[1], val)
    doubts = count_doubts(train, val, pictures)
    return ImageFolder(names, train, val, digest, sources, dict(skipped), CLASSES, *doubts, unread)


def count_doubts(train: Samples, val: Samples, pictures: Mapping[Path, int]) -> tuple[int, int]:
    """How many images of ``val`` are trained on too, and of how many pictures the truths differ.

    ``pictures``: of `number_pictures`.
    """
    trained = {pictures[path] for path in train.paths}
    said: dict[int, set[int | tuple[float, ...]]] = {}
    for part in (train, val):
        truths: Sequence[int | tuple[float, ...]] = part.labels
        for path, truth in zip(part.paths, truths, strict=True):
            said.setdefault(pictures[path], set()).add(truth)
    both = sum(pictures[path] in trained for path in val.paths)
    return both, sum(len(truths) > 1 for truths in said.values())


def _matching(
    found: Classes, names: tuple[str, ...], directory: Path
) -> Mapping[str, tuple[Path, ...]]:
    classes = found.paths
    check_words((*names, *classes), directory)
    missing = [n for n in names if n not in classes]
    unexpected = [n for n in classes if n not in names]
    if missing or unexpected:
        problems = [
            f"{title}: {', '.join(some)}"
            for title, some in (("missing", missing), ("not in `data`", unexpected))
            if some
        ]
        raise DataError(
            f"`val_data`: {directory}: expected the class folders of `data` "
            f"({', '.join(names)}); "
            f"{'; '.join(problems)}."
        )
    # Their own order is another one where one is a list and the other a folder, and numbers name
    # the classes: a label is a position in the training's.
    return {name: classes[name] for name in names}


def _samples(classes: Mapping[str, Sequence[Path]]) -> Samples:
    pairs = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    return Samples(tuple(p for p, _ in pairs), tuple(label for _, label in pairs))


def split_classes(
    classes: Mapping[str, Sequence[Path]],
    fraction: float,
    seed: int,
    pictures: Mapping[Path, int],
) -> tuple[Samples, Samples]:
    """Hold out the same share of every class; both parts keep the sorted order.

    What is one picture by ``pictures`` is on one side; one of several classes is trained on.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "split"))
    shown = {name: dict.fromkeys(pictures[p] for p in paths) for name, paths in classes.items()}
    classes_of = Counter(number for numbers in shown.values() for number in numbers)
    train: dict[str, list[Path]] = {}
    val: dict[str, list[Path]] = {}
    for name, paths in classes.items():
        own = [number for number in shown[name] if classes_of[number] == 1]
        held = set(draw_held(own, len(shown[name]), fraction, generator))
        train[name] = [p for p in paths if pictures[p] not in held]
        val[name] = [p for p in paths if pictures[p] in held]
    return _samples(train), _samples(val)


def draw_held(
    pictures: Sequence[int], count: int, fraction: float, generator: torch.Generator
) -> list[int]:
    """Those of ``pictures`` to hold out, a share of ``count``, of which one at least is left."""
    wanted = max(1, round(fraction * count)) if fraction > 0 else 0
    drawn = torch.randperm(len(pictures), generator=generator)[: min(wanted, count - 1)]
    return [pictures[i] for i in drawn.tolist()]


def _digest(train_root: Path, train: Samples, val_root: Path, val: Samples) -> str:
    digest = hashlib.sha256()
    for source in (train_root, val_root):
        if is_list(source):  # the folders of a folder are in the names of its files
            digest.update(source.read_bytes())
    for part, root, samples in (("train", train_root, train), ("val", val_root, val)):
        for path in samples.paths:
            name = Path(os.path.relpath(path, place_of(root))).as_posix()
            digest.update(name_bytes(f"{part}\0{name}\0{path.stat().st_size}\n"))
    return digest.hexdigest()


class PixelCache:
    """Decoded images, each kept as uint8 (H, W, 3), grey (H, W), until ``limit_bytes`` are used.

    Images past the limit are decoded again whenever they are asked for. Safe to use from
    several threads.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._pixels: dict[tuple[Path, Preprocess], Pixels] = {}
        self._lock = threading.Lock()

    def pixels(self, path: Path, view: Preprocess) -> Pixels:
        """The image after ``view``'s resize and crop. Raises `DataError` naming the file."""
        key = (path, view)
        found = self._pixels.get(key)
        if found is not None:
            return found
        pixels = _unnormalised(view(open_image(path)), view)
        with self._lock:
            if key not in self._pixels and self.used_bytes + pixels.nbytes <= self.limit_bytes:
                self._pixels[key] = pixels
                self.used_bytes += pixels.nbytes
        return pixels


def _unnormalised(values: NDArray[np.float32], view: Preprocess) -> Pixels:
    """float32 [channels, H, W] -> uint8 (H, W, 3), grey (H, W).

    Exact: the rounding error is far below half a step.
    """
    mean, std = np.asarray(view.mean, np.float32), np.asarray(view.std, np.float32)
    pixels = np.rint((values.transpose(1, 2, 0) * std + mean) * np.float32(255))
    whole = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
    return whole[..., 0] if whole.shape[-1] == 1 else whole


def canvas_view(preprocess: Preprocess) -> Preprocess:
    """The same resize without the final crop: what random crops are taken from."""
    if preprocess.crop_pct >= 1.0:
        return preprocess
    channels, height, width = preprocess.input_size
    scaled = (
        channels,
        math.floor(height / preprocess.crop_pct),
        math.floor(width / preprocess.crop_pct),
    )
    return replace(preprocess, input_size=scaled, crop_pct=1.0)


def crop_box(width: int, height: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop: area and ratio as the constants above say.

    ``draws``: four numbers in [0, 1): area, ratio, horizontal and vertical position.
    """
    area = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * draws[0]
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = math.exp(low + (high - low) * draws[1])
    w = max(1, min(width, round(width * math.sqrt(area * ratio))))
    h = max(1, min(height, round(height * math.sqrt(area / ratio))))
    left = math.floor((width - w + 1) * draws[2])
    top = math.floor((height - h + 1) * draws[3])
    return left, top, left + w, top + h


class BatchSource:
    """Batches of (float32 images [n, 3, H, W], int64 labels [n]) on the CPU.

    A context manager: ``workers`` threads (0: none) read ahead while it is open. What they
    return depends on the seeds alone, never on their number.
    """

    def __init__(
        self, preprocess: Preprocess, *, batch_size: int, cache: PixelCache, workers: int = 0
    ) -> None:
        self.preprocess, self.batch_size, self.cache = preprocess, batch_size, cache
        self._canvas = canvas_view(preprocess)
        # Resizes what it is given to the input size and normalises it, no more.
        self._exact = replace(preprocess, crop_pct=1.0, crop_mode="squash")
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers) if workers else None

    def __enter__(self) -> BatchSource:
        return self

    def __exit__(self, *reason: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def steps(self, samples: Samples) -> int:
        """Batches in one pass; the last one may be smaller."""
        return math.ceil(len(samples) / self.batch_size)

    def evaluation(self, samples: Samples) -> Iterator[Batch]:
        """One pass in order, preprocessed as for inference."""
        return self._batches(samples, list(range(len(samples))), self._evaluation_image)

    def training(
        self, samples: Samples, *, seed: int, epoch: int, augment: bool, flip: bool
    ) -> Iterator[Batch]:
        """One shuffled pass; order and augmentation follow from ``seed`` and ``epoch`` alone."""
        generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
        order = torch.randperm(len(samples), generator=generator).tolist()
        draws = torch.rand(len(samples), 5, generator=generator, dtype=torch.float64).tolist()
        if not augment:
            return self._batches(samples, order, self._evaluation_image)

        def load(samples: Samples, index: int) -> NDArray[np.float32]:
            image = Image.fromarray(self.cache.pixels(samples.paths[index], self._canvas))
            image = image.crop(crop_box(*image.size, draws[index][:4]))
            if flip and draws[index][4] < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return self._exact(image)

        return self._batches(samples, order, load)

    def _evaluation_image(self, samples: Samples, index: int) -> NDArray[np.float32]:
        pixels = self.cache.pixels(samples.paths[index], self.preprocess)
        return self._exact(Image.fromarray(pixels))

    def _batches(
        self,
        samples: Samples,
        order: list[int],
        load: Callable[[Samples, int], NDArray[np.float32]],
    ) -> Iterator[Batch]:
        starts = range(0, len(order), self.batch_size)
        chunks = (order[start : start + self.batch_size] for start in starts)
        for chunk, images in self._loaded(chunks, lambda index: load(samples, index)):
            yield torch.from_numpy(np.stack(images)), samples.truths(chunk)

    def _loaded(
        self, chunks: Iterator[list[int]], load: Callable[[int], NDArray[np.float32]]
    ) -> Iterator[tuple[list[int], list[NDArray[np.float32]]]]:
        """Every chunk with its images; with workers, the next chunk is on its way meanwhile."""
        if self._pool is None:
            for chunk in chunks:
                yield chunk, [load(i) for i in chunk]
            return
        pool = self._pool
        pending: deque[tuple[list[int], list[Future[NDArray[np.float32]]]]] = deque()

        def submit(count: int) -> None:
            for chunk in itertools.islice(chunks, count):
                pending.append((chunk, [pool.submit(load, i) for i in chunk]))

        submit(2)
        while pending:
            chunk, futures = pending.popleft()
            images = [future.result() for future in futures]
            submit(1)
            yield chunk, images
