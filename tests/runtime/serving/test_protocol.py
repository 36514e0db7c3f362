"""The protocol beyond the usual: outputs that nobody asked for, other numbers, statistics of one
model, who answered, refusals that are counted, half-closed connections."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import re
import signal
import socket
from dataclasses import replace

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.bundle import Bundle
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.grpc_requests import INFER, PATIENCE, message, own
from tests.runtime.serving.servers import Server, running_server
from tests.support import images

ADAPTERS = {"alpha", "rival", "beta", "gamma", "headless"}


def body(x: np.ndarray, datatype: str = "FP32", **more: object) -> dict[str, object]:
    data = {"name": "images", "datatype": datatype, "shape": list(x.shape), "data": x.tolist()}
    return {"inputs": [data], **more}


def digest(branches, adapter: str) -> str:
    file = branches / "adapters" / adapter / TENSOR_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- outputs that nobody asked for ----------------------------------------------------------------


def test_all_outputs_are_given_where_none_is_asked_for(server):
    x = images(3)
    _, every = server.json("POST", "/v2/models/alpha/infer", body(x))
    names = ["logits", "probabilities", "labels", "answers"]
    assert [o["name"] for o in every["outputs"]] == names
    asked = [{"name": name} for name in names]
    _, chosen = server.json("POST", "/v2/models/alpha/infer", body(x, outputs=asked))
    assert every == chosen
    found = pb.ModelInferResponse()
    with grpc.insecure_channel(server.grpc) as channel:
        found.ParseFromString(channel.unary_unary(INFER)(message(x).SerializeToString()))
    assert [o.name for o in found.outputs] == names


def test_all_of_them_come_binary_where_that_is_asked_for(server):
    with tritonclient.http.InferenceServerClient(server.http) as client:
        x = tritonclient.http.InferInput("images", [2, 3, 32, 32], "FP32")
        x.set_data_from_numpy(images(2))
        found = client.infer("beta", [x])  # which says binary_data_output
        outputs = found.get_response()["outputs"]
        assert len(outputs) == 4
        assert all("binary_data_size" in output["parameters"] for output in outputs)
        assert found.as_numpy("labels").shape == (2,)


# --- inputs that are found, not known -------------------------------------------------------------


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
@pytest.mark.parametrize("model", ["tiny", "gamma"])
def test_a_client_that_sends_every_input_it_finds_is_answered(server, branches, module, model):
    """As form builders and load generators do, of the metadata and of the configuration."""
    over_http = module is tritonclient.http
    options = {} if over_http else {"as_json": True}
    with open_session(branches, device="cpu", threads=1) as session:
        expected = session.run(images(1), None if model == "tiny" else model)
    with module.InferenceServerClient(server.http if over_http else server.grpc) as client:
        found = client.get_model_metadata(model, **options)["inputs"]
        config = client.get_model_config(model, **options)
        config = config if over_http else config["config"]
        assert [t["name"] for t in config["input"]] == [t["name"] for t in found]
        tensors = []
        for each in found:
            shape = [1 if int(size) == -1 else int(size) for size in each["shape"]]
            filled = images(1) if each["datatype"] == "FP32" else np.full(shape, b"text", object)
            tensors.append(module.InferInput(each["name"], shape, each["datatype"]))
            tensors[-1].set_data_from_numpy(filled)
        logits = client.infer(model, tensors).as_numpy("logits")
    assert np.array_equal(logits, expected[:, : logits.shape[1]])
    told = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert told["image_datatypes"] == "FP32,UINT8,FP16,BYTES"
    assert set(told["adapters"].split(",")) == (ADAPTERS if model == "tiny" else {model})
    assert told.get("optional_inputs") == ("adapters" if model == "tiny" else None)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["alpha", "beta"])
def test_pixels_as_they_are_in_pictures(server, branches, adapter):
    """UINT8 is what a picture of the graph's size is, normalised as its adapter wants it."""
    levels = np.random.default_rng(11).integers(0, 256, (3, 32, 32, 3), np.uint8)
    with open_session(branches, device="cpu", threads=1) as session:
        # Of a way that neither resizes nor crops a picture of that size.
        way = replace(session.entry(adapter).preprocess, crop_pct=1.0)
        pictures = np.stack([way(Image.fromarray(each)) for each in levels])
        expected = session.run(pictures, adapter)
    x = np.ascontiguousarray(levels.transpose(0, 3, 1, 2))
    with tritonclient.http.InferenceServerClient(server.http) as client:
        tensor = tritonclient.http.InferInput("images", [3, 3, 32, 32], "UINT8")
        tensor.set_data_from_numpy(x)
        found = client.infer(adapter, [tensor]).as_numpy("logits")
    assert np.array_equal(found, own(adapter, expected))
    status, answer = server.json("POST", f"/v2/models/{adapter}/infer", body(x, "UINT8"))
    assert status == 200
    logits = np.asarray(answer["outputs"][0]["data"], np.float32).reshape(3, -1)
    assert np.array_equal(logits, found)


def test_one_image_of_pixels_for_several_adapters(server):
    x = np.random.default_rng(12).integers(0, 256, (1, 3, 32, 32), np.uint8)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        tensor = tritonclient.grpc.InferInput("images", [1, 3, 32, 32], "UINT8")
        tensor.set_data_from_numpy(x)
        names = tritonclient.grpc.InferInput("adapters", [2], "BYTES")
        names.set_data_from_numpy(np.array([b"alpha", b"beta"], object))
        together = client.infer("tiny", [tensor, names]).as_numpy("logits")
        for row, adapter in enumerate(("alpha", "beta")):
            alone = client.infer(adapter, [tensor]).as_numpy("logits")
            assert np.array_equal(together[row, : alone.shape[1]], alone[0])


def test_half_precision_is_widened(server, branches):
    x = images(3).astype(np.float16)
    with open_session(branches, device="cpu", threads=1) as session:
        expected = own("gamma", session.run(x.astype(np.float32), "gamma"))
    for module, address in ((tritonclient.http, server.http), (tritonclient.grpc, server.grpc)):
        with module.InferenceServerClient(address) as client:
            tensor = module.InferInput("images", [3, 3, 32, 32], "FP16")
            tensor.set_data_from_numpy(x)
            assert np.array_equal(client.infer("gamma", [tensor]).as_numpy("logits"), expected)


@pytest.mark.parametrize("datatype", ["INT8", "FP64", "INT32", "UINT16"])
def test_other_numbers_are_refused(server, datatype):
    status, answer = server.json(
        "POST", "/v2/models/alpha/infer", body(np.zeros((1, 3, 32, 32), int), datatype)
    )
    assert status == 400 and f"found {datatype} [1, 3, 32, 32]" in answer["error"]


# --- who answered ---------------------------------------------------------------------------------


def test_the_answer_names_its_adapter(server, branches):
    _, answer = server.json("POST", "/v2/models/alpha/infer", body(images(2)))
    alpha = {"adapter": "alpha", "adapter_digest": digest(branches, "alpha"), "backbone": False}
    assert answer["parameters"] == alpha
    manifest = Bundle.open(branches).manifest
    assert manifest.tensors_digest(manifest.adapter("alpha")) == digest(branches, "alpha")
    mixed = message(images(2))
    del mixed.parameters["adapter"]
    mixed.inputs.add(name="adapters", datatype="BYTES", shape=[2])
    mixed.raw_input_contents.append(b"\5\0\0\0alpha\4\0\0\0beta")
    with grpc.insecure_channel(server.grpc) as channel:
        found = channel.unary_unary(INFER, response_deserializer=pb.ModelInferResponse.FromString)(
            mixed.SerializeToString()
        ).parameters
    assert found["adapter"].string_param == "alpha,beta"
    both = f"{digest(branches, 'alpha')},{digest(branches, 'beta')}"
    assert found["adapter_digest"].string_param == both
    assert found["backbone"].WhichOneof("parameter_choice") == "bool_param"


# --- statistics -----------------------------------------------------------------------------------


def counts(found: dict[str, object]) -> dict[str, tuple[int, int, int]]:
    return {
        one["name"]: (
            int(one.get("inference_count", 0)),
            int(one["inference_stats"]["success"].get("count", 0)),
            int(one["inference_stats"]["fail"].get("count", 0)),
        )
        for one in found["model_stats"]
    }


def test_statistics_of_one_model_and_of_all(server):
    def all_of_them() -> dict[str, tuple[int, int, int]]:
        return counts(server.json("GET", "/v2/models/stats")[1])

    before = all_of_them()
    assert set(before) == {"tiny", *ADAPTERS}
    server.json("POST", "/v2/models/alpha/infer", body(images(3)))
    named = body(images(5), parameters={"adapter": "alpha"})
    server.json("POST", "/v2/models/tiny/infer", named)
    server.json("POST", "/v2/models/beta/infer", body(images(2)))
    server.json("POST", "/v2/models/beta/infer", body(images(1), outputs=[{"name": "none"}]))
    after = all_of_them()

    def since(name: str) -> list[int]:
        return np.subtract(after[name], before[name]).tolist()

    assert since("alpha") == [8, 2, 0]
    assert since("beta") == [2, 1, 1]
    assert since("gamma") == [0, 0, 0]
    assert since("tiny") == [10, 3, 1]
    _, one = server.json("GET", "/v2/models/beta/versions/1/stats")
    assert counts(one) == {"beta": after["beta"]}
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        assert counts(client.get_inference_statistics("beta", as_json=True)) == counts(one)
        everything = client.get_inference_statistics(as_json=True)
    assert {m["name"] for m in everything["model_stats"]} == {"tiny", *ADAPTERS}


# --- refusals -------------------------------------------------------------------------------------


def refusals(server: Server) -> dict[str, int]:
    text = server.request("GET", "/metrics")[2].decode()
    pattern = r'^hhdeploy_refused_requests_total{reason="(\w+)"} (\S+)$'
    return {m[1]: int(float(m[2])) for m in re.finditer(pattern, text, re.MULTILINE)}


def test_every_refusal_is_counted_by_its_reason(server):
    before = refusals(server)
    path = "/v2/models/alpha/infer"
    for content in (b"{bad", json.dumps(body(np.zeros((1, 3, 8, 8)))).encode()):
        assert server.request("POST", path, content)[0] == 400
    big = {"content-length": str(1 << 40)}
    with socket.create_connection(server.http.split(":"), PATIENCE) as client:
        client.sendall(b"POST /v2/models/alpha/infer HTTP/1.1\r\nhost: localhost\r\n")
        client.sendall(f"content-length: {big['content-length']}\r\n\r\n".encode())
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")
    assert server.request("GET", "/v2/models/nobody")[0] == 404
    assert server.request("GET", "/v3")[0] == 404
    assert server.request("DELETE", "/v2/models/tiny")[0] == 405
    with socket.create_connection(server.http.split(":"), PATIENCE) as client:
        client.sendall(b"no HTTP at all\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400")
    assert server.request("GET", "/v2", headers={"host": "elsewhere.example"})[0] == 403
    with grpc.insecure_channel(server.grpc) as channel:
        for content in (b"\xff\xff", message(images(1), "nobody").SerializeToString()):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(INFER)(content, timeout=PATIENCE)
    after = refusals(server)
    found = {reason: after[reason] - before.get(reason, 0) for reason in after}
    expected = {"request": 5, "too_large": 1, "not_found": 3, "forbidden": 1}
    assert {reason: count for reason, count in found.items() if count} == expected


# --- half a connection ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_says_no_more_is_answered(server, version):
    content = json.dumps(body(images(7), parameters={"adapter": "alpha"})).encode()
    head = f"POST /v2/models/tiny/infer HTTP/{version}\r\nhost: localhost\r\n"
    with socket.create_connection(server.http.split(":"), PATIENCE) as client:
        client.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        client.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(client)
        answer.begin()  # which skips interim answers
        assert answer.status == 200
        assert json.loads(answer.read())["parameters"]["adapter"] == "alpha"
        assert client.recv(1) == b""


def test_a_proxy_of_http_1_0_that_leaves_is_noticed(small, tmp_path):
    """nginx as it comes: it says `Connection: close`, and passes on that its client has left."""
    vast = io.BytesIO()  # a second of work: it is noticed long before that
    Image.new("L", (7000, 7000)).save(vast, "PNG")
    picture = {"name": "images", "datatype": "BYTES", "shape": [1],
               "data": [base64.b64encode(vast.getvalue()).decode()]}  # fmt: skip
    content = json.dumps({"inputs": [picture], "parameters": {"adapter": "alpha"}}).encode()
    head = "POST /v2/models/tiny/infer HTTP/1.0\r\nhost: localhost\r\nConnection: close\r\n"
    flags = ["--model-name", "tiny", "--grpc-port", "-1"]
    with running_server(small, tmp_path / "log", *flags) as found:
        with socket.create_connection(found.http.split(":"), PATIENCE) as client:
            found.process.send_signal(signal.SIGSTOP)  # else it might be faster
            client.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            client.shutdown(socket.SHUT_WR)
            found.process.send_signal(signal.SIGCONT)
            assert client.recv(1) == b""  # closed, without an answer
        assert [r["status"] for r in found.requests(1)] == [499]
        # Of who stays there is an answer.
        with socket.create_connection(found.http.split(":"), PATIENCE) as client:
            client.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_half_a_request_is_not_waited_for(server):
    with socket.create_connection(server.http.split(":"), PATIENCE) as client:
        client.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: localhost\r\ncontent-le")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
