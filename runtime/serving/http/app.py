"""The HTTP side: Open Inference Protocol v2, metrics, and the page, on Starlette.

    GET  /v2   /v2/health/live   /v2/health/ready
    GET  /v2/models/M [/versions/1]            metadata        .../ready   .../config   .../stats
    GET  /v2/models/stats                      of all of them, if the bundle is not called so
    POST /v2/models/M [/versions/1] /infer     inference
    POST /v2/repository/index                  adapters and their states
    POST /v2/repository/models/A/load          with --allow-adapter-loading and the token only
    POST /v2/repository/models/A/unload
    GET  /metrics   /   /status

M is the bundle's name or an adapter's, A an adapter's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import Endpoint, model_config, server_metadata
from hhdeploy.runtime.serving.errors import (
    BusyError,
    NotFoundError,
    RequestError,
    internal_error,
    shortened,
)
from hhdeploy.runtime.serving.fleet.uploads import check_unload, read_upload
from hhdeploy.runtime.serving.http.bodies import Bodies, BodyParser
from hhdeploy.runtime.serving.http.codec import (
    HEADER_LENGTH,
    compact_json,
    read_only_parameters,
    read_truth,
    write_response,
)
from hhdeploy.runtime.serving.http.heads import check_head, header
from hhdeploy.runtime.serving.http.leaving import send_answer
from hhdeploy.runtime.serving.http.page import Handler, page_routes
from hhdeploy.runtime.serving.logs import REQUEST_ID, Asked
from hhdeploy.runtime.serving.messages import Deadline
from hhdeploy.runtime.serving.processes.aside import Aside
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.runtime.serving.tracing import Tracing

Admission = Callable[[str | None], None]

_LOG = logging.getLogger("hhdeploy.serve.http")
_REQUEST_ID, _HEADER_LENGTH = REQUEST_ID.encode(), HEADER_LENGTH.encode()
# Of a request that says little, e.g. to unload an adapter.
_SMALL_BYTES = 1 << 20


def http_app(endpoint: Endpoint, access: Access) -> Starlette:
    """The application; what answers is started and stopped by whoever serves it.

    Args:
        endpoint: what answers.
        access: who may ask; health and the page's files are there for all.
    """
    bodies = Bodies(endpoint.settings.bodies_bytes)
    handlers = _Handlers(endpoint, access, bodies)
    guard = _Guard(endpoint.settings, endpoint.refused, bodies)

    def open_to_all(path: str, handler: Handler) -> Route:
        return Route(path, _Guarded(guard, path, handler), methods=["GET"])

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        guarded = _Guarded(guard, path, handler, access.check_asking)
        return Route(path, guarded, methods=[method])

    models = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    routes: list[BaseRoute] = [
        # They are tried in their order: first what is asked for most.
        *(route(f"{model}/infer", handlers.infer, "POST") for model in models),
        open_to_all("/v2/health/live", handlers.live),
        open_to_all("/v2/health/ready", handlers.ready),
        route("/v2", handlers.server),
        route("/v2/repository/index", handlers.index, "POST"),
        route("/v2/repository/models/{adapter}/load", handlers.load, "POST"),
        route("/v2/repository/models/{adapter}/unload", handlers.unload, "POST"),
        route("/metrics", handlers.metrics),
        *page_routes(endpoint, route),
        route("/v2/models/stats", handlers.all_stats),  # before the model of that name
    ]
    for model in models:
        routes += [
            route(model, handlers.metadata),
            route(f"{model}/ready", handlers.model_ready),
            route(f"{model}/config", handlers.config),
            route(f"{model}/stats", handlers.stats),
        ]

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            handlers.close()

    app = Starlette(
        routes=routes, exception_handlers=dict.fromkeys((404, 405), guard.missing), lifespan=running
    )
    app.router.redirect_slashes = False  # a redirect would quote the request's Host
    return app


class _Handlers:
    """What answers each path of the protocol; errors are raised, see `_Guarded`."""

    def __init__(self, endpoint: Endpoint, access: Access, bodies: Bodies) -> None:
        self._endpoint, self._access, self._bodies = endpoint, access, bodies
        self._settings, self._most_json = endpoint.settings, endpoint.most_json
        self._parser, self._aside = BodyParser(), Aside("hhdeploy-http")

    def close(self) -> None:
        """End what reads bodies and writes answers."""
        self._parser.close()
        self._aside.close()

    async def infer(self, request: Request) -> Response:
        length = header(request, _HEADER_LENGTH)
        # Without binary tensors all of it is JSON.
        most = self._settings.body_bytes
        most = most if length is not None else min(most, self._most_json)
        held = self._bodies.read(request, most)
        async with held as body:
            model = request.path_params["model"]
            version = request.path_params.get("version", "")
            message = await self._parser.request(model, version, body, length, self._most_json)
            if body.encoding:
                held.add(message.nbytes)
            with _Connected(request):
                response = await self._endpoint.infer(message)
        write = partial(write_response, response, message)
        content, head = await self._aside.run(response.nbytes, write)
        headers = {HEADER_LENGTH: str(head)} if head is not None else {}
        kind = "application/octet-stream" if head is not None else "application/json"
        return Response(content, media_type=kind, headers=headers)

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        there = await self._endpoint.ready()
        return _json({"ready": there}, 200 if there else 503)

    async def server(self, request: Request) -> Response:
        return _json(server_metadata())

    async def metadata(self, request: Request) -> Response:
        return _json(await self._endpoint.model_metadata(**request.path_params))

    async def model_ready(self, request: Request) -> Response:
        there = await self._endpoint.model_ready(**request.path_params)
        name = request.path_params["model"]
        return _json({"name": name, "ready": there}, 200 if there else 503)

    async def config(self, request: Request) -> Response:
        return _json(model_config(await self._endpoint.model_metadata(**request.path_params)))

    async def stats(self, request: Request) -> Response:
        return _json(await self._endpoint.model_statistics(**request.path_params))

    async def all_stats(self, request: Request) -> Response:
        # The operator's choice of a name; an adapter may be anybody's.
        if self._settings.model_name == "stats":
            return _json(await self._endpoint.model_metadata("stats"))
        return _json(await self._endpoint.model_statistics(""))

    async def index(self, request: Request) -> Response:
        async with self._bodies.read(request, _SMALL_BYTES) as body:
            content = await self._parser.content(body)
        ready_only = read_truth(content, "ready", False, "the request")
        return _json(await self._endpoint.repository_index(ready_only))

    async def load(self, request: Request) -> Response:
        self._access.check_loading(header(request, b"authorization"))
        # An uploaded file travels as base64, which is a third longer.
        most = self._settings.adapter_bytes // 3 * 4 + _SMALL_BYTES
        held = self._bodies.read(request, most)
        async with held as body:
            parameters = read_only_parameters(await self._parser.content(body))
            upload = read_upload(parameters, self._settings.adapter_bytes)
            if body.encoding and upload is not None:
                held.add(len(upload.config) + len(upload.tensors))
            loaded = await self._endpoint.load_adapter(request.path_params["adapter"], upload)
        return _json(loaded)

    async def unload(self, request: Request) -> Response:
        self._access.check_loading(header(request, b"authorization"))
        async with self._bodies.read(request, _SMALL_BYTES) as body:
            check_unload(read_only_parameters(await self._parser.content(body)))
        await self._endpoint.unload_adapter(request.path_params["adapter"])
        return Response(status_code=200)

    async def metrics(self, request: Request) -> Response:
        content, kind = await self._endpoint.metrics()
        return Response(content, headers={"content-type": kind})


class _Guard:
    """Errors as the protocol has them, one line in the log for each request, and its span."""

    def __init__(
        self, settings: ServeSettings, refused: Callable[[HhdeployError], None], bodies: Bodies
    ) -> None:
        """``refused``: is told of every request that is; ``bodies``: count answers as well."""
        self._refused, self._bodies = refused, bodies
        self._limit, self._hosts = settings.request_seconds, settings.hosts()
        self._logs = not settings.no_access_log
        self._tracing = Tracing()

    async def answer(
        self, request: Request, route: str, handler: Handler, check: Admission | None
    ) -> Response:
        """What a handler says, or the answer that its error makes; see `_Guarded`."""
        asked = _asked(request)
        method = request.method
        span = {"http.request.method": method, "http.route": route}
        with self._tracing.request(f"{method} {route}", request.headers, span) as traced:
            response = await self._answer(handler, check, request, asked)
            asked.said["status"] = traced["http.response.status_code"] = response.status_code
            traced["hhdeploy.request_id"] = asked.id
            if response.status_code >= 500:
                traced["error"] = str(asked.said.get("reason", ""))
        response.raw_headers.append((_REQUEST_ID, asked.id.encode()))
        if self._logs:
            asked.write(_LOG, logging.INFO if method == "POST" else logging.DEBUG)
        return response

    async def send(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an answer; see `send_answer`."""
        try:
            await send_answer(response, scope, receive, send, self._bodies.leaving)
        except BusyError as error:
            self._refused(error)
            await error_response(error)(scope, receive, send)

    async def missing(self, request: Request, error: Exception) -> Response:
        """The answer where there is no such path (404), or not by this method (405)."""
        where = f"{request.method} {request.scope['path'][:200]!r}"
        status = int(getattr(error, "status_code", 404))
        headers = getattr(error, "headers", None) or {}  # Allow, of a path that there is
        problem: RequestError
        if status == 404:
            known = "see /v2, /v2/models/M, /v2/models/M/infer, /v2/repository/index, /metrics"
            problem = NotFoundError(f"{where}: expected another path; {known}.")
        else:
            allowed = " or ".join(sorted(headers["Allow"].split(", ")))
            problem = RequestError(f"{where}: expected the method {allowed}.")
        self._refused(problem)
        response = error_response(problem)
        response.status_code = status
        response.headers.update(headers)
        return response

    async def _answer(
        self, handler: Handler, check: Admission | None, request: Request, asked: Asked
    ) -> Response:
        try:
            check_head(request, self._hosts)
            if check is not None:
                check(header(request, b"authorization"))
            # The body's bytes may come as slowly as the client likes: its time counts too.
            with Deadline(self._limit):
                return await handler(request)
        except HhdeployError as error:
            self._refused(error)
            asked.refused(error)
            return error_response(error)
        except ClientDisconnect:
            asked.said["reason"] = "the client left"
            return Response(status_code=499)  # nobody reads it; the log shows it
        except Exception:  # noqa: BLE001 - a bug: logged, and the client is told so
            _LOG.exception("request failed", extra=asked.said | {"request_id": asked.id})
            asked.said["reason"] = "internal error"
            return error_response(internal_error())


class _Guarded:
    """A handler that raises `HhdeployError` as an application that answers, at ``route``."""

    def __init__(
        self, guard: _Guard, route: str, handler: Handler, check: Admission | None = None
    ) -> None:
        """``check``: raises for who may not ask, by the header Authorization; None: all may."""
        self._guard, self._route = guard, route
        self._handler, self._check = handler, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        response = await self._guard.answer(request, self._route, self._handler, self._check)
        await self._guard.send(response, scope, receive, send)


def _asked(request: Request) -> Asked:
    peer = None
    if (client := request.scope.get("client")) is not None:
        host, port = client
        peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = request.scope["path"][:200]
    # One of several is as good as none: it is in the log alone, and no reason to refuse.
    ids = [value for name, value in request.scope["headers"] if name == _REQUEST_ID]
    given = ids[0].decode("latin-1") if len(ids) == 1 else None
    return Asked(peer, given, method=request.method, path=path)


def error_response(error: HhdeployError) -> Response:
    """``{"error": message}`` with the status that says the same."""
    status = error.status if isinstance(error, RequestError) else 400
    response = _json({"error": shortened(str(error))}, status)
    if status == 429:
        response.headers["retry-after"] = "1"
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


class _Connected:
    """``with _Connected(request):`` ends the block with `ClientDisconnect` if the client leaves.

    The block's own task is cancelled, as `Deadline` does it, and for the same reason.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._gone = request, False
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watcher.cancel()
        task, self._task = self._task, None
        if self._gone and kind is not None and issubclass(kind, asyncio.CancelledError):
            getattr(task, "uncancel", int)()  # Python 3.10 does not count
            raise ClientDisconnect from None

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._task is not None:
            self._task.cancel()


def _json(content: Any, status: int = 200) -> Response:
    return Response(compact_json(content), status, media_type="application/json")
