"""Engines of real architectures, built by TensorRT-RTX: seconds, and bytes against weights.

python -m benchmarks.build_engines [MODEL ...]

Every model has side branches on q, k, v and proj, dynamic batch and slots. INT8 and FP8 graphs
are calibrated on the starter models' images: the weights are random, so nothing is said of
accuracy here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.harness import machine
from benchmarks.models import bundle, calibrated
from hhdeploy.building import BuildOptions, build
from hhdeploy.bundle import Bundle

MODELS = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", {}),
    "ViT-S/16": ("vit_small_patch16_224", {}),
    "ViT-B/16": ("vit_base_patch16_224", {}),
    "Swin-T": ("swin_tiny_patch4_window7_224", {}),
    "DeiT3-S": ("deit3_small_patch16_224", {}),
    "EVA-02-Ti": ("eva02_tiny_patch14_224", {}),
    "DINOv2-S/14": ("vit_small_patch14_dinov2", {"img_size": 224, "num_classes": 10}),
}
PRECISIONS = ("float32", "float16", "int8", "fp8")


@dataclass(frozen=True)
class Row:
    """One engine."""

    model: str
    precision: str
    seconds: float
    engine_mb: float
    weights_mb: float


def measure(label: str, precisions: Sequence[str]) -> list[Row]:
    """Build one model in several precisions."""
    name, args = MODELS[label]
    path = bundle(name, "branches", args=args)
    rows = []
    for precision in precisions:
        if precision in ("int8", "fp8"):
            calibrated(path, precision)
        architectures = ("sm89",) if precision == "fp8" else ()
        options = BuildOptions(architectures=architectures)
        entry = build(path, backend="tensorrt-rtx", precision=precision, options=options)
        graph = Bundle.open(path).manifest.graphs[precision]
        weights = (path / f"{graph}.data").stat().st_size
        rows.append(Row(label, precision, entry.build_seconds, entry.bytes / 1e6, weights / 1e6))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Build, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    arguments = parser.parse_args()
    rows = [
        row
        for label in arguments.models
        for row in measure(label, arguments.precision or PRECISIONS)
    ]
    results = [asdict(row) for row in rows]
    print(json.dumps({"benchmark": "build_engines", "machine": machine(), "results": results}))


if __name__ == "__main__":
    main()
