"""Inference over gRPC for the load test: the bodies of HTTP's client, sent as messages."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hhdeploy.errors import require
from hhdeploy.loadtest.client import Client
from hhdeploy.loadtest.judge import Reply


class GrpcClient(Client):
    """A `Client` whose inferences go over gRPC, each of its connections in turn."""

    def __init__(
        self, url: str, target: str, model: str, token: str, *, connections: int, seconds: float
    ):
        """``target``: ``host:port`` of gRPC; the others as of `Client`."""
        super().__init__(url, model, token, connections=connections, seconds=seconds)
        self._grpc = require("grpc", "serve", "the load test")
        self._pb = require("tritonclient.grpc.service_pb2", "serve", "the load test")
        stubs = require("tritonclient.grpc.service_pb2_grpc", "serve", "the load test")
        # Else all of one process share one connection.
        own = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            self._grpc.aio.insecure_channel(target, options=own) for _ in range(connections)
        ]
        self._turns = itertools.cycle(
            [stubs.GRPCInferenceServiceStub(channel) for channel in self._channels]
        )
        self._model, self._seconds = model, seconds

    async def close(self) -> None:
        """See `Client.close`."""
        for channel in self._channels:
            await channel.close()
        await super().close()

    async def infer(self, body: bytes, json_length: int) -> Reply:
        """Ask; see `Requests.body`. The reply is as HTTP's would be.

        A call that failed has status 0, but for an adapter that is not there.
        """
        try:
            answer = await next(self._turns).ModelInfer(
                self._message(body, json_length), timeout=self._seconds
            )
        except self._grpc.aio.AioRpcError as error:
            if error.code() is self._grpc.StatusCode.DEADLINE_EXCEEDED:
                return Reply(None)
            status = 404 if error.code() is self._grpc.StatusCode.NOT_FOUND else 0
            return Reply(status, f"{error.code().name}: {error.details()}".encode())
        outputs = [
            {"name": o.name, "datatype": o.datatype, "shape": list(o.shape)} for o in answer.outputs
        ]
        content = json.dumps({"outputs": outputs}).encode()
        return Reply(200, b"".join([content, *answer.raw_output_contents]), len(content))

    def _message(self, body: bytes, json_length: int) -> Any:
        content = json.loads(body[:json_length])
        message = self._pb.ModelInferRequest(
            model_name=self._model, raw_input_contents=[body[json_length:]]
        )
        (tensor,) = content["inputs"]
        message.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        message.parameters["adapter"].string_param = content["parameters"]["adapter"]
        for output in content["outputs"]:
            message.outputs.add(name=output["name"])
        return message
