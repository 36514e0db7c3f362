"""Thousands of requests that are none: refused, and the server answers as before."""

from __future__ import annotations

import io
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from PIL import Image
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.runtime.session import open_session
from tests.runtime.serving.grpc_requests import INFER, PATIENCE, message, own
from tests.support import images

pytestmark = pytest.mark.own_process

TEXTS = ["", "alpha", "images", "adapters", "logits", "labels", "FP32", "BYTES", "\0", "ü" * 300,
         "classification", "timeout", "priority", "../alpha", "9" * 40]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 31, 32, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1]
REALS = [0.0, -1.5, 1e38, 1e-45, float("inf"), float("-inf"), float("nan")]
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def spoilt_value(field: FieldDescriptor, random: np.random.Generator) -> Any:
    """A value of a scalar field that its type allows."""
    kind = field.cpp_type
    if kind in INTEGERS:
        low, high = INTEGERS[kind]
        return max(low, min(high, NUMBERS[random.integers(len(NUMBERS))]))
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return REALS[random.integers(len(REALS))]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return bool(random.integers(2))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.bytes(int(random.integers(40)))
    return TEXTS[random.integers(len(TEXTS))]


def spoil(found: Any, random: np.random.Generator) -> None:
    """Change one field of a message, or of a message in it."""
    field = found.DESCRIPTOR.fields[random.integers(len(found.DESCRIPTOR.fields))]
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        value = getattr(found, field.name)[TEXTS[random.integers(len(TEXTS))]]
        spoil(value, random)
    elif entry is not None and field.is_repeated:
        items = getattr(found, field.name)
        if not len(items) or random.integers(4) == 0:
            items.add()
        elif random.integers(6) == 0:
            del items[random.integers(len(items))]
        if len(items):
            spoil(items[random.integers(len(items))], random)
    elif entry is not None:
        spoil(getattr(found, field.name), random)
    elif field.is_repeated:
        items = getattr(found, field.name)
        if len(items) and random.integers(2):
            items[random.integers(len(items))] = spoilt_value(field, random)
        else:
            items.extend(spoilt_value(field, random) for _ in range(random.integers(1, 4)))
    else:
        setattr(found, field.name, spoilt_value(field, random))


def spoilt(good: list[pb.ModelInferRequest], random: np.random.Generator) -> bytes:
    """A request with wrong fields, with wrong bytes, cut, or no request at all."""
    found = pb.ModelInferRequest()
    found.CopyFrom(good[random.integers(len(good))])
    way = random.integers(10)
    if way < 6:
        for _ in range(random.integers(1, 5)):
            spoil(found, random)
        return found.SerializeToString()
    content = bytearray(found.SerializeToString())
    if way < 8:  # most of the bytes are pixels: the first ones are not
        for _ in range(random.integers(1, 8)):
            content[random.integers(min(len(content), 120))] = random.integers(256)
        return bytes(content)
    if way < 9:
        return bytes(content[: random.integers(len(content))])
    return random.bytes(int(random.integers(300)))


def test_bytes_that_are_no_message_are_refused_by_every_method(server):
    random = np.random.default_rng(7)
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    before = len(server.records())
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED"}
    with grpc.insecure_channel(server.grpc) as channel:
        for method in service.methods:
            if method.client_streaming:
                continue
            call = channel.unary_unary(f"/{service.full_name}/{method.name}")
            rubbish = [random.bytes(int(random.integers(1, 60))) for _ in range(20)]
            calls = [call.future(content, timeout=PATIENCE) for content in rubbish]
            assert {found.code().name for found in calls} <= allowed, method.name
    assert not [r for r in server.records()[before:] if r["level"] in ("ERROR", "CRITICAL")]


def test_rubbish_is_refused_and_harms_nothing(server, branches):
    random = np.random.default_rng(2026)
    x = images(2)
    several = message(x)
    del several.parameters["adapter"]
    several.inputs.add(name="adapters", datatype="BYTES", shape=[2])
    several.raw_input_contents.append(b"\5\0\0\0alpha\5\0\0\0gamma")
    several.outputs.add(name="labels")
    several.outputs.add(name="logits").parameters["classification"].int64_param = 2
    encoded = pb.ModelInferRequest(model_name="gamma")
    encoded.inputs.add(name="images", datatype="BYTES", shape=[1])
    picture = io.BytesIO()
    Image.new("RGB", (20, 30), (9, 99, 199)).save(picture, "PNG")
    encoded.inputs[0].contents.bytes_contents.append(picture.getvalue())
    good = [message(x), several, encoded]
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
    before = len(server.records())
    counts: dict[str, int] = {}
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(INFER)
        for _ in range(100):
            calls = [call.future(spoilt(good, random), timeout=PATIENCE) for _ in range(20)]
            for found in calls:
                code = found.code().name
                counts[code] = counts.get(code, 0) + 1
        assert set(counts) <= allowed, counts
        # Changes that mean nothing are answered; most are noticed.
        assert counts["INVALID_ARGUMENT"] > sum(counts.values()) // 2, counts
        answer = pb.ModelInferResponse.FromString(call(good[0].SerializeToString()))
    found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, -1)
    with open_session(branches, device="cpu", threads=1) as session:
        assert np.array_equal(found, own("alpha", session.run(x, "alpha")))
    assert server.process.poll() is None
    assert not [r for r in server.records()[before:] if r["level"] in ("ERROR", "CRITICAL")]
