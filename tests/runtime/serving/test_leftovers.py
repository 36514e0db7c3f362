"""What is refused, fails, is cancelled or late is free at once, without the garbage collector.

A cycle of task, exception, traceback and frames would keep a request's bytes until a full
collection, which a server with a large heap makes seldom.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import platform
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.grpc.leaving import Leaving
from hhdeploy.runtime.serving.grpc.server import method_handlers
from hhdeploy.runtime.serving.grpc.servicer import Servicer
from hhdeploy.runtime.serving.http.app import http_app
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.leftovers import SIZE, growth, post


class Gated:
    """A session whose runs wait while the gate is closed, and fail where they are told to."""

    def __init__(self, bundle: Path) -> None:
        self.session = open_session(bundle, device="cpu", threads=1)
        run = self.session.unchecked()
        self.open, self.failing = threading.Event(), False
        self.open.set()

        def gated(images: Any, rows: Any) -> Any:
            self.open.wait(60)
            if self.failing:
                raise RuntimeError("out of memory")
            return run(images, rows)

        self.session.unchecked = lambda: gated


@contextlib.asynccontextmanager
async def started(bundle: Path, **settings: Any):
    gate = Gated(bundle)
    service = Service(gate.session, ServeSettings(Path("tiny"), **settings))
    await service.start()
    service.gate = gate
    try:
        yield service
    finally:
        gate.open.set()
        await service.stop()


def json_body(images: int = 1, **parameters: Any) -> bytes:
    """Some megabytes; of so many images, all their values, or a wrong shape for 0 of them."""
    shape = [images or 7, 3, 32, 32]
    tensor = {"name": "images", "datatype": "FP32", "shape": shape}
    values = [0.5] * (images * 3072 or 4096)
    note = "x" * SIZE
    return json.dumps(
        {"inputs": [{**tensor, "data": values}], "parameters": {"note": note, **parameters}}
    ).encode()


def picture_body(picture: bytes) -> bytes:
    head = json.dumps({
        "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1],
                    "parameters": {"binary_data_size": len(picture) + 4}}],
    }).encode()  # fmt: skip
    return head + len(picture).to_bytes(4, "little") + picture


@pytest.fixture(autouse=True)
def _nothing_logged(caplog):
    """A record of pytest's would keep what an error was raised in."""
    caplog.set_level(logging.CRITICAL, "hhdeploy.serve")


INFER = "/v2/models/alpha/infer"
GOOD = json_body()
BROKEN = b"\x89PNG\r\n\x1a\n" + bytes(SIZE)
HTTP: dict[str, tuple[int, str, bytes, dict[str, str]]] = {
    "wrong shape": (400, INFER, json_body(0), {}),
    "no JSON": (400, INFER, GOOD[:-1], {}),
    "unknown model": (404, "/v2/models/nobody/infer", GOOD, {}),
    "unknown output": (400, INFER, GOOD[:-1] + b',"outputs":[{"name":"x"}]}', {}),
    "unknown adapter": (404, "/v2/models/tiny/infer", json_body(adapter="nobody"), {}),
    "too many images": (400, INFER, json_body(33), {}),
    "gzip": (400, INFER, gzip.compress(json_body(0), 1), {"content-encoding": "gzip"}),
    "bomb": (413, INFER, gzip.compress(bytes(80 << 20), 1), {"content-encoding": "gzip"}),
    "broken picture": (400, INFER, picture_body(BROKEN), {}),
    "late": (504, INFER, json_body(timeout=1), {}),
    "repository": (403, "/v2/repository/models/alpha/load", GOOD, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusing(small: Path) -> Iterator[tuple[asyncio.AbstractEventLoop, Any]]:
    """An application, and the loop that it runs on: one process reads the JSON of all tests."""
    loop, stack = asyncio.new_event_loop(), AsyncExitStack()

    async def start() -> Any:
        service = await stack.enter_async_context(started(small))
        app = http_app(LocalEndpoint(service), Access())
        await stack.enter_async_context(app.router.lifespan_context(app))
        return app

    with contextlib.closing(loop):
        yield loop, loop.run_until_complete(start())
        loop.run_until_complete(stack.aclose())


@pytest.mark.parametrize("kind", HTTP)
def test_an_http_request_that_is_refused(refusing, kind):
    status, path, body, headers = HTTP[kind]
    if kind == "broken picture":
        length = body.index(BROKEN) - 4
        headers = {"inference-header-content-length": str(length)}

    loop, app = refusing

    async def once() -> None:
        # A copy, as what came over a network would be.
        assert await post(app, path, bytes(bytearray(body)), **headers) == status

    assert loop.run_until_complete(growth(once)) < SIZE


@pytest.mark.parametrize("kind", ["busy", "bodies", "session", "left", "deadline"])
def test_an_http_request_that_meets_a_server_in_trouble(small, kind):
    expected = {"busy": 429, "bodies": 429, "session": 500, "left": 499, "deadline": 504}[kind]
    settings = {
        "busy": {"max_queue": 1},
        "bodies": {"bodies_bytes": SIZE // 2},
        "deadline": {"request_seconds": 0.1},
    }.get(kind, {})

    async def scene() -> int:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(started(small, **settings))
            app = http_app(LocalEndpoint(service), Access())
            await stack.enter_async_context(app.router.lifespan_context(app))
            waiting = []
            if kind == "session":
                service.gate.failing = True
            if kind in ("busy", "left", "deadline"):
                service.gate.open.clear()
            if kind == "busy":
                body = json_body()
                waiting = [asyncio.create_task(post(app, INFER, body)) for _ in range(2)]
                while service.now().queued < 1 and not any(task.done() for task in waiting):
                    await asyncio.sleep(0.01)

            async def once() -> None:
                body = bytes(bytearray(GOOD))
                assert await post(app, INFER, body, leave=kind == "left") == expected

            if kind in ("left", "deadline"):
                # The first one is in a batch, which goes on without its client.
                await once()
            grown = await growth(once)
            service.gate.open.set()
            await asyncio.gather(*waiting)
            return grown

    assert asyncio.run(scene()) < SIZE


class Context:
    """A call's."""

    def __init__(self, seconds: float | None = None) -> None:
        self.code, self.details, self._seconds = None, "", seconds

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        pass

    def time_remaining(self) -> float | None:
        return self._seconds

    def set_code(self, code: Any) -> None:
        self.code = code.name

    def set_details(self, details: str) -> None:
        self.details = details


class Messages:
    """Of a call, as gRPC gives them: in a cycle of this and its generator, which has the last."""

    def __init__(self, content: bytes) -> None:
        self._found = self._all([content])

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._found

    async def _all(self, left: list[bytes]) -> AsyncIterator[bytes]:
        while left:
            content = left.pop()
            yield content


def grpc_message(shape: tuple[int, ...] = (160, 3, 32, 32), **fields: Any) -> bytes:
    made = pb.ModelInferRequest(
        model_name="alpha", raw_input_contents=[bytes(4 * int(np.prod(shape)))], **fields
    )
    made.inputs.add(name="images", datatype="FP32", shape=shape)
    return made.SerializeToString()


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("kind", ["shape", "no message", "unknown", "too many", "late", "session"])
def test_a_grpc_call_that_is_refused(small, kind, streamed):
    image = (1, 3, 32, 32)
    note = "x" * SIZE
    raw, code = {
        "shape": (grpc_message((640, 3, 4, 64)), "INVALID_ARGUMENT"),
        "no message": (b"\x0a\x05" + bytes(SIZE), "INVALID_ARGUMENT"),
        "unknown": (grpc_message(image, model_version=note), "NOT_FOUND"),
        "too many": (grpc_message(), "INVALID_ARGUMENT"),
        "late": (grpc_message(image, id=note), "DEADLINE_EXCEEDED"),
        "session": (grpc_message(image, id=note), "INTERNAL"),
    }[kind]

    async def scene() -> int:
        async with started(small) as service:
            handlers = method_handlers(
                Servicer(LocalEndpoint(service), Access()),
                defaultdict(lambda: 64 << 20),
                Leaving(1 << 30, [].append),
            )
            if kind == "late":
                service.gate.open.clear()
            service.gate.failing = kind == "session"

            async def once() -> None:
                context = Context(0.05 if kind == "late" else None)
                content = bytes(bytearray(raw))
                coming = Messages(content)
                if not streamed:
                    await handlers["ModelInfer"].stream_unary(coming, context)
                    assert context.code == code, context.details
                    return
                stream = handlers["ModelStreamInfer"].stream_stream(coming, context)
                answers = [answer async for answer in stream]
                assert (
                    context.code == code
                    or pb.ModelStreamInferResponse.FromString(answers[0]).error_message
                )

            if kind == "late":
                await once()
            return await growth(once)

    assert asyncio.run(scene()) < SIZE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's thresholds")
def test_large_bodies_leave_no_memory_behind():
    """Some at once, again and again, and small things that stay are made meanwhile."""
    code = """import asyncio
from starlette.requests import Request
from hhdeploy.runtime.serving.http.bodies import Bodies
from hhdeploy.runtime.serving.processes.memory import give_memory_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

async def arrive(bodies, stays, together):
    pieces = 120
    async def receive():
        nonlocal pieces
        pieces -= 1
        stays.append(bytes(600))
        await asyncio.sleep(0)
        return {"type": "http.request", "body": bytes(1 << 18), "more_body": pieces > 0}
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    async with bodies.read(request, 1 << 26):
        together.release()
        await asyncio.sleep(0.1)

async def main():
    stays, bodies, together = [], Bodies(1 << 31), asyncio.Semaphore(0)
    for _ in range(3):
        tasks = [asyncio.create_task(arrive(bodies, stays, together)) for _ in range(12)]
        for _ in tasks:
            await together.acquire()
        stays += [bytes(3000) for _ in range(300)]
        await asyncio.gather(*tasks)


give_memory_back()
before = resident()
asyncio.run(main())
print((resident() - before) >> 20)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 128  # MiB, of 360 at once; without care they all stay
