"""From a fresh process to the first answer: OpenVINO with and without its cache on disk.

    python -m benchmarks.bench_cold_start [--model vit_base_patch16_224] [--starts 7]
                                          [--kind branches] [--precision float32 --precision int8]

Seconds are counted inside the process, from before the session is opened (the files' hashes are
checked, OpenVINO is imported) to the first logits of batch 1; Python's own start and that of NumPy
are the same for all. The starts are interleaved. ONNX Runtime, which has no cache, is shown too.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.harness import THREADS, report
from benchmarks.models import bundle, calibrated, work_directory

_START = """
import sys, time
import numpy as np
from hhdeploy.runtime import open_session
path, device, precision, cache, threads = sys.argv[1:]
begin = time.perf_counter()
session = open_session(
    path, device=device, precision=precision, threads=int(threads), cache=cache or None
)
size = session.bundle.manifest.input_size
name = session.bundle.manifest.adapters[0].name
session.run(np.zeros((1, *size), np.float32), name)
print(time.perf_counter() - begin)
"""


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--starts", default=7, show_default=True, help="Of each kind.")
@click.option("--kind", "kinds", multiple=True, default=("branches", "folded"), show_default=True)
@click.option(
    "--precision", "precisions", multiple=True, default=("float32", "int8"), show_default=True
)
def main(model: str, starts: int, kinds: tuple[str, ...], precisions: tuple[str, ...]) -> None:
    """Medians of fresh processes, in turn."""
    cache = work_directory() / "models"
    results: dict[str, object] = {"model": model, "starts of each": starts}
    for kind in kinds:
        path = bundle(model, kind)
        for precision in precisions:
            if precision == "int8":
                calibrated(path, precision)
            shutil.rmtree(cache, ignore_errors=True)
            filling = _start(path, "openvino", precision, str(cache))
            ways = {
                "cache": ("openvino", str(cache)),
                "no cache": ("openvino", ""),
                "ORT": ("cpu", ""),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(starts):
                for way in list(ways)[:: -1 if turn % 2 else 1]:
                    device, where = ways[way]
                    seconds[way].append(_start(path, device, precision, where))
            ratios = [a / b for a, b in zip(seconds["cache"], seconds["no cache"], strict=True)]
            results[f"{kind} {precision}"] = {
                "cache / no cache": round(statistics.median(ratios), 3),
                **{f"{way}, s": round(statistics.median(s), 3) for way, s in seconds.items()},
                "filling the cache, s": round(filling, 3),
                "ratios": [round(r, 2) for r in sorted(ratios)],
            }
    report("cold start", results)


def _start(path: Path, device: str, precision: str, cache: str) -> float:
    """Seconds to the first answer in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _START, str(path), device, precision, cache, str(THREADS)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
