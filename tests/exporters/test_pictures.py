"""Graphs that take pictures do what the Python transform does, on a photograph at odd sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from hhdeploy.exporters.portable.pictures import picture_graph, write_picture_graphs
from hhdeploy.parity import LEVELS
from hhdeploy.preprocess import CROP_MODES, GRAPH_FILTERS, Preprocess
from hhdeploy.verifying.pictures import PHOTO

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SQUARE = Preprocess((3, 32, 32), MEAN, STD)
WIDE = Preprocess((3, 17, 31), MEAN, STD, crop_pct=0.93)
# Its crop is wider than what is resized, so a margin is filled.
LOOSE = Preprocess((3, 37, 29), MEAN, STD, crop_pct=1.37)
GREY = Preprocess((1, 29, 29), (0.45,), (0.27,), crop_pct=1.0)
# Width and height: odd, wide, tall, tiny, exactly the crop's, halves in the size that is kept.
SIZES = ((451, 299), (211, 17), (13, 103), (7, 5), (1, 1), (32, 32), (97, 97), (31, 62), (35, 35))
# Some of them shrink in one axis and grow in the other, or more in one than in the other.
MIXED = ((29, 41), (41, 29), (23, 151), (151, 23), (109, 149), (71, 293))


@pytest.fixture(scope="module")
def photo():
    return Image.open(PHOTO).convert("RGB")


def part(photo, size):
    return photo.crop((60, 0, 60 + size[0], size[1])) if size[0] < 391 else photo.resize(size)


def run(transform, picture, **others):
    """A client's view: the graph, the picture, and the numbers as the manifest has them."""
    mode = others.pop("mode", (transform.crop_mode, transform.interpolation))
    graph = picture_graph(*mode, transform.input_size[0])
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    stated = {n: np.asarray(v, d) for n, (d, v) in transform.graph_inputs.items()}
    feeds = {"image": np.asarray(picture), **stated, **others}
    assert set(feeds) == {i.name for i in session.get_inputs()}
    (images,) = session.run(["images"], feeds)
    assert images.dtype == np.float32
    assert images.shape == (1, *transform.input_size)
    return images[0]


def levels_off(transform, picture, **others):
    """The largest difference from the Python transform, and what is allowed."""
    std = np.asarray(transform.std, np.float32)[:, None, None]
    off = np.abs(run(transform, picture, **others) - transform(picture)) * std * 255
    width, height = transform.resized(*picture.size)
    grows = width > picture.width or height > picture.height
    return round(float(off.max())), LEVELS["grows" if grows else "shrinks"]


@pytest.mark.parametrize("interpolation", GRAPH_FILTERS)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("transform", [SQUARE, WIDE, LOOSE, GREY], ids=lambda t: f"{t.input_size}")
def test_every_size(photo, transform, crop_mode, interpolation):
    transform = replace(transform, crop_mode=crop_mode, interpolation=interpolation)
    for size in SIZES:
        found, allowed = levels_off(transform, part(photo, size))
        assert found <= allowed, size


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
def test_the_axes_in_pillow_s_order(photo, crop_mode):
    """In the other order hundreds of values are a level off, and some two."""
    transform = replace(SQUARE, crop_mode=crop_mode)
    for size in MIXED:
        picture = part(photo, size)
        off = np.abs(run(transform, picture) - transform(picture)) * np.float32(STD)[:, None, None]
        assert np.count_nonzero(off * 255 > 0.5) < 20, size


def test_what_is_not_resized_is_the_same_to_the_bit(photo):
    picture = part(photo, (37, 37))
    for transform in (replace(SQUARE, input_size=(3, 37, 37), crop_pct=1.0), GREY):
        small = picture.resize(transform.input_size[1:])
        assert np.array_equal(run(transform, small), transform(small))


def test_a_wrong_graph_or_number_shows(photo):
    picture = part(photo, (451, 299))
    for wrong in (
        {"mode": ("center", "bilinear")},
        {"mode": ("squash", "bicubic")},
        {"resize": np.int64([40, 40])},
        {"mean": np.float32(MEAN[::-1])},
    ):
        found, allowed = levels_off(SQUARE, picture, **wrong)
        assert found > 3 * allowed, wrong
    found, allowed = levels_off(LOOSE, picture, fill=np.float32([99, 99, 99]))
    assert found > 3 * allowed


def test_the_files_are_small_and_of_an_old_format(tmp_path):
    write_picture_graphs(tmp_path, 3)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == sorted(f"preprocess.{c}.{f}.onnx" for c in CROP_MODES for f in GRAPH_FILTERS)
    for file in files:
        assert (tmp_path / file).stat().st_size < 5000
        model = onnx.load(tmp_path / file)
        assert (model.ir_version, model.opset_import[0].version) == (9, 18)


def test_models_that_take_no_pictures_get_none(tmp_path):
    write_picture_graphs(tmp_path, 5)
    assert not list(tmp_path.iterdir())
    many = Preprocess((5, 32, 32), (0.5,) * 5, (0.5,) * 5)
    assert many.graph_file is None
    assert replace(SQUARE, interpolation="lanczos").graph_file is None
