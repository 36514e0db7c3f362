"""Adapters of a real ViT-S/14 on four tasks: ``python examples/vits14/run.py --out DIR``.

Fetches weights and images, fits a linear probe, LoRA and HTA adapters on every task, exports the
HTA adapters folded and as side branches, and measures top-1 of all of them on held-out images.

A stage whose result exists in DIR is skipped, so a run that was stopped goes on where it was; to
repeat one, delete its file in ``DIR/results``. About an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import methods
import numpy as np
import torch
from measure import DEPLOYED
from report import write_report
from shared import FetchError
from tasks import TASKS, make_folders
from weights import make_checkpoint

from hhdeploy import HhdeployError

TRAINED = ("probe", "lora", "hta")
PATCH = 14


@dataclass(frozen=True)
class Run:
    """The directory that everything is written to, and what was asked for."""

    out: Path
    setup: methods.Setup

    def adapter(self, method: str, task: str) -> Path:
        """The adapter that ``method`` trained."""
        return self.out / "adapters" / method / task

    def bundle(self, kind: str, task: str) -> Path:
        """The bundle of one task, or of all."""
        name = "branches" if kind == "branches" else f"folded-{task}"
        return self.out / "bundles" / name

    def fit(self, method: str, task: str) -> None:
        """Train one method on one task and store its result."""
        if self._done(method, task):
            return
        data, started = self.out / "data" / task, time.perf_counter()
        if method == "probe":
            logits, labels, search = methods.linear_probe(self.setup, data)
        else:
            adapter, search = self.adapter(method, task), {}
            if method == "lora":
                search = methods.train_lora(self.setup, data / "train", adapter)
            elif not adapter.exists():
                methods.train_hta(self.setup, data / "train", adapter)
            logits, labels = measure.torch_logits(self.setup, adapter, data / "test")
        seconds = round(time.perf_counter() - started)
        self._store(method, task, logits, labels, {"seconds": seconds, **search})

    def deploy(self, way: str, task: str) -> None:
        """Export (and calibrate) what one column needs, and measure it on one task."""
        if self._done(way, task):
            return
        wanted = DEPLOYED[way]
        bundle, data = self.bundle(wanted.bundle, task), self.out / "data"
        if not bundle.exists():
            folded = wanted.bundle == "folded"
            adapters = [self.adapter("hta", name) for name in ([task] if folded else TASKS)]
            measure.export(self.setup, adapters, data, bundle, fold=folded)
        if wanted.precision == "int8":
            measure.calibrate(self.setup, bundle, data)
        test = data / task / "test"
        logits, labels = measure.bundle_logits(self.setup, bundle, task, test, wanted)
        self._store(way, task, logits, labels, {})

    def _file(self, method: str, task: str) -> Path:
        return self.out / "results" / f"{task}-{method}.json"

    def _done(self, method: str, task: str) -> bool:
        return self._file(method, task).exists()

    def _store(
        self, method: str, task: str, logits: np.ndarray, labels: np.ndarray, facts: dict[str, Any]
    ) -> None:
        """Write top-1, predictions and further facts, atomically."""
        predictions = logits.argmax(1)
        right = int((predictions == labels).sum())
        result = {
            "task": task,
            "method": method,
            "top1": round(100 * right / len(labels), 2),
            "test_images": len(labels),
            **facts,
            "labels": labels.tolist(),
            "predictions": predictions.tolist(),
        }
        path = self._file(method, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result) + "\n")
        partial.replace(path)
        print(f"{task}: {method} {result['top1']:.1f} % of {len(labels)}", flush=True)


def main() -> int:
    """Parse the options and make what is missing."""
    ways = (*TRAINED, *DEPLOYED)
    parser = argparse.ArgumentParser(description="ViT-S/14 with HTA, LoRA and a linear probe.")
    parser.add_argument("--out", type=Path, required=True, help="directory for everything")
    parser.add_argument("--cache", type=Path, help="directory of downloads [default: OUT/cache]")
    parser.add_argument("--pretrained", choices=("wheel", "timm"), default="wheel")
    parser.add_argument("--size", type=int, default=56, help="image size, a multiple of 14")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--prepare", action="store_true", help="only weights and images")
    parser.add_argument("--only", nargs="+", choices=ways, default=ways, metavar="METHOD")
    options = parser.parse_args()
    if options.size < PATCH or options.size % PATCH:
        parser.error(f"--size: expected a multiple of {PATCH}, found {options.size}")
    # A terminated run takes the command that it is running with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = options.out.resolve()
    checkpoint = out / "checkpoint.safetensors"
    torch.set_num_threads(options.threads)
    run = Run(out, methods.Setup(checkpoint, options.size, options.epochs, options.threads))
    try:
        cache = (options.cache or out / "cache").resolve()
        make_checkpoint(options.pretrained, cache, checkpoint)
        for task in TASKS:
            make_folders(task, cache, out / "data")
        if options.prepare:
            return 0
        for method in (method for method in TRAINED if method in options.only):
            for task in TASKS:
                run.fit(method, task)
        for way in (way for way in DEPLOYED if way in options.only):
            for task in TASKS:
                run.deploy(way, task)
        write_report(out, run.setup)
    except (FetchError, HhdeployError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: `{' '.join(map(str, error.cmd))}` failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
