"""What collects from a server, for real: OpenTelemetry over OTLP, and Prometheus."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import yaml

from tests.leash import leashed
from tests.runtime.serving.fleets import PATIENCE
from tests.runtime.serving.servers import running_server
from tests.support import images
from tests.workshop import ROOT

# --- spans ----------------------------------------------------------------------------------------

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collector(ThreadingHTTPServer):
    """Takes what OTLP's exporters send: of each export its request, parsed."""

    def __init__(self, kind: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.kind = kind
        self.exports: list[Any] = []


class _Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.exports.append(self.server.kind.FromString(body))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def collector(monkeypatch) -> Iterator[Collector]:
    """A collector that servers send their spans to."""
    reason = "needs opentelemetry-exporter-otlp-proto-http"
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason=reason)
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with Collector(ExportTraceServiceRequest) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "vit")
        yield server
        server.shutdown()
        thread.join()


def attributes(several: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
        for each in several
    }


def test_spans_of_both_wires_arrive_at_a_collector(small, tmp_path, collector):
    """All of them by the time that the server has ended."""
    x = images(2)
    data = {"name": "images", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    with running_server(small, tmp_path / "log", "--model-name", "tiny") as server:
        for model, status in (("alpha", 200), ("nobody", 404)):
            path, content = f"/v2/models/{model}/infer", json.dumps({"inputs": [data]}).encode()
            assert server.request("POST", path, content, TRACEPARENT)[0] == status
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            tensor = tritonclient.grpc.InferInput("images", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            client.infer("gamma", [tensor], headers=TRACEPARENT)
        assert server.stop() == 0
    (name,) = {
        attributes(each.resource.attributes)["service.name"]
        for export in collector.exports
        for each in export.resource_spans
    }
    assert name == "vit"
    spans = [
        span
        for export in collector.exports
        for of_resource in export.resource_spans
        for scope in of_resource.scope_spans
        for span in scope.spans
    ]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    wires = [span for span in spans if span.parent_span_id.hex() == PARENT]
    route = "POST /v2/models/{model}/infer"
    assert [span.name for span in wires] == [route, route, "ModelInfer"]
    said = [attributes(span.attributes) for span in wires]
    assert [each.get("http.response.status_code") for each in said] == [200, 404, None]
    assert said[2]["rpc.response.status_code"] == "OK"
    for span, parts in zip(wires, (4, 0, 4), strict=True):
        inside = [each.name for each in spans if each.parent_span_id == span.span_id]
        assert inside == ["prepare", "queue", "run", "finish"][:parts]


def test_a_collector_that_is_gone_harms_nobody(small, tmp_path, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the OTLP exporter")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # s, of the last export
    with running_server(small, tmp_path / "log", "--model-name", "tiny") as server:
        assert server.request("GET", "/v2/models/tiny")[0] == 200
        assert server.stop() == 0
    loggers = {record["logger"] for record in server.records()}  # each line is JSON
    assert any(logger.startswith("opentelemetry.") for logger in loggers)


# --- Prometheus -----------------------------------------------------------------------------------

PROMETHEUS = shutil.which("prometheus")
EXAMPLES = ROOT / "examples" / "serving"


class Prometheus:
    """One that runs; ``ask`` is its HTTP interface."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._url, self._process, self._log = url, process, log

    def ask(self, path: str, **query: str) -> Any:
        """The ``data`` of an answer; None as long as it does not answer."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def until(self, true: Callable[[], Any]) -> Any:
        """What ``true`` says once it is so."""
        limit = time.monotonic() + PATIENCE
        while not (found := true()):
            assert self._process.poll() is None and time.monotonic() < limit, self._log.read_text()
            time.sleep(0.1)
        return found

    def values(self, expression: str) -> dict[str, float]:
        """What an expression is now, by the label ``adapter`` ("" without one)."""
        found = (self.ask("query", query=expression) or {"result": []})["result"]
        return {each["metric"].get("adapter", ""): float(each["value"][1]) for each in found}


@pytest.fixture
def prometheus(tmp_path) -> Iterator[Callable[[str], Prometheus]]:
    """Starts one that scrapes a target twice a second, with the examples' alerts."""
    started: list[subprocess.Popen[bytes]] = []

    def start(target: str) -> Prometheus:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(EXAMPLES / "alerts.yaml")],
            "scrape_configs": [{"job_name": "hhdeploy", "static_configs": [{"targets": [target]}]}],
        }
        file, log = tmp_path / "prometheus.yml", tmp_path / "prometheus.log"
        file.write_text(yaml.safe_dump(config))
        with log.open("wb") as said:
            started.append(
                subprocess.Popen(
                    leashed([
                        str(PROMETHEUS), f"--config.file={file}",
                        f"--storage.tsdb.path={tmp_path / 'series'}",
                        f"--web.listen-address=127.0.0.1:{port}",
                    ]),
                    stdout=said, stderr=said,
                )
            )  # fmt: skip
        return Prometheus(f"http://127.0.0.1:{port}", started[-1], log)

    yield start
    for process in started:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus here: apt install prometheus")
def test_prometheus_scrapes_and_its_alerts_evaluate(small, tmp_path, prometheus):
    with running_server(small, tmp_path / "log", "--model-name", "tiny") as server:
        there = prometheus(server.http)
        x = images(3)
        for adapter in ("alpha", "gamma", "alpha"):
            assert server.logits("tiny", adapter, x)[0] == 200
        assert server.logits("tiny", "nobody", x)[0] == 404
        counted = {"alpha": 6.0, "gamma": 3.0}
        there.until(lambda: there.values("hhdeploy_adapter_images_total") == counted)
        assert there.values('hhdeploy_refused_requests_total{reason="not_found"}') == {"": 1.0}
        assert there.values('nv_inference_request_success{model="tiny",version="1"}') == {"": 3.0}
        latencies = "hhdeploy_request_seconds_bucket"
        slowest = f"histogram_quantile(1, sum by (adapter, le) ({latencies}))"
        assert there.values(slowest).keys() == counted.keys()
        assert there.values("up") == {"": 1.0}

        def rules() -> dict[str, Any]:
            groups = (there.ask("rules") or {"groups": []})["groups"]
            found = {rule["name"]: rule for group in groups for rule in group["rules"]}
            return found if all(rule["health"] == "ok" for rule in found.values()) else {}

        names = [
            rule["alert"]
            for rule in yaml.safe_load((EXAMPLES / "alerts.yaml").read_text())["groups"][0]["rules"]
        ]
        assert sorted(there.until(rules)) == sorted(names)
        assert rules()["HhdeployDown"]["state"] == "inactive"
        assert server.stop() == 0
    # For a minute it is pending, and then it fires.
    there.until(lambda: rules().get("HhdeployDown", {}).get("state") == "pending")
