"""Image processors of transformers (preprocessor_config.json) as our transform."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hhdeploy.errors import BackboneError
from hhdeploy.files.bundle_json import object_in
from hhdeploy.preprocess import Preprocess

PROCESSOR = "preprocessor_config.json"
# What transformers 5 writes for a model of several inputs: each one's processor by its name.
_PROCESSORS, _OF_IMAGES = "processor_config.json", "image_processor"
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# Processors, by name: whether a size that is a number is both edges, and the filter by default.
_KINDS: dict[str, tuple[bool, int]] = {
    "ViT": (True, 2), "Beit": (True, 3), "DeiT": (True, 3), "Siglip": (True, 3), "DPT": (True, 3),
    "Segformer": (True, 2), "CLIP": (False, 3), "Bit": (False, 3), "ConvNext": (False, 2),
    "Levit": (False, 3), "MobileViT": (False, 2), "PoolFormer": (False, 3),
}  # fmt: skip
# Which of them cut out the centre by default, and whose size is a share of the one resized to (by
# default, which).
_CROPPING = frozenset(("DeiT", "CLIP", "Bit", "Levit", "MobileViT", "PoolFormer"))
_SHARES = {"ConvNext": 224 / 256, "PoolFormer": 0.9}
# What is read here or changes no picture. Every other key that sounds like a step is refused where
# it is set: new processors bring new ones. (EfficientNet's include_top normalises once more.)
_STEPS = ("do_", "rescale_", "crop", "pad", "keep_aspect_ratio", "include_top")
_KNOWN_STEPS = frozenset(
    {
        *("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"),
        *("do_reduce_labels", "do_convert_annotations"),
        *("rescale_factor", "crop_size", "crop_pct"),
    }
)


def stated_transform(where: str, input_size: tuple[int, int, int]) -> tuple[Preprocess, str] | None:
    """The transform of the image processor that a directory or the hub has, and the file that says
    it: processor_config.json, which transformers reads first, or preprocessor_config.json.

    Raises:
        BackboneError: they are no JSON objects; see `from_image_processor`.
    """
    file = _PROCESSORS
    stated = (_content(where, file) or {}).get(_OF_IMAGES)
    if not isinstance(stated, dict):
        file = PROCESSOR
        stated = _content(where, file)
    return None if stated is None else (from_image_processor(stated, input_size, file), file)


def processor_beside(
    checkpoint: Path, input_size: tuple[int, int, int]
) -> tuple[Preprocess, str] | None:
    """See `stated_transform`, of what lies beside a file of weights.

    Raises:
        BackboneError: it is none of images of this size.
    """
    try:
        return stated_transform(str(checkpoint.parent), input_size)
    except BackboneError as error:
        raise BackboneError(
            f"`checkpoint`: {checkpoint.parent}: {error} Weights in a folder without it have the "
            "image transform of the model that they are loaded into."
        ) from error


def _content(where: str, name: str) -> dict[str, Any] | None:
    path = Path(where) / name
    if not Path(where).is_dir():
        from transformers.utils.hub import cached_file

        found = cached_file(
            where,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return None
        path = Path(found)
    try:
        return object_in(path, BackboneError)
    except FileNotFoundError:
        return None


def edges(size: Any) -> tuple[int, int]:
    """Height and width of a size that is a number, both edges then, or the two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def from_image_processor(
    stated: Mapping[str, Any], input_size: tuple[int, int, int], file: str = PROCESSOR
) -> Preprocess:
    """An image processor of transformers, which a ``file`` states, as our transform.

    Its ``size`` is a height and a width (the image is squashed) or a shortest edge (its ratio is
    kept, the centre cropped); what a number alone means, and what else is not said, depends on the
    processor's kind.

    Raises:
        BackboneError: steps that cannot be expressed, what could mean several things, or values of
            other types.
    """
    try:
        return _transform(stated, input_size)
    except BackboneError as error:
        raise BackboneError(f"{file}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise BackboneError(f"{file} cannot be read: {error}.") from error


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
        f"size {stated['size']} is a square to some image processors and the shortest edge to "
        f"others: expected image_processor_type to be of {', '.join(_KINDS)}, found "
        f"{kind or 'none'}. Write size as its height and width, or as its shortest_edge."
    )


def _check_steps(stated: Mapping[str, Any], kind: str, cut: tuple[int, int] | None) -> None:
    """Refuse what is no step of our transform; ``cut`` is what is cut out, if anything is."""
    steps = [
        key
        for key, value in stated.items()
        if value and key.startswith(_STEPS) and key not in _KNOWN_STEPS
    ]
    if not stated.get("do_resize", True):
        steps.append("do_resize: false")
    if stated.get("crop_pct") and kind not in _SHARES:
        steps.append(f"crop_pct of {kind or 'a processor that is not named'}")
    if steps:
        raise BackboneError(
            f"{steps[0]}: the transform here has no such step. Take it out of a copy of the "
            "directory, and give the model pictures that are prepared so."
        )
    if cut is None or (crop := stated.get("crop_size")) is None:
        return
    given = (crop["height"], crop["width"]) if isinstance(crop, dict) else edges(crop)
    if given != cut:
        key = "size" if kind == "ConvNext" else "crop_size"
        raise BackboneError(
            f"{key}: pictures are cut to {given[0]} x {given[1]}, and the model's inputs are "
            f"{cut[0]} x {cut[1]}. Say which with `input_size`, and mend the other."
        )


def _check_size(size: Mapping[str, Any], kind: str, crops: bool) -> None:
    """Refuse a ``size`` that is neither a height and a width nor the shortest edge of a crop."""
    if not all(edge > 0 for edge in size.values()):
        raise ValueError(f"size is {dict(size)}")
    if set(size) not in (set(), {"height", "width"}, {"shortest_edge"}):
        raise BackboneError(
            f"size: expected height and width, or shortest_edge, found {', '.join(size)}: the "
            "transform here has no such size. Write size so in a copy of the directory, and give "
            "the model pictures that are prepared so."
        )
    if not size and kind in _KINDS and not _KINDS[kind][0]:
        raise BackboneError(
            f"size: expected the shortest_edge that {kind}'s pictures are resized to, found none. "
            "Write it there."
        )
    if "shortest_edge" in size and not crops:
        raise BackboneError(
            f"size: a shortest_edge of {size['shortest_edge']} and no do_center_crop leave "
            "pictures of many shapes, and the model's inputs have one. Write size as its height "
            "and width, or say do_center_crop and crop_size."
        )


def _share(crop: int, edge: int) -> float:
    """The share that a crop is of an edge; the transform finds the edge again, rounding down."""
    share = crop / edge
    return share if math.floor(crop / share) == edge else math.nextafter(share, 0.0)


def _transform(stated: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocess:
    channels, height, width = input_size
    if stated.get("do_normalize", True):
        mean, std = stated.get("image_mean"), stated.get("image_std")
    else:
        mean, std = [0.0] * channels, [1.0] * channels
    size, kind = stated.get("size"), _kind(stated)
    crops = bool(stated.get("do_center_crop", kind in _CROPPING))
    if crops and not stated.get("do_resize", True):
        raise BackboneError(
            "do_center_crop without do_resize: images would be cut as they are, and the transform "
            "here resizes first. Say in that file how images are resized."
        )
    if isinstance(size, int):
        square = _is_square(stated, kind, crops)
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    size = {key: value for key, value in (size or {}).items() if value is not None}
    if kind == "ConvNext" and (edge := size.get("shortest_edge")) is not None:
        crops, stated = True, {**stated, "crop_size": edge}  # it has no other
        if edge >= 384:  # large pictures are squashed whole
            size = {"height": edge, "width": edge}
    _check_steps(stated, kind, (height, width) if crops else None)
    _check_size(size, kind, crops)
    edge = size.get("shortest_edge")
    if edge is not None and kind == "Levit":
        edge = int(256 / 224 * edge)
    if edge is not None and (share := stated.get("crop_pct", _SHARES.get(kind))):
        edge = int(edge / share)
    rescale = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1
    if mean is None or std is None or abs(rescale * 255 - 1) > 1e-3:
        raise BackboneError(
            f"expected image_mean, image_std and a rescale_factor of 1/255, found {mean}, {std} "
            f"and {rescale}."
        )
    mode, pct = "squash", 1.0
    if edge is not None:
        mode, pct = "center", _share(min(height, width), edge)
        size = {"height": edge, "width": edge}
    elif crops and size:
        pct = min(_share(height, size["height"]), _share(width, size["width"]))
    made = Preprocess.stated(
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
    # A square picture is resized to what the file says, be it squashed or cut.
    if size and made.resized(1, 1) != (size["width"], size["height"]):
        raise BackboneError(
            f"size: pictures are resized to {size['height']} x {size['width']}, and the model's "
            f"inputs are {height} x {width}: the transform here resizes to these, or cuts them out "
            "of a size of the same ratio. Say which with `input_size`, and mend the other."
        )
    return made
