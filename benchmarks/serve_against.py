"""A server of this checkout against one of another commit: throughput, and latency at low load.

    git worktree add ../before COMMIT
    python -m benchmarks.serve_against BUNDLE ../before [--blocks 30] [--device cpu] [--control]

Both serve BUNDLE in processes of their own at the same time, and are asked in turns, in another
order each time: a block of requests over HTTP, one image each (float32, binary), from 16 clients
that each wait for their answer, then one after the other. Said are the medians of the blocks'
ratios, this checkout's over the other's; a ratio of 1 is no difference. ``--control`` serves this
checkout twice: how far from 1 the machine alone is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from hhdeploy.bundle import Bundle

CLIENTS, REQUESTS, SINGLE = 16, 400, 60
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_HERE = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def _server(checkout: Path, bundle: Path, device: str) -> Iterator[int]:
    """A server of a checkout; its port."""
    options = ["--device", device, "--threads", "1", "--http-port", "0", "--grpc-port", "-1"]
    code = "from hhdeploy.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(bundle), "--model-name", "served", *options],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = _ADDRESS.search(line)
        if found is None:
            raise click.ClickException(f"{checkout}: expected an address, found {line!r}.")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


def _request(bundle: Path) -> bytes:
    """One request for the first adapter, with its head."""
    manifest = Bundle.open(bundle).manifest
    shape = (1, *manifest.input_size)
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32).tobytes()
    tensor = {"name": "images", "datatype": "FP32", "shape": shape}
    content = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(pixels)}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        "parameters": {"adapter": manifest.adapters[0].name},
    }
    head = json.dumps(content).encode()
    lines = [
        "POST /v2/models/served/infer HTTP/1.1",
        "host: localhost",
        f"inference-header-content-length: {len(head)}",
        f"content-length: {len(head) + len(pixels)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + pixels


async def _ask(port: int, request: bytes, times: int) -> None:
    """Ask that often on one connection. Every answer must be one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(times):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise click.ClickException(f"expected an answer, found {head[:200]!r}.")
        length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        assert length is not None
        await reader.readexactly(int(length[1]))
    writer.close()


async def _seconds(port: int, request: bytes, clients: int, times: int) -> float:
    begin = time.perf_counter()
    await asyncio.gather(*(_ask(port, request, times) for _ in range(clients)))
    return time.perf_counter() - begin


def _measure(
    ports: tuple[int, int], request: bytes, blocks: int
) -> tuple[list[float], list[float]]:
    """Of each block the ratios: throughput at saturation, latency at low load."""
    throughput, latency = [], []
    for block in range(blocks + 1):
        busy, idle = {}, {}
        for port in ports if block % 2 else ports[::-1]:
            busy[port] = asyncio.run(_seconds(port, request, CLIENTS, REQUESTS // CLIENTS))
            idle[port] = asyncio.run(_seconds(port, request, 1, SINGLE))
        if block:  # the first one warms both
            throughput.append(busy[ports[1]] / busy[ports[0]])
            latency.append(idle[ports[0]] / idle[ports[1]])
    return throughput, latency


def _said(name: str, ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{name}: {middle:.3f}x, quartiles {low:.3f} and {high:.3f}, {len(ratios)} blocks"


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("against", type=click.Path(exists=True, path_type=Path))
@click.option("--blocks", default=30, type=click.IntRange(2))
@click.option("--device", default="cpu")
@click.option("--control", is_flag=True, help="This checkout twice.")
def main(bundle: Path, against: Path, blocks: int, device: str, control: bool) -> None:
    """Measure, and say the ratios."""
    other = _HERE if control else against.resolve()
    bundle = bundle.resolve()
    with _server(_HERE, bundle, device) as ours, _server(other, bundle, device) as theirs:
        throughput, latency = _measure((ours, theirs), _request(bundle), blocks)
    click.echo(_said("throughput at saturation", throughput))
    click.echo(_said("latency at low load", latency))


if __name__ == "__main__":
    main()
