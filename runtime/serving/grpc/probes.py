"""What tools ask any gRPC server: `grpc.health.v1.Health` and server reflection.

Health is asked for the whole server (""), for the service by its name, or for a model by its own;
the last as everywhere with a token, where tokens are needed: which models there are is not told to
all. Reflection tells what is published.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import Endpoint
from hhdeploy.runtime.serving.errors import NotFoundError, RequestError
from hhdeploy.runtime.serving.grpc.parsing import parse
from hhdeploy.runtime.serving.grpc.servicer import Servicer, until
from hhdeploy.runtime.serving.messages import Deadline

SERVICE: Final = "inference.GRPCInferenceService"
# Whose health is told to all.
_OPEN: Final = ("", SERVICE)
_STATUS = health_pb2.HealthCheckResponse
# Of a request, which is a name.
_MOST_BYTES = 64 << 10
# How often the state is looked at for who watches it.
_WATCH_SECONDS = 1.0


def add_probes(server: Any, endpoint: Endpoint, access: Access, servicer: Servicer) -> None:
    """Let a server answer both services; see `Health` and `ServerReflection`."""
    health = Health(endpoint, access, servicer)
    said = health_pb2.HealthCheckResponse.SerializeToString
    methods = {
        "Check": grpc.stream_unary_rpc_method_handler(health.Check, None, said),
        "Watch": grpc.stream_stream_rpc_method_handler(health.Watch, None, said),
    }
    handler = grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)
    server.add_generic_rpc_handlers((handler,))
    method = grpc.stream_stream_rpc_method_handler(
        ServerReflection(servicer).ServerReflectionInfo,
        None,
        pb.ServerReflectionResponse.SerializeToString,
    )
    for version in ("v1", "v1alpha"):  # one form under two names
        name = f"grpc.reflection.{version}.ServerReflection"
        handler = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))


class Health:
    """Health as Kubernetes' probes and load balancers ask for it; requests come as bytes."""

    # ruff: noqa: N802 - the service's names

    def __init__(self, endpoint: Endpoint, access: Access, servicer: Servicer) -> None:
        """``servicer``: refuses, and lets go who watches once nothing new is taken."""
        self._endpoint, self._access, self._servicer = endpoint, access, servicer
        self._stopping = servicer.stopping

    async def Check(self, raws: AsyncIterator[bytes], context: Any) -> Any:
        """Whether requests are answered now; NOT_FOUND for a service or model there is not."""
        try:
            service = _service(await self._servicer.message(raws))
            self._check_asking(service, context)
            state = await self._state(service)
            if state == _STATUS.SERVICE_UNKNOWN:
                raise NotFoundError(
                    "unknown service: expected none, the service's name or a model's."
                )
        except RequestError as error:
            self._servicer.refuse(context, error)
            return _STATUS()
        return _STATUS(status=state)

    async def Watch(self, raws: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        """The state, and again whenever it is another one."""
        last = None
        try:
            service = _service(await self._servicer.message(raws))
            while last != _STATUS.NOT_SERVING or not self._stopping.is_set():
                self._check_asking(service, context)  # a token may go meanwhile
                if (state := await self._state(service)) != last:
                    last = state
                    yield _STATUS(status=state)
                try:
                    await asyncio.wait_for(self._stopping.wait(), _WATCH_SECONDS)
                except asyncio.TimeoutError:
                    continue
        except RequestError as error:
            self._servicer.refuse(context, error)

    def _check_asking(self, service: str, context: Any) -> None:
        """Raises `UnauthorizedError` for want of a token."""
        if service not in _OPEN:
            self._access.check_asking(dict(context.invocation_metadata()).get("authorization"))

    async def _state(self, service: str) -> Any:
        if self._stopping.is_set():
            return _STATUS.NOT_SERVING
        try:
            with Deadline(self._endpoint.settings.request_seconds):
                if service in _OPEN:
                    good = await self._endpoint.ready()
                else:
                    good = await self._endpoint.model_ready(service)
        except NotFoundError:
            return _STATUS.SERVICE_UNKNOWN
        except HhdeployError:  # e.g. no replica answers now
            return _STATUS.NOT_SERVING
        return _STATUS.SERVING if good else _STATUS.NOT_SERVING


class ServerReflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """The protocol's description, for grpcurl and its like; a stream of it ends with the server."""

    def __init__(self, servicer: Servicer) -> None:
        """``servicer``: as of `Health`."""
        super().__init__((SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
        self._servicer = servicer

    async def ServerReflectionInfo(self, raws: Any, context: Any) -> AsyncIterator[Any]:
        """An answer to each request."""
        requests = (parse(pb.ServerReflectionRequest, raw, _MOST_BYTES) async for raw in raws)
        try:
            async with aclosing(until(self._servicer.stopping, requests)) as coming:
                async for answer in super().ServerReflectionInfo(coming, context):
                    yield answer
        except RequestError as error:
            self._servicer.refuse(context, error)


def _service(raw: bytes) -> str:
    """Whose health is asked for."""
    service: str = parse(health_pb2.HealthCheckRequest, raw, _MOST_BYTES).service
    return service
