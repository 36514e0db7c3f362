"""The gRPC side on its own: errors, deadlines, cancellation, limits, shutdown, addresses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub as Stub

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.errors import AdapterError, DeviceError, HhdeployError
from hhdeploy.runtime.serving import errors
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.grpc import server as module
from hhdeploy.runtime.serving.grpc.server import start_grpc
from hhdeploy.runtime.serving.messages import InferRequest, InferResponse
from hhdeploy.runtime.serving.server import Addresses, serve
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.grpc_requests import INFER, PATIENCE, message
from tests.runtime.serving.http2 import END_HEADERS, HEADERS, PING, block, call, frame, greeting
from tests.runtime.serving.servers import TOKEN, signal_own_server
from tests.support import images
from tests.workshop import COMMAND_SECONDS, ROOT

# A run of the suite once ended in a segmentation fault here, whose cause is not known.
pytestmark = pytest.mark.own_process

HEALTH = "/grpc.health.v1.Health/"


class Endpoint:
    """An endpoint whose answers wait for `gate`, and that notes what happens to requests."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ServeSettings(Path("tiny"), **settings)
        self.taken, self.gate, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None
        self.loaded: list[str] = []
        self.refusals: list[HhdeployError] = []
        self.most_json = 1 << 20

    async def infer(self, request: InferRequest) -> InferResponse:
        self.taken.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        if self.failure is not None:
            raise self.failure
        return InferResponse(request.model, request.id, (request.inputs["images"],))

    def refused(self, error: HhdeployError) -> None:
        self.refusals.append(error)

    async def load_adapter(self, name: str, upload: object) -> dict[str, Any]:
        self.loaded.append(name)
        return {"name": name, "verified": False, "notes": []}


@contextlib.asynccontextmanager
async def served(endpoint: Endpoint, token: str | None = None, inference: Sequence[str] = ()):
    """A server of ``endpoint``, and a stub that is connected to it."""
    access, host = Access(token, inference), endpoint.settings.host
    server = await start_grpc(endpoint, 0, access)
    address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield server, Stub(channel)
    finally:
        await server.stop(0)


async def soon(awaitable: Any) -> Any:
    """Not a measurement: a test that would hang fails instead."""
    return await asyncio.wait_for(awaitable, PATIENCE)


async def failing(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        await soon(call)
    return caught.value.code().name, caught.value.details()


async def refused(stub: Any) -> None:
    """Until new calls are UNAVAILABLE.

    One at the very moment of the stop is CANCELLED by gRPC or, on a busy machine, forgotten.
    """
    while True:
        try:
            await stub.ServerLive(pb.ServerLiveRequest(), timeout=1)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return
        await asyncio.sleep(0.01)


KINDS = [
    errors.RequestError,
    *errors.RequestError.__subclasses__(),
    *errors.FailedError.__subclasses__(),
]


def test_every_kind_of_error_has_its_code():
    async def run() -> None:
        endpoint = Endpoint()
        endpoint.gate.set()
        async with served(endpoint) as (_, stub):
            for kind in KINDS:
                endpoint.failure = kind("what is wrong, with ü and \ud800")
                code, said = await failing(stub.ModelInfer(message(images(1))))
                assert code == kind.code
                assert said == "what is wrong, with \\xfc and \\ud800"
            endpoint.failure = AdapterError("x" * 100_000)
            code, said = await failing(stub.ModelInfer(message(images(1))))
            assert code == "INVALID_ARGUMENT"
            assert said == "x" * 3997 + "..."

    asyncio.run(run())


def test_without_a_directory_for_temporary_files(monkeypatch):
    """As in a container of which all is read only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    with pytest.raises(DeviceError, match=r"No usable temporary.* set TMPDIR .*`grpc_port=-1`"):
        asyncio.run(start_grpc(Endpoint(), 0, Access()))


_KILLED = """
import asyncio, os, signal
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.grpc.server import start_grpc
from tests.runtime.serving.test_grpc_server import Endpoint

async def run():
    await start_grpc(Endpoint(), 0, Access())
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run())
"""


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        server = await start_grpc(Endpoint(), 0, Access())
        assert len([*tmp_path.iterdir()]) == 1 and not left.exists()
        await server.stop(0)

    asyncio.run(run())
    assert not [*tmp_path.iterdir()]


def test_a_bug_is_logged_and_not_told(caplog):
    async def run() -> None:
        endpoint = Endpoint()
        endpoint.gate.set()
        endpoint.failure = ZeroDivisionError("a secret")
        async with served(endpoint) as (_, stub):
            code, said = await failing(stub.ModelInfer(message(images(1))))
            assert code == "INTERNAL" and "secret" not in said
            async for answer in stub.ModelStreamInfer(iter([message(images(1))])):
                assert answer.error_message == said

    asyncio.run(run())
    logged = [r for r in caplog.records if r.message == "request failed"]
    assert ["a secret" in str(r.exc_info[1]) for r in logged] == [True, True]


def test_the_clients_deadline_ends_the_work():
    async def run() -> None:
        endpoint = Endpoint()
        async with served(endpoint) as (_, stub):
            call = stub.ModelInfer(message(images(1)), timeout=0.3)
            assert (await failing(call))[0] == "DEADLINE_EXCEEDED"
            if endpoint.taken.is_set():  # on a very slow machine it never came that far
                await soon(endpoint.gone.wait())

    asyncio.run(run())


def test_the_servers_limit_ends_the_work():
    async def run() -> None:
        endpoint = Endpoint(request_seconds=0.05)
        async with served(endpoint) as (_, stub):
            code, said = await failing(stub.ModelInfer(message(images(1))))
            assert code == "DEADLINE_EXCEEDED" and "within 0.05 s" in said
            await soon(endpoint.gone.wait())
            (answer,) = [a async for a in stub.ModelStreamInfer(iter([message(images(1))]))]
            assert "within 0.05 s" in answer.error_message

    asyncio.run(run())


@pytest.mark.parametrize("method", [INFER, f"{HEALTH}Check", f"{HEALTH}Watch"])
def test_a_call_whose_message_does_not_come_ends(method):
    """gRPC waits for it as long as the client likes, and nobody else would find a place."""

    async def run() -> None:
        endpoint = Endpoint(request_seconds=0.05)
        async with (
            served(endpoint) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            for sent in (nothing(), iter([])):
                code, said = await failing(channel.stream_unary(method)(sent))
                assert code == "DEADLINE_EXCEEDED" and "within 0.05 s" in said
            assert list(map(errors.refusal_kind, endpoint.refusals)) == ["timed_out"] * 2

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    asyncio.run(run())


def test_every_call_that_is_refused_is_counted():
    """Also what gRPC refuses before any code of ours, and what is no method of the protocol."""
    one = message(images(1)).SerializeToString()
    vast, bomb = bytes(20_001), bytes(9 << 20)
    infer = "/inference.GRPCInferenceService/ModelInfer"
    stream = "/inference.GRPCInferenceService/ModelStreamInfer"
    shared = "/inference.GRPCInferenceService/SystemSharedMemoryStatus"
    reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    gzip = grpc.Compression.Gzip
    kinds = [
        (infer + "s", one, None, "UNIMPLEMENTED", "not_served"),
        ("/nobody/knows", one, None, "UNIMPLEMENTED", "not_served"),
        (shared, b"", None, "UNIMPLEMENTED", "not_served"),
        (infer, vast, None, "RESOURCE_EXHAUSTED", "too_large"),
        (stream, vast, None, "RESOURCE_EXHAUSTED", "too_large"),
        (infer, bomb, gzip, "RESOURCE_EXHAUSTED", "too_large"),
        (infer, b"\xff", None, "INVALID_ARGUMENT", "request"),
        (HEALTH + "Check", b"\x0a\6nobody", None, "NOT_FOUND", "not_found"),
        (HEALTH + "Check", b"\xff", None, "INVALID_ARGUMENT", "request"),
        (HEALTH + "Watch", b"\xff", None, "INVALID_ARGUMENT", "request"),
        (HEALTH + "Nothing", b"", None, "UNIMPLEMENTED", "not_served"),
        (reflection, b"\xff", None, "INVALID_ARGUMENT", "request"),
    ]

    async def run() -> None:
        endpoint = Endpoint(body_bytes=20_000)
        endpoint.model_ready = unknown
        async with (
            served(endpoint) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            for method, raw, compression, code, kind in kinds:
                call = channel.stream_unary(method)(iter([raw]), compression=compression)
                assert (await failing(call))[0] == code, (method, raw[:9])
                assert list(map(errors.refusal_kind, endpoint.refusals)) == [kind], method
                endpoint.refusals.clear()

    async def unknown(name: str) -> bool:
        raise errors.NotFoundError(f"no model {name}")

    asyncio.run(run())


def test_much_typed_and_messages_of_many_fields():
    """The one is answered as any other, the other refused and counted."""
    much, many = message(images(16)), message(images(1))
    values = images(16).ravel().tolist()
    del much.raw_input_contents[:]
    much.inputs[0].contents.fp32_contents.extend(values)
    for _ in range(1 << 14):
        many.outputs.add()

    async def run() -> None:
        endpoint = Endpoint()
        endpoint.gate.set()
        async with served(endpoint) as (_, stub):
            assert (await soon(stub.ModelInfer(much))).id == "seven"
            (answer,) = [a async for a in stub.ModelStreamInfer(iter([much]))]
            assert answer.infer_response.id == "seven"
            assert (await failing(stub.ModelInfer(many)))[0] == "INVALID_ARGUMENT"
            endpoint.most_json = 1 << 16
            code, said = await failing(stub.ModelInfer(much))
            assert code == "INVALID_ARGUMENT" and "at most 65536 are taken" in said
            assert len(endpoint.refusals) == 2

    asyncio.run(run())


def test_a_stream_goes_on_after_a_message_that_cannot_be_read():
    """Each gets its own answer, with its id where it can be found."""
    good = message(images(1)).SerializeToString()
    many = good + b"\x32\0" * (1 << 14)
    cases = {
        good: ("seven", ""),
        many: ("seven", "has more than 16384 fields"),
        b"\xff": ("", "no message inference.ModelInferRequest"),
        b"\x1a\2\xff\xfe" + many: ("", "has more than"),
        b"\x1a\1x" + bytes(100_000): ("x", "the request is 100003 bytes, at most 90000"),
    }

    async def run() -> None:
        # A load may be longer: else gRPC itself ends the stream.
        loads = {"allow_adapter_loading": True, "token_file": Path("token")}
        endpoint = Endpoint(body_bytes=90_000, **loads)
        endpoint.gate.set()
        async with (
            served(endpoint, inference=["a-token-of-one-client"]) as (server, _),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            method = channel.stream_stream(
                INFER.replace("ModelInfer", "ModelStreamInfer"),
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )
            metadata = (("authorization", "Bearer a-token-of-one-client"),)
            answers = [a async for a in method(iter([*cases, good]), metadata=metadata)]
            for answer, (name, said) in zip(answers, [*cases.values(), ("seven", "")], strict=True):
                assert answer.infer_response.id == name
                assert said in answer.error_message and bool(said) == bool(answer.error_message)
            kinds = [errors.refusal_kind(each) for each in endpoint.refusals]
            assert kinds == ["request"] * 3 + ["too_large"]
            code, _ = await failing(anext(aiter(method(iter([many])))))
            assert code == "UNAUTHENTICATED"

    asyncio.run(run())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_ends_the_work(streamed):
    async def run() -> None:
        endpoint = Endpoint()
        async with served(endpoint) as (_, stub):
            if streamed:
                call = stub.ModelStreamInfer(iter([message(images(1))]))
            else:
                call = stub.ModelInfer(message(images(1)))
            await soon(endpoint.taken.wait())
            assert not endpoint.gone.is_set()
            call.cancel()
            await soon(endpoint.gone.wait())

    asyncio.run(run())


def test_calls_are_counted():
    async def run() -> None:
        endpoint = Endpoint(connections=2)
        async with served(endpoint) as (_, stub):
            taken = []
            for _ in range(2):
                endpoint.taken.clear()
                taken.append(stub.ModelInfer(message(images(1))))
                await soon(endpoint.taken.wait())
            code, _ = await failing(stub.ServerLive(pb.ServerLiveRequest()))
            assert code == "RESOURCE_EXHAUSTED"
            assert [errors.refusal_kind(each) for each in endpoint.refusals] == ["busy"]
            endpoint.gate.set()
            for call in taken:
                assert (await soon(call)).id == "seven"

    asyncio.run(run())


@pytest.mark.parametrize("wait", [0, 0.5])
def test_stopping_answers_what_was_taken(monkeypatch, wait):
    """However long that takes, within the grace."""
    monkeypatch.setattr(module, "_LOST_SECONDS", 0.1)

    async def run() -> None:
        endpoint = Endpoint()
        async with served(endpoint) as (server, stub):
            call = stub.ModelInfer(message(images(1)))
            await soon(endpoint.taken.wait())
            idle = stub.ModelStreamInfer()
            endpoint.taken.clear()
            await idle.write(message(images(1)))
            await soon(endpoint.taken.wait())
            stopping = asyncio.create_task(server.stop(10 * PATIENCE))
            await soon(refused(stub))
            await asyncio.sleep(wait)
            assert not stopping.done()
            endpoint.gate.set()
            assert (await soon(call)).id == "seven"
            # The stream is answered too, then told to end though the client keeps it open.
            assert (await soon(idle.read())).infer_response.id == "seven"
            assert await soon(idle.code()) is grpc.StatusCode.UNAVAILABLE
            await soon(stopping)

    asyncio.run(run())


def test_stopping_does_not_wait_for_what_never_comes(monkeypatch):
    """A call whose message is not sent, as one that gRPC has forgotten."""
    monkeypatch.setattr(module, "_LOST_SECONDS", 0.1)

    async def run() -> None:
        async with served(Endpoint()) as (server, stub):
            assert (await soon(stub.ServerLive(pb.ServerLiveRequest()))).live
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(greeting() + frame(HEADERS, END_HEADERS, 1, block(call(INFER.encode()))))
            writer.write(frame(PING, 0, 0, b"12345678"))
            await soon(reader.readuntil(b"12345678"))  # the call has arrived
            await soon(server.stop(10 * PATIENCE))
            writer.close()

    asyncio.run(run())


def test_stopping_again_waits_no_longer():
    async def run() -> None:
        endpoint = Endpoint()
        async with served(endpoint) as (server, stub):
            call = stub.ModelInfer(message(images(1)))
            await soon(endpoint.taken.wait())
            stopping = asyncio.create_task(server.stop(10 * PATIENCE))
            await soon(server.stop(0))
            await soon(stopping)
            await soon(endpoint.gone.wait())
            assert (await failing(call))[0] in ("CANCELLED", "UNAVAILABLE")

    asyncio.run(run())


def test_requests_are_held_to_their_limit_where_loads_may_be_longer():

    def load(count: int) -> pb.RepositoryModelLoadRequest:
        request = pb.RepositoryModelLoadRequest(model_name="new")
        request.parameters["config"].string_param = "{}"
        request.parameters[f"file:{TENSOR_FILE}"].bytes_param = b"0" * count
        return request

    async def run() -> None:
        endpoint = Endpoint(
            body_bytes=20_000,
            adapter_bytes=60_000,
            allow_adapter_loading=True,
            token_file=Path("token"),
        )
        endpoint.gate.set()
        headers = (("authorization", f"Bearer {TOKEN}"),)
        async with served(endpoint, TOKEN) as (_, stub):
            code, said = await failing(stub.ModelInfer(message(images(2))))
            assert code == "INVALID_ARGUMENT" and "at most 20000" in said
            assert (await soon(stub.ModelInfer(message(images(1))))).id == "seven"
            await soon(stub.RepositoryModelLoad(load(50_000), metadata=headers))
            code, _ = await failing(stub.RepositoryModelLoad(load(60_000), metadata=headers))
            assert code == "INVALID_ARGUMENT"
            code, _ = await failing(stub.RepositoryModelLoad(load(2 << 20), metadata=headers))
            assert code == "RESOURCE_EXHAUSTED"
            assert endpoint.loaded == ["new"]

    asyncio.run(run())


def test_a_port_that_is_taken():
    async def run() -> None:
        async with served(Endpoint()) as (server, _):
            with pytest.raises(DeviceError, match="`grpc_port`"):
                await start_grpc(Endpoint(), server.port, Access())

    asyncio.run(run())


def test_ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")

    async def run() -> None:
        async with served(Endpoint(host="::1")) as (_, stub):
            assert (await soon(stub.ServerLive(pb.ServerLiveRequest()))).live

    asyncio.run(run())


@pytest.fixture
def _signals() -> Iterator[None]:
    """A server in this process leaves the signals' handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_http_and_grpc_drain_at_the_same_time(branches):
    """A signal stops both at once, and both answer what they took."""

    async def run() -> None:
        settings = ServeSettings(Path("tiny"))
        service = Service(open_session(branches, device="cpu", threads=1, partial=True), settings)
        gate, taken, infer = asyncio.Event(), asyncio.Semaphore(0), service.infer

        async def gated(request: InferRequest) -> InferResponse:
            taken.release()
            await gate.wait()
            return await infer(request)

        service.infer = gated
        where: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve(service, access=Access(), http_port=0, grpc_port=0, announce=where.set_result)
        )
        addresses = await soon(where)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{addresses.grpc_port}") as channel:
            call = Stub(channel).ModelInfer(message(images(1)))
            reader, writer = await asyncio.open_connection("127.0.0.1", addresses.http_port)
            body = b'{"inputs":[{"name":"images","datatype":"FP32","shape":[1,3,32,32],"data":['
            body += b",".join([b"0.5"] * (3 * 32 * 32)) + b"]}]}"
            head = (
                "POST /v2/models/alpha/infer HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            )
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await soon(taken.acquire())
            await soon(taken.acquire())
            signal_own_server(serving)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{addresses.grpc_port}") as other:
                # Refused while HTTP still has a request under way.
                await soon(refused(Stub(other)))
            assert not serving.done()
            gate.set()
            assert (await soon(call)).id == "seven"
            assert (await soon(reader.read())).startswith(b"HTTP/1.1 200")
            writer.close()
            await soon(serving)

    asyncio.run(run())
