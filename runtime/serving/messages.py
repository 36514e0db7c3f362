"""A request, its response and its deadline in the Open Inference Protocol, whatever carried them.

The HTTP and gRPC sides translate bytes to these and back; nothing else knows the wires.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hhdeploy.files.tensors import ByContent
from hhdeploy.runtime.serving.errors import RequestError, TimedOutError, shown
from hhdeploy.runtime.serving.tensors.values import array_of, flat_values

# The inputs of a model of ours, and its one version.
IMAGES, ADAPTERS = "images", "adapters"
# What is said of parameters that are a request's, and not an input's or an output's.
REQUEST: Final = "the request"
VERSION = "1"
# The protocol's names of the types that a model of ours takes and gives.
UINT8, FP16, FP32, BYTES = "UINT8", "FP16", "FP32", "BYTES"
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    UINT8: np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    FP16: np.dtype("<f2"),
    FP32: np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BYTES: np.dtype(object),
}
Value = bool | int | float | str
# Largest dimension, and number of values without empty dimensions: whatever is beyond is an
# attack, and NumPy's products must not overflow.
_MOST = 1 << 31
# Elements of a BYTES tensor, each an object of its own; a batch has a few hundred images at most.
_MOST_ELEMENTS = 1 << 14
# Inputs and outputs of a request; a model has two and three.
_MOST_TENSORS = 16
# Of a request, an input or an output; a handful have a meaning.
_MOST_PARAMETERS = 64
# Of the shared memory extension, which is not served: ignored, a client would read garbage.
_SHARED_MEMORY = "shared_memory_region"


@dataclass(frozen=True, eq=False)
class Tensor(ByContent):
    """A named array; of BYTES an object array of `bytes`."""

    name: str
    datatype: str
    array: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        if self.array.dtype == object:
            return sum(map(len, self.array.flat))
        return self.array.nbytes


@dataclass(frozen=True)
class Wanted:
    """An output that was asked for.

    Attributes:
        name: of the output.
        top: Triton's classification extension: that many ``score:index:label`` instead; 0: none.
        binary: HTTP only: in the binary extension, not as JSON.
    """

    name: str
    top: int = 0
    binary: bool = False


@dataclass(frozen=True)
class InferRequest:
    """One inference request.

    Attributes:
        model: name of the bundle, or of an adapter.
        version: as the request gave it, or "".
        id: echoed in the response, or "".
        inputs: by name.
        outputs: what was asked for; empty: all that the adapters have.
        binary: HTTP only: outputs that were not asked for by name come in the binary extension.
        json: what is not binary becomes JSON, which holds no infinities.
        parameters: ``adapter``, ``priority``, ``timeout`` (microseconds) and what servers of the
            protocol are told to ignore.
    """

    model: str
    version: str
    id: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[Wanted, ...] = ()
    parameters: Mapping[str, Value] = field(default_factory=dict)
    binary: bool = False
    json: bool = False

    @property
    def nbytes(self) -> int:
        """Of its inputs."""
        return sum(tensor.nbytes for tensor in self.inputs.values())

    def seconds(self) -> float:
        """How long its own ``timeout`` lets the answer take; infinite if it has none.

        Raises:
            RequestError: that is not a number of microseconds.
        """
        timeout = self.parameters.get("timeout", 0)
        if isinstance(timeout, str) and timeout.isascii() and timeout.isdigit():
            timeout = int(timeout[:18])
        if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
            raise RequestError(f"parameter timeout: expected microseconds, found {shown(timeout)}.")
        return min(timeout, 1 << 62) / 1e6 if timeout else math.inf

    def priority(self) -> int:
        """Triton's: 0 is the default and goes first, then 1, 2, ...

        Raises:
            RequestError: it is something else.
        """
        value = self.parameters.get("priority", 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise RequestError(f"parameter priority: expected 0, 1, ..., found {shown(value)}.")
        return value

    def visitor(self) -> bool:
        """Whether it comes from somebody who looks around, as on the page: see `FleetRows`.

        Raises:
            RequestError: it is no truth value.
        """
        value = self.parameters.get("visitor", False)
        if not isinstance(value, bool):
            raise RequestError(f"parameter visitor: expected true or false, found {shown(value)}.")
        return value


@dataclass(frozen=True)
class InferResponse:
    """The answer to one request.

    Attributes:
        model, id: as the request had them.
        outputs: in the order that was asked for.
        parameters: who answered, see `outputs.answered_by`.
    """

    model: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, Value] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of its outputs."""
        return sum(tensor.nbytes for tensor in self.outputs)


class Deadline:
    """``with Deadline(seconds):`` raises `TimedOutError` in a block that takes longer.

    The task that enters it is cancelled at the await that it is at, in its own frames: no other
    task is made, whose exception and traceback would keep the request alive in a cycle.
    """

    def __init__(self, seconds: float) -> None:
        """``seconds``: infinite for none."""
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._late = False

    def __enter__(self) -> Deadline:
        if math.isfinite(self._seconds):
            self._task = asyncio.current_task()
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        task, self._task = self._task, None
        if self._late and task is not None:
            getattr(task, "uncancel", int)()  # Python 3.10 does not count
            if kind is not None and issubclass(kind, asyncio.CancelledError):
                raise TimedOutError(f"not answered within {self._seconds:g} s.") from None

    def _end(self) -> None:
        self._late = True
        if self._task is not None:
            self._task.cancel()


def check_parameters(found: Mapping[str, Any], where: str) -> dict[str, Value]:
    """The parameters of a request, an input or an output.

    Raises:
        RequestError: too many, or one is no finite number, string or truth value, or is about
            shared memory.
    """
    if len(found) > _MOST_PARAMETERS:
        raise RequestError(
            f"{where}: parameters: expected at most {_MOST_PARAMETERS}, found {len(found)}."
        )
    for key, value in found.items():
        if not isinstance(value, (bool, int, float, str)) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise RequestError(
                f"{where}: parameter {key[:80]!r}: expected a number, a string or a truth value, "
                f"found {shown(value)}."
            )
    if _SHARED_MEMORY in found:
        raise RequestError(
            f"{where}: shared memory is not served: send tensors in the request and take them "
            "from the answer."
        )
    check_place(found, f"{where}: parameters", read=("adapter",) if where == REQUEST else ())
    return dict(found)


def check_place(found: Mapping[str, Any], where: str, read: Sequence[str] = ()) -> None:
    """Raises `RequestError` for a member that names an adapter where none but ``read`` is read: it
    would be passed over, and the bare backbone would answer."""
    for key in ("adapter", "adapters"):
        if found.get(key) is not None and key not in read:
            raise RequestError(
                f"{where}: {key} is not read there. An adapter is the model that is asked, or the "
                "request's parameter adapter; several are the input adapters, BYTES [n]."
            )


def check_tensors(key: str, count: int) -> None:
    """Raises `RequestError` for more ``inputs`` or ``outputs`` than a request may have."""
    if count > _MOST_TENSORS:
        raise RequestError(f"{key}: expected at most {_MOST_TENSORS}, found {count}.")


def top_of(parameters: Mapping[str, Value], where: str) -> int:
    """`Wanted.top` of an output's parameters. Raises `RequestError` if it is no number."""
    top = parameters.get("classification", 0)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise RequestError(f"{where}: classification: expected a number of classes.")
    return top


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A tensor's shape as the request gave it.

    Raises:
        RequestError: not a list of a few whole numbers from 0, or more values than there can be.
    """
    good = (
        isinstance(shape, (list, tuple))
        and 0 < len(shape) <= 8
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _MOST for n in shape)
        and math.prod(n or 1 for n in shape) < _MOST
    )
    if not good:
        raise RequestError(
            f"input {shown(name)}: shape: expected a list of 1 to 8 whole numbers, with a product "
            f"below {_MOST}, found {shown(shape)}."
        )
    return tuple(shape)


def tensor_from_raw(name: str, datatype: str, shape: Any, raw: memoryview) -> Tensor:
    """A tensor of the binary form, without a copy: little-endian, C order.

    BYTES are elements of a four-byte little-endian length and that many bytes each.

    Raises:
        RequestError: an unknown type, or another number of bytes than shape and type make.
    """
    shape = check_shape(name, shape)
    dtype = check_datatype(name, datatype)
    count = math.prod(shape)
    if datatype == BYTES:
        _check_elements(name, count)
        return Tensor(name, datatype, _elements(name, raw, count).reshape(shape))
    expected = count * dtype.itemsize
    if expected != raw.nbytes:
        raise RequestError(
            f"input {shown(name)}: {datatype} {list(shape)} is {expected} bytes, found "
            f"{raw.nbytes}."
        )
    return Tensor(name, datatype, np.frombuffer(raw, dtype).reshape(shape))


def tensor_from_values(name: str, datatype: str, shape: Any, values: Any) -> Tensor:
    """A tensor of the JSON form or of gRPC's typed contents: values flat or nested, in C order.

    Raises:
        RequestError: an unknown type, values that it cannot hold, another number of them, or
            lists that are not nested as ``shape`` says.
    """
    shape = check_shape(name, shape)
    dtype = check_datatype(name, datatype)
    count = math.prod(shape)
    if datatype == BYTES:
        _check_elements(name, count)
    where = f"input {shown(name)}"
    flat = flat_values(where, shape, values)
    if len(flat) != count:
        raise RequestError(
            f"{where}: shape {list(shape)} holds {count} values, data "
            f"{'more' if len(flat) > count else len(flat)}."
        )
    return Tensor(name, datatype, array_of(where, shape, flat, datatype, dtype))


def check_datatype(name: str, datatype: Any) -> np.dtype[Any]:
    """The NumPy type of a protocol type. Raises `RequestError` for one there is not."""
    dtype = DTYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise RequestError(
            f"input {shown(name)}: datatype: expected one of {', '.join(DTYPES)}, found "
            f"{shown(datatype)}."
        )
    return dtype


def bytes_array(items: list[bytes], shape: tuple[int, ...] | None = None) -> NDArray[np.object_]:
    """An object array of byte strings; NumPy's own conversion would cut trailing zeros."""
    array = np.empty(len(items), object)
    array[:] = items
    return array if shape is None else array.reshape(shape)


def raw_of(tensor: Tensor) -> bytes:
    """The binary form of a tensor; see `tensor_from_raw`."""
    if tensor.datatype == BYTES:
        return b"".join(len(item).to_bytes(4, "little") + item for item in tensor.array.reshape(-1))
    return np.ascontiguousarray(tensor.array, DTYPES[tensor.datatype]).tobytes()


def _check_elements(name: str, count: int) -> None:
    if count > _MOST_ELEMENTS:
        raise RequestError(
            f"input {shown(name)}: BYTES: expected at most {_MOST_ELEMENTS} elements, found "
            f"{count}."
        )


def _elements(name: str, raw: memoryview, count: int) -> NDArray[np.object_]:
    items: list[bytes] = []
    position = 0
    while position < raw.nbytes and len(items) <= count:
        start = position + 4
        position = start + int.from_bytes(raw[start - 4 : start], "little")
        if position > raw.nbytes or start > raw.nbytes:
            raise RequestError(
                f"input {shown(name)}: BYTES: element {len(items)} ends beyond the data. Expected "
                "a four-byte little-endian length before each."
            )
        items.append(bytes(raw[start:position]))
    if len(items) != count:
        raise RequestError(
            f"input {shown(name)}: BYTES: shape holds {count} elements, data "
            f"{'more' if len(items) > count else len(items)}."
        )
    return bytes_array(items)
