"""Thousands of malformed HTTP requests against one server: refused, and it is as it was before."""

from __future__ import annotations

import base64
import contextlib
import copy
import gzip
import http.client
import io
import json
import socket
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.fleets import PATIENCE, files_of, make_adapter
from tests.runtime.serving.servers import TOKEN, running_server
from tests.support import images
from tests.workshop import CLASSES

WARM_UP, REQUESTS = 1_500, 6_500
# What allocators keep still grows in steps, as each thread meets its largest picture and body: 65
# MB were seen. A leak of the requests themselves, of 15 kB each, would be 97 MB.
MOST_GROWTH = 85 << 20

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 32, 33, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31,
    2**63, 2**64, -(2**63), 10**40, 10**4299, "", "\0", "\r\nX: y", "images", "adapters", "logits",
    "labels", "alpha", "backbone", "FP32", "BYTES", "INT64", "BOOL", "../x", "\ud800", "ü" * 200,
    "9" * 400, [], [[]], {}, [None], {"binary_data_size": 5}, {"classification": 3},
    {"name": "logits"},
]  # fmt: skip
SHAPES: list[Any] = [
    [1, 3, 32, 32], [0], [-1], [2**31] * 2, [0, *[2**30] * 3], [1] * 9, [33, 3, 32, 32],
    [2**62] * 2,
]  # fmt: skip
NAMES = [
    "tiny", "alpha", "beta", "nobody", "", "..", "%2e%2e%2f", "%00", "a%0d%0ab", "%ff%fe",
    "backbone", "%", "%zz", "tiny%2f", "a?b", "#", ";", "\\", "fuzz0", "fuzz1", "[::1]", "x" * 300,
]  # fmt: skip
# The tests' own names among them that an adapter may have.
ADAPTERS = {"alpha", "beta", "nobody", "fuzz0", "fuzz1", "a"}
OTHERS = [
    "/", "/v2", "/v2/", "//", "/metrics", "/status", "/v2/repository/index",
    "/v2/models/tiny/stats", "/" + "y" * 3000, "/v2/models/tiny/versions/9/infer",
    "/v2/models/alpha/config",
]  # fmt: skip
METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND", "M-SEARCH"]
HEADERS = [
    b"Host: ", b"Host: evil.example", b"Host: [", b"Content-Encoding: br",
    b"Content-Encoding: gzip",
    b"Inference-Header-Content-Length: 0", b"Inference-Header-Content-Length: -1",
    b"Inference-Header-Content-Length: 99999999999999999999", b"Inference-Header-Content-Length: x",
    b"Expect: 100-continue", b"Upgrade: h2c", b"Upgrade: websocket", b"Cookie: " + b"x" * 8000,
    b"Authorization: Bearer x", b"Accept: \xff\xfe", b"Origin: null", b"Content-Type: image/png",
    b"X-Forwarded-For: 1.2.3.4", b"Range: bytes=0-", b"Content-Length: 5", b"Content-Length: x",
]  # fmt: skip


class Fuzzer:
    """Seeded requests: good ones, spoilt in one way or several."""

    def __init__(self, seed: int, adapter: tuple[bytes, bytes]) -> None:
        self.random = np.random.default_rng(seed)
        self.config, self.tensors = adapter
        self.pictures = []
        for form in ("PNG", "JPEG", "WEBP"):
            file = io.BytesIO()
            pixels = self.random.integers(0, 256, (24, 31, 3), np.uint8)
            Image.fromarray(pixels).save(file, form)
            self.pictures.append(file.getvalue())
        self.bomb = gzip.compress(bytes(65 << 20))
        self.good = [*self._bodies()]

    def _bodies(self) -> list[tuple[dict[str, Any], bytes]]:
        """JSON and binary tensors of good requests."""
        x = images(2)
        texts = [base64.b64encode(picture).decode() for picture in self.pictures]
        raw = b"".join(len(p).to_bytes(4, "little") + p for p in self.pictures)
        numbers = {"name": "images", "datatype": "FP32", "shape": list(x.shape)}
        names = {"name": "adapters", "datatype": "BYTES", "shape": [3], "data": ["alpha"] * 3}
        bytes_ = {"name": "images", "datatype": "BYTES", "shape": [3]}
        whole = {"parameters": {"binary_data_size": x.nbytes}}
        return [
            ({"inputs": [numbers | whole], "parameters": {"adapter": "beta"}}, x.tobytes()),
            ({"inputs": [bytes_ | {"parameters": {"binary_data_size": len(raw)}}, names],
              "outputs": [{"name": "labels"}, {"name": "probabilities"}]}, raw),
            ({"inputs": [bytes_ | {"data": texts}],
              "outputs": [{"name": "logits", "parameters": {"classification": 2}}]}, b""),
            ({"inputs": [numbers | {"shape": [0, 3, 32, 32], "data": []}],
              "parameters": {"timeout": 10**6, "priority": 1}}, b""),
        ]  # fmt: skip

    def pick(self, several: Any) -> Any:
        return several[int(self.random.integers(len(several)))]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def spoilt_json(self, content: Any) -> Any:
        """A copy, one value of which is replaced, doubled or gone."""
        content = copy.deepcopy(content)
        inside = content
        while True:
            if not isinstance(inside, (dict, list)) or not inside:
                return self.pick(VALUES)
            key = self.pick(list(inside) if isinstance(inside, dict) else range(len(inside)))
            below = inside[key]
            if (
                isinstance(below, (dict, list))
                and below
                and self.chance(0.5 if key == "shape" else 0.75)
            ):
                inside = below
                continue
            way = self.random.integers(4)
            if way == 0:
                del inside[key]
            elif way == 1 and isinstance(inside, list):
                inside += [below] * int(self.random.integers(1, 40))
            else:
                inside[key] = self.pick(SHAPES if key == "shape" else VALUES)
            return content

    def spoilt_bytes(self, content: bytes) -> bytes:
        """Some bytes changed, cut, doubled or put in."""
        way = self.random.integers(4)
        place = int(self.random.integers(len(content) + 1))
        if way == 0:
            return content[:place]
        if way == 1:
            return (
                content[:place]
                + self.random.bytes(int(self.random.integers(1, 9)))
                + content[place:]
            )
        if way == 2:
            return content + content[place:]
        changed = bytearray(content)
        for _ in range(int(self.random.integers(1, 9))):
            if changed:
                changed[int(self.random.integers(len(changed)))] = int(self.random.integers(256))
        return bytes(changed)

    def body(self) -> tuple[bytes, list[bytes]]:
        """An inference's body, and the headers that belong to it."""
        content, tail = self.pick(self.good)
        for _ in range(int(self.random.integers(0, 3))):
            content = self.spoilt_json(content)
        if tail and self.chance(0.3):
            tail = self.spoilt_bytes(tail)
        head = json.dumps(content).encode()
        if self.chance(0.15):
            head = self.spoilt_bytes(head)
        if self.chance(0.02):
            head = self.pick([b"[" * 100_000, b'{"inputs":' * 9_000, b"{}" + b" " * 500_000])
        length = len(head) + (int(self.random.integers(-9, 9)) if self.chance(0.1) else 0)
        headers = [b"Inference-Header-Content-Length: %d" % length] if tail else []
        body = head + tail
        if self.chance(0.15):
            packed, name = (
                (gzip.compress(body, 1), b"gzip")
                if self.chance(0.5)
                else (zlib.compress(body), b"deflate")
            )
            if self.chance(0.02):
                packed = self.bomb
            body = self.spoilt_bytes(packed) if self.chance(0.5) else packed
            headers.append(b"Content-Encoding: " + name)
        return body, headers

    def upload(self) -> tuple[bytes, list[bytes]]:
        """An adapter's."""
        parts = [self.config, self.tensors]
        index = int(self.random.integers(2))
        parts[index] = self.spoilt_bytes(parts[index])
        file = f"file:{self.pick([TENSOR_FILE, '1/' + TENSOR_FILE, CONFIG_FILE, '../x.pt'])}"
        parameters = {
            "config": parts[0].decode("latin-1"),
            file: base64.b64encode(parts[1]).decode(),
        }
        content = {"parameters": parameters}
        if self.chance(0.3):
            content = self.spoilt_json(content)
        return json.dumps(content).encode(), [b"Authorization: Bearer " + TOKEN.encode()]

    def request(self) -> tuple[str, bytes]:
        """A request of the right length: its method, and its bytes."""
        if self.chance(0.06):
            body, headers = self.upload()
            action = self.pick(["load", "load", "unload"])
            path = f"/v2/repository/models/{self.pick([*NAMES, 'fuzz0', 'fuzz1'])}/{action}"
        else:
            body, headers = self.body()
            model = self.pick(["tiny", "alpha"]) if self.chance(0.8) else self.pick(NAMES)
            path = f"/v2/models/{model}/infer"
        if self.chance(0.05):
            path = self.pick(OTHERS)
        method = self.pick(METHODS) if self.chance(0.05) else "POST"
        lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", *headers]
        lines.append(b"Content-Length: %d" % len(body))
        if self.chance(0.1):
            lines.insert(int(self.random.integers(1, len(lines) + 1)), self.pick(HEADERS))
        return method, b"\r\n".join([*lines, b"", body])

    def rubbish(self) -> bytes:
        """Bytes that need not be a request at all."""
        way = self.random.integers(3)
        if way == 0:
            return self.random.bytes(int(self.random.integers(1, 400)))
        _, content = self.request()
        if way == 1:
            return self.spoilt_bytes(content[: int(self.random.integers(60, 400))])
        chunked = content.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX-Length", 1)
        return self.spoilt_bytes(chunked)


class Client:
    """One connection, kept as long as the server keeps it."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self.address = (host, int(port))
        self.connection: socket.socket | None = None

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def ask(self, method: str, content: bytes) -> int:
        """The status of the answer; 0 if the connection was ended instead."""
        if self.connection is None:
            self.connection = socket.create_connection(self.address, timeout=PATIENCE)
        try:
            self.connection.sendall(content)
            with http.client.HTTPResponse(self.connection, method=method) as answer:
                answer.begin()
                answer.read()
                if answer.will_close:
                    self.close()
                return answer.status
        except (ConnectionError, http.client.HTTPException):
            self.close()
            return 0

    def throw(self, content: bytes) -> int:
        """The same for bytes after which nothing more comes."""
        with socket.create_connection(self.address, timeout=PATIENCE) as connection:
            found = b""
            with contextlib.suppress(OSError):
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(1 << 16):
                    found += part
        return int(found.split(b" ", 2)[1]) if found else 0


def play(client: Client, fuzzer: Fuzzer, requests: int) -> Counter[int]:
    """How often each status came."""
    found: Counter[int] = Counter()
    for _ in range(requests):
        if fuzzer.chance(0.1):
            found[client.throw(fuzzer.rubbish())] += 1
        else:
            found[client.ask(*fuzzer.request())] += 1
    return found


def own_memory(process: psutil.Process) -> int:
    """Bytes that a process wrote itself. Pages of files come and go as the kernel likes."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        return int(process.memory_info().rss)
    line = next(s for s in status.read_text().splitlines() if s.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def test_malformed_requests(branches, workshop, tmp_path: Path):
    fleet, token = tmp_path / "fleet", tmp_path / "token"
    fleet.mkdir()
    token.write_text(TOKEN)
    token.chmod(0o600)
    adapter = files_of(make_adapter(workshop, 1), tmp_path)
    options = [
        "--model-name", "tiny", "--grpc-port", "-1", "--request-seconds", "2",
        "--adapters-dir", fleet, "--allow-adapter-loading", "--token-file", token,
    ]  # fmt: skip
    with running_server(branches, tmp_path / "log", *options) as server:
        process = psutil.Process(server.process.pid)
        client = Client(server.http)
        play(client, Fuzzer(1, adapter), WARM_UP)
        before = own_memory(process)
        found = play(client, Fuzzer(2, adapter), REQUESTS)
        after = own_memory(process)
        client.close()
        assert found.total() == REQUESTS
        wrong = {status for status in found if status >= 500} - {503, 504}
        assert not wrong, (found, [r for r in server.records() if r["level"] == "ERROR"][:3])
        # Changes that mean nothing are answered; most are noticed.
        assert found[200] and found[413] and found[404]
        assert found[400] > REQUESTS // 3, found
        assert after - before < MOST_GROWTH, (before, after)
        x = images(3)
        body = {"inputs": [{"name": "images", "datatype": "FP32", "shape": [3, 3, 32, 32],
                            "data": x.reshape(-1).tolist()}]}  # fmt: skip
        status, answer = server.json("POST", "/v2/models/gamma/infer", body)
        assert status == 200
        with open_session(branches, device="cpu", threads=1) as session:
            expected = session.run(x, "gamma")[:, : CLASSES["gamma"]]
        data = np.asarray(answer["outputs"][0]["data"], np.float32)
        assert np.array_equal(data.reshape(3, -1), expected)
        assert server.process.poll() is None
        assert {path.name for path in fleet.iterdir()} <= ADAPTERS
        assert not [r for r in server.records() if r["message"] == "request failed"]
