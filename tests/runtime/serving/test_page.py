"""The page at `/` and what it reads: its files, its headers, the numbers of `/status`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving.endpoint import LocalEndpoint
from hhdeploy.runtime.serving.errors import RequestError
from hhdeploy.runtime.serving.http.codec import read_request
from hhdeploy.runtime.serving.metrics import latency_ms
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from tests.distributions import build, copy_sources
from tests.workshop import CLASSES, ROOT, run_command

PICTURE = ROOT / "examples/starter/images/emoji/flags/000.png"
FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}


def question(*names: str, **changes) -> dict:
    """One picture for some adapters, as the page asks."""
    data = [base64.b64encode(PICTURE.read_bytes()).decode()]
    return {
        "inputs": [
            {"name": "images", "datatype": "BYTES", "shape": [1], "data": data},
            {"name": "adapters", "datatype": "BYTES", "shape": [len(names)], "data": names},
        ],
        "outputs": [{"name": "answers", "parameters": {"classification": 3}}],
        **changes,
    }


class Page(HTMLParser):
    """Elements and their attributes."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", [*FILES, "/status"])
def test_headers(server, path):
    status, headers, content = server.request("GET", path, headers={"origin": "http://elsewhere"})
    assert status == 200
    assert headers["content-type"].partition(";")[0] == FILES.get(path, "application/json")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == ("no-store" if path == "/status" else "no-cache")
    assert content


@pytest.mark.parametrize("path", [*FILES, "/status", "/metrics", "/v2", "/nowhere"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_no_other_origin_may_read(server, method, path):
    asked = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    _, headers, _ = server.request(method, path, headers=asked)
    assert not [name for name in headers if name.startswith("access-control")]


def test_the_page_loads_its_own_files_alone(server):
    _, _, document = server.request("GET", "/")
    page = Page(document.decode())
    loads = {a[key] for _, a in page.elements for key in ("src", "href", "srcset") if key in a}
    assert {x for x in loads if not x.startswith("data:")} == {
        "page.css", "page.js", "metrics", "status",
    }  # fmt: skip
    named = [name for _, attributes in page.elements for name in attributes]
    assert not [name for name in named if name == "style" or name.startswith("on")]
    (script,) = [attributes for element, attributes in page.elements if element == "script"]
    assert script["src"] == "page.js"
    for path in ("/page.css", "/page.js"):
        text = server.request("GET", path)[2].decode()
        assert not re.search(r"https?:|//\w+\.|url\(|@import|\bimport\b", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_every_control_and_picture_has_a_name(server):
    page = Page(server.request("GET", "/")[2].decode())
    ids = {a["id"] for _, a in page.elements if "id" in a}
    labelled = {a["for"] for element, a in page.elements if element == "label" and "for" in a}
    assert labelled <= ids
    referred = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert referred <= ids
    assert "file" in labelled
    assert all("alt" in a for element, a in page.elements if element == "img")
    assert [a["lang"] for element, a in page.elements if element == "html"] == ["en"]


def test_status_after_requests(server):
    _, before = server.json("GET", "/status")
    names = ("alpha", "beta", "alpha")
    code, answer = server.json("POST", "/v2/models/tiny/infer", question(*names))
    assert code == 200, answer
    code, _ = server.json("POST", "/v2/models/tiny/infer", question("nobody"))
    assert code == 404
    _, after = server.json("GET", "/status")

    assert after["model"] == "tiny"
    assert after["device"] == "onnxruntime CPUExecutionProvider"
    assert after["precision"] == "float32"
    assert after["ready"] is True
    assert after["uptime_seconds"] >= before["uptime_seconds"] > 0
    assert after["queued_images"] == 0
    assert after["batches"] == before["batches"] + 1
    assert after["images"] == before["images"] + 3
    assert after["requests"]["answered"] == before["requests"]["answered"] + 1
    failed = before["requests"]["failed"]
    assert after["requests"]["failed"] == failed | {"OTHER": failed["OTHER"] + 1}
    latency = after["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= max(latency["recent"])
    assert after["bank"] == {
        "rows_used": 5,
        "rows": 63,
        "visitor_rows": 7,
        "evictions": 0,
        "load_failures": 0,
    }

    answered = {a["name"]: a["images"] for a in before["adapters"]}
    assert [a["name"] for a in after["adapters"]] == sorted(answered)
    for adapter in after["adapters"]:
        name = adapter["name"]
        assert adapter["images"] == answered[name] + names.count(name)
        assert adapter["classes"] == CLASSES[name]
        assert (adapter["state"], adapter["problem"]) == ("ready", "")
        assert adapter["pinned"] is False
    assert sorted(a["row"] for a in after["adapters"]) == [1, 2, 3, 4, 5]


def statuses(service: Service, *bodies: dict) -> list[dict]:
    """The status of a service after its start and after each request."""

    async def run() -> list[dict]:
        endpoint = LocalEndpoint(service)
        await service.start()
        found = [await endpoint.status()]
        for body in bodies:
            request = read_request("served", "", json.dumps(body).encode(), None)
            with contextlib.suppress(RequestError):
                await endpoint.infer(request)
            found.append(await endpoint.status())
        await service.stop()
        return found

    return asyncio.run(run())


def test_status_of_a_fleet_with_fewer_rows_than_adapters(branches, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    session = open_session(branches, device="cpu", threads=1, slots=3, partial=True)
    settings = ServeSettings(Path("served"), adapters_dir=tmp_path, pinned=frozenset({"alpha"}))
    start, second, third = statuses(
        Service(session, settings), question("gamma"), question("broken")
    )

    def by_name(status: dict) -> dict[str, dict]:
        return {adapter["name"]: adapter for adapter in status["adapters"]}

    assert start["latency_ms"] == {"p50": None, "p95": None, "p99": None, "recent": []}
    assert start["bank"] == {
        "rows_used": 2,
        "rows": 2,
        "visitor_rows": 1,
        "evictions": 0,
        "load_failures": 1,
    }
    first = by_name(start)
    assert first["alpha"]["pinned"]
    assert {name: a["state"] for name, a in first.items()} == {
        "alpha": "ready", "rival": "ready", "beta": "on disk", "gamma": "on disk",
        "headless": "on disk", "broken": "broken",
    }  # fmt: skip
    assert (first["gamma"]["row"], first["gamma"]["classes"]) == (None, 3)
    assert (first["gamma"]["exif"], first["broken"]["classes"]) == (True, None)
    assert "adapter_config.json" in first["broken"]["problem"]

    assert second["bank"]["evictions"] == 1
    changed = by_name(second)
    assert (changed["rival"]["state"], changed["gamma"]["state"]) == ("on disk", "ready")
    assert changed["gamma"]["row"] == first["rival"]["row"]
    assert (changed["gamma"]["classes"], changed["gamma"]["images"]) == (3, 1)
    assert third["requests"] == {
        "answered": 1,
        "failed": {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 1},
    }


def test_status_of_a_folded_bundle(folded):
    session = open_session(folded, device="cpu", threads=1)
    start, after = statuses(Service(session, ServeSettings(Path("served"))), question("alpha"))
    assert (start["bank"], start["answers"]) == (None, True)
    assert after["adapters"] == [
        {
            "name": "alpha", "state": "ready", "problem": "", "pinned": False, "classes": 7,
            "problem_type": "single_label_classification", "row": None, "exif": True, "images": 1,
        }
    ]  # fmt: skip


def test_percentiles():
    found = latency_ms([float(ms) for ms in range(100, -1, -1)])
    assert (found["p50"], found["p95"], found["p99"]) == (50.0, 95.0, 99.0)
    assert found["recent"][:2] == [100.0, 99.0], "oldest first"
    assert latency_ms([0.12345])["recent"] == [0.123]


def test_the_files_are_installed_with_the_package(tmp_path):
    """As a wheel has them, imported from there alone."""
    place = copy_sources(tmp_path / "sources", moment=1_000_000_000, mode=0o644)
    wheel, _ = build(place, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "lib")
    code = """
import hhdeploy.runtime.serving.http.page as page
from importlib.resources import files
print(page.__file__)
for name, _ in page._FILES.values():
    assert files(page.__package__).joinpath(name).read_bytes(), name
"""
    done = run_command([sys.executable, "-c", code], cwd=tmp_path, path=[tmp_path / "lib", Path()])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
