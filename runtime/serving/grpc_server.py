"""The gRPC side (placeholder, written next)."""

from __future__ import annotations

from hhdeploy.runtime.serving.endpoint import Endpoint


class GrpcServer:
    port = 0

    async def stop(self, grace: float) -> None: ...


async def start_grpc(endpoint: Endpoint, host: str, port: int) -> GrpcServer:
    return GrpcServer()
