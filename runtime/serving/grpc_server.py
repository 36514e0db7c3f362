"""The gRPC side (placeholder, written next)."""

from __future__ import annotations

from hhdeploy.runtime.serving.service import Service


class GrpcServer:
    port = 0

    async def stop(self, grace: float) -> None: ...


async def start_grpc(service: Service, host: str, port: int) -> GrpcServer:
    return GrpcServer()
