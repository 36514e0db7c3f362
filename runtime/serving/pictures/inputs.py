"""The images of a request: whether they are, and as the graph takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import abbreviate
from hhdeploy.preprocess import Preprocess
from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.messages import (
    ADAPTERS,
    BYTES,
    FP16,
    FP32,
    IMAGES,
    UINT8,
    InferRequest,
    Tensor,
)

# Images that are no encoded pictures.
_NUMBERS = frozenset({UINT8, FP16, FP32})


def check_images(request: InferRequest, size: tuple[int, int, int]) -> Tensor:
    """The images: numbers of the graph's shape, or encoded pictures; at least one.

    Args:
        request: whose.
        size: (3, H, W) of the graph's.

    Raises:
        RequestError: what they are instead.
    """
    unknown = set(request.inputs) - {IMAGES, ADAPTERS}
    if unknown or IMAGES not in request.inputs:
        found = abbreviate(sorted(repr(n[:80]) for n in request.inputs)) or "none"
        raise RequestError(
            f"inputs: expected {IMAGES!r} and, for several adapters, {ADAPTERS!r}; found {found}."
        )
    images = request.inputs[IMAGES]
    shape = images.array.shape
    if images.datatype in _NUMBERS:
        if len(shape) != 4 or shape[1:] != size:
            raise RequestError(
                f"input images: expected {images.datatype} [n, {size[0]}, {size[1]}, "
                f"{size[2]}], found {list(shape)}."
            )
    elif images.datatype != BYTES or len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
        raise RequestError(
            f"input images: expected FP32 or FP16 [n, {size[0]}, {size[1]}, {size[2]}], "
            "normalised, or UINT8 of that shape, or BYTES [n], encoded pictures; found "
            f"{images.datatype} {list(shape)}."
        )
    if not shape[0]:
        raise RequestError("input images: expected at least one image, found none.")
    return images


def as_pixels(
    images: Tensor, numbers: Sequence[int], ways: Sequence[Preprocess]
) -> NDArray[np.float32]:
    """float32 [rows, 3, H, W] of images that are numbers.

    FP32 and FP16 are normalised already, UINT8 are as each row's adapter wants them.

    Args:
        images: see `check_images`.
        numbers: of each row the image's number.
        ways: of each row how its adapter wants it.
    """
    if images.datatype == UINT8:
        levels = images.array
        return np.stack([way.normalised(levels[i]) for i, way in zip(numbers, ways, strict=True)])
    array: NDArray[np.float32] = images.array.astype(np.float32, copy=False)
    if len(numbers) != len(array):
        array = np.broadcast_to(array, (len(numbers), *array.shape[1:]))
    # Aligned as well, which what came in the middle of a body need not be.
    return np.require(array, np.float32, ["C", "A"])
