"""Images to model inputs, as timm's evaluation transform does it, with Pillow and NumPy.

Pillow is imported when an image is touched: a session that is fed arrays needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# Pillow's mode for a number of channels.
_MODES = {1: "L", 3: "RGB"}
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocess:
    """timm's data config: how an image becomes float32 [channels, H, W].

    Pictures become 3 channels, or 1 (grey); inputs of other models are fed as arrays.


    Attributes:
        input_size: (channels, H, W).
        mean: per channel, of values in [0, 1].
        std: per channel.
        interpolation: a Pillow filter name: nearest, bilinear, bicubic, box, hamming, lanczos.
        crop_pct: the share of the resized image that the crop keeps.
        crop_mode: center (short side resized, centre cropped), squash (aspect ratio given up)
            or border (long side resized, padded with the mean).
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocess:
        """Read the JSON form. Raises ValueError with the field that is wrong."""
        missing = [name for name in ("input_size", "mean", "std") if name not in content]
        if missing:
            raise ValueError(f"preprocess lacks {', '.join(missing)}")
        size = tuple(int(n) for n in content["input_size"])
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"preprocess.input_size must be [channels, H, W], found {list(size)}")
        mean = tuple(float(x) for x in content["mean"])
        std = tuple(float(x) for x in content["std"])
        if len(mean) != size[0] or len(std) != size[0] or not all(x > 0 for x in std):
            raise ValueError(
                f"preprocess.mean and preprocess.std must be {size[0]} numbers (a channel each), "
                f"std positive; found {list(mean)} and {list(std)}"
            )
        interpolation = str(content.get("interpolation", "bicubic"))
        if interpolation not in _FILTERS:
            raise ValueError(
                f"preprocess.interpolation must be one of {', '.join(_FILTERS)}, "
                f"found {interpolation!r}"
            )
        crop_mode = str(content.get("crop_mode", "center"))
        if crop_mode not in _CROP_MODES:
            raise ValueError(
                f"preprocess.crop_mode must be one of {', '.join(_CROP_MODES)}, found {crop_mode!r}"
            )
        crop_pct = float(content.get("crop_pct", 0.875))
        if not 0.0 < crop_pct <= 2.0:
            raise ValueError(f"preprocess.crop_pct must be in (0, 2], found {crop_pct}")
        return cls(
            (size[0], size[1], size[2]),
            mean,
            std,
            interpolation,
            crop_pct,
            crop_mode,
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON form that adapter_config.json and the manifest hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def described(self) -> str:
        """One line for people."""
        size = "x".join(map(str, self.input_size[1:]))
        mean, std = (", ".join(f"{x:g}" for x in dict.fromkeys(v)) for v in (self.mean, self.std))
        return (
            f"{size}, {self.interpolation}, {self.crop_mode} crop {self.crop_pct:g}, mean {mean}, "
            f"std {std}"
        )

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """One image to float32 [channels, H, W], normalised.

        Raises:
            DataError: the model takes neither 1 nor 3 channels.
        """
        from PIL import Image

        channels, height, width = self.input_size
        if channels not in _MODES:
            raise DataError(
                f"the model takes {channels} channels and a picture has 1 or 3: feed arrays "
                f"float32 [batch, {channels}, {height}, {width}], normalised."
            )
        rgb = image.convert(_MODES[channels])
        resample = Image.Resampling[self.interpolation.upper()]
        if self.crop_mode == "squash":
            scale_h = math.floor(height / self.crop_pct)
            scale_w = math.floor(width / self.crop_pct)
            rgb = _resize(rgb, scale_w, scale_h, resample)
        else:
            rgb = self._resize_keeping_ratio(rgb, resample)
        border = self.crop_mode == "border"
        fill = tuple(round(255 * m) if border else 0 for m in self.mean)
        rgb = _center_crop(rgb, width, height, fill if channels > 1 else fill[0])
        pixels = np.asarray(rgb, np.float32).reshape(height, width, channels) / np.float32(255)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def _resize_keeping_ratio(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Resize so that the crop area fits (center: it is covered; border: it covers)."""
        _, height, width = self.input_size
        scale_h, scale_w = math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
        w, h = image.size
        if self.crop_mode == "center" and scale_h == scale_w:
            # torchvision's Resize(int): the short side exact, the long one truncated.
            short, long = min(w, h), max(w, h)
            other = int(scale_h * long / short)
            size = (scale_h, other) if w <= h else (other, scale_h)
            return _resize(image, *size, resample)
        ratios = (h / scale_h, w / scale_w)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return _resize(image, round(w / ratio), round(h / ratio), resample)


def _resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((max(1, width), max(1, height)), resample)


def _center_crop(
    image: Image.Image, width: int, height: int, fill: int | tuple[int, ...]
) -> Image.Image:
    """The centre of ``image``; a smaller image is padded with ``fill`` first."""
    from PIL import ImageOps

    w, h = image.size
    if w < width or h < height:
        left, top = max(0, (width - w) // 2), max(0, (height - h) // 2)
        right, bottom = max(0, (width - w + 1) // 2), max(0, (height - h + 1) // 2)
        image = ImageOps.expand(image, (left, top, right, bottom), fill=fill)
        w, h = image.size
    top, left = round((h - height) / 2.0), round((w - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def open_image(path: Path) -> Image.Image:
    """Read and decode one image file. Raises `DataError` naming the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            copied: Image.Image = image.copy()
        return copied
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. An image file was expected there.") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"{path} cannot be decoded as an image: {error}") from error


def list_images(directory: Path) -> list[Path]:
    """All image files below ``directory``, sorted. Raises `DataError` when there are none."""
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory. A folder of images was expected.")
    found = sorted(p for p in directory.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(
            f"{directory} holds no image. Expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return found


def list_classes(directory: Path) -> dict[str, list[Path]]:
    """Class name -> image files of a ``DIR/CLASS/image`` folder, both sorted."""
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory. Expected DIR/CLASS/image.")
    classes = {d.name: list_images(d) for d in sorted(directory.iterdir()) if d.is_dir()}
    if not classes:
        raise DataError(f"{directory} has no class folders. Expected DIR/CLASS/image.")
    return classes


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """``count`` of ``paths``, evenly spaced, so that every class of a sorted list is met."""
    if len(paths) <= count:
        return list(paths)
    return [paths[(i * len(paths)) // count] for i in range(count)]
