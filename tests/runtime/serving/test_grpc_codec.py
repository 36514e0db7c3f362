"""Protobuf messages to requests, and answers to protobuf messages."""

from __future__ import annotations

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.grpc.codec import read_request, write_response
from hhdeploy.runtime.serving.messages import DTYPES, InferResponse, Tensor, Wanted, bytes_array

TYPED = {
    "BOOL": ("bool_contents", [True, False, True]),
    "UINT8": ("uint_contents", [0, 7, 255]),
    "UINT16": ("uint_contents", [0, 7, 65535]),
    "UINT32": ("uint_contents", [0, 7, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 7, 2**64 - 1]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-(2**15), 0, 7]),
    "INT32": ("int_contents", [-(2**31), 0, 7]),
    "INT64": ("int64_contents", [-(2**63), 0, 7]),
    "FP32": ("fp32_contents", [0.5, -1.25, 3.0]),
    "FP64": ("fp64_contents", [0.5, -1.25, 1e300]),
    "BYTES": ("bytes_contents", [b"", b"alpha\0", b"\xff"]),
}


def request(*inputs: pb.ModelInferRequest.InferInputTensor, **fields) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="tiny", inputs=inputs, **fields)


def tensor(name: str, datatype: str, *shape: int, **contents) -> pb.ModelInferRequest:
    typed = pb.InferTensorContents(**contents) if contents else None
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, contents=typed
    )


def refused(message: pb.ModelInferRequest) -> str:
    with pytest.raises(RequestError) as caught:
        read_request(message)
    return str(caught.value)


def test_raw_inputs_are_views_of_their_bytes():
    pixels = np.arange(30, dtype="<f4").reshape(2, 5, 3)
    names = bytes_array([b"alpha", b"\0\xff"])
    raws = [pixels.tobytes(), serialize_byte_tensor(names).item()]
    message = request(
        tensor("images", "FP32", 2, 5, 3),
        tensor("adapters", "BYTES", 2),
        raw_input_contents=raws,
        model_version="1",
        id="seven",
    )
    read = read_request(message)
    assert (read.model, read.version, read.id) == ("tiny", "1", "seven")
    assert list(read.inputs) == ["images", "adapters"]
    found = read.inputs["images"].array
    assert found.dtype == np.float32 and found.shape == (2, 5, 3)
    assert np.array_equal(found, pixels)
    assert not found.flags.owndata and not found.flags.writeable
    assert read.inputs["adapters"].array.tolist() == [b"alpha", b"\0\xff"]


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents(datatype):
    field, values = TYPED[datatype]
    read = read_request(request(tensor("x", datatype, 3, 1, **{field: values})))
    found = read.inputs["x"]
    assert found.datatype == datatype and found.array.shape == (3, 1)
    assert found.array.dtype == DTYPES[datatype]
    assert found.array.reshape(-1).tolist() == values


def test_every_type_but_fp16_has_typed_contents():
    assert set(DTYPES) - set(TYPED) == {"FP16"}
    assert "raw_input_contents" in refused(request(tensor("x", "FP16", 1, fp32_contents=[1.0])))


def test_an_empty_tensor_needs_no_contents():
    assert read_request(request(tensor("x", "FP32", 0, 4))).inputs["x"].array.shape == (0, 4)


def test_parameters_of_every_kind():
    message = request()
    message.parameters["adapter"].string_param = "alpha"
    message.parameters["flag"].bool_param = True
    message.parameters["timeout"].int64_param = -5
    message.parameters["priority"].uint64_param = 2**64 - 1
    message.parameters["share"].double_param = 0.25
    assert read_request(message).parameters == {
        "adapter": "alpha",
        "flag": True,
        "timeout": -5,
        "priority": 2**64 - 1,
        "share": 0.25,
    }


def test_outputs():
    message = request()
    message.outputs.add(name="labels")
    message.outputs.add(name="logits").parameters["classification"].int64_param = 3
    assert read_request(message).outputs == (Wanted("labels"), Wanted("logits", 3))


def test_answers_are_raw():
    logits = np.array([[1.5, -np.inf], [0.0, 2.0], [3.0, 4.0]], np.float32)
    labels = bytes_array([b"cat", b"", b"\xff\0"])
    response = InferResponse(
        "tiny", "seven", (Tensor("logits", "FP32", logits.T), Tensor("labels", "BYTES", labels))
    )
    message = write_response(response)
    assert (message.model_name, message.model_version, message.id) == ("tiny", "1", "seven")
    described = [(o.name, o.datatype, list(o.shape)) for o in message.outputs]
    assert described == [("logits", "FP32", [2, 3]), ("labels", "BYTES", [3])]
    first, second = message.raw_output_contents
    assert np.array_equal(np.frombuffer(first, "<f4").reshape(2, 3), logits.T)
    assert second == serialize_byte_tensor(labels).item()


def _both():
    return request(tensor("x", "FP32", 1, fp32_contents=[1.0]), raw_input_contents=[b"\0" * 4])


def _parameter(**value):
    message = request()
    message.parameters["x"].CopyFrom(pb.InferParameter(**value))
    return message


def _parameters(count: int):
    message = request()
    for index in range(count):
        message.parameters[str(index)].bool_param = True
    return message


def _outputs(count: int):
    message = request()
    for _ in range(count):
        message.outputs.add(name="logits")
    return message


def _shared_memory(field: str):
    message = request(tensor("images", "FP32", 0))
    message.outputs.add(name="logits")
    getattr(message, field)[0].parameters["shared_memory_region"].string_param = "region"
    return message


def _classification(**value):
    message = request()
    message.outputs.add(name="logits").parameters["classification"].CopyFrom(
        pb.InferParameter(**value)
    )
    return message


@pytest.mark.parametrize(
    ("message", "said"),
    {
        "raw missing": (
            request(tensor("a", "INT8", 1), tensor("b", "INT8", 1), raw_input_contents=[b"1"]),
            "one for each of the 2 inputs, found 1",
        ),
        "raw too many": (request(raw_input_contents=[b"1"]), "each of the 0 inputs, found 1"),
        "raw and typed": (_both(), "found both"),
        "no contents": (request(tensor("x", "FP32", 2)), "holds 2 values, data 0"),
        "wrong field": (
            request(tensor("x", "FP32", 1, fp64_contents=[1.0])),
            "contents.fp32_contents, found fp64_contents",
        ),
        "two fields": (
            request(tensor("x", "INT8", 1, int_contents=[1], uint_contents=[1])),
            "found uint_contents",
        ),
        "raw size": (
            request(tensor("x", "FP32", 3), raw_input_contents=[b"\0" * 11]),
            "is 12 bytes, found 11",
        ),
        "raw BYTES": (
            request(tensor("x", "BYTES", 1), raw_input_contents=[b"\5\0\0\0abc"]),
            "ends beyond the data",
        ),
        "type": (request(tensor("x", "BF16", 1)), "datatype: expected one of"),
        "no shape": (request(tensor("x", "FP32", fp32_contents=[1.0])), "shape: expected"),
        "negative shape": (request(tensor("x", "FP32", -1, fp32_contents=[1.0])), "shape"),
        "vast shape": (request(tensor("x", "FP32", 2**62, 2**62)), "shape: expected"),
        "vast product": (request(tensor("x", "FP32", *[2**30] * 8)), "shape: expected"),
        "out of range": (
            request(tensor("x", "UINT8", 1, uint_contents=[256])),
            "expected numbers of type UINT8",
        ),
        "twice": (request(tensor("x", "FP32", 0), tensor("x", "FP32", 0)), "'x' is given twice"),
        "many inputs": (
            request(*(tensor(f"x{i}", "FP32", 0) for i in range(17))),
            "inputs: expected",
        ),
        "many outputs": (_outputs(17), "outputs: expected at most 16, found 17"),
        "many parameters": (_parameters(65), "parameters: expected at most 64, found 65"),
        "parameter not set": (_parameter(), "parameter 'x': expected"),
        "parameter infinite": (_parameter(double_param=np.inf), "parameter 'x': expected"),
        "parameter NaN": (_parameter(double_param=np.nan), "parameter 'x': expected"),
        "shared memory in": (_shared_memory("inputs"), "shared memory is not served"),
        "shared memory out": (_shared_memory("outputs"), "shared memory is not served"),
        "classification negative": (_classification(int64_param=-1), "a number of classes"),
        "classification text": (_classification(string_param="3"), "a number of classes"),
        "classification truth": (_classification(bool_param=True), "a number of classes"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(message, said):
    assert said in refused(message)


def test_messages_quote_little_of_a_request():
    assert len(refused(request(tensor("x" * 100_000, "y" * 100_000, 1)))) < 1000
