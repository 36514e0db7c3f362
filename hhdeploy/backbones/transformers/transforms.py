"""The image transform of a model of transformers: as its files state it, or assumed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.transformers.processors import (
    PROCESSOR,
    edges,
    processor_beside,
    stated_transform,
)
from hhdeploy.errors import BackboneError
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

# What transformers calls models of timm.
_OF_TIMM = "timm_wrapper"


def transform_of(
    config: Any, spec: BackboneSpec, where: str, model: nn.Module
) -> tuple[Preprocess, tuple[str, ...]]:
    """The transform, and a line where it is assumed or comes from beside the weights.

    Args:
        config: of transformers.
        spec: ``input_size`` goes before the configuration's.
        where: a directory, or an id of the hub, which may have an image processor.
        model: as it was loaded.

    Raises:
        BackboneError: nothing says what size the images have; a processor that cannot be followed.
    """
    if config.model_type == _OF_TIMM:
        return _of_timm(config, spec, model)
    return _of_transformers(config, spec, where)


def _of_timm(
    config: Any, spec: BackboneSpec, model: nn.Module
) -> tuple[Preprocess, tuple[str, ...]]:
    """The transform of a model of timm in transformers: its config.json states it as timm's does,
    and there is no other place for it. The architecture's own where it does not."""
    from hhdeploy.backbones.timm import preprocess_of, transform_beside

    inner = next(m for m in model.modules() if hasattr(m, "pretrained_cfg"))
    args = config.model_args or {}
    if spec.checkpoint and (found := transform_beside(spec.checkpoint, inner, args)) is not None:
        beside, name = found
        return beside, (
            f"image transform taken from {name} beside the weights: {beside.described()}",
        )
    stated = getattr(config, "pretrained_cfg", None)
    made = preprocess_of(inner, args, stated)
    if spec.input_size is not None:
        made = replace(made, input_size=spec.input_size)
    if stated:
        return made, ()
    return made, (f"image transform assumed, for want of pretrained_cfg: {made.described()}",)


def _of_transformers(
    config: Any, spec: BackboneSpec, where: str
) -> tuple[Preprocess, tuple[str, ...]]:
    """The transform of the image processor, beside a checkpoint before the configuration's;
    else what has to be assumed."""
    seen = getattr(config, "vision_config", config)
    channels = getattr(seen, "num_channels", 3)
    stated_size = getattr(seen, "image_size", None)
    if spec.input_size is None and stated_size is None:
        raise BackboneError("config.json has no image_size: give `input_size`.")
    size = spec.input_size or (channels, *edges(stated_size))
    if spec.checkpoint and (found := processor_beside(spec.checkpoint, size)) is not None:
        beside, name = found
        return beside, (
            f"image transform taken from {name} beside the weights: {beside.described()}",
        )
    if (found := stated_transform(where, size)) is not None:
        return found[0], ()
    assumed = Preprocess(
        size, (0.5,) * channels, (0.5,) * channels, "bilinear", 1.0, "squash", True
    )
    return assumed, (f"image transform assumed, for want of {PROCESSOR}: {assumed.described()}",)
