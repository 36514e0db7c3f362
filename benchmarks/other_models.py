"""Models of other libraries than timm and transformers: attached, saved, exported, compared.

    python -m benchmarks.other_models [MODEL ...]

Every model is small and random. As a user would: an adapter on all of its Linears is attached,
given random values and saved; the weights are kept as a checkpoint; and what ONNX Runtime answers,
folded and as side branches, is compared with that very torch model in float64. A model whose
package is not installed is reported as such, and the JSON of the last line says so too.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.harness import report
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.errors import HhdeployError
from hhdeploy.exporting.bundles import export
from hhdeploy.parity import compare
from hhdeploy.plan import Reserve
from hhdeploy.runtime import open_session
from hhdeploy.training import attach, save
from tests.support import perturb

BOUND = 1e-5
_SIDE, _CLASSES, _IMAGES = 32, 7, 3
_VIT = {"image_size": _SIDE, "patch_size": 8, "num_classes": _CLASSES, "dim": 48, "mlp_dim": 96}
_HEADS = {"heads": 3, "dim_head": 16}
_DEEP = {**_VIT, **_HEADS, "depth": 2}
_SWIN = {"patch_size": [2, 2], "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3]}


@dataclass(frozen=True)
class Other:
    """A model of another library.

    Attributes:
        package: as it is installed.
        path: module and name in it, with a colon between.
        args: of the call.
        classifier: module path of the classifier, where it is not the last Linear.
        targets: what the adapter is on, where that is not all Linears.
    """

    package: str
    path: str
    args: Mapping[str, Any] = field(default_factory=dict)
    classifier: str | None = None
    targets: str = ".*"

    def installed(self) -> str:
        """Its version, or ""."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return ""


class Tower(nn.Module):
    """The image tower of a model of open_clip with a classifier behind it."""

    def __init__(self, **args: Any) -> None:
        super().__init__()
        kind = import_module("open_clip.transformer").VisionTransformer
        self.tower = kind(image_size=_SIDE, patch_size=8, **args)
        self.head = nn.Linear(args["output_dim"], _CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.tower(images))
        return logits


class First(nn.Module):
    """A model that returns a pair, of which the first counts (MONAI's)."""

    def __init__(self, **args: Any) -> None:
        super().__init__()
        self.inner = import_module("monai.networks.nets").ViT(**args)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images)[0]
        return logits


def wrapped(**args: Any) -> nn.Module:
    """x-transformers keeps its sizes in a part."""
    library = import_module("x_transformers")
    model: nn.Module = library.ViTransformerWrapper(
        image_size=_SIDE,
        patch_size=8,
        num_classes=_CLASSES,
        attn_layers=library.Encoder(dim=48, depth=2, heads=3, attn_dim_head=16, **args),
    )
    return model


_HERE = "benchmarks.other_models"
_MONAI = {"in_channels": 3, "img_size": (_SIDE, _SIDE), "patch_size": (8, 8), "hidden_size": 48}
_TORCHVISION = "torchvision.models"
_TOWER = {"width": 48, "layers": 2, "heads": 3, "mlp_ratio": 2.0, "output_dim": 24}
MODELS: Mapping[str, Other] = {
    "torchvision ViT": Other(
        "torchvision",
        f"{_TORCHVISION}.vision_transformer:VisionTransformer",
        {"image_size": _SIDE, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48}
        | {"mlp_dim": 96, "num_classes": _CLASSES},
    ),
    "torchvision Swin": Other(
        "torchvision",
        f"{_TORCHVISION}.swin_transformer:SwinTransformer",
        {**_SWIN, "window_size": [4, 4], "num_classes": _CLASSES},
    ),
    "torchvision Swin v2": Other(
        "torchvision",
        f"{_HERE}:swin_v2",
        {**_SWIN, "window_size": [4, 4], "num_classes": _CLASSES},
        # The Linears of its positions see no image: their adapters can only be folded.
        targets=r".*\.(attn\.(qkv|proj)|mlp\.\d)",
    ),
    "torchvision MaxViT": Other(
        "torchvision",
        f"{_TORCHVISION}.maxvit:MaxVit",
        {"input_size": (_SIDE, _SIDE), "stem_channels": 8, "partition_size": 4, "head_dim": 8}
        | {"block_channels": [16, 16], "block_layers": [1, 1], "num_classes": _CLASSES}
        | {"stochastic_depth_prob": 0.1},
    ),
    "open_clip tower": Other("open_clip_torch", f"{_HERE}:Tower", _TOWER, "head"),
    "open_clip tower, tokens pooled by attention": Other(
        "open_clip_torch",
        f"{_HERE}:Tower",
        {**_TOWER, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 3},
        "head",
    ),
    "vit-pytorch ViT": Other("vit-pytorch", "vit_pytorch:ViT", _DEEP),
    "vit-pytorch ViT, mean": Other("vit-pytorch", "vit_pytorch:ViT", {**_DEEP, "pool": "mean"}),
    "vit-pytorch SimpleViT": Other("vit-pytorch", "vit_pytorch:SimpleViT", _DEEP),
    "vit-pytorch DeepViT": Other("vit-pytorch", "vit_pytorch.deepvit:DeepViT", _DEEP),
    "vit-pytorch CaiT": Other(
        "vit-pytorch", "vit_pytorch.cait:CaiT", {**_DEEP, "cls_depth": 1, "dropout": 0.1}
    ),
    "vit-pytorch XCiT": Other("vit-pytorch", "vit_pytorch.xcit:XCiT", {**_DEEP, "cls_depth": 1}),
    "vit-pytorch CCT": Other(
        "vit-pytorch",
        "vit_pytorch.cct:CCT",
        {"img_size": _SIDE, "embedding_dim": 48, "num_layers": 2, "num_heads": 3}
        | {"n_conv_layers": 1, "kernel_size": 3, "num_classes": _CLASSES},
    ),
    "vit-pytorch parallel ViT": Other("vit-pytorch", "vit_pytorch.parallel_vit:ViT", _DEEP),
    "vit-pytorch ViT with registers": Other(
        "vit-pytorch",
        "vit_pytorch.simple_vit_with_register_tokens:SimpleViT",
        {**_DEEP, "num_register_tokens": 2},
    ),
    "vit-pytorch RvT": Other("vit-pytorch", "vit_pytorch.rvt:RvT", _DEEP),
    "vit-pytorch RegionViT": Other(
        "vit-pytorch",
        "vit_pytorch.regionvit:RegionViT",
        {"dim": (12, 12, 24, 24), "depth": (1, 1, 1, 1), "window_size": 2}
        | {"num_classes": _CLASSES},
    ),
    "MONAI ViT": Other(
        "monai",
        f"{_HERE}:First",
        {**_MONAI, "mlp_dim": 96, "num_layers": 2, "num_heads": 3, "classification": True}
        | {"num_classes": _CLASSES, "spatial_dims": 2, "post_activation": ""},
    ),
    "x-transformers ViT": Other("x-transformers", f"{_HERE}:wrapped"),
    "x-transformers ViT, gated and rotary": Other(
        "x-transformers",
        f"{_HERE}:wrapped",
        {"ff_glu": True, "use_rmsnorm": True, "attn_qk_norm": True, "attn_gate_values": True},
    ),
}  # fmt: skip


def swin_v2(**args: Any) -> nn.Module:
    """torchvision's second version takes its blocks as arguments."""
    library = import_module("torchvision.models.swin_transformer")
    model: nn.Module = library.SwinTransformer(
        **args, block=library.SwinTransformerBlockV2, downsample_layer=library.PatchMergingV2
    )
    return model


def made(name: str) -> nn.Module:
    """The model; what an export calls (``python:benchmarks.other_models:made``)."""
    other = MODELS[name]
    module, _, function = other.path.partition(":")
    make: Callable[..., nn.Module] = getattr(import_module(module), function)
    model = make(**other.args)
    if other.classifier is not None:
        model.pretrained_cfg = {"classifier": other.classifier}  # type: ignore[assignment]
    return model.eval()


def measure(name: str) -> dict[str, Any]:
    """Errors over the range of the logits, or why there are none."""
    other = MODELS[name]
    if not (version := other.installed()):
        return {"package": other.package, "result": f"{other.package} is not installed"}
    row = {"package": f"{other.package} {version}"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            return row | _errors(name, Path(folder))
        except HhdeployError as error:
            return row | {"result": f"refused: {_line(error)}"}
        except Exception as error:  # noqa: BLE001  (a traceback is a finding)
            return row | {"result": f"wrong: {type(error).__name__}: {_line(error)}"}


def _errors(name: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    other, model = MODELS[name], made(name)
    perturb(model)
    torch.save(model.state_dict(), folder / "weights.pth")
    noise = np.random.default_rng(0).standard_normal((_IMAGES, 3, _SIDE, _SIDE), np.float32)
    truth = {"backbone": _answers(model, noise)}
    attach(model, AdapterConfig(name, num_classes=5, r=2, target_modules=(other.targets,)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    save(model, folder / "task")
    truth["task"] = _answers(model, noise)
    errors: dict[str, float] = {}
    for form in ("folded", "branches"):
        fold = form == "folded"
        export(
            f"python:{_HERE}:made",
            {"task": folder / "task"},
            folder / form,
            model_args={"name": name},
            checkpoint=folder / "weights.pth",
            input_size=(3, _SIDE, _SIDE),
            fold=fold,
            reserve=Reserve() if fold else Reserve(keep_backbone_head=True),
        )
        with open_session(folder / form, device="cpu", threads=1) as session:
            for row in ("task",) if fold else tuple(truth):
                asked = None if row == "backbone" else row
                found = session.run(noise, [asked] * _IMAGES)[:, : truth[row].shape[1]]
                key = row if row == "backbone" else form
                errors[key] = compare(truth[row], found).range_error
    return errors | {"result": verdict(errors)}


def verdict(errors: Mapping[str, float]) -> str:
    """Of the errors over the range of the logits."""
    worst = max(errors.values())
    return "verified" if worst <= BOUND else f"wrong: {worst:.0e}"


def _answers(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.no_grad():
        found: NDArray[np.float64] = model.double()(torch.from_numpy(images).double()).numpy()
    model.float()
    return found


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


@click.command()
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
def main(models: Sequence[str]) -> None:
    """Export them, and compare with torch; exit code 1 if anything is wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name in models or MODELS:
        results[name] = measure(name)
        print(f"{name}: {results[name]['result']}", flush=True)
    report("other_models", results, threads=1)
    sys.exit(int(any(row["result"].startswith("wrong") for row in results.values())))


if __name__ == "__main__":
    main()
