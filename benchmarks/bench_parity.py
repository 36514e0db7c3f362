"""How far exports are from the float64 training-time model: real sizes, and 16 bits.

    python -m benchmarks.bench_parity [--model ViT-B/16] [--images 4]

Perturbed random weights, random adapters of real size: one folded, four as side branches in a mixed
batch. The starter models in float16 and bfloat16 on the images that come with them. Nothing here is
timed: other work beside it changes no figure.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_file

from benchmarks.harness import report
from benchmarks.models import STARTER, random_adapter, work_directory
from hhdeploy.adapters.format import save_adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.cli.starter import Starter
from hhdeploy.exporting.bundles import ExportResult, export
from hhdeploy.parity import Comparison
from tests.support import perturb

MODELS = {
    "ViT-B/16": "vit_base_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "EVA-02-Ti": "eva02_tiny_patch14_224",
    "BEiT-B": "beit_base_patch16_224",
}
ADAPTERS = 4
_EVERY = 10_000


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)))
@click.option("--images", default=4, show_default=True, help="Of each adapter.")
def main(models: tuple[str, ...], images: int) -> None:
    found = {name: errors(MODELS[name], images) for name in models or MODELS}
    report("parity", {"images of an adapter": images, "models": found, "rounding": rounding()})


def errors(model: str, images: int) -> dict[str, float]:
    """Way -> largest error over the range."""
    root = work_directory() / "parity"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    adapters, checkpoint = _made(model, root)
    ways: Mapping[str, tuple[bool, int]] = {"folded": (True, 1), "side branches": (False, ADAPTERS)}
    found = {}
    for way, (fold, count) in ways.items():
        exported = export(
            model,
            dict(list(adapters.items())[:count]),
            root / way,
            fold=fold,
            checkpoint=checkpoint,
            verify_images=images,
            cache=None,
        )
        found[way] = max(c.range_error for c in _comparisons(exported))
        print(f"{model}, {way}: {found[way]:.1e}", flush=True)
    shutil.rmtree(root)
    return found


def _made(model: str, root: Path) -> tuple[dict[str, Path], Path]:
    """Adapters of a perturbed backbone, and its weights."""
    checkpoint = root / "backbone.safetensors"
    backbone = load_backbone(BackboneSpec(model, pretrained=False))
    perturb(backbone.model)
    save_file({k: v.contiguous() for k, v in backbone.model.state_dict().items()}, checkpoint)
    facts = load_backbone(BackboneSpec(model, checkpoint=checkpoint)).facts
    adapters = {f"task{seed}": root / f"task{seed}" for seed in range(ADAPTERS)}
    for seed, path in enumerate(adapters.values()):
        save_adapter(random_adapter(facts, seed), path)
    return adapters, checkpoint


def rounding() -> dict[str, dict[str, Any]]:
    """Precision -> share of images with the same answer, and the least cosine."""
    starter, out = Starter.read(STARTER), work_directory() / "parity-starter"
    shutil.rmtree(out, ignore_errors=True)
    exported = export(
        starter.model,
        {task: starter.adapter(task) for task in starter.tasks},
        out,
        model_args=starter.args,
        checkpoint=STARTER / "backbone.safetensors",
        precisions=["float16", "bfloat16"],
        verify_data=STARTER / "images",
        verify_images=_EVERY,
    )
    found = {}
    for precision in ("float16", "bfloat16"):
        compared = list(_comparisons(exported, precision))
        images = sum(c.images for c in compared)
        found[precision] = {
            "images": images,
            "top1": sum(c.images * (c.top1 or 0.0) for c in compared) / images,
            "cosine": min(c.cosine or 0.0 for c in compared),
        }
    shutil.rmtree(out)
    return found


def _comparisons(exported: ExportResult, precision: str = "float32") -> Iterable[Comparison]:
    assert exported.parity is not None
    return (s.comparison for s in exported.parity.stages if s.precision == precision)


if __name__ == "__main__":
    main()
