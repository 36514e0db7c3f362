"""The page at `/`: health, adapters, latency, and a playground."""

from __future__ import annotations

from starlette.routing import BaseRoute

from hhdeploy.runtime.serving.endpoint import Endpoint


def page_routes(endpoint: Endpoint) -> list[BaseRoute]:
    """Routes of the page and of what it reads."""
    return []
