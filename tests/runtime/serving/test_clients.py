"""Clients that are not ours, unmodified, each doing what its users do."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hhdeploy.runtime.session import open_session
from tests.leash import leashed
from tests.runtime.serving.grpc_requests import PATIENCE, own
from tests.support import images


@pytest.fixture(scope="module")
def expected(branches: Path) -> np.ndarray:
    """What `alpha` says to `images(3)`."""
    with open_session(branches, device="cpu", threads=1) as session:
        return own("alpha", session.run(images(3), "alpha"))


def without(program: str) -> pytest.MarkDecorator:
    reason = f"{program} is not installed here"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


@pytest.mark.parametrize("module", [tritonclient.http.aio, tritonclient.grpc.aio])
def test_tritonclient_aio(server, expected, module):
    address = server.http if module is tritonclient.http.aio else server.grpc

    async def run() -> None:
        async with module.InferenceServerClient(address) as client:
            assert await client.is_server_ready() and await client.is_model_ready("alpha")
            x = module.InferInput("images", [3, 3, 32, 32], "FP32")
            x.set_data_from_numpy(images(3))
            wanted = [module.InferRequestedOutput("logits")]
            answers = await asyncio.gather(
                *(client.infer("alpha", [x], outputs=wanted) for _ in range(5))
            )
            for answer in answers:
                assert np.array_equal(answer.as_numpy("logits"), expected)

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_client_made_of_what_reflection_says(server, expected):
    """As grpcurl and generated clients: nothing is known but the service's name."""
    pool = descriptor_pool.DescriptorPool()
    with grpc.insecure_channel(server.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest
        asked = iter([request(file_containing_symbol="inference.GRPCInferenceService")])
        (answer,) = stub.ServerReflectionInfo(asked, timeout=PATIENCE)
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(content)
            for content in answer.file_descriptor_response.file_descriptor_proto
        ]
        names = {file.name for file in files}
        for file in sorted(files, key=lambda f: len(names & set(f.dependency))):
            pool.Add(file)
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        method = service.methods_by_name["ModelInfer"]
        kinds = [
            message_factory.GetMessageClass(kind)
            for kind in (method.input_type, method.output_type)
        ]
        ask = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            kinds[0].SerializeToString,
            kinds[1].FromString,
        )
        message = kinds[0](model_name="alpha", raw_input_contents=[images(3).tobytes()])
        message.inputs.add(name="images", datatype="FP32", shape=[3, 3, 32, 32])
        found = ask(message, timeout=PATIENCE)
    logits = np.frombuffer(found.raw_output_contents[0], np.float32).reshape(3, -1)
    assert np.array_equal(logits, expected)


def test_the_health_probe_of_kubernetes(server):
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "alpha"):
            request = health_pb2.HealthCheckRequest(service=service)
            state = stub.Check(request, timeout=PATIENCE).status
            assert state == health_pb2.HealthCheckResponse.SERVING


# kserve's pins need not be ours: an interpreter that has it may be another one.
_KSERVE = os.environ.get("HHDEPLOY_KSERVE_PYTHON") or (
    sys.executable if importlib.util.find_spec("kserve") is not None else ""
)
KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import (
    InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig,
)

http, grpc, file = sys.argv[1:]

def request(binary):
    x = np.load(file)
    tensor = InferInput("images", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    names = InferInput("adapters", [len(x)], "BYTES")
    names.set_data_from_numpy(np.array([b"alpha"] * len(x), object), binary_data=binary)
    return InferRequest(model_name="tiny", infer_inputs=[tensor, names], request_id="seven")

def logits(answer):
    (found,) = [each for each in answer.outputs if each.name == "logits"]
    assert answer.id == "seven"
    return found.as_numpy().reshape(-1).tolist()

async def run():
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as rest:
        assert await rest.is_server_live(http) and await rest.is_server_ready(http)
        assert await rest.is_model_ready(http, "alpha")
        answers = [await rest.infer(http, request(b), model_name="tiny") for b in (False, True)]
        assert not await rest.is_model_ready(http, "nobody")
    async with InferenceGRPCClient(grpc) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready("alpha")
        answers += [await client.infer(request(b)) for b in (False, True)]
    print(json.dumps([*map(logits, answers)]))

asyncio.run(run())
"""


@pytest.mark.skipif(
    not _KSERVE, reason="no kserve here: pip install kserve, or HHDEPLOY_KSERVE_PYTHON=python of it"
)
def test_kserve_s_sdk(server, expected, tmp_path):
    """Its clients of REST and gRPC, with numbers as text and as bytes."""
    np.save(tmp_path / "images.npy", images(3))
    ran = subprocess.run(
        leashed([
            _KSERVE, "-W", "ignore", "-c", KSERVE,
            server.url, server.grpc, str(tmp_path / "images.npy"),
        ]),
        capture_output=True, text=True, cwd=tmp_path, timeout=10 * PATIENCE,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stdout.splitlines()[-1])
    assert len(answers) == 4
    for logits in answers:
        assert np.array_equal(np.asarray(logits, np.float32).reshape(3, -1), expected)


FETCH = """
import {readFileSync} from "node:fs";
const url = process.argv[2], body = readFileSync(0);
const ask = async (what) => {
  const answer = await fetch(`${url}/v2/models/alpha/infer`, {method: "POST", body: what});
  return [answer.status, await answer.json()];
};
const [[status, good], [refused, bad]] = await Promise.all([ask(body), ask("{bad")]);
const logits = good.outputs.find((output) => output.name === "logits").data;
console.log(JSON.stringify([status, logits, refused, bad.error]));
"""


@without("node")
def test_node_s_fetch(server, expected, tmp_path):
    script = tmp_path / "ask.mjs"
    script.write_text(FETCH)
    x = images(3)
    tensor = {"name": "images", "datatype": "FP32", "shape": list(x.shape), "parameters": None}
    body = json.dumps({"id": None, "inputs": [{**tensor, "data": x.ravel().tolist()}]})
    said = subprocess.run(
        leashed(["node", str(script), server.url]),
        input=body,
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    ).stdout  # fmt: skip
    status, logits, refused, error = json.loads(said)
    assert (status, refused) == (200, 400) and "JSON" in error
    assert np.array_equal(np.asarray(logits, np.float32).reshape(3, -1), expected)


NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  client_max_body_size 64m;
  upstream vit {{ server {http}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_http_version 1.1; proxy_set_header Connection "";
                  proxy_set_header Host localhost; proxy_pass http://vit; }}
  }}
}}
"""


@without("nginx")
def test_nginx_in_front(server, expected, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, http=server.http, port=port))
    process = subprocess.Popen(leashed(["nginx", "-p", str(tmp_path), "-c", str(config)]))
    try:
        url, limit = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=PATIENCE) as answer:
                    assert json.load(answer) == {"ready": True}
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < limit
                time.sleep(0.05)
        x = images(3)
        tensor = {"name": "images", "datatype": "FP32", "shape": list(x.shape)}
        body = json.dumps({"inputs": [{**tensor, "data": x.ravel().tolist()}]}).encode()
        for _ in range(3):
            request = urllib.request.Request(f"{url}/v2/models/alpha/infer", body)
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                logits = json.load(answer)["outputs"][0]["data"]
            assert np.array_equal(np.asarray(logits, np.float32).reshape(3, -1), expected)
    finally:
        process.terminate()
        process.wait(PATIENCE)


@without("perf_analyzer")
@pytest.mark.parametrize("wire", ["http", "grpc"])
@pytest.mark.parametrize("model", ["tiny", "beta"])
def test_perf_analyzer(server, wire, model):
    """Triton's own load generator, of the bundle and of an adapter by its name.

    It asks for every output by name; its random bytes hold NaN, which have no labels.
    """
    address = server.http if wire == "http" else server.grpc
    said = subprocess.run(
        leashed([
            shutil.which("perf_analyzer") or "", "-m", model, "-i", wire, "-u", address,
            "--request-count", "20", "--input-data", "zero",
        ]),
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    found = re.search(r"Throughput: ([\d.]+) infer/sec", said.stdout)
    assert found and float(found[1]) > 0, said.stdout
