"""The gRPC side of a real server: tritonclient, untouched, is the client."""

from __future__ import annotations

import asyncio
import io
import os
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from tests.runtime.serving.grpc_requests import INFER, PATIENCE, message, own
from tests.runtime.serving.servers import AUTHORISED, TOKEN, Server, running_server
from tests.support import assert_parity, images
from tests.workshop import CLASSES, Workshop


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc) as found:
        yield found


def raw(name: str, array: np.ndarray) -> triton.InferInput:
    """An input as tritonclient sends arrays."""
    datatype = {"f": "FP32", "O": "BYTES", "S": "BYTES"}[array.dtype.kind]
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array)
    return found


def texts(name: str, items: list[str] | list[bytes]) -> triton.InferInput:
    """An input of byte strings."""
    content = [item.encode() if isinstance(item, str) else item for item in items]
    array = np.empty(len(content), object)
    array[:] = content
    return raw(name, array)


def wanted(*names: str, top: int = 0) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, class_count=top) for name in names]


def code_of(call: Callable[[], object]) -> tuple[str, str]:
    """The code and the message that a call of tritonclient fails with."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


# --- what there is --------------------------------------------------------------------------------


def test_health_and_metadata(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("tiny") and client.is_model_ready("beta", "1")
    metadata = client.get_server_metadata()
    assert metadata.name == "hhdeploy" and "classification" in metadata.extensions


def test_metadata_and_configuration_of_models(client):
    bundle, adapter = client.get_model_metadata("tiny"), client.get_model_metadata("beta", "1")
    assert [list(t.shape) for t in bundle.inputs] == [[-1, 3, 32, 32]]
    described = [(t.name, t.datatype, list(t.shape)) for t in adapter.outputs]
    assert described == [
        ("logits", "FP32", [-1, CLASSES["beta"]]),
        ("probabilities", "FP32", [-1, CLASSES["beta"]]),
        ("labels", "BYTES", [-1]),
        ("answers", "BYTES", [-1]),
    ]
    config = client.get_model_config("beta").config
    assert config.max_batch_size == 32 and list(config.input[0].dims) == [3, 32, 32]
    assert config.output[0].data_type == triton.model_config_pb2.TYPE_FP32


def test_the_index_has_the_bundle_and_its_adapters(client):
    models = {m.name: m.state for m in client.get_model_repository_index().models}
    names = {"tiny", "alpha", "rival", "beta", "gamma", "headless"}
    assert models == dict.fromkeys(names, "READY")


def test_statistics_count(client):
    def counts() -> tuple[int, int, int]:
        found = client.get_inference_statistics("tiny").model_stats[0]
        times = found.inference_stats
        return found.inference_count, times.success.count, times.fail.count

    before = counts()
    client.infer("alpha", [raw("images", images(3))])
    code_of(lambda: client.infer("alpha", []))
    assert np.subtract(counts(), before).tolist() == [3, 1, 1]


# --- inference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "headless"])
def test_an_adapter_by_parameter_and_by_alias(client, session, name):
    x = images(3)
    expected = own(name, session.run(x, name))
    by_parameter = client.infer("tiny", [raw("images", x)], parameters={"adapter": name})
    by_alias = client.infer(name, [raw("images", x)], "1", request_id="a b")
    assert np.array_equal(by_parameter.as_numpy("logits"), expected)
    assert np.array_equal(by_alias.as_numpy("logits"), expected)
    answer = by_alias.get_response()
    assert (answer.model_name, answer.model_version, answer.id) == (name, "1", "a b")


def test_the_backbone_answers_where_no_adapter_is_named(client, session):
    x = images(2)
    found = client.infer("tiny", [raw("images", x)]).as_numpy("logits")
    assert np.array_equal(found, session.run(x)[:, : found.shape[1]])


def test_one_adapter_an_image(client, session):
    x, names = images(7), ["alpha", "gamma", "beta", "alpha", "rival", "headless", "gamma"]
    inputs = [raw("images", x), texts("adapters", names)]
    result = client.infer("tiny", inputs, outputs=wanted("probabilities", "logits", "labels"))
    expected = session.run(x, names)[:, : CLASSES["beta"]]
    assert np.array_equal(result.as_numpy("logits"), expected)
    shares = result.as_numpy("probabilities")
    for row, share, label, name in zip(
        expected, shares, result.as_numpy("labels"), names, strict=True
    ):
        count = CLASSES[name]
        e = np.exp(row[:count].astype(np.float64) - row.max())
        assert np.array_equal(share[:count], (e / e.sum()).astype(np.float32))
        assert not share[count:].any()
        assert label.decode() == session.entry(name).label(int(row.argmax()))
    assert [o.name for o in result.get_response().outputs] == ["probabilities", "logits", "labels"]


def test_classification(client, session):
    x = images(2)
    outputs = wanted("logits", top=3)
    found = client.infer("gamma", [raw("images", x)], outputs=outputs).as_numpy("logits")
    expected = own("gamma", session.run(x, "gamma"))
    for texts_of_one, row in zip(found, expected, strict=True):
        parts = [text.decode().split(":") for text in texts_of_one]
        order = np.argsort(-row, kind="stable")[:3]
        assert [int(index) for _, index, _ in parts] == order.tolist()
        assert [label for _, _, label in parts] == [
            session.entry("gamma").label(int(i)) for i in order
        ]
        assert [score for score, _, _ in parts] == [f"{row[i]:f}" for i in order]


def test_pictures_are_preprocessed_as_each_adapter_wants_them(client, session, pictures):
    opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    for name in ("alpha", "gamma"):
        found = client.infer(name, [texts("images", pictures)]).as_numpy("logits")
        expected = session.run(session.preprocess(opened, name), name)
        assert np.array_equal(found, own(name, expected))
    assert session.entry("alpha").preprocess != session.entry("gamma").preprocess


def test_one_picture_for_several_adapters(client, session, pictures):
    names = ["gamma", "alpha", "beta"]
    inputs = [texts("images", pictures[:1]), texts("adapters", names)]
    found = client.infer("tiny", inputs).as_numpy("logits")
    opened = [Image.open(io.BytesIO(pictures[0])).convert("RGB")]
    x = np.concatenate([session.preprocess(opened, name) for name in names])
    assert np.array_equal(found, session.run(x, names)[:, : CLASSES["beta"]])


def test_typed_contents(server, session):
    x = images(2)
    typed = message(x)
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.fp32_contents.extend(x.reshape(-1))
    with grpc.insecure_channel(server.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(typed)
    found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, -1)
    assert np.array_equal(found, own("alpha", session.run(x, "alpha")))


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client, session, algorithm):
    x = images(2)
    result = client.infer("alpha", [raw("images", x)], compression_algorithm=algorithm)
    assert np.array_equal(result.as_numpy("logits"), own("alpha", session.run(x, "alpha")))


def test_many_requests_at_once(server, session):
    """The asyncio client; they share batches, which rounds differently."""
    names = sorted(CLASSES.keys() - {"lora"}) * 12
    x = images(2 * len(names)).reshape(len(names), 2, 3, 32, 32)

    async def ask() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            calls = (client.infer(n, [raw("images", a)]) for n, a in zip(names, x, strict=True))
            return [found.as_numpy("logits") for found in await asyncio.gather(*calls)]

    for name, array, found in zip(names, x, asyncio.run(ask()), strict=True):
        assert_parity(own(name, session.run(array, name)), found, "branches", "float32")


# --- errors ---------------------------------------------------------------------------------------


def test_what_is_refused(client, pictures):
    x = raw("images", images(1))

    def infer(model: str, *inputs: triton.InferInput, **options: Any) -> tuple[str, str]:
        return code_of(lambda: client.infer(model, list(inputs), **options))

    def loading(call: Callable[..., None]) -> tuple[str, str]:
        return code_of(lambda: call("alpha", headers=AUTHORISED))

    bomb = io.BytesIO()
    Image.new("1", (8000, 8000)).save(bomb, "PNG")
    broken = pictures[0][: len(pictures[0]) // 2]
    wrong = [
        ("NOT_FOUND", "unknown adapter 'nobody'", infer("nobody", x)),
        ("NOT_FOUND", "unknown version '2'", infer("tiny", x, model_version="2")),
        ("NOT_FOUND", "unknown adapter", infer("tiny", x, parameters={"adapter": "nobody"})),
        ("INVALID_ARGUMENT", "named twice", infer("alpha", x, parameters={"adapter": "beta"})),
        ("INVALID_ARGUMENT", "unknown output", infer("tiny", x, outputs=wanted("scores"))),
        ("INVALID_ARGUMENT", "expected FP32", infer("tiny", raw("images", images(1, 31)))),
        ("INVALID_ARGUMENT", "at most 32", infer("tiny", raw("images", images(33)))),
        ("INVALID_ARGUMENT", "inputs: expected", infer("tiny")),
        ("INVALID_ARGUMENT", "8000 x 8000", infer("alpha", texts("images", [bomb.getvalue()]))),
        ("INVALID_ARGUMENT", "image 0", infer("alpha", texts("images", [broken]))),
        ("DEADLINE_EXCEEDED", "not answered", infer("tiny", x, timeout=1)),
        ("PERMISSION_DENIED", "`allow_adapter_loading`", loading(client.load_model)),
        ("PERMISSION_DENIED", "`allow_adapter_loading`", loading(client.unload_model)),
        ("NOT_FOUND", "nobody", code_of(lambda: client.get_model_metadata("nobody"))),
        ("NOT_FOUND", "nobody", code_of(lambda: client.get_model_config("nobody"))),
        ("NOT_FOUND", "nobody", code_of(lambda: client.get_inference_statistics("nobody"))),
        ("NOT_FOUND", "nobody", code_of(lambda: client.is_model_ready("nobody"))),
    ]  # fmt: skip
    for code, said, found in wrong:
        assert (code, said in found[1]) == (found[0], True), (code, said, found)


def test_messages_beyond_the_limit_are_not_read(client, session):
    vast = np.zeros((65 << 20) // 4, np.float32)
    for algorithm in (None, "gzip"):
        found = code_of(
            lambda algorithm=algorithm: client.infer(
                "tiny", [raw("images", vast)], compression_algorithm=algorithm
            )
        )
        assert found[0] == "RESOURCE_EXHAUSTED"
    x = images(1)
    found = client.infer("alpha", [raw("images", x)]).as_numpy("logits")
    assert np.array_equal(found, own("alpha", session.run(x, "alpha")))


def test_methods_that_are_not_served(client):
    for call in (
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        lambda: client.register_system_shared_memory("a", "/a", 4),
        lambda: client.update_log_settings({}),
    ):
        code, said = code_of(call)
        assert code == "UNIMPLEMENTED" and "not served" in said


def test_every_request_is_one_line_of_the_log(server, client):
    before = len(server.records())
    client.infer("alpha", [raw("images", images(1))])
    code_of(lambda: client.infer("nobody\n", []))
    found = server.requests(2, since=before)
    assert {r["logger"] for r in found} == {"hhdeploy.serve.grpc"}
    assert [(r["method"], r["model"], r["code"]) for r in found] == [
        ("ModelInfer", "alpha", "OK"),
        ("ModelInfer", "nobody\n", "NOT_FOUND"),
    ]


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_answers_in_order_and_outlives_errors(server, session):
    names = ["alpha", "nobody", "gamma", "beta", "nobody", "alpha"]
    x = images(6).reshape(6, 1, 3, 32, 32)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for index, (name, array) in enumerate(zip(names, x, strict=True)):
            client.async_stream_infer(name, [raw("images", array)], request_id=str(index))
        found = [answers.get(timeout=PATIENCE) for _ in names]
        client.stop_stream()
    for index, (name, array, (result, error)) in enumerate(zip(names, x, found, strict=True)):
        if name == "nobody":
            assert result is None and "unknown adapter 'nobody'" in error.message()
            continue
        assert error is None
        answer = result.get_response()
        assert answer.id == str(index)
        assert answer.parameters["triton_final_response"].bool_param
        expected = own(name, session.run(array, name))
        assert np.array_equal(result.as_numpy("logits"), expected)
    assert answers.empty()


def test_an_error_in_a_stream_says_whose_it_is(server):
    async def ask() -> list[Any]:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer(iter([message(images(1), "nobody"), message(images(1))]))
            return [answer async for answer in call]

    wrong, right = asyncio.run(ask())
    assert "nobody" in wrong.error_message and wrong.infer_response.id == "seven"
    assert not right.error_message and right.infer_response.id == "seven"


def test_bytes_that_are_no_message_are_answered_in_a_stream(server):
    method = INFER.replace("ModelInfer", "ModelStreamInfer")
    right = message(images(1), "alpha").SerializeToString()
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_stream(method)(iter([b"\xff" * 10, right]), timeout=PATIENCE)
        wrong, good = map(service_pb2.ModelStreamInferResponse.FromString, call)
    assert "no message inference.ModelInferRequest" in wrong.error_message
    assert not good.error_message and good.infer_response.id == "seven"


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def loading(
    small: Path, workshop: Workshop, tmp_path: Path
) -> Iterator[tuple[triton.InferenceServerClient, Path]]:
    """A client of a server that takes adapters, and its fleet directory."""
    fleet, token = tmp_path / "fleet", tmp_path / "token"
    fleet.mkdir()
    token.write_text(TOKEN)
    options = ("--model-name", "tiny", "--adapters-dir", fleet, "--allow-adapter-loading",
               "--token-file", token)  # fmt: skip
    with (
        running_server(small, tmp_path / "log", *options) as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        yield client, fleet


def test_adapters_come_and_go(loading, workshop):
    client, fleet = loading
    x = images(2)

    def check(name: str, truth: str) -> None:
        found = client.infer(name, [raw("images", x)]).as_numpy("logits")
        assert_parity(workshop.truth(truth, x), found, "branches", "float32")

    for headers in (
        None,
        {"authorization": TOKEN},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization-bin": f"Bearer {TOKEN}".encode()},
    ):
        for call in (client.load_model, client.unload_model):
            code, _ = code_of(lambda c=call, h=headers: c("alpha", headers=h))
            assert code == "UNAUTHENTICATED"
    check("alpha", "alpha")

    client.unload_model("alpha", headers=AUTHORISED)
    assert code_of(lambda: client.infer("alpha", [raw("images", x)]))[0] == "NOT_FOUND"
    assert not client.is_model_ready("alpha")
    client.load_model("alpha", headers=AUTHORISED)
    check("alpha", "alpha")

    source = workshop.directory("rival")
    config = (source / CONFIG_FILE).read_text()
    files = {f"file:{TENSOR_FILE}": (source / TENSOR_FILE).read_bytes()}
    client.load_model("newcomer", headers=AUTHORISED, config=config, files=files)
    check("newcomer", "rival")
    check("alpha", "alpha")
    index = client.get_model_repository_index().models
    assert [m.state for m in index if m.name == "newcomer"] == ["READY"]
    assert (fleet / "newcomer" / TENSOR_FILE).is_file()


def test_an_index_of_names_that_are_no_text(small, tmp_path):
    """A folder's name is bytes: one that is no UTF-8 is in the reason why it is not loaded."""
    fleet = tmp_path / "fleet"
    folder = os.fsencode(fleet) + b"/\xff"
    os.makedirs(folder)
    os.mkfifo(folder + b"/adapter_config.json")
    with (
        running_server(small, tmp_path / "log", "--adapters-dir", fleet) as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        index = client.get_model_repository_index().models
    (reason,) = [m.reason for m in index if m.name == r"'\udcff'"]
    assert r"fleet/\udcff/adapter_config.json: expected a file" in reason


def test_what_loading_refuses(loading, workshop):
    client, fleet = loading
    source = workshop.directory("rival")
    config = (source / CONFIG_FILE).read_text()
    tensors = (source / TENSOR_FILE).read_bytes()

    def load(name: str, **upload: Any) -> tuple[str, str]:
        return code_of(lambda: client.load_model(name, headers=AUTHORISED, **upload))

    good = {f"file:{TENSOR_FILE}": tensors}
    assert load("nobody")[0] == "NOT_FOUND"
    assert load("tiny")[0] == "INVALID_ARGUMENT"
    assert load("newcomer", config=config, files={"file:evil.py": b""})[0] == "INVALID_ARGUMENT"
    assert load("newcomer", config=config)[0] == "INVALID_ARGUMENT"
    assert load("alpha", files={"files": tensors})[0] == "INVALID_ARGUMENT"
    assert load("newcomer", config="{", files=good)[0] == "INVALID_ARGUMENT"
    cut = {f"file:{TENSOR_FILE}": tensors[:-1]}
    assert load("newcomer", config=config, files=cut)[0] == "INVALID_ARGUMENT"
    for name in ("../newcomer", "/newcomer", "..", "", "a/b"):
        assert load(name, config=config, files=good)[0] in ("INVALID_ARGUMENT", "NOT_FOUND")
    assert not list(fleet.iterdir()) and not (fleet.parent / "newcomer").exists()
