"""Adapters of every method of the installed PEFT on tiny models, with random values.

`METHODS` has the arguments that a method needs on a model of width 64; methods that a later PEFT
adds are tried with their defaults.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hhdeploy.adapters.applying import logits_with, parameters_with
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import Backbone, BackboneSpec

CLASSES, SIZE = 5, 32
# Of the logits' range: float32 tensors of an adapter, computed in float64.
BOUND = 1e-5
Array = NDArray[np.float64]

# Inputs or tokens instead of weights: there is nothing to merge, whatever the model.
PROMPTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "POLY"),
    *("XLORA", "ADAPTION_PROMPT", "CARTRIDGE", "TRAINABLE_TOKENS"),
)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 1, "tfinal": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "LOHA": {"r": 3},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 16, "r": 0},
    "PSOFT": {"r": 8},
    "PVERA": {"r": 8},
    "ROAD": {"group_size": 16},
    "VBLORA": {"num_vectors": 16, "vector_length": 16, "topk": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 50},
}


@dataclass(frozen=True)
class Names:
    """What a model calls its parts.

    Attributes:
        square: Linears whose input and output are equally wide.
        linears: ends of the paths of all Linears of attention and MLP.
        ffn: the MLP's second Linear.
        norm: the first norm of a block.
        head: the classifier.
    """

    square: tuple[str, ...]
    linears: tuple[str, ...]
    ffn: str
    norm: str
    head: str


TIMM = Names(
    ("attn.proj",), ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), "mlp.fc2", "norm1", "head"
)
TRANSFORMERS = Names(
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.fc1", "mlp.fc2"),
    "mlp.fc2",
    "layernorm_before",
    "classifier",
)


def timm_vit() -> tuple[Backbone, Names]:
    """A ViT of timm, two blocks of width 64."""
    args = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    spec = BackboneSpec(
        "vit_tiny_patch16_224", {**args, "num_classes": CLASSES}, pretrained=False, seed=1
    )
    return _perturbed(load_backbone(spec)), TIMM


def transformers_vit(folder: Path) -> tuple[Backbone, Names]:
    """The same shape as transformers has it, saved below ``folder``."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=SIZE,
        patch_size=8,
        num_labels=CLASSES,
    )
    torch.manual_seed(1)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    return _perturbed(load_backbone(BackboneSpec(f"transformers:{folder / 'vit'}"))), TRANSFORMERS


def _perturbed(backbone: Backbone) -> Backbone:
    """Biases, norms and the head of a size that matters, as in a trained model."""
    from hhdeploy.backbones.structure import base_sha256

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sorted(backbone.model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.3 * noise)
            elif p.ndim == 2:
                p.copy_(noise / p.shape[1] ** 0.5)
            else:
                p.copy_(0.3 * noise)
    facts = backbone.facts
    digest = base_sha256(backbone.model, facts.classifier)
    return replace(backbone, facts=replace(facts, sha256=digest))


def images(count: int = 3) -> NDArray[np.float32]:
    """Seeded noise."""
    return np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)


def arguments_of(method: str, names: Names) -> dict[str, Any]:
    """Arguments of a method's configuration, targets included."""
    arguments = dict(METHODS.get(method, {}))
    if method == "LN_TUNING":
        return {**arguments, "target_modules": [names.norm]}
    square = method in ("VERA", "PVERA")
    return {**arguments, "target_modules": list(names.square if square else names.linears)}


def trained(backbone: Backbone, method: str, arguments: Mapping[str, Any], seed: int = 0) -> Any:
    """PEFT's model with every value that it would train moved at random."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(seed)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](**arguments)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def logits_of(model: nn.Module) -> Array:
    """Of PEFT's unmerged model, in float64 where it runs in it."""
    with torch.no_grad():
        try:
            found = copy.deepcopy(model).double()(torch.from_numpy(images()).double())
        except RuntimeError:  # buffers that stay float32
            found = model(torch.from_numpy(images())).double()
    result: Array = found.numpy()
    return result


def merges(model: Any) -> bool:
    """Whether PEFT itself makes a plain model of it that answers alike."""
    reference = logits_of(model)
    try:
        merged = logits_of(copy.deepcopy(model).merge_and_unload(safe_merge=True))
    except Exception:  # noqa: BLE001  (whatever it is, PEFT does not merge it)
        return False
    return range_error(reference, merged) <= BOUND


def answers(backbone: Backbone, adapter: Adapter) -> Array:
    """Logits of the imported adapter, in float64."""
    return logits_with(backbone, parameters_with(backbone, adapter), images())


def range_error(reference: Array, found: Array) -> float:
    """Greatest difference over the range of the reference; infinite for other shapes."""
    if reference.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(reference - found).max() / (np.ptp(reference) or 1.0))


@contextmanager
def quiet() -> Iterator[Path]:
    """A scratch directory, without PEFT's warnings about training."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="hhdeploy-peft-") as folder:
        warnings.simplefilter("ignore")
        yield Path(folder)
