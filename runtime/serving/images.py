"""Encoded pictures to Pillow images, within limits.

The size is read from the header and checked before a pixel is decoded, and only three decoders
are ever asked: a picture that says it is something else is refused. So are the shapes and the
codings that make few bytes cost much: a picture that is a line, since resizing its short side
would make the long one a mile, and a JPEG of thousands of scans, each decoded over all pixels.
"""

from __future__ import annotations

import asyncio
import io
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import DataError
from hhdeploy.preprocess import Preprocess, as_rgb
from hhdeploy.runtime.serving.errors import RequestError, TooLargeError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
# Longer side by shorter one. A panorama has 10.
_MOST_RATIO = 50
# A progressive JPEG has about 10. Inside a scan 0xFF is always followed by something else.
_START_OF_SCAN, _MOST_SCANS = b"\xff\xda", 100
# `warnings` keeps its filters for the process: two threads would restore each other's.
_OPENING = threading.Lock()
# Pillow lets go of the interpreter's lock while it decodes and resizes.
_DECODERS = 2


class Pictures:
    """Decodes and preprocesses the pictures of all requests, on threads of its own."""

    def __init__(self, most_pixels: int) -> None:
        """``most_pixels``: of one picture."""
        self._most_pixels = most_pixels
        self._threads = ThreadPoolExecutor(_DECODERS, "hhdeploy-decode")

    async def pixels(
        self, encoded: Sequence[bytes], images: Sequence[int], ways: Sequence[Preprocess]
    ) -> NDArray[np.float32]:
        """float32 [n, 3, H, W] of one request.

        Args:
            encoded: its pictures; each is decoded once.
            images: of each row the picture's number.
            ways: of each row how its adapter wants the picture.
        """
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(
                self._threads,
                self._decode,
                content,
                index,
                list(dict.fromkeys(w for i, w in zip(images, ways, strict=True) if i == index)),
            )
            for index, content in enumerate(encoded)
        ]
        try:
            decoded = await asyncio.gather(*jobs)
        finally:
            while jobs:  # none stays in this frame, which the traceback of its exception holds
                jobs.pop().cancel()
        return np.stack([decoded[i][w] for i, w in zip(images, ways, strict=True)])

    def close(self) -> None:
        """Finish what was begun, and end the threads."""
        self._threads.shutdown(wait=True)

    def _decode(
        self, content: bytes, index: int, ways: list[Preprocess]
    ) -> dict[Preprocess, NDArray[np.float32]]:
        """One picture, preprocessed in every way that some adapter wants it."""
        image = decode_image(content, most_pixels=self._most_pixels, name=f"image {index}")
        try:
            return {way: way(image) for way in ways}
        except (MemoryError, ValueError, OverflowError) as error:  # one pixel high, a mile wide
            raise RequestError(
                f"image {index}: {image.width} x {image.height} pixels cannot be resized: {error}"
            ) from error


def decode_image(content: bytes, *, most_pixels: int, name: str) -> Image.Image:
    """One picture; of an animated one the first frame.

    Args:
        content: a JPEG, PNG or WebP file.
        most_pixels: width x height that is taken.
        name: what messages call it.

    Raises:
        TooLargeError: more pixels, or a shape or coding that costs more than its pixels.
        RequestError: not a picture of these formats, or a damaged one.
    """
    from PIL import Image, UnidentifiedImageError

    if content.count(_START_OF_SCAN) > _MOST_SCANS and content.startswith(b"\xff\xd8"):
        raise TooLargeError(f"{name}: a JPEG of more than {_MOST_SCANS} scans.")
    try:
        # Its limit on pixels is a warning below twice as much; ours is an error, and below.
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = opened.size
        if width * height > most_pixels:
            raise TooLargeError(
                f"{name}: {width} x {height} pixels, at most {most_pixels} are taken."
            )
        if max(width, height) > _MOST_RATIO * min(width, height):
            raise TooLargeError(
                f"{name}: {width} x {height} pixels: expected one side at most {_MOST_RATIO} times "
                "the other."
            )
        with opened:
            return as_rgb(opened)  # which keeps the EXIF orientation
    except RequestError:
        raise
    except DataError as error:
        raise RequestError(f"{name}: {error}") from error
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
