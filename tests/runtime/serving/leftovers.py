"""One HTTP request without a network, and what requests leave behind."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

# Of a request in these tests.
SIZE = 2 << 20
_TIMES = 4


async def post(
    app: Any, path: str, body: bytes, *, leave: bool = False, method: str = "POST", **headers: str
) -> int:
    """The status of one request, handed to the application as uvicorn does; 0 for none."""
    sent = [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []
    gone = asyncio.Event()
    if leave:
        asyncio.get_running_loop().call_later(0.05, gone.set)

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        if event["type"] == "http.response.start":
            statuses.append(event["status"])

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http",
        "headers": [(k.encode(), v.encode()) for k, v in {"host": "localhost", **headers}.items()],
    }  # fmt: skip
    del body
    await app(scope, receive, send)
    return statuses[0] if statuses else 0


async def growth(request: Callable[[], Awaitable[Any]]) -> int:
    """Bytes that a few requests leave behind, the first one's caches left out."""
    await request()
    await asyncio.sleep(0)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(_TIMES):
            await request()
        for _ in range(5):
            await asyncio.sleep(0.01)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
