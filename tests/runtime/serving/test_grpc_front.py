"""gRPC's port: what stands before gRPC's own server, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import hpack
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub as Stub

from hhdeploy.runtime.serving.errors import NotFoundError, StoppingError
from hhdeploy.runtime.serving.grpc import server as module
from hhdeploy.runtime.serving.grpc.front import Front
from hhdeploy.runtime.serving.listening import listen
from tests.runtime.serving.grpc_requests import PATIENCE, message
from tests.runtime.serving.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    block,
    call,
    frame,
    frames,
    greeting,
)
from tests.runtime.serving.test_grpc_server import Endpoint, served, soon
from tests.support import images

pytestmark = pytest.mark.own_process

LIVE = pb.ServerLiveRequest()
LIVE_PATH = b"/inference.GRPCInferenceService/ServerLive"
HEALTH = health_pb2.HealthCheckResponse


class Known(Endpoint):
    """An endpoint of one model, which is ready or not."""

    is_ready = True

    async def ready(self) -> bool:
        return self.is_ready

    async def model_ready(self, model: str, version: str = "") -> bool:
        if model != "tiny":
            raise NotFoundError("unknown model.")
        return self.is_ready


@contextlib.asynccontextmanager
async def connected(server: Any, data: bytes):
    """A connection that begins with some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until_closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await soon(reader.read(1 << 16)):
            pass


def test_a_method_name_that_is_no_text_is_that_call_s_alone():
    attack = greeting() + frame(HEADERS, END_HEADERS, 1, block(call(b"/\xff/\xfe")))
    attack += frame(DATA, END_STREAM, 1, b"\0" * 5)

    async def run() -> None:
        endpoint = Endpoint()
        async with served(endpoint) as (server, stub):
            waiting = stub.ModelInfer(message(images(1)))
            await soon(endpoint.taken.wait())
            for _ in range(3):
                async with connected(server, attack) as (reader, _):
                    await soon(reader.readuntil(b"Method not found!"))
                    assert (await soon(stub.ServerLive(LIVE))).live
            endpoint.gate.set()
            assert (await soon(waiting)).id == "seven"

    asyncio.run(run())


def test_calls_that_come_at_once_are_all_answered():
    """More than gRPC keeps by itself for code that is slower than they come."""
    count = 4000
    attack = greeting() + b"".join(
        frame(HEADERS, END_HEADERS, stream, block(call(LIVE_PATH)))
        + frame(DATA, END_STREAM, stream, b"\0" * 5)
        for stream in range(1, 2 * count, 2)
    )

    async def run() -> None:
        async with (
            served(Endpoint()) as (server, _),
            connected(server, attack) as (reader, _),
        ):
            statuses, decoder, left = Counter(), hpack.Decoder(), b""
            while statuses.total() < count:
                left += await soon(reader.read(1 << 16))
                while len(left) >= (end := 9 + int.from_bytes(left[:3], "big")):
                    ((kind, flags, _, content),) = frames(left[:end])
                    left = left[end:]
                    said = dict(decoder.decode(content)) if kind == HEADERS else {}
                    if kind == RST_STREAM or (flags & END_STREAM and kind == HEADERS):
                        statuses[said.get("grpc-status", "reset")] += 1
            assert statuses == {"0": count}

    asyncio.run(run())


def test_a_connection_that_is_broken_leaves_nothing_and_harms_nobody():
    async def run() -> None:
        async with served(Endpoint()) as (server, stub):
            for data in (b"GET / HTTP/1.0\r\n\r\n", greeting() + frame(HEADERS, 4, 1, b"\xfe")):
                async with connected(server, data) as (reader, _):
                    await until_closed(reader)
            assert (await soon(stub.ServerLive(LIVE))).live
            while len(server._front._clients) != 1:  # the stub's
                await asyncio.sleep(0.01)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def front_before(folder: Path, said: bytes):
    """A front before a server that, once it is told to, says this to everybody and closes."""
    go, gone = asyncio.Event(), asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(said)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()
        gone.set()

    front = Front(folder / "socket", [].append)
    inner = await asyncio.start_unix_server(speak, front.inner)
    await front.listen(listen("127.0.0.1", 0, "grpc_port", 9), None)
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    while not front._clients or next(iter(front._clients)).other is None:
        await asyncio.sleep(0)
    front.close()
    try:
        yield front, reader, writer, go, gone
    finally:
        writer.close()
        front.abort()
        inner.close()


SAID = bytes(range(251)) * 100_000  # more than all buffers on the way hold


def test_what_was_said_at_last_arrives(tmp_path):
    async def run() -> None:
        async with front_before(tmp_path, SAID) as (front, reader, _, go, _):
            go.set()

            async def end() -> None:
                await front.drain(PATIENCE)
                front.abort()

            ending = asyncio.create_task(end())
            await asyncio.sleep(0.01)
            assert await soon(reader.read()) == SAID
            await soon(ending)

    asyncio.run(run())


def test_a_client_that_talks_to_a_server_that_closed_gets_its_answer(tmp_path):
    """What arrived before what the client said could not be delivered."""

    async def run() -> None:
        async with front_before(tmp_path, SAID[:1009]) as (front, reader, writer, go, gone):
            (client,) = front._clients
            client.other.transport.pause_reading()  # a busy machine
            go.set()
            await soon(gone.wait())
            await asyncio.sleep(0.01)
            writer.write(greeting())
            assert await soon(reader.read()) == SAID[:1009]

    asyncio.run(run())


def test_who_takes_no_answer_is_waited_for_for_a_while(tmp_path):
    async def run() -> None:
        async with front_before(tmp_path, SAID) as (front, reader, _, go, _):
            go.set()
            await soon(front.drain(0.05))
            assert front._clients
            front.abort()
            await soon(front.drain(PATIENCE))
            with contextlib.suppress(ConnectionError):
                assert len(await soon(reader.read())) < len(SAID)

    asyncio.run(run())


def test_connections_are_counted():
    async def run() -> None:
        async with served(Endpoint(connections=3)) as (server, stub):
            await soon(stub.ServerLive(LIVE))
            async with connected(server, greeting()) as (first, _):
                assert await soon(first.read(1))
                async with connected(server, greeting()) as (second, _):
                    assert await soon(second.read(1))
                    async with connected(server, greeting()) as (third, _):
                        await until_closed(third)
                    assert (await soon(stub.ServerLive(LIVE))).live
            while len(server._front._clients) > 1:
                await asyncio.sleep(0.01)
            async with connected(server, greeting()) as (another, _):
                assert await soon(another.read(1))

    asyncio.run(run())


def test_large_messages_pass_both_ways():
    async def run() -> None:
        endpoint = Endpoint()
        endpoint.gate.set()
        async with served(endpoint) as (server, _):
            options = [("grpc.max_receive_message_length", 32 << 20)]
            address = f"127.0.0.1:{server.port}"
            async with grpc.aio.insecure_channel(address, options) as channel:
                x = images(1, seed=3).repeat(397, 0)
                found = await soon(Stub(channel).ModelInfer(message(x)))
        assert found.raw_output_contents[0] == x.tobytes()

    asyncio.run(run())


def test_a_server_that_ended_by_itself_is_followed_by_another(caplog):
    class Ended:
        async def wait_for_termination(self, seconds: float) -> None:
            raise RuntimeError("planted")

        async def stop(self, grace: float) -> None:
            pass

    async def run() -> None:
        async with served(Endpoint()) as (server, _):
            await server._servers[0].stop(0)
            server._servers.append(Ended())
            while len(server._servers) < 3:
                await asyncio.sleep(0.01)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                answer = await soon(Stub(channel).ServerLive(LIVE, wait_for_ready=True))
            assert answer.live

    asyncio.run(run())
    assert "starting again" in caplog.text


def test_another_server_is_tried_until_it_starts(monkeypatch, caplog):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)

    async def run() -> None:
        async with served(Endpoint()) as (server, _):
            path, ended = server._front.inner, server._servers[0]
            await ended.stop(0)
            server._front.inner = path.parent / "gone" / "socket"
            monkeypatch.setattr(ended, "wait_for_termination", raises)
            while caplog.text.count("does not start again yet") < 2:
                await asyncio.sleep(0.01)
            assert server._servers == [ended]
            server._front.inner = path
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                answer = await soon(Stub(channel).ServerLive(LIVE, wait_for_ready=True))
            assert answer.live

    async def raises(seconds: float) -> None:
        raise RuntimeError("planted")

    asyncio.run(run())


def test_clients_may_ping_while_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(module, "_PING_SECONDS", 0)

    async def run() -> None:
        async with (
            served(Endpoint()) as (server, _),
            connected(server, greeting()) as (reader, writer),
        ):
            for i in range(7):
                writer.write(frame(PING, 0, 0, bytes([i]) * 8))
                await soon(reader.readuntil(bytes([i]) * 8))

    asyncio.run(run())


def test_a_client_that_is_gone_keeps_nothing(monkeypatch):
    """Its machine or network is away: it takes no leave, and answers no ping."""
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.1)

    async def run() -> None:
        async with (
            served(Endpoint()) as (server, _),
            connected(server, greeting()) as (reader, _),
        ):
            assert b"ping_timeout" in await soon(reader.read())

    asyncio.run(run())


def test_health_as_probes_ask_for_it():
    async def run() -> None:
        endpoint = Known()
        async with (
            served(endpoint) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)

            async def state(service: str) -> Any:
                request = health_pb2.HealthCheckRequest(service=service)
                return (await soon(stub.Check(request))).status

            for service in ("", "inference.GRPCInferenceService", "tiny"):
                endpoint.is_ready = True
                assert await state(service) == HEALTH.SERVING
                endpoint.is_ready = False
                assert await state(service) == HEALTH.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                await state("other")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(run())


def test_the_health_of_a_model_is_told_to_who_may_ask():
    """Whether there is a model of some name is not told to strangers."""
    token = "a-token-of-a-client"

    async def run() -> None:
        endpoint = Known()
        async with (
            served(endpoint, inference=[token]) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("tiny", "other"):
                request = health_pb2.HealthCheckRequest(service=service)
                for call in (stub.Check(request), stub.Watch(request).read()):
                    with pytest.raises(grpc.RpcError) as caught:
                        await soon(call)
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert len(endpoint.refusals) == 4
            mine = (("authorization", f"Bearer {token}"),)
            for service, metadata in (("", ()), ("tiny", mine)):
                request = health_pb2.HealthCheckRequest(service=service)
                answer = await soon(stub.Check(request, metadata=metadata))
                assert answer.status == HEALTH.SERVING

    asyncio.run(run())


@pytest.mark.parametrize("trouble", ["no replica answers", "nobody answers"])
def test_a_model_that_cannot_be_asked_now_is_not_unknown(trouble):
    class Away(Known):
        async def model_ready(self, model: str, version: str = "") -> bool:
            if trouble == "no replica answers":
                raise StoppingError(trouble)
            return await asyncio.Event().wait()

    async def run() -> None:
        async with (
            served(Away(request_seconds=0.05)) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            request = health_pb2.HealthCheckRequest(service="tiny")
            answer = await soon(health_pb2_grpc.HealthStub(channel).Check(request))
            assert answer.status == HEALTH.NOT_SERVING

    asyncio.run(run())


def test_who_watches_health_is_told_and_let_go(monkeypatch):
    async def run() -> None:
        endpoint = Known()
        async with (
            served(endpoint) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await soon(watch.read())).status == HEALTH.SERVING
            await soon(server.stop(600))
            assert (await soon(watch.read())).status == HEALTH.NOT_SERVING
            assert await soon(watch.read()) is grpc.aio.EOF

    asyncio.run(run())


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_the_service_and_ends_with_the_server(version):
    async def run() -> None:
        async with (
            served(Known()) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stream = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )()
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await soon(stream.read())).list_services_response.service
            assert [s.name for s in listed] == [
                "grpc.health.v1.Health", "inference.GRPCInferenceService",
            ]  # fmt: skip
            symbol = reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="inference.GRPCInferenceService"
            )
            await stream.write(symbol)
            described = (await soon(stream.read())).file_descriptor_response
            assert b"ModelStreamInfer" in b"".join(described.file_descriptor_proto)
            await soon(server.stop(600))

    asyncio.run(run())


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
@pytest.mark.parametrize("host", ["::", "localhost"])
def test_both_versions_of_ip_reach_both_wires(host):
    async def run() -> None:
        async with served(Endpoint(host=host)) as (server, _):
            for address in ("127.0.0.1", "[::1]"):
                async with grpc.aio.insecure_channel(f"{address}:{server.port}") as channel:
                    assert (await soon(Stub(channel).ServerLive(LIVE))).live

    asyncio.run(run())
