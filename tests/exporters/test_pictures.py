"""Graphs that take pictures do what the Python transform does, on a photograph at odd sizes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from hhdeploy.exporters.portable import resizing
from hhdeploy.exporters.portable.pictures import picture_graph, write_picture_graphs
from hhdeploy.parity import LEVELS
from hhdeploy.preprocess import CROP_MODES, GRAPH_FILTERS, Preprocess
from hhdeploy.runtime.openvino_backend import shared_core
from hhdeploy.verifying.pictures import PHOTO
from tests.workshop import COMMAND_SECONDS, ROOT

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


def runner(transform, make=picture_graph, mode=None):
    """A client's view: the graph, the picture, and the numbers as the manifest has them."""
    mode = mode or (transform.crop_mode, transform.interpolation)
    graph = make(*mode, transform.input_size[0])
    session = ort.InferenceSession(graph, ort.SessionOptions(), providers=["CPUExecutionProvider"])
    stated = {n: np.asarray(v, d) for n, (d, v) in transform.graph_inputs.items()}

    def run_it(picture, **others):
        feeds = {"image": np.asarray(picture), **stated, **others}
        assert set(feeds) == {i.name for i in session.get_inputs()}
        (images,) = session.run(["images"], feeds)
        assert images.dtype == np.float32
        assert images.shape == (1, *transform.input_size)
        return images[0]

    return run_it


def run(transform, picture, mode=None, **others):
    return runner(transform, mode=mode)(picture, **others)


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
def test_every_size_is_as_pillow_makes_it_to_the_bit(photo, transform, crop_mode, interpolation):
    transform = replace(transform, crop_mode=crop_mode, interpolation=interpolation)
    run_it = runner(transform)
    for size in (*SIZES, *MIXED):
        picture = part(photo, size)
        assert np.array_equal(run_it(picture), transform(picture)), size


@pytest.mark.parametrize("interpolation", GRAPH_FILTERS)
def test_noise_and_white_beside_black(interpolation):
    """Where bicubic goes beyond black and white, and of many pixels, to the bit too."""
    transform = replace(WIDE, crop_mode="squash", interpolation=interpolation)
    run_it, random = runner(transform), np.random.default_rng(3)
    for height, width in ((1039, 61), (67, 2011), (7, 23), (331, 337)):
        noise = random.integers(0, 256, (height, width, 3), np.uint8)
        for levels in (noise, np.where(noise > 127, 255, 0).astype(np.uint8)):
            picture = Image.fromarray(levels)
            assert np.array_equal(run_it(picture), transform(picture)), (width, height)


# Width and height that the crop leaves little of.
LINES = ((1, 300), (300, 1), (2, 211), (307, 3), (5, 401), (1, 7), (23, 1))


@pytest.mark.parametrize("interpolation", GRAPH_FILTERS)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("transform", [SQUARE, WIDE, LOOSE, GREY], ids=lambda t: f"{t.input_size}")
def test_lines_are_as_pillow_makes_them_to_the_bit(transform, crop_mode, interpolation):
    transform = replace(transform, crop_mode=crop_mode, interpolation=interpolation)
    run_it, random = runner(transform), np.random.default_rng(5)
    for width, height in LINES:
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        assert np.array_equal(run_it(picture), transform(picture)), (width, height)


LONG = """
import resource, sys
import numpy as np
from tests.exporters.test_pictures import MEAN, STD, runner
from hhdeploy.preprocess import Preprocess
run_it = runner(Preprocess((3, 224, 224), MEAN, STD))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for shape in ((1, 60_000, 3), (60_000, 1, 3)):
    run_it(np.zeros(shape, np.uint8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_line_takes_no_gigabytes():
    """Resized whole it has 3.7 billion pixels."""
    done = subprocess.run(
        [sys.executable, "-c", LONG], capture_output=True, text=True, check=False, cwd=ROOT,
        timeout=COMMAND_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 1024


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("precision = {4194304}", "precision = {4096}"),
        ("half_a_unit = {0.5}", "half_a_unit = {-16384.5}"),
    ],
    ids=["weights of fewer bits", "sums rounded down"],
)
def test_arithmetic_that_is_not_pillow_s_shows(photo, monkeypatch, right, wrong):
    assert right in resizing._SHARED_NUMBERS
    numbers = resizing._SHARED_NUMBERS.replace(right, wrong)
    monkeypatch.setattr(resizing, "_SHARED_NUMBERS", numbers)
    picture = part(photo, (451, 299))
    made = runner(SQUARE, picture_graph.__wrapped__)(picture)
    assert not np.array_equal(made, SQUARE(picture))


@pytest.mark.parametrize("interpolation", GRAPH_FILTERS)
def test_openvino_runs_it_too(photo, interpolation):
    """It computes float64 in float32."""
    pytest.importorskip("openvino")
    transform = replace(WIDE, interpolation=interpolation)
    core = shared_core()
    model = core.read_model(picture_graph("center", interpolation, 3))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    stated = {n: np.asarray(v, d) for n, (d, v) in transform.graph_inputs.items()}
    for size in ((451, 299), (29, 41)):
        picture = part(photo, size)
        made = compiled({"image": np.asarray(picture), **stated})["images"][0]
        off = np.abs(made - transform(picture)) * np.float32(STD)[:, None, None] * 255
        assert round(float(off.max())) <= 1, size
        assert np.mean(off > 0.5) < 0.01, size


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


@pytest.mark.parametrize("channels", [1, 3])
def test_the_files_are_small_and_of_an_old_format(tmp_path, channels):
    write_picture_graphs(tmp_path, channels)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == sorted(f"preprocess.{c}.{f}.onnx" for c in CROP_MODES for f in GRAPH_FILTERS)
    for file in files:
        assert (tmp_path / file).stat().st_size < 17_000
        model = onnx.load(tmp_path / file)
        assert (model.ir_version, model.opset_import[0].version) == (9, 18)


def test_models_that_take_no_pictures_get_none(tmp_path):
    write_picture_graphs(tmp_path, 5)
    assert not list(tmp_path.iterdir())
    many = Preprocess((5, 32, 32), (0.5,) * 5, (0.5,) * 5)
    assert many.graph_file is None
    assert replace(SQUARE, interpolation="lanczos").graph_file is None
