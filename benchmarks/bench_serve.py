"""What serving costs: throughput at saturation, latency at low load, decoding of a request.

    python -m benchmarks.bench_serve [--model vit_small_patch16_224] [--rounds 5] [--images 320]
                                     [--requests 80] [--no-profile]

The server runs in a process of its own and shares the cores with its client, this process, whose
CPU seconds are told apart. Server and bare session take turns. At saturation the clients send one
image each, float32 in the binary extension, enough of them to fill batches of 8; the bare session
runs batches of 8. Where the server's time goes: the means of its own metrics, CPU seconds of an
image, and a profile of its event loop, in a round of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

from benchmarks.harness import THREADS, report
from benchmarks.models import bundle, starter_bundle
from hhdeploy.cli.bench_serve import server_command
from hhdeploy.loadtest.client import Client, Requests
from hhdeploy.loadtest.drive import Record, drive
from hhdeploy.loadtest.expected import image_pool
from hhdeploy.loadtest.process import running_server
from hhdeploy.loadtest.traffic import Load
from hhdeploy.loadtest.variants import Task
from hhdeploy.runtime import Session, open_session
from hhdeploy.runtime.serving.http.codec import read_request
from hhdeploy.timing import latency

BATCH, CLIENTS, POOL = 8, 24, 16
_MODEL = "bench"
# Runtimes spin for a moment after a run; the other side's turn starts when they rest.
_PAUSE_SECONDS = 0.1
_BLOCK = 10
# The event loop alone, without what is imported before.
_PROFILED = """
import asyncio, cProfile, sys
from hhdeploy.cli import main
profile, run = cProfile.Profile(), asyncio.run
file = sys.argv.pop(1)
asyncio.run = lambda coroutine: profile.runcall(run, coroutine)
try:
    main()
finally:
    profile.dump_stats(file)
"""


@click.command()
@click.option("--model", default="vit_small_patch16_224", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Of throughput.")
@click.option("--images", default=320, show_default=True, help="Of each side and round.")
@click.option("--requests", default=80, show_default=True, help="Of latency.")
@click.option("--profile/--no-profile", default=True, show_default=True)
def main(model: str, rounds: int, images: int, requests: int, profile: bool) -> None:
    """The model and the starter model, then decoding."""
    results: dict[str, Any] = {}
    # The starter's images take a tenth of the time: as many seconds, not as many images.
    for name, path, count in (
        (model, bundle(model, "branches"), images),
        ("starter", starter_bundle(), 10 * images),
    ):
        with serving(path) as url, open_session(path, device="cpu", threads=THREADS) as session:
            results[f"{name}: saturation"] = saturation(session, url, rounds, count)
            for batch in (1, BATCH):
                key = f"{name}: one request at a time, batch {batch}"
                results[key] = added_latency(session, url, batch, requests)
        if profile:
            results[f"{name}: event loop"] = loop_profile(path, count)
    results["decoding 8 x 3 x 224 x 224 float32"] = decoding()
    report("serve", results)


@contextlib.contextmanager
def serving(path: Path, **options: object) -> Iterator[str]:
    """The address of a server of a bundle, in a process of its own."""
    command = server_command(
        path,
        device="cpu",
        threads=THREADS,
        max_batch=BATCH,
        model_name=_MODEL,
        log_level="warning",
        **options,
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_server(command, Path(scratch) / "log") as server,
    ):
        yield server.url


def saturation(session: Session, url: str, rounds: int, images: int) -> dict[str, Any]:
    """Images a second of the server and of the bare session, in turn; medians of the rounds."""
    bare_images, names = batch_of(session, BATCH)
    bare: list[float] = []
    served: list[float] = []
    cpu: list[float] = []
    records: list[Record] = []
    ask(session, url, images // 4)
    for turn in range(rounds):
        for side in ("bare", "served")[:: -1 if turn % 2 else 1]:
            time.sleep(_PAUSE_SECONDS)
            if side == "served":
                records.append(ask(session, url, images))
                served.append(images / records[-1].seconds)
                continue
            runs = images // BATCH
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for _ in range(runs):
                session.run(bare_images, names)
            bare.append(runs * BATCH / (time.perf_counter() - begin))
            cpu.append((time.process_time() - begin_cpu) / (runs * BATCH))
    ratios = [a / b for a, b in zip(served, bare, strict=True)]
    return {
        "served / bare": round(statistics.median(ratios), 3),
        "of the rounds": [round(r, 3) for r in ratios],
        "served images/s": round(statistics.median(served), 1),
        "bare images/s": round(statistics.median(bare), 1),
        "CPU ms of an image, bare session": round(1e3 * statistics.median(cpu), 2),
        **_costs(records, images),
    }


def _costs(records: Sequence[Record], images: int) -> dict[str, Any]:
    """Means over all rounds, milliseconds of an image or a request of one image."""
    count = len(records) * images
    counts = [record.counts for record in records if record.counts is not None]
    server_cpu = sum(c.cpu_seconds or 0.0 for c in counts)
    client_cpu = sum(record.client_cpu_seconds for record in records)
    seen = sum(e.seconds for record in records for e in record.exchanges)
    inside = {
        name: sum(c.seconds[name] for c in counts)
        for name in ("queue", "compute_input", "compute_infer", "compute_output", "request")
    }
    return {
        "CPU ms of an image, server": round(1e3 * server_cpu / count, 2),
        "CPU ms of an image, client": round(1e3 * client_cpu / count, 2),
        "images of a batch": round(
            sum(c.images for c in counts) / sum(c.batches for c in counts), 2
        ),
        "ms of a request, client": round(1e3 * seen / count, 2),
        **{f"ms of a request, {k}": round(1e3 * v / count, 2) for k, v in inside.items()},
        "ms of a request, the rest (HTTP, waiting for the event loop, client)": round(
            1e3 * (seen - inside["request"]) / count, 2
        ),
    }


def ask(session: Session, url: str, images: int) -> Record:
    """Send ``images`` requests of one image, all adapters in turn equally popular."""
    size = session.bundle.manifest.input_size
    tasks = [Task(entry.name, (), True) for entry in session.bundle.manifest.adapters]
    shares = np.full(len(tasks), 1 / len(tasks))

    async def run() -> Record:
        async with Client(url, _MODEL, "", connections=CLIENTS, seconds=60) as client:
            load = Load(images, clients=CLIENTS)
            return await drive(
                client, load, tasks, image_pool(POOL, size, 0), shares, lambda done, total: None
            )

    record = asyncio.run(run())
    failed = [e.answer for e in record.exchanges if e.answer.status != 200]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, e.g. {failed[0]}")
    return record


def added_latency(session: Session, url: str, batch: int, requests: int) -> dict[str, Any]:
    """Milliseconds of one request at a time, against the bare session on the same batch.

    Sides take turns in blocks: right behind the other process's run, a session is slowed by the
    threads that spin for it, which says nothing of serving.
    """
    images, _ = batch_of(session, batch)
    name = session.bundle.manifest.adapters[0].name
    body, json_length = Requests([name], images, batch).body(0, range(batch))
    headers = {"Inference-Header-Content-Length": str(json_length)}
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)

    def served() -> None:
        connection.request("POST", f"/v2/models/{_MODEL}/infer", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"status {answer.status}: {content[:200]!r}")

    def block(run: Callable[[], object]) -> float:
        time.sleep(_PAUSE_SECONDS)
        return latency(run, runs=_BLOCK, warmup=2).median_ms

    with contextlib.closing(connection):
        times = [
            [block(side) for side in (served, lambda: session.run(images, name))]
            for _ in range(max(2, requests // _BLOCK))
        ]
    ours, bare = (statistics.median(side) for side in zip(*times, strict=True))
    added = [a - b for a, b in times]
    return {
        "served, median ms": round(ours, 3),
        "bare, median ms": round(bare, 3),
        "added, median of the blocks, ms": round(statistics.median(added), 3),
        "added, of each block, ms": [round(ms, 2) for ms in added],
    }


def loop_profile(path: Path, images: int) -> dict[str, Any]:
    """Seconds of the server's event loop under load, by function; the profiler's own included."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "profile"
        command = server_command(
            path, device="cpu", threads=THREADS, max_batch=BATCH, model_name=_MODEL,
            log_level="warning",
        )  # fmt: skip
        start = command.index("serve")
        profiled = [sys.executable, "-c", _PROFILED, str(file), *command[start:]]
        with (
            running_server(profiled, Path(scratch) / "log") as server,
            open_session(path, device="cpu", threads=1) as session,
        ):
            record = ask(session, server.url, images)
        stats = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    waiting = sum(v[2] for k, v in stats.items() if k[2].startswith("<method 'poll' of"))
    busiest = sorted(stats.items(), key=lambda item: -item[1][2])
    shown = [
        (f"{Path(k[0]).name}:{k[1]} {k[2]}" if k[1] else k[2], round(v[2], 2))
        for k, v in busiest
        if not k[2].startswith("<method 'poll' of")
    ]
    return {
        "images": images,
        "seconds of the load": round(record.seconds, 2),
        "seconds in poll, start and end included": round(waiting, 2),
        "own seconds": dict(shown[:20]),
    }


def decoding() -> dict[str, Any]:
    """Milliseconds of a request of 4.8 MB from bytes to arrays; half of it as JSON.

    As JSON the whole is 25 MB, which the server refuses.
    """
    pool = image_pool(8, (3, 224, 224), 0)
    body, json_length = Requests(["a"], pool, 8).body(0, range(8))
    half = pool[:4]
    tensor = {"name": "images", "datatype": "FP32", "shape": list(half.shape)}
    text = json.dumps({"inputs": [{**tensor, "data": half.reshape(-1).tolist()}]}).encode()
    binary = latency(lambda: read_request("m", "", body, str(json_length)), runs=50)
    as_json = latency(lambda: read_request("m", "", text, None), runs=3, warmup=1)
    return {
        "binary, bytes": len(body),
        "binary, median ms": round(binary.median_ms, 4),
        "half as JSON, bytes": len(text),
        "half as JSON, median ms": round(as_json.median_ms, 1),
    }


def batch_of(session: Session, batch: int) -> tuple[np.ndarray, list[str]]:
    """Noise, every image with the next adapter."""
    images = image_pool(batch, session.bundle.manifest.input_size, 0)
    entries = session.bundle.manifest.adapters
    return images, [entries[i % len(entries)].name for i in range(batch)]


if __name__ == "__main__":
    main()
