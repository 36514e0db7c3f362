"""Weights that were resampled to the size of other images or patches, which timm does unasked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.errors import BackboneError, abbreviate

if TYPE_CHECKING:
    import torch

# Weights with the geometry of images, as timm's models call them.
_GEOMETRY = ("pos_embed", "patch_embed.proj.weight", "position_bias_table")
# A model whose positions are made for the size of the images wherever it runs.
_RADIO = "radio_model."


def resampled(
    given: Mapping[str, torch.Tensor], fitted: Mapping[str, torch.Tensor], spec: BackboneSpec
) -> list[str]:
    """What timm's filter resampled, which it does without a word: positions, patches.

    What it only cuts or calls by another name (OpenAI's, DINOv2's) is the file's own memory still.

    Raises:
        BackboneError: nobody asked for another geometry than the file's.
    """
    own = {_memory(tensor) for tensor in given.values()}
    if any(name.startswith(_RADIO) for name in given):
        return []
    found = []
    for name, tensor in fitted.items():
        was = given.get(name)
        if _memory(tensor) in own or (was is not None and was.numel() == tensor.numel()):
            continue
        if was is not None:
            found.append(f"{name} from {list(was.shape)} to {list(tensor.shape)}")
        elif name.endswith(_GEOMETRY):
            found.append(f"{name} to {list(tensor.shape)}")
    return told_resampled(found, spec)


def told_resampled(found: Sequence[str], spec: BackboneSpec) -> list[str]:
    """A line about what was resampled, each in words.

    Raises:
        BackboneError: nobody asked for another geometry than the file's.
    """
    if found and not {"img_size", "patch_size"} & spec.args.keys():
        raise BackboneError(
            f"`checkpoint`: {spec.checkpoint} is of another geometry than {spec.model}: timm would "
            f"resample {abbreviate(found, 3)}. Say in `model_args` what it was trained with (such "
            "as img_size or patch_size); or give the model's own there, to have it resampled."
        )
    return [f"weights resampled to another geometry: {', '.join(found)}"] if found else []


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's values lie; views of it have the same."""
    return tensor.untyped_storage().data_ptr()
