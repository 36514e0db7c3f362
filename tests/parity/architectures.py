"""Small, random, perturbed models: timm's architectures, transformers', others."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hhdeploy.backbones.spec import Backbone
from hhdeploy.exporters.trace import BaseGraph, base_graph
from tests.once import traces
from tests.support import TINY_ARGS, TINY_MODEL, tiny_backbone


@dataclass(frozen=True)
class Architecture:
    """A model made small.

    Attributes:
        model: timm name, ``python:...``, or ``transformers:CLASS``.
        args: of ``timm.create_model``, the function, or the class's configuration.
        size: of the images where the architecture takes any (there is no ``img_size``).
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None


def small(architecture: Architecture) -> Backbone:
    """The perturbed backbone. Raises `BackboneError` as `load_backbone` does."""
    model, args = architecture.model, architecture.args
    if model.startswith("transformers:"):
        with tempfile.TemporaryDirectory() as folder:
            save_transformers_config(model.partition(":")[2], args, folder)
            backbone = tiny_backbone(f"transformers:{folder}")
    else:
        backbone = tiny_backbone(model, **args)
    if architecture.size is None:
        return backbone
    side = architecture.size
    preprocess = replace(backbone.facts.preprocess, input_size=(3, side, side))
    return replace(backbone, facts=replace(backbone.facts, preprocess=preprocess))


def save_transformers_config(name: str, args: Mapping[str, Any], folder: str | Path) -> None:
    """config.json of a model class of transformers, by its name."""
    import transformers

    config = getattr(transformers, name).config_class(**args)
    config.architectures = [name]
    config.save_pretrained(folder)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 3),
    "window_size": 4,
}

_HIDDEN = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
_LABELS = {**_HIDDEN, "num_labels": 7}
_TOWER = {"vision_config": _HIDDEN, "num_labels": 7}
_OWN = "python:tests.own_models"

# A classifier for the models that come without one: row 0 can then be compared.
_NAMED = {"num_classes": 37}
_PYRAMID = {"img_size": 64, "embed_dims": (12, 24, 24, 48), "num_heads": (1, 2, 2, 3)}

# What the tests of the exporters share: traced once a session, never changed.
SHARED = {
    "vit": Architecture(TINY_MODEL, TINY_ARGS),
    "swin": Architecture("swin_tiny_patch4_window7_224", WINDOWS),
    "beit": Architecture("beit_base_patch16_224", VIT),
    "zero bias": Architecture(TINY_MODEL, {**TINY_ARGS, "depth": 1, "num_classes": 37}),
}

# One of each structure that the exporters must handle.
FAST = {
    "eva02 separate": Architecture("eva02_base_patch14_224", {**VIT, **_NAMED, "depth": 1}),
    "hiera": Architecture(
        "hiera_tiny_224",
        {
            "img_size": (64, 64),
            "embed_dim": 16,
            "num_heads": 1,
            "stages": (1, 1, 1),
            "q_pool": 2,
        },
    ),
}

# As FAST, but of other libraries than timm.
OTHERS = {
    "authors' vit": Architecture(f"{_OWN}:authors_vit", size=32),
}

OTHERS_SLOW = {
    # Always: hhdeploy/exporting/test_outputs.py verifies both forms at all of its sites, and
    # calibration/test_other_sources.py its classifier.
    "transformers vit": Architecture("transformers:ViTForImageClassification", _LABELS),
    "transformers deit": Architecture("transformers:DeiTForImageClassification", _LABELS),
    "transformers beit": Architecture("transformers:BeitForImageClassification", _LABELS),
    "transformers dinov2": Architecture("transformers:Dinov2ForImageClassification", _LABELS),
    "transformers dinov2 registers": Architecture(
        "transformers:Dinov2WithRegistersForImageClassification", _LABELS
    ),
    "transformers swin": Architecture(
        "transformers:SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 3]}
        | {"window_size": 4, "num_labels": 7},
    ),
    "transformers clip": Architecture("transformers:CLIPForImageClassification", _TOWER),
    "transformers siglip": Architecture("transformers:SiglipForImageClassification", _TOWER),
    "torchvision vit": Architecture(f"{_OWN}:torchvision_vit", size=32),
    "torchvision swin": Architecture(f"{_OWN}:torchvision_swin", size=32),
    "open_clip vit": Architecture(f"{_OWN}:open_clip_vit", size=32),
    "torch encoder": Architecture(f"{_OWN}:encoder"),
}

SLOW = {
    # Its windows are Swin's, its biases BEiT's.
    "swinv2": Architecture("swinv2_tiny_window8_256", WINDOWS),
    "eva02 fused": Architecture("eva02_tiny_patch14_224", {**VIT, **_NAMED}),
    "dinov3": Architecture("vit_small_patch16_dinov3", {**VIT, **_NAMED}),
    "deit3": Architecture("deit3_small_patch16_224", VIT),
    "dinov2 registers": Architecture("vit_small_patch14_reg4_dinov2", {**VIT, **_NAMED}),
    "siglip": Architecture("vit_base_patch16_siglip_224", {**VIT, **_NAMED}),
    "clip": Architecture("vit_base_patch16_clip_224", VIT),
    "beit3": Architecture("beit3_base_patch16_224", VIT),
    "relative positions": Architecture("vit_relpos_small_patch16_224", VIT),
    "shared relative positions": Architecture("vit_srelpos_small_patch16_224", VIT),
    "parallel": Architecture("vit_small_patch16_18x2_224", VIT),
    "sam": Architecture(
        "samvit_base_patch16_224",
        {**VIT, **_NAMED, "global_attn_indexes": (1,), "window_size": 3},
    ),
    "swinv2 cr": Architecture("swinv2_cr_tiny_224", WINDOWS),
    "cait": Architecture("cait_xxs24_224", VIT),
    "xcit": Architecture(
        "xcit_nano_12_p16_224", {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}
    ),
    "convit": Architecture("convit_tiny", {**VIT, "local_up_to_layer": 1}),
    "pit": Architecture(
        "pit_ti_224",
        {"img_size": 64, "stride": 8, "patch_size": 16, "base_dims": (8, 8, 8)}
        | {"depth": (1, 1, 1), "heads": (1, 2, 2)},
    ),
    "twins svt": Architecture(
        "twins_svt_small", {**_PYRAMID, "depths": (2, 1, 2, 1), "wss": (4, 4, 4, 2)}
    ),
    "twins pcpvt": Architecture("twins_pcpvt_small", {**_PYRAMID, "depths": (1, 1, 1, 1)}),
    "davit": Architecture(
        "davit_tiny",
        {"embed_dims": (12, 24, 24, 48), "num_heads": (1, 2, 2, 3), "depths": (1, 1, 1, 1)},
        size=64,
    ),
    "pvt v2": Architecture(
        "pvt_v2_b0",
        {"embed_dims": (12, 24, 24, 48), "num_heads": (1, 2, 3, 6), "depths": (1, 1, 1, 1)},
        size=64,
    ),
    "tnt": Architecture(
        "tnt_s_patch16_224",
        {"img_size": 64, "embed_dim": 24, "inner_dim": 12, "depth": 2}
        | {"num_heads_outer": 2, "num_heads_inner": 2},
    ),
    "coat": Architecture(
        "coat_tiny",
        {"img_size": 64, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1)}
        | {"parallel_depth": 1, "num_heads": 8},
    ),
    "mobilevit": Architecture("mobilevit_xxs", size=64),
    "edgenext": Architecture(
        "edgenext_xx_small", {"depths": (1, 1, 2, 1), "dims": (16, 16, 32, 48)}, size=64
    ),
    # q, k and v lie head by head: these have proj, fc1 and fc2 only.
    "maxvit": Architecture(
        "maxvit_pico_rw_256",
        {"img_size": 64, "embed_dim": (32, 32, 32, 64), "depths": (1, 1, 1, 1), "stem_width": 16},
    ),
    "tiny vit": Architecture(
        "tiny_vit_5m_224",
        {"embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)}
        | {"window_sizes": (4, 4, 4, 2)},
        size=64,
    ),
}

# Refused with an error that says why: what the message must hold.
REFUSED = {
    "deit_tiny_distilled_patch16_224": "expected one classifier",
    "levit_128s": "expected one classifier",
    "volo_d1_224": "expected one classifier",
    "crossvit_tiny_240": "expected one classifier",
    "efficientformer_l1": "expected one classifier",
    "mobilevitv2_050": "zero sites found",
    "coatnet_pico_rw_224": "zero sites found",
    "fastvit_t8": "zero sites found",
    "visformer_tiny": "zero sites found",
    "focalnet_tiny_srf": "zero sites found",
    "convnext_atto": "zero sites found",
}

# As large as they are used.
REAL = {
    "vit_base_patch16_224": Architecture("vit_base_patch16_224"),
    "swin_tiny_patch4_window7_224": Architecture("swin_tiny_patch4_window7_224"),
    "eva02_tiny_patch14_224": Architecture("eva02_tiny_patch14_224", _NAMED),
    "beit_base_patch16_224": Architecture("beit_base_patch16_224"),
}


@functools.cache
def traced(name: str) -> tuple[Backbone, BaseGraph]:
    """One of `SHARED` and its base graph. Leave both as they are."""
    backbone = small(SHARED[name])
    if name == "zero bias":
        backbone.model.get_submodule("head").bias.zero_()
    with traces(name) as cache:
        return backbone, base_graph(backbone, cache)
