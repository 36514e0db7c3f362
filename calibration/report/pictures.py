"""Pictures of a report as PNG."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

_LARGEST = 160  # pixels; the report stays a file that can be mailed


def png_of(pixels: NDArray[np.float64]) -> bytes:
    """An input [H, W, channels] from 0 to 1 as a PNG, at most 160 pixels wide or high.

    The first three channels are red, green and blue; of fewer than three the first is shades of
    grey.
    """
    from PIL import Image

    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    picture = Image.fromarray(np.rint(255 * shown).astype(np.uint8))
    picture.thumbnail((_LARGEST, _LARGEST))
    with io.BytesIO() as file:
        picture.save(file, "PNG", optimize=True)
        return file.getvalue()
