"""docs/threat-model.md, line by line: what the server does against each threat."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gzip
import hmac
import io
import json
import os
import pickle
import re
import signal
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.errors import OptionError
from hhdeploy.runtime.serving import server as server_module
from hhdeploy.runtime.serving.access import tokens as tokens_module
from hhdeploy.runtime.serving.access.hosts import host_name
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.errors import UnauthorizedError
from hhdeploy.runtime.serving.http import bodies as limits
from hhdeploy.runtime.serving.server import Addresses, serve
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.fleets import PATIENCE, files_of, make_adapter, put_adapter
from tests.runtime.serving.servers import (
    AUTHORISED,
    TOKEN,
    Server,
    not_served,
    running_server,
    signal_own_server,
)
from tests.support import images
from tests.workshop import ROOT, contents, copy_bundle, flip_byte

INFER = "/v2/models/alpha/infer"
SECRET = "the-secret-of-another-file"
# Of a scene with a server that starts in it, on a machine that is busy.
AND_A_START = 5 * PATIENCE


# --- servers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Around the fleet directory: nothing here may ever change."""
    return tmp_path_factory.mktemp("loading")


@pytest.fixture(scope="module")
def loading(branches: Path, root: Path) -> Iterator[Server]:
    """A server that lets the network load adapters into ``root/fleet``."""
    (root / "fleet").mkdir()
    token = root / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    log = root / "log"
    options = ["--adapters-dir", root / "fleet", "--allow-adapter-loading", "--token-file", token]
    with running_server(
        branches, log, "--model-name", "tiny", "--log-level", "debug", *options
    ) as found:
        yield found


@contextlib.asynccontextmanager
async def served(bundle: Path, **limits: Any) -> AsyncIterator[int]:
    """A server with other limits, in this process: its port."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    session = open_session(bundle, device="cpu", threads=1)
    service = Service(session, ServeSettings(Path("tiny"), **limits))
    announced: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(
            service,
            access=Access(),
            http_port=0,
            grpc_port=None,
            announce=announced.set_result,
        )
    )
    try:
        await asyncio.wait([announced, serving], return_when=asyncio.FIRST_COMPLETED)
        yield announced.result().http_port
    finally:
        signal_own_server(serving)
        await asyncio.wait_for(serving, PATIENCE)
        for number, handler in before.items():
            signal.signal(number, handler)


def head(method: str = "POST", path: str = INFER, **headers: object) -> bytes:
    """A request without its body."""
    named = {"Host": "localhost", **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in named.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


async def exchange(port: int, content: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(content)
        return await asyncio.wait_for(rest(reader), PATIENCE)
    finally:
        writer.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the end, or until what was sent in vain breaks the connection off."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while content := await reader.read(1 << 16):
            found += content
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def talk(server: Server, content: bytes) -> bytes:
    """`exchange` with a server in another process."""
    return asyncio.run(exchange(int(server.http.split(":")[1]), content))


def message(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    """Status and error message, which is short and has no control characters."""
    status, _, body = answer
    found = json.loads(body)["error"]
    assert len(found) <= 4000 and found.isprintable()
    return status, found


# --- who may ask ----------------------------------------------------------------------------------


def test_it_listens_on_the_loopback_alone(server):
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(server.process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 2  # HTTP and gRPC
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_a_web_page_reads_nothing_and_loads_nothing(loading):
    origin = {"origin": "https://evil.example"}
    preflight = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    for path in ("/v2", "/v2/models/tiny", "/status", "/metrics", "/"):
        _, headers, _ = loading.request("GET", path, headers=origin)
        assert not [name for name in headers if name.startswith("access-control")]
    for path in (INFER, "/v2/repository/models/alpha/load", "/v2/repository/models/alpha/unload"):
        status, headers, _ = loading.request("OPTIONS", path, headers=preflight)
        assert status == 405
        assert not [name for name in headers if name.startswith("access-control")]
    # What a page can send without asking first: no Authorization header.
    simple = {**origin, "content-type": "text/plain"}
    for action in ("load", "unload"):
        path = f"/v2/repository/models/alpha/{action}"
        assert loading.request("POST", path, b"{}", simple)[0] == 401


def test_a_page_whose_name_points_here_reads_nothing(server):
    def ask(host: str, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        return server.request(method, path, b"{}", {"host": host})

    port = server.http.split(":")[1]
    for host in ("localhost", f"localhost:{port}", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
        assert ask(host, "/v2")[0] == 200, host
    paths = ["/v2", "/v2/models/tiny", "/v2/models/tiny/stats", "/v2/health/ready", "/status"]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", "", "a@b",
                 "localhost@evil.example", "localhost.", "0x7f000001"):  # fmt: skip
        for path in (*paths, "/metrics"):
            status, said = message(ask(host, path))
            assert status == 403 and "`allowed_hosts`" in said
        assert ask(host, INFER, "POST")[0] == ask(host, "/v2/repository/index", "POST")[0] == 403
    nameless = talk(server, b"GET /v2 HTTP/1.0\r\n\r\n")
    assert status_of(nameless) == 403


def test_names_that_the_operator_allows(small, tmp_path):
    options = ["--allowed-host", "models.example", "--grpc-port", "-1"]
    with running_server(small, tmp_path / "log", *options) as found:
        for host, status in (
            ("Models.example:443", 200),
            ("localhost", 200),
            ("evil.example", 403),
        ):
            assert found.request("GET", "/v2", headers={"host": host})[0] == status
    shown = ServeSettings(
        small,
        host="0.0.0.0",
        allowed_hosts=frozenset(
            {"Example.org:8080", "[2001:DB8::1]:443", "2001:db8:0::2", "a_b.c"}
        ),
    )
    assert shown.hosts() == {
        "localhost", "127.0.0.1", "::1", "0.0.0.0",
        "example.org", "2001:db8::1", "2001:db8::2", "a_b.c",
    }  # fmt: skip
    for host in ("example.org", "EXAMPLE.org:80", "[2001:db8::1]:8000", "[2001:db8::2]"):
        assert host_name(host) in shown.hosts()
    # Another copy, e.g. a replica's.
    assert dataclasses.replace(shown).hosts() == shown.hosts()
    for none in ("https://example.org", "*", "*.example", "b\u00fccher.example", "", "a/b", "a@b.c",
                 "a b", ":80", "[", "[abc", "a:b"):  # fmt: skip
        with pytest.raises(OptionError, match="`allowed_hosts`: expected a name"):
            ServeSettings(small, allowed_hosts=frozenset({none}))
    assert ServeSettings(small, host="0.0.0.0").hosts() is None
    here = {"localhost", "127.0.0.1", "::1", "127.0.0.5"}
    assert ServeSettings(small, host="127.0.0.5").hosts() == here


# --- who may change -------------------------------------------------------------------------------


def test_loading_is_off_unless_it_is_allowed(server, branches, monkeypatch):
    for action in ("load", "unload"):
        path = f"/v2/repository/models/alpha/{action}"
        status, said = message(server.request("POST", path, b"{}", AUTHORISED))
        assert status == 403 and "`allow_adapter_loading`" in said
    said = not_served(monkeypatch, branches, "--allow-adapter-loading", code=2)
    assert "needs --token-file" in said


@pytest.mark.parametrize(
    "header",
    [
        None, "", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}", f"Basic {TOKEN}", f"Bearer {TOKEN} {TOKEN}", "Bearer \xfc",
        "Bearer " + "x" * 5000,
    ],
)  # fmt: skip
def test_loading_needs_the_token(loading, header):
    headers = {} if header is None else {"authorization": header}
    for action in ("load", "unload"):
        path = f"/v2/repository/models/alpha/{action}"
        status, said = message(loading.request("POST", path, b"{}", headers))
        assert status == 401 and said.endswith("Authorization: Bearer TOKEN.")
        unsent = head(path=path, content_length=1000, connection="close", **headers)
        assert status_of(talk(loading, unsent)) == 401  # before a byte of it was sent


def test_the_token_is_compared_in_constant_time(monkeypatch):
    compared, compare_digest = [], hmac.compare_digest

    def compare(*pair: bytes) -> bool:
        compared.append(pair)
        return compare_digest(*pair)

    monkeypatch.setattr(tokens_module.hmac, "compare_digest", compare)
    with pytest.raises(UnauthorizedError):
        Access(TOKEN).check_loading("Bearer guess")
    Access(TOKEN).check_loading(f"bearer {TOKEN}")
    assert compared == [(b"guess", TOKEN.encode()), (TOKEN.encode(), TOKEN.encode())]


def test_the_token_is_nowhere(loading):
    guess = "a-guess-that-nobody-may-read"
    path = "/v2/repository/models/nobody/load"
    bodies = [
        loading.request("POST", path, b"{}", {"authorization": f"Bearer {guess}"})[2],
        loading.request("POST", path, b"{}", AUTHORISED)[2],
        *(loading.request("GET", there)[2] for there in ("/v2", "/status", "/metrics", "/")),
    ]
    seen = b"".join(bodies) + loading.log.read_bytes()
    assert b"nobody" in seen
    for word in (TOKEN, guess):
        assert word.encode() not in seen
        assert base64.b64encode(word.encode()).rstrip(b"=") not in seen
    assert TOKEN not in " ".join(psutil.Process(loading.process.pid).cmdline())


# --- what is loaded -------------------------------------------------------------------------------


class Planted:
    """A pickle that writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_never_unpickled(loading, root, workshop, tmp_path):
    marker = tmp_path / "unpickled"
    planted = pickle.dumps(Planted(marker))
    pickle.loads(planted)
    assert marker.is_dir()  # it works
    marker.rmdir()
    config, tensors = files_of(make_adapter(workshop, 1), tmp_path)
    fleet = root / "fleet"
    for name, file in (
        ("evil", TENSOR_FILE),
        ("torch", "adapter_model.pth"),
        ("bin", "adapter_model.bin"),
    ):
        (fleet / name).mkdir()
        (fleet / name / CONFIG_FILE).write_bytes(config)
        (fleet / name / file).write_bytes(planted)
        status, said = message(load(loading, name))
        assert status == 400 and "safetensors" in said
        assert loading.request("POST", f"/v2/models/{name}/infer", question())[0] == 400
    for file in (TENSOR_FILE, "adapter_model.bin", "adapter_model.pth", "x.pkl"):
        status, said = message(upload(loading, "uploaded", config, {file: planted}))
        assert status == 400 and "safetensors" in said
    status, said = message(upload(loading, "uploaded", planted, {TENSOR_FILE: tensors}))
    assert status == 400 and "JSON" in said
    assert not marker.exists() and not (fleet / "uploaded").exists()


def load(server: Server, name: str) -> tuple[int, dict[str, str], bytes]:
    return server.request("POST", f"/v2/repository/models/{name}/load", b"{}", AUTHORISED)


def upload(
    server: Server, name: str, config: bytes, files: dict[str, bytes]
) -> tuple[int, dict[str, str], bytes]:
    """As tritonclient sends it; ``name`` as it stands in the URL."""
    parameters = {"config": config.decode("latin-1")}
    for file, content in files.items():
        parameters[f"file:{file}"] = base64.b64encode(content).decode()
    body = {"parameters": parameters}
    return server.request("POST", f"/v2/repository/models/{name}/load", body, AUTHORISED)


def question(**changes: Any) -> dict[str, Any]:
    """A good request of one image."""
    data = images(1).reshape(-1).tolist()
    item = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": data}
    return {"inputs": [{**item, **changes}]}


@pytest.mark.parametrize(
    "name",
    [
        "..", ".", "../outside", "/outside", "a/../../outside", "..\\outside", "a\0b", "\0", " ",
        "backbone", ".hidden", "-x", "x" * 129, "\u0430lpha", "alpha\u200b", "alph\uff41", "a b",
        "a\n", "a:b", "~", "$HOME", "%2e%2e", "",
    ],
)  # fmt: skip
def test_names_stay_in_the_fleet_directory(loading, root, workshop, tmp_path, name):
    (root / "outside").mkdir(exist_ok=True)

    def seen() -> dict[str, bytes]:
        return {k: v for k, v in contents(root).items() if k != "log"}

    before = seen()
    config, tensors = files_of(make_adapter(workshop, 1), tmp_path)
    for quoted in (urllib.parse.quote(name, safe=""), urllib.parse.quote(name, safe="/")):
        for answer in (
            load(loading, quoted),
            upload(loading, quoted, config, {TENSOR_FILE: tensors}),
            loading.request("POST", f"/v2/repository/models/{quoted}/unload", b"{}", AUTHORISED),
            loading.request("POST", f"/v2/models/{quoted}/infer", question()),
            loading.request("GET", f"/v2/models/{quoted}"),
        ):
            assert message(answer)[0] in (400, 404, 405)
    body = {**question(), "parameters": {"adapter": name}}
    if name not in ("", "backbone"):
        assert message(loading.request("POST", "/v2/models/tiny/infer", body))[0] == 404
    assert seen() == before


def test_links_do_not_lead_out_of_the_fleet_directory(loading, root, workshop, tmp_path):
    fleet, outside = root / "fleet", tmp_path / "outside"
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"peft_type": SECRET}))
    put_adapter(make_adapter(workshop, 3), tmp_path, "outside")
    (fleet / "folder").symlink_to(outside)
    put_adapter(make_adapter(workshop, 4), fleet, "file")
    (fleet / "file" / CONFIG_FILE).unlink()
    (fleet / "file" / CONFIG_FILE).symlink_to(secret)
    for name in ("folder", "file"):
        status, said = message(load(loading, name))
        assert status == 400 and "leads out of the fleet directory" in said
    index = loading.request("POST", "/v2/repository/index")[2]
    assert SECRET.encode() not in index + loading.log.read_bytes()
    # An upload replaces the link, not what it leads to.
    before = contents(outside)
    config, tensors = files_of(make_adapter(workshop, 5), tmp_path)
    status, _, _ = upload(loading, "folder", config, {TENSOR_FILE: tensors})
    assert status == 200 and not (fleet / "folder").is_symlink()
    assert contents(outside) == before


@pytest.mark.parametrize("kind", ["graph", "bank"])
def test_a_changed_bundle_is_not_served(branches, tmp_path, monkeypatch, kind):
    bundle = copy_bundle(branches, tmp_path / "bundle")
    files = json.loads((bundle / "hhdeploy.json").read_text())["files"]
    (chosen, *_) = [name for name in files if kind in name or (kind == "graph" and "onnx" in name)]
    flip_byte(bundle / chosen)
    said = not_served(monkeypatch, bundle, "--device", "cpu", "--http-port", 0)
    assert "expected sha256" in said and chosen in said


def test_a_changed_adapter_is_not_loaded(branches, tmp_path):
    bundle = copy_bundle(branches, tmp_path / "bundle")
    options = ["--model-name", "tiny", "--slots", "3", "--grpc-port", "-1"]
    with running_server(bundle, tmp_path / "log", *options) as found:
        flip_byte(bundle / "adapters" / "gamma" / TENSOR_FILE)
        status, said = message(found.request("POST", "/v2/models/gamma/infer", question()))
        assert status == 500 and "expected sha256" in said
        assert found.request("POST", "/v2/models/beta/infer", question())[0] == 200
        assert found.request("POST", "/v2/models/alpha/infer", question())[0] == 200


# --- what a request may cost ----------------------------------------------------------------------


def test_bodies_beyond_the_limit(server):
    vast = 65 << 20
    chunk, bomb = bytes(1 << 20), gzip.compress(bytes(vast))
    assert len(bomb) < 100_000
    # With binary tensors, and all JSON, which for this model is the least that the default gives.
    for most, more in ((64 << 20, {"inference-header-content-length": "9"}), (8 << 20, {})):
        spelt = {name.replace("-", "_"): value for name, value in more.items()}
        answer = talk(server, head(content_length=vast, connection="close", **spelt))
        assert status_of(answer) == 413  # before a byte of it was sent
        status, said = message(server.request("POST", INFER, iter([chunk] * 65), more))
        assert (status, said) == (413, f"the body is beyond {most} bytes.")
        packed = {"content-encoding": "gzip", **more}
        status, said = message(server.request("POST", INFER, bomb, packed))
        assert (status, said) == (413, f"the decompressed body is beyond {most} bytes.")
    assert server.request("POST", "/v2/repository/index", bytes(2 << 20))[0] == 413


def test_many_bodies_are_too_large_together(small, monkeypatch):
    monkeypatch.setattr(limits, "SLOW_SECONDS", 10.0 * PATIENCE)

    async def scene() -> None:
        async with served(small, bodies_bytes=100_000) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(content_length=90_000) + bytes(80_000))
            second = head(content_length=30_000, connection="close") + bytes(30_000)
            answer = b""
            while status_of(answer := await exchange(port, second)) != 429:
                assert status_of(answer) == 400  # the first one is not read yet
                await asyncio.sleep(0.01)
            assert b"retry-after: 1" in answer and b"Try again later" in answer
            writer.close()
            while status_of(await exchange(port, second)) != 400:
                await asyncio.sleep(0.01)  # until the server saw that the first client left

    asyncio.run(asyncio.wait_for(scene(), AND_A_START))


def test_what_a_compressed_body_becomes_counts_as_well(small):
    """It is decompressed elsewhere, and what comes back is held here."""
    tensor = {"name": "images", "datatype": "FP32", "shape": [24, 3, 32, 32]}
    tensor["parameters"] = {"binary_data_size": 24 * 3 * 32 * 32 * 4}
    lead = json.dumps({"inputs": [tensor]}).encode()
    body = gzip.compress(lead + bytes(24 * 3 * 32 * 32 * 4))
    assert len(body) < 10_000
    asked = head(
        content_length=len(body), content_encoding="gzip",
        inference_header_content_length=len(lead), connection="close",
    ) + body  # fmt: skip

    async def scene() -> None:
        for most, status in ((200_000, 429), (400_000, 200)):
            async with served(small, bodies_bytes=most) as port:
                for _ in range(2):  # and nothing of the first stays counted
                    assert status_of(await exchange(port, asked)) == status

    asyncio.run(asyncio.wait_for(scene(), AND_A_START))


def test_what_a_compressed_upload_becomes_counts_as_well(small, monkeypatch):
    monkeypatch.setattr(Access, "check_loading", lambda self, authorization: None)
    tensors = base64.b64encode(bytes(300_000)).decode()
    upload = {"config": "{}", "file:adapter_model.safetensors": tensors}
    body = gzip.compress(json.dumps({"parameters": upload}).encode())
    asked = head(
        path="/v2/repository/models/new/load", content_length=len(body), content_encoding="gzip",
        connection="close",
    ) + body  # fmt: skip

    async def scene() -> None:
        for most, busy in ((200_000, True), (400_000, False)):
            async with served(small, bodies_bytes=most) as port:
                answer = await exchange(port, asked)
                assert (status_of(answer) == 429) is busy
                assert busy or 400 <= status_of(answer) < 500  # that is no adapter

    asyncio.run(asyncio.wait_for(scene(), AND_A_START))


def test_a_body_that_never_ends_makes_room_for_others(small, monkeypatch):
    """The largest of those that are slow, and no other."""
    monkeypatch.setattr(limits, "SLOW_SECONDS", 0.05)

    async def scene() -> None:
        async with served(small, bodies_bytes=100_000) as port:
            held = []
            for size in (41_000, 23_000):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head(content_length=60_000) + bytes(size))
                held.append((reader, writer))
            (slow, _), (other, writer) = held
            refused = asyncio.ensure_future(slow.readuntil(b"\r\n\r\n"))
            body = head(content_length=59_000, connection="close") + bytes(59_000)
            while not refused.done():  # until both have arrived so far, and are slow
                assert status_of(await exchange(port, body)) in (400, 429)
            assert status_of(refused.result()) == 429
            assert status_of(await exchange(port, body)) == 400
            writer.write(bytes(37_000))
            assert status_of(await other.readuntil(b"\r\n\r\n")) == 400
            for _, each in held:
                each.close()

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_pictures_that_cost_more_than_their_bytes(server):
    def ask(*pictures: bytes) -> tuple[int, str]:
        data = [base64.b64encode(picture).decode() for picture in pictures]
        body = question(datatype="BYTES", shape=[len(data)], data=data)
        return message(server.request("POST", INFER, body))

    def png(size: tuple[int, int]) -> bytes:
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        return file.getvalue()

    assert ask(png((8000, 8000))) == (
        413, "image 0: 8000 x 8000 pixels, at most 50000000 are taken."
    )  # fmt: skip
    status, said = ask(png((100_000, 10)))
    assert status == 413 and "one side at most 50 times the other" in said
    status, said = ask(*[png((1, 1))] * 33)
    assert status == 400 and "at most 32" in said
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", progressive=True)
    status, said = ask(file.getvalue()[:-2] + b"\xff\xda" * 200 + b"\xff\xd9")
    assert status == 413 and "scans" in said
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "GIF")
    assert ask(file.getvalue())[0] == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-1, 3, 32, 32]}, {"shape": [2**62, 2**62]}, {"shape": [0, 2**30, 2**30, 2**30]},
        {"shape": [0, 3, 32, 32], "data": []}, {"shape": [33, 3, 32, 32]}, {"shape": [1] * 99},
        {"shape": [2**31, 3, 32, 32]}, {"shape": [1, 3, 32, 10**400]}, {"shape": []},
        {"datatype": "BYTES", "shape": [10**6], "data": [""] * 10**6},
    ],
)  # fmt: skip
def test_shapes_that_are_absurd(server, changes):
    status, _ = message(server.request("POST", INFER, question(**changes)))
    assert status == 400
    binary = {**changes, "parameters": {"binary_data_size": 0}}
    binary.pop("data", None)
    status, _ = message(server.request("POST", INFER, question(**binary)))
    assert status == 400


def test_json_that_is_absurd(server):
    for status, body in (
        (400, b"[" * 1_000_000),
        (400, b'{"inputs":' * 200_000),
        (400, b'{"inputs":[' + b"{}," * 100_000 + b"{}]}"),
        (400, b'{"a":' + b"9" * 100_000 + b"}"),
        (400, b'{"inputs": [], "outputs": [' + b'{"name":"logits"},' * 20_000 + b"{}]}"),
        (413, b'{"a":[' + b"[]," * 6_000_000 + b"[]]}"),
    ):
        assert message(server.request("POST", INFER, body))[0] == status
    # What is far from any end: these are read elsewhere, and nobody waits for them.
    assert (
        message(server.request("POST", INFER, b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"))[0] == 400
    )
    twice = {**question(), "outputs": [{"name": "logits"}] * 2}
    assert "twice" in message(server.request("POST", INFER, twice))[1]


def test_headers_without_end(server):
    for content in (
        head()[:-2] + b"a: " + b"b" * 1_000_000,
        head()[:-2] + b"a: b\r\n" * 100_000,
        b"GET /" + b"a" * 1_000_000,
        head(transfer_encoding="chunked") + b"0\r\n" + b"a: b\r\n" * 100_000,
        head(transfer_encoding="chunked") + b"1;" + b"a" * 1_000_000,
    ):
        answer = talk(server, content)
        assert not answer or status_of(answer) == 400
    assert server.request("GET", "/v2")[0] == 200


def test_slow_clients_are_closed(small, monkeypatch):
    """One is silent, one never ends its headers, one its body, and one goes on after 413."""
    monkeypatch.setattr(server_module, "_GRACE_SECONDS", 3.0)

    async def drip(port: int, begin: bytes, drop: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reading = asyncio.create_task(rest(reader))
        with contextlib.suppress(ConnectionError):
            writer.write(begin)
            while not reading.done():
                writer.write(drop)
                await writer.drain()
                await asyncio.wait([reading], timeout=0.02)
        writer.close()
        return await reading

    async def scene() -> None:
        async with served(small, request_seconds=0.3, body_bytes=1_000_000) as port:
            whole = {"content_length": 999_999}
            silent, headers, body, refused, again = await asyncio.gather(
                drip(port, b"", b""),
                drip(port, head()[:-2], b"a: b\r\n"),
                drip(port, head(**whole), b"x"),
                drip(port, head(content_length=10**9), b"x"),
                drip(port, head("GET", "/v2") + head(**whole), b"x"),
            )
        assert silent == headers == b""
        assert status_of(body) == 504 and b"not answered within 0.3 s" in body
        assert status_of(refused) == 413
        assert again.count(b"HTTP/1.1 200") == again.count(b"HTTP/1.1 504") == 1

    asyncio.run(asyncio.wait_for(scene(), AND_A_START))


def test_connections_are_counted(small):
    async def scene() -> None:
        async with served(small, connections=4) as port:
            ask = head("GET", "/v2", connection="close")
            assert status_of(await exchange(port, ask)) == 200
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            turned_away = await exchange(port, ask)
            assert status_of(turned_away) == 503 and b"connection: close" in turned_away
            text = json.loads(turned_away.partition(b"\r\n\r\n")[2])["error"]
            assert text.startswith("too many connections: ")
            for _, writer in idle:
                writer.close()
            while status_of(await exchange(port, ask)) != 200:
                await asyncio.sleep(0.01)  # until the server saw that they left
            counted = await exchange(port, head("GET", "/metrics", connection="close"))
            assert b'hhdeploy_refused_requests_total{reason="busy"}' in counted

    asyncio.run(asyncio.wait_for(scene(), AND_A_START))


# --- what it tells --------------------------------------------------------------------------------


def test_messages_and_logs_hold_no_control_characters(server):
    evil = '\r\n{"level":"ERROR","message":"forged"}\0\x1b[2J\u2028'
    quoted = urllib.parse.quote(evil, safe="")
    server.records()  # also those of its start
    start = server.log.stat().st_size
    long = evil + "x" * 100_000
    for answer in (
        server.request("GET", f"/v2/models/{quoted}"),
        server.request("POST", f"/v2/models/{quoted}/infer", question()),
        server.request("GET", f"/{quoted}"),
        server.request("POST", INFER, question(name=long)),
        server.request("POST", INFER, question(datatype=long)),
        server.request("POST", INFER, question(shape=long)),
        server.request("POST", INFER, {**question(), "parameters": {"adapter": long}}),
        server.request("POST", INFER, {**question(), "parameters": {long: []}}),
        server.request("POST", INFER, {**question(), "parameters": {"timeout": long}}),
        server.request("POST", INFER, {**question(), "outputs": [{"name": long}]}),
        server.request("POST", INFER, b"{}", {"inference-header-content-length": "x" * 10_000}),
        server.request("POST", INFER, b"{}", {"content-encoding": "\x85\x9b" + "x" * 10_000}),
        server.request("GET", "/v2", headers={"host": "x" * 10_000}),
    ):
        assert message(answer)[0] in (400, 403, 404)
    text = server.log.read_bytes()[start:].decode()
    lines = text.split("\n")
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert {json.loads(line)["message"] for line in lines if line} == {"request"}


def test_messages_hold_no_file_contents(loading, root, workshop):
    """Of a file that is not what it should be, whatever is in it."""
    folder = put_adapter(make_adapter(workshop, 6), root / "fleet", "texts")
    (folder / CONFIG_FILE).write_text(f"{SECRET} " * 100)
    (folder / TENSOR_FILE).write_text(f"{SECRET} " * 100)
    status, said = message(load(loading, "texts"))
    assert status == 400
    (folder / CONFIG_FILE).write_bytes((workshop.directory("alpha") / CONFIG_FILE).read_bytes())
    status, said_of_tensors = message(load(loading, "texts"))
    assert status == 400
    index = loading.request("POST", "/v2/repository/index")[2].decode()
    assert SECRET not in said + said_of_tensors + index + loading.log.read_text()


def test_a_bug_is_logged_and_not_told(small, monkeypatch, caplog):
    async def bug(self: object, request: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Service, "infer", bug)

    async def scene() -> bytes:
        body = json.dumps(question()).encode()
        async with served(small) as port:
            return await exchange(port, head(content_length=len(body), connection="close") + body)

    answer = asyncio.run(scene())
    assert status_of(answer) == 500 and b"internal error" in answer
    assert SECRET.encode() not in answer and SECRET in caplog.text


# --- the page -------------------------------------------------------------------------------------


def test_the_document_and_the_tests_agree():
    """Each line of the table names its tests; each test here is named."""
    text = (ROOT / "docs" / "threat-model.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`test_" in line]
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(table) - 1  # but the head
    named = set(re.findall(r"`(?:(test_\w+)\.py: )?(test_\w+)`", text))
    folder = Path(__file__).parent
    for file, test in named:
        source = (folder / f"{file or 'test_safety'}.py").read_text()
        assert f"def {test}(" in source, (file, test)
    here = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.MULTILINE))
    assert here - {test for _, test in named} == {"test_the_document_and_the_tests_agree"}
