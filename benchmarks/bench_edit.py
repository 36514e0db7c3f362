"""Adding an adapter to a ViT-B/16 bundle: this checkout against another one, in turn.

    python -m benchmarks.bench_edit --against CHECKOUT

Each checkout works on a bundle of its own in a process of its own; the parent asks them in turn.
Without ``--against`` the second process is this checkout again: the control alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.harness import report
from benchmarks.models import adapter_directories, bundle, work_directory

_MODEL = "vit_base_patch16_224"
_PAIRS = 30
# Runs in either checkout: a line asks for one add, whose seconds come back; then it is removed.
_WORKER = """
import sys, time
from hhdeploy.bundle import add_adapter, remove_adapter
bundle, source = sys.argv[1:]
for line in sys.stdin:
    begin = time.perf_counter()
    add_adapter(bundle, "guest", source)
    print(time.perf_counter() - begin, flush=True)
    remove_adapter(bundle, "guest")
"""


class Worker:
    """A process of one checkout."""

    def __init__(self, checkout: Path, path: Path, source: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(path), str(source)],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def add(self) -> float:
        """Seconds of one add."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def measure(against: Path) -> dict[str, Any]:
    """Medians of both and of their ratios."""
    here = Path(__file__).resolve().parents[1]
    source = adapter_directories(_MODEL, 4)["task0"]
    origin = bundle(_MODEL, "branches")
    workers = []
    for number, checkout in enumerate((here, against)):
        path = work_directory() / f"edit-{number}"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(origin, path)
        workers.append(Worker(checkout, path, source))
    try:
        for worker in workers:
            worker.add()  # imports and caches
        pairs = [tuple(worker.add() for worker in workers) for _ in range(_PAIRS)]
    finally:
        for worker in workers:
            worker.close()
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "this_ms": round(1e3 * median(ours for ours, _ in pairs), 1),
        "other_ms": round(1e3 * median(theirs for _, theirs in pairs), 1),
        "ratio": round(median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) * i // 4], 3) for i in (1, 3)],
    }


@click.command(help=__doc__)
@click.option("--against", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(against: Path | None) -> None:
    here = Path(__file__).resolve().parents[1]
    results = {"control": json.dumps(measure(here))}
    if against is not None:
        results["against"] = json.dumps(measure(against.resolve()))
    report("bench_edit", results)


if __name__ == "__main__":
    main()
