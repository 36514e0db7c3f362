"""From (adapter, image) to the inputs of a bundle's graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.config import CLASSES, ProblemType
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.errors import DataError, abbreviate
from hhdeploy.files.writing import sha256_of
from hhdeploy.preprocess import Preprocess, open_image

Feed = dict[str, NDArray[Any]]


def picture_digest(path: Path) -> str:
    """Hex SHA-256 of an image's file. Raises `DataError`: it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Expected an image that is there and may be "
            "read: look at it and at the disk, or leave it out."
        ) from error


def whose(adapter: str | None) -> str:
    """What a line about one adapter's images begins with; nothing in a folded bundle."""
    return f"adapter {adapter!r}: " if adapter else ""


class Feeder:
    """Knows the adapters of a bundle, their preprocessing and their rows of the bank."""

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        self.folded = bundle.manifest.layout is None
        self._entries = {a.name: a for a in bundle.manifest.adapters}
        self._bank = None if self.folded else bundle.bank()

    @property
    def names(self) -> tuple[str, ...]:
        """Whose images may come: the adapters', and the backbone's if it has a classifier."""
        own = (BACKBONE,) if self.manifest.backbone_classes else ()
        return (*self._entries, *own)

    def class_names(self, adapter: str | None) -> tuple[str, ...] | None:
        """Class names of an adapter, None if it has none."""
        entry = self._entry(adapter)
        return entry.class_names if entry else None

    def class_count(self, adapter: str | None) -> int:
        """Own classes, labels or values of an adapter or the backbone."""
        entry = self._entry(adapter)
        return entry.classes if entry else self.manifest.backbone_classes

    def problem_type(self, adapter: str | None) -> ProblemType:
        """What an adapter's logits mean."""
        entry = self._entry(adapter)
        return entry.problem_type if entry else CLASSES

    def preprocess(self, adapter: str | None) -> Preprocess:
        """How an adapter's images become inputs."""
        return self.manifest.preprocess_of(self._entry(adapter))

    def loader(self, adapter: str | None, path: Path) -> Callable[[], NDArray[np.float32]]:
        """What makes float32 [3, H, W] of a picture of an adapter's, when it is called."""
        preprocess = self.preprocess(adapter)
        return lambda: preprocess(open_image(path))

    def feed(self, adapter: str | None, image: NDArray[np.float32]) -> Feed:
        """Inputs for one image [3, H, W]: a batch of one.

        The bank holds the adapter's row alone, so that a large one costs nothing; a graph with
        its bank baked in gets the row's number.
        """
        feed: Feed = {"images": image[None]}
        if self._bank is None:
            return feed
        row = self._row(adapter)
        if self.manifest.bank_as_constant:
            return {**feed, "adapter_ids": np.asarray([row], np.int64)}
        bank = self._bank[row : row + 1]
        return {**feed, "adapter_ids": np.zeros(1, np.int64), "adapter_bank": bank}

    def checked(
        self, source: str, batch: Mapping[str, Any]
    ) -> Iterator[tuple[str | None, NDArray[np.float32]]]:
        """(adapter, image [3, H, W]) of every image of a batch of arrays.

        Raises:
            DataError: a missing or unknown key, a wrong shape or type, values that are not
                finite, or an adapter that the bundle does not have.
        """
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{source}: expected mappings such as {{'images': ...}} in a list, found "
                f"{type(batch).__name__}."
            )
        allowed = {"images"} if self.folded else {"images", "adapter_ids", "adapters"}
        if "images" not in batch or not set(batch) <= allowed:
            raise DataError(
                f"{source}: expected the keys {', '.join(sorted(allowed))}; found "
                f"{', '.join(sorted(map(str, batch))) or 'none'}."
            )
        images = np.asarray(batch["images"])
        size = self.manifest.input_size
        if images.ndim != 4 or images.shape[1:] != size or images.dtype.kind != "f":
            raise DataError(
                f"{source}: images: expected normalised float32 [n, {', '.join(map(str, size))}], "
                f"found {images.dtype} {list(images.shape)}."
            )
        if not np.isfinite(images).all():
            raise DataError(f"{source}: images: found NaN or infinity.")
        adapters = self._adapters_of(source, batch, len(images))
        for adapter, image in zip(adapters, images, strict=True):
            yield adapter, np.ascontiguousarray(image, np.float32)

    def unmet(self, met: set[str | None]) -> tuple[str, ...]:
        """A warning for every adapter without images, and for a backbone that answers too."""
        if self.folded:
            return ()
        return tuple(
            f"no calibration images for {'the bare' if name == BACKBONE else 'adapter'} {name!r}: "
            "its activations may leave the calibrated ranges"
            for name in self.names
            if name not in met
        )

    def digest(self) -> str:
        """sha256 of what turns an image into inputs: preprocessing, and rows by name."""
        described = {
            name: [self._row(name), self.preprocess(name).to_json()] for name in self.names
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        if self._bank is not None:
            digest.update(np.ascontiguousarray(self._bank).data)
        return digest.hexdigest()

    def _entry(self, adapter: str | None) -> AdapterEntry | None:
        """None for the bare backbone; a folded bundle has one adapter, called or not."""
        if self.folded:
            return self.manifest.adapters[0]
        return self._entries.get(adapter or BACKBONE)

    def _row(self, adapter: str | None) -> int:
        entry = self._entry(adapter)
        return int(entry.row or 0) if entry else 0

    def _adapters_of(self, source: str, batch: Mapping[str, Any], count: int) -> list[str | None]:
        if self.folded:
            return [None] * count
        if ("adapters" in batch) == ("adapter_ids" in batch):
            raise DataError(
                f"{source}: expected either adapters (names) or adapter_ids (row numbers) beside "
                "images: the graph needs to know whose images they are."
            )
        by_row = {self._row(name): name for name in self.names}
        given = np.atleast_1d(np.asarray(batch.get("adapters", batch.get("adapter_ids")))).tolist()
        if len(given) != count:
            raise DataError(f"{source}: expected {count} adapters, found {len(given)}.")
        for adapter in given:
            if adapter not in (self.names if "adapters" in batch else by_row):
                raise DataError(
                    f"{source}: unknown adapter {adapter!r}. The bundle has: "
                    f"{abbreviate([f'{name} (row {row})' for row, name in by_row.items()], 20)}."
                )
        return list(given) if "adapters" in batch else [by_row[row] for row in given]
