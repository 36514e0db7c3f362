"""Head to head with what people would pick: ``make bench-peers``.

    python -m benchmarks.peers [--minutes 12] [--quick] [--model ViT-S/16]
    python -m benchmarks.peers --servers      the race of servers alone, of the models named
    python -m benchmarks.peers --prepare      only make the files, which takes minutes once

In-process: throughput, latency and every answer of all peers in turn; then a process each for
memory and for the time of a change; with ``--servers`` servers in turn. What was raced before of
other models, and what ``--servers`` leaves out, is kept. ``--quick`` is a rehearsal (ViT-S, banks
of 1 and 8, few rounds), of which nothing is. The last line is JSON; ``python -m benchmarks.tables
--run peers`` keeps it and writes the documentation from it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import click

from benchmarks.harness import machine
from benchmarks.peers import page
from benchmarks.peers.accuracy import accuracies, starter
from benchmarks.peers.child import in_a_child
from benchmarks.peers.prepare import prepare
from benchmarks.peers.rounds import AGAIN, COMPILED, PEERS, enter, latencies, race
from benchmarks.peers.servers import race_servers
from benchmarks.peers.tasks import BANKS, MODELS, Case

# Share of the time that is left for the races; opening and compiling come on top.
RACES = 0.4
# Every size of the bank is compiled anew, for a minute or more: one size is raced.
COMPILED_AT = 8
# A peer's process of its own has at least this, whatever the races left: with 64 adapters ViT-B
# takes half of it.
CHANGE_SECONDS = 90.0


@click.command(help=__doc__)
@click.option("--minutes", default=12.0, show_default=True, help="Of measuring, files made.")
@click.option("--quick", is_flag=True)
@click.option("--model", "titles", multiple=True, type=click.Choice(list(MODELS)))
@click.option(
    "--bank",
    "sizes",
    multiple=True,
    type=click.Choice([str(bank) for bank in BANKS]),
    help="Adapters at hand; all sizes if none is named.",
)
@click.option("--servers", is_flag=True, help="The race of servers alone.")
@click.option("--prepare", "only_prepare", is_flag=True)
def main(
    minutes: float,
    quick: bool,
    titles: tuple[str, ...],
    sizes: tuple[str, ...],
    servers: bool,
    only_prepare: bool,
) -> None:
    """Measure."""
    cases = [Case(t) for t in titles or (list(MODELS)[:1] if quick else list(MODELS))]
    banks = [int(size) for size in sizes] or [b for b in BANKS if b <= 8 or not quick]
    for case in cases:
        print(f"files of {case.title} in {case.folder}", flush=True)
        prepare(case, max(banks))
    starter()
    if only_prepare:
        return
    seconds = 60 * (0.5 if quick else minutes)
    content = {
        "benchmark": "peers",
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -W ignore -m benchmarks.peers", *sys.argv[1:]]),
        **(measure_servers if servers else measure)(cases, banks, seconds),
    }
    if not quick:
        content = page.merged(page.stored(), content)
    print(json.dumps(content), flush=True)


def measure_servers(cases: list[Case], banks: list[int], seconds: float) -> dict[str, list[Any]]:
    """The records of servers."""
    found = []
    for case in cases:
        for bank in banks:
            print(f"{case.title}, servers of {bank} adapters", flush=True)
            found += race_servers(case, bank, seconds / (len(cases) * len(banks)))
    return {"servers": found}


def measure(cases: list[Case], banks: list[int], seconds: float) -> dict[str, list[Any]]:
    """All records: races, latencies, changes, accuracies."""
    until = time.perf_counter() + seconds
    found: dict[str, list[Any]] = {"races": [], "latencies": [], "changes": [], "accuracies": []}
    share = RACES * seconds / (len(cases) * (len(banks) + 0.5))
    for case in cases:
        entrants = enter(case, [name for name in PEERS if name != COMPILED])
        for bank in banks:
            print(
                f"{case.title}, {bank} adapters: {until - time.perf_counter():.0f} s left",
                flush=True,
            )
            compiled = enter(case, [COMPILED] if bank == COMPILED_AT else [])
            found["races"] += race(case, [*entrants, *compiled], bank, share)
            del compiled
            if bank == COMPILED_AT:
                found["latencies"] += latencies(case, entrants, share / 2)
        for entrant in entrants:
            if entrant.peer is not None:
                entrant.peer.close()
        del entrants
        gc.collect()
    found["accuracies"] = accuracies(0.05 * seconds)
    for case in cases:
        for name in (n for n in PEERS if n not in (AGAIN, COMPILED)):
            print(f"{case.title}, {name} alone", flush=True)
            found["changes"] += in_a_child(
                name, case, banks, max(CHANGE_SECONDS, until - time.perf_counter())
            )
    return found


if __name__ == "__main__":
    main()
