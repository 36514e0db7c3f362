"""The HTTP side: Open Inference Protocol v2, metrics, and the page, on Starlette.

    GET  /v2   /v2/health/live   /v2/health/ready
    GET  /v2/models/M [/versions/1]            metadata        .../ready   .../config   .../stats
    GET  /v2/models/stats                      of all of them
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
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

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
    ForbiddenError,
    RequestError,
)
from hhdeploy.runtime.serving.http.arrival import Bodies
from hhdeploy.runtime.serving.http.codec import (
    HEADER_LENGTH,
    json_bytes,
    json_length,
    read_parameters,
    read_request,
    read_truth,
    write_response,
)
from hhdeploy.runtime.serving.http.page import Handler, page_routes
from hhdeploy.runtime.serving.http.parsing import SMALL, Parser
from hhdeploy.runtime.serving.messages import Deadline

_LOG = logging.getLogger("hhdeploy.serve.http")
# Of a request that says little, e.g. to unload an adapter.
_SMALL_BYTES = 1 << 20
# Of an error's text, which may quote an adapter's configuration.
_MOST_TEXT = 4000


def http_app(endpoint: Endpoint, token: str | None) -> Starlette:
    """The application; what answers is started and stopped by whoever serves it.

    Args:
        endpoint: what answers.
        token: what loading adapters must present; None: nobody may.
    """
    settings = endpoint.settings
    bodies = Bodies(settings.bodies_bytes)
    parser, most_json = Parser(), endpoint.most_json

    async def infer(request: Request) -> Response:
        length = request.headers.get(HEADER_LENGTH)
        # Without binary tensors all of it is JSON.
        most = settings.body_bytes if length is not None else min(settings.body_bytes, most_json)
        async with bodies.read(request, most) as body:
            model = request.path_params["model"]
            version = request.path_params.get("version", "")
            if json_length(body, length, most_json) <= SMALL:
                message = read_request(model, version, body, length)
            else:
                message = await parser.request(model, version, body, length)
            async with _while_connected(request):
                response = await endpoint.infer(message)
        content, head = write_response(response, message)
        headers = {HEADER_LENGTH: str(head)} if head is not None else {}
        kind = "application/octet-stream" if head is not None else "application/json"
        return Response(content, media_type=kind, headers=headers)

    async def live(request: Request) -> Response:
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        there = await endpoint.ready()
        return _json({"ready": there}, 200 if there else 503)

    async def server(request: Request) -> Response:
        return _json(server_metadata())

    async def metadata(request: Request) -> Response:
        return _json(await endpoint.model_metadata(**request.path_params))

    async def model_ready(request: Request) -> Response:
        there = await endpoint.model_ready(**request.path_params)
        name = request.path_params["model"]
        return _json({"name": name, "ready": there}, 200 if there else 503)

    async def config(request: Request) -> Response:
        return _json(model_config(await endpoint.model_metadata(**request.path_params)))

    async def stats(request: Request) -> Response:
        return _json(await endpoint.model_statistics(**request.path_params))

    async def all_stats(request: Request) -> Response:
        return _json(await endpoint.model_statistics(""))

    async def index(request: Request) -> Response:
        async with bodies.read(request, _SMALL_BYTES) as body:
            content = await parser.content(body)
        ready_only = read_truth(content, "ready", False, "the request")
        return _json(await endpoint.repository_index(ready_only))

    async def load(request: Request) -> Response:
        check_token(token, request.headers.get("authorization"))
        # An uploaded file travels as base64, which is a third longer.
        most = settings.adapter_bytes // 3 * 4 + _SMALL_BYTES
        async with bodies.read(request, most) as body:
            parameters = read_parameters(await parser.content(body), "the request")
            upload = read_upload(parameters, settings.adapter_bytes)
            await endpoint.load_adapter(request.path_params["adapter"], upload)
        return Response(status_code=200)

    async def unload(request: Request) -> Response:
        check_token(token, request.headers.get("authorization"))
        async with bodies.read(request, _SMALL_BYTES):
            pass
        await endpoint.unload_adapter(request.path_params["adapter"])
        return Response(status_code=200)

    async def metrics(request: Request) -> Response:
        content, kind = await endpoint.metrics()
        return Response(content, headers={"content-type": kind})

    hosts = settings.hosts()

    def guarded(handler: Handler) -> Handler:
        return _guarded(handler, settings.request_seconds, hosts, endpoint.refused)

    routes: list[BaseRoute] = [
        Route("/v2", guarded(server)),
        Route("/v2/health/live", guarded(live)),
        Route("/v2/health/ready", guarded(ready)),
        Route("/v2/repository/index", guarded(index), methods=["POST"]),
        Route("/v2/repository/models/{adapter}/load", guarded(load), methods=["POST"]),
        Route("/v2/repository/models/{adapter}/unload", guarded(unload), methods=["POST"]),
        Route("/metrics", guarded(metrics)),
        *page_routes(endpoint, guarded),
    ]
    routes.append(Route("/v2/models/stats", guarded(all_stats)))  # before the model of that name
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route(model, guarded(metadata)),
            Route(f"{model}/ready", guarded(model_ready)),
            Route(f"{model}/config", guarded(config)),
            Route(f"{model}/stats", guarded(stats)),
            Route(f"{model}/infer", guarded(infer), methods=["POST"]),
        ]

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            parser.close()

    app = Starlette(
        routes=routes, exception_handlers={404: _missing, 405: _missing}, lifespan=running
    )
    app.router.redirect_slashes = False  # a redirect would quote the request's Host
    return app


def _guarded(
    handler: Handler,
    limit: float,
    hosts: Collection[str] | None,
    refused: Callable[[HhdeployError], None],
) -> Handler:
    """Errors as the protocol has them, and one line in the log for each request."""

    async def guarded(request: Request) -> Response:
        begin = time.perf_counter()
        try:
            _check_host(request.headers.get("host", ""), hosts)
            # The body's bytes may come as slowly as the client likes: its time counts too.
            with Deadline(limit):
                response = await handler(request)
        except HhdeployError as error:
            refused(error)
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; the log shows it
        except Exception:  # noqa: BLE001 - a bug: logged, and the client is told so
            _LOG.exception("request failed", extra={"path": request.scope["path"][:200]})
            response = error_response(FailedError("internal error; the server's log has more."))
        level = logging.INFO if request.method == "POST" else logging.DEBUG
        if _LOG.isEnabledFor(level):
            _LOG.log(
                level,
                "request",
                extra={
                    "method": request.method,
                    "path": request.scope["path"][:200],
                    "status": response.status_code,
                    "ms": round(1e3 * (time.perf_counter() - begin), 3),
                },
            )
        return response

    return guarded


def _check_host(host: str, hosts: Collection[str] | None) -> None:
    """Refuse a page whose name was pointed at this machine: its requests have its name."""
    if hosts is None:
        return
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in hosts:
        raise ForbiddenError(
            f"Host: expected one of {', '.join(sorted(hosts))}, found {host[:200]!r}. The operator "
            "can allow another among `allowed_hosts`."
        )


def error_response(error: HhdeployError) -> Response:
    """``{"error": message}`` with the status that says the same."""
    status = error.status if isinstance(error, RequestError) else 400
    text = str(error)
    if len(text) > _MOST_TEXT:
        text = f"{text[: _MOST_TEXT - 3]}..."
    response = _json({"error": text}, status)
    if status == 429:
        response.headers["retry-after"] = "1"
    return response


async def _missing(request: Request, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 404))
    known = "see /v2, /v2/models/M, /v2/models/M/infer, /v2/repository/index, /metrics"
    path = request.scope["path"][:200]
    response = _json({"error": f"{request.method} {path!r}: expected another; {known}."}, status)
    response.headers.update(getattr(error, "headers", None) or {})  # Allow
    return response


@asynccontextmanager
async def _while_connected(request: Request) -> AsyncIterator[None]:
    """Ends the block with `ClientDisconnect` if the client leaves first.

    The block's own task is cancelled, as `Deadline` does it, and for the same reason.
    """
    task, gone = asyncio.current_task(), False

    async def left() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        if task is not None:
            task.cancel()

    watcher = asyncio.ensure_future(left())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        getattr(task, "uncancel", int)()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()


def _json(content: Any, status: int = 200) -> Response:
    return Response(json_bytes(content), status, media_type="application/json")
