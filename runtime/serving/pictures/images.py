"""Encoded pictures to Pillow images, within limits.

The size is read from the header and checked before a pixel is decoded, and only three decoders
are ever asked: a picture that says it is something else is refused. So are the shapes and the
codings that make few bytes cost much: a picture that is a line, since resizing its short side
would make the long one a mile, a JPEG of thousands of scans, each decoded over all pixels, and a
file of millions of segments or chunks, which Pillow reads one by one in Python.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import DataError
from hhdeploy.preprocess import Preprocess, as_rgb
from hhdeploy.runtime.serving.errors import FailedError, RequestError, TooLargeError
from hhdeploy.runtime.serving.pictures.decoding import VAST, Decoders
from hhdeploy.runtime.serving.processes.elsewhere import Elsewhere
from hhdeploy.runtime.serving.processes.threads import start_threads
from hhdeploy.runtime.serving.settings import ServeSettings

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
# Longer side by shorter one. A panorama has 10.
_MOST_RATIO = 50
# A progressive JPEG has about 10. Inside a scan 0xFF is always followed by something else.
_START_OF_SCAN, _MOST_SCANS = b"\xff\xda", 100
# Encoders of PNG write a chunk for every 4 KiB of pixels or more, cameras some ten segments.
_MOST_PIECES, _LEAST_PIECE = 5000, 512
# Pillow has one limit on pixels for the process: two threads would restore each other's.
_OPENING = threading.Lock()


class _Encoded(io.BytesIO):
    """A picture that is read in as many pieces as ones of its size are.

    A segment or chunk is some three of them; what belongs to none is read byte by byte.

    Raises:
        TooLargeError: when it is made, of a WebP; else when it is read.
    """

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name
        self._left = _MOST_PIECES + len(content) // _LEAST_PIECE
        if content.startswith(b"RIFF"):  # libwebp reads its chunks
            self._count(content)

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        self._take()
        return super().read(size)

    def _count(self, content: bytes) -> None:
        at = 12
        while at + 8 <= len(content):
            self._take()
            length = int.from_bytes(content[at + 4 : at + 8], "little")
            at += 8 + length + length % 2

    def _take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TooLargeError(
                f"{self._name}: expected a picture's few segments or chunks, found thousands of "
                "them. Save it again with another program."
            )


class Pictures:
    """Decodes and preprocesses the pictures of all requests, on threads of its own.

    Pillow lets go of the interpreter's lock while it decodes and resizes, but not while it copies
    what libwebp decoded: a fifth of a second for a vast picture, which has a process of its own.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._opening = start_threads(1, "hhdeploy-open")
        self._decoders = Decoders(settings.decoders, settings.decoding_pixels)
        # Of those that no vast picture is in; as many as there are threads for these.
        self._free: SimpleQueue[Elsewhere] = SimpleQueue()
        self._processes = [Elsewhere("decodes") for _ in range(self._decoders.most_vast)]
        for process in self._processes:
            self._free.put(process)

    async def pixels(
        self, encoded: Sequence[bytes], images: Sequence[int], ways: Sequence[Preprocess]
    ) -> NDArray[np.float32]:
        """float32 [n, 3, H, W] of one request.

        Args:
            encoded: its pictures; each is decoded once.
            images: of each row the picture's number.
            ways: of each row how its adapter wants the picture.

        Raises:
            TooLargeError: all of them together have more pixels than one request may.
            RequestError: or one of its kinds; see `open_picture`.
        """
        wanted: list[dict[Preprocess, None]] = [{} for _ in encoded]
        for index, way in zip(images, ways, strict=True):
            wanted[index][way] = None
        loop = asyncio.get_running_loop()
        opened = await loop.run_in_executor(self._opening, self._open, encoded)
        jobs, turn = [], self._decoders.first_turn
        try:
            for index, each in enumerate(wanted):
                image = opened[index]
                pixels = image.width * image.height
                turn += pixels
                name, own = f"image {index}", tuple(each)
                job = partial(_decode, image, name, own)
                if pixels >= VAST:
                    job = partial(self._elsewhere, encoded[index], name, own)
                jobs.append(self._decoders.begin(job, pixels, turn))
                del image, job
            decoded = await asyncio.gather(*jobs)
        finally:
            opened.clear()
            while jobs:  # none stays in this frame, which the traceback of its exception holds
                jobs.pop().cancel()
        return np.stack([decoded[i][w] for i, w in zip(images, ways, strict=True)])

    def close(self) -> None:
        """Finish what was begun, and end the threads."""
        self._opening.shutdown(wait=True)
        for process in self._processes:
            process.kill()
        self._decoders.close()
        for process in self._processes:
            process.end()

    def _elsewhere(
        self, content: bytes, name: str, ways: Sequence[Preprocess]
    ) -> dict[Preprocess, NDArray[np.float32]]:
        """`_decode` in a process; on one of the threads for vast pictures."""
        process = self._free.get()
        try:
            found: dict[Preprocess, NDArray[np.float32]] = process.call(
                open_and_decode, content, self._settings.image_pixels, name, ways
            )
            return found
        finally:
            self._free.put(process)

    def _open(self, encoded: Sequence[bytes]) -> list[Image.Image]:
        most, most_together = self._settings.image_pixels, self._settings.request_pixels
        opened, together = [], 0
        for index, content in enumerate(encoded):
            image = open_picture(content, most_pixels=most, name=f"image {index}")
            opened.append(image)
            together += image.width * image.height
            if together > most_together:
                raise TooLargeError(
                    f"the pictures up to image {index} have {together} pixels, at most "
                    f"{most_together} are taken in one request. Send fewer, or smaller ones."
                )
        return opened


def open_and_decode(
    content: bytes, most_pixels: int, name: str, ways: Sequence[Preprocess]
) -> dict[Preprocess, NDArray[np.float32]]:
    """A vast picture; see `open_picture`, and of each way float32 [3, H, W]."""
    return _decode(open_picture(content, most_pixels=most_pixels, name=name), name, ways)


def _decode(
    image: Image.Image, name: str, ways: Sequence[Preprocess]
) -> dict[Preprocess, NDArray[np.float32]]:
    """One picture, preprocessed in every way that some adapter wants it."""
    decoded = load_picture(image, name=name)
    try:
        return {way: way(decoded) for way in ways}
    except DataError as error:  # e.g. a model of other channels than a picture has
        raise RequestError(f"{name}: {error}") from error
    except MemoryError as error:
        raise _no_memory(name) from error
    except (ValueError, OverflowError) as error:  # one pixel high, a mile wide
        raise RequestError(
            f"{name}: {image.width} x {image.height} pixels cannot be resized: {error}"
        ) from error


def open_picture(content: bytes, *, most_pixels: int, name: str) -> Image.Image:
    """One picture that is not decoded yet, but known to be within limits.

    Args:
        content: a JPEG, PNG or WebP file.
        most_pixels: width x height that is taken.
        name: what messages call it.

    Raises:
        TooLargeError: more pixels, or a shape or coding that costs more than its pixels.
        RequestError: not a picture of these formats, or a damaged one.
    """
    from PIL import Image

    if content.count(_START_OF_SCAN) > _MOST_SCANS and content.startswith(b"\xff\xd8"):
        raise TooLargeError(f"{name}: a JPEG of more than {_MOST_SCANS} scans.")
    with _readable(name), _OPENING, _any_size():
        opened = Image.open(_Encoded(content, name), formats=FORMATS)
    width, height = opened.size
    if width * height > most_pixels:
        raise TooLargeError(f"{name}: {width} x {height} pixels, at most {most_pixels} are taken.")
    if max(width, height) > _MOST_RATIO * min(width, height):
        raise TooLargeError(
            f"{name}: {width} x {height} pixels: expected one side at most {_MOST_RATIO} times "
            "the other."
        )
    return opened


def load_picture(opened: Image.Image, *, name: str) -> Image.Image:
    """What `open_picture` opened, decoded; of an animated one the first frame.

    Raises:
        RequestError: it is damaged, or of a depth that says nothing.
        FailedError: there is no memory for it.
    """
    with _readable(name), opened:
        return as_rgb(opened)  # which keeps the EXIF orientation


@contextmanager
def _any_size() -> Iterator[None]:
    """Pillow's own limit, which it says instead of ours, is no limit."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What Pillow raises as what a client is told."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except RequestError:
        raise
    except DataError as error:
        raise RequestError(f"{name}: {error}") from error
    except MemoryError as error:
        raise _no_memory(name) from error
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


def _no_memory(name: str) -> FailedError:
    """Of a picture within all limits, at which nothing is wrong."""
    return FailedError(
        f"{name} could not be decoded: the server's memory is used up. Try again later."
    )
