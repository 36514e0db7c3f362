"""The gRPC side of several replicas, in the process of the command."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from ray import serve

from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.grpc.server import start_grpc
from hhdeploy.runtime.serving.ray.endpoint import RayEndpoint
from hhdeploy.runtime.serving.ray.registry import REGISTRY, REPLICA
from hhdeploy.runtime.serving.ray.settings import RaySettings


@contextlib.contextmanager
def grpc_side(
    settings: RaySettings, app: str, port: int, access: Access, tls: Tls | None, grace: float
) -> Iterator[int]:
    """Answers gRPC until the end of the block, and then what was taken.

    Args:
        settings: the application's.
        app: its name; it runs.
        port: 0 takes a free one.
        access: who may ask.
        tls: None: no TLS.
        grace: seconds that requests under way get at the end.

    Yields:
        The port.

    Raises:
        DeviceError: the port is taken, or may not be listened on.
    """
    replicas, registry = (serve.get_deployment_handle(name, app) for name in (REPLICA, REGISTRY))
    with _loop() as loop:

        def run(work: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        endpoint = RayEndpoint(settings, replicas, registry, "grpc")
        server = run(start_grpc(endpoint, port, access, tls))
        try:
            yield server.port
        finally:
            endpoint.stopping = True
            run(server.stop(grace))


@contextlib.contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="hhdeploy-grpc")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
