"""Large bodies arrive in turn, whoever sends them, and small requests between their pieces."""

from __future__ import annotations

import asyncio
import random
import ssl
from functools import partial
from hashlib import sha256
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.http.arrival import (
    PAUSE_SECONDS,
    PIECE_BYTES,
    Turns,
    bounded_protocol,
)
from tests.runtime.serving.certificates import make_certificate
from tests.runtime.serving.fleets import PATIENCE


def test_one_goes_on_in_each_turn_of_the_loop():
    async def scene() -> None:
        turns = Turns(lambda: False)
        for _ in range(2):  # again after nobody waited
            went: list[int] = []
            for number in range(3):
                turns.wait(partial(went.append, number))
            for seen in range(3):
                assert went == list(range(seen))
                await asyncio.sleep(0)
            assert went == [0, 1, 2]
            await asyncio.sleep(0)

    asyncio.run(scene())


def test_there_is_a_pause_after_each_while_the_server_is_crowded():
    async def scene() -> None:
        loop, crowded = asyncio.get_running_loop(), [True]
        turns = Turns(lambda: crowded[0])
        went: list[float] = []
        begun = loop.time()  # a turn is noted late where another process has the core
        for _ in range(4):
            turns.wait(lambda: went.append(loop.time()))
        while len(went) < 3:
            await asyncio.sleep(0)
        assert went[2] - begun >= 2 * PAUSE_SECONDS - loop._clock_resolution  # type: ignore[attr-defined]
        crowded[0] = False
        while len(went) < 4:
            await asyncio.sleep(0)
        turns.wait(lambda: went.append(loop.time()))
        for _ in range(3):  # no pause any more
            await asyncio.sleep(0)
        assert len(went) == 5

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


class Pipe(asyncio.Transport):
    """A connection on which a whole request has come; `deliver` hands its next piece on."""

    def __init__(self, path: str, body: bytes) -> None:
        super().__init__()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.left, self.said = head.encode() + body, b""
        self.paused = self.closed = False

    def deliver(self, protocol: asyncio.BufferedProtocol) -> bool:
        """As the loop does in each of its turns; whether there was something to read."""
        if self.paused or not self.left:
            return False
        room = protocol.get_buffer(-1)
        piece, self.left = self.left[: len(room)], self.left[len(room) :]
        room[: len(piece)] = piece
        protocol.buffer_updated(len(piece))
        return True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass  # all is taken at once

    def write(self, data: Any) -> None:
        self.said += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body's digest; what is asked for as refused it does not read."""
    body, more = b"", scope["path"] != "/refused"
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    said = sha256(body).hexdigest().encode()
    length = [(b"content-length", b"%d" % len(said))]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": said})


def factory(answers: Any = app) -> Any:
    """Makes protocols of one server."""
    config = Config(
        answers,
        http=bounded_protocol(PATIENCE, 100, lambda error: None, lambda: False),
        log_config=None,
    )
    config.load()
    return partial(config.http_protocol_class, config, ServerState(), {})


@pytest.mark.parametrize("path", ["/taken", "/refused"])
def test_large_bodies_arrive_piece_by_piece_in_turn(path):
    """Of those that are refused the rest, which nobody reads."""
    small = b"small" * 1009
    bodies = [bytes([number]) * (4 * PIECE_BYTES + 13) for number in (1, 2, 3)]
    pipes = [*(Pipe(path, body) for body in bodies), Pipe("/taken", small)]

    async def scene() -> list[list[int]]:
        make = factory()
        made = [make() for _ in pipes]
        for protocol, pipe in zip(made, pipes, strict=True):
            protocol.connection_made(pipe)
        turns = []
        while any(pipe.left or not pipe.said for pipe in pipes):
            turns.append([n for n, pipe in enumerate(pipes) if pipe.deliver(made[n])])
            if len(turns) == 3:  # one whose answer waits for no turn
                assert sha256(small).hexdigest().encode() in pipes[3].said
            await asyncio.sleep(0)
        for protocol in made:
            protocol.connection_lost(None)
        return turns

    first, *others = asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    assert first == [0, 1, 2, 3] and max(map(len, others)) == 1
    order = [number for turn in others for number in turn]
    assert order == [0, 1, 2] * 4
    for pipe, body in zip(pipes, bodies, strict=False):
        read = body if path == "/taken" else b""
        assert pipe.said.endswith(sha256(read).hexdigest().encode())


def test_a_small_body_in_several_pieces_waits_for_no_turn():
    pipe = Pipe("/taken", b"body" * 5003)

    async def scene() -> None:
        protocol = factory()()
        protocol.connection_made(pipe)
        content, pipe.left = pipe.left, b""
        for at in range(0, len(content), 4001):
            pipe.left = content[at : at + 4001]
            assert pipe.deliver(protocol)
        for _ in range(3):
            await asyncio.sleep(0)
        assert pipe.said.endswith(sha256(b"body" * 5003).hexdigest().encode())
        protocol.connection_lost(None)

    asyncio.run(scene())


def test_what_stands_behind_a_body_is_no_header():
    """Trailers: whether the application saw them depended on how the request was cut."""
    pipe = Pipe("/taken", b"")
    pipe.left = (
        b"POST /taken HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"4\r\nbody\r\n0\r\nContent-Encoding: gzip\r\nAuthorization: Bearer x\r\n\r\n"
        b"GET /taken HTTP/1.1\r\nHost: y\r\nAccept: z\r\n\r\n"
    )

    seen: list[Any] = []

    async def seeing(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(scope["headers"])

    async def scene() -> None:
        protocol = factory(seeing)()
        protocol.connection_made(pipe)
        assert pipe.deliver(protocol)
        while len(seen) < 2:
            await asyncio.sleep(0)
        protocol.connection_lost(None)

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    assert seen == [
        [(b"host", b"x"), (b"transfer-encoding", b"chunked")],
        [(b"host", b"y"), (b"accept", b"z")],
    ]
    assert sha256(b"body").hexdigest().encode() in pipe.said


@pytest.mark.parametrize("secure", [False, True])
def test_large_bodies_at_the_same_time_arrive_whole(tmp_path, secure):
    """Over real connections, on which a second request follows each."""
    bodies = [random.Random(seed).randbytes(5 * PIECE_BYTES + seed) for seed in (101, 1009, 7)]
    cert, key = make_certificate(tmp_path)
    client = ssl.create_default_context(cafile=str(cert)) if secure else None

    async def ask(port: int, body: bytes) -> None:
        name = "localhost" if secure else None
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client, server_hostname=name
        )
        for content in (body, b"short", body[::-1]):
            writer.write(Pipe("/taken", content).left)
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(64) == sha256(content).hexdigest().encode()
        writer.close()
        await writer.wait_closed()

    async def scene() -> None:
        context = Tls(cert, key).http if secure else None
        server = await asyncio.get_running_loop().create_server(
            factory(), "127.0.0.1", 0, ssl=context
        )
        async with server:
            port = server.sockets[0].getsockname()[1]
            await asyncio.gather(*(ask(port, body) for body in bodies))

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))
