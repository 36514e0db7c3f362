"""Bodies of few bytes that are much JSON once they are decompressed, or deep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hhdeploy.loadtest.abuse.wire import Attack, Victim, packed, posting

# Bytes of JSON: what a server reads at once, what it reads elsewhere, what it must not take.
_SIZES = (250_000, 4_000_000, 8_300_000, 60_000_000)
# Objects cost a parser the most for their text; the others are what a request may have.
_ITEMS = (b'{"a":0},', b"[0],", b"1e-5,", b'"\\u0000",')
# Of what is repeated, compressed at a time.
_PIECE_BYTES = 1 << 16
# For `packed`.
_GZIP, _ZLIB, _DEFLATE = 31, 15, -15
Pieces = Sequence[tuple[bytes, int]]


def gzip_bombs(victim: Victim) -> Attack:
    """JSON in gzip."""
    return _sent(victim, [packed(text, _GZIP) for text in _flat(victim)], "gzip")


def deflate_bombs(victim: Victim) -> Attack:
    """JSON in deflate, in zlib's format and as the bare stream."""
    formats = itertools.cycle((_ZLIB, _DEFLATE))
    bodies = [packed(text, bits) for text, bits in zip(_flat(victim), formats, strict=False)]
    return _sent(victim, bodies, "deflate")


def nested_bombs(victim: Victim) -> Attack:
    """JSON without end of levels, in gzip."""
    bodies = [packed(text, _GZIP) for size in _SIZES for text in _deep(size)]
    return _sent(victim, bodies, "gzip")


def _sent(victim: Victim, bodies: Sequence[bytes], encoding: str) -> Attack:
    return posting(victim, [(body, {"Content-Encoding": encoding}) for body in bodies])


def _flat(victim: Victim) -> Iterator[Pieces]:
    """JSON that begins as a request does, with an image of many items of every sort and size."""
    shape = ",".join(map(str, (1, *victim.size)))
    begin = f'{{"inputs":[{{"name":"images","datatype":"FP32","shape":[{shape}],"data":['
    for size in _SIZES:
        for item in _ITEMS:
            yield [(begin.encode(), 1), *_repeated(item, size // len(item)), (b"0]}]}", 1)]


def _deep(size: int) -> Sequence[Pieces]:
    """About ``size`` bytes each of JSON that has no end of levels: lists, objects, and unclosed."""
    half = size // 2
    objects = size // 6
    return (
        [*_repeated(b"[", half), *_repeated(b"]", half)],
        [*_repeated(b'{"a":', objects), (b"0", 1), *_repeated(b"}", objects)],
        [(b'{"inputs":', 1), *_repeated(b"[", size)],
    )


def _repeated(item: bytes, count: int) -> Pieces:
    """An item so many times, in pieces that are worth compressing."""
    at_once = _PIECE_BYTES // len(item)
    return [(item * at_once, count // at_once), (item * (count % at_once), 1)]
