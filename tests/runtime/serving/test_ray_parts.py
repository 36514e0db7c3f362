"""The server on several replicas, part by part, without a cluster."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from hhdeploy.bundle import remove_adapter
from hhdeploy.cli import main
from hhdeploy.errors import AdapterError, BundleError, DeviceError, PlanError
from hhdeploy.runtime import open_session
from hhdeploy.runtime.serving import errors, tracing
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.http.app import http_app
from hhdeploy.runtime.serving.http.bodies import SMALL
from hhdeploy.runtime.serving.messages import (
    BYTES,
    InferRequest,
    InferResponse,
    Tensor,
    bytes_array,
)
from hhdeploy.runtime.serving.metrics import Metrics, latency_ms
from tests.runtime.serving.certificates import make_certificate
from tests.runtime.serving.fleets import until
from tests.runtime.serving.leftovers import SIZE, growth, post
from tests.workshop import copy_bundle

pytest.importorskip("ray.serve", reason="needs the package 'ray'")

from pydantic import ValidationError
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from hhdeploy.runtime.serving.ray import app as ray_app
from hhdeploy.runtime.serving.ray import endpoint as ray_endpoint
from hhdeploy.runtime.serving.ray import registry as ray_registry
from hhdeploy.runtime.serving.ray import run as ray_run
from hhdeploy.runtime.serving.ray.calls import answered, ask
from hhdeploy.runtime.serving.ray.draining import Draining
from hhdeploy.runtime.serving.ray.endpoint import RayEndpoint, named_adapter
from hhdeploy.runtime.serving.ray.merge import merged_metrics, merged_status, summed
from hhdeploy.runtime.serving.ray.registry import Latest, Registry, Served
from hhdeploy.runtime.serving.ray.replica import Replica, served_by
from hhdeploy.runtime.serving.ray.router import AdapterRouter
from hhdeploy.runtime.serving.ray.settings import read_settings
from hhdeploy.runtime.serving.settings import ServeSettings

PATIENCE_SECONDS = 60


@pytest.mark.parametrize(
    ("address", "message"),
    [("", "Ray does not start here: no node"), ("h:1", "the cluster h:1 does not answer: no node")],
)
def test_a_ray_that_does_not_start_is_an_error_of_ours(monkeypatch, address, message):
    def refuse(*args, **options):
        raise Exception("no node")  # the class that Ray raises

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_run.ray, "init", refuse)
    with pytest.raises(DeviceError, match=message), ray_run._cluster(SimpleNamespace(replicas=1)):
        pass


def test_an_ingress_sends_spans_where_its_environment_says(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "_EXPORTER", "opentelemetry.exporter.that_there_is_not")
    monkeypatch.setattr(tracing, "_tracer", lambda: None)
    monkeypatch.setattr(ray_app, "log_as_json", lambda *_: None)
    actor = SimpleNamespace(get_actor_name=lambda: "ingress")
    monkeypatch.setattr(ray_app.ray, "get_runtime_context", lambda: actor)
    ray_app.Ingress(read_settings({"bundle": tmp_path}), None, None)
    assert [record.getMessage()[:8] for record in caplog.records] == ["no spans"]


# --- errors -------------------------------------------------------------------------------------


def kinds(base: type[Exception]) -> list[type[Exception]]:
    return [base, *(kind for child in base.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("kind", kinds(errors.RequestError))
def test_errors_travel_between_processes(kind):
    travelled = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert (type(travelled), str(travelled)) == (kind, "what was wrong")
    assert (travelled.status, travelled.code) == (kind.status, kind.code)


class Handle:
    """Of a deployment: each call raises or returns the next of ``answers``."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []
        self.cancelled = 0

    def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def __getattr__(self, method: str) -> Handle:
        return self

    def options(self, **_: Any) -> Handle:
        return self

    def __await__(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return (yield from answer.__await__()) if isinstance(answer, asyncio.Future) else answer


def wrapped(error: Exception) -> Exception:
    """As Ray hands it to the caller."""
    return RayTaskError("infer", "traceback", error).as_instanceof_cause()


def test_a_call_is_made_again_when_its_replica_dies():
    handle = Handle(ActorDiedError(), ActorDiedError(), 7)
    assert asyncio.run(ask(handle, "a", 1)) == 7
    assert handle.calls == [("a", 1)] * 3


@pytest.mark.parametrize("error", [errors.NotFoundError("no such adapter"), AdapterError("broken")])
def test_what_a_replica_raises_is_raised_as_it_is(error):
    handle = Handle(wrapped(error))
    with pytest.raises(type(error), match=str(error)) as raised:
        asyncio.run(ask(handle))
    assert type(raised.value) is type(error)
    with pytest.raises(type(error)):
        answered([1, wrapped(error)])


def test_a_bug_in_a_replica_is_an_internal_error():
    with pytest.raises(errors.FailedError, match="internal error"):
        asyncio.run(ask(Handle(wrapped(KeyError("secret")))))


def test_too_many_waiting_requests_are_refused():
    with pytest.raises(errors.BusyError):
        asyncio.run(ask(Handle(BackPressureError(5, 5))))


def test_the_dead_are_left_out_of_what_all_answer():
    assert answered([1, ActorDiedError(), 2]) == [1, 2]
    with pytest.raises(errors.StoppingError):
        answered([ActorDiedError()])


def endpoint(handle: Handle) -> RayEndpoint:
    return RayEndpoint(ServeSettings(Path("tiny")), handle, handle)


def request(model: str = "tiny", adapters: list[bytes] | None = None, **parameters: Any):
    inputs = {}
    if adapters is not None:
        inputs["adapters"] = Tensor("adapters", BYTES, bytes_array(adapters))
    return InferRequest(model, "", "", inputs, parameters=parameters)


def test_an_answer_that_does_not_come_is_given_up_and_cancelled():
    async def run() -> Handle:
        handle = Handle(asyncio.get_running_loop().create_future())
        with pytest.raises(errors.TimedOutError):
            await endpoint(handle).infer(request(timeout=1000))
        return handle

    assert asyncio.run(run()).cancelled == 1


def test_replicas_that_die_for_ever_do_not_hold_a_request_for_ever():
    handle = Handle(*[ActorDiedError()] * 1000)
    with pytest.raises(errors.TimedOutError):
        asyncio.run(endpoint(handle).infer(request(timeout=200_000)))


@pytest.mark.parametrize("size", [1, SMALL + 1])
def test_draining_answers_what_was_taken_and_takes_nothing_new(size):
    """Also JSON that is still parsed, by a process of its own: no replica knows of it yet."""
    body = json.dumps({"inputs": [], "id": "x" * size}).encode()

    async def run() -> None:
        answer = asyncio.get_running_loop().create_future()
        handle = Handle(answer)
        served = endpoint(handle)
        app = http_app(served, Access())
        draining = Draining(app)
        async with app.router.lifespan_context(app):
            taken = asyncio.create_task(post(draining, "/v2/models/tiny/infer", body))
            await asyncio.sleep(0)
            assert bool(handle.calls) == (size <= SMALL)
            served.stopping = True
            drained = asyncio.create_task(draining.drain())
            await asyncio.sleep(0)
            assert await post(draining, "/v2/models/tiny/infer", b"") == 503
            assert not await served.ready()
            await until(lambda: len(handle.calls) == 1)
            assert not drained.done()
            answer.set_result(InferResponse("tiny", "", ()))
            assert await taken == 200
            await drained

    asyncio.run(run())


def test_who_watches_is_answered_while_it_drains():
    async def run() -> None:
        draining = Draining(http_app(endpoint(Handle()), Access()))
        await draining.drain()
        assert await post(draining, "/v2/health/live", b"", method="GET") == 200

    asyncio.run(run())


def test_a_request_s_id_is_left_to_the_proxy_that_adds_it():
    """Also of one that the server does not take, which is another one in the log."""
    app = ray_app.named_by_proxy(http_app(endpoint(Handle()), Access()))

    async def ids(*given: bytes) -> list[bytes]:
        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        scope = {
            "type": "http", "method": "GET", "path": "/v2/health/live", "query_string": b"",
            "headers": [(b"host", b"localhost"), *((b"x-request-id", each) for each in given)],
        }  # fmt: skip
        await app(scope, asyncio.Event().wait, send)
        assert (said[0]["status"], said[1]["body"]) == (200, b'{"live":true}')
        return [value for name, value in said[0]["headers"] if name == b"x-request-id"]

    assert asyncio.run(ids(b"abc")) == []
    assert asyncio.run(ids(b"a b c")) == []
    assert asyncio.run(ids(b"x" * 129)) == []
    assert len(asyncio.run(ids())) == 1  # no proxy, or one that names none


# --- routing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "adapter"),
    [
        (request("alpha"), "alpha"),
        (request(adapter="beta"), "beta"),
        (request(adapters=[b"beta", b"beta"]), "beta"),
        (request(adapters=[b"beta", b"alpha"]), ""),
        (request(adapters=[]), ""),
        (request(adapter=7), ""),
        (request(), ""),
    ],
)
def test_the_adapter_that_a_request_names(asked, adapter):
    assert named_adapter(asked, "tiny") == adapter


def choose(
    adapter: str, rows: list[set[str]], under_way: dict[int, int] | None = None
) -> list[list[int]]:
    """Numbers of the replicas that are asked, by rank; each takes 40 requests at a time."""
    router = object.__new__(AdapterRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=(under_way or {}).get)
    replicas = [
        SimpleNamespace(
            number=i,
            replica_id=i,
            max_ongoing_requests=40,
            routing_stats={"adapters": names} if names else {},
        )
        for i, names in enumerate(rows)
    ]
    pending = SimpleNamespace(
        metadata=SimpleNamespace(multiplexed_model_id=adapter),
        routing_context=SimpleNamespace(should_backoff=False),
    )
    ranks = asyncio.run(router.choose_replicas(replicas, pending))
    assert pending.routing_context.should_backoff
    return [[replica.number for replica in rank] for rank in ranks]


def test_replicas_that_have_the_adapter_in_a_row_come_first():
    rows = [{"alpha"}, {"beta"}, {"alpha", "beta"}, set()]
    first, second = choose("alpha", rows)
    assert set(first) == {0, 2}
    assert len(set(second)) == 2
    first, second = choose("beta", [{"alpha"}, {"beta"}])
    assert (first, set(second)) == ([1], {0, 1})
    assert [set(rank) for rank in choose("", [{"alpha"}, {"beta"}])] == [{0, 1}]
    assert [set(rank) for rank in choose("gamma", [{"alpha"}, set()])] == [{0, 1}]


def test_a_hot_adapter_is_spread():
    rows = [{"alpha"}, {"beta"}, {"alpha"}]
    for under_way in ({0: 4, 2: 5}, {0: 5}):  # one of the two is not busy, or it is not known
        assert set(choose("alpha", rows, under_way)[0]) == {0, 2}
    (both,) = choose("alpha", [{"alpha"}, {"beta"}], {0: 5, 1: 40})
    assert set(both) == {0, 1}  # of these two the one with fewer requests is asked
    (two,) = choose("alpha", rows, {0: 5, 2: 39})
    assert len(set(two)) == 2


# --- numbers ------------------------------------------------------------------------------------


def test_numbers_are_added_and_the_rest_is_the_first():
    one = {"a": 1, "b": {"c": [{"d": 2.5, "e": "x"}]}, "f": True, "g": None}
    other = {"a": 5, "b": {"c": [{"d": 0.5, "e": "y"}]}, "f": False, "g": None}
    found = {"a": 6, "b": {"c": [{"d": 3.0, "e": "x"}]}, "f": True, "g": None}
    assert summed([one, other]) == found


def status(images: int, recent: list[float], state: str, **changes: Any) -> dict[str, Any]:
    adapter = {"name": "alpha", "state": state, "problem": "", "classes": 7, "row": 3}
    return {
        "model": "tiny",
        "ready": True,
        "uptime_seconds": float(images),
        "queued_images": 1,
        "batches": 2,
        "images": images,
        "requests": {"answered": images, "failed": {"OTHER": 1}},
        "latency_ms": latency_ms(recent),
        "bank": {"rows_used": 3, "rows": 63, "evictions": 0, "load_failures": 0},
        "adapters": [adapter | {"images": images}],
    } | changes


def test_status_is_that_of_all():
    found = merged_status(
        [status(5, [1.0, 3.0], "on disk"), status(7, [2.0], "ready", ready=False)]
    )
    assert (found["model"], found["ready"], found["replicas"]) == ("tiny", True, 2)
    assert (found["images"], found["batches"], found["uptime_seconds"]) == (12, 4, 7.0)
    assert found["requests"] == {"answered": 12, "failed": {"OTHER": 2}}
    assert found["bank"]["rows"] == 126
    assert found["latency_ms"] == latency_ms([1.0, 3.0, 2.0])
    (adapter,) = found["adapters"]
    assert (adapter["state"], adapter["images"], adapter["row"]) == ("ready", 12, None)
    assert merged_status([status(1, [], "ready", bank=None)] * 2)["bank"] is None


EXPOSITION = """\
# HELP nv_inference_count Images that were classified
# TYPE nv_inference_count untyped
nv_inference_count{{model="tiny"}} {images}
# HELP hhdeploy_adapter_images_total Images that were classified, by adapter
# TYPE hhdeploy_adapter_images_total counter
hhdeploy_adapter_images_total{{adapter="alpha"}} {images}
# HELP hhdeploy_adapter_load_seconds Loading
# TYPE hhdeploy_adapter_load_seconds histogram
hhdeploy_adapter_load_seconds_bucket{{le="0.01"}} 1.0
hhdeploy_adapter_load_seconds_bucket{{le="+Inf"}} 2.0
hhdeploy_adapter_load_seconds_count 2.0
hhdeploy_adapter_load_seconds_sum 0.5
"""


def test_metrics_keep_each_replica_apart():
    texts = {f"r{images}": EXPOSITION.format(images=f"{images}.0") for images in (3, 4)}
    merged = merged_metrics({name: text.encode() for name, text in texts.items()}).decode()
    lines = merged.splitlines()
    for line in EXPOSITION.splitlines():
        if line.startswith("#"):
            assert lines.count(line) == 1
    assert 'nv_inference_count{model="tiny",replica="r3"} 3.0' in lines
    assert 'hhdeploy_adapter_images_total{adapter="alpha",replica="r4"} 4.0' in lines
    assert 'hhdeploy_adapter_load_seconds_bucket{le="0.01",replica="r4"} 1.0' in lines
    assert 'hhdeploy_adapter_load_seconds_sum{replica="r3"} 0.5' in lines


def test_what_was_refused_is_told_wherever_requests_come_in(monkeypatch):
    """By two ingresses and gRPC's side: each has its own numbers, and tells those of all."""
    monkeypatch.setattr(ray_endpoint, "_TELL_SECONDS", 0.0)

    async def run() -> None:
        cluster = Cluster(monkeypatch, "first", "second")
        registry = cluster.registry
        calls = SimpleNamespace(refused=SimpleNamespace(remote=registry.refused))
        settings, replicas = ServeSettings(Path("tiny")), SimpleNamespace(broadcast=no_replica)
        names = {"first": "ingress", "second": "ingress", None: "grpc"}
        one, other, grpc = (
            RayEndpoint(settings, replicas, calls, name, actor) for actor, name in names.items()
        )
        monkeypatch.setattr(ray_endpoint, "answered", lambda answers: [])
        for _ in range(3):
            grpc.refused(errors.TooLargeError("too large"))
        other.refused(errors.NotFoundError("not found"))
        while len(registry._refusals) < 2:
            await asyncio.sleep(0.001)
        one.refused(errors.NotFoundError("not found"))
        for _ in range(2):
            told = (await one.metrics())[0].decode()
            pattern = r'^hhdeploy_refused_requests_total{reason="(.*)",replica="(.*)-.*"} (.*)$'
            assert sorted(re.findall(pattern, told, re.MULTILINE)) == [
                ("not_found", "ingress", "1.0"),
                ("not_found", "ingress", "1.0"),
                ("too_large", "grpc", "3.0"),
            ]
        cluster.alive.remove("second")  # it died, and takes its numbers with it
        told = (await one.metrics())[0].decode()
        assert sorted(kind for kind, *_ in re.findall(pattern, told, re.MULTILINE)) == [
            "not_found", "too_large",
        ]  # fmt: skip
        assert len(registry._refusals) == 2
        calls.refused = Handle(errors.FailedError("it is gone"))
        alone = (await one.metrics())[0].decode()
        assert re.findall(pattern, alone, re.MULTILINE) == [("not_found", "ingress", "1.0")]

    asyncio.run(run())


def no_replica(method: str) -> Any:
    raise DeploymentUnavailableError("Replica")


# --- the registry -------------------------------------------------------------------------------


LOADED = {"name": "alpha", "verified": False, "notes": ["assumed"]}


SERVED = Served("/tasks", "a", "max_batch=1")


class Cluster:
    """A registry, the replicas that ask it, and what Ray would say of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *alive: str) -> None:
        self.alive = set(alive)
        self.seen: dict[str, list[Latest]] = {}
        self.first = SimpleNamespace(load_adapter=Handle(LOADED), unload_adapter=Handle(None))
        self.asking: set[asyncio.Task[None]] = set()
        monkeypatch.setattr(ray_registry, "_actors", lambda *_: set(self.alive))
        monkeypatch.setattr(ray_registry.serve, "get_deployment_handle", lambda _: self.first)
        monkeypatch.setattr(ray_registry, "_LOOK_SECONDS", 0.01)
        self.registry = Registry()

    async def join(self, member: str, *known: Latest) -> None:
        self.seen[member] = await self.registry.join(member, known, SERVED)

    def ask(self, member: str, problem: str = "") -> None:
        """Do every change from now on, as a `Follower` does; ``problem``: it cannot."""

        async def follow() -> None:
            done = max((c.revision for c in self.seen[member]), default=0)
            problems: dict[int, str] = {}
            while True:
                changes = await self.registry.following(member, done, problems)
                self.seen[member] += changes
                problems = {c.revision: problem for c in changes if problem}
                done = max((c.revision for c in changes), default=done)

        self.asking.add(asyncio.create_task(follow()))

    def change(self, name: str, *, unloaded: bool) -> asyncio.Task[Any]:
        return asyncio.create_task(self.registry.change(name, None, unloaded))

    async def done(self, changing: asyncio.Task[Any]) -> None:
        """It must end; then nobody asks any more."""
        try:
            await asyncio.wait_for(changing, PATIENCE_SECONDS)
        finally:
            for task in self.asking:
                task.cancel()
            await asyncio.gather(*self.asking, return_exceptions=True)


async def waits(task: asyncio.Task[Any]) -> bool:
    """Whether it still waits after everybody had a chance to run."""
    done, _ = await asyncio.wait({task}, timeout=0.1)
    return not done


def test_a_change_is_done_once_every_replica_has_done_it(monkeypatch):
    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1", "r2")
        await cluster.join("r1")
        await cluster.join("r2")
        changing = cluster.change("alpha", unloaded=True)
        cluster.ask("r1")
        assert await waits(changing)
        cluster.ask("r2")
        await cluster.done(changing)
        change = Latest(1, "alpha", unloaded=True)
        assert cluster.first.unload_adapter.calls == [("alpha",)]
        assert cluster.seen == {"r1": [change], "r2": [change]}
        await cluster.join("late")
        assert cluster.seen["late"] == [change]

    asyncio.run(run())


def test_a_replica_that_is_starting_is_waited_for_once_it_has_joined(monkeypatch):
    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1")
        await cluster.join("r1")
        cluster.ask("r1")
        cluster.alive |= {"starting", "joined"}
        await cluster.join("joined")
        changing = cluster.change("alpha", unloaded=False)
        assert await waits(changing)
        cluster.ask("joined")
        await cluster.done(changing)

    asyncio.run(run())


def test_a_replica_that_is_gone_is_not_waited_for(monkeypatch):
    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1", "r2")
        await cluster.join("r1")
        await cluster.join("r2")
        cluster.ask("r1")
        changing = cluster.change("alpha", unloaded=False)
        assert await waits(changing)
        cluster.alive = {"r1"}
        await cluster.done(changing)
        assert changing.result() == LOADED  # as the first one said it

    asyncio.run(run())


def test_what_some_replicas_cannot_do_is_said(monkeypatch):
    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1", "r2")
        await cluster.join("r1")
        await cluster.join("r2")
        cluster.ask("r1")
        cluster.ask("r2", "no such folder")
        with pytest.raises(errors.FailedError, match=r"1 of 2 replicas .* r2: no such folder"):
            await cluster.done(cluster.change("alpha", unloaded=False))

    asyncio.run(run())


def test_what_the_first_replica_refuses_changes_nothing(monkeypatch):
    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1")
        cluster.first.load_adapter = Handle(wrapped(AdapterError("no tensors")))
        await cluster.join("r1")
        with pytest.raises(AdapterError, match="no tensors"):
            await cluster.done(cluster.change("alpha", unloaded=False))
        await cluster.join("r2")
        assert cluster.seen["r2"] == []

    asyncio.run(run())


def test_a_new_registry_waits_for_those_that_were_there_and_learns_from_them(monkeypatch):
    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1", "r2", "r3")
        alpha, beta = Latest(4, "alpha", unloaded=True), Latest(6, "beta", unloaded=False)
        await cluster.join("r1", alpha)
        changing = cluster.change("gamma", unloaded=True)
        # One that has not seen that it is another registry: it would pass for done.
        assert await cluster.registry.following("r2", 6, {}) is None
        await cluster.join("r2", alpha, beta)
        assert await waits(changing)
        assert not cluster.first.unload_adapter.calls  # nothing happens before all are there
        cluster.alive = {"r1", "r2"}
        cluster.ask("r1")
        cluster.ask("r2")
        await cluster.done(changing)
        gamma = Latest(7, "gamma", unloaded=True)
        assert cluster.seen["r1"] == [alpha, beta, gamma]
        assert cluster.seen["r2"] == [alpha, beta, gamma]

    asyncio.run(run())


def test_a_replica_that_opened_another_bundle_than_the_others_is_refused(monkeypatch):
    """It answered, and so a request got either, by chance."""

    async def run() -> None:
        cluster = Cluster(monkeypatch, "r1", "r2", "r3")
        join = cluster.registry.join
        await cluster.join("r1")
        await cluster.join("r2")
        with pytest.raises(BundleError, match=r"/tasks has other .* than 2 replicas opened there"):
            await join("r3", [], replace(SERVED, digest="b"))
        await cluster.join("r3")
        # Ray Serve goes from one deployment to the next.
        await join("r4", [], Served("/tasks", "b", "max_batch=2"))
        cluster.alive = {"r5"}  # nobody has the old one any more
        await join("r5", [], replace(SERVED, digest="b"))

    asyncio.run(run())


def test_what_a_replica_serves_changes_with_its_adapters_alone(small, tmp_path):
    def served(path: Path, **more: Any) -> Served:
        settings = read_settings({"bundle": str(path), **more})
        with open_session(path, device="cpu", threads=1) as session:
            return served_by(session, settings)

    bundle = copy_bundle(small, tmp_path / "bundle")
    first = served(bundle, pinned=["alpha", "gamma"])
    assert first == served(bundle, pinned=["gamma", "alpha"])
    assert served(bundle).settings != first.settings
    remove_adapter(bundle, "alpha")
    later = served(bundle, pinned=["alpha", "gamma"])
    assert (later.bundle, later.settings) == (first.bundle, first.settings)
    assert later.digest != first.digest


# --- the rest -----------------------------------------------------------------------------------


def test_arguments_are_checked(tmp_path):
    settings = read_settings({"bundle": str(tmp_path), "pinned": ["a"], "threads": 2})
    assert settings.model_name == tmp_path.name
    assert (settings.bundle, settings.pinned, settings.replicas) == (tmp_path, {"a"}, 2)
    with pytest.raises(ValidationError, match="max_bach"):
        read_settings({"bundle": tmp_path, "max_bach": 3})
    with pytest.raises(ValidationError, match="threads"):
        read_settings({"bundle": tmp_path, "threads": "many"})
    for wrong, said in (
        ({"replicas": 0}, "`replicas`: expected 1 or more, found 0"),
        ({"replicas": 10**30}, "`replicas`: expected 4096 or less"),
        ({"ingresses": 4097}, "`ingresses`: expected 4096 or less"),
        ({"gpus": -1}, "`gpus`: expected 0 or more, found -1"),
        ({"gpus": float("nan")}, "`gpus`: expected a number, found nan"),
        ({"gpus": float("inf")}, "`gpus`: expected a number, found inf"),
        ({"adapter_bytes": -1}, "`adapter_bytes`: expected 1024 or more"),
        ({"replicas": True}, "`replicas`: expected a number, found true"),
        ({"max_wait_ms": False}, "`max_wait_ms`: expected a number, found false"),
        ({"threads": True}, "`threads`: expected a number, found true"),
        ({"bundle": ""}, "`bundle`: expected a path, found ''"),
        ({"cache_dir": " "}, "`cache_dir`: expected a path, found ' '"),
    ):
        with pytest.raises(PlanError, match=said):
            read_settings({"bundle": tmp_path, **wrong})
    with pytest.raises(PlanError, match="`token_file`"):
        read_settings({"bundle": tmp_path, "allow_adapter_loading": True})


def test_a_certificate_that_ray_s_proxies_would_not_hear_of_is_refused(tmp_path):
    """`serve deploy` would take requests, and tokens, in plain text."""
    cert, key = make_certificate(tmp_path)
    args = {"bundle": str(tmp_path), "tls_cert": str(cert), "tls_key": str(key)}
    with pytest.raises(PlanError, match="ssl_certfile and ssl_keyfile of http_options"):
        ray_app.application(args)
    ray_app.application_of(read_settings(args))  # the command's, which tells them


def test_what_is_no_bundle_is_refused_before_any_replica_stops(tmp_path):
    """Ray Serve would have stopped the only replica of what ran before, and its requests waited."""
    with pytest.raises(BundleError, match="is not a bundle"):
        ray_app.application({"bundle": str(tmp_path)})


def test_a_request_that_replicas_refuse_leaves_nothing():
    class Refusing(Handle):
        def remote(self, *arguments: Any) -> Handle:
            return self

        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            raise wrapped(errors.BusyError("full"))

    handle = Refusing()
    app = http_app(RayEndpoint(ServeSettings(Path("tiny")), handle, handle), Access())
    tensor = {"name": "images", "datatype": "FP32", "shape": [1], "data": [0.5]}
    body = json.dumps({"inputs": [tensor], "parameters": {"note": "x" * SIZE}}).encode()

    async def once() -> None:
        draining = Draining(app)
        assert await post(draining, "/v2/models/alpha/infer", bytes(bytearray(body))) == 429

    async def scene() -> int:
        async with app.router.lifespan_context(app):
            return await growth(once)

    assert asyncio.run(scene()) < SIZE


def test_a_replica_whose_session_only_fails_is_replaced():
    async def run() -> None:
        metrics = Metrics("tiny")
        following = asyncio.get_running_loop().create_future()
        replica: Any = SimpleNamespace(
            _service=SimpleNamespace(metrics=metrics), _judged=(0, 0), _following=following
        )
        await Replica.check_health(replica)
        metrics.failed("BACKEND")
        with pytest.raises(errors.FailedError, match="every request"):
            await Replica.check_health(replica)
        await Replica.check_health(replica)  # nothing was asked meanwhile
        metrics.failed("BACKEND")
        metrics.success += 1
        await Replica.check_health(replica)
        metrics.failed("OTHER")
        await Replica.check_health(replica)
        following.set_exception(KeyError("a bug"))
        with pytest.raises(errors.FailedError, match="no longer followed"):
            await Replica.check_health(replica)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--replicas", "3"), "--replicas goes with --ray"),
        (("--ray", "--allow-adapter-loading"), "--token-file"),
    ],
)
def test_options_that_do_not_go_together_are_said_before_anything_starts(
    tmp_path, monkeypatch, options, problem
):
    monkeypatch.setattr("hhdeploy.runtime.serving.logs.log_as_json", lambda level: None)
    monkeypatch.setattr(ray_run.ray, "init", lambda *_, **__: pytest.fail("it starts"))
    done = CliRunner().invoke(main, ["serve", str(tmp_path), *options])
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    assert problem in done.stderr
