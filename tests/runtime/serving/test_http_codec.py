"""Bytes of HTTP bodies to messages and back."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hhdeploy.runtime.serving.errors import RequestError, TooLargeError
from hhdeploy.runtime.serving.http.codec import (
    compact_json,
    decompressed,
    read_encoding,
    read_object,
    read_only_parameters,
    read_request,
    write_response,
)
from hhdeploy.runtime.serving.messages import (
    InferRequest,
    InferResponse,
    Tensor,
    Wanted,
    bytes_array,
)

PICTURE = bytes(range(256))
NUMBERS = {"name": "images", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2.0]}


def read(content: Any, tail: bytes = b"", version: str = "") -> InferRequest:
    head = json.dumps(content).encode()
    return read_request("tiny", version, head + tail, str(len(head)) if tail else None)


def one(**changes: Any) -> dict[str, Any]:
    """A good request but for some keys of its input; None leaves a key out."""
    item = {key: value for key, value in {**NUMBERS, **changes}.items() if value is not None}
    return {"inputs": [item]}


def binary(size: Any, **changes: Any) -> dict[str, Any]:
    return one(data=None, parameters={"binary_data_size": size}, **changes)


# --- requests -------------------------------------------------------------------------------------


def test_a_request_of_json():
    content = {
        "id": "seven",
        "parameters": {"adapter": "alpha", "priority": 2, "sequence_start": True, "x": 0.5},
        "inputs": [
            NUMBERS,
            {"name": "adapters", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["ü"]]},
        ],
        "outputs": [{"name": "labels"}, {"name": "logits", "parameters": {"classification": 3}}],
    }
    found = read(content, version="1")
    assert (found.model, found.version, found.id) == ("tiny", "1", "seven")
    assert found.parameters == content["parameters"]
    assert found.inputs["images"].array.tolist() == [[1.5, -2.0]]
    assert found.inputs["images"].array.dtype == np.float32
    assert found.inputs["adapters"].array.tolist() == [[b"a"], ["ü".encode()]]
    assert found.outputs == (Wanted("labels"), Wanted("logits", 3))


def test_pictures_are_base64_in_json():
    text = base64.b64encode(PICTURE).decode()
    found = read(one(datatype="BYTES", shape=[1], data=[text]))
    assert found.inputs["images"].array.tolist() == [PICTURE]
    with pytest.raises(RequestError, match="expected pictures as base64 in JSON"):
        read(one(datatype="BYTES", shape=[1], data=["no base64!"]))


def test_binary_tensors_lie_one_after_the_other():
    numbers = np.asarray([[1.5, -2.0]], "<f4").tobytes()
    names = b"\2\0\0\0ab\0\0\0\0"
    content = {
        "inputs": [
            {"name": "images", "datatype": "FP32", "shape": [1, 2],
             "parameters": {"binary_data_size": len(numbers)}},
            {"name": "mask", "datatype": "BOOL", "shape": [1], "data": [True]},
            {"name": "adapters", "datatype": "BYTES", "shape": [2],
             "parameters": {"binary_data_size": len(names)}},
        ]
    }  # fmt: skip
    found = read(content, numbers + names)
    assert found.inputs["images"].array.tolist() == [[1.5, -2.0]]
    assert found.inputs["mask"].array.tolist() == [True]
    assert found.inputs["adapters"].array.tolist() == [b"ab", b""]


def test_a_large_binary_tensor_is_a_view_of_the_body():
    pixels = np.random.default_rng(3).standard_normal((8, 3, 224, 224)).astype("<f4")
    head = json.dumps(binary(pixels.nbytes, shape=list(pixels.shape))).encode()
    body = head + pixels.tobytes()
    assert len(body) > 4_800_000
    found = read_request("tiny", "", body, str(len(head))).inputs["images"].array
    assert np.shares_memory(found, np.frombuffer(body, np.uint8))
    assert np.array_equal(found, pixels)


def test_binary_output_as_a_whole_and_of_one():
    asked = {**one(), "parameters": {"binary_data_output": True}}
    assert read(asked).binary and not read(asked).outputs
    outputs = [{"name": "labels", "parameters": {"binary_data": False}}, {"name": "logits"}]
    assert read({**asked, "outputs": outputs}).outputs == (
        Wanted("labels"),
        Wanted("logits", binary=True),
    )
    outputs = [{"name": "labels", "parameters": {"binary_data": True}}]
    assert read({**one(), "outputs": outputs}).outputs == (Wanted("labels", binary=True),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the body: expected a JSON object, found a list."),
        (None, "the body: expected a JSON object, found nothing."),
        ({}, "inputs: expected a list of objects, found nothing."),
        ({"inputs": {}}, "inputs: expected a list of objects, found an object."),
        ({"inputs": [1]}, "inputs: expected a list of objects, found int at [0]."),
        ({"inputs": [NUMBERS, None]}, "inputs: expected a list of objects, found null at [1]."),
        ({**one(), "outputs": [[]]}, "outputs: expected a list of objects, found a list at [0]."),
        ({**one(), "parameters": {"adapter": ["a"]}}, "a string or a truth value, found ['a']."),
        ({**one(), "parameters": {"binary_data_output": 3}}, "expected true or false, found 3."),
        ({"inputs": [{}] * 17}, "inputs: expected at most 16, found 17."),
        ({"inputs": [{}]}, "inputs: name: expected a string, found nothing."),
        ({"inputs": [NUMBERS, NUMBERS]}, "inputs: 'images' is given twice."),
        ({**one(), "id": 7}, "id: expected a string, found int."),
        ({**one(), "parameters": []}, "the request: parameters: expected an object, found a list."),
        ({**one(), "parameters": {"a\n": []}}, "the request: parameter 'a\\n': expected a"),
        ({**one(), "parameters": {"a": float("inf")}}, "parameter 'a': expected a number"),
        ({**one(), "outputs": 1}, "outputs: expected a list of objects, found int."),
        ({**one(), "outputs": [{"name": "l"}] * 17}, "outputs: expected at most 16, found 17."),
        ({**one(), "outputs": [{"name": 1}]}, "outputs: name: expected a string, found int."),
        (
            {**one(), "outputs": [{"name": "l", "parameters": {"classification": -1}}]},
            "output 'l': classification: expected a number of classes.",
        ),
        (
            {**one(), "outputs": [{"name": "l", "parameters": {"classification": True}}]},
            "output 'l': classification: expected a number of classes.",
        ),
        (one(parameters={"shared_memory_region": "x"}), "input 'images': shared memory is not"),
        (
            {**one(), "outputs": [{"name": "l", "parameters": {"shared_memory_region": "x"}}]},
            "output 'l': shared memory is not served",
        ),
        (one(data=None), "input 'images': expected data, or binary_data_size."),
        (one(datatype=None), "datatype: expected one of"),
        (one(datatype=[]), "datatype: expected one of"),
        (one(shape=None), "shape: expected a list of 1 to 8 whole numbers"),
        (one(shape=[3]), "shape [3] holds 3 values, data 2."),
        (one(parameters=1), "input 'images': parameters: expected an object, found int."),
        (binary(True), "binary_data_size: expected a number of bytes."),
        (binary("8"), "binary_data_size: expected a number of bytes."),
        (binary(-8), "binary_data_size: expected a number of bytes."),
        (binary(8), "binary_data_size is 8, the body has 0 bytes left."),
        (binary(10**4000), "the body has 0 bytes left."),
        (binary(0), "FP32 [1, 2] is 8 bytes, found 0."),
    ],
)  # fmt: skip
def test_requests_that_are_refused(content, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        read(content)


def test_bytes_that_no_input_names_are_refused():
    with pytest.raises(RequestError, match="the body has 3 bytes that no input names"):
        read(one(), b"abc")
    with pytest.raises(RequestError, match="the body has 1 bytes that no input names"):
        read(binary(8), bytes(9))


@pytest.mark.parametrize("length", ["", "-1", "1.5", "x", "９", "1" * 18, "1" * 5000, "100000"])
def test_header_lengths_that_are_refused(length):
    with pytest.raises(RequestError, match="Inference-Header-Content-Length: expected at most"):
        read_request("tiny", "", json.dumps(one()).encode(), length)


@pytest.mark.parametrize("length", ["0", "5"])
def test_header_lengths_that_cut_the_json(length):
    with pytest.raises(RequestError):
        read_request("tiny", "", json.dumps(one()).encode(), length)


@pytest.mark.parametrize(
    "body", [b"{", b"nul", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\0"]
)
def test_what_is_no_json_is_refused(body):
    with pytest.raises(RequestError, match="the body is not JSON") as caught:
        read_object(body)
    assert len(str(caught.value)) < 300


def test_a_number_of_thousands_of_digits_is_refused_without_python_s_advice():
    with pytest.raises(RequestError, match="a number has thousands of digits") as caught:
        read_object(b'{"a":%b}' % (b"9" * 5000))
    assert "sys." not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b'{"a":1,"a":1}', b'{"a":{"b":1,"c":2,"b":3}}', b'{"a":[{"\\u0062":1,"b":1}]}']
)
def test_a_member_that_is_there_twice_is_refused(body):
    """Of two adapters that a request names one would answer, of `parameters` twice none."""
    with pytest.raises(RequestError, match=r"expected each member once: '[ab]' is there twice"):
        read_object(body)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_json_in_another_encoding_is_refused(encoding):
    """A quote's byte in a character would hide brackets from those that are counted."""
    for text in ("{}", '{"id":"\u0122","x":[' + "[]," * 2000 + "[]]}"):
        with pytest.raises(RequestError, match="not JSON in UTF-8: it seems to be utf-"):
            read_object(text.encode(encoding))
    with pytest.raises(RequestError, match="not JSON in UTF-8"):
        read_object(b'{"id":"\xed\xa0\x80"}')  # half a character
    assert read_object(b'\xef\xbb\xbf{"id":"x"}') == {"id": "x"}  # a mark of UTF-8


def test_an_empty_body_is_an_empty_object():
    assert read_object(b"") == {}


# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["", "identity", "gzip", "deflate", " GZIP "])
def test_content_encodings(encoding):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding.strip().lower(), bytes)
    assert decompressed(pack(PICTURE), read_encoding(encoding), 256) == PICTURE


def test_what_clients_call_deflate_and_gzip_of_several_members():
    bare = zlib.compressobj(wbits=-15)
    assert decompressed(bare.compress(PICTURE) + bare.flush(), "deflate", 256) == PICTURE
    members = [gzip.compress(part) for part in (PICTURE[:7], b"", PICTURE[7:])]
    assert decompressed(b"".join(members), "gzip", 256) == PICTURE
    large = np.random.default_rng(1).bytes(150_000)  # more than is looked at at a time
    assert decompressed(gzip.compress(large) * 3, "gzip", 450_000) == large * 3
    with pytest.raises(TooLargeError):
        decompressed(gzip.compress(large) * 3, "gzip", 449_999)
    with pytest.raises(RequestError, match="something follows"):
        decompressed(gzip.compress(b"") * 1025, "gzip", 256)
    with pytest.raises(RequestError, match="something follows"):
        decompressed(zlib.compress(PICTURE) * 2, "deflate", 2560)


def test_a_request_of_parameters_alone_has_nothing_beside_them():
    for content in ({}, {"parameters": None}, {"parameters": {}, "config": None}):
        assert read_only_parameters(content) == {}
    assert read_only_parameters({"parameters": {"a": 1}}) == {"a": 1}
    with pytest.raises(RequestError, match="one member, parameters, or none, found b, config"):
        read_only_parameters({"parameters": {"a": 1}, "config": "{}", "b": 0})


def test_null_is_the_same_as_absent():
    """As serialisers of other languages write what was not set."""
    plain = read(one())
    tensor = {**one()["inputs"][0], "parameters": None}
    outputs = {"outputs": None, "parameters": {"adapter": None, "priority": None}}
    nulls = read({"id": None, "inputs": [tensor], **outputs})
    assert (nulls.id, nulls.outputs, nulls.parameters) == ("", (), {})
    np.testing.assert_array_equal(nulls.inputs["images"].array, plain.inputs["images"].array)
    asked = read({**one(), "outputs": [{"name": "labels", "parameters": None}]})
    assert asked.outputs == (Wanted("labels"),)
    with pytest.raises(RequestError, match="inputs: expected a list of objects, found nothing"):
        read({"inputs": None})
    with pytest.raises(RequestError, match="expected data, or binary_data_size"):
        read({"inputs": [{**tensor, "data": None}]})


@pytest.mark.parametrize("value", ["false", "true", 0, 1, 0.5])
def test_a_truth_value_is_one(value):
    """The word "false" is true in Python."""
    output = {"name": "logits", "parameters": {"binary_data": value}}
    for content in (
        {**one(), "outputs": [output]},
        {**one(), "parameters": {"binary_data_output": value}},
    ):
        with pytest.raises(RequestError, match="expected true or false"):
            read(content)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x-gzip", "\r\nx"])
def test_other_encodings_are_refused(encoding):
    with pytest.raises(RequestError, match="Content-Encoding: expected gzip, deflate or none"):
        read_encoding(encoding)


@pytest.mark.parametrize("encoding", [None, "", "identity", " Identity"])
def test_a_body_may_be_as_it_is(encoding):
    assert read_encoding(encoding) == ""
    assert decompressed(PICTURE, "", 1) == PICTURE


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends too early"),
        (gzip.compress(PICTURE)[:-1], "ends too early"),
        (gzip.compress(PICTURE) + b"x", "something follows its end"),
        (zlib.compress(PICTURE), "is not gzip data"),
        (b"\x1f\x8b" + bytes(40), "is not gzip data"),
    ],
)
def test_damaged_data_are_refused(body, message):
    with pytest.raises(RequestError, match=message):
        decompressed(body, "gzip", 1000)


def test_an_input_with_data_twice_is_refused():
    parameters = {"binary_data_size": 4}
    item = {"name": "images", "datatype": "FP32", "shape": [1], "parameters": parameters}
    for data, message in (([2.0], "found both"), (None, None)):
        head = json.dumps({"inputs": [{**item, "data": data}]}).encode()
        if message is None:
            assert read_request("tiny", "", head + bytes(4), str(len(head))).inputs["images"].nbytes
        else:
            with pytest.raises(RequestError, match=message):
                read_request("tiny", "", head + bytes(4), str(len(head)))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"adapter": "gamma"}, "the request: adapter is not read"),
        ({"adapters": ["gamma"]}, "the request: adapters is not read"),
        ({"parameters": {"adapters": "gamma"}}, "the request: parameters: adapters is not read"),
        ({"outputs": [{"name": "logits", "parameters": {"adapter": "x"}}]}, "adapter is not read"),
    ],
)
def test_an_adapter_that_is_named_where_none_is_read(change, where):
    """It would be passed over, and the bare backbone would answer."""
    item = {"name": "images", "datatype": "FP32", "shape": [1], "data": [2.0]}
    good = {"inputs": [item], "parameters": {"adapter": "gamma"}, "adapter": None}
    assert read_request("tiny", "", json.dumps(good).encode(), None).parameters["adapter"]
    inside = {"inputs": [{**item, "parameters": {"adapter": "gamma"}}]}
    with pytest.raises(RequestError, match="input 'images': parameters: adapter is not read"):
        read_request("tiny", "", json.dumps(inside).encode(), None)
    with pytest.raises(RequestError, match=where):
        read_request("tiny", "", json.dumps({"inputs": [item], **change}).encode(), None)


def test_a_bomb_is_not_unpacked():
    bomb = gzip.compress(bytes(50 << 20))
    assert len(bomb) < 60_000
    with pytest.raises(TooLargeError, match="the decompressed body is beyond 60000 bytes"):
        decompressed(bomb, "gzip", 60_000)


# --- answers --------------------------------------------------------------------------------------


def asked(*outputs: Wanted, binary: bool = False) -> InferRequest:
    return InferRequest("tiny", "", "", {}, outputs, {}, binary)


def answer(*tensors: Tensor, identity: str = "") -> InferResponse:
    return InferResponse("tiny", identity, tensors)


def test_an_answer_of_json_has_the_very_numbers():
    random = np.random.default_rng(4)
    for count in (7, 5000):
        logits = random.standard_normal((1, count)).astype(np.float32) * np.float32(1e-3)
        body, length = write_response(answer(Tensor("logits", "FP32", logits)), asked())
        assert length is None
        (found,) = json.loads(body)["outputs"]
        assert found["shape"] == [1, count] and found["datatype"] == "FP32"
        assert np.array_equal(np.asarray(found["data"], np.float32), logits[0])


def test_an_answer_has_what_was_asked_for():
    logits = Tensor("logits", "FP32", np.asarray([[1, -np.inf]], np.float32))
    labels = Tensor("labels", "BYTES", bytes_array(["ü".encode(), b"\xff"]))
    body, length = write_response(
        answer(labels, logits, identity="seven"), asked(Wanted("logits", binary=True))
    )
    head = json.loads(body[:length])
    assert head == {
        "model_name": "tiny",
        "model_version": "1",
        "id": "seven",
        "outputs": [
            {"name": "labels", "datatype": "BYTES", "shape": [2], "data": ["ü", "\ufffd"]},
            {"name": "logits", "datatype": "FP32", "shape": [1, 2],
             "parameters": {"binary_data_size": 8}},
        ],
    }  # fmt: skip
    assert np.frombuffer(body[length:], "<f4").tolist() == [1, -np.inf]


def test_whatever_is_quoted_is_ascii():
    assert compact_json({"error": "\r\n\0ü\ud800"}) == b'{"error":"\\r\\n\\u0000\\u00fc\\ud800"}'


# --- anything -------------------------------------------------------------------------------------

keys = st.sampled_from(
    "inputs outputs parameters id name datatype shape data binary_data_size classification".split()
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["images", "adapters", "FP32", "BYTES", "INT64"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=st.dictionaries(keys, values), tail=st.binary(max_size=20), data=st.data())
def test_anything_is_read_or_refused(content, tail, data):
    head = json.dumps(content).encode()
    length = data.draw(
        st.none() | st.integers(-1, len(head) + 21).map(str) | st.just(str(len(head)))
    )
    try:
        found = read_request("tiny", "", head + tail, length)
    except RequestError as error:
        message = str(error)
    else:
        message = ""
        assert all(isinstance(tensor, Tensor) for tensor in found.inputs.values())
    assert message.isprintable()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(body=st.binary(max_size=60), encoding=st.sampled_from(["", "gzip", "deflate"]))
def test_any_bytes_are_read_or_refused(body, encoding):
    with contextlib.suppress(RequestError):
        read_request("tiny", "", decompressed(body, encoding, 1000), None)
