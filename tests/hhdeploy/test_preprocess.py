"""Images as timm's own evaluation transform makes them, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from hhdeploy.errors import DataError
from hhdeploy.preprocess import (
    Preprocess,
    list_classes,
    list_images,
    open_image,
    spread,
)

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
        (3, 224, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 0.875, "center"
    )


# -- folders ------------------------------------------------------------------------------------


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


def test_folders(tmp_path):
    with pytest.raises(DataError, match="is not a directory"):
        list_images(tmp_path / "none")
    with pytest.raises(DataError, match="is not a directory"):
        list_classes(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no image.*\.jpeg"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="no class folders"):
        list_classes(tmp_path)
    for name in ("b/2.PNG", "b/1.png", "a/x.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == [
        "a/x.jpg",
        "b/1.png",
        "b/2.PNG",
    ]
    classes = list_classes(tmp_path)
    assert {k: [p.name for p in v] for k, v in classes.items()} == {
        "a": ["x.jpg"],
        "b": ["1.png", "2.PNG"],
    }


def test_spread_meets_every_part(tmp_path):
    paths = [tmp_path / str(i) for i in range(13)]
    assert spread(paths, 13) == spread(paths, 20) == paths
    assert [int(p.name) for p in spread(paths, 5)] == [0, 2, 5, 7, 10]
