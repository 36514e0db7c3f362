"""Encoded pictures to Pillow images, within limits.

The size is read from the header and checked before a pixel is decoded, and only three decoders
are ever asked: a picture that says it is something else is refused.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from hhdeploy.runtime.serving.errors import RequestError, TooLargeError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(content: bytes, *, most_pixels: int, name: str) -> Image.Image:
    """One picture; of an animated one the first frame.

    Args:
        content: a JPEG, PNG or WebP file.
        most_pixels: width x height that is taken.
        name: what messages call it.

    Raises:
        TooLargeError: more pixels.
        RequestError: not a picture of these formats, or a damaged one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Its limit on pixels is a warning below twice as much; ours is an error, and below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = opened.size
        if width * height > most_pixels:
            raise TooLargeError(
                f"{name}: {width} x {height} pixels, at most {most_pixels} are taken."
            )
        with opened:
            return opened.convert("RGB")
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:  # its text quotes an address in memory
        raise RequestError(
            f"{name}: expected an encoded {', '.join(FORMATS)} picture, found none."
        ) from error
    except Exception as error:
        raise RequestError(
            f"{name}: expected an encoded {', '.join(FORMATS)} picture: {error}"
        ) from error
