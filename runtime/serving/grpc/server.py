"""The gRPC side: the protocol's service on an address, started and stopped.

Shared memory, tracing and log settings are UNIMPLEMENTED. gRPC reads a message as a whole before
anybody here sees it, and has one limit for all methods: where adapters may be uploaded, what is
longer than other requests may be is refused afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.errors import DeviceError, WriteError
from hhdeploy.files.writing import temporary_directory
from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import Endpoint
from hhdeploy.runtime.serving.errors import BusyError, NotServedError, RequestError, shown
from hhdeploy.runtime.serving.grpc.front import Front
from hhdeploy.runtime.serving.grpc.headers import PEER
from hhdeploy.runtime.serving.grpc.leaving import SMALL_BYTES, Leaving
from hhdeploy.runtime.serving.grpc.parsing import parse, parse_or_refuse
from hhdeploy.runtime.serving.grpc.probes import add_probes
from hhdeploy.runtime.serving.grpc.servicer import Context, Servicer
from hhdeploy.runtime.serving.listening import listen

_LOG = logging.getLogger("hhdeploy.serve.grpc")
_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# Of an upload beside its two files.
_ENVELOPE_BYTES = 1 << 20
# How often it is looked whether gRPC has ended by itself.
_WATCH_SECONDS = 0.2
# Between two tries to start another one.
_PAUSE_SECONDS = 1.0
# After the last answer, for a request that has not arrived as a whole, and for one that gRPC has
# forgotten: now and then it takes a call at the moment of its stop and nobody hears of it.
_LOST_SECONDS = 5.0
# For clients to take the last answers, once all calls have ended.
_FLUSH_SECONDS = 5.0
# Calls of one connection at the same time. A client keeps further ones back, once it knows; what it
# sends before that is refused, so it is no fewer than a job may send at once.
_MOST_STREAMS = 1 << 12
# Calls that have arrived and that Python has not looked at yet. What is beyond (1,000 by default),
# gRPC ends at random with CANCELLED, whoever called, and nobody here hears of it: our own limits
# come first.
_LEAST_PENDING = 1 << 14
# Pings that a client may send without a call under way, and how often.
_PING_SECONDS = 10
# When a client that says nothing is asked whether it is there, and how long it may take to say so:
# one whose machine or network is gone would keep its connection and its calls for hours.
_ASK_SECONDS = 60


class GrpcServer:
    """A server that answers until it is stopped; `start_grpc` makes one.

    Attributes:
        port: it listens on.
    """

    def __init__(self, endpoint: Endpoint, access: Access, tls: Tls | None) -> None:
        self.port = 0
        self._endpoint = endpoint
        self._settings = endpoint.settings
        self._access, self._tls = access, tls
        self._servicer = Servicer(endpoint, access)
        self._scratch = contextlib.ExitStack()
        self._front = Front(_directory(self._scratch) / "socket", endpoint.refused)
        self._leaving = Leaving(self._settings.bodies_bytes, self._front.end_of)
        self._servers: list[Any] = []
        self._watch: asyncio.Task[None] | None = None

    async def start(self, port: int) -> None:
        """See `start_grpc`."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._scratch.close)
            host, most = self._settings.host, self._settings.connections
            sockets = [undo.enter_context(each) for each in listen(host, port, "grpc_port", most)]
            await self._serve()
            await self._front.listen(sockets, None if self._tls is None else self._tls.grpc)
            undo.pop_all()
        self.port = self._front.port
        self._watch = asyncio.create_task(self._keep_serving())

    async def stop(self, grace: float) -> None:
        """Take nothing new, and wait until everything that was taken is answered.

        Args:
            grace: seconds after which the rest is cancelled; another call may shorten it. A request
                that has not arrived is not waited for so long, see `_LOST_SECONDS`.
        """
        self._front.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        self._servicer.stop_streams()
        lost = asyncio.create_task(self._end_lost())
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        lost.cancel()
        # What gRPC has written by now is on its way through the front.
        await self._front.drain(_FLUSH_SECONDS)
        self._front.abort()
        self._servicer.close()
        self._scratch.close()

    async def _end_lost(self) -> None:
        """Cancel what would be waited for in vain, once everything else is answered."""
        await self._servicer.quiet(_LOST_SECONDS)
        await asyncio.gather(*(server.stop(0) for server in self._servers))

    async def _serve(self) -> None:
        """gRPC's own server, behind the front."""
        most = dict.fromkeys(_SERVICE.methods_by_name, self._settings.body_bytes)
        if self._settings.allow_adapter_loading:
            most["RepositoryModelLoad"] = self._settings.adapter_bytes + _ENVELOPE_BYTES
        calls = self._settings.connections
        pending = max(_LEAST_PENDING, 4 * calls)
        options = [
            ("grpc.max_concurrent_streams", _MOST_STREAMS),
            ("grpc.server.max_pending_requests", pending),
            ("grpc.server.max_pending_requests_hard_limit", 2 * pending),
            ("grpc.max_receive_message_length", max(most.values())),
            # Clients keep connections alive through proxies; gRPC's defaults would end them.
            ("grpc.http2.min_ping_interval_without_data_ms", 1000 * _PING_SECONDS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", int(1000 * _ASK_SECONDS)),
            ("grpc.http2.ping_timeout_ms", int(1000 * _ASK_SECONDS)),
        ]
        # Calls at the same time, streams included; beyond them RESOURCE_EXHAUSTED.
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=calls)
        # Before it is waited for: whoever stops this one stops that.
        self._servers.append(server)
        handlers = method_handlers(self._servicer, most, self._leaving)
        generic = grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)
        server.add_generic_rpc_handlers((generic,))
        add_probes(server, self._endpoint, self._access, self._servicer)
        server.add_generic_rpc_handlers((_Others(self._servicer),))
        path = self._front.inner
        path.unlink(missing_ok=True)
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise DeviceError(
                f"cannot make the socket {path}. Expected a directory for temporary files with a "
                "short path: set TMPDIR."
            ) from error
        await server.start()

    async def _keep_serving(self) -> None:
        """Another server where gRPC's has ended by itself, which no bytes of a client should do."""
        while True:
            try:
                await self._servers[-1].wait_for_termination(_WATCH_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever its loop ended with
                _LOG.error("gRPC ended by itself, starting again", exc_info=error)
                await self._serve_again()

    async def _serve_again(self) -> None:
        """As long as it takes: e.g. no file may be opened just now."""
        there = len(self._servers)
        while True:
            try:
                await self._serve()
                return
            except Exception as error:  # noqa: BLE001 - it would be nobody's, and gRPC gone
                del self._servers[there:]
                _LOG.error("gRPC does not start again yet", exc_info=error)
                await asyncio.sleep(_PAUSE_SECONDS)


async def start_grpc(
    endpoint: Endpoint, port: int, access: Access, tls: Tls | None = None
) -> GrpcServer:
    """Listen and answer.

    Args:
        endpoint: what answers.
        port: 0 takes a free one.
        access: who may ask; health is there for all.
        tls: None: no TLS.

    Raises:
        DeviceError: the port is taken, or may not be listened on, or no file may be written.
    """
    server = GrpcServer(endpoint, access, tls)
    await server.start(port)
    return server


def _directory(until: contextlib.ExitStack) -> Path:
    """Of a socket; what a server that was killed left of it goes now."""
    try:
        return until.enter_context(temporary_directory("grpc"))
    except WriteError as error:  # e.g. of a container all is read only
        raise DeviceError(
            f"cannot make a socket for gRPC. {error} Or serve without gRPC: `grpc_port=-1`."
        ) from error


def method_handlers(
    servicer: Servicer, most: Mapping[str, int], leaving: Leaving
) -> dict[str, Any]:
    """The service's methods as gRPC registers them: bytes to bytes.

    Args:
        servicer: whose methods.
        most: of each method the bytes that a message may have.
        leaving: counts answers.
    """
    return {m.name: _handler(servicer, m, most[m.name], leaving) for m in _SERVICE.methods}


def _handler(servicer: Servicer, method: Any, most: int, leaving: Leaving) -> Any:
    """A method of the service as gRPC registers it, for messages of ``most`` bytes.

    Messages are parsed here: what cannot be parsed would be a traceback in the log otherwise, and
    the client's code would be UNKNOWN. They are written here as well: gRPC would hold an answer and
    its bytes, until these are gone.
    """
    kind = getattr(pb, method.input_type.name)
    behaviour: Any = getattr(servicer, method.name, None)

    def leaves(content: bytes, context: Context) -> Callable[[], None] | None:
        """Count an answer: what is to be called once it is gone; None: it is small."""
        if len(content) <= SMALL_BYTES:
            return None
        return leaving.add(str(dict(context.invocation_metadata()).get(PEER, "")), len(content))

    async def unary(raws: AsyncIterator[bytes], context: Context) -> bytes:
        try:
            request = parse(kind, await servicer.message(raws), most)
            if behaviour is None:
                raise NotServedError(
                    "shared memory, tracing and log settings are not served here: send tensors in "
                    "the request."
                )
            with servicer.under_way():
                content: bytes = (await behaviour(request, context)).SerializeToString()
            if (gone := leaves(content, context)) is not None:
                context.add_done_callback(lambda _: gone())
        except RequestError as error:
            servicer.refuse(context, error)
            return b""
        return content

    async def stream(raws: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        requests = (parse_or_refuse(kind, raw, most) async for raw in raws)
        with servicer.under_way():
            async with contextlib.aclosing(behaviour(requests, context)) as responses:
                async for response in responses:
                    content, gone = response.SerializeToString(), None
                    try:
                        gone = leaves(content, context)
                    except BusyError as error:
                        said = servicer.stream_error(response.infer_response.id, error)
                        content = said.SerializeToString()
                    del response
                    try:
                        yield content  # goes on once gRPC has sent it
                    finally:
                        if gone is not None:
                            gone()

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(stream)
    return grpc.stream_unary_rpc_method_handler(unary)


class _Others(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Refuses every method that nobody else has; gRPC itself would, without a word to anybody."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    def service(self, handler_call_details: Any) -> Any:
        """What answers a call, of whichever kind it is."""
        method = shown(handler_call_details.method)

        async def refuse(raws: AsyncIterator[bytes], context: Context) -> None:
            error = NotServedError(
                f"Method not found! Expected one that server reflection tells of, found {method}."
            )
            self._servicer.refuse(context, error)

        return grpc.stream_unary_rpc_method_handler(refuse)
