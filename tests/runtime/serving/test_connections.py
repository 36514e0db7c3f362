"""How the server's sockets are set up, and whom they let in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import ssl
import time
import urllib.request
from pathlib import Path

import pytest

from hhdeploy.runtime.serving import server as server_module
from hhdeploy.runtime.serving.listening import let_open, listen
from tests.runtime.serving.certificates import make_certificate
from tests.runtime.serving.fleets import PATIENCE
from tests.runtime.serving.servers import running_server


def test_an_answer_s_body_does_not_wait_for_its_head_to_be_acknowledged():
    with listen("127.0.0.1", 0, "http_port", 1)[0] as listening:
        address = listening.getsockname()
        with socket.create_connection(address), contextlib.closing(listening.accept()[0]) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_who_closes_a_connection_leaves_its_place():
    with contextlib.ExitStack() as stack:
        (listening,) = listen("127.0.0.1", 0, "http_port", 3)
        stack.enter_context(listening)
        address = listening.getsockname()

        def connect() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.create_connection(address, PATIENCE))
            return client, stack.enter_context(listening.accept()[0])

        pairs = [connect() for _ in range(3)]
        for _ in range(2):
            with socket.create_connection(address, PATIENCE) as client:
                with pytest.raises(ConnectionAbortedError):
                    listening.accept()
                assert client.recv(1) == b""
            pairs[1][1].close()
            pairs[1][1].close()  # leaves one place all the same
            pairs[1] = connect()


@pytest.mark.parametrize(
    ("soft", "hard", "then", "refused"),
    [
        (1024, 1 << 20, 4608, False),
        (1024, resource.RLIM_INFINITY, 4608, False),
        (1024, 2048, 2048, False),
        (1024, resource.RLIM_INFINITY, 1024, True),
        (1 << 19, 1 << 20, 1 << 19, False),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY, False),
    ],
    ids=["as many", "endless", "too few", "refused", "enough", "any number"],
)
def test_as_many_files_may_be_open_as_connections_need(
    monkeypatch, caplog, soft, hard, then, refused
):
    """Beyond, whoever comes waits and is told nothing: that is said before."""
    limits = [(soft, hard)]

    def change(kind: int, new: tuple[int, int]) -> None:
        if refused:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(new)

    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", change)
    let_open(4096)
    assert limits[-1] == (then, hard)
    said = [(r.levelname, r.open_files, r.needed) for r in caplog.records]
    enough = then == resource.RLIM_INFINITY or then >= 4608
    assert said == ([] if enough else [("WARNING", then, 4608)])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_system_that_is_out_of_files_is_asked_once_and_later_again(monkeypatch, caplog, number):
    """asyncio asks as often as the backlog is long, and whoever is connected waits for it."""
    accept, asked = socket.socket.accept, []

    def refuse(self: socket.socket) -> object:
        asked.append(self)
        raise OSError(number, "out of it")

    async def scene() -> bytes:
        loop = asyncio.get_running_loop()
        (listening,) = listen("127.0.0.1", 0, "http_port", 3)
        address = listening.getsockname()
        server = await loop.create_server(Greeter, sock=listening, backlog=500)
        async with server:
            monkeypatch.setattr(socket.socket, "accept", refuse)
            reader, writer = await asyncio.open_connection(*address)
            while not asked:
                await asyncio.sleep(0.001)
            assert len(asked) == 1
            monkeypatch.setattr(socket.socket, "accept", accept)
            found = await reader.read()
            writer.close()
        return found

    assert asyncio.run(asyncio.wait_for(scene(), PATIENCE)) == b"hello"
    assert len(caplog.records) == 1


class Greeter(asyncio.Protocol):
    """Says a word to who is let in, and leaves."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"hello")
        transport.close()


def test_who_shakes_hands_has_a_place(small: Path, tmp_path: Path):
    """On both wires: a client that says nothing and is waited for, for a minute."""
    cert, key = make_certificate(tmp_path)
    flags = ["--tls-cert", cert, "--tls-key", key, "--connections", 5]
    with (
        running_server(small, tmp_path / "log", *flags) as server,
        contextlib.ExitStack() as stack,
    ):
        for address, most in ((server.http, 5 + server_module._TURNED_AWAY), (server.grpc, 5)):
            host, port = address.split(":")
            silent = [socket.create_connection((host, int(port)), PATIENCE) for _ in range(most)]
            for each in silent:
                stack.enter_context(each)
            with socket.create_connection((host, int(port)), PATIENCE) as another:
                assert _closed(another)
            silent[0].setblocking(False)
            with pytest.raises(BlockingIOError):
                silent[0].recv(1)
        stack.close()
        context = ssl.create_default_context(cafile=str(cert))
        url, limit = f"https://{server.http}/v2/health/ready", time.monotonic() + PATIENCE
        while True:  # until the server saw that they left
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(url, timeout=PATIENCE, context=context) as answer:
                    assert answer.status == 200
                break
            assert time.monotonic() < limit


def _closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
