"""What a message of gRPC holds is counted before it is parsed; much typed is read elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.runtime.serving.errors import RequestError, TooLargeError
from hhdeploy.runtime.serving.grpc.codec import read_request
from hhdeploy.runtime.serving.grpc.parsing import Unread, parse, read_inference
from hhdeploy.runtime.serving.processes.parsing import Parser
from tests.runtime.serving.grpc_requests import PATIENCE, message
from tests.support import images

MOST = 64 << 20
MANY = 1 << 20


def field(number: int, content: bytes) -> bytes:
    """Of a length and so many bytes."""
    left, length = len(content), bytearray()
    while left >= 128:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes((number << 3 | 2, *length, left)) + content


def typed(datatype: str, contents: bytes) -> bytes:
    """An input with typed contents."""
    named = field(1, b"images") + field(2, datatype.encode()) + field(3, b"\1")
    return field(5, named + field(5, contents))


MANY_FIELDS = {
    "inputs": (pb.ModelInferRequest, field(5, b"") * MANY),
    "outputs": (pb.ModelInferRequest, field(6, b"") * MANY),
    "raw contents": (pb.ModelInferRequest, field(7, b"") * MANY),
    "parameters": (pb.ModelInferRequest, field(4, b"") * MANY),
    "parameters of an input": (pb.ModelInferRequest, field(5, field(4, b"") * MANY)),
    "a shape": (pb.ModelInferRequest, field(5, field(3, b"\1" * MANY))),
    "texts": (pb.ModelInferRequest, typed("BYTES", field(8, b"") * MANY)),
    "numbers by themselves": (pb.ModelInferRequest, typed("UINT8", b"\x18\1" * MANY)),
    "what nobody knows": (pb.ModelInferRequest, b"\x78\1" * MANY),
    "files of a load": (pb.RepositoryModelLoadRequest, field(3, b"") * MANY),
    "names": (pb.ModelStatisticsRequest, field(1, b"") * MANY),
    "an index": (pb.RepositoryIndexRequest, b"\x10\1" * MANY),
}


@pytest.mark.parametrize(("kind", "raw"), MANY_FIELDS.values(), ids=MANY_FIELDS)
def test_many_fields_are_refused_before_they_are_parsed(kind, raw, monkeypatch):
    monkeypatch.setattr(kind, "FromString", None)
    with pytest.raises(RequestError, match="has more than 16384 fields"):
        parse(kind, raw, MOST)


@pytest.mark.parametrize(
    "raw",
    {
        "group": b"\x2b" + field(6, b"") + b"\x2c",
        "length": b"\x2a\x05abc",
        "length in an input": field(5, b"\x0a\x7fabc"),
        "number": b"\xff" * 11,
        "end of a number": b"\x08\x80",
        "eight bytes": b"\x09abc",
        "large tag": b"\xb2\x80\x80\x80\x10\0",
    }.values(),
)
def test_bytes_that_are_no_message(raw):
    with pytest.raises(RequestError, match=r"no message inference\.ModelInferRequest"):
        parse(pb.ModelInferRequest, raw, MOST)


def test_what_is_usual_is_parsed_as_it_is():
    batch = message(images(1))
    texts = pb.ModelInferRequest()
    texts.inputs.add(name="adapters", datatype="BYTES", shape=[16000])
    texts.inputs[0].contents.bytes_contents.extend([b"alpha"] * 16000)
    unknown = pb.ModelInferRequest.FromString(b"\x79abcdefgh\x7dabcd" + field(15, b"\0" * 99_999))
    for expected in (batch, texts, unknown, pb.ModelInferRequest()):
        assert parse(pb.ModelInferRequest, expected.SerializeToString(), MOST) == expected
    with pytest.raises(TooLargeError, match="is 70 bytes, at most 60"):
        parse(pb.ModelInferRequest, field(15, b"\0" * 68), 60)


def large() -> pb.ModelInferRequest:
    """A batch as numbers one by one, and what stands beside it."""
    values = np.random.default_rng(5).standard_normal((2, 3, 64, 64)).astype("f4")
    found = pb.ModelInferRequest(model_name="tiny", model_version="1", id="seven")
    found.inputs.add(name="images", datatype="FP32", shape=values.shape)
    found.inputs[0].contents.fp32_contents.extend(values.ravel().tolist())
    found.outputs.add(name="logits").parameters["classification"].int64_param = 3
    found.parameters["adapter"].string_param = "alpha"
    return found


def read(*asked: pb.ModelInferRequest, most: int = MOST) -> tuple[list[object], Callable[[], bool]]:
    """What becomes of messages, and whether there was a process."""

    async def scene() -> tuple[list[object], bool]:
        parser = Parser()
        try:
            found: list[object] = []
            for each in asked:
                request = parse(pb.ModelInferRequest, each.SerializeToString(), MOST)
                try:
                    found.append(await read_inference(parser, request, most))
                except RequestError as error:
                    found.append(error)
            return found, parser._process._process is not None
        finally:
            await asyncio.to_thread(parser.close)

    return asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_much_typed_is_read_elsewhere_as_little_is():
    wrong = large()
    wrong.inputs[0].shape[0] = 3
    (found, refused), elsewhere = read(large(), wrong)
    expected = read_request(large())
    assert elsewhere
    for name in ("model", "version", "id", "outputs", "parameters"):
        assert getattr(found, name) == getattr(expected, name)
    array = found.inputs["images"].array
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected.inputs["images"].array)
    with pytest.raises(RequestError) as said:
        read_request(wrong)
    assert (type(refused), str(refused)) == (RequestError, str(said.value))
    assert not read(message(images(1)))[1]


def test_of_what_is_read_elsewhere_name_and_id_are_known():
    found = parse(pb.ModelInferRequest, large().SerializeToString(), MOST)
    assert isinstance(found, Unread)
    assert (found.model_name, found.id, found.typed) == ("tiny", "seven", 4 * 2 * 3 * 64 * 64)


def test_typed_contents_have_the_limit_of_json():
    (refused,), elsewhere = read(large(), most=90_000)
    assert not elsewhere and isinstance(refused, TooLargeError)
    assert "are 98304 bytes, at most 90000 are taken" in str(refused)
