"""Pictures of a report as PNG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

_LARGEST = 160  # pixels; the report stays a file that can be mailed


def png_of(pixels: NDArray[np.float64]) -> bytes:
    """A picture [H, W, 3] from 0 to 1 as a PNG, at most 160 pixels wide or high."""
    from PIL import Image

    picture = Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
    picture.thumbnail((_LARGEST, _LARGEST))
    with io.BytesIO() as file:
        picture.save(file, "PNG", optimize=True)
        return file.getvalue()
