"""Bytes to protobuf's messages: what they hold is counted before anything is made of it.

Two bytes may be an output, and a kilobyte of gzip millions of them: protobuf makes an object of
each, while nobody else is answered. So fields are counted here, without objects, and a message of
too many is refused. Typed contents, which are numbers one by one, are no objects yet: where they
are large, the request is read in a process of its own, as large JSON is.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.runtime.serving.errors import RequestError, TooLargeError
from hhdeploy.runtime.serving.grpc.codec import read_request
from hhdeploy.runtime.serving.messages import InferRequest
from hhdeploy.runtime.serving.processes.parsing import Parser

# Of a message and all in it. A batch of pictures, an element each, has a few hundred.
_MOST_FIELDS: Final = 1 << 14
# Of typed contents; read at once: a few milliseconds.
_SMALL: Final = 64 << 10
_CONTENTS: Final = pb.InferTensorContents.DESCRIPTOR
# Fields that hold everything of an inference but its tensors' values: `inputs` and
# `raw_input_contents` are the others.
_VALUES: Final = frozenset((5, 7))
# The one that holds its `id`, behind the model's name and version.
_ID: Final = 3
# How a field is written: a varint, eight bytes, a length and so many bytes, four bytes.
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5


@dataclass(frozen=True)
class Unread:
    """An inference with many typed values, of which only the rest is a message yet.

    Attributes:
        model_name, id: as the message has them.
        raw: all of it.
        typed: bytes of its typed contents.
    """

    model_name: str
    id: str
    raw: bytes
    typed: int


@dataclass(frozen=True)
class Refused:
    """An inference of a stream that cannot be read; the others of the stream are none the worse.

    No exception, which would keep the frames that it passed.

    Attributes:
        model_name: not known.
        id: as far as it is known.
        kind, problem: of the error.
    """

    id: str
    kind: type[RequestError]
    problem: str
    model_name: str = ""


def parse_or_refuse(kind: Any, raw: bytes, most: int) -> Any:
    """See `parse`; `Refused` instead of an error."""
    try:
        return parse(kind, raw, most)
    except RequestError as error:
        return Refused(_id_of(raw), type(error), str(error))


def parse(kind: Any, raw: bytes, most: int) -> Any:
    """A message of ``raw``, or `Unread` for an inference that is better read elsewhere.

    Args:
        kind: the message's class.
        raw: what came.
        most: bytes that it may have.

    Raises:
        RequestError: the bytes are no such message, or one of too many fields.
        TooLargeError: there are more of them.
    """
    if len(raw) > most:
        raise TooLargeError(f"the request is {len(raw)} bytes, at most {most} are taken.")
    found = _Count()
    try:
        found.message(kind.DESCRIPTOR, raw, 0, len(raw))
        if kind is not pb.ModelInferRequest or found.typed <= _SMALL:
            return kind.FromString(raw)
        fields = _fields(raw, 0, len(raw))
        head = kind.FromString(
            b"".join(raw[a:c] for number, _, a, _, c in fields if number not in _VALUES)
        )
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise RequestError(f"the bytes are no message {name}: {error}") from error
    return Unread(head.model_name, head.id, raw, found.typed)


async def read_inference(parser: Parser, request: Any, most: int) -> InferRequest:
    """What `parse` made of an inference, as a request.

    Args:
        parser: whose process reads what is large.
        request: the message, `Unread` or `Refused`.
        most: bytes that large typed contents may have.

    Raises:
        RequestError: what is wrong with it.
    """
    if isinstance(request, Refused):
        raise request.kind(request.problem)
    if not isinstance(request, Unread):
        return read_request(request)
    if request.typed > most:
        raise TooLargeError(
            f"the typed contents are {request.typed} bytes, at most {most} are taken. Send tensors "
            "in raw_input_contents."
        )
    read: InferRequest = await parser.elsewhere(len(request.raw), _read, request.raw)
    return read


def _read(raw: bytes) -> InferRequest:
    return read_request(pb.ModelInferRequest.FromString(raw))


def _id_of(raw: bytes) -> str:
    """What an inference is called: among its first fields, as every library writes them."""
    with contextlib.suppress(DecodeError, UnicodeDecodeError):
        for number, way, _, begin, end in itertools.islice(_fields(raw, 0, len(raw)), _ID):
            if number == _ID and way == _LENGTH:
                return raw[begin:end].decode()
    return ""


class _Count:
    """Fields of a message and of those in it, and bytes of typed contents."""

    def __init__(self) -> None:
        self.fields = self.typed = 0

    def message(self, descriptor: Any, raw: bytes, start: int, end: int) -> None:
        """Count what stands from ``start`` to ``end``; `RequestError` where it is too much."""
        for number, way, _, begin, stop in _fields(raw, start, end):
            self._add(1)
            field = descriptor.fields_by_number.get(number) if way == _LENGTH else None
            if field is None:
                continue
            if field.message_type is not None:
                self.message(field.message_type, raw, begin, stop)
            elif field.cpp_type == field.CPPTYPE_STRING:
                continue
            elif descriptor is _CONTENTS:
                self.typed += stop - begin
            else:  # numbers one after the other, e.g. of a shape
                self._add(stop - begin)

    def _add(self, count: int) -> None:
        self.fields += count
        if self.fields > _MOST_FIELDS:
            raise RequestError(
                f"the message has more than {_MOST_FIELDS} fields, at most so many are taken. "
                "Expected few inputs, outputs and parameters, and tensors in raw_input_contents."
            )


def _fields(raw: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Each field's number, the way it is written, where it and its content begin, and its end.

    Protobuf must find no other fields than these: what it may read in another way is refused.
    """
    position = start
    while position < end:
        begin = position
        tag, position = _varint(raw, position, end)
        way = tag & 7
        content = position
        if way == _VARINT:
            _, position = _varint(raw, position, end)
        elif way == _LENGTH:
            length, content = _varint(raw, position, end)
            position = content + length
        elif way in (_EIGHT, _FOUR):
            position += 8 if way == _EIGHT else 4
        else:  # groups, which no message here has
            raise DecodeError("a field of an unknown kind")
        if position > end or tag >> 32:
            raise DecodeError("a field that goes beyond its message")
        yield tag >> 3, way, begin, content, position


def _varint(raw: bytes, position: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte from the lowest, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position == end:
            break
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise DecodeError("a number without an end")
