"""Peak memory of an export with verification, and of an open session. Linux.

    python -m benchmarks.bench_memory [--model vit_base_patch16_224] [--adapters 4]

Each figure comes from a process of its own (VmHWM of /proc/self/status). The session's is split
into weights, bank and the rest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from benchmarks.harness import THREADS, report
from benchmarks.models import adapter_directories, bundle, work_directory
from hhdeploy.bundle import Bundle

_PEAK = """
for line in open('/proc/self/status'):
    if line.startswith('VmHWM'):
        print('PEAK_KB', line.split()[1])
"""
_EXPORT = """
import shutil, sys
from hhdeploy.exporting.bundles import export
out, model, cache, *adapters = sys.argv[1:]
shutil.rmtree(out, ignore_errors=True)
named = {str(i): path for i, path in enumerate(adapters)}
export(model, named, out, pretrained=False, cache=None if cache == 'none' else cache)
"""
_SESSION = """
import sys
import numpy as np
from hhdeploy.runtime import open_session
session = open_session(sys.argv[1], device='cpu', threads=int(sys.argv[2]))
size = session.bundle.manifest.input_size
names = list(session.adapters)
images = np.zeros((4, *size), np.float32)
for _ in range(3):
    session.run(images, (names * 4)[:4])
"""


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True)
@click.option("--adapters", default=4, show_default=True)
def main(model: str, adapters: int) -> None:
    """Export with a cold and a warm cache, then an open session."""
    directories = [str(p) for p in adapter_directories(model, adapters).values()]
    out = work_directory() / "memory-export"
    path = bundle(model, "branches", adapters)
    opened = Bundle.open(path)
    weights = (path / "model.onnx.data").stat().st_size / 2**20
    bank = opened.bank().nbytes / 2**20
    session = _peak_mb(_SESSION, str(path), str(THREADS))
    report(
        "memory",
        {
            "model": model,
            "adapters": adapters,
            "export with verification, no cache, MB": _peak_mb(
                _EXPORT, str(out), model, "none", *directories
            ),
            "export with verification, cached, MB": _peak_mb(
                _EXPORT, str(out), model, str(work_directory() / "cache"), *directories
            ),
            "open session after 3 runs of batch 4, MB": session,
            "of which weights, MB": round(weights),
            "of which bank, MB": round(bank, 1),
            "of which all else, MB": round(session - weights - bank),
        },
    )


def _peak_mb(code: str, *arguments: str) -> int:
    """Peak resident megabytes of a fresh process that runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code + _PEAK, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    line = next(text for text in done.stdout.splitlines() if text.startswith("PEAK_KB"))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    main()
