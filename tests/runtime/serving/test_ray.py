"""The server on several replicas: a real Ray cluster, replicas that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import shutil
import signal
from collections.abc import Iterator

import aiohttp
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from tritonclient import grpc as grpc_client
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from hhdeploy.cli import main
from hhdeploy.runtime.serving import errors
from hhdeploy.runtime.serving.http.bodies import SMALL
from hhdeploy.runtime.serving.messages import BYTES, FP32
from hhdeploy.runtime.session import open_session
from tests.runtime.serving.fleets import make_adapter, put_adapter
from tests.support import MISTAKE, assert_parity, images
from tests.workshop import CLASSES, WIDTH

pytest.importorskip("ray.serve", reason="needs the package 'ray'")

import ray

from tests.runtime.serving.ray_servers import (
    Fleet,
    body_of,
    children_of,
    logits_in,
    running_fleet,
    wait_until,
)

NAMES = ("alpha", "rival", "beta", "gamma", "headless")
IMAGES = images(7)
# So little JSON that it is parsed at once: what waits for a parser is limited, and refused beyond.
FEW = IMAGES[:3]


@pytest.fixture(scope="module")
def fleet(branches, tmp_path_factory) -> Iterator[Fleet]:
    """The command, on a cluster of its own. A test leaves the bundle's adapters as they were."""
    with running_fleet(branches, tmp_path_factory.mktemp("ray")) as running:
        yield running


@pytest.fixture(scope="module")
def expected(branches) -> dict[str, np.ndarray]:
    """What a bare session says of `IMAGES`, only each adapter's own classes."""
    with open_session(branches, device="cpu", threads=1) as session:
        found = {name: session.run(IMAGES, name)[:, : CLASSES[name]] for name in NAMES}
    assert np.abs(found["alpha"] - found["rival"]).max() > MISTAKE
    return found


def assert_all_say(fleet: Fleet, name: str, logits: np.ndarray) -> None:
    """Every replica answers for an adapter, and with these logits."""
    answers = fleet.logits_of_each(IMAGES, name)
    assert len(answers) == 2
    for answer in answers:
        assert isinstance(answer, np.ndarray), answer
        assert_parity(logits, answer, "branches", "float32")


# --- answers ------------------------------------------------------------------------------------


def test_answers_are_those_of_a_bare_session(fleet, expected):
    for name in NAMES:
        assert_parity(expected[name], fleet.infer(IMAGES, name), "branches", "float32")


def test_a_request_may_mix_adapters(fleet, expected):
    chosen = [NAMES[i % len(NAMES)] for i in range(len(IMAGES))]
    inputs = [
        InferInput("images", list(IMAGES.shape), FP32),
        InferInput("adapters", [len(IMAGES)], BYTES),
    ]
    inputs[0].set_data_from_numpy(IMAGES)
    inputs[1].set_data_from_numpy(np.asarray(chosen, object))
    with contextlib.closing(InferenceServerClient(fleet.server.http)) as client:
        logits = client.infer("tiny", inputs).as_numpy("logits")
    assert logits.shape == (len(IMAGES), WIDTH)
    for i, name in enumerate(chosen):
        assert_parity(expected[name][i], logits[i, : CLASSES[name]], "branches", "float32")
        assert np.all(np.isneginf(logits[i, CLASSES[name] :]))


def test_errors_of_a_replica_keep_their_status_and_words(fleet):
    status, answer = fleet.server.json("POST", "/v2/models/nobody/infer", body_of(IMAGES))
    assert (status, "unknown adapter 'nobody'" in answer["error"]) == (404, True)
    status, answer = fleet.server.json("POST", "/v2/models/alpha/infer", body_of(images(1, 16)))
    assert (status, "expected FP32 [n, 3, 32, 32]" in answer["error"]) == (400, True)
    assert fleet.server.request("GET", "/v2/health/ready")[0] == 200
    assert fleet.server.request("GET", "/v2/models/nobody/ready")[0] == 404
    assert fleet.server.json("GET", "/v2/models/alpha")[1]["name"] == "alpha"


def test_limits_of_the_http_side_hold(fleet):
    headers = {"content-length": str(1 << 40)}
    status, _, content = fleet.server.request("POST", "/v2/models/tiny/infer", None, headers)
    assert (status, b"at most" in content) == (413, True)
    assert fleet.server.request("GET", "/status", headers={"host": "evil.example"})[0] == 403
    status, _ = fleet.post("/v2/repository/models/alpha/unload", {}, token="wrong" * 8)
    assert status == 401
    assert fleet.infer(IMAGES, "alpha").shape == (len(IMAGES), CLASSES["alpha"])


# --- numbers ------------------------------------------------------------------------------------


def test_numbers_are_those_of_all_replicas(fleet):
    before = fleet.server.json("GET", "/status")[1]
    for _ in range(8):
        fleet.infer(IMAGES[:2], "beta")
    status = fleet.server.json("GET", "/status")[1]
    assert status["images"] == before["images"] + 16
    assert status["requests"]["answered"] == before["requests"]["answered"] + 8
    assert (status["replicas"], status["ready"]) == (2, True)
    counts = {adapter["name"]: adapter["images"] for adapter in status["adapters"]}
    assert sum(counts.values()) == status["images"]
    text = fleet.server.request("GET", "/metrics")[2].decode()
    families = {f.name: f.samples for f in text_string_to_metric_families(text)}
    images_by_replica = families["nv_inference_count"]
    assert {s.labels["replica"] for s in images_by_replica} == fleet.names()
    assert sum(s.value for s in images_by_replica) == status["images"]
    statistics = fleet.server.json("GET", "/v2/models/tiny/stats")[1]["model_stats"][0]
    assert statistics["inference_count"] == status["images"]


# --- adapters -----------------------------------------------------------------------------------


def test_an_upload_reaches_all_replicas_and_so_does_its_replacement(fleet, workshop, expected):
    said = {"name": "fresh", "verified": False, "notes": []}
    assert fleet.load("fresh", workshop.directory("rival")) == (200, said)
    assert_all_say(fleet, "fresh", expected["rival"])
    assert fleet.load("fresh", workshop.directory("alpha"))[0] == 200
    assert_all_say(fleet, "fresh", expected["alpha"])
    assert_parity(expected["alpha"], fleet.infer(IMAGES, "fresh"), "branches", "float32")


def test_what_lies_in_the_fleet_directory_is_loaded_by_all(fleet, workshop, expected):
    shutil.copytree(workshop.directory("gamma"), fleet.directory / "put")
    assert fleet.load("put")[0] == 200
    assert_all_say(fleet, "put", expected["gamma"])


def test_an_adapter_that_is_wrong_changes_nothing(fleet, workshop, expected, tmp_path):
    assert fleet.load("kept", workshop.directory("rival"))[0] == 200
    wrong = tmp_path / "wrong"
    shutil.copytree(workshop.directory("rival"), wrong)
    (wrong / "adapter_model.safetensors").write_bytes(b"no tensors")
    status, answer = fleet.load("kept", wrong)
    assert (status, "kept" in answer["error"]) == (400, True)
    assert_all_say(fleet, "kept", expected["rival"])
    assert fleet.load("nowhere")[0] == 404


def test_an_unloaded_adapter_is_answered_by_no_replica_until_it_is_loaded(fleet, expected):
    assert fleet.unload("beta") == (200, None)
    answers = fleet.logits_of_each(IMAGES, "beta")
    assert [type(a.cause) for a in answers] == [errors.NotFoundError] * 2
    assert fleet.server.json("POST", "/v2/models/beta/infer", body_of(IMAGES))[0] == 404
    assert fleet.load("beta")[0] == 200
    assert_all_say(fleet, "beta", expected["beta"])


# --- what dies ----------------------------------------------------------------------------------


def test_a_replica_that_is_killed_under_load_loses_no_request(fleet, workshop, expected):
    assert fleet.load("late", workshop.directory("rival"))[0] == 200
    assert fleet.load("quiet", workshop.directory("alpha"))[0] == 200
    assert fleet.unload("headless") == (200, None)
    known = {name: expected[name] for name in NAMES[:-1]} | {"late": expected["rival"]}
    before = fleet.names()

    answers = asyncio.run(_load(fleet, sorted(known), 600, killed_after=150))

    assert len(answers) == 600
    for name, logits in known.items():
        mine = [(i, found) for n, i, found in answers if n == name]
        truth = np.concatenate([logits[i : i + 1] for i, _ in mine])
        assert_parity(truth, np.concatenate([f for _, f in mine]), "branches", "float32")
    fleet.wait_for_another(before, 2)
    # The replica in its place has that one on disk only, until somebody asks it for it.
    (survivor,) = before & fleet.names()
    wait_until(lambda: fleet.chosen("quiet", 16) == {survivor})
    wait_until(lambda: fleet.chosen("alpha", 32) == fleet.names())
    assert_all_say(fleet, "quiet", expected["alpha"])
    assert_all_say(fleet, "late", expected["rival"])
    gone = fleet.logits_of_each(IMAGES, "headless")
    assert [type(answer.cause) for answer in gone] == [errors.NotFoundError] * 2
    assert fleet.load("headless")[0] == 200
    assert_all_say(fleet, "headless", expected["headless"])


async def _load(
    fleet: Fleet, names: list[str], count: int, killed_after: int
) -> list[tuple[str, int, np.ndarray]]:
    """Adapter, image and logits of each answer; a replica is killed meanwhile."""
    random = np.random.default_rng(3)
    chosen = [
        (names[random.integers(len(names))], int(random.integers(len(IMAGES))))
        for _ in range(count)
    ]
    answers: list[tuple[str, int, np.ndarray]] = []
    gate = asyncio.Semaphore(300)

    async def one(client: aiohttp.ClientSession, name: str, image: int) -> None:
        url = f"{fleet.server.url}/v2/models/{name}/infer"
        async with gate, client.post(url, json=body_of(IMAGES[image : image + 1])) as answer:
            content = await answer.json()
            assert answer.status == 200, content
        answers.append((name, image, logits_in(content)))
        if len(answers) == killed_after:
            fleet.kill_one("Replica")

    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits) as client:
        await asyncio.gather(*(one(client, name, image) for name, image in chosen))
    return answers


def test_a_registry_that_is_killed_is_told_everything_by_the_replicas(fleet, workshop, expected):
    assert fleet.unload("gamma") == (200, None)
    old = fleet.processes_of("Registry")[0]
    old.kill()
    old.wait(60)
    assert_parity(expected["alpha"], fleet.infer(IMAGES, "alpha"), "branches", "float32")
    assert fleet.load("after", workshop.directory("rival"))[0] == 200
    assert_all_say(fleet, "after", expected["rival"])
    before = fleet.names()
    fleet.kill_one("Replica")
    fleet.wait_for_another(before, 2)
    gone = fleet.logits_of_each(IMAGES, "gamma")
    assert [type(answer.cause) for answer in gone] == [errors.NotFoundError] * 2
    assert fleet.load("gamma")[0] == 200


@pytest.mark.parametrize("given", ["of-mine", "none that is taken"])
def test_an_answer_has_one_id(fleet, given):
    with contextlib.closing(http.client.HTTPConnection(fleet.server.http, timeout=60)) as client:
        client.request("GET", "/v2", headers={"X-Request-Id": given})
        assert client.getresponse().headers.get_all("x-request-id") == [given]


def test_an_ingress_that_is_killed_takes_its_numbers_with_it(fleet):
    def refusing() -> set[str]:
        fleet.server.request("GET", "/v2/models/nobody")
        text = fleet.server.request("GET", "/metrics")[2].decode()
        return set(re.findall(r'refused_requests_total{.*replica="(ingress-[0-9a-f]*)"}', text))

    wait_until(lambda: len(refusing()) == 2)
    before = refusing()
    old = fleet.processes_of("Ingress")[0]
    old.kill()
    old.wait(60)
    wait_until(lambda: len(there := refusing()) == 2 and len(there & before) == 1)


# --- the command --------------------------------------------------------------------------------


def test_grpc_answers_for_the_replicas_and_says_what_they_say(fleet, expected):
    with grpc_client.InferenceServerClient(fleet.server.grpc) as client:
        assert client.is_server_ready()
        tensor = grpc_client.InferInput("images", IMAGES.shape, FP32)
        tensor.set_data_from_numpy(IMAGES)
        found = client.infer("rival", [tensor]).as_numpy("logits")
        assert_parity(expected["rival"], found, "branches", "float32")
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*nobody"):
            client.infer("nobody", [tensor])


def test_a_hangup_has_every_replica_look_through_the_fleet_directory(fleet, workshop):
    put_adapter(make_adapter(workshop, 1), fleet.directory, "later")
    assert fleet.server.json("GET", "/v2/models/later")[0] == 404
    fleet.server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: fleet.server.json("GET", "/v2/models/later")[0] == 200)


def test_the_command_leaves_a_cluster_alone_that_serves_already(fleet, branches, monkeypatch):
    """Another command, in this process."""
    monkeypatch.setenv("RAY_ADDRESS", fleet.address)
    monkeypatch.setattr("hhdeploy.runtime.serving.logs.log_as_json", lambda level: None)
    ray.shutdown()
    try:
        done = CliRunner().invoke(main, ["serve", str(branches), "--ray"])
        assert (done.exit_code, "Ray Serve runs already" in done.output) == (1, True), done.output
        assert not ray.is_initialized()
    finally:
        fleet.look_in()
    assert len(fleet.names()) == 2


def test_the_command_answers_what_it_took_and_leaves_nothing(fleet, expected):
    """The last test of this fleet: it is stopped."""
    there = children_of(fleet.server)
    assert any("raylet" in child.name() for child in there)
    ray.shutdown()
    answers = asyncio.run(_until_stopped(fleet))
    assert fleet.server.process.wait(60) == 0
    assert [logits for logits in answers if logits is not None]
    for logits in answers:
        if logits is not None:
            assert_parity(expected["rival"][: len(FEW)], logits, "branches", "float32")
    _, left = psutil.wait_procs(there, 60)
    assert not left


async def _until_stopped(fleet: Fleet) -> list[np.ndarray | None]:
    """Logits of many requests, or None where the server said that it stops.

    Some are large: they wait for the one process that reads JSON.
    """
    stopping = asyncio.Event()

    async def one(client: aiohttp.ClientSession, note: str) -> np.ndarray | None:
        url = f"{fleet.server.url}/v2/models/rival/infer"
        body = body_of(FEW) | {"parameters": {"note": note}}
        async with client.post(url, json=body) as answer:
            content = await answer.json()
        if not stopping.is_set():
            stopping.set()
            fleet.server.process.send_signal(signal.SIGTERM)
        if answer.status == 503:
            return None
        assert answer.status == 200, content
        return logits_in(content)

    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits) as client:
        notes = ["", "", "x" * SMALL] * 20
        return await asyncio.gather(*(one(client, note) for note in notes))
