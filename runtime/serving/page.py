"""The page at `/`: health, adapters, latency, and a playground."""

from __future__ import annotations

from starlette.routing import BaseRoute

from hhdeploy.runtime.serving.service import Service


def page_routes(service: Service) -> list[BaseRoute]:
    """Routes of the page and of what it reads."""
    return []
