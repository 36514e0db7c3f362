"""The methods of Triton's `inference.GRPCInferenceService` over an endpoint.

    ServerLive ServerReady ServerMetadata
    ModelReady ModelMetadata ModelConfig ModelStatistics
    ModelInfer ModelStreamInfer
    RepositoryIndex
    RepositoryModelLoad RepositoryModelUnload    with --allow-adapter-loading and the token only

The messages are those that tritonclient carries. What calls the methods, and how bytes become
messages, is another's business: `grpc_server` here, `ray_app` on several replicas.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc  # type: ignore[import-untyped]
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.endpoint import (
    Endpoint,
    check_token,
    model_config,
    read_upload,
    server_metadata,
)
from hhdeploy.runtime.serving.errors import (
    FailedError,
    RequestError,
    StoppingError,
)
from hhdeploy.runtime.serving.grpc.codec import read_request, write_response
from hhdeploy.runtime.serving.messages import Deadline

_LOG = logging.getLogger("hhdeploy.serve.grpc")
# An error's text travels in a header, and clients take 8 KiB of all headers together.
_MOST_DETAILS = 4000


class Context(Protocol):
    """What a call's context is asked for: a part of `grpc.aio.ServicerContext`."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Headers of the call, their names in lower case."""

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None without one."""

    def set_code(self, code: Any) -> None:
        """The `grpc.StatusCode` of a call that fails."""

    def set_details(self, details: str) -> None:
        """What the client is told then."""


Result = TypeVar("Result")
Method = Callable[["Servicer", Any, Context], Awaitable[Any]]


def _unary(
    answer: Callable[[], Any], model: str = "", level: int = logging.DEBUG
) -> Callable[[Method], Method]:
    """A method that bounds its time, logs a line, and puts errors into the call's context.

    Args:
        answer: type of its answer; an empty one is returned where the call fails.
        model: field of the request that names the model.
        level: of the line.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        async def guarded(self: Servicer, request: Any, context: Context) -> Any:
            named = getattr(request, model) if model else ""
            work = method(self, request, context)
            try:
                return await self._bounded(work, context, method.__name__, named, level)
            except RequestError as error:
                self.refuse(context, error)
                return answer()

        return guarded

    return decorate


class Servicer:
    """The service's methods. Cancelling a call gives up its place in the queue.

    Each takes a message and a `Context`. One that fails sets the context's code and details.

    Attributes:
        stopping: set once streams have to end; see `stop_streams`.
    """

    # ruff: noqa: N802 - the service's names

    def __init__(self, endpoint: Endpoint, token: str | None) -> None:
        """``token``: what loading adapters must present; None: nobody may."""
        self._endpoint, self._token = endpoint, token
        self.stopping = asyncio.Event()

    def stop_streams(self) -> None:
        """End every stream after the request that it is at; an idle one would stay for ever."""
        self.stopping.set()

    @_unary(pb.ServerLiveResponse)
    async def ServerLive(self, request: Any, context: Context) -> Any:
        """Whether the process answers."""
        return pb.ServerLiveResponse(live=True)

    @_unary(pb.ServerReadyResponse)
    async def ServerReady(self, request: Any, context: Context) -> Any:
        """Whether requests are answered."""
        return pb.ServerReadyResponse(ready=await self._endpoint.ready())

    @_unary(pb.ServerMetadataResponse)
    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        """Name, version and extensions."""
        return pb.ServerMetadataResponse(**server_metadata())

    @_unary(pb.ModelReadyResponse, "name")
    async def ModelReady(self, request: Any, context: Context) -> Any:
        """Whether a model's requests are answered."""
        ready = await self._endpoint.model_ready(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready)

    @_unary(pb.ModelMetadataResponse, "name")
    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        """Inputs and outputs. The message has no place for the adapters: see `RepositoryIndex`."""
        found = await self._endpoint.model_metadata(request.name, request.version)
        known = {key: value for key, value in found.items() if key != "parameters"}
        return ParseDict(known, pb.ModelMetadataResponse())

    @_unary(pb.ModelConfigResponse, "name")
    async def ModelConfig(self, request: Any, context: Context) -> Any:
        """The same in the terms of Triton's configurations."""
        found = await self._endpoint.model_metadata(request.name, request.version)
        return ParseDict({"config": model_config(found)}, pb.ModelConfigResponse())

    @_unary(pb.ModelStatisticsResponse, "name")
    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        """Counts and durations since the start."""
        found = await self._endpoint.model_statistics(request.name, request.version)
        return ParseDict(found, pb.ModelStatisticsResponse())

    @_unary(pb.RepositoryIndexResponse, level=logging.INFO)
    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        """The bundle and its adapters, with their states."""
        models = await self._endpoint.repository_index(request.ready)
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())

    @_unary(pb.RepositoryModelLoadResponse, "model_name", logging.INFO)
    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        """Load an adapter that the server has, or one that is uploaded."""
        self._check_token(context)
        given = {
            key: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
            for key, value in request.parameters.items()
        }
        upload = read_upload(given, self._endpoint.settings.adapter_bytes)
        await self._endpoint.load_adapter(request.model_name, upload)
        return pb.RepositoryModelLoadResponse()

    @_unary(pb.RepositoryModelUnloadResponse, "model_name", logging.INFO)
    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        """Answer no request for an adapter any more."""
        self._check_token(context)
        await self._endpoint.unload_adapter(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @_unary(pb.ModelInferResponse, "model_name", logging.INFO)
    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """Answer one request."""
        return await self._infer(request)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        """Answer requests one after the other, in their order.

        An error is the answer to its request, and the stream goes on. Requests that should share
        a batch go through `ModelInfer`, or through several streams.
        """
        try:
            async with aclosing(until(self.stopping, requests)) as coming:
                async for request in coming:
                    yield await self._stream_answer(request, context)
        except RequestError as error:
            self.refuse(context, error)

    def refuse(self, context: Context, error: RequestError) -> None:
        """Tell the client why its call fails, and count it."""
        self._endpoint.refused(error)
        context.set_code(grpc.StatusCode[error.code])
        context.set_details(_details(error))

    async def _stream_answer(self, request: Any, context: Context) -> Any:
        called = ("ModelStreamInfer", request.model_name, logging.INFO)
        try:
            response = await self._bounded(self._infer(request), context, *called)
        except RequestError as error:
            self._endpoint.refused(error)
            empty = pb.ModelInferResponse(id=request.id)
            return pb.ModelStreamInferResponse(error_message=_details(error), infer_response=empty)
        # Triton's mark of a request's last answer; here there is one.
        response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)

    async def _infer(self, request: Any) -> Any:
        return write_response(await self._endpoint.infer(read_request(request)))

    def _check_token(self, context: Context) -> None:
        given = dict(context.invocation_metadata()).get("authorization")
        check_token(self._token, given if isinstance(given, str) else None)

    async def _bounded(
        self, work: Awaitable[Result], context: Context, method: str, model: str, level: int
    ) -> Result:
        """The result of ``work``, within the client's deadline and the server's limit.

        Raises:
            RequestError: or one of its kinds; the log has what the client is not told.
        """
        begin, code = time.perf_counter(), "CANCELLED"
        remaining = context.time_remaining()
        limit = min(
            self._endpoint.settings.request_seconds,
            math.inf if remaining is None else remaining,
        )
        try:
            with Deadline(limit):
                result = await work
            code = "OK"
            return result
        except RequestError as error:
            code = error.code
            raise
        except HhdeployError as error:
            code = RequestError.code
            raise RequestError(str(error)) from error
        except Exception as error:
            # No name for what is raised: its traceback would hold this frame, and that the request.
            code = FailedError.code
            _LOG.exception("request failed", extra={"method": method})
            raise FailedError("internal error; the server's log has more.") from error
        finally:
            seconds = time.perf_counter() - begin
            extra = {"method": method, "model": model[:200], "code": code}
            _LOG.log(level, "request", extra={**extra, "ms": round(1e3 * seconds, 3)})


def _details(error: RequestError) -> str:
    """In ASCII: whatever a request or a file's name made us quote can be written."""
    return str(error).encode("ascii", "backslashreplace").decode()[:_MOST_DETAILS]


async def until(stop: asyncio.Event, items: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """``items`` while ``stop`` is not set; `StoppingError` afterwards."""
    stopping = asyncio.ensure_future(stop.wait())
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(items))
            await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise StoppingError("the server is shutting down.")
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        stopping.cancel()
        if coming is not None:
            coming.cancel()
        del coming  # the traceback of its exception holds this frame
