"""Models of transformers as large as they are used, against transformers itself.

    python -m benchmarks.real_sizes [--images 2] [MODEL ...]

Every model has the sizes of a published one and random weights, perturbed; it is saved, exported
from there with one adapter folded and with two as side branches, and what ONNX Runtime answers is
compared with the saved model as transformers loads it, with its own attention, in eval mode and
float64, the adapter attached. One model at a time, in a process of its own.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import THREADS, report
from benchmarks.models import random_adapter, work_directory
from hhdeploy.adapters.format import Adapter, save_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.exporting.bundles import export
from hhdeploy.parity import compare
from hhdeploy.plan import Reserve
from hhdeploy.runtime import open_session
from tests.support import perturb

BOUND = 1e-5
_SIZE = (3, 224, 224)
_LABELS = {"num_labels": 1000}
# Class of transformers, and what its configuration has other than by default.
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ViT-B/16": ("ViTForImageClassification", _LABELS),
    "DINOv2-S/14": (
        "Dinov2ForImageClassification",
        # As published: its positions are those of 518 px, and shrunk to the images'.
        {**_LABELS, "hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
        | {"patch_size": 14},
    ),
    "Swin-T": ("SwinForImageClassification", _LABELS),
    "DeiT-B/16": ("DeiTForImageClassification", _LABELS),
    "BEiT-B/16": (
        "BeitForImageClassification",
        {**_LABELS, "use_relative_position_bias": True, "use_mask_token": False},
    ),
    "SigLIP-B/16": ("SiglipForImageClassification", _LABELS),
    "CLIP-B/16": (
        "CLIPForImageClassification",
        {**_LABELS, "vision_config": {"patch_size": 16}},
    ),
}


@click.command()
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--images", default=2, show_default=True)
def main(models: Sequence[str], images: int) -> None:
    """Export them, and compare with transformers; exit code 1 beyond the bound."""
    results: dict[str, Any] = {}
    print("| model | parameters | folded | side branches | backbone |\n|---|---|---|---|---|")
    for name in models or MODELS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(measure, name, images).result()
        errors = " | ".join(f"{found[key]:.0e}" for key in ("folded", "branches", "backbone"))
        print(f"| {name} | {found['parameters'] / 1e6:.1f} M | {errors} |", flush=True)
        results[name] = found
    report("real_sizes", results)
    worst = max(max(r["folded"], r["branches"], r["backbone"]) for r in results.values())
    sys.exit(int(not worst <= BOUND))


def measure(name: str, images: int) -> dict[str, Any]:
    """The largest errors over the range of the logits, and what they were measured on."""
    root = work_directory() / "real" / name.replace("/", "-")
    shutil.rmtree(root, ignore_errors=True)
    started = time.perf_counter()
    try:
        parameters = _save(name, root / "model")
        spec = BackboneSpec(f"transformers:{root / 'model'}", input_size=_SIZE)
        facts = load_backbone(spec).facts
        adapters = {f"task{i}": random_adapter(facts, i) for i in range(2)}
        for label, adapter in adapters.items():
            save_adapter(adapter, root / label)
        noise = np.random.default_rng(0).standard_normal((images, *_SIZE), np.float32)
        truth: dict[str, NDArray[np.float64]] = {
            label: _truth(root / "model", adapters.get(label), noise)
            for label in ("backbone", *adapters)
        }
        errors = _folded(root, truth, noise) | _branches(root, truth, noise)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = round(time.perf_counter() - started)
    return {"parameters": parameters, **errors, "images": images, "seconds": seconds}


def _save(name: str, folder: Path) -> int:
    """A random, perturbed model in transformers' own files; the number of its parameters."""
    import torch
    import transformers

    kind, config = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**config)).eval()
    perturb(model, classifier="classifier")
    model.save_pretrained(folder)
    return int(sum(p.numel() for p in model.parameters()))


def _truth(
    folder: Path, adapter: Adapter | None, images: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Logits in float64 of transformers' model, loaded by transformers, the adapter attached."""
    import torch
    import transformers

    from hhdeploy.training import attach

    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    if adapter is not None:
        attach(model, adapter)
    with torch.no_grad():
        found = model.double()(torch.from_numpy(images).double())
    logits: NDArray[np.float64] = found.logits.numpy()
    return logits


def _folded(
    root: Path, truth: Mapping[str, NDArray[np.float64]], images: NDArray[np.float32]
) -> dict[str, float]:
    _export(root, ["task0"], fold=True)
    with open_session(root / "bundle", device="cpu", threads=THREADS) as session:
        found = session.run(images)
    return {"folded": compare(truth["task0"], found).range_error}


def _branches(
    root: Path, truth: Mapping[str, NDArray[np.float64]], images: NDArray[np.float32]
) -> dict[str, float]:
    """Both adapters and the backbone, each image by all of them, in one batch."""
    labels = list(truth)
    _export(root, labels[1:], fold=False)
    names = [None if label == "backbone" else label for label in labels for _ in images]
    with open_session(root / "bundle", device="cpu", threads=THREADS) as session:
        rows = session.run(np.concatenate([images] * len(labels)), names)
    errors = {}
    for label, found in zip(labels, np.split(rows, len(labels)), strict=True):
        expected = truth[label]
        errors[label] = compare(expected, found[:, : expected.shape[1]]).range_error
    backbone = errors.pop("backbone")
    return {"branches": max(errors.values()), "backbone": backbone}


def _export(root: Path, labels: Sequence[str], *, fold: bool) -> None:
    export(
        f"transformers:{root / 'model'}",
        {label: root / label for label in labels},
        root / "bundle",
        fold=fold,
        input_size=_SIZE,
        reserve=Reserve() if fold else Reserve(keep_backbone_head=True),
        verify=False,
        cache=root / "cache",
        overwrite=True,
    )


if __name__ == "__main__":
    main()
