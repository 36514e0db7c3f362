"""``results.json`` and a Markdown table from the stored results of all tasks and methods."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import methods
import numpy as np
import tasks
from weights import MODEL

from hhdeploy import load_adapter

COLUMNS = {
    "probe": "linear probe",
    "lora": "LoRA",
    "hta": "HTA",
    "folded-float32": "folded FP32",
    "branches-float32": "branches FP32",
    "folded-bfloat16": "folded BF16",
    "branches-bfloat16": "branches BF16",
    "folded-int8": "folded INT8",
    "branches-int8": "branches INT8",
}
_PACKAGES = "hhdeploy torch timm peft onnx onnxruntime openvino nncf numpy".split()
Stored = dict[str, dict[str, Any]]


def sign_test(first: int, second: int) -> float:
    """Return the exact two-sided p of ``first`` against ``second`` under equal chances.

    McNemar's test, when these count the images that only one of two methods gets right.
    """
    n = first + second
    tail: float = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two methods image by image."""
    labels = np.array(one["labels"])
    right = np.array(one["predictions"]) == labels, np.array(other["predictions"]) == labels
    wins, losses = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return {"only_first": wins, "only_second": losses, "p": float(f"{sign_test(wins, losses):.2g}")}


def _read(results: Path, task: str) -> Stored:
    files = {method: results / f"{task}-{method}.json" for method in COLUMNS}
    return {method: json.loads(f.read_text()) for method, f in files.items() if f.exists()}


def _summary(stored: Stored) -> dict[str, Any]:
    """One task's part of results.json: no predictions, but what they say."""
    summary: dict[str, Any] = {}
    hidden = ("task", "method", "labels", "predictions", "test_images")
    for method, result in stored.items():
        summary[method] = {key: value for key, value in result.items() if key not in hidden}
        if "-" in method and "hta" in stored:
            changed = np.array(result["predictions"]) != np.array(stored["hta"]["predictions"])
            summary[method]["answers_unlike_pytorch"] = int(changed.sum())
    for other in ("probe", "lora"):
        if "hta" in stored and other in stored:
            summary[f"hta_vs_{other}"] = paired(stored["hta"], stored[other])
    return summary


def _parameters(out: Path, task: str) -> dict[str, int]:
    """Trained values of the adapters on disk, without and with the classifier.

    LoRA's are counted as PEFT trained them: q, k and v of one Linear share one lora_A.
    """
    counts = {}
    for method in ("lora", "hta"):
        path = out / "adapters" / method / task
        if path.exists():
            adapter = load_adapter(path)
            own = sum(site.parameters for site in adapter.sites.values())
            if method == "lora":
                shared = [s for name, s in adapter.sites.items() if name.endswith((".k", ".v"))]
                own -= sum(site.lora_A.size for site in shared if site.lora_A is not None)
            counts[method] = own
    return counts


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a task, a column a method, top-1 in percent."""
    columns = [method for method in COLUMNS if any(method in s for s in summaries.values())]
    lines = [
        "| task | " + " | ".join(COLUMNS[method] for method in columns) + " | test images |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for task, summary in summaries.items():
        cells = [f"{summary[m]['top1']:.1f}" if m in summary else "" for m in columns]
        lines.append(f"| {task} | {' | '.join(cells)} | {summary['images']['test']:,} |")
    return "\n".join(lines)


def write_report(out: Path, setup: methods.Setup) -> None:
    """Write ``OUT/results.json`` and ``OUT/table.md`` from what has been measured so far."""
    summaries = {}
    for task in tasks.TASKS:
        stored = _read(out / "results", task)
        if stored:
            data = out / "data" / task
            images = {side: len(list(data.glob(f"{side}/*/*.png"))) for side in ("train", "test")}
            parameters = _parameters(out, task)
            summaries[task] = {
                "images": images, "adapter_parameters": parameters, **_summary(stored)
            }  # fmt: skip
    content = {
        "model": MODEL,
        "image_size": setup.size,
        "recipe": {"epochs": setup.epochs, "batch_size": 32, "hta_learning_rate": 5e-3},
        "lora": methods.LORA,
        "seeds": {"split": tasks.SEED, "training": methods.SEED},
        "machine": {"cpu": _cpu(), "threads": setup.threads},
        "versions": _versions(),
        "tasks": summaries,
    }
    (out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    text = table(summaries)
    (out / "table.md").write_text(text + "\n")
    print(text)
