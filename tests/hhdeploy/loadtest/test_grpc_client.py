"""Inference over gRPC for the load test: replies as HTTP's would be."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
from tritonclient.grpc import service_pb2_grpc

from hhdeploy.loadtest.client import Requests
from hhdeploy.loadtest.grpc_client import GrpcClient

CODES = {"away": grpc.StatusCode.NOT_FOUND, "broken": grpc.StatusCode.INTERNAL}


class Refusing(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with the status that an adapter's name stands for."""

    async def ModelInfer(self, request, context):  # noqa: N802 - as the protocol calls it
        name = request.parameters["adapter"].string_param
        await context.abort(CODES[name], f"no {name}")


def test_an_adapter_that_is_not_there_is_a_404_and_no_broken_connection():
    bodies = Requests(list(CODES), np.zeros((1, 3, 7, 5), np.float32), 1)

    async def ask():
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Refusing(), server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        client = GrpcClient("http://nowhere", target, "m", "t", connections=1, seconds=60)
        try:
            return [await client.infer(*bodies.body(i, [0])) for i in range(len(CODES))]
        finally:
            await client.close()
            await server.stop(None)

    away, broken = asyncio.run(ask())
    assert (away.status, away.body) == (404, b"NOT_FOUND: no away")
    assert (broken.status, broken.body) == (0, b"INTERNAL: no broken")
