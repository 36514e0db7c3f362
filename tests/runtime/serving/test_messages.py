"""Tensors of a request: what is taken, what is refused, and that nothing is copied."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.messages import (
    BYTES,
    DTYPES,
    Tensor,
    bytes_array,
    check_shape,
    raw_of,
    tensor_from_raw,
    tensor_from_values,
)

NUMBERS = [name for name in DTYPES if name != BYTES]


def element(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_come_back_as_they_went(datatype):
    array = np.asarray([[0, 1, 2], [3, 100, 127]]).astype(DTYPES[datatype])
    raw = raw_of(Tensor("x", datatype, array))
    found = tensor_from_raw("x", datatype, [2, 3], memoryview(raw))
    assert found.array.dtype == DTYPES[datatype] and np.array_equal(found.array, array)
    values = tensor_from_values("x", datatype, [2, 3], array.tolist())
    assert values.array.dtype == DTYPES[datatype] and np.array_equal(values.array, array)
    flat = tensor_from_values("x", datatype, [2, 3], array.reshape(-1).tolist())
    assert np.array_equal(flat.array, array)


def test_byte_strings_come_back_as_they_went():
    items = [b"", b"alpha", b"zeros\0\0", "ü".encode(), bytes(range(256))]
    array = bytes_array(items)
    assert list(array) == items
    raw = raw_of(Tensor("x", BYTES, array))
    assert raw == b"".join(map(element, items))
    found = tensor_from_raw("x", BYTES, [5, 1], memoryview(raw))
    assert found.array.shape == (5, 1) and list(found.array.reshape(-1)) == items


def test_strings_are_utf8_and_a_lone_surrogate_harms_nothing():
    found = tensor_from_values("x", BYTES, [2, 1], [["ü"], ["\ud800"]])
    assert list(found.array.reshape(-1)) == ["ü".encode(), b"?"]


def test_big_endian_and_strided_arrays_are_written_in_order():
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    assert raw_of(Tensor("x", "FP32", array)) == array.astype("<f4").tobytes("C")


def test_raw_numbers_are_views():
    body = bytes(8) + np.arange(6, dtype="<f4").tobytes()
    found = tensor_from_raw("x", "FP32", [2, 3], memoryview(body)[8:])
    assert np.shares_memory(found.array, np.frombuffer(body, np.uint8))
    assert found.array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_integers_keep_what_a_float_would_lose():
    most = 2**63 - 1
    assert tensor_from_values("x", "INT64", [2], [most, -most - 1]).array.tolist() == [
        most,
        -most - 1,
    ]


@pytest.mark.parametrize(
    "shape",
    [
        None, 3, "3", {}, [], [1.0], [True], ["1"], [-1], [[1]], [1] * 9, [2**31],
        [2**62, 2**62],  # overflows a 64-bit product
        [0, 2**30, 2**30],  # nothing in it, and too big for NumPy all the same
        [65536, 65536],
        10**4000,
    ],
)  # fmt: skip
def test_shapes_that_are_refused(shape):
    with pytest.raises(RequestError, match=r"input 'x': shape: expected a list of 1 to 8"):
        check_shape("x", shape)


def test_shapes_that_are_taken():
    assert check_shape("x", [0, 3, 32, 32]) == (0, 3, 32, 32)
    assert check_shape("x", (1,) * 8) == (1,) * 8
    for datatype in DTYPES:
        assert tensor_from_raw("x", datatype, [0, 3], memoryview(b"")).array.shape == (0, 3)
        assert tensor_from_values("x", datatype, [3, 0], []).array.shape == (3, 0)


@pytest.mark.parametrize("datatype", [None, 1, "", "fp32", "FP8", "STRING", ["FP32"], "\n"])
def test_types_that_are_refused(datatype):
    with pytest.raises(RequestError, match=r"datatype: expected one of BOOL, .*, BYTES, found"):
        tensor_from_raw("x", datatype, [1], memoryview(bytes(4)))
    with pytest.raises(RequestError, match="datatype: expected one of"):
        tensor_from_values("x", datatype, [1], [1])


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("FP32", [2], bytes(7), "FP32 [2] is 8 bytes, found 7."),
        ("FP32", [2], bytes(9), "FP32 [2] is 8 bytes, found 9."),
        ("BOOL", [2], b"", "BOOL [2] is 2 bytes, found 0."),
        ("BYTES", [1], b"", "shape holds 1 elements, data 0."),
        ("BYTES", [1], element(b"a") * 2, "shape holds 1 elements, data more."),
        ("BYTES", [0], element(b"a"), "shape holds 0 elements, data more."),
        ("BYTES", [1], b"\1\0", "element 0 ends beyond the data."),
        ("BYTES", [1], b"\2\0\0\0a", "element 0 ends beyond the data."),
        ("BYTES", [2], element(b"a") + b"\xff\xff\xff\xff", "element 1 ends beyond the data."),
        ("BYTES", [16385], b"", "BYTES: expected at most 16384 elements, found 16385."),
    ],
)
def test_raw_data_that_is_refused(datatype, shape, raw, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        tensor_from_raw("x", datatype, shape, memoryview(raw))


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "message"),
    [
        ("FP32", [2], [1.0], "shape [2] holds 2 values, data 1."),
        ("FP32", [2], [[1, 2, 3]], "shape [2] holds 2 values, data more."),
        ("FP32", [2], [[1], [2, 3]], "data: expected numbers of type FP32"),
        ("FP32", [1], ["1.5"], "data: expected numbers of type FP32"),
        ("FP32", [1], [None], "data: expected numbers of type FP32"),
        ("FP32", [1], [{}], "data: expected numbers of type FP32"),
        ("FP32", [1], "1", "data: expected numbers of type FP32"),
        ("INT8", [1], [300], "data: expected numbers of type INT8"),
        ("UINT64", [1], [-1], "data: expected numbers of type UINT64"),
        ("INT64", [1], [10**4000], "data: expected numbers of type INT64"),
        ("BYTES", [1], [1], "BYTES: expected strings."),
        ("BYTES", [1], None, "BYTES: expected strings."),
        ("BYTES", [2], ["a"], "shape [2] holds 2 values, data 1."),
        ("BYTES", [1], ["a", "b", "c"], "shape [1] holds 1 values, data more."),
        ("BYTES", [2, 2**20], [], "BYTES: expected at most 16384 elements, found 2097152."),
    ],
)
def test_values_that_are_refused(datatype, shape, values, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        tensor_from_values("x", datatype, shape, values)


def test_values_nested_without_end_are_refused():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    for datatype in (BYTES, "FP32"):
        with pytest.raises(RequestError, match=r"nested too deeply|expected numbers"):
            tensor_from_values("x", datatype, [1], nested)


def test_messages_are_short_and_on_one_line():
    name, most = "\r\n\0" + "x" * 10_000, 600
    for work in (
        lambda: check_shape(name, [name]),
        lambda: tensor_from_raw(name, name, [1], memoryview(b"")),
        lambda: tensor_from_raw(name, BYTES, [1], memoryview(b"")),
        lambda: tensor_from_values(name, BYTES, [1], [1]),
        lambda: tensor_from_values(name, "FP32", [1], [name]),
    ):
        with pytest.raises(RequestError) as caught:
            work()
        assert len(str(caught.value)) < most
        assert str(caught.value).isprintable()
