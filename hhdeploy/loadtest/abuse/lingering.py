"""Connections that stay: they send slowly, read slowly, or do neither."""

from __future__ import annotations

import asyncio
import itertools

from hhdeploy.loadtest.abuse.wire import (
    PREFACE,
    SETTINGS,
    Attack,
    Victim,
    call,
    connection,
    frame,
)

# A body just below what a server takes: many of them are beyond what it takes together.
_HELD_BYTES = (64 << 20) - 4096
_PIECE_BYTES = 1 << 20
_STEP_SECONDS = 0.5
# Requests on one connection, before any answer is read.
_AHEAD = 20
_READ_BYTES = 512
# Of HTTP/2: what the server may send before it is told to go on.
_INITIAL_WINDOW_SIZE = b"\0\4"


def slow_senders(victim: Victim) -> Attack:
    """Heads, bodies and gRPC's greeting byte by byte; vast bodies up to their last bytes."""
    whole = victim.infer(10_000_000)
    held = victim.infer(_HELD_BYTES, {"Inference-Header-Content-Length": "1000"})
    spaces = b" " * _PIECE_BYTES
    # What is said at once, first and then so many spaces, and what is said byte by byte.
    ways = itertools.cycle(
        [
            (victim.http_port, b"", 0, whole),
            (victim.http_port, whole, 0, b'{"inputs": '),
            (victim.http_port, victim.infer(None), 0, b"1\r\n[\r\n"),
            (victim.http_port, held, _HELD_BYTES // _PIECE_BYTES - 1, b" "),
            (victim.grpc_port, b"", 0, PREFACE),
        ]
    )

    async def attack() -> str:
        port, at_once, pieces, slowly = next(ways)
        async with connection(victim.host, port) as (reader, writer):
            writer.write(at_once)
            for _ in range(pieces):
                writer.write(spaces)
                await writer.drain()
            ended = asyncio.ensure_future(reader.read(1))
            try:
                for byte in itertools.cycle(slowly):
                    writer.write(bytes([byte]))
                    await asyncio.wait([ended], timeout=_STEP_SECONDS)
                    if ended.done():
                        break
                return "answered" if ended.result() else "closed"
            finally:
                ended.cancel()

    return attack


def slow_readers(victim: Victim) -> Attack:
    """Many requests at once on one connection, whose answers are read a few bytes at a time."""
    metadata, metrics = (victim.get(p) for p in (f"/v2/models/{victim.model}", "/metrics"))
    calls = b"".join(
        call(2 * number + 1, b"/inference.GRPCInferenceService/ServerMetadata")
        for number in range(_AHEAD)
    )
    nothing = frame(SETTINGS, 0, 0, _INITIAL_WINDOW_SIZE + bytes(4))
    ways = itertools.cycle(
        [
            (victim.http_port, metadata * _AHEAD),
            (victim.http_port, metrics * _AHEAD),
            (victim.grpc_port, PREFACE + nothing + calls),
        ]
    )

    async def attack() -> str:
        port, asked = next(ways)
        async with connection(victim.host, port, _READ_BYTES) as (reader, writer):
            writer.write(asked)
            while await reader.read(_READ_BYTES):
                await asyncio.sleep(_STEP_SECONDS)
        return "closed"

    return attack


def idle(victim: Victim) -> Attack:
    """Connections that say nothing, or nothing more than the first word, on both wires."""
    ways = itertools.cycle(
        [
            (victim.http_port, b""),
            (victim.http_port, victim.get("/v2/health/live")),
            (victim.grpc_port, b""),
            (victim.grpc_port, PREFACE + frame(SETTINGS, 0, 0, b"")),
        ]
    )

    async def attack() -> str:
        port, said = next(ways)
        async with connection(victim.host, port) as (reader, writer):
            writer.write(said)
            while await reader.read(1 << 16):
                pass
        return "closed"

    return attack
