"""Image processors of transformers (preprocessor_config.json) as our transform."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hhdeploy.errors import BackboneError
from hhdeploy.preprocess import Preprocess

_PROCESSOR = "preprocessor_config.json"
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# Processors, by name: whether a size that is a number is both edges, and the filter by default.
_KINDS: dict[str, tuple[bool, int]] = {
    "ViT": (True, 2), "Beit": (True, 3), "DeiT": (True, 3), "Siglip": (True, 3), "DPT": (True, 3),
    "Segformer": (True, 2), "CLIP": (False, 3), "Bit": (False, 3), "ConvNext": (False, 2),
    "Levit": (False, 3), "MobileViT": (False, 2), "PoolFormer": (False, 3),
}  # fmt: skip
# Which of them cut out the centre by default, and whose size is a share of the one resized to.
_CROPPING = frozenset(("DeiT", "CLIP", "Bit", "Levit", "MobileViT", "PoolFormer"))
_SHARES = frozenset(("ConvNext", "PoolFormer"))
_OTHER_STEPS = ("do_flip_channel_order", "do_pad", "do_align_long_axis", "keep_aspect_ratio")


def image_processor(where: str) -> dict[str, Any] | None:
    """The content of preprocessor_config.json, of a directory or of the hub; None without.

    Raises:
        BackboneError: it is no JSON object.
    """
    path = Path(where) / _PROCESSOR
    if not Path(where).is_dir():
        from transformers.utils.hub import cached_file

        found = cached_file(
            where,
            _PROCESSOR,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return None
        path = Path(found)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def edges(size: Any) -> tuple[int, int]:
    """Height and width of a size that is a number, both edges then, or the two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def from_image_processor(stated: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocess:
    """An image processor of transformers as our transform.

    Its ``size`` is a height and a width (the image is squashed) or a shortest edge (its ratio is
    kept, the centre cropped); what a number alone means, and what else is not said, depends on the
    processor's kind.

    Raises:
        BackboneError: steps that cannot be expressed, what could mean several things, or values of
            other types.
    """
    try:
        return _transform(stated, input_size)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise BackboneError(f"{_PROCESSOR} cannot be read: {error}.") from error


def _kind(stated: Mapping[str, Any]) -> str:
    """The processor's name without what every one has at its end; "" if it is not said."""
    name = stated.get("image_processor_type") or stated.get("feature_extractor_type") or ""
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(name))


def _is_square(stated: Mapping[str, Any], kind: str, crops: bool) -> bool:
    """Whether a ``size`` that is a number is both edges, and not the shortest one."""
    if kind in _KINDS:
        return _KINDS[kind][0]
    if not crops:  # a shortest edge alone would leave pictures of all shapes
        return True
    raise BackboneError(
        f"{_PROCESSOR}: size {stated['size']} is a square to some image processors and the "
        f"shortest edge to others: expected image_processor_type to be of {', '.join(_KINDS)}, "
        f"found {kind or 'none'}. Write size as its height and width, or as its shortest_edge."
    )


def _check_steps(stated: Mapping[str, Any], kind: str, cut: tuple[int, int] | None) -> None:
    """Refuse what is no step of our transform; ``cut`` is what is cut out, if anything is."""
    steps = [step for step in _OTHER_STEPS if stated.get(step)]
    if not stated.get("do_resize", True):
        steps.append("do_resize: false")
    if stated.get("crop_pct") and kind not in _SHARES:
        steps.append(f"crop_pct of {kind or 'a processor that is not named'}")
    if steps:
        raise BackboneError(
            f"{_PROCESSOR}: {steps[0]}: the transform here has no such step. Take it out of a "
            "copy of the directory, and give the model pictures that are prepared so."
        )
    if cut is None or (crop := stated.get("crop_size")) is None:
        return
    given = (crop["height"], crop["width"]) if isinstance(crop, dict) else edges(crop)
    if given != cut:
        raise BackboneError(
            f"{_PROCESSOR}: crop_size: pictures are cut to {given[0]} x {given[1]}, and the "
            f"model's inputs are {cut[0]} x {cut[1]}. Say which with `input_size`, and mend the "
            "other."
        )


def _transform(stated: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocess:
    channels, height, width = input_size
    if stated.get("do_normalize", True):
        mean, std = stated.get("image_mean"), stated.get("image_std")
    else:
        mean, std = [0.0] * channels, [1.0] * channels
    size, kind = stated.get("size") or {}, _kind(stated)
    crops = bool(stated.get("do_center_crop", kind in _CROPPING))
    if crops and not stated.get("do_resize", True):
        raise BackboneError(
            f"{_PROCESSOR}: do_center_crop without do_resize: images would be cut as they are, and "
            "the transform here resizes first. Say in that file how images are resized."
        )
    if isinstance(size, int):
        square = _is_square(stated, kind, crops)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    edge = size.get("shortest_edge")
    if edge is not None and kind == "Levit":
        edge = int(256 / 224 * edge)
    if edge is not None and (share := stated.get("crop_pct")) and kind in _SHARES:
        # ConvNeXT's large pictures are squashed whole.
        edge = None if kind == "ConvNext" and edge >= 384 else int(edge / share)
    rescale = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1
    if mean is None or std is None or abs(rescale * 255 - 1) > 1e-3:
        raise BackboneError(
            "preprocessor_config.json: expected image_mean, image_std and a rescale_factor of "
            f"1/255, found {mean}, {std} and {rescale}."
        )
    _check_steps(stated, kind, (height, width) if crops else None)
    mode, pct = "squash", 1.0
    if edge is not None:
        mode, pct = "center", min(height, width) / edge
    elif crops and "height" in size:
        pct = height / size["height"]
    return Preprocess.stated(
        {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "interpolation": _FILTERS[int(stated.get("resample", _KINDS.get(kind, (True, 2))[1]))],
            "crop_pct": pct,
            "crop_mode": mode,
            "exif": True,
        }
    )
