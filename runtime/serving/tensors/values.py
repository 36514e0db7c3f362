"""Python's values, of JSON or of protobuf, to an array that holds the same, or a refusal.

Not by NumPy's own conversion: it cuts fractions to 0, takes true for 1, reads numbers out of
strings, pours lists into another shape, and makes all strings of a list as long as the longest.
"""

from __future__ import annotations

from array import array
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.runtime.serving.errors import RequestError, shown


def flat_values(where: str, shape: tuple[int, ...], values: Any) -> list[Any]:
    """The values in C order, of a flat list or of nested ones.

    Args:
        where: what messages begin with.
        shape: that nested lists must have. A flat list may be of any length.
        values: as they came; one alone is a list of it.

    Raises:
        RequestError: lists that are nested in another way.
    """
    level = values if isinstance(values, list) else [values]
    if not level or not isinstance(level[0], list):
        return level
    level = [level]
    for depth, length in enumerate(shape):
        for index, part in enumerate(level):
            if not isinstance(part, list) or len(part) != length:
                at = "".join(f"[{i}]" for i in _place(index, shape[:depth]))
                raise RequestError(
                    f"{where}: data: expected a flat list, or lists nested as shape {list(shape)}: "
                    f"a list of {length} at data{at}, found {_described(part)}."
                )
        level = list(chain.from_iterable(level))
    return level


def array_of(
    where: str, shape: tuple[int, ...], flat: list[Any], datatype: str, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """An array of such a shape and type; of objects one of `bytes`.

    Args:
        where: what messages begin with.
        shape: of the array.
        flat: as many values as it has.
        datatype, dtype: the protocol's name of the type, and NumPy's own.

    Raises:
        RequestError: a value of another type, or one that ``dtype`` cannot hold.
    """
    found = _array(flat, dtype)
    if found is None:
        first = _first_wrong(flat, dtype)
        raise RequestError(
            f"{where}: data: expected {_expected(datatype, dtype)}, found "
            f"{_described(flat[first])} at {_place(first, shape)}."
        )
    return found.reshape(shape)


def _array(flat: list[Any], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """None if there is a value of another type, or one that ``dtype`` cannot hold."""
    if dtype.kind == "O":
        return _strings(flat)
    if dtype.kind == "b":
        return np.array(flat, dtype) if set(map(type, flat)) <= {bool} else None
    try:
        # It refuses fractions among integers, integers that are too large, and strings.
        numbers = np.asarray(array(dtype.char if dtype.kind in "iu" else "d", flat))
    except (TypeError, OverflowError):
        return None
    # What it takes beside numbers: true and false, for 1 and 0. Most pictures have few of these,
    # and a look at every value would take as long as all of the rest.
    truths = np.flatnonzero((numbers == 0) | (numbers == 1))
    few = len(truths) * 4 < len(flat)
    if bool in set(map(type, map(flat.__getitem__, truths.tolist()) if few else flat)):
        return None
    with np.errstate(over="ignore"):
        found = numbers.astype(dtype, copy=False)
    # An infinity is one that was sent, e.g. 1e300 is none of float32.
    return found if np.array_equal(np.isinf(found), np.isinf(numbers)) else None


def _strings(flat: list[Any]) -> NDArray[np.object_] | None:
    if not set(map(type, flat)) <= {str, bytes}:
        return None
    found = np.empty(len(flat), object)
    # Not from an array of strings, which would cut trailing zeros.
    found[:] = [x.encode("utf-8", "replace") if isinstance(x, str) else x for x in flat]
    return found


def _first_wrong(flat: list[Any], dtype: np.dtype[Any]) -> int:
    """Index of the first value that `_array` refuses; there is one."""
    low, high = 0, len(flat)
    while high - low > 1:
        middle = (low + high) // 2
        if _array(flat[low:middle], dtype) is None:
            high = middle
        else:
            low = middle
    return low


def _expected(datatype: str, dtype: np.dtype[Any]) -> str:
    """A type in words."""
    if dtype.kind == "O":
        return "strings"
    if dtype.kind == "b":
        return "true or false"
    if dtype.kind == "f":
        return f"numbers of type {datatype}, at most {np.finfo(dtype).max:g}"
    held = np.iinfo(dtype)
    return f"numbers of type {datatype}, {held.min} to {held.max} without a point"


def _described(value: Any) -> str:
    """A value as a message has it. Lists are not written: they may be deep."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else shown(value)


def _place(index: int, shape: tuple[int, ...]) -> list[int]:
    """Where a value in C order is in such a shape."""
    return [int(i) for i in np.unravel_index(index, shape)]
