"""Adapters of a running bank: what adding one costs, the others meanwhile, and memory. Linux.

    python -m benchmarks.bench_bank [--model vit_base_patch16_224] [--adapters 100] [--runs 30]
                                    [--rounds 3] [--requests 100] [--rate 2] [--churn 5]

Adding: reading the files, packing the row, putting it into the bank; putting alone is what
requests could notice. Requests of others: open loop at a rate below saturation, rounds with and
without changes (uploads and removals over the network) in turn. Memory: resident megabytes of
fresh processes after the first run of batch 1, with one adapter and with many, the same slots.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import THREADS, report
from benchmarks.models import adapter_directories, bundle
from hhdeploy.bundle import Bundle
from hhdeploy.cli.bench_serve import server_command
from hhdeploy.loadtest.client import Client
from hhdeploy.loadtest.drive import Record, drive
from hhdeploy.loadtest.expected import image_pool
from hhdeploy.loadtest.process import running_server
from hhdeploy.loadtest.report import Latencies
from hhdeploy.loadtest.traffic import Load
from hhdeploy.loadtest.variants import Task, make_tasks
from hhdeploy.runtime import open_session
from hhdeploy.timing import latency

SLOTS, FLEET = 128, 16
_MODEL = "bench"
_SESSION = """
import sys
import numpy as np
from hhdeploy.runtime import open_session
path, slots, threads, *more = sys.argv[1:]
session = open_session(path, device='cpu', slots=int(slots), threads=int(threads))
for index, directory in enumerate(more):
    session.adapters.add(f'more{index}', directory)
name = list(session.adapters)[-1]
session.run(np.zeros((1, *session.bundle.manifest.input_size), np.float32), name)
for line in open('/proc/self/status'):
    if line.startswith('VmRSS'):
        print(len(session.adapters), line.split()[1])
"""


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--adapters", default=100, show_default=True, help="Of the memory's many.")
@click.option("--runs", default=30, show_default=True, help="Of adding.")
@click.option("--rounds", default=3, show_default=True, help="Of the requests of others.")
@click.option("--requests", default=100, show_default=True, help="Of each side and round.")
@click.option("--rate", default=2.0, show_default=True, help="Requests a second.")
@click.option("--churn", default=5.0, show_default=True, help="Changes a second.")
def main(
    model: str, adapters: int, runs: int, rounds: int, requests: int, rate: float, churn: float
) -> None:
    """Adding, the requests of others, memory."""
    path = bundle(model, "branches", adapters=1)
    results: dict[str, Any] = {"model": model, "slots": SLOTS}
    results["adding an adapter"] = adding(path, model, runs)
    results["requests of others"] = others(path, rounds, requests, rate, churn)
    results["memory"] = memory(path, model, adapters)
    report("bank", results)


def adding(path: Path, model: str, runs: int) -> dict[str, Any]:
    """Milliseconds of adding an adapter to an open session, whole and in parts."""
    directory = adapter_directories(model, 2)["task1"]
    size = sum(file.stat().st_size for file in directory.iterdir())
    with open_session(path, device="cpu", threads=THREADS, slots=SLOTS) as session:
        bank = session.adapters
        packed = bank.pack("added", directory)
        whole = latency(lambda: bank.add("added", directory, replace_existing=True), runs=runs)
        pack = latency(lambda: bank.pack("added", directory), runs=runs)
        put = latency(lambda: bank.put(packed, replace_existing=True), runs=runs)
        row = bank.rows.shape[1] * 4
    return {
        "files, KB": round(size / 1e3),
        "row, KB": round(row / 1e3),
        "read, pack and put, ms": whole.to_json(),
        "read and pack, ms": pack.to_json(),
        "put, ms": put.to_json(),
    }


def others(path: Path, rounds: int, requests: int, rate: float, churn: float) -> dict[str, Any]:
    """Latencies of requests with and without changes of adapters going on."""
    opened = Bundle.open(path)
    records: dict[str, list[Record]] = {"with": [], "without": []}
    for turn in range(rounds):
        for side in ("with", "without")[:: -1 if turn % 2 else 1]:
            changes = churn if side == "with" else 0.0
            load = Load(requests, rate=rate, churn=changes, seed=turn, skew=0)
            records[side].append(_round(path, opened, load))
    uploads = [c for r in records["with"] for c in r.churn.changes if c.kind in ("add", "replace")]
    counts = [record.counts for record in records["with"] if record.counts is not None]
    loads = sum(c.loads for c in counts)
    return {
        **{f"{side} changes": vars(_latencies(found)) for side, found in records.items()},
        "uploads, seen by the client": vars(
            Latencies.of([c.acknowledged - c.sent for c in uploads])
        ),
        "loads in the server": loads,
        "of a load in the server, mean ms": round(
            1e3 * sum(c.load_seconds for c in counts) / max(1.0, loads), 2
        ),
    }


def _round(path: Path, opened: Bundle, load: Load) -> Record:
    """One load on a server of its own, with a fleet of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        fleet, token_file, token = root / "fleet", root / "token", secrets.token_hex(32)
        fleet.mkdir()
        token_file.write_text(token)
        tasks = make_tasks(opened, FLEET, 0, fleet, root / "versions")
        command = server_command(
            path,
            device="cpu",
            threads=THREADS,
            slots=SLOTS,
            model_name=_MODEL,
            adapters_dir=fleet,
            token_file=token_file,
            allow_adapter_loading=True,
            log_level="warning",
        )
        with running_server(command, root / "log") as server:
            warm_up = Load(len(tasks), 1, skew=0)
            asyncio.run(_ask(server.url, token, warm_up, tasks, opened))
            return asyncio.run(_ask(server.url, token, load, tasks, opened))


def _latencies(records: Sequence[Record]) -> Latencies:
    """Of what was answered; an adapter that is away is refused, anything else is an error."""
    exchanges = [e for record in records for e in record.exchanges]
    failed = [e.answer for e in exchanges if e.answer.status not in (200, 404)]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, e.g. {failed[0]}")
    return Latencies.of([e.seconds for e in exchanges if e.answer.status == 200])


async def _ask(url: str, token: str, load: Load, tasks: Sequence[Task], opened: Bundle) -> Record:
    pool = image_pool(4, opened.manifest.input_size, 0)
    shares = np.full(len(tasks), 1 / len(tasks))
    connections = load.clients + len(tasks)
    async with Client(url, _MODEL, token, connections=connections, seconds=60) as client:
        return await drive(client, load, tasks, pool, shares, lambda done, total: None)


def memory(path: Path, model: str, adapters: int) -> dict[str, Any]:
    """Resident megabytes with one adapter and with many, each in a process of its own."""
    more = [str(d) for d in list(adapter_directories(model, adapters).values())[1:]]
    one, many = _resident_mb(path, []), _resident_mb(path, more)
    return {
        "1 adapter, MB": one,
        f"{adapters} adapters, MB": many,
        f"{adapters} adapters / 1": round(many / one, 3),
    }


def _resident_mb(path: Path, more: Sequence[str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _SESSION, str(path), str(SLOTS), str(THREADS), *more],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    count, kilobytes = done.stdout.split()
    assert int(count) == 1 + len(more)
    return int(kilobytes) // 1024


if __name__ == "__main__":
    main()
