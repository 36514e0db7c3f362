"""Clients that offer another protocol are answered as those that do not, in this one."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import time
from collections.abc import Sequence
from hashlib import sha256

import pytest
from starlette.requests import Request

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.http.arrival import PIECE_BYTES
from hhdeploy.runtime.serving.http.bodies import Bodies
from tests.runtime.serving.fleets import PATIENCE, files_of, make_adapter
from tests.runtime.serving.servers import AUTHORISED, TOKEN, running_server
from tests.runtime.serving.test_arrival import Pipe, factory
from tests.support import images

# What JDK 17's HttpClient sends with each first request over plain HTTP.
JAVA = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
}
INNER = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


def request(body: bytes, *lines: bytes, chunked: bool = False, version: bytes = b"1.1") -> bytes:
    """A request with some lines in its head, and the body as it travels."""
    if chunked:
        half = len(body) // 2
        parts = [b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:half], body[half:], b"")]
        framing, body = b"Transfer-Encoding: chunked", b"".join(parts)
    else:
        framing = b"Content-Length: %d" % len(body)
    head = [b"POST /taken HTTP/%b" % version, b"Host: localhost", framing, *lines, b"", b""]
    return b"\r\n".join(head) + body


def said_to(pieces: Sequence[bytes]) -> tuple[list[bytes], bool]:
    """The digests that are answered to what comes on one connection, and whether it was closed."""
    pipe = Pipe("", b"")

    async def scene() -> bool:
        protocol = factory()()
        protocol.connection_made(pipe)
        for piece in pieces:
            pipe.left = piece
            while pipe.left and not pipe.closed:
                pipe.deliver(protocol)
                await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        closed = pipe.closed
        protocol.connection_lost(None)
        return closed

    closed = asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    found = re.findall(rb"[0-9a-f]{64}", pipe.said)
    assert pipe.said.count(b"HTTP/1.1 ") == len(found)
    return found, closed


def digest(body: bytes) -> bytes:
    return sha256(body).hexdigest().encode()


OFFERS = {
    "Java": [f"{name}: {value}".encode() for name, value in JAVA.items()],
    "websocket": [b"upgrade: websocket", b"CONNECTION: keep-alive, upgrade"],
    "several": [b"Upgrade: h2c", b"UPGRADE: a, b", b"Connection: Upgrade"],
    "empty": [b"Upgrade:", b"Connection: Upgrade"],
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("offer", OFFERS)
def test_a_body_that_reads_like_a_request_is_a_body_wherever_it_is_cut(offer, chunked):
    whole = request(INNER, *OFFERS[offer], chunked=chunked)
    for at in range(len(whole) + 1):
        assert said_to([whole[:at], whole[at:]]) == ([digest(INNER)], False), at
    assert said_to([bytes([octet]) for octet in whole]) == ([digest(INNER)], False)


@pytest.mark.parametrize("ending", [[b"Connection: close"], []], ids=["close", "1.0"])
def test_the_connection_ends_with_a_request_that_says_so(ending):
    whole = request(INNER, *OFFERS["Java"], *ending, version=b"1.1" if ending else b"1.0")
    assert said_to([whole]) == ([digest(INNER)], True)


def test_the_next_requests_are_read_too_and_large_bodies_arrive_whole():
    large = bytes(range(256)) * (PIECE_BYTES // 100)
    bodies = [b"first", large, b"", b"last"]
    content = b"".join(request(body, *OFFERS["Java"]) for body in bodies)
    for pieces in ([content], [content[:100], content[100:]]):
        found, closed = said_to(pieces)
        assert found == [digest(body) for body in bodies] and not closed


@pytest.mark.parametrize("cut", [0, 1])
def test_connect_is_refused_and_nothing_behind_it_is_read(cut):
    """What follows it is no body, and no request either."""
    head = b"CONNECT /taken HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(INNER)
    refused: list[bytes] = []
    pipe = Pipe("", b"")

    async def scene() -> None:
        protocol = factory()()
        protocol.connection_made(pipe)
        pipe.left = head + INNER[: cut * len(INNER)]
        pipe.deliver(protocol)
        await asyncio.sleep(0)
        refused.append(pipe.said)

    asyncio.run(scene())
    assert refused[0].startswith(b"HTTP/1.1 400 ") and refused[0].count(b"HTTP/1.1 ") == 1
    assert pipe.closed


def test_a_body_that_was_lost_on_its_way_is_no_empty_one():
    """Ray's own connections read none of a client that offers an upgrade."""

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def scene() -> None:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"12")]}
        bodies = Bodies(100)
        for _ in range(20):  # and nothing is held of it
            with pytest.raises(RequestError, match="expected a body of 12 bytes, 0 arrived"):
                await bodies.take(Request(scope, receive), 50)
        assert bodies._held == 0

    asyncio.run(scene())


def test_a_server_takes_every_body_of_java_s_client(small, workshop, tmp_path):
    """Every route with a body; also one that comes after its head."""
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    options = ["--adapters-dir", fleet, "--allow-adapter-loading", "--token-file", token]
    x = images(1)
    tensor = {"name": "images", "shape": list(x.shape), "datatype": "FP32"}
    asked = json.dumps({"inputs": [tensor | {"data": x.ravel().tolist()}]}).encode()
    with running_server(small, tmp_path / "log", *options) as server:

        def ask(path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
            status, _, said = server.request("POST", path, body, headers | JAVA)
            return status, said

        def answer() -> tuple[object, object]:
            status, said = ask("/v2/models/birds/infer", asked)
            assert status == 200, said
            found = json.loads(said)
            return found["outputs"][0]["data"], found["parameters"]["adapter_digest"]

        seen = []
        for seed in (1, 2):
            config, tensors = files_of(make_adapter(workshop, seed), tmp_path)
            parameters = {
                "config": config.decode(),
                f"file:{TENSOR_FILE}": base64.b64encode(tensors).decode(),
            }
            upload = json.dumps({"parameters": parameters}).encode()
            path = "/v2/repository/models/birds/load"
            status, said = ask(path, upload, **AUTHORISED)
            assert (status, json.loads(said)["name"]) == (200, "birds")
            assert (fleet / "birds" / CONFIG_FILE).read_bytes() == config
            logits, found = answer()
            assert found == digest(tensors).decode()
            seen.append(logits)
        assert seen[0] != seen[1]

        path = "/v2/repository/models/birds/unload"
        assert ask(path, b'{"parameters": {}}', **AUTHORISED) == (200, b"")
        status, said = ask("/v2/repository/index", b'{"ready": true}')
        assert status == 200 and b"alpha" in said and b"birds" not in said

        host, port = server.http.split(":")
        head, body = request(INNER, *OFFERS["Java"]), INNER
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(head[: -len(body)])
            time.sleep(0.1)  # as a packet of its own
            last = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            connection.sendall(body + last)
            with connection.makefile("rb") as stream:
                assert re.findall(rb"HTTP/1.1 (\d+)", stream.read()) == [b"404", b"200"]
