"""A client's headers, read and written again before gRPC sees them."""

from __future__ import annotations

import hpack
import numpy as np
import pytest

from hhdeploy.runtime.serving.errors import RequestError, refusal_kind
from hhdeploy.runtime.serving.grpc.headers import PEER, Answers, BrokenError, Headers
from tests.runtime.serving.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    block,
    call,
    frame,
    frames,
    greeting,
)

INFER = b"/inference.GRPCInferenceService/ModelInfer"


def read(data: bytes) -> list[list[tuple[bytes, bytes]]]:
    """The headers of each block, as a server reads them that has no memory: none is needed."""
    found = []
    for kind, flags, _, content in frames(data.removeprefix(PREFACE)):
        if kind == HEADERS:
            found.append(b"")
        if kind in (HEADERS, CONTINUATION):
            found[-1] += content
            assert flags & END_HEADERS or len(content) == 1 << 14
    return [[tuple(f) for f in hpack.Decoder(1 << 20).decode(b, raw=True)] for b in found]


def sent(*contents: bytes, peer: str = "") -> bytes:
    headers = Headers(peer)
    return b"".join(headers.feed(content) for content in (greeting(), *contents))


@pytest.mark.parametrize("step", [1, 7, 13, 997, 1 << 20])
def test_calls_arrive_as_they_were_sent_in_whatever_pieces(step):
    encoder, random = hpack.Encoder(), np.random.default_rng(step)
    bodies = [random.bytes(n) for n in (0, 5, 1999)]
    fields = [call(INFER, (b"n", b"%d" % i), (b"long", b"v" * (120 + i))) for i in range(3)]
    data = greeting()
    for i in range(3):
        content = encoder.encode(fields[i])
        data += frame(HEADERS, 0, 2 * i + 1, content[:11])
        data += frame(CONTINUATION, END_HEADERS, 2 * i + 1, content[11:])
        data += frame(DATA, END_STREAM, 2 * i + 1, bodies[i])
    headers = Headers("")
    found = b"".join(headers.feed(data[i : i + step]) for i in range(0, len(data), step))
    assert read(found) == fields
    assert [f[2:] for f in frames(found.removeprefix(PREFACE)) if f[0] == DATA] == [
        (2 * i + 1, body) for i, body in enumerate(bodies)
    ]


def test_no_byte_arrives_that_is_no_text():
    everything = bytes(range(256))
    fields = call(b"/\xff/\xc3\xa9", (b"note", everything), (b"data-bin", everything))
    (found,) = read(sent(frame(HEADERS, END_HEADERS, 1, hpack.Encoder().encode(fields))))
    assert dict(found)[b":path"] == b"/?/??"
    assert dict(found)[b"data-bin"] == everything  # which gRPC does not decode
    assert dict(found)[b"note"] == b"?" * 32 + everything[32:127] + b"?" * 129


def test_the_same_bytes_after_another_header_are_another_call():
    """What references mean changes with the table: nothing that was kept may be used then."""
    encoder = hpack.Encoder()
    first = encoder.encode([(b"who", b"one")])
    newest = bytes([0x80 | 62])  # the entry that entered last
    second = encoder.encode([(b"who", b"two")])
    stream = [frame(HEADERS, END_HEADERS, 2 * i + 1, c)
              for i, c in enumerate([first, newest, newest, second, newest])]  # fmt: skip
    values = [dict(found)[b"who"] for found in read(sent(*stream))]
    assert values == [b"one", b"one", b"one", b"two", b"two"]


def test_who_calls_is_told_by_the_server_alone():
    fields = call(INFER, (PEER.encode(), b"somebody else"))
    (found,) = read(sent(frame(HEADERS, END_HEADERS, 1, block(fields)), peer="192.0.2.7:4711"))
    assert [value for name, value in found if name == PEER.encode()] == [b"192.0.2.7:4711"]


def test_padding_and_priorities_are_left_out():
    content = b"\3" + b"\0\0\0\1\xf0" + block(call(INFER)) + b"\0" * 3
    padded = frame(HEADERS, END_HEADERS | PADDED | PRIORITY | END_STREAM, 1, content)
    found = sent(padded)
    assert read(found) == [call(INFER)]
    assert frames(found.removeprefix(PREFACE))[-1][1] == END_HEADERS | END_STREAM


def test_long_headers_are_several_frames():
    """Without tables and Huffman's code a block is longer than it came."""
    encoder = hpack.Encoder()
    long = [(b"k", b"e" * 9001), (b"k", b"i" * 9001)]
    content = encoder.encode(long)
    assert len(content) < 1 << 14
    assert read(sent(frame(HEADERS, END_HEADERS, 1, content))) == [long]


@pytest.mark.parametrize("step", [1, 7, 13, 1 << 20])
def test_what_grpc_refuses_by_itself_is_told_in_whatever_pieces(step):
    own = b"SERVER: Received message larger than max (9 vs. 8)"
    said = [own, b"Decompressed message larger than max", b"Concurrent RPC limit exceeded!"]
    quoted = b"unknown model " + own
    data = b"".join(
        frame(HEADERS, END_HEADERS | END_STREAM, 1, block([(b"grpc-message", text)]))
        + frame(DATA, 0, 3, block([(b"grpc-message", own)]))
        for text in (*said, quoted)
    )
    data += frame(RST_STREAM, 0, 5, b"\0\0\0\7") + frame(RST_STREAM, 0, 7, b"\0\0\0\0")
    found: list[RequestError] = []
    answers = Answers(found.append)
    for start in range(0, len(data), step):
        answers.feed(data[start : start + step])
    assert list(map(refusal_kind, found)) == ["too_large", "too_large", "busy", "busy"]


GOOD = block(call(INFER))
BOMB = hpack.Encoder().encode([(b"k", b"v" * 4000)])
# 16 times the 4,000 bytes that entered the table.
MANY_BOMBS = frame(HEADERS, END_HEADERS, 1, BOMB)
MANY_BOMBS += frame(HEADERS, END_HEADERS, 3, b"\xbe" * 16) * 137
BROKEN = {
    "no HTTP/2": [b"GET / HTTP/1.1\r\n"],
    "a frame among headers": [greeting(), frame(HEADERS, 0, 1, GOOD), frame(DATA, 0, 1, b"x")],
    "headers among headers": [greeting(), frame(HEADERS, 0, 1, GOOD), frame(HEADERS, 4, 1, GOOD)],
    "a continuation of nothing": [greeting(), frame(CONTINUATION, 4, 1, GOOD)],
    "of another stream": [greeting(), frame(HEADERS, 0, 1, GOOD), frame(CONTINUATION, 4, 3, b"")],
    "long padding": [greeting(), frame(HEADERS, END_HEADERS | PADDED, 1, b"\x7f" + GOOD[:100])],
    "no length of padding": [greeting(), frame(HEADERS, END_HEADERS | PADDED, 1, b"")],
    "no such entry": [greeting(), frame(HEADERS, END_HEADERS, 1, b"\xfe")],
    "cut": [greeting(), frame(HEADERS, END_HEADERS, 1, GOOD[:-1])],
    "a long frame": [greeting(), frame(HEADERS, END_HEADERS, 1, b"\0" * ((1 << 14) + 1))[:50]],
    "a long block": [greeting(), frame(HEADERS, 0, 1, b"\0" * (1 << 14)),
                     frame(CONTINUATION, 4, 1, b"\0")],
    "continuations with nothing": [greeting(), frame(HEADERS, 0, 1, GOOD),
                                   frame(CONTINUATION, 0, 1, b"")],
    "many bombs at once": [greeting(), MANY_BOMBS],
    "a bomb": [greeting(), frame(HEADERS, END_HEADERS, 1, BOMB + b"\xbe" * 12000)],
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_http2_ends_the_connection(kind):
    headers = Headers("")
    *before, last = BROKEN[kind]
    for data in before:
        headers.feed(data)
    with pytest.raises(BrokenError):
        headers.feed(last)


def test_what_is_kept_of_a_connection_is_little():
    headers = Headers("")
    headers.feed(greeting() + frame(HEADERS, END_HEADERS, 1, BOMB))
    for count in range(1, 17):  # each is another block, of up to 64 KiB
        made = headers.feed(frame(HEADERS, END_HEADERS, 3, b"\xbe" * count))
        assert len(made) > 4000 * count
    for count in range(1, 65):
        headers.feed(frame(HEADERS, END_HEADERS, 3, b"\x82" * count))
    kept = headers._known
    assert len(kept) == 16 and sum(map(len, [*kept, *kept.values()])) <= 16 * 2 * 4096


def test_random_bytes_end_the_connection_or_pass_in_frames_that_can_be_read():
    random = np.random.default_rng(5)
    broken = 0
    for _ in range(2000):
        headers = Headers("")
        headers.feed(greeting())
        content = random.bytes(int(random.integers(1, 60)))
        try:
            found = headers.feed(frame(HEADERS, END_HEADERS, 1, content))
        except BrokenError:
            broken += 1
        else:
            for name, value in read(found)[0]:
                if name.endswith(b"-bin"):
                    continue
                assert value.isascii()
                assert not value or value.decode().isprintable()
    assert 1000 < broken < 2000
