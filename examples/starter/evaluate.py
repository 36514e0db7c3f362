"""Measure linear probes and trained adapters on held-out images, and write results.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import backbone
import fetch_data
import pretrain
import recipes
import torch
from fetch_data import load_task
from frozen import features
from parts import TASKS, Part, split
from probe import linear_probe, top1

from hhdeploy import load_adapter
from hhdeploy.training import attach


def adapter_top1(checkpoint: Path, directory: Path, test: Part) -> tuple[float, int, int]:
    """Return top-1 in percent and the adapter's parameters, without and with its classifier."""
    adapter = load_adapter(directory)
    if adapter.head is None:
        raise ValueError(f"{directory}: a starter adapter must bring its classifier")
    expected, found = backbone.PREPROCESS, adapter.config.preprocess
    if found is None or found.to_json() != expected:
        raise ValueError(f"{directory}: expected preprocess {expected}, found {found}")
    model = attach(backbone.load(checkpoint), adapter).eval()
    with torch.no_grad():
        logits = model.get_classifier()(features(model, backbone.resize(test.images)))
    own = sum(site.parameters for site in adapter.sites.values())
    head = adapter.head.weight.size + adapter.head.bias.size
    return top1(logits, torch.from_numpy(test.labels)), own, own + head


def evaluate(cache: Path, checkpoint: Path, adapters: Path, out: Path) -> None:
    """Write ``out`` with one entry a task; tasks without a trained adapter only get the probe."""
    tasks: dict[str, Any] = {}
    for name in TASKS:
        parts = split(load_task(cache, name))
        recipe = recipes.RECIPES[name]
        probe = linear_probe(backbone.load(checkpoint), parts, recipe)
        entry = {
            "classes": int(parts["train"].labels.max()) + 1,
            "images": {key: len(part.labels) for key, part in parts.items()},
            "recipe": asdict(recipe),
            "linear_probe_top1": round(probe.top1, 2),
            "linear_probe_learning_rate": probe.learning_rate,
            "linear_probe_converged_top1": round(probe.top1_converged, 2),
        }
        if (adapters / name / "adapter_config.json").exists():
            score, own, whole = adapter_top1(checkpoint, adapters / name, parts["test"])
            entry["adapter_top1"] = round(score, 2)
            entry["adapter_parameters"] = own
            entry["adapter_parameters_with_head"] = whole
        tasks[name] = entry
        print(f"{name}: {json.dumps(entry)}", flush=True)
    seeds = {"split": fetch_data.SEED, "pretraining": pretrain.SEED, "training": recipes.SEED}
    out.write_text(json.dumps({"seeds": seeds, "tasks": tasks}, indent=2) + "\n")
