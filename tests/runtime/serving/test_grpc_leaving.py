"""Answers over gRPC that are not read: how much a server holds of them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub as Stub

from hhdeploy.runtime.serving.errors import BusyError
from hhdeploy.runtime.serving.grpc import leaving
from hhdeploy.runtime.serving.messages import FP32, InferRequest, InferResponse, Tensor
from tests.runtime.serving.grpc_requests import INFER, message
from tests.runtime.serving.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    block,
    call,
    frame,
)
from tests.runtime.serving.test_grpc_front import connected, until_closed
from tests.runtime.serving.test_grpc_server import Endpoint, failing, served, soon
from tests.support import images

pytestmark = pytest.mark.own_process
LARGE = 1 << 20
# That nothing may be sent to it.
NO_WINDOW = frame(SETTINGS, 0, 0, b"\0\4" + bytes(4))


class Talker(Endpoint):
    """Answers at length."""

    async def infer(self, request: InferRequest) -> InferResponse:
        tensor = Tensor("logits", FP32, np.zeros((1, LARGE // 4), np.float32))
        return InferResponse(request.model, request.id, (tensor,))


def infers(stub: Stub, path: str) -> Any:
    """An answer, by either method."""
    if path == INFER:
        return stub.ModelInfer(message(images(1)))
    return anext(aiter(stub.ModelStreamInfer(iter([message(images(1))]))))


@pytest.mark.parametrize("path", [INFER, INFER.replace("ModelInfer", "ModelStreamInfer")])
def test_answers_that_nobody_reads_make_room_for_others(monkeypatch, path):
    monkeypatch.setattr(leaving, "SLOW_SECONDS", 1e9)
    content = message(images(1)).SerializeToString()
    asked = b"\0" + len(content).to_bytes(4, "big") + content
    attack = PREFACE + NO_WINDOW + frame(HEADERS, END_HEADERS, 1, block(call(path.encode())))
    attack += frame(DATA, END_STREAM, 1, asked)

    async def run() -> None:
        endpoint = Talker(bodies_bytes=LARGE * 3 // 2)
        async with (
            served(endpoint) as (server, stub),
            connected(server, attack) as (reader, _),
        ):
            there = server._leaving._there
            while not there:
                await asyncio.sleep(0.001)
            ((number, one),) = there.items()
            assert LARGE < one.size < LARGE + 10_000
            # On its way, as far as is known: nobody is cut off.
            if path == INFER:
                code, said = await failing(infers(stub, path))
                assert code == "UNAVAILABLE"
            else:
                answer = await soon(infers(stub, path))
                said = answer.error_message
                assert answer.infer_response.id == "seven"
            assert said.startswith(f"the answers that clients have not taken yet are {one.size}")
            assert [type(e) for e in endpoint.refusals] == [BusyError]
            assert list(server._leaving._there) == [number]
            monkeypatch.setattr(leaving, "SLOW_SECONDS", 0.0)
            answer = await soon(infers(stub, path))
            found = answer if path == INFER else answer.infer_response
            assert len(found.raw_output_contents[0]) == LARGE
            await soon(until_closed(reader))
            while server._leaving._there:
                await asyncio.sleep(0.001)

    asyncio.run(soon(run()))
