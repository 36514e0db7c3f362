"""Headers of HTTP/2 that gRPC's own code can read, whatever a client sent.

gRPC for Python (1.85) decodes a method's name as UTF-8 in the loop that takes all calls: one name
that is none ends it for everybody. So every block of headers is read here and written again, in
printable ASCII, before gRPC sees it; all but values that are bytes by their names (`-bin`). All
other frames go through as they are.

Written again, a header is a literal that no table is needed for, so that what is added, changed or
left out never shifts what the client's next block refers to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import hpack

from hhdeploy.runtime.serving.errors import BusyError, RequestError, TooLargeError

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD: Final = 9
_HEADERS, _RESET, _CONTINUATION = 1, 3, 9
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 1, 4, 8, 32
# Of a frame unless both sides agreed on more; and of a whole block, as gRPC takes it.
_MOST_FRAME, _MOST_BLOCK = 1 << 14, 1 << 14
# Decoded: a block may name an entry of its table a thousand times.
_MOST_DECODED: Final = 1 << 16
# Made of the headers that arrive at once, some 256 KiB of them: ten thousand such blocks.
_MOST_MADE: Final = 1 << 23
# Bytes that are each a header of the table, and what they become of how many blocks is kept, and
# up to which length.
_ONE_REFERENCE, _LONG_REFERENCE, _MOST_KNOWN, _LONG_KNOWN = 0x80, 0xFF, 16, 1 << 12
_PLAIN: Final = bytes(c if 0x20 <= c < 0x7F else ord("?") for c in range(256))
# What says that gRPC refused a stream, or a call: its messages, a literal in the headers.
_REFUSED_STREAM: Final = (7).to_bytes(4, "big")
_ITS_OWN: Final = re.compile(
    rb"\x0cgrpc-message[\0-\x7f](?:SERVER: )?"
    rb"((?:Received|Decompressed) message larger than max|Concurrent RPC limit exceeded)"
)
# Who calls, as `host:port`: a client's own header of that name is left out.
PEER: Final = "x-hhdeploy-peer"


class BrokenError(Exception):
    """Bytes that are no HTTP/2, or headers beyond what is taken: the connection ends."""


class Headers:
    """What one client sends on one connection, made readable."""

    def __init__(self, peer: str) -> None:
        """``peer``: what every call is told in the header `PEER`; "" for nothing."""
        self._decoder = hpack.Decoder(_MOST_DECODED)
        self._peer = _literal(PEER.encode(), peer.encode("ascii", "replace")) if peer else b""
        # Begun frames: of headers, or of any kind while its head is not there as a whole.
        self._held = b""
        # Bytes that are still to come of a frame that goes through.
        self._through = 0
        # The block that is being collected, its stream, and whether it ends the stream.
        self._block: bytearray | None = None
        self._stream, self._last = b"", 0
        self._greeted = False
        # What a block of references alone became: the same again, while the table is the same.
        self._known: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> bytes:
        """What may go on of ``data`` and what was held back.

        Raises:
            BrokenError: the connection has to end.
        """
        data = self._held + data if self._held else data
        self._held = b""
        if not self._greeted:
            if not _PREFACE.startswith(data[: len(_PREFACE)]):
                raise BrokenError("no HTTP/2")
            if len(data) < len(_PREFACE):
                self._held = data
                return b""
            self._greeted, self._through = True, len(_PREFACE)
        if self._through >= len(data):
            self._through -= len(data)
            return data
        return self._frames(data)

    def _frames(self, data: bytes) -> bytes:
        """``data`` begins ``self._through`` bytes before a frame's head."""
        position, start = self._through, 0
        pieces: list[bytes] = []
        made = 0
        while position + _HEAD <= len(data):
            length = int.from_bytes(data[position : position + 3], "big")
            kind = data[position + 3]
            end = position + _HEAD + length
            if kind not in (_HEADERS, _CONTINUATION):
                if self._block is not None:
                    raise BrokenError("a frame in the middle of headers")
                position = end
                continue
            if length > _MOST_FRAME:
                raise BrokenError("headers beyond a frame")
            if end > len(data):
                break
            if start < position:
                pieces.append(data[start:position])
            pieces.append(self._headers(data[position:end]))
            made += len(pieces[-1])
            if made > _MOST_MADE:
                raise BrokenError("headers that become too long together")
            start = position = end
        self._through = max(0, position - len(data))
        self._held = data[position:]
        if not pieces and not self._held:
            return data
        pieces.append(data[start:position])
        return b"".join(pieces)

    def _headers(self, frame: bytes) -> bytes:
        """One frame of headers; all of their block with its last frame, and nothing before."""
        flags, stream, content = frame[4], frame[5:_HEAD], frame[_HEAD:]
        if frame[3] == _HEADERS:
            if self._block is not None:
                raise BrokenError("headers in the middle of headers")
            self._block, self._stream, self._last = bytearray(), stream, flags & _END_STREAM
            content = _unpadded(flags, content)
        elif self._block is None or stream != self._stream:
            raise BrokenError("a continuation of nothing")
        elif not content and not flags & _END_HEADERS:
            raise BrokenError("a continuation with nothing")  # which could go on for ever
        self._block += content
        if len(self._block) > _MOST_BLOCK:
            raise BrokenError("headers too long")
        if not flags & _END_HEADERS:
            return b""
        block, self._block = bytes(self._block), None
        return _as_frames(self._stream, self._last, self._readable(block))

    def _readable(self, block: bytes) -> bytes:
        """A whole block, written again. A client's calls are mostly one block over and over."""
        if (known := self._known.get(block)) is not None:
            return known
        readable = self._decoded(block)
        if block and min(block) >= _ONE_REFERENCE and max(block) < _LONG_REFERENCE:
            if len(self._known) < _MOST_KNOWN and len(readable) <= _LONG_KNOWN:
                self._known[block] = readable
        else:
            self._known.clear()
        return readable

    def _decoded(self, block: bytes) -> bytes:
        try:
            found = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise BrokenError("headers that cannot be read") from error
        peer = PEER.encode()
        fields = [_literal(*_plain(name, value)) for name, value in found if name != peer]
        return b"".join(fields) + self._peer


class Answers:
    """What gRPC's own server sends on one connection: it tells nobody what it refuses by itself."""

    def __init__(self, refused: Callable[[RequestError], None]) -> None:
        """``refused``: is told of each call that gRPC refused."""
        self._refused = refused
        # A begun frame that may be of interest, or a begun head; bytes to come of others.
        self._held, self._through = b"", 0

    def feed(self, data: bytes) -> None:
        """Some bytes more."""
        data = self._held + data if self._held else data
        position = self._through
        while position + _HEAD <= len(data):
            end = position + _HEAD + int.from_bytes(data[position : position + 3], "big")
            kind = data[position + 3]
            if kind in (_HEADERS, _RESET):
                if end > len(data):
                    break
                content = data[position + _HEAD : end]
                if kind == _RESET and content == _REFUSED_STREAM:
                    self._refused(BusyError("too many calls on one connection."))
                elif kind == _HEADERS and (found := _ITS_OWN.search(content)):
                    error = BusyError if found[1].startswith(b"Conc") else TooLargeError
                    self._refused(error(found[1].decode()))
            position = end
        self._through, self._held = max(0, position - len(data)), data[position:]


def _plain(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header in printable ASCII; what gRPC hands on as bytes, by its name, stays as it is.

    A name's own faults are gRPC's to refuse.
    """
    return name, value if name.endswith(b"-bin") else value.translate(_PLAIN)


def _unpadded(flags: int, content: bytes) -> bytes:
    """Headers without padding, and without priorities, which servers ignore."""
    padding = 0
    if flags & _PADDED:
        padding, content = content[0] if content else 1, content[1:]
    start = 5 if flags & _PRIORITY else 0
    if start + padding > len(content):
        raise BrokenError("padding beyond its frame")
    return content[start : len(content) - padding]


def _as_frames(stream: bytes, last: int, block: bytes) -> bytes:
    frames, kind, flags = [], _HEADERS, last
    while True:
        piece, block = block[:_MOST_FRAME], block[_MOST_FRAME:]
        flags |= 0 if block else _END_HEADERS
        frames += [len(piece).to_bytes(3, "big"), bytes((kind, flags)), stream, piece]
        if not block:
            return b"".join(frames)
        kind, flags = _CONTINUATION, 0


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that enters no table."""
    return b"\x10" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """Of seven bits, and more in groups of seven from the lowest."""
    left = len(text) - 127
    if left < 0:
        return bytes((len(text),))
    found = bytearray((127,))
    while left >= 128:
        found.append(left & 127 | 128)
        left >>= 7
    found.append(left)
    return bytes(found)
