"""The page at `/`, for people: health, adapters, latency, and a playground.

It is three files that load nothing else, and reads `/status` and the protocol's own infer.
Whatever an adapter or a class is called, the policy lets no markup of it come alive: scripts and
styles are these files alone, and the browser refuses to make elements of strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hhdeploy.runtime.serving.endpoint import Endpoint
from hhdeploy.runtime.serving.http.codec import compact_json

Handler = Callable[[Request], Awaitable[Response]]

HEADERS: Final = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_FILES: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def page_routes(endpoint: Endpoint, route: Callable[[str, Handler], Route]) -> list[BaseRoute]:
    """Routes of the page and of what it reads.

    Args:
        endpoint: whose status is shown.
        route: what guards a handler, and makes an answer of its errors.
    """

    async def status(request: Request) -> Response:
        content = compact_json(await endpoint.status())
        headers = {**HEADERS, "cache-control": "no-store"}
        return Response(content, media_type="application/json", headers=headers)

    return [route("/status", status), *(_file_route(path) for path in _FILES)]


def _file_route(path: str) -> Route:
    name, kind = _FILES[path]
    content = files(__package__).joinpath(name).read_bytes()
    headers = {**HEADERS, "cache-control": "no-cache"}

    async def file(request: Request) -> Response:
        return Response(content, media_type=kind, headers=headers)

    return Route(path, file)
