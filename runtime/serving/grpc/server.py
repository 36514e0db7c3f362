"""The gRPC side: the protocol's service on an address, started and stopped.

Shared memory, tracing and log settings are UNIMPLEMENTED. gRPC reads a message as a whole before
anybody here sees it, and has one limit for all methods: where adapters may be uploaded, what is
longer than other requests may be is refused afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.errors import DeviceError
from hhdeploy.runtime.serving.access.tls import Tls
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import Endpoint
from hhdeploy.runtime.serving.errors import RequestError, TooLargeError
from hhdeploy.runtime.serving.grpc.servicer import Context, Servicer, refuse

_LOG = logging.getLogger("hhdeploy.serve.grpc")
_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# Of an upload beside its two files.
_ENVELOPE_BYTES = 1 << 20
# How long nothing is taken where gRPC ended by itself.
_WATCH_SECONDS = 0.2


class GrpcServer:
    """A server that answers until it is stopped; `start_grpc` makes one.

    Attributes:
        port: it listens on.
    """

    def __init__(self, endpoint: Endpoint, access: Access, tls: Tls | None) -> None:
        self.port = 0
        self._settings = endpoint.settings
        self._servicer = Servicer(endpoint, access)
        self._tls = tls
        self._server: Any = None
        self._watch: asyncio.Task[None] | None = None
        # Servers that take nothing new, and what waits for their last answers.
        self._retired: dict[Any, asyncio.Task[None]] = {}

    async def start(self, port: int) -> None:
        """See `start_grpc`."""
        self._server, self.port = await self._listen(port)
        self._watch = asyncio.create_task(self._keep_listening())

    async def stop(self, grace: float) -> None:
        """Take nothing new, and wait until everything that was taken is answered.

        Args:
            grace: seconds after which the rest is cancelled; another call may shorten it.
        """
        if self._watch is not None:
            self._watch.cancel()
        self._servicer.stop_streams()
        servers = (self._server, *self._retired)
        await asyncio.gather(*(server.stop(grace) for server in servers))

    async def _listen(self, port: int) -> tuple[Any, int]:
        most = dict.fromkeys(_SERVICE.methods_by_name, self._settings.body_bytes)
        if self._settings.allow_adapter_loading:
            most["RepositoryModelLoad"] = self._settings.adapter_bytes + _ENVELOPE_BYTES
        options = [
            ("grpc.max_receive_message_length", max(most.values())),
            # Else a second server could take the same port, and half of the calls.
            ("grpc.so_reuseport", 0),
        ]
        # Calls at the same time, streams included; beyond them RESOURCE_EXHAUSTED.
        calls = self._settings.connections
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=calls)
        handlers = method_handlers(self._servicer, most)
        generic = grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)
        server.add_generic_rpc_handlers((generic,))
        host = self._settings.host
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = (
                server.add_insecure_port(address)
                if self._tls is None
                else server.add_secure_port(address, self._tls.grpc_credentials())
            )
        except RuntimeError as error:
            raise DeviceError(
                f"cannot listen on {address}: it is in use, or no address of this machine. Choose "
                "another `host` or `grpc_port`."
            ) from error
        await server.start()
        return server, bound

    async def _keep_listening(self) -> None:
        """Listen again where gRPC ended by itself.

        One call of a method whose name is not UTF-8 ends the loop of `grpc.aio` (1.85): nothing
        new is taken any more, and what was taken is answered.
        """
        while True:
            try:
                await self._server.wait_for_termination(_WATCH_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever its loop ended with
                _LOG.error("gRPC ended by itself, listening again", exc_info=error)
                await self._listen_again()

    async def _listen_again(self) -> None:
        try:
            server, _ = await self._listen(self.port)
        except DeviceError:  # not let go of yet, or taken by somebody: tried again
            await asyncio.sleep(_WATCH_SECONDS)
            return
        old, self._server = self._server, server
        drained = asyncio.create_task(old.stop(self._settings.request_seconds))
        self._retired[old] = drained
        drained.add_done_callback(lambda _: self._retired.pop(old))


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
        DeviceError: the port is taken, or may not be listened on.
    """
    server = GrpcServer(endpoint, access, tls)
    await server.start(port)
    return server


def method_handlers(servicer: Servicer, most: Mapping[str, int]) -> dict[str, Any]:
    """The service's methods as gRPC registers them: bytes to bytes.

    Args:
        servicer: whose methods.
        most: of each method the bytes that a message may have.
    """
    return {m.name: _handler(servicer, m, most[m.name]) for m in _SERVICE.methods}


def _handler(servicer: Servicer, method: Any, most: int) -> Any:
    """A method of the service as gRPC registers it, for messages of ``most`` bytes.

    Messages are parsed here: what cannot be parsed would be a traceback in the log otherwise, and
    the client's code would be UNKNOWN.
    """
    kind = getattr(pb, method.input_type.name)
    behaviour: Any = getattr(servicer, method.name, _unimplemented)

    async def unary(raw: bytes, context: Context) -> Any:
        try:
            request = _parse(kind, raw, most)
        except RequestError as error:
            refuse(context, error)
            return None
        return await behaviour(request, context)

    async def stream(raws: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        requests = (_parse(kind, raw, most) async for raw in raws)
        async with aclosing(behaviour(requests, context)) as responses:
            async for response in responses:
                yield response

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, None, _serialise)
    return grpc.unary_unary_rpc_method_handler(unary, None, _serialise)


async def _unimplemented(request: Any, context: Context) -> None:
    context.set_code(grpc.StatusCode.UNIMPLEMENTED)
    context.set_details(
        "shared memory, tracing and log settings are not served here: send tensors in the request."
    )


def _parse(kind: Any, raw: bytes, most: int) -> Any:
    if len(raw) > most:
        raise TooLargeError(f"the request is {len(raw)} bytes, at most {most} are taken.")
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise RequestError(f"the bytes are no message {name}: {error}") from error


def _serialise(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return content
