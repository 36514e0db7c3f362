"""INT8 accuracy of the starter models on whole test parts: ``python examples/starter/int8.py OUT``.

Exports the four adapters as side branches, calibrates INT8 on training images, and compares
top-1 on every held-out image (4,748 in all) in ONNX Runtime and OpenVINO. Fetches the data as
``make.py`` does. Writes ``OUT/int8.json``; about six minutes on one CPU thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from fetch_data import CACHE, FetchError, load_task
from parts import TASKS, Part, split, write_folder
from PIL import Image

from hhdeploy.bundle import Bundle
from hhdeploy.runtime import Session, open_session

HERE = Path(__file__).resolve().parent
BATCH = 100
# Name -> device and precision of `open_session`.
WAYS = {
    "float32": ("cpu", "float32"),
    "INT8 in ONNX Runtime": ("cpu", "int8"),
    "INT8 in OpenVINO": ("openvino", "int8"),
    "bfloat16 in OpenVINO": ("openvino", "bfloat16"),
}


def hhdeploy(*arguments: object) -> None:
    """Run one ``hhdeploy`` command."""
    command = Path(sys.executable).with_name("hhdeploy")
    subprocess.run([str(command), *map(str, arguments)], check=True)


def make_bundle(parts: dict[str, dict[str, Part]], names: dict[str, np.ndarray], out: Path) -> Path:
    """Export and calibrate, unless it was done."""
    bundle, images = out / "bundle", out / "train"
    if not bundle.exists():
        about = json.loads((HERE / "backbone.json").read_text())
        adapters = [option for task in TASKS for option in ("--adapter", HERE / "adapters" / task)]
        hhdeploy(
            "export", "--model", about["model"], "--checkpoint", HERE / "backbone.safetensors",
            *adapters, "--keep-backbone-head", "--verify-data", HERE / "images", bundle,
        )  # fmt: skip
    if "int8" not in Bundle.open(bundle).manifest.graphs:
        for task in TASKS:
            write_folder(parts[task]["train"], names[task], images / task)
        hhdeploy("calibrate", bundle, "--data", images, "--precision", "int8")
    return bundle


def logits_of(session: Session, task: str, test: Part) -> np.ndarray:
    """float32 [n, the task's classes]."""
    entry = session.entry(task)
    assert entry is not None
    found = [
        session.run(session.preprocess([Image.fromarray(i) for i in images], task), task)
        for images in np.array_split(test.images, max(1, len(test.images) // BATCH))
    ]
    return np.concatenate(found)[:, : entry.classes]


def measure(bundle: Path, tests: dict[str, Part], threads: int) -> dict[str, Any]:
    """Way -> task -> top-1 in percent, equal answers and noise against float32."""
    truth: dict[str, np.ndarray] = {}
    results: dict[str, Any] = {}
    for way, (device, precision) in WAYS.items():
        with open_session(bundle, device=device, precision=precision, threads=threads) as session:
            results[way] = {"runtime": session.device}
            for task, test in tests.items():
                logits = logits_of(session, task, test)
                exact = truth.setdefault(task, logits).astype(np.float64)
                noise = np.square(logits - exact).sum()
                results[way][task] = {
                    "images": len(test.labels),
                    "top1": round(100 * float((logits.argmax(1) == test.labels).mean()), 2),
                    "same": round(100 * float((logits.argmax(1) == exact.argmax(1)).mean()), 2),
                    "sqnr_db": round(10 * float(np.log10(np.square(exact).sum() / noise)), 1)
                    if noise
                    else None,
                }
        mean = np.mean([results[way][task]["top1"] for task in tests])
        results[way]["mean_top1"] = round(float(mean), 2)
        print(f"{way:22}", results[way], flush=True)
    return results


def main() -> int:
    """Fetch, export, calibrate, measure, store."""
    parser = argparse.ArgumentParser(description="INT8 accuracy of the starter models.")
    parser.add_argument("out", type=Path, help="directory for bundle and results")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory for downloads")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        tasks = {name: load_task(options.cache.resolve(), name) for name in TASKS}
        parts = {name: split(task) for name, task in tasks.items()}
        names = {name: task.class_names for name, task in tasks.items()}
        bundle = make_bundle(parts, names, options.out)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: `{' '.join(error.cmd)}` failed", file=sys.stderr)
        return 1
    results = measure(bundle, {name: part["test"] for name, part in parts.items()}, options.threads)
    (options.out / "int8.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
