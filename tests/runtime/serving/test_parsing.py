"""Large JSON is read in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import operator
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from hhdeploy.runtime.serving.errors import BusyError, FailedError, RequestError, TooLargeError
from hhdeploy.runtime.serving.http import codec
from hhdeploy.runtime.serving.http.bodies import BodyParser
from hhdeploy.runtime.serving.http.codec import Body, json_length, read_object, read_request
from hhdeploy.runtime.serving.processes import elsewhere

PATIENCE = 60
MOST = 1 << 24  # bytes of a body, and of its JSON


def body(values: int = 40_000, **more: object) -> bytes:
    data = np.random.default_rng(5).standard_normal(values).astype("f4").tolist()
    tensor = {"name": "images", "datatype": "FP32", "shape": [values], "data": data}
    return json.dumps({"inputs": [tensor], "id": "seven", **more}).encode()


def plain(content: bytes) -> Body:
    return Body(content, "", MOST)


def packed(content: bytes, limit: int = MOST) -> Body:
    return Body(gzip.compress(content, 1), "gzip", limit)


@contextlib.asynccontextmanager
async def reading():
    parser = BodyParser()
    try:
        yield parser
    finally:
        await asyncio.to_thread(parser.close)


def run(scene) -> None:
    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_large_json_is_read_as_small_json_is():
    content = body()
    assert len(content) > 1 << 18

    async def scene() -> None:
        async with reading() as parser:
            found = await parser.request("tiny", "1", plain(content), None, MOST)
            expected = read_request("tiny", "1", content, None)
            assert (found.model, found.version, found.id) == ("tiny", "1", "seven")
            array = found.inputs["images"].array
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected.inputs["images"].array)
            process = parser._process._process
            assert await parser.content(plain(content)) == read_object(content)
            assert parser._process._process is process and process.poll() is None
        assert process.poll() is not None

    run(scene)


@pytest.mark.parametrize(
    "content", [body()[:-2], body(outputs=1), body(inputs={"a": [0] * 99_999})]
)
def test_what_is_wrong_with_it_is_said_in_the_same_words(content):
    async def scene() -> None:
        async with reading() as parser:
            with pytest.raises(RequestError) as expected:
                read_request("tiny", "", content, None)
            with pytest.raises(RequestError) as found:
                await parser.request("tiny", "", plain(content), None, MOST)
            assert (type(found.value), str(found.value)) == (
                type(expected.value), str(expected.value),
            )  # fmt: skip

    run(scene)


def test_what_is_large_once_it_is_decompressed_is_decompressed_elsewhere():
    """Of JSON, and of binary tensors; what is small at once."""
    values = np.arange(100_000, dtype=np.float32)
    head = {"name": "images", "datatype": "FP32", "shape": [100_000]}
    head["parameters"] = {"binary_data_size": values.nbytes}
    lead = json.dumps({"inputs": [head]}).encode()
    binary, length = packed(lead + values.tobytes()), str(len(lead))

    async def scene() -> None:
        async with reading() as parser:
            small = await parser.request("tiny", "", packed(body(9)), None, MOST)
            assert small.nbytes == 36
            assert await parser.content(packed(b"{}")) == {}
            assert parser._process._process is None
            large = await parser.request("tiny", "", packed(body()), None, MOST)
            expected = read_request("tiny", "", body(), None).inputs["images"]
            np.testing.assert_array_equal(large.inputs["images"].array, expected.array)
            assert parser._process._process is not None
            found = await parser.request("tiny", "", binary, length, MOST)
            np.testing.assert_array_equal(found.inputs["images"].array, values)
            assert found.nbytes == values.nbytes
            assert await parser.content(packed(body())) == read_object(body())

    run(scene)


@pytest.mark.parametrize("limit", [1 << 10, 1 << 20])
def test_a_bomb_is_refused_at_its_limit(limit):
    bomb = packed(bytes(40 << 20), limit)

    async def scene() -> None:
        async with reading() as parser:
            for asked in (parser.content(bomb), parser.request("tiny", "", bomb, None, MOST)):
                with pytest.raises(TooLargeError, match=f"body is beyond {limit} bytes"):
                    await asked
            with pytest.raises(TooLargeError, match="at most 1000 are taken"):
                await parser.request("tiny", "", packed(body()), None, 1000)
            broken = Body(packed(body()).content[:-9], "gzip", MOST)
            with pytest.raises(RequestError, match="it ends too early"):
                await parser.content(broken)

    run(scene)


def test_json_is_smaller_than_bodies():
    """With binary tensors the same numbers are a view."""
    assert json_length(bytes(100), None, 100) == 100
    assert json_length(bytes(1000), " 14 ", 100) == 14
    for body, header in ((bytes(101), None), (bytes(1000), "101")):
        with pytest.raises(TooLargeError, match="is 101 bytes, at most 100 are taken"):
            json_length(body, header, 100)


def test_one_that_is_given_up_ends_with_its_process(monkeypatch):
    waiting: list[threading.Thread] = []
    wait = subprocess.Popen.wait

    def watched(process: subprocess.Popen, timeout: float | None = None) -> int:
        waiting.append(threading.current_thread())
        return wait(process, timeout)

    async def scene() -> None:
        async with reading() as parser:
            long = asyncio.create_task(parser.elsewhere(1, time.sleep, 10 * PATIENCE))
            next_one = asyncio.create_task(parser.request("tiny", "", plain(body()), None, MOST))
            left = asyncio.create_task(parser.request("tiny", "", plain(body()), None, MOST))
            while parser._process._process is None:
                await asyncio.sleep(0.01)  # this loop goes on meanwhile
            held = parser._process._process
            left.cancel()  # one that waits takes nobody's process with it
            await asyncio.wait([left])
            assert held.poll() is None
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            assert (await next_one).id == "seven"
            assert held.returncode is not None
            assert parser._process._process not in (None, held)
            assert waiting and threading.main_thread() not in waiting  # the loop goes on

    monkeypatch.setattr(subprocess.Popen, "wait", watched)
    run(scene)


def test_more_than_may_wait_is_refused():
    async def scene() -> None:
        async with reading() as parser:
            most = 32 << 20
            long = asyncio.create_task(parser.elsewhere(most, time.sleep, 10 * PATIENCE))
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="wait to be read"):
                await parser.request("tiny", "", plain(body()), None, MOST)
            long.cancel()
            await asyncio.wait([long])
            await parser.request("tiny", "", plain(body()), None, MOST)

    run(scene)


def test_one_that_is_given_up_while_its_process_starts_is_not_begun(monkeypatch):
    begun, start = threading.Event(), elsewhere._start

    def started() -> subprocess.Popen:
        begun.set()
        time.sleep(0.2)
        return start()

    monkeypatch.setattr(elsewhere, "_start", started)

    async def scene() -> None:
        async with reading() as parser:
            long = asyncio.create_task(parser.elsewhere(1, time.sleep, 10 * PATIENCE))
            await asyncio.to_thread(begun.wait)
            long.cancel()
            await asyncio.wait([long])
            assert (await parser.request("tiny", "", plain(body()), None, MOST)).id == "seven"

    run(scene)


def test_a_process_that_dies_fails_one_request():
    async def scene() -> None:
        async with reading() as parser:
            with pytest.raises(FailedError, match="has ended"):
                await parser.elsewhere(1, os.abort)
            assert (await parser.request("tiny", "", plain(body()), None, MOST)).id == "seven"

    run(scene)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_ends_nothing_that_was_taken(number):
    """Neither while the process starts nor while it is at something; the server decides."""
    process = elsewhere.Elsewhere("waits")
    try:
        process.start()
        os.kill(process._process.pid, number)
        assert process.call(operator.add, 2, 3) == 5
        timer = threading.Timer(0.1, os.kill, (process._process.pid, number))
        timer.start()
        assert process.call(time.sleep, 0.3) is None
        timer.join()
        assert process.call(operator.add, 3, 4) == 7
        process._process.stdin.close()  # as it is where the server has ended
        assert process._process.wait(PATIENCE) == 0
    finally:
        process.end()
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_process_whose_server_is_gone_ends_without_a_word(capfd):
    process = elsewhere._start()
    elsewhere._send(process.stdin, (bytes, (1 << 20,)))
    process.stdout.close()
    process.stdin.close()
    assert process.wait(PATIENCE) == 1
    assert capfd.readouterr() == ("", "")


def test_memory_has_an_end():
    async def scene() -> None:
        async with reading() as parser:
            with pytest.raises(TooLargeError, match="too much memory"):
                await parser.elsewhere(1, bytearray, 4 << 30)
            assert (await parser.request("tiny", "", plain(body()), None, MOST)).id == "seven"

    run(scene)


def test_a_process_whose_memory_has_grown_ends():
    """What one body took is not kept until the server ends."""

    async def scene() -> None:
        async with reading() as parser:
            await parser.content(plain(body()))
            first = parser._process._process
            await parser.elsewhere(1, operator.mul, b"x", 100 << 20)
            assert first.poll() is not None
            assert (await parser.request("tiny", "", plain(body()), None, MOST)).id == "seven"

    run(scene)


@pytest.fixture(params=[5, 64 << 10])
def pieces(request, monkeypatch):
    """Bytes whose brackets are counted at once."""
    monkeypatch.setattr(codec, "_CHECKED_BYTES", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("levels", [33, 100_000])
@pytest.mark.parametrize("opened", [b"[", b'{"a":', b'["\\\\\\"[", '])
def test_nesting_without_end(levels, opened):
    with pytest.raises(RequestError, match="at most 32 levels"):
        read_object(opened * levels)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("objects", [1024, 1025])
def test_objects_without_end(objects):
    text = json.dumps({"a{": [{"b": '{"{'}] * (objects - 1)}).encode()
    if objects == 1024:
        assert len(read_object(text)["a{"]) == 1023
        return
    with pytest.raises(RequestError, match="at most 1024 objects"):
        read_object(text)


@pytest.mark.usefixtures("pieces")
def test_lists_of_next_to_nothing():
    rows = [[0.5] * 16] * 5000
    assert read_object(json.dumps({"data": rows}).encode()) == {"data": rows}
    with pytest.raises(RequestError, match="lists: too short ones"):
        read_object(json.dumps({"data": [[0.5]] * 5000}).encode())


@pytest.mark.usefixtures("pieces")
def test_brackets_in_strings_nest_nothing():
    flat = {"a": "[{" * 50, 'b"[': ['\\"[[{' * 20, "\\"] * 9, "c": [[[1]]] * 40}
    assert read_object(json.dumps(flat).encode()) == flat
