"""The server on several replicas of a real local Ray cluster, and a look at each of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import sys
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

from hhdeploy.runtime.serving.messages import FP32, IMAGES, InferRequest, Tensor
from hhdeploy.runtime.serving.outputs import LOGITS
from hhdeploy.runtime.serving.ray.run import APP
from tests.docs.pages import words_of
from tests.runtime.serving.servers import Server, running_server
from tests.workshop import ROOT

T = TypeVar("T")
PATIENCE_SECONDS = 90
# What Ray says of a node that did not start in time, and how often it is tried.
GIVES_UP, TRIES = "The current node timed out during startup", 3
TOKEN = "0123456789abcdef-of-the-tests"
# The command with what it has no option for: a second process that takes requests. It and the
# cluster's own processes import jsonschema, which then takes no seconds.
LATER = ROOT / "tests" / "later"
TWO_INGRESSES = f"""
import os, sys
sys.path.insert(0, {str(LATER)!r})
os.environ["PYTHONPATH"] += os.pathsep + {str(LATER)!r}
from dataclasses import replace
from hhdeploy.cli import main
from hhdeploy.runtime.serving.ray import run

run_on_ray = run.run_on_ray
run.run_on_ray = lambda settings, **rest: run_on_ray(replace(settings, ingresses=2), **rest)
main()
"""


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
            left = set(psutil.Process().children(recursive=True)) - before
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, PATIENCE_SECONDS)
            gc.collect()
    pytest.skip(f"Ray's node gave up {TRIES} times: it has 30 s to start, and this machine is busy")


@dataclass(frozen=True)
class Fleet:
    """``hhdeploy serve --ray`` with a cluster of its own, which this process looks into.

    Attributes:
        server: the command.
        directory: the fleet directory.
        address: of the cluster.
    """

    server: Server
    directory: Path
    address: str

    def look_in(self) -> None:
        """This process joins the cluster: what looks at replicas needs that."""
        ray.init(self.address, log_to_driver=False, logging_level="error")

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
        self.processes_of(deployment)[0].kill()

    def wait_for_another(self, before: set[str], count: int) -> None:
        """Until there are ``count`` replicas again, one of them new."""
        wait_until(lambda: len(names := self.names()) == count and bool(names - before))

    def processes_of(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas."""
        title = f"ray::ServeReplica:{APP}:{deployment}"
        found = []
        for process in children_of(self.server):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
        assert found, title
        return found


def children_of(server: Server) -> list[psutil.Process]:
    """Processes that a server started, and they in turn."""
    return psutil.Process(server.process.pid).children(recursive=True)


@contextlib.contextmanager
def running_fleet(bundle: Path, root: Path) -> Iterator[Fleet]:
    """The command on a cluster of its own: two replicas behind two ingresses.

    A test may stop it; nothing of it is left at the end.
    """
    directory, token = root / "fleet", root / "token"
    directory.mkdir()
    token.write_text(TOKEN)
    _, _, *options = words_of("docs/howto/ray.md", "hhdeploy serve tasks", fleet=directory)
    assert options[:3] == words_of("docs/serving.md", "hhdeploy serve OUT --ray")[2:]
    options += ["--model-name", "tiny", "--allow-adapter-loading", "--token-file", str(token)]
    # A replica that takes a killed one's place may start slowly on a busy machine.
    options += ["--log-level", "warning", "--request-seconds", "300"]
    program = [sys.executable, "-c", TWO_INGRESSES]
    with contextlib.ExitStack() as ended:
        server = started(
            lambda: ended.enter_context(
                running_server(bundle, root / "log", *options, program=program)
            )
        )
        fleet = Fleet(server, directory, address_of(children_of(server)))
        fleet.look_in()
        yield fleet
        ray.shutdown()
        there = children_of(server) if server.process.poll() is None else []
    _, left = psutil.wait_procs(there, PATIENCE_SECONDS)
    assert not left


def address_of(processes: list[psutil.Process]) -> str:
    """Of the cluster, as its node was told."""
    (raylet,) = [each for each in processes if each.name() == "raylet"]
    (address,) = [word for word in raylet.cmdline() if word.startswith("--gcs-address=")]
    return address.partition("=")[2]


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
