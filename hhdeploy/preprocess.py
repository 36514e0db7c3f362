"""Images to model inputs, as timm's evaluation transform does it, with Pillow and NumPy.

Pillow is imported when an image is touched: a session that is fed arrays needs none.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
# Filters that an ONNX graph computes as Pillow does; see `Preprocess.graph_file`.
GRAPH_FILTERS = ("bicubic", "bilinear")
# Of models that take pictures, in grey or in colours.
PICTURE_CHANNELS = (1, 3)
# TIFF's and EXIF's tags, with the same numbers.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
# EXIF's types of an orientation (a short, but some write a long), as `struct` has them.
_WIDTHS = {3: "H", 4: "I"}
_EXIF, _RAW_EXIF = b"Exif\0\0", "Raw profile type exif"
_IN_XMP = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")
# Pixels that a picture is resized to before it is cropped, a gigabyte in RGB; a line of 60,000
# pixels would take eleven.
_MOST_RESIZED = 1 << 28


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
        exif: turn the image as its EXIF orientation says, before anything else. In JSON it is
            absent where it is not done: what was trained before there was this field saw images
            as they are stored, so it goes on seeing them so.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    exif: bool = True

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocess:
        """Read the JSON form. Raises ValueError naming a field that is wrong or unknown."""
        if missing := [name for name in ("input_size", "mean", "std") if name not in content]:
            raise ValueError(f"preprocess lacks {', '.join(missing)}")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in content if name not in known]:
            said = f"preprocess: expected keys among {', '.join(known)}, found "
            raise ValueError(said + ", ".join(map(repr, unknown)))
        sizes = tuple(map(_number, content["input_size"]))
        if len(sizes) != 3 or not all(n >= 1 and n.is_integer() for n in sizes):
            raise ValueError(
                f"preprocess.input_size must be [channels, H, W], found {content['input_size']}"
            )
        size = tuple(map(int, sizes))
        mean, std = (tuple(map(_number, content[name])) for name in ("mean", "std"))
        finite = all(math.isfinite(x) for x in (*mean, *std))
        if len(mean) != size[0] or len(std) != size[0] or not finite or min(std) <= 0:
            raise ValueError(
                f"preprocess.mean and preprocess.std must be {size[0]} numbers (a channel each), "
                f"finite, std positive; found {list(mean)} and {list(std)}"
            )
        filter_ = _one_of("interpolation", _FILTERS, content.get("interpolation", "bicubic"))
        crop_mode = _one_of("crop_mode", CROP_MODES, content.get("crop_mode", "center"))
        crop_pct = _number(content.get("crop_pct", 0.875))
        if not 0.0 < crop_pct <= 2.0:
            raise ValueError(f"preprocess.crop_pct must be in (0, 2], found {crop_pct}")
        exif = content.get("exif", False)
        if not isinstance(exif, bool):
            raise ValueError(f"preprocess.exif must be true or false, found {exif!r}")
        return cls((size[0], size[1], size[2]), mean, std, filter_, crop_pct, crop_mode, exif)

    @classmethod
    def stated(cls, content: Mapping[str, Any]) -> Preprocess:
        """As `from_json`, of what a user or another tool states: also `check_scale`. Files that
        are there already are read as they are: their clients may feed arrays."""
        preprocess = cls.from_json(content)
        preprocess.check_scale()
        return preprocess

    def check_scale(self) -> None:
        """Raise ValueError for mean and std of a picture's values from 0 to 255. (Inputs of other
        channels than a picture has are in any unit.)"""
        largest = max(map(abs, (*self.mean, *self.std)))
        if self.input_size[0] in PICTURE_CHANNELS and largest > 1:
            raise ValueError(
                "preprocess.mean and preprocess.std must be of values from 0 to 1, found "
                f"{list(self.mean)} and {list(self.std)}. Divide those of values from 0 to 255 by "
                "255"
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON form that adapter_config.json and the manifest hold."""
        content = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if not self.exif:
            del content["exif"]  # as files have it that know no orientation
        return content

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
            DataError: an image of more than 8 bits whose white is unknown (see `eight_bits`), or
                a model that takes neither 1 nor 3 channels.
        """
        from PIL import Image

        channels, height, width = self.input_size
        if channels not in PICTURE_CHANNELS:
            raise DataError(
                f"the model takes {channels} channels and a picture has 1 or 3: feed arrays "
                f"float32 [batch, {channels}, {height}, {width}], normalised."
            )
        rgb = as_rgb(upright(image) if self.exif else image)
        if channels == 1:
            rgb = rgb.convert("L")
        resample = Image.Resampling[self.interpolation.upper()]
        size = self.resized(*rgb.size)
        if size[0] * size[1] > _MOST_RESIZED:
            raise DataError(
                f"a picture of {rgb.width} x {rgb.height} pixels: its shorter edge as long as the "
                f"model wants it makes {size[0]} x {size[1]} of it. Cut it first."
            )
        rgb = rgb if size == rgb.size else rgb.resize(size, resample)
        fill = self._fill
        rgb = _center_crop(rgb, width, height, fill if channels > 1 else fill[0])
        levels = np.asarray(rgb).reshape(height, width, channels)
        return self.normalised(levels.transpose(2, 0, 1))

    def normalised(self, levels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [channels, H, W], upright and of the model's size, to float32 of that shape."""
        pixels = levels.astype(np.float32) / np.float32(255)
        mean, std = (np.asarray(each, np.float32)[:, None, None] for each in (self.mean, self.std))
        return np.ascontiguousarray((pixels - mean) / std)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image of this size is resized to, before the crop.

        center: the crop is covered; border: it covers; squash: whatever the image's ratio is.
        """
        scale_h, scale_w = self._resize_to
        if self.crop_mode == "squash":
            size = (scale_w, scale_h)
        elif self.crop_mode == "center" and scale_h == scale_w:
            # torchvision's Resize(int): the short side exact, the long one truncated.
            other = int(scale_h * max(width, height) / min(width, height))
            size = (scale_h, other) if width <= height else (other, scale_h)
        else:
            ratios = (height / scale_h, width / scale_w)
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            size = (round(width / ratio), round(height / ratio))
        return max(1, size[0]), max(1, size[1])

    @property
    def graph_file(self) -> str | None:
        """What a bundle calls the graph that does the same as this transform; None where none
        does: for filters beside `GRAPH_FILTERS`, and models that take no pictures."""
        if self.interpolation not in GRAPH_FILTERS or self.input_size[0] not in PICTURE_CHANNELS:
            return None
        return graph_file(self.crop_mode, self.interpolation)

    @property
    def graph_inputs(self) -> dict[str, tuple[str, list[float] | list[int]]]:
        """Name -> (dtype, values) of what that graph takes beside the picture.

        ``mean`` and ``std`` of values in [0, 1]; ``resize`` and ``crop``, heights and widths in
        pixels; ``fill``, the level around a picture that is smaller than the crop.
        """
        return {
            "mean": ("float32", list(self.mean)),
            "std": ("float32", list(self.std)),
            "resize": ("int64", list(self._resize_to)),
            "crop": ("int64", list(self.input_size[1:])),
            "fill": ("float32", list(self._fill)),
        }

    @property
    def _resize_to(self) -> tuple[int, int]:
        """(height, width) of the square or rectangle that the crop is a share of."""
        _, height, width = self.input_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    @property
    def _fill(self) -> tuple[int, ...]:
        border = self.crop_mode == "border"
        return tuple(round(255 * m) if border else 0 for m in self.mean)


def _number(value: Any) -> float:
    """One of JSON, where an integer may have more digits than a float holds."""
    if isinstance(value, str | bool):  # of which float() makes numbers, digit by digit
        raise ValueError(f"preprocess: expected a number, found {value!r}")
    with contextlib.suppress(OverflowError):
        return float(value)
    return math.inf


def _one_of(key: str, choices: tuple[str, ...], found: Any) -> str:
    if str(found) not in choices:
        raise ValueError(f"preprocess.{key} must be one of {', '.join(choices)}, found {found!r}")
    return str(found)


def graph_file(crop_mode: str, interpolation: str) -> str:
    """What a bundle calls the graph of a crop mode and a filter."""
    return f"preprocess.{crop_mode}.{interpolation}.onnx"


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


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is without one.

    Pillow itself turns a TIFF while it loads it. Metadata that cannot be read say nothing.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    image.load()
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The orientation that a picture's metadata tell, 1 if they tell none: its EXIF block, which
    ImageMagick writes into a PNG as text; else XMP.

    Read here, because Pillow warns of every other damage in a block that anybody may have sent.
    """
    exif = image.info.get("exif")
    if exif is None and isinstance(profile := image.info.get(_RAW_EXIF), str):
        with contextlib.suppress(ValueError):  # name, length, and hex digits in lines
            exif = bytes.fromhex("".join(profile.split()[2:]))
    if (told := _in_exif(exif)) is not None:
        return told
    for key in ("xmp", "XML:com.adobe.xmp"):
        content = image.info.get(key, b"")
        text = content if isinstance(content, bytes) else str(content).encode()
        if found := _IN_XMP.search(text):
            return int(found[1])
    return 1


def _in_exif(exif: object) -> int | None:
    """The orientation of an EXIF block, None if it has none. Some write its mark twice."""
    block = exif.removeprefix(_EXIF).removeprefix(_EXIF) if isinstance(exif, bytes) else b""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    try:
        (at,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, entry)
            if tag == _ORIENTATION and kind in _WIDTHS and count == 1:
                return int(struct.unpack_from(f"{order}{_WIDTHS[kind]}", block, entry + 8)[0])
    except struct.error:  # no block, or it ends early
        return None
    return None


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB. Raises `DataError` naming a mode that cannot be brought there."""
    shallow = eight_bits(image)
    try:
        return shallow.convert("RGB")
    except ValueError as error:
        raise DataError(
            f"an image of mode {image.mode} cannot be read as RGB: {error}. Convert it to RGB."
        ) from error


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits scaled to 8, from black to white; any other as it is.

    16-bit integers go from 0 to 65535, or to what the bits of a TIFF's samples hold; floats from
    0 to 1.

    Raises:
        DataError: 32-bit integers, and floats outside 0 to 1: nothing says what is white. A TIFF
            of signed integers, of which Pillow reads those of 8 bits as if they had no sign.
    """
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    if not image.mode.startswith(("I", "F")):
        if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
            raise DataError(
                f"an image of mode {image.mode} with signed integers (SampleFormat {_SIGNED}): "
                "nothing says which number is black. Save it with unsigned ones, scaled."
            )
        return image
    image.load()
    values = np.asarray(image, np.float32)
    low, high = float(values.min()), float(values.max())
    # Pillow before 11.3 opens PNG's and PNM's 16 bits as 32.
    sixteen = image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM"))
    white = float(2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1) if sixteen else 1.0
    if image.mode == "I" and not sixteen:
        raise DataError(
            f"an image of mode I (32-bit integers, here from {low:g} to {high:g}): nothing says "
            "which number is white. Save it in 8 or 16 bits, scaled."
        )
    if not (low >= 0.0 and high <= white):  # NaN too
        raise DataError(
            f"an image of mode {image.mode} with values from {low:g} to {high:g}: expected 0 "
            f"(black) to {white:g} (white). Scale it, or save it in 8 bits."
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = white - values
    scaled = Image.fromarray(np.rint(values * np.float32(255 / white)).astype(np.uint8))
    scaled.info = dict(image.info)  # its EXIF orientation
    return scaled


def open_image(path: Path) -> Image.Image:
    """Read and decode one image file; of more than 8 bits scaled as it means (`eight_bits`).

    Its EXIF orientation is left to `Preprocess`.

    Raises:
        DataError: naming the file: not there, a pipe, no image, of a depth that says nothing.
    """
    from PIL import Image

    try:
        # It would be waited for, for ever; what a shell passes as /dev/fd/N has its writer.
        if (place := Path(path)).is_fifo() and Path("/dev") not in place.parents:
            raise DataError("it is a pipe; an image file was expected.")
        with Image.open(path) as image:
            if image.format == "EPS":  # which Pillow would have Ghostscript run
                raise DataError("PostScript is a program, no image: save it as a PNG.")
            image.load()
            shallow = eight_bits(image)
            return image.copy() if shallow is image else shallow
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. An image file was expected there.") from None
    except (Exception, MemoryError) as error:  # each of Pillow's formats has its own for damage
        said = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be decoded as an image: {said}") from error
