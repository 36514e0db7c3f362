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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import Endpoint
from hhdeploy.runtime.serving.errors import (
    NotFoundError,
    StoppingError,
    UnauthorizedError,
)
from hhdeploy.runtime.serving.grpc.servicer import Servicer, until
from hhdeploy.runtime.serving.messages import Deadline

SERVICE: Final = "inference.GRPCInferenceService"
# Whose health is told to all.
_OPEN: Final = ("", SERVICE)
_STATUS = health_pb2.HealthCheckResponse
# How often the state is looked at for who watches it.
_WATCH_SECONDS = 1.0


def add_probes(server: Any, endpoint: Endpoint, access: Access, servicer: Servicer) -> None:
    """Let a server answer both services; see `Health` and `ServerReflection`."""
    health_pb2_grpc.add_HealthServicer_to_server(Health(endpoint, access, servicer), server)
    method = grpc.stream_stream_rpc_method_handler(
        ServerReflection(servicer.stopping).ServerReflectionInfo,
        pb.ServerReflectionRequest.FromString,
        pb.ServerReflectionResponse.SerializeToString,
    )
    for version in ("v1", "v1alpha"):  # one form under two names
        name = f"grpc.reflection.{version}.ServerReflection"
        handler = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Health as Kubernetes' probes and load balancers ask for it."""

    # ruff: noqa: N802 - the service's names

    def __init__(self, endpoint: Endpoint, access: Access, servicer: Servicer) -> None:
        """``servicer``: refuses, and lets go who watches once nothing new is taken."""
        self._endpoint, self._access, self._servicer = endpoint, access, servicer
        self._stopping = servicer.stopping

    async def Check(self, request: Any, context: Any) -> Any:
        """Whether requests are answered now; NOT_FOUND for a service or model there is not."""
        if not self._may_ask(request.service, context):
            return _STATUS()
        state = await self._state(request.service)
        if state == _STATUS.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("unknown service: expected none, the service's name or a model's.")
        return _STATUS(status=state)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The state, and again whenever it is another one."""
        last = None
        while last != _STATUS.NOT_SERVING or not self._stopping.is_set():
            if not self._may_ask(request.service, context):  # a token may go meanwhile
                return
            if (state := await self._state(request.service)) != last:
                last = state
                yield _STATUS(status=state)
            try:
                await asyncio.wait_for(self._stopping.wait(), _WATCH_SECONDS)
            except asyncio.TimeoutError:
                continue

    def _may_ask(self, service: str, context: Any) -> bool:
        """False once the call has failed for want of a token."""
        if service in _OPEN:
            return True
        try:
            self._access.check_asking(dict(context.invocation_metadata()).get("authorization"))
        except UnauthorizedError as error:
            self._servicer.refuse(context, error)
            return False
        return True

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

    def __init__(self, stopping: asyncio.Event) -> None:
        super().__init__((SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
        self._stopping = stopping

    async def ServerReflectionInfo(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """An answer to each request."""
        try:
            async with aclosing(until(self._stopping, requests)) as coming:
                async for answer in super().ServerReflectionInfo(coming, context):
                    yield answer
        except StoppingError as error:
            context.set_code(grpc.StatusCode.UNAVAILABLE)
            context.set_details(str(error))
