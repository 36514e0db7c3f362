"""Graphs that make a model's input of a decoded picture, for those who have no Python.

There is one for each crop mode and filter; the numbers of a transform are inputs, so that one file
serves every adapter. Inside is what Pillow does (`resizing`): one axis is resized after the other,
and each result is rounded to whole levels.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from PIL import Image

from hhdeploy.exporters.portable.resizing import (
    needed_nodes,
    resize_nodes,
    resize_numbers,
    scale_nodes,
)
from hhdeploy.preprocess import CROP_MODES, GRAPH_FILTERS, graph_file

# What older runtimes take too: Pad takes axes since 18.
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

# Pillow resizes the width first; later versions the height where it shrinks by more than twice as
# many pixels as the width does.
_ALWAYS = "is_height_first = Greater(zero, first)"
_IN_TURN = """
    fewer_rows = Sub(rows, target_h)
    fewer_columns = Sub(columns, target_w)
    twice_as_many = Add(fewer_columns, fewer_columns)
    by_more = Greater(fewer_rows, twice_as_many)
    shrinks = Greater(fewer_rows, zero)
    is_height_first = And(by_more, shrinks)
"""

# Pillow's grey, in its integers: float32 holds all sums below 2^24.
_GREY = """
    colours = Cast<to=1>(seen)
    weighted = Mul(colours, grey_weights)
    sums = ReduceSum<keepdims=1>(weighted, last_axis)
    rounding = Add(sums, grey_half)
    shares = Mul(rounding, grey_unit)
    source = Floor(shares)
"""
_GREY_NUMBERS = """,
    float[3] grey_weights = {19595, 38470, 7471},
    float grey_half = {32768}, float grey_unit = {0.0000152587890625}"""

# A step resizes the rows of a matrix: of a picture, [height, width * channels], or of one that is
# turned, [width, channels * height]. Of the result it makes what the crop leaves alone, and of
# the picture it takes what that needs: a line of a thousand pixels is resized to one of a quarter
# of a million.
_GRAPH = """
<ir_version: %(ir)d, opset_import: ["": %(opset)d]>
preprocess (uint8[height, width, 3] image, float[%(c)d] mean, float[%(c)d] std, int64[2] resize,
            int64[2] crop, float[%(c)d] fill) => (float[1, %(c)d, out_height, out_width] images)
<
    int64[1] zero = {0}, int64[1] first = {1}, int64[2] nothing = {0, 0}, int64[2] ones = {1, 1},
    int64[2] two = {2, 2}, int64[2] sides = {0, 1},
    int64[2] axes = {1, 2},
    int64[1] channels = {%(c)d}, int64[3] by_channel = {%(c)d, 1, 1}, float white = {255},
    %(numbers)s%(grey_numbers)s
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

    %(order)s
    a_from = Where(is_height_first, rows, columns)
    a_to = Where(is_height_first, target_h, target_w)
    b_from = Where(is_height_first, columns, rows)
    b_to = Where(is_height_first, target_w, target_h)

    beyond = Sub(target, crop)
    surplus = Max(beyond, nothing)
    surplus_wide = Cast<to=11>(surplus)
    offset = Mul(surplus_wide, half_a_pixel)
    offset_round = Round(offset)
    start = Cast<to=7>(offset_round)
    inside = Min(target, crop)
    start_h = Gather(start, zero)
    start_w = Gather(start, first)
    inside_h = Gather(inside, zero)
    inside_w = Gather(inside, first)
    a_begin = Where(is_height_first, start_h, start_w)
    a_many = Where(is_height_first, inside_h, inside_w)
    b_begin = Where(is_height_first, start_w, start_h)
    b_many = Where(is_height_first, inside_w, inside_h)

    %(needed)s
    cut_columns = Concat<axis=0>(zero, b_needed)
    cut_rows = Concat<axis=0>(b_needed, zero)
    cut = Where(is_height_first, cut_columns, cut_rows)
    end_columns = Concat<axis=0>(rows, b_needed_end)
    end_rows = Concat<axis=0>(b_needed_end, columns)
    cut_end = Where(is_height_first, end_columns, end_rows)
    seen = Slice(image, cut, cut_end, sides)
    seen_rows = Shape<end=1>(seen)
    a_cut = Identity(zero)
    a_kept = Identity(a_from)
    b_cut = Identity(b_needed)
    b_kept = Sub(b_needed_end, b_needed)

    %(source)s
    by_row = Concat<axis=0>(seen_rows, last_axis)
    lines = Reshape(source, by_row)
    a_lines = If(is_height_first) <
        then_branch = high () => (as_is) { as_is = Identity(lines) },
        else_branch = wide () => (turned) { turned = Transpose<perm=[1, 0]>(lines) }
    >
    a_by_row = Concat<axis=0>(a_kept, last_axis)
    a_matrix = Reshape(a_lines, a_by_row)
    %(first_step)s
    high_shape = Concat<axis=0>(inside_h, last_axis)
    wide_shape = Concat<axis=0>(last_axis, seen_rows)
    ab_shape = Where(is_height_first, high_shape, wide_shape)
    a_joined_again = Reshape(a_resized, ab_shape)
    b_lines = Transpose<perm=[1, 0]>(a_joined_again)
    b_by_row = Concat<axis=0>(b_kept, last_axis)
    b_matrix = Reshape(b_lines, b_by_row)
    %(second_step)s
    back_shape = Concat<axis=0>(last_axis, inside_h)
    small_lines = If(is_height_first) <
        then_branch = high_back () => (turned_back) {
            columns_joined = Reshape(b_resized, back_shape)
            turned_back = Transpose<perm=[1, 0]>(columns_joined)
        },
        else_branch = wide_back () => (as_was) { as_was = Identity(b_resized) }
    >
    small_shape = Concat<axis=0>(inside, channels)
    small = Reshape(small_lines, small_shape)
    channels_first = Transpose<perm=[2, 0, 1]>(small)
    levels = Cast<to=1>(channels_first)

    lacking_or_less = Sub(crop, target)
    lacking = Max(lacking_or_less, nothing)
    before = Div(lacking, two)
    lacking_and_one = Add(lacking, ones)
    after = Div(lacking_and_one, two)
    margins = Concat<axis=0>(before, after)
    fill_by_channel = Reshape(fill, by_channel)
    above_fill = Sub(levels, fill_by_channel)
    padded_above_fill = Pad(above_fill, margins, , axes)
    padded = Add(padded_above_fill, fill_by_channel)

    mean_by_channel = Reshape(mean, by_channel)
    std_by_channel = Reshape(std, by_channel)
    shares_of_white = Div(padded, white)
    centred = Sub(shares_of_white, mean_by_channel)
    image_normalised = Div(centred, std_by_channel)
    images = Unsqueeze(image_normalised, zero)
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
            "source": _GREY if grey else "source = Identity(seen)",
            "grey_numbers": _GREY_NUMBERS if grey else "",
            "numbers": resize_numbers(interpolation),
            "order": _IN_TURN if _resizes_in_turn() else _ALWAYS,
            "needed": scale_nodes("a") + scale_nodes("b") + needed_nodes("b"),
            "first_step": resize_nodes("a", interpolation),
            "second_step": resize_nodes("b", interpolation),
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
