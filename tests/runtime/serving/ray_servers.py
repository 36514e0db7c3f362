"""The server on several replicas of a real local Ray cluster, and a look at each of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from hhdeploy.runtime.serving.messages import FP32, IMAGES, InferRequest, Tensor
from hhdeploy.runtime.serving.outputs import LOGITS
from hhdeploy.runtime.serving.ray.app import application
from hhdeploy.runtime.serving.ray.run import APP, free_port
from tests.runtime.serving.servers import Server

T = TypeVar("T")
PATIENCE_SECONDS = 90
# What Ray says of a node that did not start in time, and how often it is tried.
GIVES_UP, TRIES = "The current node timed out during startup", 3
TOKEN = "0123456789abcdef-of-the-tests"


def started(start: Callable[[], T]) -> T:
    """What ``start`` returns, for which a node of Ray starts.

    The node gives its own agents 15 s, and itself 30 s, whatever it is told: on a machine that is
    busy with other work it ends. It is started again, and where that does not help the test is
    skipped.
    """
    before = set(psutil.Process().children(recursive=True))
    with warnings.catch_warnings():
        # Of the node's own processes, which Ray does not wait for when it gives up.
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(TRIES):
            try:
                return start()
            except Exception as error:
                if GIVES_UP not in str(error):
                    raise
            ray.shutdown()
            left = set(psutil.Process().children(recursive=True)) - before
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, PATIENCE_SECONDS)
            gc.collect()
    pytest.skip(f"Ray's node gave up {TRIES} times: it has 30 s to start, and this machine is busy")


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """A Ray cluster of this process: its address. Nothing of it is left at the end."""
    before = set(psutil.Process().children(recursive=True))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    options |= {"num_cpus": 2, "object_store_memory": 100 << 20, "logging_level": "error"}
    started(lambda: ray.init("local", **options))
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        mine = set(psutil.Process().children(recursive=True)) - before
        serve.shutdown()
        ray.shutdown()
        _, left = psutil.wait_procs(mine, PATIENCE_SECONDS)
        assert not left


@dataclass(frozen=True)
class Fleet:
    """An application that runs, seen from behind.

    Attributes:
        server: its HTTP side; it has no process of its own.
        directory: the fleet directory.
    """

    server: Server
    directory: Path

    def each(self, method: str, *arguments: object, deployment: str = "Replica") -> list[Any]:
        """What each replica answers; an exception where it raised one."""
        handle = serve.get_deployment_handle(deployment, APP)
        call = handle.broadcast(method, *arguments)
        return call.results(timeout_s=PATIENCE_SECONDS, return_exceptions=True)

    def logits_of_each(self, images: np.ndarray, adapter: str) -> list[Any]:
        tensors = {IMAGES: Tensor(IMAGES, FP32, images)}
        request = InferRequest(adapter, "", "", tensors)
        found = self.each("infer", request)
        return [
            answer if isinstance(answer, Exception) else answer.outputs[0].array for answer in found
        ]

    def post(self, path: str, body: dict[str, Any], token: str = TOKEN) -> tuple[int, Any]:
        return self.server.json("POST", path, body, authorization=f"Bearer {token}")

    def load(self, name: str, upload: Path | None = None) -> tuple[int, Any]:
        """Load an adapter over HTTP; ``upload``: the directory whose two files are sent."""
        parameters = {}
        if upload is not None:
            tensors = (upload / "adapter_model.safetensors").read_bytes()
            parameters = {
                "config": (upload / "adapter_config.json").read_text(),
                "file:adapter_model.safetensors": base64.b64encode(tensors).decode(),
            }
        return self.post(f"/v2/repository/models/{name}/load", {"parameters": parameters})

    def unload(self, name: str) -> tuple[int, Any]:
        return self.post(f"/v2/repository/models/{name}/unload", {})

    def infer(self, images: np.ndarray, adapter: str) -> np.ndarray:
        """Logits over HTTP; it must answer."""
        status, answer = self.server.json("POST", f"/v2/models/{adapter}/infer", body_of(images))
        assert status == 200, answer
        return logits_in(answer)

    def names(self) -> set[str]:
        """Of the replicas that answer; a restarted one has another name."""
        return {a[0] for a in self.each("named_metrics") if not isinstance(a, Exception)}

    def chosen(self, adapter: str, times: int) -> set[str]:
        """The replicas that Ray Serve's router would send requests for an adapter to."""
        handle = serve.get_deployment_handle("Replica", APP).options(
            method_name="infer", multiplexed_model_id=adapter
        )

        async def choose() -> set[str]:
            found = set()
            for _ in range(times):
                async with handle.choose_replica(None) as selection:
                    found.add(selection.replica_id)
            return found

        return asyncio.run(choose())

    def kill_one(self, deployment: str) -> None:
        """SIGKILL to one replica of a deployment."""
        processes_of(deployment)[0].kill()

    def wait_for_another(self, before: set[str], count: int) -> None:
        """Until there are ``count`` replicas again, one of them new."""
        wait_until(lambda: len(names := self.names()) == count and bool(names - before))


def processes_of(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas, of this test's cluster."""
    title = f"ray::ServeReplica:{APP}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                found.append(process)
    assert found, title
    return found


@contextlib.contextmanager
def running_fleet(bundle: Path, root: Path, **options: Any) -> Iterator[Fleet]:
    """The application on this process' cluster, two replicas unless told."""
    directory, token = root / "fleet", root / "token"
    directory.mkdir()
    token.write_text(TOKEN)
    args = {
        "bundle": bundle,
        "device": "cpu",
        "threads": 1,
        "model_name": "tiny",
        "adapters_dir": directory,
        "allow_adapter_loading": True,
        "token_file": token,
        "log_level": "warning",
        # A replica that takes a killed one's place may start slowly on a busy machine.
        "request_seconds": 300,
        **options,
    }
    port = free_port("127.0.0.1", 0)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host="127.0.0.1", port=port),
    )
    serve.run(application(args), name=APP)
    yield Fleet(Server(None, f"127.0.0.1:{port}", "", root / "log"), directory)


def wait_until(there: Callable[[], bool]) -> None:
    """Poll; it must come true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def body_of(images: np.ndarray) -> dict[str, Any]:
    """A request in JSON."""
    return {
        "inputs": [
            {
                "name": IMAGES,
                "datatype": FP32,
                "shape": list(images.shape),
                "data": images.reshape(-1).tolist(),
            }
        ]
    }


def logits_in(answer: dict[str, Any]) -> np.ndarray:
    """The logits of an answer in JSON, float32 [n, classes]."""
    (output,) = (o for o in answer["outputs"] if o["name"] == LOGITS)
    return np.asarray(output["data"], np.float32).reshape(output["shape"])
