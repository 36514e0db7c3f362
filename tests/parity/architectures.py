"""Small, random, perturbed variants of timm's architectures."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from hhdeploy.backbone import Backbone
from hhdeploy.exporters.trace import BaseGraph, base_graph
from tests.support import TINY_ARGS, TINY_MODEL, tiny_backbone


@dataclass(frozen=True)
class Architecture:
    """A timm model made small.

    Attributes:
        model: timm name.
        args: of ``timm.create_model``, also such as no adapter may name.
        size: of the images where the architecture takes any (there is no ``img_size``).
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None


def small(architecture: Architecture) -> Backbone:
    """The perturbed backbone. Raises `BackboneError` as `load_backbone` does."""
    allowed = frozenset(architecture.args)
    with mock.patch("hhdeploy.backbone.BASE_MODEL_ARGS", allowed):
        backbone = tiny_backbone(architecture.model, **architecture.args)
    if architecture.size is None:
        return backbone
    side = architecture.size
    preprocess = replace(backbone.facts.preprocess, input_size=(3, side, side))
    return replace(backbone, facts=replace(backbone.facts, preprocess=preprocess))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 3),
    "window_size": 4,
}

# What the tests of the exporters share: traced once a session, never changed.
SHARED = {
    "vit": Architecture(TINY_MODEL, TINY_ARGS),
    "swin": Architecture("swin_tiny_patch4_window7_224", WINDOWS),
    "beit": Architecture("beit_base_patch16_224", VIT),
    "zero bias": Architecture(TINY_MODEL, {**TINY_ARGS, "depth": 1, "num_classes": 37}),
}


@functools.cache
def traced(name: str) -> tuple[Backbone, BaseGraph]:
    """One of `SHARED` and its base graph. Leave both as they are."""
    backbone = small(SHARED[name])
    if name == "zero bias":
        backbone.model.get_submodule("head").bias.zero_()
    return backbone, base_graph(backbone, None)
