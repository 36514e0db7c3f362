"""One process that serves a bundle: HTTP and gRPC on one event loop, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import uvicorn

from hhdeploy.errors import PlanError
from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.grpc.server import GrpcServer, start_grpc
from hhdeploy.runtime.serving.http.app import http_app
from hhdeploy.runtime.serving.http.arrival import bounded_protocol
from hhdeploy.runtime.serving.listening import let_open, listen
from hhdeploy.runtime.serving.processes.memory import give_memory_back
from hhdeploy.runtime.serving.service import Service

_LOG = logging.getLogger("hhdeploy.serve")
# What is said of a server that others can reach, with what it is without.
EXPOSED = "whoever reaches the port may ask or listen"
# What is left of a request when its time is up, and a client that reads slowly.
_GRACE_SECONDS = 5.0
# Longer than proxies keep their connections to a server: one must not send a request into a
# connection that is being closed.
_KEEP_ALIVE_SECONDS = 75
# Connections of HTTP beyond those that are answered: they are told so.
_TURNED_AWAY = 256
# A client's connection, and both ends of that which leads from the front to gRPC's own server.
_FILES_OF_GRPC = 3
# Of the interpreter's lock. A batch's thread asks for it before and after it computes, and the
# loop, busy with requests, would keep it for Python's 5 ms each time: as much as an image takes.
_SWITCH_SECONDS = 0.5e-3


@dataclass(frozen=True)
class Addresses:
    """Where a server listens; a port of 0 was replaced by the one it got."""

    host: str
    http_port: int
    grpc_port: int | None


async def serve(
    service: Service,
    *,
    access: Access,
    tls: Tls | None = None,
    http_port: int,
    grpc_port: int | None,
    announce: Callable[[Addresses], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then answer what was taken, and stop. SIGHUP: `_reloading`.

    Args:
        service: not started yet; it is stopped at the end.
        access: who may ask.
        tls: None: no TLS.
        http_port: 0 takes a free one.
        grpc_port: 0 takes a free one; None: no gRPC.
        announce: called once requests are answered.

    Raises:
        DeviceError: a port is taken, or may not be listened on.
    """
    give_memory_back()
    most = service.settings.connections + _TURNED_AWAY
    let_open(most + (_FILES_OF_GRPC * service.settings.connections if grpc_port is not None else 0))
    endpoint = LocalEndpoint(service)
    host = service.settings.host
    config = uvicorn.Config(
        http_app(endpoint, access),
        http=bounded_protocol(
            _grace(service),
            service.settings.connections,
            endpoint.refused,
            lambda: service.crowded,
        ),
        ws="none",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        lifespan="on",  # its end closes what HTTP started
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(_grace(service)),
    )
    if tls is not None:
        config.load()
        config.ssl = tls.http  # one that can be read again; a server would make its own
    server = _Server(config)
    grpc: GrpcServer | None = None
    with contextlib.ExitStack() as stack, _reloading(service, access, tls):
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(_SWITCH_SECONDS)
        sockets = [stack.enter_context(each) for each in listen(host, http_port, "http_port", most)]
        # First of all, so that it is seen to live while it reads adapters. A task of its own:
        # uvicorn's clock wakes that one alone.
        serving = asyncio.create_task(server.serve(sockets=sockets))
        try:
            await service.start()
            if grpc_port is not None:
                grpc = await start_grpc(endpoint, grpc_port, access, tls)
            _on_signals(service, server, grpc)
            announce(
                Addresses(
                    host, sockets[0].getsockname()[1], grpc.port if grpc is not None else None
                )
            )
            if missing := service.settings.exposed():
                _LOG.warning(EXPOSED, extra={"without": missing})
            _LOG.info("serving", extra={"device": service.device})
            await serving
        finally:
            server.should_exit = True
            await asyncio.wait([serving])
            if grpc is not None:  # a signal began this: HTTP and gRPC drain at the same time
                await grpc.stop(_grace(service))
            await service.stop()
            _LOG.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn, but signals are ours: it would raise them again before we are done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _grace(service: Service) -> float:
    """Seconds that requests under way get once the server stops."""
    return service.settings.request_seconds + _GRACE_SECONDS


def _on_signals(service: Service, server: uvicorn.Server, grpc: GrpcServer | None) -> None:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    stops: list[asyncio.Task[None]] = []

    def stop(number: signal.Signals) -> None:
        for each in numbers:  # the next one ends the process, whatever is under way
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        _LOG.info("stopping", extra={"signal": number.name})
        service.ready = False  # for load balancers; what comes all the same is answered
        server.should_exit = True
        if grpc is not None:
            stops.append(asyncio.create_task(grpc.stop(_grace(service))))

    for number in numbers:
        loop.add_signal_handler(number, stop, number)


@contextlib.contextmanager
def _reloading(service: Service, access: Access, tls: Tls | None) -> Iterator[None]:
    """SIGHUP reads tokens, certificate and fleet directory again, until the end of the block.

    One that was blocked until now, and came meanwhile, is followed first.
    """
    loop = asyncio.get_running_loop()
    looks: set[asyncio.Task[None]] = set()

    def reload() -> None:
        _LOG.info("reading tokens, certificate and fleet directory again")
        reads = [partial(access.read, service.settings), *([tls.read] if tls is not None else ())]
        for read in reads:
            try:
                read()
            except PlanError as error:
                _LOG.error("kept as it was", extra={"problem": str(error)})
        if service.fleet is not None:
            look = asyncio.create_task(service.fleet.look())
            looks.add(look)
            look.add_done_callback(looks.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        for look in looks:
            look.cancel()
