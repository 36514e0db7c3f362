"""A whole server: started, scraped, its log, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.http.bodies import SMALL
from hhdeploy.runtime.serving.server import serve
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from tests.runtime.serving.fleets import PATIENCE, until
from tests.runtime.serving.servers import not_served, running_server, signal_own_server
from tests.support import assert_parity, images


def infer_body(x, adapter):
    """An inference request as JSON."""
    data = {"name": "images", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    return json.dumps({"inputs": [data], "parameters": {"adapter": adapter}}).encode()


def logits_of(content):
    """Of an answer as JSON."""
    (output,) = (o for o in json.loads(content)["outputs"] if o["name"] == "logits")
    return np.asarray(output["data"], np.float32).reshape(output["shape"])


# --- the end ------------------------------------------------------------------------------------


@pytest.fixture
def signals():
    """The server leaves the system's own handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_request_that_was_taken(small, workshop, signals, number):
    """In this process, so that the session can be held until the signal was seen."""
    x = images(3)
    names = ["alpha", "gamma", "alpha", "gamma", "gamma", "alpha"]
    go, answers, listening, runs = threading.Event(), {}, [], []

    def ask(index, name):
        connection = http.client.HTTPConnection("127.0.0.1", listening[0], timeout=PATIENCE)
        connection.request("POST", "/v2/models/tiny/infer", infer_body(x, name))
        response = connection.getresponse()
        answers[index] = (response.status, response.read())
        connection.close()

    async def scene():
        session = open_session(small, device="cpu", threads=1)
        service = Service(session, ServeSettings(Path("tiny"), max_batch=4))
        run = service._batcher._run

        def held(images, rows):
            runs.append(len(images))
            assert len(runs) == 1 or go.wait(PATIENCE)  # the first one is before it is ready
            return run(images, rows)

        service._batcher._run = held
        endpoint = LocalEndpoint(service)
        serving = asyncio.create_task(
            serve(
                service,
                access=Access(),
                http_port=0,
                grpc_port=None,
                announce=lambda where: listening.append(where.http_port),
            )
        )
        await until(lambda: bool(listening) or serving.done())
        assert await endpoint.ready()
        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(names)]
        for thread in threads:
            thread.start()
        await until(lambda: service.now().pending == len(names) - 1)  # one is in its batch
        signal_own_server(serving, number)
        await until(lambda: not service.ready)
        assert not await endpoint.ready()
        assert not await endpoint.model_ready("alpha")
        await until(lambda: refused(listening[0]))  # load balancers go elsewhere
        assert not answers
        assert not serving.done()
        go.set()
        await asyncio.wait_for(serving, PATIENCE)
        for thread in threads:
            await asyncio.to_thread(thread.join)

    asyncio.run(scene())
    for index, name in enumerate(names):
        status, content = answers[index]
        assert status == 200
        assert_parity(workshop.truth(name, x), logits_of(content), "branches", "float32")


def test_a_server_that_catches_no_signal_gets_none():
    """It would end whatever has none of its own: here the run of the tests."""

    async def ends():
        return None

    async def fails():
        raise ValueError("planted")

    async def stays():
        await asyncio.sleep(PATIENCE)

    async def signalled(server):
        serving = asyncio.create_task(server())
        await asyncio.sleep(0.01)
        signal_own_server(serving)

    for server, kind, said in (
        (ends, AssertionError, "ended by itself"),
        (fails, ValueError, "planted"),
        (stays, AssertionError, "does not catch SIGTERM yet"),
    ):
        with pytest.raises(kind, match=said):
            asyncio.run(signalled(server))


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_signal_ends_it_at_once(small, tmp_path):
    """A request whose body never comes would be waited for."""
    with running_server(small, tmp_path / "log") as server:
        host, port = server.http.split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v2/models/small/infer HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
            )
            client.settimeout(PATIENCE)
            assert b" 100 " in client.recv(100)  # the body is waited for
            server.process.send_signal(signal.SIGTERM)
            asyncio.run(until(lambda: "stopping" in server.log.read_text()))
            assert server.process.poll() is None
            assert server.stop() == -signal.SIGTERM
        assert "stopped" not in [record["message"] for record in server.records()]


def test_a_signal_loses_no_large_json_that_was_taken(small, workshop, tmp_path):
    """It is read by one process, one after the other."""
    x = images(5)
    content = json.loads(infer_body(x, "alpha"))
    content["parameters"]["note"] = "x" * SMALL
    body = json.dumps(content).encode()
    head = (
        "POST /v2/models/small/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    with running_server(small, tmp_path / "log") as server, contextlib.ExitStack() as stack:
        host, port = server.http.split(":")
        clients = [
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            for _ in range(7)
        ]
        for client in clients:
            client.sendall(head.encode())
            assert b" 100 " in client.recv(100)
        server.process.send_signal(signal.SIGTERM)
        asyncio.run(until(lambda: "stopping" in server.log.read_text()))
        for client in clients:
            client.sendall(body)
        for client in clients:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            found = answer.read()
            assert answer.status == 200, found
            assert_parity(workshop.truth("alpha", x), logits_of(found), "branches", "float32")
        assert server.process.wait(PATIENCE) == 0


def test_under_load_a_signal_ends_with_answers_and_no_error(small, workshop, tmp_path):
    """Clients that go on asking: an answer is right, or the connection was never taken."""
    x = images(4)
    truth, body = workshop.truth("alpha", x), infer_body(x, "alpha")
    statuses, answers = [], []

    def ask(server):
        while True:
            try:
                status, _, content = server.request("POST", "/v2/models/small/infer", body)
            except (ConnectionError, http.client.HTTPException):
                return
            statuses.append(status)
            answers.append(content)

    with running_server(small, tmp_path / "log") as server:
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(until(lambda: len(answers) > 20))
        assert server.stop() == 0
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    for content in answers:
        assert_parity(truth, logits_of(content), "branches", "float32")
    requests = [r for r in server.records() if r["message"] == "request"]
    assert len(requests) == len(answers)  # no answer was lost on its way
    assert [r["message"] for r in server.records()][-1] == "stopped"


# --- the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port"])
def test_a_port_that_is_taken(small, monkeypatch, option):
    other = "--grpc-port" if option == "--http-port" else "--http-port"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = not_served(monkeypatch, small, "--device", "cpu", option, port, other, 0)
    assert f"127.0.0.1:{port}" in said
    assert option in said


def test_what_cannot_be_served_is_said_before_it_listens(small, monkeypatch):
    for options, message in (
        (["--pin", "omega"], "--pin: unknown adapter 'omega'"),
        (["--model-name", "alpha"], "--model-name"),
    ):
        ports = ("--http-port", 0, "--grpc-port", 0)
        assert message in not_served(monkeypatch, small, "--device", "cpu", *ports, *options)


# --- what it tells ------------------------------------------------------------------------------


def test_metrics_under_the_names_that_triton_users_scrape(small, tmp_path):
    x = images(2)
    with running_server(small, tmp_path / "log", "--model-name", "tiny") as server:
        assert server.request("POST", "/v2/models/tiny/infer", infer_body(x, "alpha"))[0] == 200
        assert server.request("POST", "/v2/models/gamma/infer", infer_body(x, ""))[0] == 200
        assert server.request("POST", "/v2/models/tiny/infer", infer_body(x, "omega"))[0] == 404
        status, headers, content = server.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, sample.labels.get("reason", sample.labels.get("adapter", ""))): sample
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }
    expected = {
        ("nv_inference_request_success", ""): 2,
        ("nv_inference_request_failure", "OTHER"): 1,
        ("nv_inference_request_failure", "REJECTED"): 0,
        ("nv_inference_count", ""): 4,
        ("nv_inference_pending_request_count", ""): 0,
        ("hhdeploy_adapter_images_total", "alpha"): 2,
        ("hhdeploy_adapter_images_total", "gamma"): 2,
        ("hhdeploy_bank_rows_used", ""): 2,
    }
    for key, value in expected.items():
        assert found[key].value == value, key
    assert ("hhdeploy_adapter_images_total", "omega") not in found
    for name in ("exec_count", "queue_duration_us", "request_duration_us"):
        sample = found[f"nv_inference_{name}", ""]
        assert sample.labels == {"model": "tiny", "version": "1"}
        assert sample.value > 0


def test_the_log_is_a_json_object_a_line(small, tmp_path):
    with running_server(small, tmp_path / "log") as server:
        server.request("POST", "/v2/models/small/infer", b"{")
        server.request("GET", "/none")
        server.request("POST", "/v2/models/small/infer", infer_body(images(1), "gamma"))
        assert server.stop() == 0
    records = server.records()
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    own = [record["message"] for record in records if record["logger"] == "hhdeploy.serve"]
    assert own == ["serving", "stopping", "stopped"]
    requests = [record for record in records if record["message"] == "request"]
    assert [record["status"] for record in requests] == [400, 200]
    assert {record["path"] for record in requests} == {"/v2/models/small/infer"}
    assert all(record["ms"] > 0 for record in requests)


@pytest.mark.usefixtures("signals")
def test_it_is_seen_to_live_while_it_starts(small):
    """Health answers while the fleet is read; nothing else passes for an answer."""
    go, seen = threading.Event(), {}

    async def scene():
        session = open_session(small, device="cpu", threads=1)
        service = Service(session, ServeSettings(Path("tiny")))
        start = service.start

        async def slow():
            await asyncio.to_thread(go.wait, PATIENCE)
            await start()

        service.start = slow
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        announced = []
        serving = asyncio.create_task(
            serve(
                service, access=Access(), http_port=port, grpc_port=None, announce=announced.append
            )
        )

        def ask(method, path, body=None):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request(method, path, body)
            answer = connection.getresponse()
            found = answer.status, json.loads(answer.read())
            connection.close()
            return found

        while not seen:
            try:
                seen["live"] = await asyncio.to_thread(ask, "GET", "/v2/health/live")
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        seen["ready"] = await asyncio.to_thread(ask, "GET", "/v2/health/ready")
        body = infer_body(images(1), "alpha")
        seen["infer"] = await asyncio.to_thread(ask, "POST", "/v2/models/tiny/infer", body)
        assert not announced
        go.set()
        await until(lambda: bool(announced) or serving.done())
        assert await asyncio.to_thread(ask, "GET", "/v2/health/ready") == (200, {"ready": True})
        signal_own_server(serving)
        await asyncio.wait_for(serving, PATIENCE)

    try:
        asyncio.run(scene())
    finally:
        go.set()
    assert seen["live"] == (200, {"live": True})
    assert seen["ready"] == (503, {"ready": False})
    assert seen["infer"][0] == 503 and "starting" in seen["infer"][1]["error"]
