"""The same question over HTTP: ``python -m benchmarks.peers.servers [--seconds 60] [--only NAME]``.

hhdeploy serve, Ray Serve with multiplexed merged models, and LitServe with a merged model a task
(ONNX Runtime float32 in all three) answer 8 clients, each of which asks for another of 8 adapters,
one float32 image a request. One server after the other, ours again at the end as a control; every
answer is checked. Ray and LitServe come with the extra ``peers``. Memory is that of the server's
whole tree of processes. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import THREADS, machine
from benchmarks.peers.tasks import BATCH, CLASSES, Array, Case, range_error, task

ROOT = Path(__file__).resolve().parents[2]
START = 180.0  # seconds until a server has to answer
SERVERS = ("hhdeploy serve", "Ray Serve, multiplexed", "LitServe, a model a task")
AGAIN = "hhdeploy serve again"


def serve_ray(case: Case, port: int) -> None:
    """Run Ray Serve until killed: a replica that keeps 8 models, chosen by the header."""
    import ray
    from ray import serve
    from starlette.requests import Request

    from benchmarks.peers.runtimes import merged_graph, ort_session

    @serve.deployment(max_ongoing_requests=64)
    class Merged:
        @serve.multiplexed(max_num_models_per_replica=BATCH)
        async def model(self, name: str) -> Any:
            return ort_session(merged_graph(case, name))

        async def __call__(self, request: Request) -> list[float]:
            session = await self.model(serve.get_multiplexed_model_id())
            images = np.frombuffer(await request.body(), np.float32).reshape(1, 3, 224, 224)
            (found,) = await asyncio.to_thread(session.run, None, {"images": images})
            return found[0].tolist()  # type: ignore[no-any-return]

    ray.init(num_cpus=THREADS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Merged.bind())
    time.sleep(3600)


def serve_lit(case: Case, port: int) -> None:
    """Run LitServe until killed: all models in one worker, the image as base64 in JSON."""
    import base64

    import litserve

    from benchmarks.peers.runtimes import merged_graph, ort_session

    class Merged(litserve.LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:
            names = [task(i) for i in range(BATCH)]
            self.models = {name: ort_session(merged_graph(case, name)) for name in names}

        def decode_request(self, request: dict[str, str]) -> tuple[str, Array]:
            pixels = np.frombuffer(base64.b64decode(request["image"]), np.float32)
            return request["adapter"], pixels.reshape(1, 3, 224, 224)

        def predict(self, asked: tuple[str, Array]) -> list[float]:
            name, images = asked
            (found,) = self.models[name].run(None, {"images": images})
            return found[0].tolist()  # type: ignore[no-any-return]

        def encode_response(self, output: list[float]) -> list[float]:
            return output

    server = litserve.LitServer(Merged(), accelerator="cpu", timeout=False)
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="warning")


def _ours(case: Case) -> Path:
    """The bundle with 8 adapters in it."""
    from hhdeploy.bundle.membership import add_adapter

    path = case.folder / "served"
    if not path.is_dir():
        scratch = case.folder / "served-scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(case.bundle, scratch)
        for index in range(1, BATCH):
            add_adapter(scratch, task(index), case.imported(task(index)))
        scratch.rename(path)
    return path


def _command(name: str, case: Case, port: int) -> list[str]:
    if name in (SERVERS[0], AGAIN):
        code = "from hhdeploy.cli import main; main()"
        options = ["--device", "cpu", "--threads", str(THREADS), "--http-port", str(port)]
        served = ["serve", str(_ours(case)), "--model-name", "served", "--grpc-port", "-1"]
        return [sys.executable, "-c", code, *served, *options]
    function = "serve_ray" if name == SERVERS[1] else "serve_lit"
    code = (
        f"from benchmarks.peers import servers; from benchmarks.peers.tasks import Case; "
        f"servers.{function}(Case({case.title!r}), {port})"
    )
    return [sys.executable, "-W", "ignore", "-c", code]


def _request(name: str, image: Array, adapter: str) -> bytes:
    """A whole HTTP request."""
    import base64

    pixels = image.tobytes()
    if name == SERVERS[1]:
        return _http("/", [f"serve_multiplexed_model_id: {adapter}"], pixels)
    if name == SERVERS[2]:
        content = {"adapter": adapter, "image": base64.b64encode(pixels).decode()}
        return _http("/predict", ["content-type: application/json"], json.dumps(content).encode())
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *image.shape]}
    asked = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(pixels)}}],
        "outputs": [{"name": "logits"}],
        "parameters": {"adapter": adapter},
    }
    head = json.dumps(asked).encode()
    fields = [f"inference-header-content-length: {len(head)}"]
    return _http("/v2/models/served/infer", fields, head + pixels)


def _http(path: str, fields: list[str], body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", *fields, f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _ask(port: int, request: bytes) -> bytes:
    """The body of an answer, on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if b" 200 " not in head.partition(b"\r\n")[0] or length is None:
            raise RuntimeError(f"expected an answer with its length, found {head[:200]!r}")
        return await reader.readexactly(int(length[1]))
    finally:
        writer.close()


def _logits(body: bytes) -> Array:
    content = json.loads(body)
    values = content["outputs"][0]["data"] if isinstance(content, dict) else content
    return np.asarray(values, np.float32)[:CLASSES]


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server and all that it starts, ended with it."""
    import psutil

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        tree = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        for one in psutil.wait_procs(tree, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def _wait(process: subprocess.Popen[bytes], port: int, request: bytes) -> None:
    until = time.perf_counter() + START
    while time.perf_counter() < until:
        if process.poll() is not None:
            assert process.stderr is not None
            said = process.stderr.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"it ended: {said[-1][:160] if said else process.returncode}")
        try:
            await _ask(port, request)
            return
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.5)
    raise RuntimeError(f"no answer within {START:.0f} s")


async def _load(
    port: int, requests: list[bytes], seconds: float
) -> tuple[list[float], list[bytes], float]:
    """A client for each request, asking again and again: seconds, last answers, all in all."""
    times: list[float] = []
    begin = time.perf_counter()

    async def client(request: bytes) -> bytes:
        body = b""
        while not body or time.perf_counter() < begin + seconds:
            start = time.perf_counter()
            body = await _ask(port, request)
            times.append(time.perf_counter() - start)
        return body

    bodies = await asyncio.gather(*map(client, requests))
    return times, bodies, time.perf_counter() - begin


def measure(name: str, case: Case, seconds: float) -> dict[str, Any]:
    """A record of one server, or why there is none."""
    import psutil

    images, port = case.images(), _free_port()
    requests = [_request(name, images[i], task(i)) for i in range(BATCH)]
    try:
        with _running(_command(name, case, port)) as process:
            asyncio.run(_wait(process, port, requests[0]))
            asyncio.run(_load(port, requests, 0.1 * seconds))
            times, bodies, wall = asyncio.run(_load(port, requests, seconds))
            tree = [psutil.Process(process.pid)]
            tree += tree[0].children(recursive=True)
            memory = sum(one.memory_info().rss for one in tree)
    except Exception as error:  # noqa: BLE001  (a peer's failure is a result)
        return {"server": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    error = range_error(case.truth(range(BATCH)), np.stack([_logits(body) for body in bodies]))
    return {
        "server": name,
        "images_per_s": round(len(times) / wall, 2),
        "p50_ms": round(1e3 * statistics.median(times), 1),
        "p99_ms": round(1e3 * float(np.quantile(times, 0.99)), 1),
        "requests": len(times),
        "rss_mb": round(memory / 2**20),
        "error": float(f"{error:.2g}"),
        "right": error <= 1e-4,
    }


@click.command(help=__doc__)
@click.option("--seconds", default=60.0, show_default=True, help="Of load, a server.")
@click.option("--only", multiple=True, type=click.Choice([*SERVERS, AGAIN]))
def main(seconds: float, only: tuple[str, ...]) -> None:
    """Measure one server after the other."""
    from benchmarks.peers.prepare import prepare

    case = Case("ViT-S/16")
    prepare(case, BATCH)
    records = []
    for name in only or (*SERVERS, AGAIN):
        records.append(measure(name, case, seconds))
        print(records[-1], flush=True)
    print(json.dumps({"benchmark": "peers over HTTP", "machine": machine(), "records": records}))


if __name__ == "__main__":
    main()
