"""A server of this checkout against one of another commit: throughput, latency, processor time.

    git worktree add ../before COMMIT
    python -m benchmarks.serve_against BUNDLE ../before [--blocks 30] [--device cpu] [--control]

Both serve BUNDLE in processes of their own at the same time. A block asks them as in A B B A, the
next as in B A A B, so that neither what came just before nor a machine that slowly changes
favours one; each time over connections that were asked before, by 16 clients that each wait for
their answer, then by one: one image a request, float32, binary. After a few blocks both are started
anew, in the other order: two processes of the same code differ by some percent as long as they
live, by where their memory happens to lie. Said are the medians of the blocks' ratios, this
checkout's over the other's; a ratio of 1 is no difference. ``--control`` serves this checkout
twice: how far from 1 the machine alone is.

The event loop's processor time a request, on Linux, is what the machine's other work changes least.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from hhdeploy.bundle import Bundle

CLIENTS, REQUESTS, SINGLE = 16, 400, 60
# Blocks until both servers are started anew.
BLOCKS_A_START = 5
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    """One that runs."""

    pid: int
    port: int

    def loop_seconds(self) -> float:
        """Processor time of its first thread, the event loop's; NaN where nothing tells."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        except OSError:
            return math.nan


@dataclass
class Spent:
    """What a server took in one block: seconds at saturation, of its loop then, at low load."""

    busy: float = 0.0
    loop: float = 0.0
    idle: float = 0.0


@contextlib.contextmanager
def _server(checkout: Path, bundle: Path, device: str) -> Iterator[Server]:
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
        yield Server(process.pid, int(found[1]))
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


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, times: int
) -> None:
    """Ask that often on one connection. Every answer must be one."""
    for _ in range(times):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise click.ClickException(f"expected an answer, found {head[:200]!r}.")
        length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        assert length is not None
        await reader.readexactly(int(length[1]))


async def _seconds(server: Server, request: bytes, clients: int, times: int) -> tuple[float, float]:
    """How long all take, from connections that were asked once; and the server's loop."""
    streams = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(clients)]
    await asyncio.gather(*(_ask(*each, request, 1) for each in streams))
    loop, begin = server.loop_seconds(), time.perf_counter()
    await asyncio.gather(*(_ask(*each, request, times) for each in streams))
    end, loop_end = time.perf_counter(), server.loop_seconds()
    for _, writer in streams:
        writer.close()
    return end - begin, loop_end - loop


def _block(order: tuple[int, int], servers: tuple[Server, Server], request: bytes) -> list[Spent]:
    """A B B A, and what each of both spent."""
    spent = [Spent(), Spent()]
    for number in (*order, *order[::-1]):
        server, its = servers[number], spent[number]
        busy, loop = asyncio.run(_seconds(server, request, CLIENTS, REQUESTS // CLIENTS))
        its.busy += busy
        its.loop += loop
        its.idle += asyncio.run(_seconds(server, request, 1, SINGLE))[0]
    return spent


def _measure(
    checkouts: tuple[Path, Path], bundle: Path, device: str, blocks: int
) -> list[tuple[Spent, Spent]]:
    """Of each block what the first and the second checkout spent."""
    request, found = _request(bundle), []
    for start in range(-(-blocks // BLOCKS_A_START)):
        first, second = checkouts[::-1] if start % 2 else checkouts
        with _server(first, bundle, device) as one, _server(second, bundle, device) as other:
            servers = (other, one) if start % 2 else (one, other)
            _block((0, 1), servers, request)  # warms both
            for block in range(min(BLOCKS_A_START, blocks - start * BLOCKS_A_START)):
                ours, theirs = _block((1, 0) if (start + block) % 2 else (0, 1), servers, request)
                found.append((ours, theirs))
    return found


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
    found = _measure((_HERE, other), bundle.resolve(), device, blocks)
    throughput = [theirs.busy / ours.busy for ours, theirs in found]
    click.echo(_said("throughput at saturation", throughput))
    click.echo(_said("latency at low load", [ours.idle / theirs.idle for ours, theirs in found]))
    each = [
        [1e6 * spent.loop / 2 / REQUESTS for spent in side] for side in zip(*found, strict=True)
    ]
    if not any(map(math.isnan, each[0])):
        ours, theirs = map(statistics.median, each)
        click.echo(
            f"loop at saturation: {ours:.0f} and {theirs:.0f} us of processor time a request"
        )
        click.echo(_said("  their ratio", [one / other for one, other in zip(*each, strict=True)]))


if __name__ == "__main__":
    main()
