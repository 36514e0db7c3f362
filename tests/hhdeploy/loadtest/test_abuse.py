"""What abuse may do to others: the bounds, and the processes that measure it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hhdeploy.errors import SessionError
from hhdeploy.loadtest.abuse import json_bombs, pictures, wire
from hhdeploy.loadtest.abuse.bounds import AbuseReport, Seen, Siege
from hhdeploy.loadtest.abuse.children import child
from hhdeploy.loadtest.abuse.wire import Victim, packed
from hhdeploy.loadtest.report import Latencies
from hhdeploy.runtime.serving.http.codec import decompressed

MB = 1 << 20
VICTIM = Victim("127.0.0.1", 1, 2, "bundle", (3, 7, 5), "/nowhere")


def seen(p99: float, health: float, **other) -> Seen:
    times = Latencies(100, 1.0, 2.0, p99, p99)
    well = Latencies(20, 1.0, 2.0, health, health)
    return replace(Seen(100, 0, 0, (), times, well, 0), **other)


CALM = seen(10.0, 4.0)


@pytest.mark.parametrize(
    ("abused", "memory", "answers", "bounds"),
    [
        (seen(80.0, 54.0), (100 * MB, 164 * MB), [], []),
        (seen(80.1, 54.0), None, [], ["p99: 80.1 ms, allowed 80.0 ms"]),
        (seen(80.0, 54.1), None, [], ["health's p99: 54.1 ms, allowed 54.0 ms"]),
        (seen(1.0, 1.0), (100 * MB, 165 * MB), [], ["memory: +65 MB, allowed 64"]),
        (seen(1.0, 1.0, unwell=3), None, [], ["health: 3 requests not answered that it is well"]),
        (seen(1.0, 1.0, wrong=1, lost=7), None,
         ["abuse: 1 of 100 requests wrong", "abuse: 7 of 100 requests lost"], []),
        (replace(CALM, latencies=Latencies.of([])), None, [], ["p99: none, allowed 80.0 ms"]),
    ],
)  # fmt: skip
def test_each_bound_is_held(abused, memory, answers, bounds):
    siege = Siege(CALM, abused, {"413": 5}, memory)
    assert siege.answers_broken() == answers
    assert siege.bounds_broken() == bounds
    report = AbuseReport(60.0, {"HTTP": 100.0}, {"json-gzip": siege}, 0)
    assert report.passed is (not answers and not bounds)
    assert not replace(report, exit_code=1).passed
    told = json.loads(json.dumps(report.to_json()))
    assert told["kinds"]["json-gzip"]["bounds_broken"] == bounds


def test_a_control_that_fails_is_no_control():
    siege = Siege(replace(CALM, lost=2), CALM, {}, None)
    assert siege.answers_broken() == ["control: 2 of 100 requests lost"]


@contextlib.contextmanager
def answering(status: int):
    """A server whose every answer has this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False)])
def test_health_is_asked_again_and_again(status, well):
    with answering(status) as url, child("health", url) as health:
        time.sleep(0.5)
    found = health.found
    times, failures = len(found["seconds"]), found["failures"]
    assert (times if well else failures) >= 3
    assert (failures if well else times) == 0


def test_an_abuser_meets_the_control_again_and_again(tmp_path):
    with child("listener", "127.0.0.1") as listener:
        victim = replace(VICTIM, http_port=listener.begun, fleet=str(tmp_path))
        with child("abuser", {"kind": "idle", "victim": vars(victim), "pause": 0.0}) as abuser:
            time.sleep(0.5)
    assert abuser.found["closed"] > 3
    assert set(abuser.found) == {"closed"}


def test_a_process_that_fails_is_told(capfd):
    with pytest.raises(SessionError, match="'abuser' did not start"), child("abuser", {}):
        pass
    assert "KeyError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "encoding"), [(json_bombs.gzip_bombs, "gzip"), (json_bombs.deflate_bombs, "deflate")]
)
def test_few_bytes_are_much_json(monkeypatch, make, encoding):
    sent = []

    async def post(victim, body, headers):
        sent.append((body, headers))
        return "413"

    monkeypatch.setattr(wire, "post", post)
    attack = make(VICTIM)
    assert asyncio.run(attack()) == "413"
    ((body, headers),) = sent
    assert headers == {"Content-Encoding": encoding}
    text = decompressed(body, encoding, 1 << 20)
    assert len(text) > 100 * len(body)
    (tensor,) = json.loads(text)["inputs"]
    assert tensor["shape"] == [1, 3, 7, 5]


@pytest.mark.parametrize("bits", [15, -15, 31])
def test_what_is_repeated_is_packed_once(bits):
    body = packed([(b"begin", 1), (b"ab" * 4001, 53), (b"", 7), (b"c", 3)], bits)
    unpacker = zlib.decompressobj(bits)
    assert unpacker.decompress(body) == b"begin" + b"ab" * 4001 * 53 + b"ccc"
    assert (unpacker.eof, unpacker.unused_data) == (True, b"")
    assert len(body) < 5000


@pytest.mark.parametrize(("bits", "colour", "mode"), [(1, 0, "1"), (16, 2, "RGB")])
def test_a_png_that_is_packed_is_one(bits, colour, mode):
    from PIL import Image

    with Image.open(io.BytesIO(pictures._png(56, bits, colour))) as picture:
        picture.load()
        assert (picture.size, picture.mode) == ((56, 56), mode)
