"""Open Inference Protocol v2 over HTTP: bytes to messages and back.

A body is JSON, or JSON followed by the tensors' bytes (the binary tensor extension, its header
`Inference-Header-Content-Length` tells where they start). Binary tensors are views of the body.
JSON holds numbers as lists, BYTES as strings; encoded pictures, which are no text, as base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import abbreviate
from hhdeploy.files.bundle_json import DuplicateError, json_problem, without_duplicates
from hhdeploy.runtime.serving.errors import RequestError, TooLargeError, shown
from hhdeploy.runtime.serving.messages import (
    BYTES,
    IMAGES,
    REQUEST,
    VERSION,
    InferRequest,
    InferResponse,
    Tensor,
    Value,
    Wanted,
    bytes_array,
    check_parameters,
    check_place,
    check_tensors,
    raw_of,
    tensor_from_raw,
    tensor_from_values,
    top_of,
)

HEADER_LENGTH = "inference-header-content-length"
# Of compressed bodies: bytes at a time, and members of gzip.
_PIECE, _MOST_MEMBERS = 1 << 16, 1024
# Levels of JSON: a tensor of eight dimensions in a request has eleven.
_DEEPEST = 32
# Of JSON: a request, its inputs and outputs, and the parameters of each are 65.
_MOST_OBJECTS = 1024
# Beside as many lists, one for so many bytes: a row of an image has more.
_LIST_BYTES = 32
# Of JSON whose brackets are counted at once.
_CHECKED_BYTES = 64 << 10
# Of a tensor's values that become JSON at once: others may have their turn in between.
_WRITTEN_BYTES = 16 << 10
_COMPACT = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Body:
    """What a request carries.

    Attributes:
        content: as it came.
        encoding: what it came in: gzip, deflate, or empty.
        limit: bytes that it may be once it is decompressed.
    """

    content: bytes
    encoding: str
    limit: int


def read_encoding(header: str | None) -> str:
    """What a body came in, by Content-Encoding: gzip, deflate, or empty for none.

    Raises:
        RequestError: another one.
    """
    encoding = (header or "").strip().lower()
    if encoding in ("", "identity"):
        return ""
    if encoding not in ("gzip", "deflate"):
        raise RequestError(
            f"Content-Encoding: expected gzip, deflate or none, found {encoding[:80]!r}."
        )
    return encoding


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """A body without its encoding, see `Body`.

    Raises:
        RequestError: damaged data.
        TooLargeError: more than ``limit`` bytes once it is decompressed.
    """
    if not encoding:
        return body
    # "deflate" is zlib's format by its standard, and the bare stream by many clients' habit.
    bits = 31 if encoding == "gzip" else 15 if _has_zlib_head(body) else -15
    content, position, members = bytearray(), 0, 0
    stream = zlib.decompressobj(wbits=bits)
    while position < len(body):
        if stream.eof:  # gzip has one member or several
            members += 1
            if encoding != "gzip" or members == _MOST_MEMBERS:
                raise RequestError(f"the body is not {encoding} data: something follows its end.")
            stream = zlib.decompressobj(wbits=bits)
        piece = body[position : position + _PIECE]
        try:
            content += stream.decompress(piece, limit + 1 - len(content))
        except zlib.error as error:
            what = "something follows its end" if members else str(error)
            raise RequestError(f"the body is not {encoding} data: {what}.") from error
        if len(content) > limit:
            raise TooLargeError(f"the decompressed body is beyond {limit} bytes.")
        position += len(piece) - len(stream.unused_data)
    if not stream.eof:
        end = "something follows its end" if members else "it ends too early"
        raise RequestError(f"the body is not {encoding} data: {end}.")
    return bytes(content)


def _has_zlib_head(body: bytes) -> bool:
    """Method 8, a window of at most 32 KiB, and a checksum over both bytes."""
    return len(body) > 1 and body[0] & 143 == 8 and (body[0] << 8 | body[1]) % 31 == 0


def read_object(body: bytes | memoryview) -> dict[str, Any]:
    """A JSON object in UTF-8; empty for an empty body.

    Raises:
        RequestError: it is not one, or an object has a member twice: readers would differ.
    """
    text = bytes(body)
    # In another encoding a character's bytes may look like quotes and brackets.
    if not (encoding := json.detect_encoding(text)).startswith("utf-8"):
        raise RequestError(f"the body is not JSON in UTF-8: it seems to be {encoding}.")
    _check_structure(text)
    try:
        content = json.loads(text.decode(encoding) or "{}", object_pairs_hook=without_duplicates)
    except DuplicateError as error:
        raise RequestError(f"the body: expected each member once: {str(error)[:200]}.") from error
    except (ValueError, RecursionError) as error:
        problem = json_problem(error)[:200]
        raise RequestError(f"the body is not JSON in UTF-8: {problem}") from error
    if not isinstance(content, dict):
        raise RequestError(f"the body: expected a JSON object, found {_kind(content)}.")
    return content


def _check_structure(text: bytes) -> None:
    """Raises `RequestError` for JSON that is nested without end, or is nearly all brackets.

    Before it is parsed: an object or a list takes many times a number's time and memory.
    """
    if text.count(b"[") + text.count(b"{") <= _DEEPEST:
        return
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of quotes ends strings
    most = _MOST_OBJECTS + len(text) // _LIST_BYTES
    quotes = level = objects = lists = 0
    # In pieces that stay in a processor's cache: what is refused costs little, mostly one of them.
    for start in range(0, len(plain), _CHECKED_BYTES):
        found = np.frombuffer(plain[start : start + _CHECKED_BYTES], np.uint8)
        before = quotes + np.cumsum(found == ord('"'), dtype=np.int32)
        outside = np.logical_not(before & 1)
        object_begins, list_begins = (outside & (found == ord(mark)) for mark in "{[")
        ends = outside & ((found == ord("}")) | (found == ord("]")))
        steps = (object_begins | list_begins).astype(np.int8) - ends
        levels = level + np.cumsum(steps, dtype=np.int32)
        quotes, level = int(before[-1]), int(levels[-1])
        objects += np.count_nonzero(object_begins)
        lists += np.count_nonzero(list_begins)
        if levels.max() > _DEEPEST:
            raise RequestError(f"the body is not JSON of at most {_DEEPEST} levels.")
        if objects > _MOST_OBJECTS:
            raise RequestError(f"the body is not JSON of at most {_MOST_OBJECTS} objects.")
        if lists > most:
            raise RequestError(f"the body is not JSON of at most {most} lists: too short ones.")


def json_length(body: bytes, header_length: str | None, most: int | None = None) -> int:
    """Bytes of JSON in a body: all of it, or those before the binary tensors.

    Raises:
        RequestError: ``header_length``, the header that says so, does not.
        TooLargeError: they are more than ``most``.
    """
    size = len(body) if header_length is None else _header_bytes(body, header_length)
    if most is not None and size > most:
        raise TooLargeError(
            f"the JSON is {size} bytes, at most {most} are taken. Send tensors as binary data."
        )
    return size


def _header_bytes(body: bytes, header_length: str) -> int:
    text = header_length.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 18 and int(text) <= len(body)):
        raise RequestError(
            f"Inference-Header-Content-Length: expected at most the body's {len(body)} bytes, "
            f"found {header_length[:80]!r}."
        )
    return int(text)


def read_request(model: str, version: str, body: bytes, header_length: str | None) -> InferRequest:
    """An inference request.

    Raises:
        RequestError: what is wrong with it.
    """
    split = json_length(body, header_length)
    view = memoryview(body)
    content = read_object(view[:split])
    check_place(content, REQUEST)
    inputs: dict[str, Tensor] = {}
    position = split
    for item in _objects(content, "inputs"):
        name = _text(item, "name", "inputs")
        if name in inputs:
            raise RequestError(f"inputs: {name[:80]!r} is given twice.")
        size = read_parameters(item, f"input {name[:80]!r}").get("binary_data_size")
        if size is None:
            inputs[name] = _from_json(name, item)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise RequestError(
                f"input {name[:80]!r}: binary_data_size: expected a number of bytes."
            )
        if item.get("data") is not None:
            raise RequestError(
                f"input {name[:80]!r}: expected data or binary_data_size, found both. Send one."
            )
        if position + size > len(body):
            raise RequestError(
                f"input {name[:80]!r}: binary_data_size is {shown(size)}, the body has "
                f"{len(body) - position} bytes left."
            )
        raw = view[position : position + size]
        inputs[name] = tensor_from_raw(name, item.get("datatype", ""), item.get("shape"), raw)
        position += size
    if position != len(body):
        raise RequestError(f"the body has {len(body) - position} bytes that no input names.")
    parameters = read_parameters(content, REQUEST)
    identity = content.get("id")
    identity = "" if identity is None else identity  # null is the same as absent, everywhere
    if not isinstance(identity, str):
        raise RequestError(f"id: expected a string, found {_kind(identity)}.")
    binary = read_truth(parameters, "binary_data_output", False, "the request")
    outputs = tuple(_wanted(item, binary) for item in _objects(content, "outputs", optional=True))
    return InferRequest(model, version, identity, inputs, outputs, parameters, binary, json=True)


def write_response(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if binary tensors follow it.

    Long lists are written in pieces, see `Aside`.
    """
    outputs: list[bytes] = []
    tail: list[bytes] = []
    binary = {wanted.name: wanted.binary for wanted in request.outputs}
    for tensor in response.outputs:
        described: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.array.shape),
        }
        if binary.get(tensor.name, request.binary):
            raw = raw_of(tensor)
            described["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
            outputs.append(compact_json(described))
        else:
            outputs.append(b'%s,"data":[%s]}' % (compact_json(described)[:-1], _values(tensor)))
    content: dict[str, Any] = {"model_name": response.model, "model_version": VERSION}
    if response.parameters:
        content["parameters"] = dict(response.parameters)
    if response.id:
        content["id"] = response.id
    head = b'%s,"outputs":[%s]}' % (compact_json(content)[:-1], b",".join(outputs))
    return b"".join([head, *tail]), len(head) if tail else None


def compact_json(content: Any) -> bytes:
    """JSON in ASCII: whatever a request made us quote can be written."""
    return _COMPACT.encode(content).encode("ascii")


def _values(tensor: Tensor) -> bytes:
    """A tensor's values as JSON, with commas between."""
    flat = tensor.array.reshape(-1)
    step = max(1, _WRITTEN_BYTES * flat.size // max(1, tensor.nbytes))
    pieces = (flat[begin : begin + step] for begin in range(0, flat.size, step))
    return b",".join(compact_json(_listed(piece, flat.size))[1:-1] for piece in pieces)


def _listed(piece: NDArray[Any], count: int) -> list[Any]:
    """Some of ``count`` values as JSON has them."""
    if piece.dtype == object:
        return [item.decode("utf-8", "replace") for item in piece]
    # A float32 has an exact shortest form; its double has 17 digits.
    return [float(str(x)) for x in piece] if count < 4096 else piece.tolist()


def _from_json(name: str, item: Mapping[str, Any]) -> Tensor:
    if item.get("data") is None:
        raise RequestError(f"input {name[:80]!r}: expected data, or binary_data_size.")
    tensor = tensor_from_values(name, item.get("datatype", ""), item.get("shape"), item["data"])
    if name != IMAGES or tensor.datatype != BYTES:
        return tensor
    try:
        pictures = [base64.b64decode(text, validate=True) for text in tensor.array.reshape(-1)]
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"input {name!r}: expected pictures as base64 in JSON: {error}. Or send them as binary "
            "tensors."
        ) from error
    return Tensor(name, BYTES, bytes_array(pictures, tensor.array.shape))


def _wanted(item: Mapping[str, Any], binary: bool) -> Wanted:
    name = _text(item, "name", "outputs")
    where = f"output {name[:80]!r}"
    parameters = read_parameters(item, where)
    return Wanted(
        name, top_of(parameters, where), read_truth(parameters, "binary_data", binary, where)
    )


def read_truth(content: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A truth value: a client that says ``"false"`` must not get true.

    Raises:
        RequestError: it is something else.
    """
    value = content.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise RequestError(f"{where}: {key}: expected true or false, found {shown(value)}.")
    return value


def read_parameters(item: Mapping[str, Any], where: str) -> dict[str, Value]:
    """The ``parameters`` of a request, an input or an output; empty if there are none.

    Raises:
        RequestError: no object, too many, or one that is no number, string or truth value.
    """
    found = item.get("parameters")
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise RequestError(f"{where}: parameters: expected an object, found {_kind(found)}.")
    return check_parameters({k: v for k, v in found.items() if v is not None}, where)


def read_only_parameters(content: Mapping[str, Any]) -> dict[str, Value]:
    """`read_parameters` of a request that has nothing else: what stands beside them was meant.

    Raises:
        RequestError: it has other members; or as `read_parameters`.
    """
    others = [key for key, value in content.items() if key != "parameters" and value is not None]
    if others:
        raise RequestError(
            "the request: expected one member, parameters, or none, found "
            f"{abbreviate(sorted(key[:80] for key in others))}. What the server is to "
            "take belongs into parameters."
        )
    return read_parameters(content, REQUEST)


def _objects(content: Mapping[str, Any], key: str, *, optional: bool = False) -> list[Any]:
    items = content.get(key)
    if items is None and optional:
        return []
    if not isinstance(items, list):
        raise RequestError(f"{key}: expected a list of objects, found {_kind(items)}.")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            found = "null" if item is None else _kind(item)
            raise RequestError(f"{key}: expected a list of objects, found {found} at [{index}].")
    check_tensors(key, len(items))
    return items


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{where}: {key}: expected a string, found {_kind(value)}.")
    return value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )
