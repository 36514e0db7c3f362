"""Top-1 on the test images: of the training-time model, and of bundles in their runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from methods import BATCH, Setup, hhdeploy, load_folder

from hhdeploy import load_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.bundle import Bundle
from hhdeploy.runtime import open_session
from hhdeploy.training import attach


@dataclass(frozen=True)
class Deployed:
    """One way to run the HTA adapters.

    Attributes:
        bundle: ``folded`` (a bundle a task) or ``branches`` (one bundle for all).
        device: of `hhdeploy.runtime.open_session`.
        precision: float32 and bfloat16 need nothing more; int8 is calibrated first, on
            training images.
    """

    bundle: str
    device: str
    precision: str


DEPLOYED = {
    "folded-float32": Deployed("folded", "cpu", "float32"),
    "branches-float32": Deployed("branches", "cpu", "float32"),
    "folded-bfloat16": Deployed("folded", "openvino", "bfloat16"),
    "branches-bfloat16": Deployed("branches", "openvino", "bfloat16"),
    "folded-int8": Deployed("folded", "cpu", "int8"),
    "branches-int8": Deployed("branches", "cpu", "int8"),
}


def torch_logits(setup: Setup, adapter: Path, test: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the training-time model, float32 [n, classes], and labels [n]."""
    backbone = load_backbone(setup.backbone)
    loaded = load_adapter(adapter)
    images, labels = load_folder(test, loaded.config.preprocess or backbone.facts.preprocess)
    model = attach(backbone.model, loaded).eval()
    with torch.no_grad():
        parts = [model(batch) for batch in torch.split(torch.from_numpy(images), BATCH)]
    return torch.cat(parts).numpy(), labels


def export(setup: Setup, adapters: list[Path], data: Path, out: Path, *, fold: bool) -> None:
    """Export one folded adapter or a bank of several, verified on test images."""
    named = [option for adapter in adapters for option in ("--adapter", str(adapter))]
    hhdeploy(
        "export", *(["--fold"] if fold else []), *setup.model_options(), *named,
        "--verify-data", data / "by-task" / "test", "--verify-images", "8", out,
    )  # fmt: skip


def calibrate(setup: Setup, bundle: Path, data: Path) -> None:
    """Add an INT8 graph to a bundle, calibrated on training images, unless it has one."""
    if "int8" not in Bundle.open(bundle).manifest.graphs:
        hhdeploy(
            "calibrate", bundle, "--data", data / "by-task" / "train", "--precision", "int8",
            "--threads", str(setup.threads),
        )  # fmt: skip


def bundle_logits(
    setup: Setup, bundle: Path, task: str, test: Path, way: Deployed
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a bundle, float32 [n, the task's classes], and labels [n]."""
    with open_session(
        bundle, device=way.device, precision=way.precision, threads=setup.threads
    ) as session:
        entry = session.entry(task)
        assert entry is not None
        images, labels = load_folder(test, entry.preprocess)
        starts = range(0, len(images), BATCH)
        parts = [session.run(images[at : at + BATCH], adapters=task) for at in starts]
    return np.concatenate(parts)[:, : entry.classes], labels
