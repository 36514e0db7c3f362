"""Bodies of few bytes that are much JSON once they are decompressed, or deep."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator, Sequence

from hhdeploy.loadtest.abuse.wire import Attack, Victim, post

# Bytes of JSON: what a server reads at once, what it reads elsewhere, what it must not take.
_SIZES = (250_000, 4_000_000, 8_300_000, 60_000_000)
# Objects cost a parser the most for their text; the others are what a request may have.
_ITEMS = (b'{"a":0},', b"[0],", b"1e-5,", b'"\\u0000",')


def gzip_bombs(victim: Victim) -> Attack:
    """JSON in gzip."""
    return _posting(victim, [gzip.compress(text) for text in _flat(victim)], "gzip")


def deflate_bombs(victim: Victim) -> Attack:
    """JSON in deflate, in zlib's format and as the bare stream."""
    bodies = []
    for text, bits in zip(_flat(victim), itertools.cycle((15, -15)), strict=False):
        stream = zlib.compressobj(wbits=bits)
        bodies.append(stream.compress(text) + stream.flush())
    return _posting(victim, bodies, "deflate")


def nested_bombs(victim: Victim) -> Attack:
    """JSON without end of levels, in gzip."""
    bodies = [gzip.compress(text) for size in _SIZES for text in _deep(size)]
    return _posting(victim, bodies, "gzip")


def _posting(victim: Victim, bodies: Sequence[bytes], encoding: str) -> Attack:
    endless = itertools.cycle(bodies)  # shared by all connections

    async def attack() -> str:
        return await post(victim, next(endless), {"Content-Encoding": encoding})

    return attack


def _flat(victim: Victim) -> Iterator[bytes]:
    """JSON that begins as a request does, with an image of many items of every sort and size."""
    shape = ",".join(map(str, (1, *victim.size)))
    begin = f'{{"inputs":[{{"name":"images","datatype":"FP32","shape":[{shape}],"data":['
    for size in _SIZES:
        for item in _ITEMS:
            yield begin.encode() + item * (size // len(item)) + b"0]}]}"


def _deep(size: int) -> Sequence[bytes]:
    """About ``size`` bytes each of JSON that has no end of levels: lists, objects, and unclosed."""
    half = size // 2
    objects = size // 6
    return (
        b"[" * half + b"]" * half,
        b'{"a":' * objects + b"0" + b"}" * objects,
        b'{"inputs":' + b"[" * size,
    )
