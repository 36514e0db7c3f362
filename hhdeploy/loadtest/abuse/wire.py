"""How abusers speak: bytes on sockets, for no library sends what they send."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What one connection does, once; in a word, what came of it: a status, ``closed``, ...
Attack = Callable[[], Awaitable[str]]
Fields = Mapping[str, str]
# The greeting of a client of HTTP/2, whose settings are empty.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


@dataclass(frozen=True)
class Victim:
    """Whom an abuser meets: the server or, for the control, what looks like it from outside.

    Attributes:
        host, http_port, grpc_port: where it listens.
        model: name of an adapter there.
        size: of one image, [3, H, W].
        fleet: its directory of adapters.
    """

    host: str
    http_port: int
    grpc_port: int
    model: str
    size: Sequence[int]
    fleet: str

    def get(self, path: str) -> bytes:
        """A whole request without a body."""
        return f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode()

    def infer(self, length: int | None, headers: Fields | None = None) -> bytes:
        """The head of an inference whose body has so many bytes; None: which comes in chunks."""
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"POST /v2/models/{self.model}/infer HTTP/1.1", f"Host: {self.host}", size]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return "\r\n".join([*lines, "\r\n"]).encode()


@contextlib.asynccontextmanager
async def connection(
    host: str, port: int, received: int = 1 << 16
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at once at the end of the block, whatever is on its way.

    Args:
        host, port: whose.
        received: bytes that its buffers take before they are read.

    Raises:
        OSError: it broke.
    """
    version_6 = ":" in host
    own = socket.socket(socket.AF_INET6 if version_6 else socket.AF_INET)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, (host, port))
        reader, writer = await asyncio.open_connection(sock=own, limit=received)
    except BaseException:
        own.close()
        raise
    try:
        yield reader, writer
    finally:
        transport: Any = writer.transport
        transport.abort()


async def post(victim: Victim, body: bytes, headers: Fields) -> str:
    """An inference on a connection of its own: the status, or ``closed``."""
    async with connection(victim.host, victim.http_port) as (reader, writer):
        writer.write(victim.infer(len(body), headers) + body)
        await writer.drain()
        return status(await reader.readline())


def posting(victim: Victim, requests: Sequence[tuple[bytes, Fields]]) -> Attack:
    """Inferences, bodies with headers, in turn and without an end, shared by all connections."""
    endless = itertools.cycle(requests)

    async def attack() -> str:
        return await post(victim, *next(endless))

    return attack


def status(line: bytes) -> str:
    """Of an answer's first line; ``closed`` if there is none."""
    words = line.split()
    return words[1].decode("ascii", "replace") if len(words) > 1 else "closed"


def binary_request(datatype: str, shape: Sequence[int], tensor: bytes) -> tuple[bytes, Fields]:
    """Body and headers of an inference of one binary tensor of images."""
    described = {
        "name": "images",
        "datatype": datatype,
        "shape": list(shape),
        "parameters": {"binary_data_size": len(tensor)},
    }
    content = json.dumps({"inputs": [described]}).encode()
    return content + tensor, {"Inference-Header-Content-Length": str(len(content))}


def packed(content: Sequence[tuple[bytes, int]], bits: int) -> bytes:
    """What is said again and again, compressed: each piece once, however often it comes.

    Args:
        content: pieces, and how often each comes.
        bits: 15: zlib's format, -15: the bare stream of deflate, 31: gzip's.
    """
    stream, crc, adler, size = bytearray(), 0, 1, 0
    for piece, count in content:
        packer = zlib.compressobj(wbits=-15)
        # After a full flush nothing refers to what came before it.
        stream += (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)) * count
        size += len(piece) * count
        for _ in range(count):
            crc, adler = zlib.crc32(piece, crc), zlib.adler32(piece, adler)
    stream += zlib.compressobj(wbits=-15).flush()
    if bits < 0:
        return bytes(stream)
    if bits == 15:
        return b"\x78\x9c" + stream + struct.pack(">I", adler)
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + stream + struct.pack("<II", crc, size)


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """One of HTTP/2."""
    length = len(content).to_bytes(3, "big")
    return length + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def call(stream: int, path: bytes, message: bytes = b"", *more: tuple[bytes, bytes]) -> bytes:
    """The frames of a whole gRPC call; names and values have at most 126 bytes."""
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
        (b"content-type", b"application/grpc"), (b"te", b"trailers"), *more,
    ]  # fmt: skip
    block = b"".join(b"\0" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in fields)
    content = b"\0" + len(message).to_bytes(4, "big") + message
    headers = frame(HEADERS, END_HEADERS, stream, block)
    return headers + frame(DATA, END_STREAM, stream, content)
