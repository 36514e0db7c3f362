"""What an operator sees of a server: log, latencies, spans, dashboard and alerts."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from tritonclient.utils import InferenceServerException

from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving import tracing
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.grpc.servicer import Servicer
from hhdeploy.runtime.serving.http.app import http_app
from hhdeploy.runtime.serving.logs import REQUEST_ID
from hhdeploy.runtime.serving.metrics import OTHERS, Metrics
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from tests.runtime.serving.grpc_requests import message
from tests.runtime.serving.servers import running_server
from tests.runtime.serving.test_metrics import NOW, of, scrape
from tests.workshop import COMMAND_SECONDS, ROOT

EXAMPLES = ROOT / "examples" / "serving"
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


# --- the log --------------------------------------------------------------------------------------


def test_a_line_says_who_asked_what_and_how_it_ended(server):
    before = len(server.records())
    path = "/v2/models/nobody/infer"
    _, named, _ = server.request("POST", path, b'{"inputs": []}', {REQUEST_ID: "order-66"})
    _, forged, _ = server.request("POST", path, b"{}", {REQUEST_ID: "two words"})
    _, plain, _ = server.request("POST", "/v2/repository/index", b"{}")
    one, two, three = server.requests(3, since=before)
    assert named[REQUEST_ID] == one["request_id"] == "order-66"
    for line, headers in ((two, forged), (three, plain)):
        assert re.fullmatch("[0-9a-f]{16}", line["request_id"])
        assert headers[REQUEST_ID] == line["request_id"]
    assert two["request_id"] != three["request_id"]
    assert (one["status"], three["status"]) == (404, 200)
    assert one["reason"].startswith("unknown adapter 'nobody'")
    assert "reason" not in three
    now = datetime.datetime.now(datetime.timezone.utc)
    for line in (one, two, three):
        assert re.fullmatch(r"127\.0\.0\.1:\d+", line["peer"])
        assert RFC_3339.fullmatch(line["time"])
        age = now - datetime.datetime.fromisoformat(line["time"].replace("Z", "+00:00"))
        assert abs(age) < datetime.timedelta(minutes=5)


def test_grpc_has_the_same_line(server):
    before = len(server.records())
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc) as client,
        pytest.raises(InferenceServerException, match="unknown adapter"),
    ):
        client.infer("nobody", [], headers={REQUEST_ID: "order-67"})
    (line,) = server.requests(1, since=before)
    assert (line["method"], line["code"]) == ("ModelInfer", "NOT_FOUND")
    assert line["request_id"] == "order-67"
    assert line["reason"].startswith("unknown adapter 'nobody'")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line["peer"])


def test_the_lines_of_requests_can_be_left_out(small, tmp_path):
    with running_server(small, tmp_path / "log", "--no-access-log") as server:
        _, headers, _ = server.request("POST", "/v2/models/nobody/infer", b"{}")
        assert headers[REQUEST_ID]
        with (
            tritonclient.grpc.InferenceServerClient(server.grpc) as client,
            pytest.raises(InferenceServerException, match="unknown adapter"),
        ):
            client.infer("nobody", [])
    said = [record["message"] for record in server.records()]
    assert "serving" in said and "request" not in said


# --- latencies ------------------------------------------------------------------------------------


def answered(metrics: Metrics, *adapters: str, seconds: float) -> None:
    metrics.answered(
        dict.fromkeys(adapters, 3), request=seconds, queue=0, prepare=0, run=0, finish=0
    )


def test_latencies_are_a_histogram_of_each_adapter():
    metrics = Metrics("tiny")
    for seconds in (0.004, 0.01, 0.3):
        answered(metrics, "birds", seconds=seconds)
    answered(metrics, "birds", "flowers", seconds=70.0)
    found = scrape(metrics)
    name = "hhdeploy_request_seconds"
    expected = {"0.005": 1, "0.01": 2, "0.2": 2, "0.5": 3, "30.0": 3, "+Inf": 4}
    for bound, count in expected.items():
        assert of(found, f"{name}_bucket", le=bound, adapter="birds") == count
    assert of(found, f"{name}_sum", adapter="birds") == pytest.approx(70.314)
    assert of(found, f"{name}_count", adapter="flowers") == 1


def test_there_are_never_more_than_a_hundred_histograms_and_one():
    metrics = Metrics("tiny")
    names = [f"task-{i:03}" for i in range(257)]
    for name in names:
        answered(metrics, name, name, seconds=0.1)
    there = NOW.__class__(**{**vars(NOW), "adapters": frozenset(names)})

    def counts():
        found = scrape(metrics, there)
        key = "hhdeploy_request_seconds_count"
        return {labels[0][1]: v for (name, labels), v in found.items() if name == key}

    assert counts() == {**dict.fromkeys(names[:100], 1.0), OTHERS: 157.0}
    there = NOW.__class__(**{**vars(NOW), "adapters": frozenset(names[90:])})
    assert len(counts()) == 11  # those that went made room
    answered(metrics, names[256], seconds=0.1)
    assert counts()[names[256]] == 1.0


# --- spans ----------------------------------------------------------------------------------------

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch) -> Iterator[Any]:
    """Spans that were collected so far, in the order in which they ended."""
    trace = pytest.importorskip("opentelemetry.trace", reason="needs opentelemetry-api")
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter.get_finished_spans
    provider.shutdown()


class Call(SimpleNamespace):
    """A gRPC call's context."""

    code = None

    def invocation_metadata(self):
        return (("traceparent", PARENT), (REQUEST_ID, "order-68"))

    def time_remaining(self):
        return None

    def set_trailing_metadata(self, trailing_metadata):
        assert trailing_metadata == ((REQUEST_ID, "order-68"),)

    def set_code(self, code):
        self.code = code.name

    def set_details(self, details):
        self.details = details


async def ask_http(app: Any, path: str, body: bytes) -> int:
    """One request to the application; its status."""
    sent, headers = [], [(b"host", b"localhost"), (b"traceparent", PARENT.encode())]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "headers": headers, "query_string": b"", "client": ("127.0.0.1", 1),
    }  # fmt: skip
    coming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return coming.pop() if coming else await asyncio.Event().wait()

    async def send(event):
        sent.append(event)

    await app(Request(scope).scope, receive, send)
    return sent[0]["status"]


def test_a_request_is_a_span_of_its_client_s(small, spans):
    x = np.zeros((1, 3, 32, 32), np.float32)
    body = {
        "inputs": [
            {"name": "images", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
        ]
    }

    async def scene():
        session = open_session(small, device="cpu", threads=1)
        service = Service(session, ServeSettings(Path("tiny")))
        endpoint = LocalEndpoint(service)
        await service.start()
        app = http_app(endpoint, Access())
        path = "/v2/models/{}/infer"
        statuses = [
            await ask_http(app, path.format(name), json.dumps(body).encode())
            for name in ("alpha", "nobody")
        ]
        call = Call()
        await Servicer(endpoint, Access()).ModelInfer(message(x), call)
        await service.stop()
        return statuses, call.code

    assert asyncio.run(scene()) == ([200, 404], None)
    found = spans()
    wires = [span for span in found if span.kind.name == "SERVER"]
    route = "POST /v2/models/{model}/infer"
    assert [span.name for span in wires] == [route, route, "ModelInfer"]
    trace_id, parent_id = (int(part, 16) for part in PARENT.split("-")[1:3])
    for span in wires:
        assert (span.context.trace_id, span.parent.span_id) == (trace_id, parent_id)
        assert span.status.is_ok or span.status.is_unset
    codes = [span.attributes.get("http.response.status_code") for span in wires]
    assert codes == [200, 404, None]
    assert wires[2].attributes["rpc.response.status_code"] == "OK"
    assert wires[2].attributes["hhdeploy.request_id"] == "order-68"
    for span in (wires[0], wires[2]):
        parts = [s for s in found if s.parent and s.parent.span_id == span.context.span_id]
        assert [part.name for part in parts] == ["prepare", "queue", "run", "finish"]
        assert all(a.end_time == b.start_time for a, b in itertools.pairwise(parts))
        assert parts[0].start_time >= span.start_time - 1_000_000
        assert parts[-1].end_time <= span.end_time + 1_000_000


def test_nothing_is_made_where_nothing_collects_spans(monkeypatch, caplog):
    for name in tracing._ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.start_tracing()
    with tracing.Tracing().request("a", {"traceparent": PARENT}, {}) as traced:
        traced["b"] = 1
        tracing.trace_parts(prepare=1.0)
    assert not caplog.records


def test_a_collector_without_the_packages_is_warned_of(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "_EXPORTER", "opentelemetry.exporter.that_there_is_not")
    with caplog.at_level(logging.WARNING):
        tracing.start_tracing()
    (record,) = caplog.records
    assert "pip install opentelemetry-sdk" in record.getMessage()


# --- dashboard and alerts -------------------------------------------------------------------------


def expressions() -> dict[str, str]:
    """What the dashboard and the alerts ask Prometheus, by where."""
    rules = yaml.safe_load((EXAMPLES / "alerts.yaml").read_text())["groups"][0]["rules"]
    board = json.loads((EXAMPLES / "grafana.json").read_text())
    found = {rule["alert"]: rule["expr"] for rule in rules}
    for panel in board["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found[variable["name"]] = variable["query"]["query"]
    return found


def test_dashboard_and_alerts_ask_for_what_the_server_has(server, pictures):
    images = np.array(pictures[:1], object)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        tensor = tritonclient.grpc.InferInput("images", [1], "BYTES")
        tensor.set_data_from_numpy(images)
        client.infer("alpha", [tensor])
    scraped = server.request("GET", "/metrics")[2].decode()
    names, labels = {"up"}, {"job", "instance"}
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            names.add(sample.name)
            labels |= sample.labels.keys()
    asked: dict[str, set[str]] = {}
    for where, text in expressions().items():
        found = set(re.findall(r"\b(?:nv_inference|hhdeploy|process)_\w+|\bup\b", text))
        assert found, where
        asked[where] = found
        grouped = {name for by in re.findall(r"by \(([^)]*)\)", text) for name in by.split(", ")}
        chosen = set(re.findall(r"[{,](\w+)=~?\"", text))
        assert grouped | chosen <= labels, where
    assert len(asked) > 20
    assert {where: found - names for where, found in asked.items() if found - names} == {}
    for reason in re.findall(r'reason="(\w+)"', str(expressions())):
        assert f'reason="{reason}"' in scraped


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here: apt install prometheus")
def test_promtool_takes_alerts_and_dashboard(tmp_path):
    queries = [
        {"alert": f"Panel{i}", "expr": re.sub(r"\$__rate_interval", "5m", text)}
        for i, text in enumerate(expressions().values())
        if not text.startswith("label_values")
    ]
    panels = tmp_path / "panels.yaml"
    panels.write_text(json.dumps({"groups": [{"name": "panels", "rules": queries}]}))
    for file in (EXAMPLES / "alerts.yaml", panels):
        done = subprocess.run(
            [PROMTOOL, "check", "rules", "--lint=none", file],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
