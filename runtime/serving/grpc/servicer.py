"""The methods of Triton's `inference.GRPCInferenceService` over an endpoint.

    ServerLive ServerReady ServerMetadata
    ModelReady ModelMetadata ModelConfig ModelStatistics
    ModelInfer ModelStreamInfer
    RepositoryIndex
    RepositoryModelLoad RepositoryModelUnload    with --allow-adapter-loading and the token only

The messages are those that tritonclient carries. Others call the methods and make messages of
bytes: `grpc.server` in one process, `ray.grpc` for several replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import Endpoint, model_config, server_metadata
from hhdeploy.runtime.serving.errors import (
    FailedError,
    RequestError,
    StoppingError,
    UnauthorizedError,
    internal_error,
    shortened,
)
from hhdeploy.runtime.serving.fleet.uploads import check_unload, read_upload
from hhdeploy.runtime.serving.grpc.codec import write_response
from hhdeploy.runtime.serving.grpc.headers import PEER
from hhdeploy.runtime.serving.grpc.parsing import read_inference
from hhdeploy.runtime.serving.logs import REQUEST_ID, Asked
from hhdeploy.runtime.serving.messages import Deadline
from hhdeploy.runtime.serving.processes.aside import Aside
from hhdeploy.runtime.serving.processes.parsing import Parser
from hhdeploy.runtime.serving.tracing import Tracing

_LOG = logging.getLogger("hhdeploy.serve.grpc")
# What is no client's fault.
_OURS = frozenset({"INTERNAL", "UNAVAILABLE"})


class Context(Protocol):
    """What a call's context is asked for: a part of `grpc.aio.ServicerContext`."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """Headers of the call, their names in lower case."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Headers after the answer."""

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None without one."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """What is called once the call has ended, its answer sent or given up."""

    def set_code(self, code: Any) -> None:
        """The `grpc.StatusCode` of a call that fails."""

    def set_details(self, details: str) -> None:
        """What the client is told then."""


Result = TypeVar("Result")
Method = Callable[["Servicer", Any, Context], Awaitable[Any]]
Check = Callable[[Access, str | None], None]


def _unary(
    answer: Callable[[], Any],
    model: str = "",
    level: int = logging.DEBUG,
    check: Check = Access.check_asking,
) -> Callable[[Method], Method]:
    """A method that bounds its time, logs a line, and puts errors into the call's context.

    Args:
        answer: type of its answer; an empty one is returned where the call fails.
        model: field of the request that names the model.
        level: of the line.
        check: whether a call may ask, by its authorization.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        async def guarded(self: Servicer, request: Any, context: Context) -> Any:
            named = getattr(request, model) if model else ""
            work = functools.partial(method, self, request, context)
            try:
                return await self._bounded(work, context, method.__name__, named, level, check)
            except RequestError as error:
                self.refuse(context, error)
                return answer()

        return guarded

    return decorate


def _anybody(access: Access, authorization: str | None) -> None:
    """Probes have no token."""


class Servicer:
    """The service's methods. Cancelling a call gives up its place in the queue.

    Each takes a message and a `Context`. One that fails sets the context's code and details.

    Attributes:
        stopping: set once streams have to end; see `stop_streams`.
    """

    # ruff: noqa: N802 - the service's names

    def __init__(self, endpoint: Endpoint, access: Access) -> None:
        """``access``: who may ask; health is there for all."""
        self._endpoint, self._access = endpoint, access
        self._tracing, self._parser, self._aside = Tracing(), Parser(), Aside("hhdeploy-grpc")
        self.stopping = asyncio.Event()
        self._under_way = 0

    def close(self) -> None:
        """End what reads large requests, and writes large answers."""
        self._parser.close()
        self._aside.close()

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """A call, from its first message to its last answer."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def quiet(self, seconds: float) -> None:
        """Wait until no call has been under way for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(seconds / 20)
            if self._under_way:
                end = time.monotonic() + seconds

    async def message(self, raws: AsyncIterator[bytes]) -> bytes:
        """The one message of a call, which gRPC would wait for as long as the client likes.

        Raises:
            TimedOutError: none has arrived within the server's limit.
        """
        with Deadline(self._endpoint.settings.request_seconds):
            coming: Any = aiter(raws)  # with its message in a cycle of gRPC's, until it is closed
            raw: bytes
            async with aclosing(coming):
                async for raw in coming:
                    return raw
            # None comes. Where the client has left, or gRPC refused it, this ends in a moment.
            return await asyncio.Future[bytes]()

    def stop_streams(self) -> None:
        """End every stream after the request that it is at; an idle one would stay for ever."""
        self.stopping.set()

    @_unary(pb.ServerLiveResponse, check=_anybody)
    async def ServerLive(self, request: Any, context: Context) -> Any:
        """Whether the process answers."""
        return pb.ServerLiveResponse(live=True)

    @_unary(pb.ServerReadyResponse, check=_anybody)
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
        """Inputs and outputs. The message has no place for parameters: `ModelConfig` has them."""
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
        # A reason quotes names of files, which protobuf takes in UTF-8 alone.
        said = [{**model, "reason": _writable(model["reason"], "utf-8")} for model in models]
        return ParseDict({"models": said}, pb.RepositoryIndexResponse())

    @_unary(pb.RepositoryModelLoadResponse, "model_name", logging.INFO, Access.check_loading)
    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        """Load an adapter that the server has, or one that is uploaded."""
        upload = read_upload(_parameters_of(request), self._endpoint.settings.adapter_bytes)
        await self._endpoint.load_adapter(request.model_name, upload)
        return pb.RepositoryModelLoadResponse()

    @_unary(pb.RepositoryModelUnloadResponse, "model_name", logging.INFO, Access.check_loading)
    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        """Answer no request for an adapter any more."""
        check_unload(_parameters_of(request))
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

    def stream_error(self, request_id: str, error: RequestError) -> Any:
        """What a stream answers to one request that fails, which is counted; it goes on."""
        self._endpoint.refused(error)
        empty = pb.ModelInferResponse(id=request_id)
        return pb.ModelStreamInferResponse(error_message=_details(error), infer_response=empty)

    async def _stream_answer(self, request: Any, context: Context) -> Any:
        called = ("ModelStreamInfer", request.model_name, logging.INFO, Access.check_asking)
        try:
            work = functools.partial(self._infer, request)
            response = await self._bounded(work, context, *called)
        except UnauthorizedError:  # ends the stream: a token may go while it is open
            raise
        except RequestError as error:
            return self.stream_error(request.id, error)
        # Triton's mark of a request's last answer; here there is one.
        response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)

    async def _infer(self, request: Any) -> Any:
        read = await read_inference(self._parser, request, self._endpoint.most_json)
        response = await self._endpoint.infer(read)
        return await self._aside.run(response.nbytes, functools.partial(write_response, response))

    async def _bounded(
        self,
        work: Callable[[], Awaitable[Result]],
        context: Context,
        method: str,
        model: str,
        level: int,
        check: Check,
    ) -> Result:
        """What ``work`` says, within the client's deadline and the server's limit.

        Raises:
            RequestError: or one of its kinds; the log has what the client is not told.
        """
        headers = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        asked = Asked(headers.get(PEER), headers.get(REQUEST_ID), method=method, model=model[:200])
        context.set_trailing_metadata(((REQUEST_ID, asked.id),))
        span = {"rpc.system": "grpc", "rpc.method": method}
        asked.said["code"] = "CANCELLED"
        try:
            with self._tracing.request(method, headers, span) as traced:
                traced["hhdeploy.request_id"] = asked.id
                try:
                    check(self._access, headers.get("authorization"))
                    with Deadline(self._limit(context)):
                        result = await work()
                    asked.said["code"] = "OK"
                    return result
                except HhdeployError as error:
                    asked.refused(error)
                    if isinstance(error, RequestError):
                        asked.said["code"] = error.code
                        raise
                    asked.said["code"] = RequestError.code
                    raise RequestError(str(error)) from error
                except Exception as error:
                    # No name for what is raised: its traceback would hold this frame, and that
                    # the request.
                    asked.said |= {"code": FailedError.code, "reason": "internal error"}
                    extra = {"method": method, "request_id": asked.id}
                    _LOG.exception("request failed", extra=extra)
                    raise internal_error() from error
                finally:
                    traced["rpc.response.status_code"] = str(asked.said["code"])
                    if asked.said["code"] in _OURS:
                        traced["error"] = str(asked.said.get("reason", ""))
        finally:
            if not self._endpoint.settings.no_access_log:
                asked.write(_LOG, level)

    def _limit(self, context: Context) -> float:
        """Seconds that a call has: the client's, and at most the server's."""
        remaining = context.time_remaining()
        limit = self._endpoint.settings.request_seconds
        return limit if remaining is None else min(limit, remaining)


def _parameters_of(request: Any) -> dict[str, Any]:
    """Those of a request that changes the repository."""
    return {
        key: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for key, value in request.parameters.items()
    }


def _details(error: RequestError) -> str:
    """In ASCII: whatever a request or a file's name made us quote can be written."""
    return shortened(_writable(str(error), "ascii"))


def _writable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


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
