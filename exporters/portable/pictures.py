"""Graphs that make a model's input of a decoded picture, for those who have no Python.

There is one for each crop mode and filter; the numbers of a transform are inputs, so that one file
serves every adapter. Inside is what Pillow does: one axis is resized after the other, and each
result is rounded to whole levels. (Both axes in one Resize are rounded once, and up to 12 levels
off.)
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from PIL import Image

from hhdeploy.preprocess import CROP_MODES, GRAPH_FILTERS, graph_file

# What older runtimes take too: Resize antialiases since 18.
_OPSET, _IR_VERSION = 18, 9

# How Python finds the size to resize to, in its float64: where a number ends in a half, float32
# may round it to the other side.
_KEEPING_RATIO = """
    size_wide = Cast<to=11>(size)
    resize_wide = Cast<to=11>(resize)
    ratios = Div(size_wide, resize_wide)
    ratio = {choice}<keepdims=1>(ratios)
    kept_wide = Div(size_wide, ratio)
    kept_round = Round(kept_wide)
    kept = Cast<to=7>(kept_round)
"""
_BORDER = _KEEPING_RATIO.format(choice="ReduceMax") + "wanted = Identity(kept)"
# To a square the short side is exact and the long one truncated.
_CENTER = f"""
    {_KEEPING_RATIO.format(choice="ReduceMin")}
    short = ReduceMin<keepdims=1>(size)
    scaled = Mul(size, resize)
    truncated = Div(scaled, short)
    square = Equal(resize_h, resize_w)
    wanted = Where(square, truncated, kept)
"""
_WANTED = {"center": _CENTER, "squash": "wanted = Identity(resize)", "border": _BORDER}

# As Pillow does, what lies outside of the picture has no weight.
_RESIZE = {
    "bicubic": 'mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1, antialias=1',
    "bilinear": 'mode="linear", exclude_outside=1, antialias=1',
}

# The size after one of two steps. Pillow resizes the width first; later versions the height where
# it shrinks by more than twice as many pixels as the width does.
_WIDTH_FIRST = "once = Concat<axis=0>(rows, target_w)"
_IN_TURN = """
    width_first = Concat<axis=0>(rows, target_w)
    height_first = Concat<axis=0>(target_h, columns)
    fewer_rows = Sub(rows, target_h)
    fewer_columns = Sub(columns, target_w)
    twice_as_many = Add(fewer_columns, fewer_columns)
    by_more = Greater(fewer_rows, twice_as_many)
    shrinks = Greater(fewer_rows, zero)
    is_height_first = And(by_more, shrinks)
    once = Where(is_height_first, height_first, width_first)
"""

# Pillow's grey, in its integers: float32 holds all sums below 2^24.
_GREY = """
    weighted = Mul(planes, grey_weights)
    sums = ReduceSum<keepdims=1>(weighted, first)
    rounding = Add(sums, grey_half)
    shares = Mul(rounding, grey_unit)
    source = Floor(shares)
"""
_GREY_NUMBERS = """,
    float[1, 3, 1, 1] grey_weights = {19595, 38470, 7471},
    float grey_half = {32768}, float grey_unit = {0.0000152587890625}"""

# `up`: Pillow rounds halves up, and of whole ratios there are many, where float32 is a little less.
_GRAPH = """
<ir_version: %(ir)d, opset_import: ["": %(opset)d]>
preprocess (uint8[height, width, 3] image, float[%(c)d] mean, float[%(c)d] std, int64[2] resize,
            int64[2] crop, float[%(c)d] fill) => (float[1, %(c)d, out_height, out_width] images)
<
    int64[1] zero = {0}, int64[1] first = {1}, int64[2] none = {0, 0}, int64[2] ones = {1, 1},
    int64[2] two = {2, 2}, int64[2] axes = {2, 3}, int64[2] batch_and_channels = {1, %(c)d},
    int64[4] by_channel = {1, %(c)d, 1, 1}, float half = {0.5}, float up = {0.50006103515625},
    float black = {0}, float white = {255}%(grey_numbers)s
>
{
    size = Shape<end=2>(image)
    rows = Shape<end=1>(image)
    columns = Shape<start=1, end=2>(image)
    resize_h = Gather(resize, zero)
    resize_w = Gather(resize, first)
    %(wanted)s
    target = Max(wanted, ones)
    target_h = Gather(target, zero)
    target_w = Gather(target, first)

    channels_first = Transpose<perm=[2, 0, 1]>(image)
    levels = Unsqueeze(channels_first, zero)
    planes = Cast<to=1>(levels)
    %(source)s

    %(once)s
    once_size = Concat<axis=0>(batch_and_channels, once)
    once_exact = Resize<%(resize)s>(source, , , once_size)
    once_up = Add(once_exact, up)
    once_whole = Floor(once_up)
    once_levels = Clip(once_whole, black, white)
    small_size = Concat<axis=0>(batch_and_channels, target)
    small_exact = Resize<%(resize)s>(once_levels, , , small_size)
    small_up = Add(small_exact, up)
    small_whole = Floor(small_up)
    small = Clip(small_whole, black, white)

    lacking_or_less = Sub(crop, target)
    lacking = Max(lacking_or_less, none)
    before = Div(lacking, two)
    lacking_and_one = Add(lacking, ones)
    after = Div(lacking_and_one, two)
    margins = Concat<axis=0>(before, after)
    fill_by_channel = Reshape(fill, by_channel)
    above_fill = Sub(small, fill_by_channel)
    padded_above_fill = Pad(above_fill, margins, , axes)
    padded = Add(padded_above_fill, fill_by_channel)

    padded_size = Add(target, lacking)
    surplus = Sub(padded_size, crop)
    surplus_float = Cast<to=1>(surplus)
    offset = Mul(surplus_float, half)
    offset_round = Round(offset)
    start = Cast<to=7>(offset_round)
    end = Add(start, crop)
    cropped = Slice(padded, start, end, axes)

    mean_by_channel = Reshape(mean, by_channel)
    std_by_channel = Reshape(std, by_channel)
    shares_of_white = Div(cropped, white)
    centred = Sub(shares_of_white, mean_by_channel)
    images = Div(centred, std_by_channel)
}
"""


@cache
def _resizes_in_turn() -> bool:
    """Whether the Pillow that is here resizes the height first where that is less work."""
    levels = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    picture, bicubic = Image.fromarray(levels), Image.Resampling.BICUBIC
    height_first = picture.resize((40, 7), bicubic).resize((39, 7), bicubic)
    return picture.resize((39, 7), bicubic).tobytes() == height_first.tobytes()


@cache
def picture_graph(crop_mode: str, interpolation: str, channels: int) -> bytes:
    """An ONNX graph that does what `hhdeploy.preprocess.Preprocess` does.

    Its inputs are ``image``, uint8 [h, w, 3], upright, and `Preprocess.graph_inputs`; its output
    is ``images``, float32 [1, channels, H, W], normalised.

    Args:
        crop_mode: of `hhdeploy.preprocess.CROP_MODES`.
        interpolation: of `hhdeploy.preprocess.GRAPH_FILTERS`.
        channels: 3, or 1: the picture in Pillow's grey.
    """
    grey = channels == 1
    model = onnx.parser.parse_model(
        _GRAPH
        % {
            "ir": _IR_VERSION,
            "opset": _OPSET,
            "c": channels,
            "wanted": _WANTED[crop_mode],
            "source": _GREY if grey else "source = Identity(planes)",
            "grey_numbers": _GREY_NUMBERS if grey else "",
            "resize": _RESIZE[interpolation],
            "once": _IN_TURN if _resizes_in_turn() else _WIDTH_FIRST,
        }
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"{index}/{node.op_type}"
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def write_picture_graphs(path: Path, channels: int) -> None:
    """Write the graphs of all crop modes and filters into a directory; none for models that take
    no pictures, of other than 1 or 3 channels."""
    if channels in (1, 3):
        for crop_mode, interpolation in product(CROP_MODES, GRAPH_FILTERS):
            content = picture_graph(crop_mode, interpolation, channels)
            (path / graph_file(crop_mode, interpolation)).write_bytes(content)
