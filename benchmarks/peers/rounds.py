"""Who competes, and blocks of runs in turn in one process, every answer checked."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.tasks import BATCH, BOUNDS, Array, Case, mixes, range_error, task

LEAST_ROUNDS, BATCHES = 3, (1, 2, 4, 8)
OURS, AGAIN = "hhdeploy, OpenVINO", "hhdeploy, OpenVINO again"
INT8 = "hhdeploy, OpenVINO INT8"
COMPILED = "PEFT mixed batch, torch.compile"
# Name -> module, class and its arguments after the case.
PEERS: Mapping[str, tuple[Any, ...]] = {
    "PEFT mixed batch": ("torches", "PeftMixed"),
    "PEFT set_adapter": ("torches", "PeftOneByOne"),
    "ONNX Runtime, a session a task": ("runtimes", "OrtPerTask"),
    "OpenVINO, a model a task": ("runtimes", "OpenVinoPerTask"),
    "ONNX Runtime .onnx_adapter": ("runtimes", "OrtAdapters"),
    "hhdeploy, ONNX Runtime": ("ours", "Ours", "cpu", "float32"),
    OURS: ("ours", "Ours", "openvino", "float32"),
    AGAIN: ("ours", "Ours", "openvino", "float32"),
    INT8: ("ours", "Ours", "openvino", "int8"),
    COMPILED: ("torches", "PeftCompiled"),
}
# Bytes in memory over those of the graph, for who has a model a task: whether a bank fits.
MODEL_IN_MEMORY = {"ONNX Runtime, a session a task": 1.0, "OpenVINO, a model a task": 1.9}


class Peer(Protocol):
    """What competes. Where another adapter needs a call first, ``switch(name)`` is it."""

    promised: str

    def add(self, name: str) -> None:
        """One more adapter."""

    def run(self, images: Array, names: Sequence[str]) -> Array:
        """Logits [batch, classes], image i with adapter ``names[i]``."""

    def close(self) -> None:
        """Let go of everything."""


def open_peer(name: str, case: Case) -> Peer:
    """A competitor without adapters."""
    module, cls, *arguments = PEERS[name]
    found: Peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), cls)(
        case, *arguments
    )
    return found


@dataclass
class Entrant:
    """A competitor in the race, or why it is not.

    Attributes:
        name: key of `PEERS`.
        peer: it, None once it failed.
        has: adapters added.
        failed: why, empty while it runs.
        first_s: seconds of the first run with the bank as it is; compiling is in it.
        error: greatest of its answers over the truth's range.
        top1: share of equal best classes.
    """

    name: str
    peer: Peer | None = None
    has: int = 0
    failed: str = ""
    first_s: float = 0.0
    error: float = 0.0
    top1: float = 1.0
    times: list[float] = field(default_factory=list)

    def attempt(self, act: Callable[[Peer], object]) -> None:
        """Do something with it; what goes wrong puts it out and is reported."""
        if self.peer is None:
            return
        try:
            act(self.peer)
        except Exception as error:  # noqa: BLE001  (a peer's failure is a result)
            self.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            self.peer = None

    def record(self, case: Case, bank: int) -> dict[str, Any]:
        """What is reported of it."""
        record: dict[str, Any] = {"model": case.title, "bank": bank, "peer": self.name}
        if self.failed or not self.times:
            return {**record, "failed": self.failed or "no time left"}
        ordered = sorted(self.times)
        assert self.peer is not None
        middle = statistics.median(ordered)
        return {
            **record,
            "images_per_s": round(BATCH / middle, 2),
            "p50_ms": round(1e3 * middle, 1),
            "p99_ms": round(1e3 * float(np.quantile(ordered, 0.99)), 1),
            "runs": len(ordered),
            "first_s": round(self.first_s, 2),
            "error": float(f"{self.error:.2g}"),
            "top1": round(self.top1, 4),
            "right": self.error <= BOUNDS[self.peer.promised],
        }


def enter(case: Case, names: Sequence[str]) -> list[Entrant]:
    """Open them all."""
    entrants = []
    for name in names:
        entrant = Entrant(name)
        try:
            entrant.peer = open_peer(name, case)
        except Exception as error:  # noqa: BLE001  (a peer's failure is a result)
            entrant.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        entrants.append(entrant)
    return entrants


def race(
    case: Case, entrants: Sequence[Entrant], bank: int, seconds: float
) -> list[dict[str, Any]]:
    """Let the banks grow to a size, check all answers, then run in turn for so many seconds.

    The seconds count from the first timed round; at least `LEAST_ROUNDS` are run.
    """
    images, batches = case.images(), mixes(bank)
    for entrant in entrants:
        _grow(case, entrant, bank)
        _check(case, entrant, images, batches)
    _rounds(
        entrants,
        [(images, [task(i) for i in numbers]) for numbers in batches],
        time.perf_counter() + seconds,
    )
    records = [entrant.record(case, bank) for entrant in entrants]
    return _with_ratios(records, entrants)


def latencies(case: Case, entrants: Sequence[Entrant], seconds: float) -> list[dict[str, Any]]:
    """Medians of smaller batches, from the bank as it is: an adapter an image."""
    records = []
    images = case.images()
    for batch in BATCHES:
        names = [task(i % min(e.has for e in entrants if e.peer)) for i in range(batch)]
        until = time.perf_counter() + seconds / len(BATCHES)
        _rounds(entrants, [(images[:batch], names)], until)
        records += [
            {
                "model": case.title,
                "peer": e.name,
                "batch": batch,
                "p50_ms": round(1e3 * statistics.median(e.times), 2),
                "runs": len(e.times),
            }
            for e in entrants
            if e.peer is not None
        ]
    return records


def _grow(case: Case, entrant: Entrant, bank: int) -> None:
    missing = range(entrant.has, bank)
    factor = MODEL_IN_MEMORY.get(entrant.name)
    if factor is not None and entrant.peer is not None:
        entrant.failed = room_for(case, len(missing), factor)
        if entrant.failed:
            entrant.peer.close()
            entrant.peer = None
    for index in missing:
        entrant.attempt(lambda peer: peer.add(task(index)))  # noqa: B023  (called at once)
    entrant.has = bank


def room_for(case: Case, models: int, factor: float) -> str:
    """Why that many more models do not fit into memory; empty if they do."""
    import psutil

    needed = models * factor * case.graph.stat().st_size / 2**30
    free = psutil.virtual_memory().available / 2**30
    if needed < 0.9 * free:
        return ""
    return f"{models} more models need {needed:.1f} GiB, {free:.1f} are free"


def _check(case: Case, entrant: Entrant, images: Array, batches: Sequence[tuple[int, ...]]) -> None:
    entrant.error, entrant.top1 = 0.0, 1.0
    hits = []
    begin = time.perf_counter()
    for number, mix in enumerate(_own(entrant, batches)):
        found: list[Array] = []
        names = [task(i) for i in mix]
        entrant.attempt(lambda peer: found.append(peer.run(images, names)))  # noqa: B023
        if not found:
            return
        if number == 0:
            entrant.first_s = time.perf_counter() - begin
        truth = case.truth(mix)
        entrant.error = max(entrant.error, range_error(truth, found[0]))
        hits.append(float(np.mean(truth.argmax(1) == found[0].argmax(1))))
    entrant.top1 = statistics.mean(hits)


def _own(entrant: Entrant, batches: Sequence[Any]) -> Sequence[Any]:
    """Compiled code is of one mix of adapters; another would be compiled anew."""
    return batches[:1] if entrant.name == COMPILED else batches


def _rounds(
    entrants: Sequence[Entrant], batches: Sequence[tuple[Array, list[str]]], until: float
) -> None:
    for entrant in entrants:
        entrant.times = []
    count = len(entrants)
    turn = 0
    while turn <= LEAST_ROUNDS or time.perf_counter() < until:
        for entrant in (entrants[(turn + i) % count] for i in range(count)):
            own = _own(entrant, batches)
            images, names = own[turn % len(own)]
            begin = time.perf_counter()
            entrant.attempt(lambda peer: peer.run(images, names))  # noqa: B023  (called at once)
            if turn:  # the first round warms
                entrant.times.append(time.perf_counter() - begin)
        turn += 1


def _with_ratios(
    records: list[dict[str, Any]], entrants: Sequence[Entrant]
) -> list[dict[str, Any]]:
    """Add how many times as fast as each our float32 in OpenVINO is: median over the rounds."""
    base = next((e.times for e in entrants if e.name == OURS and e.peer is not None), None)
    for record, entrant in zip(records, entrants, strict=True):
        if base and "failed" not in record:
            ratios = [own / ours for own, ours in zip(entrant.times, base, strict=True)]
            record["ours_faster"] = round(statistics.median(ratios), 3)
    return records
