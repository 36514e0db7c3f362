"""Images as timm's own evaluation transform makes them, to the bit."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from timm.data import create_transform

from hhdeploy.adapters.importers import ImportOptions
from hhdeploy.backbones.facts import transform_of
from hhdeploy.errors import DataError, OptionError
from hhdeploy.preprocess import Preprocess, eight_bits, open_image, upright
from tests.support import assert_caught

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = Preprocess((3, 32, 32), MEAN, STD)
# Squares, odd sizes, wide, tall, extreme, and one smaller than every crop; width x height.
SIZES = ((32, 32), (64, 64), (37, 53), (101, 33), (33, 101), (211, 17), (7, 5), (1, 1))


def picture(width, height, mode="RGB", seed=23):
    """Seeded noise with a gradient, so that a shift of one pixel shows."""
    random = np.random.default_rng([seed, width, height])
    ramp = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    pixels = ramp + random.uniform(0, 35, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8), "RGB").convert(mode)


def timm_s(preprocess, image):
    """timm's transform, after the conversion that its image datasets do."""
    transform = create_transform(
        input_size=preprocess.input_size,
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
    )
    return transform(image.convert("RGB")).numpy()


def assert_as_timm(preprocess, image):
    found = preprocess(image)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    expected = timm_s(preprocess, image)
    assert found.shape == expected.shape == preprocess.input_size
    assert np.array_equal(found, expected), f"differs by {np.abs(found - expected).max()}"


@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.9])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", SIZES)
def test_modes_and_sizes(size, crop_mode, crop_pct):
    assert_as_timm(replace(BASE, crop_mode=crop_mode, crop_pct=crop_pct), picture(*size))


@pytest.mark.parametrize("input_size", [(3, 24, 40), (3, 40, 24), (3, 31, 17)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", SIZES)
def test_inputs_that_are_not_square(size, crop_mode, input_size):
    assert_as_timm(replace(BASE, input_size=input_size, crop_mode=crop_mode), picture(*size))


@pytest.mark.parametrize(
    "interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
)
def test_interpolations(interpolation):
    assert_as_timm(replace(BASE, interpolation=interpolation), picture(101, 67))
    assert_as_timm(replace(BASE, interpolation=interpolation), picture(13, 19))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_kinds_of_images(mode, crop_mode):
    source = picture(53, 41).convert("L") if mode == "LA" else picture(53, 41)
    assert_as_timm(replace(BASE, crop_mode=crop_mode), source.convert(mode))


def test_transparent_and_indexed_images():
    image = picture(53, 41, "RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert_as_timm(BASE, image)
    assert_as_timm(BASE, picture(53, 41).quantize(colors=17))


def test_a_wrong_filter_mode_or_crop_is_caught():
    image = picture(101, 67)
    expected = timm_s(BASE, image)
    for wrong in (
        replace(BASE, interpolation="bilinear"),
        replace(BASE, crop_mode="squash"),
        replace(BASE, crop_pct=1.0),
        replace(BASE, mean=MEAN[::-1]),
        replace(BASE, std=STD[::-1]),
    ):
        # Pixels are a few units apart; the least of these mistakes moves some by 0.01.
        assert np.abs(wrong(image) - expected).max() > 0.01


def test_json_round_trip_and_defaults():
    preprocess = Preprocess((3, 24, 40), MEAN, STD, "lanczos", 0.95, "border")
    assert Preprocess.from_json(preprocess.to_json()) == preprocess
    content = {"input_size": [3, 224, 224], "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert Preprocess.from_json(content) == Preprocess(
        (3, 224, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 0.875, "center", exif=False
    )
    before = {**preprocess.to_json()}
    assert before.pop("exif") is True
    assert Preprocess.from_json(before).to_json() == before  # files without it stay as they are
    with pytest.raises(ValueError, match=r"preprocess\.exif must be true or false, found 1"):
        Preprocess.from_json({**before, "exif": 1})


def test_a_key_that_no_transform_reads_is_refused():
    """A word misspelt was the default in silence."""
    content = {**BASE.to_json(), "interpolaton": "nearest"}
    for read in (Preprocess.from_json, Preprocess.stated):
        with pytest.raises(ValueError, match=r"among input_size, .*, exif, found 'interpolaton'"):
            read(content)
    # timm's configurations say other things as well.
    assert transform_of({**content, "num_classes": 7}, BASE.input_size) == BASE


def test_numbers_of_another_scale_are_refused_where_they_are_stated():
    """Files that are there already are read as they are."""
    of_bytes = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    content = {**BASE.to_json(), **of_bytes}
    assert Preprocess.from_json(content).to_json() == content
    for wrong in (content, {**content, "std": [1, 1, 1]}, {**content, "mean": [0, 0, 0]}):
        with pytest.raises(ValueError, match=r"values from 0 to 1, found .* by 255"):
            Preprocess.stated(wrong)
    assert Preprocess.stated(BASE.to_json()) == BASE
    raw = {"input_size": [12, 8, 8], "mean": [1353.0] * 12, "std": [897.0] * 12}
    assert Preprocess.stated(raw).mean[0] == 1353.0  # of a satellite, say
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            Preprocess.stated({**BASE.to_json(), "mean": [number, 0.5, 0.5]})
    with pytest.raises(OptionError, match=r"`preprocess`: preprocess\.mean"):
        ImportOptions(preprocess=Preprocess.from_json(content))


# -- orientation --------------------------------------------------------------------------------

TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def stored(path, image, orientation):
    """The picture in a file that holds it turned, and says how to turn it back."""
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = np.ascontiguousarray(TURNS[orientation](np.asarray(image)))
    Image.fromarray(pixels).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_seen_upright(tmp_path, orientation, suffix):
    image, options = picture(37, 53), {"lossless": True} if suffix == "webp" else {}
    path = stored(tmp_path / f"a.{suffix}", image, orientation)
    if options:  # WebP's default is lossy
        with Image.open(path) as lossy:
            lossy.save(path, exif=lossy.getexif(), **options)
            image = upright(lossy)
    expected = replace(BASE, exif=False)(image)
    assert np.array_equal(BASE(open_image(path)), expected)
    with Image.open(path) as unopened:
        assert np.array_equal(BASE(unopened), expected)


def test_without_the_field_a_picture_is_seen_as_it_is_stored(tmp_path):
    path, turned = stored(tmp_path / "a.png", picture(37, 53), 6), np.rot90(picture(37, 53), 1)
    found = replace(BASE, exif=False)(open_image(path))
    assert np.array_equal(found, BASE(Image.fromarray(np.ascontiguousarray(turned))))
    seen = BASE(open_image(path))
    assert_caught(seen.reshape(-1), found.reshape(-1), "algebra", "float32")


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"", b"MM\0*\0\0\0\x08\xff"]
)
def test_metadata_that_cannot_be_read_say_nothing(exif):
    image = picture(37, 53)
    image.info["exif"] = exif
    assert np.array_equal(BASE(image), BASE(picture(37, 53)))


# -- more than 8 bits ---------------------------------------------------------------------------


def ramp():
    """All levels of 8 bits, [8, 32]."""
    return np.arange(256, dtype=np.uint8).reshape(8, 32)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("a.png", ramp().astype(np.uint16) * 257),
        ("a.tiff", ramp().astype(np.uint16) * 257),
        ("a.tiff", ramp().astype(np.float32) / 255),
    ],
)
def test_deep_pictures_are_scaled_as_they_mean(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    assert np.array_equal(np.asarray(open_image(tmp_path / name)), ramp())
    expected = BASE(Image.fromarray(ramp()))
    assert np.array_equal(BASE(open_image(tmp_path / name)), expected)
    assert np.array_equal(BASE(Image.fromarray(pixels)), expected)  # passed by a program


def test_rounding_is_to_the_nearest_level():
    pixels = np.array([[0, 128, 129, 257 + 128, 257 + 129, 65535]], np.uint16)
    assert np.asarray(eight_bits(Image.fromarray(pixels))).tolist() == [[0, 0, 1, 1, 2, 255]]


def test_where_white_is_zero(tmp_path):
    Image.fromarray(ramp().astype(np.uint16) * 257).save(tmp_path / "x.tiff", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.tiff")), 255 - ramp())


def test_twelve_bits_of_a_tiff_are_its_range(tmp_path):
    """Two samples in three bytes, as the header says."""
    Image.fromarray(np.zeros((1, 2), np.uint16)).save(tmp_path / "x.tiff")
    content = bytearray((tmp_path / "x.tiff").read_bytes())
    with Image.open(tmp_path / "x.tiff") as image:
        (strip,) = image.tag_v2[273]
    content[strip : strip + 3] = bytes([0xFF, 0xF0, 0x00])  # 4095, 0
    at = content.index(bytes([2, 1, 3, 0, 1, 0, 0, 0, 16, 0]))  # tag 258, SHORT, one value, 16
    content[at + 8] = 12
    (tmp_path / "x.tiff").write_bytes(content)
    assert np.asarray(open_image(tmp_path / "x.tiff")).tolist() == [[255, 0]]


def test_signed_integers_of_a_tiff_are_refused(tmp_path):
    """Pillow says of 8 bits that they have no sign: -1 would be white."""
    Image.fromarray(ramp()).save(tmp_path / "x.tiff", tiffinfo={339: (2,)})
    with Image.open(tmp_path / "x.tiff") as image:
        assert image.tag_v2[339] == (2,)
        with pytest.raises(DataError, match="signed integers"):
            BASE(image)
    with pytest.raises(DataError, match=r"x\.tiff: .* with signed integers \(SampleFormat 2\)"):
        open_image(tmp_path / "x.tiff")


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (ramp().astype(np.float32), "mode F with values from 0 to 255: expected 0"),
        (ramp().astype(np.float32) / 255 - 0.25, "mode F"),
        (np.full((3, 5), np.nan, np.float32), "mode F with values from nan"),
        (ramp().astype(np.int32), r"mode I \(32-bit integers, here from 0 to 255\)"),
    ],
)
def test_a_depth_that_says_nothing_is_refused_by_name(tmp_path, pixels, words):
    Image.fromarray(pixels).save(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match=rf"deep\.tiff: an image of {words}"):
        open_image(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match=words):
        BASE(Image.fromarray(pixels))


def test_a_mode_without_a_way_to_rgb_is_refused_by_name():
    with pytest.raises(DataError, match="mode La cannot be read as RGB"):
        BASE(Image.new("La", (5, 7)))


# -- files --------------------------------------------------------------------------------------


def test_open_image(tmp_path):
    picture(9, 7).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(picture(9, 7)))
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.png cannot be decoded"):
        open_image(tmp_path / "text.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png cannot be decoded"):
        open_image(tmp_path / "cut.png")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow's handle
def test_a_pipe_is_not_waited_for_unless_a_shell_passes_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: it is a pipe; an image file was expected"):
        open_image(tmp_path / "pipe.png")
    picture(9, 7).save(tmp_path / "a.png")
    reading, writing = os.pipe()
    os.write(writing, (tmp_path / "a.png").read_bytes())
    os.close(writing)
    try:
        assert open_image(Path(f"/dev/fd/{reading}")).size == picture(9, 7).size
    finally:
        os.close(reading)


# --- what metadata and damage there are ---------------------------------------------------------


def sideways():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize((80, 60), Image.Resampling.NEAREST)


def with_long_exif(path):
    entry = struct.pack("<HHII", 274, 4, 1, 6)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + b"\0" * 4
    sideways().save(path.with_suffix(".jpg"), exif=block)
    return path.with_suffix(".jpg")


def with_xmp(path):
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    sideways().save(path.with_suffix(".jpg"), xmp=xmp)
    return path.with_suffix(".jpg")


def with_profile(path):
    exif = Image.Exif()
    exif[274] = 6
    digits = (b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")).hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2:8}\n{lines}\n", zip=True)
    sideways().save(path.with_suffix(".png"), pnginfo=info)
    return path.with_suffix(".png")


def with_a_mark_of_its_own(path):
    """In a PNG's chunk there should be none."""
    exif = Image.Exif()
    exif[274] = 6
    content = b"eXIf" + b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    sideways().save(path.with_suffix(".png"))
    plain = path.with_suffix(".png").read_bytes()
    path.with_suffix(".png").write_bytes(plain[:33] + chunk + plain[33:])
    return path.with_suffix(".png")


@pytest.mark.parametrize("write", [with_long_exif, with_xmp, with_profile, with_a_mark_of_its_own])
def test_orientation_as_other_programs_write_it(tmp_path, write):
    path = write(tmp_path / "picture")
    with Image.open(path) as opened:
        wanted = ImageOps.exif_transpose(opened)
        assert wanted.size == (60, 80)
        assert np.array_equal(upright(opened), wanted)
    assert upright(open_image(path)).size == (60, 80)


def test_a_picture_of_sixteen_bits_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = np.asarray(upright(open_image(tmp_path / "a.png")))
    assert np.array_equal(found, np.rot90(pixels // 257, -1))


def test_exif_goes_before_xmp(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    xmp = b'<x tiff:Orientation="6"/>'
    sideways().save(tmp_path / "both.jpg", exif=exif, xmp=xmp)
    seen = upright(open_image(tmp_path / "both.jpg"))
    assert seen.size == (80, 60)
    assert not np.array_equal(seen, open_image(tmp_path / "both.jpg"))


@pytest.mark.parametrize("kind", ["QOI", "DDS", "PNG", "PPM", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_whatever_is_damaged_is_one_error(tmp_path, kind):
    """Pillow's formats have errors of many kinds for it."""
    written = io.BytesIO()
    sideways().save(written, kind)
    whole, rng = written.getvalue(), np.random.default_rng(1)
    path, said = tmp_path / f"damaged.{kind.lower()}", []
    for _ in range(60):
        content = bytearray(whole[: rng.integers(1, len(whole))])
        for at in rng.integers(0, min(len(content), 40), 3):
            content[at] = rng.integers(0, 256)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                open_image(path)
            except DataError as error:
                said.append(str(error))
    assert len(said) > 10
    assert all(str(path) in message for message in said)


def test_a_line_of_pixels_is_no_gigabytes():
    line = Image.new("RGB", (60_000, 1))
    preprocess = Preprocess((3, 224, 224), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match=r"60000 x 1 pixels: .*Cut it first"):
        preprocess(line)


def test_postscript_is_not_run(tmp_path):
    """Pillow has Ghostscript run it, whatever the file is called."""
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.jpg", "EPS")
    with pytest.raises(DataError, match=r"cat\.jpg: PostScript is a program.* as a PNG"):
        open_image(tmp_path / "cat.jpg")
