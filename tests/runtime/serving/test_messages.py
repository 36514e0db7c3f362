"""Tensors of a request: what is taken, what is refused, and that nothing is copied."""

from __future__ import annotations

import re
import tracemalloc

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
        ("FP32", [2], [1, 2, 3], "shape [2] holds 2 values, data more."),
        ("FP32", [1], ["1.5"], "data: expected numbers of type FP32, at most 3.40282e+38, found"),
        ("FP32", [1], [None], "found None at [0]."),
        ("FP32", [1], [{}], "found an object at [0]."),
        ("FP32", [1], "1", "found '1' at [0]."),
        ("FP32", [2, 2], [1, 2, 3, True], "found True at [1, 1]."),
        ("FP32", [2], [1e300, 0.0], "found 1e+300 at [0]."),
        ("FP32", [2], [0, 10**39], "at [1]."),
        ("FP32", [2], [0, 10**4000], "at [1]."),
        ("FP16", [1], [70000], "numbers of type FP16, at most 65504, found 70000 at [0]."),
        (
            "INT8",
            [1],
            [300],
            "numbers of type INT8, -128 to 127 without a point, found 300 at [0].",
        ),
        ("UINT8", [3], [0, 255, 256], "found 256 at [2]."),
        ("UINT8", [2, 2], [[0, 1], [0.35, 1]], "found 0.35 at [1, 0]."),
        ("UINT8", [2], [7, 1.0], "found 1.0 at [1]."),
        ("UINT8", [2], [True, False], "found True at [0]."),
        ("UINT8", [3], [2, 1, True], "found True at [2]."),
        ("UINT8", [2], ["1", "2"], "found '1' at [0]."),
        ("UINT64", [1], [-1], "found -1 at [0]."),
        ("INT64", [1], [10**4000], "data: expected numbers of type INT64"),
        ("BOOL", [2], [True, 1], "data: expected true or false, found 1 at [1]."),
        ("BYTES", [1], [1], "data: expected strings, found 1 at [0]."),
        ("BYTES", [1], None, "data: expected strings, found None at [0]."),
        ("BYTES", [2], ["a", ["b"]], "data: expected strings, found a list of 1 at [1]."),
        ("BYTES", [2], ["a"], "shape [2] holds 2 values, data 1."),
        ("BYTES", [1], ["a", "b", "c"], "shape [1] holds 1 values, data more."),
        ("BYTES", [2, 2**20], [], "BYTES: expected at most 16384 elements, found 2097152."),
    ],
)
def test_values_that_are_refused(datatype, shape, values, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        tensor_from_values("x", datatype, shape, values)


@pytest.mark.parametrize(
    ("shape", "values", "message"),
    [
        ([1, 3, 2], [[[1, 2, 3], [4, 5, 6]]], "a list of 3 at data[0], found a list of 2."),
        ([2, 3], [[1, 2], [3, 4], [5, 6]], "a list of 2 at data, found a list of 3."),
        ([2, 2], [[1, 2], [3]], "a list of 2 at data[1], found a list of 1."),
        ([2, 2], [[1, 2], 3], "a list of 2 at data[1], found 3."),
        ([4], [[1, 2], [3, 4]], "a list of 4 at data, found a list of 2."),
        ([3, 0], [[]], "a list of 3 at data, found a list of 1."),
    ],
)
@pytest.mark.parametrize("datatype", ["FP32", "UINT8", BYTES])
def test_lists_of_another_shape_are_refused(datatype, shape, values, message):
    nested = f"data: expected a flat list, or lists nested as shape {shape}: {message}"
    with pytest.raises(RequestError, match=re.escape(nested)):
        tensor_from_values("x", datatype, shape, values)


def test_numbers_keep_their_value():
    most = 2**64 - 1
    assert tensor_from_values("x", "UINT64", [3], [0, 2**63, most]).array.tolist() == [
        0,
        2**63,
        most,
    ]
    floats = tensor_from_values("x", "FP32", [5], [0, 1, 10**30, float("inf"), float("nan")])
    np.testing.assert_array_equal(floats.array, np.float32([0, 1, 1e30, np.inf, np.nan]))


def test_a_long_string_among_many_takes_no_memory():
    values = ["a" * 100_000, *["b"] * 3000]
    tracemalloc.start()
    with pytest.raises(RequestError, match="expected numbers of type FP32"):
        tensor_from_values("x", "FP32", [len(values)], values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_first_of_many_wrong_values_is_named():
    values = [0] * 100_000
    values[70_001] = values[90_000] = -1
    with pytest.raises(RequestError, match=r"found -1 at \[70001\]"):
        tensor_from_values("x", "UINT8", [100_000], values)


def test_values_nested_without_end_are_refused():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    for datatype in (BYTES, "FP32"):
        with pytest.raises(RequestError, match=r"found a list of 1 at \[0\]"):
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
