"""What room for s_out and db costs: side branches that need them against side branches that do not.

    python -m benchmarks.bench_parts [--model vit_base_patch16_224] [--blocks 30] [--rounds 6]
                                     [--device cpu --device openvino] [--batch 1 --batch 8]

Both bundles have the same four adapters on q, k, v and proj; those of one have s_out and db at
every site. A block runs both and, as the control, the second bundle once more in a session of its
own, in an order that turns. Where a session's weights land in memory moves its speed for as long as
it is open, so the sessions are opened anew for every round of blocks. What counts is the median of
the blocks' ratios less what the control's median differs from 1.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from benchmarks.harness import THREADS, report, runner
from benchmarks.models import bundle
from hhdeploy.runtime import open_session

BOUND = 1.03
# Name of a session in a block -> kind of its bundle.
SESSIONS = {"parts": "parts", "plain": "branches", "control": "branches"}
_WARMUP = 2


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--blocks", default=30, show_default=True, help="Of each device and batch, in all.")
@click.option("--rounds", default=6, show_default=True, help="Times the sessions are opened.")
@click.option("--device", "devices", multiple=True, default=("cpu", "openvino"), show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), show_default=True)
def main(
    model: str, blocks: int, rounds: int, devices: tuple[str, ...], batches: tuple[int, ...]
) -> None:
    """Side branches with s_out and db against side branches without."""
    results: dict[str, Any] = {"model": model, "blocks": -(-blocks // rounds) * rounds}
    for device in devices:
        times: dict[int, list[dict[str, float]]] = {batch: [] for batch in batches}
        for turn in range(rounds):
            _round(model, device, turn, -(-blocks // rounds), times)
        for batch in batches:
            results[f"{device}, batch {batch}"] = summary(times[batch])
    report("room for s_out and db", results)


def _round(
    model: str, device: str, turn: int, blocks: int, times: Mapping[int, list[dict[str, float]]]
) -> None:
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(
                open_session(bundle(model, SESSIONS[name]), device=device, threads=THREADS)
            )
            for name in _turned(turn)
        }
        for batch, measured in times.items():
            runs = {name: runner(session, batch) for name, session in sessions.items()}
            for run in runs.values():
                for _ in range(_WARMUP):
                    run()
            measured += [_block(runs, _turned(turn + block)) for block in range(blocks)]


def _turned(turn: int) -> list[str]:
    names = list(SESSIONS)
    return names[turn % len(names) :] + names[: turn % len(names)]


def _block(runs: Mapping[str, Callable[[], object]], order: list[str]) -> dict[str, float]:
    """Milliseconds of one run each."""
    found = {}
    for name in order:
        start = time.perf_counter()
        runs[name]()
        found[name] = 1e3 * (time.perf_counter() - start)
    return found


def summary(blocks: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the blocks' ratios; ``passed``: the cost less the control's is within `BOUND`."""
    ratio = statistics.median(b["parts"] / b["plain"] for b in blocks)
    control = statistics.median(b["control"] / b["plain"] for b in blocks)
    cost = ratio - (control - 1.0)
    return {
        "ratio": round(ratio, 3),
        "control": round(control, 3),
        "cost": round(cost, 3),
        "bound": BOUND,
        "passed": cost <= BOUND,
        "plain_ms": round(statistics.median(b["plain"] for b in blocks), 1),
    }


if __name__ == "__main__":
    main()
