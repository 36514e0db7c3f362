"""A server each in turn: 8 clients, each of which asks for another adapter, one image a request.

Ours has side branches and one set of weights; the others have a merged model of ONNX Runtime a
task, as their own documentation shows it. Each gets an image as is easiest for it; the answers are
logits, compared with the same truth as those of the race without servers.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.harness import THREADS
from benchmarks.peers.rounds import room_for
from benchmarks.peers.tasks import BATCH, BOUNDS, CLASSES, Array, Case, mixes, range_error, task
from hhdeploy.cli.bench_serve import server_command
from hhdeploy.errors import HhdeployError
from hhdeploy.loadtest.process import Server, running_server

OURS, AGAIN = "hhdeploy serve, OpenVINO", "hhdeploy serve, OpenVINO again"
# Requests that each client sends in a server's turn.
A_TURN = 4
# Until a server answers: models are merged and opened meanwhile.
_START_SECONDS = 180.0
_KEEP_ALIVE_SECONDS = 2.0


@dataclass(frozen=True)
class Request:
    """What is sent: below the server's address, and the body with its headers."""

    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Contender:
    """A server that competes.

    Attributes:
        command: of its process, which prints its address; from a case, a number of adapters and a
            folder of its own.
        request: of an adapter and an image [3, H, W].
        read: logits of an answer's body.
        a_model_a_task: whether memory bounds how many adapters it can have.
    """

    command: Callable[[Case, int, Path], list[str]]
    request: Callable[[str, Array], Request]
    read: Callable[[bytes], Array]
    a_model_a_task: bool = True


def _our_command(device: str) -> Callable[[Case, int, Path], list[str]]:
    def command(case: Case, bank: int, folder: Path) -> list[str]:
        for name in map(task, range(1, bank)):  # task0 is in the bundle
            shutil.copytree(case.imported(name), folder / name)
        return server_command(
            case.bundle, device=device, threads=THREADS, adapters_dir=folder, slots=bank + 1
        )

    return command


def _our_request(name: str, image: Array) -> Request:
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *image.shape]}
    head = json.dumps(
        {
            "parameters": {"binary_data_output": True},
            "outputs": [{"name": "logits"}],
            "inputs": [{**tensor, "parameters": {"binary_data_size": image.nbytes}}],
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Request(f"/v2/models/{name}/infer", head + image.tobytes(), headers)


def _our_logits(body: bytes) -> Array:
    return np.frombuffer(body[-4 * CLASSES :], "<f4")


def _served(what: str) -> Callable[[Case, int, Path], list[str]]:
    def command(case: Case, bank: int, folder: Path) -> list[str]:
        module = f"benchmarks.peers.served_by_{what}"
        return [sys.executable, "-W", "ignore", "-m", module, case.title, str(bank)]

    return command


def _lit_request(name: str, image: Array) -> Request:
    content = {"task": name, "image": base64.b64encode(image.tobytes()).decode()}
    return Request("/predict", json.dumps(content).encode(), {"Content-Type": "application/json"})


def _ray_request(name: str, image: Array) -> Request:
    return Request("/", image.tobytes(), {"serve_multiplexed_model_id": name})


def _plain_logits(body: bytes) -> Array:
    return np.asarray(json.loads(body), np.float32)


CONTENDERS: Mapping[str, Contender] = {
    OURS: Contender(_our_command("openvino"), _our_request, _our_logits, False),
    AGAIN: Contender(_our_command("openvino"), _our_request, _our_logits, False),
    "hhdeploy serve, ONNX Runtime": Contender(
        _our_command("cpu"), _our_request, _our_logits, False
    ),
    "LitServe, merged models": Contender(_served("litserve"), _lit_request, _plain_logits),
    "Ray Serve, multiplexed merged models": Contender(_served("ray"), _ray_request, _plain_logits),
}


@dataclass
class _Racer:
    """A contender whose server runs, or why it does not."""

    name: str
    server: Server | None = None
    failed: str = ""
    error: float = 0.0
    turns: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def record(self, case: Case, bank: int) -> dict[str, Any]:
        record: dict[str, Any] = {"model": case.title, "bank": bank, "peer": self.name}
        if self.server is None or not self.turns:
            return {**record, "failed": self.failed or "no time left"}
        memory = self.server.resident_bytes()
        return {
            **record,
            "images_per_s": round(BATCH * A_TURN / statistics.median(self.turns), 2),
            "p50_ms": round(1e3 * statistics.median(self.latencies), 1),
            "p99_ms": round(1e3 * float(np.quantile(self.latencies, 0.99)), 1),
            "turns": len(self.turns),
            "rss_mb": None if memory is None else round(memory / 2**20),
            "error": float(f"{self.error:.2g}"),
            "right": self.error <= BOUNDS["float32"],
        }


def race_servers(case: Case, bank: int, seconds: float) -> list[dict[str, Any]]:
    """Start all, check every answer once, let them answer in turn for so many seconds.

    Returns:
        A record a contender; one that does not start, or answers wrongly once, has a reason.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        racers = [_start(case, bank, name, Path(scratch), running) for name in CONTENDERS]
        asyncio.run(_race(case, bank, racers, seconds))
        return _with_ratios([racer.record(case, bank) for racer in racers], racers)


def _start(
    case: Case, bank: int, name: str, scratch: Path, running: contextlib.ExitStack
) -> _Racer:
    contender, racer = CONTENDERS[name], _Racer(name)
    if contender.a_model_a_task:
        racer.failed = room_for(case, bank, 1.0)
    if racer.failed:
        return racer
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = contender.command(case, bank, folder)
    try:
        log = folder.with_suffix(".log")
        racer.server = running.enter_context(running_server(command, log))
    except HhdeployError as error:
        racer.failed = " ".join(str(error).split())[-160:]
    return racer


async def _race(case: Case, bank: int, racers: Sequence[_Racer], seconds: float) -> None:
    images = case.images()
    limit = aiohttp.ClientTimeout(total=_START_SECONDS)
    # Less than any server's own, after which it closes an idle connection under a request.
    kept = aiohttp.TCPConnector(keepalive_timeout=_KEEP_ALIVE_SECONDS)
    async with aiohttp.ClientSession(timeout=limit, connector=kept) as http:
        for racer in racers:
            await _attempt(racer, _check(http, case, racer, images, mixes(bank)))
        until, turn = time.perf_counter() + seconds, 0
        while turn <= 1 or time.perf_counter() < until:
            for i in range(len(racers)):
                racer = racers[(turn + i) % len(racers)]
                await _attempt(racer, _turn(http, racer, images, mixes(bank), timed=turn > 0))
            turn += 1


async def _attempt(racer: _Racer, act: Coroutine[Any, Any, None]) -> None:
    """What goes wrong puts a racer out and is reported."""
    if racer.server is None:
        act.close()
        return
    try:
        await act
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        racer.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        racer.server = None


async def _check(
    http: aiohttp.ClientSession,
    case: Case,
    racer: _Racer,
    images: Array,
    batches: Sequence[tuple[int, ...]],
) -> None:
    """Every adapter and image of all batches, after the server has come up."""
    await _until_up(http, racer, task(0), images[0])
    for mix in batches:
        answers = [_ask(http, racer, task(n), image) for n, image in zip(mix, images, strict=True)]
        found = np.stack([logits.reshape(-1) for logits, _ in await asyncio.gather(*answers)])
        racer.error = max(racer.error, range_error(case.truth(mix), found))


async def _until_up(http: aiohttp.ClientSession, racer: _Racer, name: str, image: Array) -> None:
    until = time.perf_counter() + _START_SECONDS
    while True:
        try:
            await _ask(http, racer, name, image)
        except aiohttp.ClientError:
            if time.perf_counter() > until:
                raise
            await asyncio.sleep(0.5)
        else:
            return


async def _turn(
    http: aiohttp.ClientSession,
    racer: _Racer,
    images: Array,
    batches: Sequence[tuple[int, ...]],
    *,
    timed: bool,
) -> None:
    """Each client asks `A_TURN` times, as soon as it has been answered."""

    async def client(number: int) -> None:
        for step in range(A_TURN):
            mix = batches[(racer_turn + step) % len(batches)]
            _, seconds = await _ask(http, racer, task(mix[number]), images[number])
            if timed:
                racer.latencies.append(seconds)

    racer_turn = len(racer.turns) * A_TURN
    begin = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(BATCH)))
    if timed:
        racer.turns.append(time.perf_counter() - begin)


async def _ask(
    http: aiohttp.ClientSession, racer: _Racer, name: str, image: Array
) -> tuple[Array, float]:
    """Logits, and the seconds until they were there."""
    contender = CONTENDERS[racer.name]
    assert racer.server is not None
    request = contender.request(name, image)
    begin = time.perf_counter()
    url = racer.server.url + request.path
    async with http.post(url, data=request.body, headers=request.headers) as answer:
        body = await answer.read()
        answer.raise_for_status()
    return contender.read(body), time.perf_counter() - begin


def _with_ratios(records: list[dict[str, Any]], racers: Sequence[_Racer]) -> list[dict[str, Any]]:
    """Add how many times as fast as each our OpenVINO is: median over the turns."""
    ours = next(racer.turns for racer in racers if racer.name == OURS)
    for record, racer in zip(records, racers, strict=True):
        if ours and "failed" not in record:
            ratios = [own / our for own, our in zip(racer.turns, ours, strict=True)]
            record["ours_faster"] = round(statistics.median(ratios), 3)
    return records
