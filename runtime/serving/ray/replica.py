"""One of several replicas: an open session behind a queue, as one server has it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray import serve

from hhdeploy.bundle.manifest import BANK_FILE
from hhdeploy.files.writing import json_bytes, sha256_of_bytes
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.errors import FailedError, NotFoundError
from hhdeploy.runtime.serving.logs import log_as_json
from hhdeploy.runtime.serving.ray.registry import Follower, Latest, Served
from hhdeploy.runtime.serving.ray.settings import RaySettings
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.session import Session, open_session


class Replica(LocalEndpoint):
    """An `Endpoint` that Ray Serve starts, asks, watches and stops.

    A deployment of Ray Serve; its methods belong to one event loop.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: RaySettings, registry: Any
    ) -> None:
        """Open the bundle, join the registry, catch up with the others, and be ready."""
        log_as_json(settings.log_level, "hhdeploy")
        session = open_session(settings.bundle, **settings.session_options())
        super().__init__(Service(session, settings))
        self._followed = Follower(registry, self._do, served_by(session, settings))
        self._judged = (0, 0)
        missed = await self._followed.join()
        await self._service.start()
        for change in missed:
            if change.unloaded:  # what was loaded is found in the fleet directory
                await self._do(change)
        self._following = asyncio.create_task(self._followed.follow())

    async def __del__(self) -> None:
        """Ray Serve calls this once what was taken is answered."""
        self._following.cancel()
        await self._service.stop()

    async def check_health(self) -> None:
        """Raises where a new replica would do better: Ray Serve then starts one instead.

        Raises:
            HhdeployError: the registry is no longer followed; or requests failed in the session
                since the last call, and none was answered.
        """
        if self._following.done():
            raise FailedError("the registry is no longer followed.") from (
                None if self._following.cancelled() else self._following.exception()
            )
        metrics = self._service.metrics
        failed, answered = self._judged
        self._judged = (metrics.failures["BACKEND"], metrics.success)
        if metrics.failures["BACKEND"] > failed and metrics.success == answered:
            raise FailedError("every request since the last look failed in the session.")

    def record_routing_stats(self) -> dict[str, Any]:
        """What `AdapterRouter` wants to know: the adapters in a row now."""
        return {"adapters": [entry.name for entry in self._service.entries()]}

    async def named_metrics(self) -> tuple[str, bytes]:
        """Its name, which a restart changes, and what Prometheus scrapes."""
        content, _ = await self.metrics()
        return serve.get_replica_context().replica_tag, content

    async def look(self) -> None:
        """Look through the fleet directory now. Raises `OSError`: see `Fleet.refresh`."""
        if self._service.fleet is not None:
            await self._service.fleet.refresh()

    async def _do(self, change: Latest) -> None:
        fleet = self._fleet(change.name)
        if not change.unloaded:
            await fleet.load(change.name)
            return
        try:
            await fleet.unload(change.name)
        except NotFoundError:
            # Another replica has found it on disk and this one has not looked yet.
            await fleet.refresh()
            with suppress(NotFoundError):  # it is gone from the disk: nobody can ask for it
                await fleet.unload(change.name)


def served_by(session: Session, settings: RaySettings) -> Served:
    """What answers depend on in a bundle, as it was opened: its adapters, their rows, its graph.

    What a later `calibrate` or `verify` adds is no part of it.
    """
    manifest = session.bundle.manifest
    adapters = [replace(entry, verified=True).to_json() for entry in manifest.adapters]
    bank = manifest.files.get(manifest.named(BANK_FILE))
    content = json_bytes([adapters, bank, manifest.graph_digest(session.precision)])
    sets = {name: sorted(getattr(settings, name)) for name in ("pinned", "allowed_hosts")}
    told = vars(settings) | sets  # which each process has in another order
    return Served(str(settings.bundle), sha256_of_bytes(content), repr(told))
