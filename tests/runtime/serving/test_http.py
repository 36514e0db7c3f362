"""The HTTP side of a real server: tritonclient, untouched, is the client; and bytes by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.loadtest.abuse.kinds import KINDS
from hhdeploy.loadtest.abuse.wire import Victim
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.fleets import PATIENCE, make_adapter, put_adapter
from tests.runtime.serving.servers import AUTHORISED, TOKEN, Server, running_server
from tests.support import assert_parity, images
from tests.workshop import BACKBONE_CLASSES, CLASSES

ADAPTERS = {"alpha", "rival", "beta", "gamma", "headless"}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.http) as found:
        yield found


def tensor(name: str, array: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    """An input as tritonclient sends arrays."""
    datatype = "FP32" if array.dtype == np.float32 else "BYTES"
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def texts(name: str, items: Sequence[str | bytes], *, binary: bool = True) -> triton.InferInput:
    """An input of byte strings."""
    array = np.empty(len(items), object)
    array[:] = [item.encode() if isinstance(item, str) else item for item in items]
    return tensor(name, array, binary=binary)


def wanted(*names: str, top: int = 0, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [
        triton.InferRequestedOutput(name, binary_data=binary, class_count=top) for name in names
    ]


def own(name: str, logits: np.ndarray) -> np.ndarray:
    """The columns that an adapter has."""
    return logits[:, : CLASSES[name]]


def error_of(call: Callable[[], object]) -> tuple[int, str]:
    """The status and the message that a call of tritonclient fails with."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return int(caught.value.status()), caught.value.message()


# --- what there is --------------------------------------------------------------------------------


def test_health_and_metadata(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("tiny") and client.is_model_ready("beta", "1")
    assert not client.is_model_ready("nobody")
    found = client.get_server_metadata()
    assert found["name"] == "hhdeploy" and "binary_tensor_data" in found["extensions"]


def test_health_has_the_bodies_of_the_protocol(server):
    """KServe's SDK reads them."""
    for path, body in (
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/beta/ready", {"name": "beta", "ready": True}),
        ("/v2/models/tiny/versions/1/ready", {"name": "tiny", "ready": True}),
    ):
        assert server.json("GET", path) == (200, body)


def test_metadata_and_configuration_of_models(client):
    bundle, adapter = client.get_model_metadata("tiny"), client.get_model_metadata("beta", "1")
    images = {"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}
    assert bundle["inputs"] == adapter["inputs"] == [images]
    taken = [(each["name"], each["datatype"]) for each in bundle["parameters"]["optional_inputs"]]
    assert taken == [("images", t) for t in ("UINT8", "FP16", "BYTES")] + [("adapters", "BYTES")]
    taken = [each["name"] for each in adapter["parameters"]["optional_inputs"]]
    assert taken == ["images"] * 3
    assert set(bundle["parameters"]["adapters"]) == ADAPTERS
    assert adapter["parameters"]["adapters"] == ["beta"]
    assert adapter["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, CLASSES["beta"]]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, CLASSES["beta"]]},
        {"name": "labels", "datatype": "BYTES", "shape": [-1]},
        {"name": "answers", "datatype": "BYTES", "shape": [-1]},
    ]
    config = client.get_model_config("beta")
    assert config["name"] == "beta" and config["max_batch_size"] == 32
    assert config["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": [3, 32, 32]}]


def test_the_index_has_the_bundle_and_its_adapters(client):
    models = {m["name"]: m["state"] for m in client.get_model_repository_index()}
    assert models == dict.fromkeys({"tiny", *ADAPTERS}, "READY")


def test_statistics_count(client):
    def counts() -> tuple[int, int, int]:
        (found,) = client.get_inference_statistics("tiny")["model_stats"]
        times = found["inference_stats"]
        return found["inference_count"], times["success"]["count"], times["fail"]["count"]

    before = counts()
    client.infer("alpha", [tensor("images", images(3))])
    error_of(lambda: client.infer("alpha", []))
    assert np.subtract(counts(), before).tolist() == [3, 1, 1]


def test_metrics_are_prometheus_text(server):
    status, headers, body = server.request("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert b'nv_inference_request_success{model="tiny",version="1"}' in body


# --- inference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tensors_both_ways(client, session, binary_in, binary_out):
    x = images(3)
    result = client.infer(
        "tiny",
        [tensor("images", x, binary=binary_in), texts("adapters", ["beta"] * 3, binary=binary_in)],
        outputs=wanted("logits", "labels", binary=binary_out),
        request_id="a b",
    )
    expected = own("beta", session.run(x, "beta"))
    assert np.array_equal(result.as_numpy("logits"), expected)
    labels = [session.entry("beta").label(int(i)).encode() for i in expected.argmax(1)]
    assert result.as_numpy("labels").astype("S").tolist() == labels
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "a b")


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "headless"])
def test_an_adapter_by_parameter_and_by_alias(client, session, name):
    x = images(3)
    expected = own(name, session.run(x, name))
    by_parameter = client.infer("tiny", [tensor("images", x)], parameters={"adapter": name})
    by_alias = client.infer(name, [tensor("images", x)], "1")
    assert np.array_equal(by_parameter.as_numpy("logits"), expected)
    assert np.array_equal(by_alias.as_numpy("logits"), expected)
    assert by_alias.get_response()["model_name"] == name


def test_the_backbone_answers_where_no_adapter_is_named(client, session):
    x = images(2)
    found = client.infer("tiny", [tensor("images", x)]).as_numpy("logits")
    assert np.array_equal(found, session.run(x)[:, :BACKBONE_CLASSES])


def test_one_adapter_an_image(client, session):
    x, names = images(7), ["alpha", "gamma", "beta", "alpha", "rival", "headless", "gamma"]
    inputs = [tensor("images", x), texts("adapters", names)]
    result = client.infer("tiny", inputs, outputs=wanted("probabilities", "logits", "labels"))
    expected = session.run(x, names)[:, : CLASSES["beta"]]
    assert np.array_equal(result.as_numpy("logits"), expected)
    for row, share, label, name in zip(
        expected, result.as_numpy("probabilities"), result.as_numpy("labels"), names, strict=True
    ):
        count = CLASSES[name]
        e = np.exp(row[:count].astype(np.float64) - row.max())
        assert np.array_equal(share[:count], (e / e.sum()).astype(np.float32))
        assert not share[count:].any()
        assert label.decode() == session.entry(name).label(int(row.argmax()))


def test_json_cannot_hold_what_pads_a_mixture(client, session):
    def counts() -> tuple[int, int]:
        (found,) = client.get_inference_statistics("tiny")["model_stats"]
        times = found["inference_stats"]
        return times["success"]["count"], times["fail"]["count"]

    x, names = images(2), ["gamma", "beta"]
    inputs = [tensor("images", x), texts("adapters", names)]
    before = counts()
    status, message = error_of(
        lambda: client.infer("tiny", inputs, outputs=wanted("logits", binary=False))
    )
    assert status == 400 and "Ask for the output 'probabilities'" in message
    assert np.subtract(counts(), before).tolist() == [0, 1]  # refused, and not answered as well
    found = client.infer("tiny", inputs, outputs=wanted("probabilities", binary=False))
    assert found.as_numpy("probabilities").argmax(1).tolist() == (
        session.run(x, names).argmax(1).tolist()
    )


@pytest.mark.parametrize("binary", [True, False])
def test_classification(client, session, binary):
    x = images(2)
    outputs = wanted("logits", top=3, binary=binary)
    found = client.infer("gamma", [tensor("images", x)], outputs=outputs).as_numpy("logits")
    expected = own("gamma", session.run(x, "gamma"))
    for parts, row in zip(found.astype("S"), expected, strict=True):
        order = np.argsort(-row, kind="stable")[:3]
        assert [part.decode() for part in parts] == [
            f"{row[i]:f}:{i}:{session.entry('gamma').label(int(i))}" for i in order
        ]


def test_pictures_are_preprocessed_as_each_adapter_wants_them(client, session, pictures):
    opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    for name in ("alpha", "gamma"):
        expected = own(name, session.run(session.preprocess(opened, name), name))
        found = client.infer(name, [texts("images", pictures)]).as_numpy("logits")
        assert np.array_equal(found, expected)
        text = [base64.b64encode(content) for content in pictures]
        found = client.infer(name, [texts("images", text, binary=False)]).as_numpy("logits")
        assert np.array_equal(found, expected)
    assert session.entry("alpha").preprocess != session.entry("gamma").preprocess


def test_one_picture_for_several_adapters(client, session, pictures):
    names = ["gamma", "alpha", "beta"]
    inputs = [texts("images", pictures[:1]), texts("adapters", names)]
    found = client.infer("tiny", inputs).as_numpy("logits")
    opened = [Image.open(io.BytesIO(pictures[0])).convert("RGB")]
    x = np.concatenate([session.preprocess(opened, name) for name in names])
    assert np.array_equal(found, session.run(x, names)[:, : CLASSES["beta"]])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client, session, algorithm):
    x = images(2)
    result = client.infer(
        "alpha",
        [tensor("images", x)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,  # which a server may leave out, and ours does
    )
    assert np.array_equal(result.as_numpy("logits"), own("alpha", session.run(x, "alpha")))


def test_many_requests_at_once(server, session):
    """The asyncio client; they share batches, which rounds differently."""
    names = sorted(ADAPTERS) * 12
    x = images(2 * len(names)).reshape(len(names), 2, 3, 32, 32)

    async def ask() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(server.http, conn_limit=20) as client:
            assert await client.is_server_ready()
            calls = (client.infer(n, [tensor("images", a)]) for n, a in zip(names, x, strict=True))
            return [found.as_numpy("logits") for found in await asyncio.gather(*calls)]

    for name, array, found in zip(names, x, asyncio.run(ask()), strict=True):
        assert_parity(own(name, session.run(array, name)), found, "branches", "float32")


def test_a_folded_bundle_with_the_name_of_a_path(folded, tmp_path):
    x = images(3)
    with (
        open_session(folded, device="cpu", threads=1) as session,
        running_server(folded, tmp_path / "log", "--model-name", "stats") as server,
        triton.InferenceServerClient(server.http) as client,
    ):
        expected = session.run(x)
        for model, parameters in (
            ("stats", None),
            ("alpha", None),
            ("stats", {"adapter": "alpha"}),
        ):
            found = client.infer(model, [tensor("images", x)], parameters=parameters)
            assert np.array_equal(found.as_numpy("logits"), expected)
        assert {m["name"] for m in client.get_model_repository_index()} == {"stats", "alpha"}
        metadata = client.get_model_metadata("stats")  # of the model, not all statistics
        assert metadata["name"] == "stats"
        assert metadata["outputs"][0]["shape"] == [-1, CLASSES["alpha"]]
        (one,) = client.get_inference_statistics("stats")["model_stats"]
        assert one["name"] == "stats"
        x_ = tensor("images", x)
        assert error_of(lambda: client.infer("beta", [x_]))[0] == 404
        assert (
            error_of(lambda: client.infer("stats", [x_], parameters={"adapter": "beta"}))[0] == 404
        )


def test_an_adapter_hides_no_statistics_and_a_broken_one_has_no_metadata(
    branches, workshop, tmp_path
):
    """Whoever may upload chooses their names."""
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    put_adapter(make_adapter(workshop, 1), fleet, "stats")
    (put_adapter(make_adapter(workshop, 2), fleet, "broken") / CONFIG_FILE).write_text("{")
    with (
        running_server(branches, tmp_path / "log", "--adapters-dir", fleet) as server,
        triton.InferenceServerClient(server.http) as client,
    ):
        told = server.json("GET", "/v2/models/stats")[1]["model_stats"]
        assert {"stats", "alpha"} < {one["name"] for one in told}
        assert client.get_inference_statistics()["model_stats"] == told
        assert client.get_model_metadata("stats", "1")["outputs"][0]["shape"] == [-1, 7]
        assert [m["name"] for m in client.get_inference_statistics("stats")["model_stats"]] == [
            "stats"
        ]
        refused = error_of(lambda: client.infer("broken", [tensor("images", images(1))]))
        assert refused[0] == 400 and "broken" in refused[1]
        for tell in (client.get_model_metadata, client.get_model_config):
            assert error_of(lambda tell=tell: tell("broken")) == refused


def test_a_request_without_an_adapter_is_told_those_that_answer(small, workshop, tmp_path):
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    (put_adapter(make_adapter(workshop, 1), fleet, "broken") / CONFIG_FILE).write_text("{")
    with (
        running_server(
            small, tmp_path / "log", "--model-name", "tiny", "--adapters-dir", fleet
        ) as server,
        triton.InferenceServerClient(server.http) as client,
    ):
        x = [tensor("images", images(1))]
        assert error_of(lambda: client.infer("broken", x))[0] == 400  # which reads it
        status, said = error_of(lambda: client.infer("tiny", x))
    assert status == 400 and said.endswith("there are: alpha, gamma.")


# --- by hand --------------------------------------------------------------------------------------


def test_a_request_and_its_answer_byte_by_byte(server, session):
    """The protocol's own example, on a socket."""
    x = images(1)
    content = {
        "id": "42",
        "inputs": [{"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32",
                    "parameters": {"binary_data_size": x.nbytes}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }  # fmt: skip
    head = json.dumps(content).encode()
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /v2/models/gamma/versions/1/infer HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/octet-stream\r\n"
            b"Inference-Header-Content-Length: %d\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n" % (len(head), len(head) + x.nbytes)
        )
        connection.sendall(head + x.tobytes())
        with connection.makefile("rb") as stream:
            answer = stream.read()
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 OK\r\n")
    length = int(re.search(rb"(?i)inference-header-content-length: (\d+)", headers)[1])
    described = json.loads(body[:length])
    logits = own("gamma", session.run(x, "gamma"))
    assert set(described.pop("parameters")) == {"adapter", "adapter_digest", "backbone"}
    assert described == {
        "model_name": "gamma", "model_version": "1", "id": "42",
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, CLASSES["gamma"]],
                     "parameters": {"binary_data_size": logits.nbytes}}],
    }  # fmt: skip
    assert body[length:] == logits.tobytes()


def test_a_body_in_chunks(server, session):
    x = images(1)
    content = {"inputs": [{"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32",
                           "data": x.reshape(-1).tolist()}]}  # fmt: skip
    text = json.dumps(content).encode()
    chunks = iter([text[:7], text[7:5000], text[5000:]])
    status, _, body = server.request("POST", "/v2/models/alpha/infer", chunks)
    assert status == 200
    found = np.asarray(json.loads(body)["outputs"][0]["data"], np.float32)
    assert np.array_equal(found, own("alpha", session.run(x, "alpha"))[0])


def test_paths_that_there_are_not(server):
    for method, path, status, said in (
        ("GET", "/v3", 404, "expected another path; see /v2, "),
        ("GET", "/v2/", 404, "expected another path"),
        ("GET", "/v2/models/tiny/infer/", 404, "expected another path"),
        ("GET", "/v2/models/tiny/infer", 405, "expected the method POST."),
        ("GET", "/v2/repository/index", 405, "expected the method POST."),
        ("GET", "/v2/repository/models/alpha/load", 405, "expected the method POST."),
        ("DELETE", "/v2/models/tiny", 405, "expected the method GET or HEAD."),
        ("POST", "/metrics", 405, "expected the method GET or HEAD."),
        ("GET", "/v2/models/nobody", 404, "unknown adapter 'nobody'. There are: "),
        ("GET", "/v2/models/vit", 404, "; the bundle is 'tiny'."),
        ("GET", "/v2/models/backbone", 404, "unknown adapter"),  # as docs/serving.md says
        ("GET", "/v2/models/tiny/versions/2", 404, "unknown version"),
        ("POST", "/v2/models/tiny/versions/x/infer", 400, ""),
    ):
        found, headers, body = server.request(method, path, b"{}")
        assert found == status, path
        assert json.loads(body).keys() == {"error"}
        assert said in json.loads(body)["error"], path
        assert status != 405 or headers["allow"]


# --- errors ---------------------------------------------------------------------------------------


def test_what_is_refused(client, pictures):
    x = tensor("images", images(1))

    def infer(model: str, *inputs: triton.InferInput, **options: Any) -> tuple[int, str]:
        return error_of(lambda: client.infer(model, list(inputs), **options))

    broken = pictures[0][: len(pictures[0]) // 2]
    two = [tensor("images", images(2)), texts("adapters", ["alpha"] * 3)]
    wrong = [
        (404, "unknown adapter 'nobody'", infer("nobody", x)),
        (404, "unknown version '2'", infer("tiny", x, model_version="2")),
        (404, "unknown adapter 'nobody'", infer("tiny", x, parameters={"adapter": "nobody"})),
        (404, "unknown adapter 'nobody'", infer("tiny", x, texts("adapters", ["nobody"]))),
        (400, "parameter adapter: expected a name", infer("tiny", x, parameters={"adapter": 1})),
        (400, "named twice", infer("alpha", x, parameters={"adapter": "beta"})),
        (400, "named twice", infer("alpha", x, texts("adapters", ["beta"]))),
        (400, "unknown output 'scores'", infer("tiny", x, outputs=wanted("scores"))),
        (400, "asked for twice", infer("tiny", x, outputs=wanted("logits", "logits"))),
        (400, "probabilities or answers", infer("tiny", x, outputs=wanted("labels", top=1))),
        (400, "expected FP32 [n, 3, 32, 32]", infer("tiny", tensor("images", images(1, 31)))),
        (400, "at least one image", infer("tiny", tensor("images", images(0)))),
        (400, "at most 32", infer("tiny", tensor("images", images(33)))),
        (400, "found 3 for 2 images", infer("tiny", *two)),
        (400, "inputs: expected", infer("tiny")),
        (400, "inputs: expected", infer("tiny", x, tensor("masks", images(1)))),
        (400, "expected an encoded JPEG, PNG, WEBP", infer("alpha", texts("images", [broken]))),
        (400, "expected microseconds, found -1", infer("tiny", x, timeout=-1)),
        (400, "parameter priority", infer("tiny", x, priority=2**32)),
        (504, "not answered within 1e-06 s", infer("tiny", x, timeout=1)),
        (404, "nobody", error_of(lambda: client.get_model_metadata("nobody"))),
        (404, "nobody", error_of(lambda: client.get_model_config("nobody"))),
        (404, "nobody", error_of(lambda: client.get_inference_statistics("nobody"))),
        (403, "`allow_adapter_loading`", error_of(lambda: client.load_model("alpha"))),
        (403, "`allow_adapter_loading`", error_of(lambda: client.unload_model("alpha"))),
    ]  # fmt: skip
    for status, said, found in wrong:
        assert (status, said in found[1]) == (found[0], True), (status, said, found)


def test_numbers_of_absurd_size_are_refused(server):
    """Python's integers have no limit, and floats do."""
    body = {"inputs": [{"name": "images", "datatype": "FP32", "shape": [1], "data": [1]}],
            "parameters": {"timeout": 10**400}}  # fmt: skip
    status, found = server.json("POST", "/v2/models/tiny/infer", body)
    assert status == 400 and "expected FP32" in found["error"]


@pytest.mark.parametrize("kind", ["json-gzip", "json-deflate", "json-nested"])
def test_few_bytes_that_are_much_json_are_refused(server, kind):
    """Those that `hhdeploy bench --abuse` sends."""
    host, port = server.http.split(":")
    victim = Victim(host, int(port), 0, "alpha", (3, 32, 32), "/nowhere")
    attack = KINDS[kind].prepare(victim)

    async def some() -> set[str]:
        return {await attack() for _ in range(4)}

    assert asyncio.run(asyncio.wait_for(some(), PATIENCE)) <= {"400", "413"}


def test_every_inference_is_one_line_of_the_log(server, client):
    before = len(server.records())
    client.infer("alpha", [tensor("images", images(1))])
    server.json("POST", "/v2/models/no%0abody/infer", {"inputs": []})
    found = server.requests(2, since=before)
    assert {r["logger"] for r in found} == {"hhdeploy.serve.http"}
    assert [(r["method"], r["path"], r["status"]) for r in found] == [
        ("POST", "/v2/models/alpha/infer", 200),
        ("POST", "/v2/models/no\nbody/infer", 404),
    ]


# --- loading --------------------------------------------------------------------------------------


def test_adapters_are_loaded_uploaded_and_unloaded(branches, workshop, tmp_path):
    fleet, token = tmp_path / "fleet", tmp_path / "token"
    fleet.mkdir()
    token.write_text(TOKEN)
    token.chmod(0o600)
    x = images(2)
    options = ["--adapters-dir", fleet, "--allow-adapter-loading", "--token-file", token]
    with (
        open_session(branches, device="cpu", threads=1) as session,
        running_server(branches, tmp_path / "log", "--model-name", "tiny", *options) as server,
        triton.InferenceServerClient(server.http) as client,
    ):

        def logits(name: str) -> np.ndarray:
            return client.infer(name, [tensor("images", x)]).as_numpy("logits")

        first, second = make_adapter(workshop, 1), make_adapter(workshop, 2)
        session.adapters.add("first", first)
        session.adapters.add("second", second)
        assert error_of(lambda: logits("fresh"))[0] == 404
        folder = put_adapter(first, fleet, "fresh")
        assert error_of(lambda: client.load_model("fresh"))[0] == 401
        client.load_model("fresh", AUTHORISED)
        assert np.array_equal(logits("fresh"), session.run(x, "first")[:, :7])

        files = {f"file:1/{TENSOR_FILE}": put_adapter(second, tmp_path, "x") / TENSOR_FILE}
        config = (tmp_path / "x" / CONFIG_FILE).read_text()
        content = {name: path.read_bytes() for name, path in files.items()}
        client.load_model("fresh", AUTHORISED, config=config, files=content)
        assert np.array_equal(logits("fresh"), session.run(x, "second")[:, :7])
        assert (folder / TENSOR_FILE).read_bytes() in content.values()

        client.unload_model("fresh", AUTHORISED)
        refused = error_of(lambda: logits("fresh"))
        assert refused[0] == 404
        assert not client.is_model_ready("fresh")
        for tell in (client.get_model_metadata, client.get_model_config):
            assert error_of(lambda tell=tell: tell("fresh")) == refused
        states = {m["name"]: m["state"] for m in client.get_model_repository_index()}
        assert states["fresh"] == "UNAVAILABLE" and states["alpha"] == "READY"
        ready = server.json("POST", "/v2/repository/index", {"ready": True})[1]
        assert "fresh" not in {m["name"] for m in ready}
        every = server.json("POST", "/v2/repository/index", {"ready": None})[1]
        assert {m["name"] for m in every} == set(states)
        status, said = server.json("POST", "/v2/repository/index", {"ready": "false"})
        assert (status, "expected true or false" in said["error"]) == (400, True)
        loaded = {"parameters": None}
        path = "/v2/repository/models/fresh/load"
        said = {"name": "fresh", "verified": False, "notes": []}
        assert server.json("POST", path, loaded, **AUTHORISED) == (200, said)
        assert np.array_equal(logits("fresh"), session.run(x, "second")[:, :7])

        beside = {"config": config, "parameters": {}}
        status, said = server.json("POST", path, beside, **AUTHORISED)
        assert (status, "found config" in said["error"]) == (400, True)

        load, unload = client.load_model, client.unload_model
        wrong = [
            (404, "unknown adapter 'nobody'", partial(load, "nobody", AUTHORISED)),
            (404, "unknown adapter 'nobody'", partial(unload, "nobody", AUTHORISED)),
            (400, "is the bundle", partial(unload, "tiny", AUTHORISED)),
            (400, "two parameters", partial(load, "a", AUTHORISED, config=config)),
            (400, "Found: model.bin", partial(load, "fresh", AUTHORISED, files={"model.bin": b""})),
            (400, "config.json: peft_type", partial(load, "a", AUTHORISED, None, "{}", content)),
        ]  # fmt: skip
        for status, said, call in wrong:
            found = error_of(call)
            assert (status, said in found[1]) == (found[0], True), (status, said, found)
    assert not (fleet / "a").exists()
