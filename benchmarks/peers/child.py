"""Memory, and the time to add and to switch, of one peer alone: ``child PEER MODEL BANKS``.

The last line is JSON. Linux: resident memory is /proc/self/statm's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.rounds import MODEL_IN_MEMORY, open_peer, room_for
from benchmarks.peers.tasks import Case, mixes, task

# Of each mix until memory is what it stays: ONNX Runtime plans its own by the first run.
_RUNS = 3


def measure(name: str, case: Case, banks: list[int]) -> list[dict[str, Any]]:
    """A record a size of the bank."""
    images = case.images()
    peer, has, records = open_peer(name, case), 0, []
    for bank in banks:
        record: dict[str, Any] = {"model": case.title, "bank": bank, "peer": name}
        factor = MODEL_IN_MEMORY.get(name)
        full = room_for(case, bank - has, factor) if factor is not None else ""
        if full:
            records.append({**record, "failed": full})
            break
        times = []
        for index in range(has, bank):
            begin = time.perf_counter()
            peer.add(task(index))
            times.append(time.perf_counter() - begin)
        has = bank
        for mix in mixes(bank) * _RUNS:
            peer.run(images, [task(i) for i in mix])
        record["rss_mb"] = round(_resident() / 2**20)
        record["add_ms"] = round(1e3 * statistics.median(times), 2)
        record["switch_ms"] = _switch_ms(peer, bank)
        records.append(record)
    peer.close()
    return records


def _switch_ms(peer: Any, bank: int) -> float | None:
    """Of the call that another adapter needs; None where there is none: images name theirs."""
    if not hasattr(peer, "switch"):
        return None
    times = []
    for index in range(40):
        begin = time.perf_counter()
        peer.switch(task(index % bank))
        times.append(time.perf_counter() - begin)
    return round(1e3 * statistics.median(times), 3)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_a_child(name: str, case: Case, banks: list[int], timeout: float) -> list[dict[str, Any]]:
    """`measure` in a process of its own; a failure is a record."""
    failed = {"model": case.title, "bank": banks[-1], "peer": name}
    if timeout < 5:
        return [{**failed, "failed": "no time left"}]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.child"]
    try:
        done = subprocess.run(
            [*command, name, case.title, *map(str, banks)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return [{**failed, "failed": f"not done after {timeout:.0f} s"}]
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [{**failed, "failed": said[:160]}]
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Case(sys.argv[2]), [int(n) for n in sys.argv[3:]])))
